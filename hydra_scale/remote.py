"""Folders behind URLs, through fsspec: what reading data and uploading checkpoints have in common."""

from collections.abc import Callable
from typing import Any, TypeVar

import fsspec
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential_jitter

from hydra_scale.errors import EnvironmentFault, HydraScaleError

ATTEMPTS = 5
_EXTRAS = {"s3": "s3", "s3a": "s3", "http": "http", "https": "http"}
_WAIT = wait_exponential_jitter(initial=1, max=30)
_Result = TypeVar("_Result")


def file_system(address: str, refused: type[HydraScaleError]) -> tuple[Any, str]:
    """The file system of a URL and the path in it, without a slash at its end.

    Raises:
        refused: fsspec does not know the scheme.
        EnvironmentFault: the scheme needs a package that is not installed, or a server that does not answer.
    """
    try:
        files, root = fsspec.core.url_to_fs(address)
    except ValueError:
        known = ", ".join(sorted({"s3", "gs", "https", "http", "hf", "abfs", "file"}))
        raise refused(f"{address}: unknown scheme; expected one that fsspec knows, like {known}") from None
    except ImportError as error:
        extra = _EXTRAS.get(address.partition("://")[0])
        advice = f"; pip install 'hydra-scale[{extra}]'" if extra else ""
        raise EnvironmentFault(f"{address}: {error}{advice}") from None
    except Exception as error:  # ftp, github, zip and others look at what is there at once, and raise what they like
        reason = str(error) or type(error).__name__
        raise EnvironmentFault(f"{address}: cannot be opened: {reason}; check the URL and the network") from None
    return files, root.rstrip("/")


def retried(call: Callable[[], _Result]) -> _Result:
    """What `call()` returns, tried so many times as there are `ATTEMPTS`, unless the store's answer is final."""
    again = retry_if_exception(_may_pass)
    return Retrying(stop=stop_after_attempt(ATTEMPTS), wait=_WAIT, retry=again, reraise=True)(call)


def why(error: BaseException) -> str:
    """The end of a sentence that says what could not be done: why `retried` gave up, and what to do."""
    reason = str(error) or type(error).__name__
    if _is_refusal(error):
        return f"without other credentials: {reason}; set those of the store (s3: AWS_ACCESS_KEY_ID and the like)"
    return f"after {ATTEMPTS} attempts: {reason}; try again"


def no_bucket(error: BaseException) -> bool:
    """Whether S3 said that the whole bucket is not there, where a path in it is asked for."""
    response = getattr(error.__cause__, "response", {})
    return isinstance(error, FileNotFoundError) and response.get("Error", {}).get("Code") == "NoSuchBucket"


def make_folder(files: Any, path: str) -> None:
    """Make a folder and those above it, unless the store has none: there it might make a bucket of a mistyped name."""
    if not hasattr(files, "split_path"):  # bucket and key, of stores that have them
        files.makedirs(path, exist_ok=True)


def _may_pass(error: BaseException) -> bool:
    """Whether another attempt may succeed: the store did not say that nothing is there, or refuse. Stores raise errors
    of their libraries' own classes (aiohttp, botocore, gcsfs), which are not OSErrors."""
    return isinstance(error, Exception) and not isinstance(error, FileNotFoundError) and not _is_refusal(error)


def _is_refusal(error: BaseException) -> bool:
    """Whether other credentials are needed. botocore, which is there if it raised, has classes for their absence."""
    lacking = {"NoCredentialsError", "PartialCredentialsError"}
    return isinstance(error, PermissionError) or type(error).__name__ in lacking
