"""One Hydra mixer as a file: the state dict of the public class, without the encoder around it.

The shapes tell all of its settings but two: how many groups share B and C (two groups of 8 look like one of 16), and
the clamp of the step sizes. A `.safetensors` file holds them as metadata, under the names of the class's constructor;
for files that do not, they are given as settings (`model.mixer.ngroups=2`).
"""

import json
import logging
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from hydra_scale.config import MixerConfig, ModelConfig
from hydra_scale.config_file import flatten, in_short, override_model
from hydra_scale.convert.package import MixerPackage, Probe
from hydra_scale.convert.tensor_file import check_suffix, read_tensors, write_tensors
from hydra_scale.errors import CheckpointError, ConfigError

log = logging.getLogger(__name__)
NOT_IN_SHAPES = ("ngroups", "dt_limit")


def read_mixer(path: Path, settings: Sequence[str] = ()) -> MixerPackage:
    """A bare mixer from a `.safetensors` or `.pt` file.

    Raises:
        CheckpointError: unreadable, or not the state dict of a mixer.
        ConfigError: a setting is unknown or does not fit.
    """
    for setting in settings:
        if setting.partition("=")[0].removeprefix("model.mixer.") not in NOT_IN_SHAPES:
            open_ones = " and ".join(f"model.mixer.{name}" for name in NOT_IN_SHAPES)
            raise ConfigError(f"setting {setting!r}: the shapes of a mixer tell all but {open_ones}")
    parameters, metadata = read_tensors(path)
    try:
        told = told_by(metadata)
        inferred = infer_mixer(parameters, **told)
        d_model = parameters["in_proj.weight"].shape[1]
        guess = ModelConfig(d_model=d_model, num_layers=1, mixer=inferred)
        given = override_model(guess, settings).mixer
        mixer = infer_mixer(parameters, given.ngroups, dt_limit=given.dt_limit)
        model = ModelConfig(d_model=d_model, num_layers=1, mixer=mixer)
    except KeyError as error:
        name = error.args[0]
        raise CheckpointError(
            f"{path}: holds no tensor {name}: not the state dict of a Hydra mixer; a whole encoder is public-hydra"
        ) from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not the state dict of a Hydra mixer: {in_short(error)}") from None
    log_untold(path, model, [f"mixer.{name}" for name in NOT_IN_SHAPES], told, settings)
    return MixerPackage(d_model, mixer, parameters)


def write_mixer(package: MixerPackage, path: Path) -> None:
    """The public class's state dict; as `.safetensors` with the settings that the shapes do not tell.

    Raises:
        ConfigError: the file's name ends otherwise.
    """
    check_suffix(path)
    metadata = {name: json.dumps(getattr(package.mixer, name)) for name in NOT_IN_SHAPES}
    write_tensors(path, package.parameters, metadata)


def run_mixer(path: Path, package: MixerPackage, probe: Probe) -> torch.Tensor:
    """Outputs of the file, read back: its rows padded (batch, seqlen, d_model)."""
    if path.suffix == ".pt":  # holds no settings: whoever loads it knows them
        back = MixerPackage(package.d_model, package.mixer, read_tensors(path)[0])
    else:
        back = read_mixer(path)
    return torch.nn.utils.rnn.pad_sequence(back.run(probe, "vectors"), batch_first=True)


def told_by(metadata: dict[str, str]) -> dict[str, Any]:
    """What a file says of its mixers beyond their shapes.

    Raises:
        ValueError: it is not JSON, or of another kind.
    """
    return checked({name: from_json(name, metadata[name]) for name in NOT_IN_SHAPES if name in metadata})


def from_json(name: str, text: str) -> Any:
    """A value of a file's metadata. Raises ValueError if it is not JSON."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"its metadata {name!r} is not JSON: {error}") from None


def checked(told: dict[str, Any]) -> dict[str, Any]:
    """Settings of a mixer as a file tells them, as they came. Raises ValueError of one that is of another kind."""
    for name, value in told.items():
        try:
            MixerConfig.model_validate({name: value})
        except ValidationError as error:
            raise ValueError(f"it says {in_short(error)}") from None
    return told


def log_untold(
    path: Path, model: ModelConfig, names: Sequence[str], told: Collection[str], settings: Sequence[str]
) -> None:
    """Say which of these settings neither the file nor the command tells, and what they were taken to be.

    names: as in ModelConfig (`mixer.ngroups`); told: those that the file tells, without section.
    """
    given = [setting.partition("=")[0].strip() for setting in settings]
    values = dict(flatten(model.model_dump()))
    taken = [
        f"model.{name}={values[name]}"
        for name in names
        if name.rpartition(".")[2] not in told and f"model.{name}" not in given
    ]
    if taken:
        log.info("%s: does not tell all settings; taken as %s, give others behind OUT", path, ", ".join(taken))


def infer_mixer(parameters: dict[str, torch.Tensor], ngroups: int = 1, **settings: Any) -> MixerConfig:
    """The configuration that the shapes of a mixer's parameters tell, given the number of groups.

    Raises:
        KeyError: a parameter of the mixer is absent.
        ValueError: the shapes fit no mixer with so many groups.
    """
    for name, axes in (("fc_D.weight", 2), ("conv1d.weight", 3), ("in_proj.weight", 2)):
        if (found := parameters[name].dim()) != axes or 0 in parameters[name].shape:
            raise ValueError(f"{name} has shape {tuple(parameters[name].shape)}, expected {axes} axes, found {found}")
    nheads, d_inner = parameters["fc_D.weight"].shape
    conv_channels, _, d_conv = parameters["conv1d.weight"].shape
    return MixerConfig(
        d_state=(conv_channels - d_inner) // (4 * ngroups),
        d_conv=d_conv,
        headdim=d_inner // nheads,
        expand=d_inner // parameters["in_proj.weight"].shape[1],
        ngroups=ngroups,
        learnable_init_states="init_states" in parameters,
        bias="in_proj.bias" in parameters,
        conv_bias="conv1d.bias" in parameters,
        **settings,
    )
