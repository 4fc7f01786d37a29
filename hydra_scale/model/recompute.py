"""Activation checkpointing: what a layer keeps for its backward pass, and what it computes again there."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from hydra_scale.config import RecomputeConfig
from hydra_scale.model.branch import Stream
from hydra_scale.model.stretch import Stretch

KEEP_ALL = RecomputeConfig()
"""Nothing is computed again."""


_Layers = Sequence[tuple[int, nn.Module]]
"""Each with its number; called as layer(stream, stretch)."""
_Branch = Callable[[torch.Tensor], Stream]


def run_layers(
    layers: _Layers, x_TD: torch.Tensor, stretch: Stretch, config: RecomputeConfig, branch: _Branch
) -> torch.Tensor:
    """The layers one after the other, keeping what `config` says. Gradients do not change.

    branch: the stream that the first of some layers reads; what is computed again starts from x alone.
    No generator state is kept: dropout is a function of the token.
    """
    if config.kind == "none" or not torch.is_grad_enabled():
        return _run(layers, x_TD, stretch, branch)
    if config.together == 1:
        return _run_each(layers, x_TD, stretch, config, branch)
    for begin in range(0, len(layers), config.together):
        some = layers[begin : begin + config.together]
        x_TD = _again(_run_each, some, x_TD, stretch, config, branch)
    return x_TD


def _run_each(
    layers: _Layers, x_TD: torch.Tensor, stretch: Stretch, config: RecomputeConfig, branch: _Branch
) -> torch.Tensor:
    """Those that are computed again one by one, and what stands between them at once."""
    options: dict[str, Any] = {}
    if config.kind == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _keeps(config.keep))
    for recomputes, block in groupby(layers, lambda layer: layer[0] % config.every == 0):
        if not recomputes:
            x_TD = _run(list(block), x_TD, stretch, branch)
            continue
        for layer in block:
            x_TD = _again(_run, [layer], x_TD, stretch, branch, **options)
    return x_TD


def _run(layers: _Layers, x_TD: torch.Tensor, stretch: Stretch, branch: _Branch) -> torch.Tensor:
    stream = branch(x_TD)
    for _, layer in layers:
        stream = layer(stream, stretch)
    return stream.x_TD


def _again(run: Callable[..., torch.Tensor], *arguments: object, **options: Any) -> torch.Tensor:
    found = checkpoint(run, *arguments, use_reentrant=False, preserve_rng_state=False, **options)
    assert isinstance(found, torch.Tensor)
    return found


def _keeps(names: tuple[str, ...]) -> Callable[..., CheckpointPolicy]:
    def policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        name = operation.name().removeprefix("aten::").partition(".")[0]
        return CheckpointPolicy.MUST_SAVE if name in names else CheckpointPolicy.PREFER_RECOMPUTE

    return policy
