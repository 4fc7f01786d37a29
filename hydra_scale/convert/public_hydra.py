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
from hydra_scale.config_file import flatten, override_model
from hydra_scale.convert.bare_mixer import infer_mixer, told_by
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
_TIED = "cls.predictions.decoder.weight"
_BUFFERS = ("bert.embeddings.position_ids",)
_FIXED = (
    "norm", "norm_eps", "embedding_norm_eps", "mixer.ngroups", "mixer.dt_limit", "mixer.learnable_init_states",
    "mixer.bias", "mixer.conv_bias",
)  # fmt: skip
"""Settings that the public model cannot change; their values are the defaults of ModelConfig."""

_STATED = (("hidden_act", "gelu"), ("matrix_mixer_type", "hydra"))
"""Of the public configuration, what this system has one of."""


def from_public(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our names for a public state dict; the tied output matrix must equal the word embedding.

    Raises:
        CheckpointError: a name that the public masked language model does not have, or an untied output matrix.
    """
    state = {name: tensor for name, tensor in state.items() if name not in _BUFFERS}
    tied = state.pop(_TIED, None)
    ours = {_rename(name, forward=True): tensor for name, tensor in state.items()}
    word = ours.get("embedding.word.weight")
    if tied is not None and (word is None or not torch.equal(tied, word)):
        raise CheckpointError(f"{_TIED}: differs from the word embedding; this system's output matrix is tied to it")
    return ours


def to_public(parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The public state dict of our parameters, the tied output matrix included."""
    public = {_rename(name, forward=False): tensor for name, tensor in parameters.items()}
    public[_TIED] = parameters["embedding.word.weight"]
    return public


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
    raise CheckpointError(f"{name}: no counterpart in the {'public Hydra' if forward else 'trained'} model's names")


def read_public(path: Path, settings: Sequence[str] = ()) -> EncoderPackage:
    """A public masked language model from a `.safetensors` file or a `.pt` file (flat, or a Composer checkpoint).

    The configuration follows from the shapes and, of groups and the clamp of the step sizes, from the file's metadata
    as for a bare mixer; if that holds the public configuration (`config`, JSON), also its epsilon.
    `settings` (`model.norm_eps=1e-6`) say what neither tells. By itself the public model has one group of B and C, and
    no MLP.

    Raises:
        CheckpointError: unreadable, or not the state dict of a public Hydra masked language model.
        ConfigError: a setting is unknown or does not fit.
    """
    tensors, metadata = read_tensors(path)
    try:
        parameters = from_public(tensors)
        stated = _stated(metadata)
        given = override_model(_infer_config(parameters, stated, **told_by(metadata)), settings).mixer
        # once more: with other groups the same shapes tell another width of the state
        again = _infer_config(parameters, stated, ngroups=given.ngroups, dt_limit=given.dt_limit)
        model = override_model(again, settings)
    except KeyError as error:
        raise CheckpointError(f"{path}: holds no tensor {error}: not a public Hydra masked language model") from None
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except (ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"{path}: not a public Hydra masked language model: {error}") from None
    return EncoderPackage(model, parameters, tokenizer=None, origin={"public checkpoint": path.name})


def write_public(package: EncoderPackage, path: Path) -> None:
    """The public state dict as one `.safetensors` or `.pt` file, the tied matrix under both its names.

    Raises:
        CheckpointError: the model has layers, norms or settings that the public one lacks.
        ConfigError: the file's name ends otherwise.
    """
    check_suffix(path)
    if other := sorted(set(package.model.layer_kinds) - {"H"}):
        raise CheckpointError(f"model.layer_pattern has {', '.join(other)}: the public model has only H layers")
    found, public = (dict(flatten(model.model_dump())) for model in (package.model, ModelConfig()))
    for key in _FIXED:
        if found[key] != public[key]:
            raise CheckpointError(f"model.{key} is {found[key]}: the public masked language model has {public[key]}")
    write_tensors(path, to_public(package.parameters))


def run_public(path: Path, package: EncoderPackage, probe: Probe) -> torch.Tensor:
    """Logits of the file, read back: its rows padded (batch, seqlen, vocab_size)."""
    rows = read_public(path).run(probe, "logits")
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def _stated(metadata: dict[str, str]) -> dict[str, Any]:
    """Settings that the public configuration in a file's metadata states.

    Raises:
        CheckpointError: of another activation or mixer, which the shapes would not tell.
        ValueError: it is no JSON object.
    """
    config = json.loads(metadata.get("config", "{}"))
    if not isinstance(config, dict):
        raise ValueError(f"its configuration is {config!r}, expected an object of settings")
    for key, expected in _STATED:
        if (found := config.get(key, expected)) != expected:
            raise CheckpointError(f"its configuration says {key}: {found!r}; this system has {expected!r} only")
    return {"embedding_norm_eps": config["layer_norm_eps"]} if "layer_norm_eps" in config else {}


def _infer_config(parameters: dict[str, torch.Tensor], stated: dict[str, Any], **told: Any) -> ModelConfig:
    vocab_size, d_model = parameters["embedding.word.weight"].shape
    positions = parameters.get("embedding.position.weight")
    first = "encoder.layers.0.mixer."
    return ModelConfig(
        d_model=d_model,
        num_layers=1 + max(int(name.split(".")[2]) for name in parameters if name.startswith("encoder.layers.")),
        norm_position="pre" if "encoder.final_norm.weight" in parameters else "post",
        vocab_size=vocab_size,
        type_vocab_size=parameters["embedding.segment.weight"].shape[0],
        position_embedding="none" if positions is None else "learned",
        max_positions=512 if positions is None else positions.shape[0],
        mixer=infer_mixer({n.removeprefix(first): t for n, t in parameters.items() if n.startswith(first)}, **told),
        **stated,
    )
