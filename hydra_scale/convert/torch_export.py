"""The encoder, or a bare mixer, as a `torch.export` program for any number of rows of any length."""

from pathlib import Path

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from hydra_scale.convert.package import EncoderPackage, MixerPackage, Probe, check_same_tensors
from hydra_scale.convert.padded import PaddedEncoder, PaddedMixer
from hydra_scale.errors import ConfigError

SUFFIX = ".pt2"
_EXAMPLE_SHAPE = (2, 70)  # neither 1, which would be taken for a constant, nor what the probe has
_LONGEST = 1 << 20


def write_exported(package: EncoderPackage | MixerPackage, path: Path) -> None:
    """Write the program: called with inputs and attention_mask, both (batch, seqlen, ...), it returns vectors.

    Raises:
        ConfigError: the file's name ends otherwise.
        CheckpointError: the parameters are not those of the model.
    """
    check_suffix(path, SUFFIX)
    program = exported_program(package)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.export.save(program, path)


def check_suffix(path: Path, suffix: str) -> None:
    """ConfigError unless the file to write is named so."""
    if path.suffix != suffix:
        raise ConfigError(f"{path}: the name of the file to write must end in {suffix}")


def exported_program(package: EncoderPackage | MixerPackage) -> ExportedProgram:
    """The graph of the padded model with its weights, of any number of rows of any length."""
    longest = _LONGEST
    if isinstance(package, EncoderPackage):
        model: nn.Module = PaddedEncoder(package.model, package.vocab_size)
        parameters = {name: tensor for name, tensor in package.parameters.items() if not name.startswith("head.")}
        if package.model.position_embedding == "learned":
            longest = package.model.max_positions
    else:
        model, parameters = _padded_mixer(package), package.parameters
    check_same_tensors("the model", dict(model.named_parameters()), parameters)
    model.to(package.dtype).load_state_dict(parameters)
    inputs = (
        package.probe().inputs[: _EXAMPLE_SHAPE[0], : min(_EXAMPLE_SHAPE[1], longest)].clone()
    )  # strides too are taken from it
    mask = torch.ones(inputs.shape[:2], dtype=torch.int64)
    axes = {0: Dim("batch", min=1, max=1 << 16), 1: Dim("seqlen", min=1, max=longest)}
    with torch.no_grad():
        return torch.export.export(
            model.eval().requires_grad_(False),
            (inputs, mask),
            dynamic_shapes=(axes, axes),
            prefer_deferred_runtime_asserts_over_guards=True,  # or the number of blocks is fixed at the example's
        )


def run_exported(path: Path, package: EncoderPackage | MixerPackage, probe: Probe) -> torch.Tensor:
    """Vectors of the file, loaded again: (batch, seqlen, d_model)."""
    program = torch.export.load(path).module()
    vectors: torch.Tensor = program(probe.inputs, probe.attention_mask)
    return vectors


def _padded_mixer(package: MixerPackage) -> PaddedMixer:
    return PaddedMixer(package.d_model, **package.mixer.model_dump(exclude={"backend"}))
