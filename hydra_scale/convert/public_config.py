"""The public class's configuration, which a `.safetensors` file of it may hold as JSON in its metadata (`config`).

It says what shapes do not tell (an epsilon, whether the mixer is Hydra's) and repeats what they do.
"""

from typing import Any

from hydra_scale.config import ModelConfig
from hydra_scale.config_file import flatten
from hydra_scale.convert.bare_mixer import NOT_IN_SHAPES, checked, from_json
from hydra_scale.errors import CheckpointError

HEAD_EPS = 1e-12
"""Epsilon of the norm in the head, which the public class takes from no configuration."""

_ONLY = (("hidden_act", "gelu"), ("matrix_mixer_type", "hydra"))
"""Of these settings this system has one value."""

_FIXED = (
    "norm", "norm_eps", "mixer.ngroups", "mixer.dt_limit", "mixer.learnable_init_states", "mixer.bias",
    "mixer.conv_bias",
)  # fmt: skip
"""Settings that the public model cannot change; their values are the defaults of ModelConfig."""


def stated_in(metadata: dict[str, str]) -> dict[str, Any]:
    """The public configuration in a file's metadata; empty if there is none.

    Raises:
        CheckpointError: of another activation or mixer, which the shapes would not tell.
        ValueError: it is no JSON object.
    """
    config = from_json("config", metadata.get("config", "{}"))
    if not isinstance(config, dict):
        raise ValueError(f"its configuration is {config!r}, expected an object of settings")
    for key, expected in _ONLY:
        if (found := config.get(key, expected)) != expected:
            raise CheckpointError(f"its configuration says {key}: {found!r}; this system has {expected!r} only")
    return config


def epsilons(config: dict[str, Any]) -> dict[str, Any]:
    """Those of the embedding, the final norm and the head, by our settings; the head's has no say in it."""
    stated = {"embedding_norm_eps": config["layer_norm_eps"]} if "layer_norm_eps" in config else {}
    return stated | {"head_norm_eps": HEAD_EPS}


def mixer_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Settings of the mixer that no shape tells; the public class's own configuration lacks them.

    Raises:
        ValueError: one is of another kind.
    """
    return checked({name: config[name] for name in NOT_IN_SHAPES if name in config})


def check_agrees(config: dict[str, Any], model: ModelConfig, vocab_size: int) -> None:
    """Raises CheckpointError if the public configuration says other than the shapes."""
    shapes = of_model(model, vocab_size)
    shapes.pop("layer_norm_eps")  # no shape tells it, and a setting may replace it
    if isinstance(rows := config.get("vocab_size"), int) and rows < vocab_size:
        shapes.pop("vocab_size")  # the public code rounds the embedding's rows up
    for key, found in shapes.items():
        if (stated := config.get(key, found)) != found:
            groups = "; of several groups say model.mixer.ngroups=N" if key == "d_state" else ""
            raise CheckpointError(f"its configuration says {key}: {stated!r}, its tensors {found!r}{groups}")


def check_expressible(model: ModelConfig) -> None:
    """Raises CheckpointError for a model that no configuration of the public class describes."""
    if other := sorted(set(model.layer_kinds) - {"H"}):
        raise CheckpointError(
            f"model.layer_pattern has {', '.join(other)}: the public model has only H layers; convert to another form"
        )
    found, public = (dict(flatten(config.model_dump())) for config in (model, ModelConfig()))
    for key in _FIXED:
        if found[key] != public[key]:
            raise CheckpointError(f"model.{key} is {found[key]}: the public masked language model has {public[key]}")
    if model.eps_in_head != HEAD_EPS:
        raise CheckpointError(
            f"model.head_norm_eps is {model.eps_in_head}: the public masked language model has {HEAD_EPS}"
        )


def of_model(model: ModelConfig, vocab_size: int) -> dict[str, Any]:
    """The public configuration of a model: arguments of its class that differ from model to model."""
    learned = model.position_embedding == "learned"
    return {
        "vocab_size": vocab_size,
        "hidden_size": model.d_model,
        "num_hidden_layers": model.num_layers,
        "type_vocab_size": model.type_vocab_size,
        "layer_norm_eps": model.embedding_norm_eps,
        "is_prenorm": model.norm_position == "pre",
        "use_position_embeddings": learned,
        **({"max_position_embeddings": model.max_positions} if learned else {}),
        "d_state": model.mixer.d_state,
        "d_conv": model.mixer.d_conv,
        "expand": model.mixer.expand,
        "headdim": model.mixer.headdim,
    } | dict(_ONLY)
