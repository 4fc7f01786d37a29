"""From one form of an encoder to another: read, write aside, run both models on one input, publish by one rename."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from hydra_scale.config import ParallelConfig
from hydra_scale.convert.bare_mixer import read_mixer, run_mixer, write_mixer
from hydra_scale.convert.exported import read_contents
from hydra_scale.convert.onnx_export import run_onnx, write_onnx
from hydra_scale.convert.package import EncoderPackage, MixerPackage, Output, Probe
from hydra_scale.convert.public_hydra import read_public, run_public, write_public
from hydra_scale.convert.run import read_run
from hydra_scale.convert.torch_export import run_exported, write_exported
from hydra_scale.convert.wheel import check_name, read_wheel, run_wheel, write_wheel
from hydra_scale.errors import CheckpointError, ConfigError, EnvironmentFault, HydraScaleError
from hydra_scale.topology import joined

Package = EncoderPackage | MixerPackage


@dataclass(frozen=True)
class Options:
    """What a conversion may be told besides its two forms; each belongs to some of them only."""

    settings: tuple[str, ...] = ()
    """`model.a.b=value` that the source does not tell; for `public-hydra` and `mixer`."""
    name: str | None = None
    """Name of the package, for `--to wheel`."""
    version: str | None = None
    """Version of the package, for `--to wheel`; absent: 0.1.0."""
    layer: int | None = None
    """Which layer's mixer, for an encoder `--to mixer`; absent: 0."""


@dataclass(frozen=True)
class Target:
    """A form to write: how, and how what was written is run on a probe.

    Adapters take the kind of package that `_check_forms` lets through to them.
    """

    write: Callable[[Any, Path], None]
    run: Callable[[Path, Any, Probe], torch.Tensor]
    output: Output = "logits"


SOURCES: dict[str, Callable[[Path, Sequence[str]], Package]] = {
    "run": lambda path, settings: read_run(path),
    "public-hydra": read_public,
    "mixer": read_mixer,
    "huggingface": lambda path, settings: read_contents(path),
    "wheel": lambda path, settings: read_wheel(path),
}
_WITH_SETTINGS = ("public-hydra", "mixer")
TARGETS = ("huggingface", "wheel", "public-hydra", "mixer", "torch-export", "onnx")
_MIXER_TARGETS = ("mixer", "torch-export", "onnx")
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}


def convert(source_kind: str, target_kind: str, source: Path, target: Path, options: Options = Options()) -> float:
    """Convert `source` to `target`; returns the relative difference between the outputs of the two models.

    The source is run by this system's own model, row by row; the target as its users run it, as one padded batch.

    Raises:
        ConfigError: forms that cannot be converted, or an option that does not belong to them.
        CheckpointError, DataError: the source cannot be read, the target exists, or the two models differ.
        EnvironmentFault: transformers or the ONNX libraries are needed and absent.
    """
    _check_forms(source_kind, target_kind)
    _check_options(source_kind, target_kind, options)
    form = _target(target_kind, options)
    if target.exists():
        raise CheckpointError(f"{target}: exists already; choose another output or remove it")
    aside = target.with_name(f".writing-{target.name}")  # the suffix tells the format
    with joined(ParallelConfig()):
        package = SOURCES[source_kind](source, options.settings)
        if target_kind == "mixer" and isinstance(package, EncoderPackage):
            package = package.layer_mixer(options.layer or 0)
        probe, expected = _run(package, form.output, source)
        _remove(aside)
        try:
            _write(form, package, aside, target)
            difference = _difference(form.run(aside, package, probe), expected)
            if not difference <= _TOLERANCE[package.dtype]:
                raise CheckpointError(
                    f"{target}: its outputs differ from the source's by {difference:.1e} (relative), at most"
                    f" {_TOLERANCE[package.dtype]:.0e} is rounding; not published"
                )
            aside.rename(target)
        finally:
            _remove(aside)
    return difference


def _check_forms(source_kind: str, target_kind: str) -> None:
    for kind, known, what in ((source_kind, SOURCES, "--from"), (target_kind, TARGETS, "--to")):
        if kind not in known:
            reason = ": only training writes runs" if kind == "run" else ""
            raise ConfigError(f"convert {what} {kind}: not available{reason}; choose one of {', '.join(known)}")
    if source_kind == "mixer" and target_kind not in _MIXER_TARGETS:
        raise ConfigError(
            f"convert --from mixer --to {target_kind}: a mixer alone is no encoder;"
            f" it converts to {' or '.join(_MIXER_TARGETS)}"
        )


def _check_options(source_kind: str, target_kind: str, options: Options) -> None:
    """Refuse what would be ignored."""
    if options.settings and source_kind not in _WITH_SETTINGS:
        raise ConfigError(
            f"setting {options.settings[0]!r}: a {source_kind} knows its settings;"
            f" they are given only with --from {' or '.join(_WITH_SETTINGS)}"
        )
    if target_kind != "wheel" and (options.name is not None or options.version is not None):
        raise ConfigError(f"--name and --package-version belong to --to wheel, not to --to {target_kind}")
    if options.layer is not None and (target_kind != "mixer" or source_kind == "mixer"):
        raise ConfigError("--layer belongs to the conversion of an encoder --to mixer only")


def _target(kind: str, options: Options) -> Target:
    if kind == "huggingface":
        try:
            from hydra_scale.convert import huggingface
        except ModuleNotFoundError as error:
            raise EnvironmentFault(f"{error.name}: not installed; pip install 'hydra-scale[huggingface]'") from None
        return Target(huggingface.write_huggingface, huggingface.run_huggingface)
    if kind == "wheel":
        name, version = check_name(options.name, options.version or "0.1.0")
        return Target(lambda package, path: write_wheel(package, path, name, version), run_wheel)
    if kind == "public-hydra":
        return Target(write_public, run_public)
    if kind == "mixer":
        return Target(write_mixer, run_mixer, "vectors")
    if kind == "onnx":
        return Target(write_onnx, run_onnx, "vectors")
    return Target(write_exported, run_exported, "vectors")


def _difference(found: torch.Tensor, expected: list[torch.Tensor]) -> float:
    """Largest difference of padded rows from those expected, over the largest number expected."""
    gaps = [float((row[: len(alone)] - alone).abs().max()) for row, alone in zip(found, expected, strict=True)]
    return max(gaps) / max(float(alone.abs().max()) for alone in expected)


def _run(package: Package, output: Output, source: Path) -> tuple[Probe, list[torch.Tensor]]:
    """A batch and what the source makes of it."""
    probe = package.probe()
    try:
        return probe, package.run(probe, output)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from None


def _write(form: Target, package: Package, aside: Path, target: Path) -> None:
    try:
        form.write(package, aside)
    except HydraScaleError as error:  # speaks of the file it was told to write
        raise type(error)(str(error).replace(str(aside), str(target))) from None
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error  # safetensors says it in words only
        raise CheckpointError(f"{target}: cannot be written: {reason}; choose another output") from None


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()
