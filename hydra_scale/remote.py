"""Folders behind URLs, through fsspec: what reading data and uploading checkpoints have in common."""

from typing import Any

import fsspec

from hydra_scale.errors import EnvironmentFault, HydraScaleError

ATTEMPTS = 5


def file_system(address: str, refused: type[HydraScaleError]) -> tuple[Any, str]:
    """The file system of a URL and the path in it, without a slash at its end.

    Raises:
        refused: fsspec does not know the scheme.
        EnvironmentFault: the scheme needs a package that is not installed.
    """
    try:
        files, root = fsspec.core.url_to_fs(address)
    except ValueError:
        known = ", ".join(sorted({"s3", "gs", "https", "http", "hf", "abfs", "file"}))
        raise refused(f"{address}: unknown scheme; expected one that fsspec knows, like {known}") from None
    except ImportError as error:
        raise EnvironmentFault(f"{address}: {error}") from None
    return files, root.rstrip("/")


def may_pass(error: BaseException) -> bool:
    """Whether another attempt may succeed: the store did not say that nothing is there. Stores raise errors of their
    libraries' own classes (aiohttp, botocore, gcsfs), which are not OSErrors."""
    return isinstance(error, Exception) and not isinstance(error, FileNotFoundError)
