"""A copy of the code beside the run: a job that waits in the queue, or comes back, runs what was submitted."""

import importlib.util
import shutil
from pathlib import Path

from hydra_scale.errors import EnvironmentFault

PACKAGES = ("hydra_scale", "hydra_kernels", "hydra_data_prep", "hydra_launch")


def freeze_code(folder: Path) -> None:
    """Replace `folder` by a copy of the project's packages as this process would import them.

    Raises:
        EnvironmentFault: it cannot be written.
    """
    aside, before = folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
    try:
        for leftover in (aside, before):
            shutil.rmtree(leftover, ignore_errors=True)
        for package in PACKAGES:
            shutil.copytree(_source(package), aside / package, ignore=shutil.ignore_patterns("__pycache__"))
        if folder.exists():
            folder.rename(before)
        aside.rename(folder)
        shutil.rmtree(before, ignore_errors=True)
    except OSError as error:
        raise EnvironmentFault(
            f"{folder}: cannot hold the copy of the code: {error}; free space or permissions"
        ) from None


def _source(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise EnvironmentFault(f"package {package} is not installed; `make install` sets everything up")
    return Path(spec.submodule_search_locations[0])
