"""The layers' forward and backward pass as two CUDA graphs: a micro batch starts them instead of thousands of kernels.

A graph repeats the same kernels on the same memory. So everything that changes is copied to fixed places first (input
vectors, document borders, the gradient that comes back), and results are read from fixed places. Kernels are the ones
that would run otherwise, and the numbers are the same bit for bit.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from hydra_scale.config import Config
from hydra_scale.model.stretch import Stretch, StretchTensors
from hydra_scale.parallel.tensor import ColumnLinear, RowLinear

_WARM_UP_RUNS = 2


def why_not_captured(config: Config, device: torch.device) -> str | None:
    """What keeps the layers of a run from being CUDA graphs; None if nothing does."""
    parallel, mixer = config.parallel, config.model.mixer
    reasons = {
        "the device is no GPU": device.type != "cuda",
        "training.cuda_graphs is off": not config.training.cuda_graphs,
        "data.packing is off, so micro batches differ in length": not config.data.packing,
        "attention layers look at the documents' lengths": "A" in config.model.layer_kinds,
        "learnable initial states make tensors as long as there are documents": mixer.learnable_init_states,
        f"mixer.backend {mixer.backend} waits for the device": mixer.backend not in ("auto", "triton"),
        "ranks divide both heads and tokens": parallel.tensor > 1 and parallel.context > 1,
        "under parallel.exchange heads the scan is of other ranks' tokens": parallel.context > 1
        and parallel.exchange == "heads",
        "pipelines have several micro batches in flight": parallel.pipeline > 1,
        "ZeRO 3 moves the weights": config.zero.stage == 3,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


class CapturedLayers:
    """Layers that run as CUDA graphs, recorded at the first call, for that number of tokens; others run as they are."""

    def __init__(self, layers: nn.Module, casts_once: bool) -> None:
        """`layers` maps (T, D) and a stretch to (T, D), and looks at nothing else that changes but its parameters.

        casts_once: weights of linear layers for both passes; not where some of the forward one is computed again, which
        would read the parameters themselves.
        """
        self._layers, self._casts_once = layers, casts_once
        self._passes: _Passes | None = None

    def __call__(self, x_TD: torch.Tensor, stretch: Stretch) -> torch.Tensor:
        """(T, D) -> (T, D). The result is overwritten by the next call: differentiate before it."""
        if self._passes is None:
            self._passes = _record(self._layers, x_TD.detach(), stretch, self._casts_once)
        if x_TD.shape != self._passes.x_TD.shape or stretch.num_tokens != self._passes.num_tokens:
            found = self._layers(x_TD, stretch)
        else:
            differentiated = () if self._passes.adds_gradients else self._layers.parameters()
            found = _Replay.apply(self._passes, stretch.tensors(), x_TD, *differentiated)
        assert isinstance(found, torch.Tensor)
        return found

    def release(self) -> None:
        """Destroy the graphs; a next call records new ones."""
        if self._passes is not None:
            self._passes.forward.reset()
            self._passes.backward.reset()
            self._passes = None


class _Passes(NamedTuple):
    """Two graphs and the places they read and write."""

    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph
    num_tokens: int
    """Of the whole micro batch."""
    stretch: StretchTensors
    x_TD: torch.Tensor
    y_TD: torch.Tensor
    grad_y_TD: torch.Tensor
    gradients: tuple[torch.Tensor, ...]
    """Of the input, then of the parameters."""
    adds_gradients: bool
    """The parameters' gradients are not among these: the graph adds them to the parameters' `main_grad`."""
    copies: tuple[torch.Tensor, ...]
    """Of weights; here for nothing but that their memory stays theirs."""


def _record(layers: nn.Module, x_TD: torch.Tensor, stretch: Stretch, casts_once: bool) -> _Passes:
    fixed, device = stretch.tensors().copy(), x_TD.device
    stretch = replace(stretch, fixed=fixed)
    x_TD = x_TD.clone().requires_grad_()
    weights = dict(layers.named_parameters())
    copies = _copies_for_products(layers, device) if casts_once else {}
    # leaves of their own: what hangs on the parameters' own gradients is not to be recorded
    parameters = {name: copies.get(name, weight.detach()).requires_grad_() for name, weight in weights.items()}
    leaves = (x_TD, *parameters.values())
    places = [place for weight in weights.values() if (place := getattr(weight, "main_grad", None)) is not None]
    adds_gradients = len(places) == len(parameters)
    if adds_gradients:
        for leaf, place in zip(leaves[1:], places, strict=True):
            setattr(leaf, "main_grad", place)  # noqa: B010 - where products add by themselves; a Tensor has no such name

    def run() -> torch.Tensor:
        if copies:
            with torch.no_grad():
                torch._foreach_copy_(list(copies.values()), [weights[name] for name in copies])
        y_TD = functional_call(layers, parameters, (x_TD, stretch))
        assert isinstance(y_TD, torch.Tensor)
        return y_TD

    forward, backward, pool = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    # "thread_local": NCCL's watchdog and the loader live in other threads, which may go on
    capture: dict[str, Any] = {"pool": pool, "capture_error_mode": "thread_local"}
    # without autocast's cache, or the graph would read 16 bit copies of today's weights for ever
    with torch.autocast(
        device.type,
        dtype=torch.get_autocast_dtype(device.type),
        enabled=torch.is_autocast_enabled(device.type),
        cache_enabled=False,
    ):
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):  # compiles kernels and lets libraries take their workspace
            for _ in range(_WARM_UP_RUNS):
                y_TD = run()
                torch.autograd.grad(y_TD, leaves, torch.zeros_like(y_TD), allow_unused=adds_gradients)
                del y_TD
        torch.cuda.current_stream(device).wait_stream(side)
        with torch.cuda.graph(forward, **capture):
            y_TD = run()
        grad_y_TD = torch.empty_like(y_TD)
        with torch.cuda.graph(backward, **capture):
            gradients = torch.autograd.grad(y_TD, leaves, grad_y_TD, allow_unused=adds_gradients)
            if adds_gradients:
                _add_to(places, gradients[1:])
                gradients = gradients[:1]
            else:
                of_weights = zip(gradients[1:], weights.values(), strict=True)
                gradients = (gradients[0], *(gradient.to(weight.dtype) for gradient, weight in of_weights))
    return _Passes(
        forward, backward, stretch.num_tokens, fixed, x_TD.detach(), y_TD.detach(), grad_y_TD, gradients,
        adds_gradients, tuple(copies.values()),
    )  # fmt: skip


def _copies_for_products(layers: nn.Module, device: torch.device) -> dict[str, torch.Tensor]:
    """Room, by name, for the weights of linear layers in the dtype that autocast would cast them to wherever they are
    read. Cast once for both passes, and their gradients are added as they are: 16 bytes a weight in place of 30."""
    if not torch.is_autocast_enabled(device.type):
        return {}
    kinds, dtype = (ColumnLinear, RowLinear), torch.get_autocast_dtype(device.type)
    linear = [(name, module) for name, module in layers.named_modules() if isinstance(module, kinds)]
    return {f"{name}.weight": torch.empty_like(module.weight, dtype=dtype) for name, module in linear}


def _add_to(places: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor | None]) -> None:
    """A gradient that is None has been added already."""
    pairs = [(place, gradient) for place, gradient in zip(places, gradients, strict=True) if gradient is not None]
    alike = [pair for pair in pairs if pair[0].dtype == pair[1].dtype]
    torch._foreach_add_(*(list(tensors) for tensors in zip(*alike, strict=True)))
    for place, gradient in pairs:
        if place.dtype != gradient.dtype:  # which PyTorch adds one by one in any case, without a cast between
            place.add_(gradient)


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, passes: _Passes, stretch: StretchTensors, x_TD: torch.Tensor, *parameters: nn.Parameter
    ) -> torch.Tensor:
        passes.x_TD.copy_(x_TD)
        for place, values in zip(passes.stretch.changing(), stretch.changing(), strict=True):
            place.copy_(values)
        passes.forward.replay()
        ctx.passes = passes
        return passes.y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y_TD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        passes: _Passes = ctx.passes
        passes.grad_y_TD.copy_(grad_y_TD)
        passes.backward.replay()
        # held here as well, so autograd copies them into .grad rather than keep what the next replay overwrites
        return None, None, *passes.gradients
