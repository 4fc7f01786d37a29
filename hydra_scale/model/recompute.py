"""Activation checkpointing: what a layer keeps for its backward pass, and what it computes again there."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from hydra_scale.config import RecomputeConfig
from hydra_scale.model.stretch import Stretch

KEEP_ALL = RecomputeConfig()
"""Nothing is computed again."""


def run_layers(
    layers: Sequence[tuple[int, nn.Module]], x_TD: torch.Tensor, stretch: Stretch, config: RecomputeConfig
) -> torch.Tensor:
    """The layers, each with its number, one after the other, keeping what `config` says. Gradients do not change.

    No generator state is kept: dropout is a function of the token.
    """
    if config.together == 1 or config.kind == "none" or not torch.is_grad_enabled():
        return _run_each(layers, x_TD, stretch, config)
    for begin in range(0, len(layers), config.together):
        some = layers[begin : begin + config.together]
        found = checkpoint(_run_each, some, x_TD, stretch, config, use_reentrant=False, preserve_rng_state=False)
        assert isinstance(found, torch.Tensor)
        x_TD = found
    return x_TD


def _run_each(
    layers: Sequence[tuple[int, nn.Module]], x_TD: torch.Tensor, stretch: Stretch, config: RecomputeConfig
) -> torch.Tensor:
    for index, layer in layers:
        x_TD = _run_layer(layer, index, x_TD, stretch, config)
    return x_TD


def _run_layer(layer: nn.Module, index: int, x_TD: torch.Tensor, stretch: Stretch, config: RecomputeConfig) -> Any:
    if config.kind == "none" or index % config.every or not torch.is_grad_enabled():
        return layer(x_TD, stretch)
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if config.kind == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _keeps(config.keep))
    return checkpoint(layer, x_TD, stretch, **options)


def _keeps(names: tuple[str, ...]) -> Callable[..., CheckpointPolicy]:
    def policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        name = operation.name().removeprefix("aten::").partition(".")[0]
        return CheckpointPolicy.MUST_SAVE if name in names else CheckpointPolicy.PREFER_RECOMPUTE

    return policy
