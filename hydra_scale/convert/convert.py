"""From one form of an encoder to another: read, write aside, compare the two models, publish."""

import shutil
from collections.abc import Callable
from pathlib import Path

from hydra_scale.config import ParallelConfig
from hydra_scale.convert.huggingface import difference_from_source, write_huggingface
from hydra_scale.convert.package import EncoderPackage, read_run
from hydra_scale.convert.public_hydra import difference_from_public, read_public, write_public
from hydra_scale.errors import CheckpointError, ConfigError
from hydra_scale.topology import joined

READERS: dict[str, Callable[[Path], EncoderPackage]] = {"run": read_run, "public-hydra": read_public}
WRITERS: dict[str, Callable[[EncoderPackage, Path], None]] = {
    "huggingface": write_huggingface,
    "public-hydra": write_public,
}
COMPARERS: dict[str, Callable[[EncoderPackage, Path], float]] = {
    "huggingface": difference_from_source,
    "public-hydra": difference_from_public,
}


def convert(source_kind: str, target_kind: str, source: Path, target: Path) -> float:
    """Convert `source` to `target`; returns the relative difference between the logits of the two.

    Raises:
        ConfigError: a kind that is not among READERS or WRITERS.
        CheckpointError: the source cannot be read, the target exists, or the two models differ.
    """
    for kind, known, what in ((source_kind, READERS, "--from"), (target_kind, WRITERS, "--to")):
        if kind not in known:
            raise ConfigError(f"convert {what} {kind}: not available; choose one of {', '.join(known)}")
    if target.exists():
        raise CheckpointError(f"{target}: exists already; choose another output or remove it")
    aside = target.with_name(f".writing-{target.name}")  # the suffix tells the format
    with joined(ParallelConfig()):
        package = READERS[source_kind](source)
        _remove(aside)
        try:
            WRITERS[target_kind](package, aside)
            difference = COMPARERS[target_kind](package, aside)
            aside.rename(target)
        finally:
            _remove(aside)
    return difference


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
