"""The Triton kernels as PyTorch operators: compiled without a break, shapes told before they run, FLOPs counted."""

import importlib
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import hydra_kernels
from hydra_kernels import (
    Documents,
    HydraMixer,
    add_norm,
    cross_entropy,
    depthwise_conv_silu,
    gated_rms_norm,
    keyed_dropout,
    quasiseparable_scan,
    sum_of_squares,
)
from hydra_kernels.triton_language import interpreted
from hydra_scale.bench.flops import MixerShape, mixer_flops, scan_flops

DEVICE = "cpu" if interpreted else "cuda"
T, H, G, P, N, D = 9, 2, 1, 16, 16, 16
DOCUMENTS = Documents.of(torch.tensor([0, 3, 4, T]), 1, T, DEVICE)


def drawn(*shape: int, grad: bool = True, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE, dtype=dtype).requires_grad_(grad)


def scan(*tensors: torch.Tensor, **options: Any) -> torch.Tensor:
    x, dt, A, B, C, diagonal = tensors
    dt, A = torch.nn.functional.softplus(dt), -A.exp()
    return quasiseparable_scan(x, dt, A, B, C, diagonal_BLH=diagonal, chunk_size=16, backend="triton", **options)


def scan_tensors() -> list[torch.Tensor]:
    shapes = ((1, T, H, P), (2, 1, T, H), (H,), (2, 1, T, G, N), (2, 1, T, G, N), (1, T, H))
    return [drawn(*shape) for shape in shapes]


def scan_with_states(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    *operands, initial = tensors
    return scan(*operands, cu_seqlens=DOCUMENTS, initial_states=initial, return_final_states=True)


def mixer(**options: Any) -> HydraMixer:
    return HydraMixer(D, d_state=N, headdim=P, ngroups=G, chunk_size=16, backend="triton", device=DEVICE, **options)


def gated(y: torch.Tensor, z: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    squares = sum_of_squares(y, backend="triton")
    return gated_rms_norm(y, z, weight, backend="triton") + gated_rms_norm(
        y, z, weight, squares_BL1=squares, width=2 * D, backend="triton"
    )


Case = tuple[Callable[..., Any], Callable[[], list[torch.Tensor]]]
CASES: dict[str, Case] = {
    "scan": (scan, scan_tensors),
    "scan of documents": (lambda *tensors: scan(*tensors, cu_seqlens=DOCUMENTS), scan_tensors),
    "scan with states": (scan_with_states, lambda: [*scan_tensors(), drawn(2, 3, H, P, N)]),
    "convolution": (
        lambda x, weight, bias: depthwise_conv_silu(x, weight, bias, cu_seqlens=DOCUMENTS, backend="triton"),
        lambda: [drawn(1, T, D), drawn(D, 1, 7), drawn(D)],
    ),
    "convolution without bias": (
        lambda x, weight: depthwise_conv_silu(x, weight, None, backend="triton"),
        lambda: [drawn(2, T, D), drawn(D, 1, 3)],
    ),
    "gated norm": (gated, lambda: [drawn(1, T, D), drawn(1, T, D), drawn(D)]),
    "sum and layer norm": (
        lambda x, branch, weight, bias: add_norm(x, branch, weight, bias, backend="triton"),
        lambda: [drawn(T, D), drawn(T, D, dtype=torch.bfloat16), drawn(D), drawn(D)],
    ),
    "sum and layer norm, also in bf16": (
        lambda x, branch, weight, bias: add_norm(x, branch, weight, bias, also=torch.bfloat16, backend="triton"),
        lambda: [drawn(T, D), drawn(T, D, dtype=torch.bfloat16), drawn(D), drawn(D)],
    ),
    "sum and RMS norm": (
        lambda x, branch, weight: add_norm(x, branch, weight, None, backend="triton"),
        lambda: [drawn(T, D), drawn(T, D), drawn(D)],
    ),
    "dropout": (
        lambda x: keyed_dropout(x, torch.arange(T, device=DEVICE) + 2**40, 0.5, 7, backend="triton"),
        lambda: [drawn(T, D)],
    ),
    "cross entropy": (
        lambda logits: cross_entropy(logits, torch.arange(T, device=DEVICE), backend="triton")[0],
        lambda: [drawn(T, D)],
    ),
    "mixer without biases, with initial states": (
        mixer(conv_bias=False, learnable_init_states=True), lambda: [drawn(2, T, D)]
    ),
    "mixer that recomputes": (mixer(recompute=True), lambda: [drawn(2, T, D)]),
}  # fmt: skip


def results(
    function: Callable[..., Any], leaves: list[torch.Tensor], tensors: list[torch.Tensor]
) -> list[torch.Tensor]:
    """What the function gives, and the gradients of all leaves of a sum with changing weights."""
    found = function(*tensors)
    found = found if isinstance(found, tuple) else (found,)
    weighted = sum((y.float() * torch.linspace(-1, 1, y.numel(), device=DEVICE).view(y.shape)).sum() for y in found)
    return [*found, *torch.autograd.grad(weighted, leaves)]


@pytest.mark.parametrize("name", CASES)
def test_compiled_without_a_break_it_gives_the_same_bits(name: str) -> None:
    torch.manual_seed(1)
    function, make = CASES[name]
    tensors = make()
    leaves = [*tensors, *(function.parameters() if isinstance(function, torch.nn.Module) else ())]
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for found, expected in zip(results(compiled, leaves, tensors), results(function, leaves, tensors), strict=True):
        assert torch.equal(found, expected)


def test_documents_of_other_lengths_are_not_compiled_again() -> None:
    torch.manual_seed(1)
    model, x = mixer(), drawn(1, T, D)
    graphs = []

    def counted(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend=counted)
    for borders in ([0, 5, 6, T], [0, 1, 7, T]):
        of = Documents.of(torch.tensor(borders), 1, T, DEVICE)
        assert torch.equal(compiled(x, of), model(x, of))
    assert len(graphs) == 1


@pytest.mark.parametrize("name", [name for name in CASES if "recomputes" not in name])
def test_each_operator_keeps_what_it_registers(name: str) -> None:
    """Schema, autograd, and shapes, dtypes and strides of the fakes, for each call as the functions make it."""
    torch.manual_seed(1)
    function, make = CASES[name]
    calls: list[tuple[Any, tuple[Any, ...]]] = []

    class Calls(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if op.namespace == "hydra_kernels":
                calls.append((op, args))
            return op(*args, **(kwargs or {}))

    tensors = make()
    with Calls():
        results(function, tensors, tensors)
    assert calls
    for op, arguments in calls:
        plain = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments]
        torch.library.opcheck(op, plain, test_utils=("test_schema", "test_faketensor"))


def test_flops_are_those_of_the_formula() -> None:
    model, x = mixer(), drawn(2, T, D)
    shape, tokens = MixerShape(D, d_state=N, d_conv=7, headdim=P, ngroups=G), 2 * T
    with FlopCounterMode(display=False) as counter:
        y = model(x)
    assert counter.get_total_flops() == mixer_flops(shape, tokens)
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * mixer_flops(shape, tokens)
    with FlopCounterMode(display=False) as counter:
        scan(*scan_tensors())
    assert counter.get_total_flops() == scan_flops(MixerShape(H * P // 2, d_state=N, headdim=P), T)


def test_copies_of_the_kernels_leave_each_other_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As exported folders carry them, two in one process and imported again: PyTorch forgets an operator whose name is
    registered a second time, and who still calls it reads freed memory."""
    torch.manual_seed(2)
    y, z, weight = drawn(1, T, D), drawn(1, T, D), drawn(D)
    expected = gated_rms_norm(y, z, weight, backend="triton")
    monkeypatch.syspath_prepend(tmp_path)
    copies = []
    for name in ("one_model", "another_model", "another_model"):
        if not (tmp_path / name).exists():
            shutil.copytree(Path(hydra_kernels.__file__).parent, tmp_path / name)
        for module in [module for module in sys.modules if module.partition(".")[0] == name]:
            monkeypatch.delitem(sys.modules, module)
        copies.append(importlib.import_module(name))
    names = {copy.norm.triton_gated_rms_norm.__globals__["OPERATORS"] for copy in (hydra_kernels, *copies)}
    assert len(names) == 4  # before any call, which could end the process
    for copy in (*copies, hydra_kernels):
        assert torch.equal(copy.gated_rms_norm(y, z, weight, backend="triton"), expected)
