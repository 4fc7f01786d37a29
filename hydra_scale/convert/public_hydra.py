"""Names of the public Hydra masked language model against ours.

Tensors have the same layout in both: the tied output matrix appears twice there and once here, and nothing else
differs but names. Parameters of the mixer keep their names.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hydra_scale.config import ModelConfig
from hydra_scale.config_file import in_short, override_model
from hydra_scale.convert import public_config
from hydra_scale.convert.bare_mixer import infer_mixer, log_untold, told_by
from hydra_scale.convert.package import EncoderPackage, Probe
from hydra_scale.convert.tensor_file import check_suffix, read_tensors, write_tensors
from hydra_scale.errors import CheckpointError

_PAIRS = (
    ("bert.embeddings.word_embeddings.", "embedding.word."),
    ("bert.embeddings.token_type_embeddings.", "embedding.segment."),
    ("bert.embeddings.position_embeddings.", "embedding.position."),
    ("bert.embeddings.LayerNorm.", "embedding.norm."),
    ("bert.encoder.norm_f.", "encoder.final_norm."),
    ("cls.predictions.transform.dense.", "head.dense."),
    ("cls.predictions.transform.LayerNorm.", "head.norm."),
    ("cls.predictions.decoder.bias", "head.bias"),
)
_PUBLIC_LAYER, _OUR_LAYER = re.compile(r"bert\.encoder\.layer\.(\d+)\.layer\."), re.compile(r"encoder\.layers\.(\d+)\.")
_TIED, _BIAS_ALIAS = "cls.predictions.decoder.weight", "cls.predictions.bias"
_POSITIONS = "bert.embeddings.position_ids"


def from_public(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our names for a public state dict; the tied output matrix must equal the word embedding.

    Raises:
        CheckpointError: a name that the public masked language model does not have, an untied output matrix, or
            positions in another order.
    """
    state = dict(state)
    tied, positions, alias = (state.pop(name, None) for name in (_TIED, _POSITIONS, _BIAS_ALIAS))
    if positions is not None and not torch.equal(positions.flatten(), torch.arange(positions.numel())):
        raise CheckpointError(f"{_POSITIONS}: expected 0, 1, 2, ...; this system counts positions from the left")
    if alias is not None and not _same(state.setdefault("cls.predictions.decoder.bias", alias), alias):
        raise CheckpointError(f"{_BIAS_ALIAS}: differs from cls.predictions.decoder.bias; remove the one not meant")
    ours = {_rename(name, forward=True): tensor for name, tensor in state.items()}
    word = ours.get("embedding.word.weight")
    if tied is not None and (word is None or not _same(tied, word)):
        raise CheckpointError(f"{_TIED}: differs from the word embedding; this system's output matrix is tied to it")
    return ours


def to_public(parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The public state dict of our parameters, the tied output matrix included."""
    public = {_rename(name, forward=False): tensor for name, tensor in parameters.items()}
    public[_TIED] = parameters["embedding.word.weight"]
    if (positions := parameters.get("embedding.position.weight")) is not None:
        public[_POSITIONS] = torch.arange(positions.shape[0])[None]
    return public


def public_name(name: str) -> str:
    """The public name of a parameter of ours."""
    return _rename(name, forward=False)


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def _rename(name: str, *, forward: bool) -> str:
    pattern, template = (
        (_PUBLIC_LAYER, r"encoder.layers.\1.") if forward else (_OUR_LAYER, r"bert.encoder.layer.\1.layer.")
    )
    if pattern.match(name):
        return pattern.sub(template, name, count=1)
    for public, ours in _PAIRS:
        source, target = (public, ours) if forward else (ours, public)
        if name.startswith(source):
            return target + name.removeprefix(source)
    kind = "public Hydra" if forward else "trained"
    hint = "; of a mixer alone say --from mixer" if name in ("in_proj.weight", "A_log") else ""
    raise CheckpointError(f"{name}: no counterpart in the names of the {kind} masked language model{hint}")


def read_public(path: Path, settings: Sequence[str] = ()) -> EncoderPackage:
    """A public masked language model from a `.safetensors` file or a `.pt` file (flat, or a trainer's checkpoint).

    The configuration follows from the shapes and, of groups and the clamp of the step sizes, from the file's metadata
    as for a bare mixer; if that holds the public configuration (`config`, JSON), it must agree with the shapes, and
    its epsilon is taken. `settings` (`model.norm_eps=1e-6`) say what neither tells. What nobody tells is as the public
    class has it, and logged.

    Raises:
        CheckpointError: unreadable, or not the state dict of a public Hydra masked language model.
        ConfigError: a setting is unknown or does not fit.
    """
    tensors, metadata = read_tensors(path)
    try:
        parameters = from_public(tensors)
        config = public_config.stated_in(metadata)
        told = public_config.mixer_settings(config) | told_by(metadata)
        stated = public_config.epsilons(config)
        given = override_model(_infer_model(parameters, stated, **told), settings).mixer
        # once more: with other groups the same shapes tell another width of the state
        again = _infer_model(parameters, stated, ngroups=given.ngroups, dt_limit=given.dt_limit)
        model = override_model(again, settings)
        public_config.check_agrees(config, model, len(parameters["embedding.word.weight"]))
    except KeyError as error:
        name = str(error.args[0])
        raise CheckpointError(f"{path}: holds no tensor {name}: not a public Hydra masked language model") from None
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: not a public Hydra masked language model: {in_short(error)}") from None
    if not config:
        log_untold(path, model, ("mixer.ngroups", "mixer.dt_limit", "embedding_norm_eps"), told, settings)
    origin = {"public checkpoint": path.name}
    return EncoderPackage(model, parameters, tokenizer=None, origin=origin, source_name=public_name)


def write_public(package: EncoderPackage, path: Path) -> None:
    """The public state dict as one `.safetensors` or `.pt` file, the tied matrix under both its names.

    A `.safetensors` file also holds the public configuration, as its metadata `config`.

    Raises:
        CheckpointError: the model has layers, norms or settings that the public one lacks.
        ConfigError: the file's name ends otherwise.
    """
    check_suffix(path)
    public_config.check_expressible(package.model)
    config = public_config.of_model(package.model, package.vocab_size)
    write_tensors(path, to_public(package.parameters), {"config": json.dumps(config)})


def run_public(path: Path, package: EncoderPackage, probe: Probe) -> torch.Tensor:
    """Logits of the file, read back: its rows padded (batch, seqlen, vocab_size)."""
    if path.suffix == ".pt":  # holds no settings: whoever loads it knows them
        back = EncoderPackage(package.model, from_public(read_tensors(path)[0]), tokenizer=None, origin={})
    else:
        back = read_public(path)
    return torch.nn.utils.rnn.pad_sequence(back.run(probe, "logits"), batch_first=True)


def _infer_model(parameters: dict[str, torch.Tensor], stated: dict[str, Any], **told: Any) -> ModelConfig:
    """The configuration that the shapes tell, given what they do not.

    Raises:
        KeyError: of the tensor that is absent, by its public name.
        ValueError: the shapes fit no model.
    """
    layers = {int(name.split(".")[2]) for name in parameters if name.startswith("encoder.layers.")}
    if layers != set(range(len(layers))) or not layers:
        numbers = f", the last numbered {max(layers)}" if layers else ""
        raise ValueError(f"it has {len(layers)} layers{numbers}; they count from 0 without a gap")
    first = "encoder.layers.0.mixer."
    try:
        vocab_size, d_model = parameters["embedding.word.weight"].shape
        positions = parameters.get("embedding.position.weight")
        segments = parameters["embedding.segment.weight"]
    except KeyError as error:
        raise KeyError(public_name(error.args[0])) from None
    try:
        mixer = infer_mixer({n.removeprefix(first): t for n, t in parameters.items() if n.startswith(first)}, **told)
    except KeyError as error:
        raise KeyError(public_name(first + error.args[0])) from None
    return ModelConfig(
        d_model=d_model,
        num_layers=len(layers),
        norm_position="pre" if "encoder.final_norm.weight" in parameters else "post",
        vocab_size=vocab_size,
        type_vocab_size=segments.shape[0],
        position_embedding="none" if positions is None else "learned",
        max_positions=512 if positions is None else positions.shape[0],
        mixer=mixer,
        **stated,
    )
