"""The Triton kernels, in the interpreter on a CPU and compiled on a GPU, against the recurrence token by token."""

from typing import Any

import pytest
import torch
from compare import assert_all_close, with_gradients
from test_mixer import FILES, load
from test_scan import borders, make_inputs

from hydra_kernels import (
    HydraMixer,
    Leaving,
    add_norm,
    chunks,
    depthwise_conv_silu,
    entered_from,
    quasiseparable_scan,
)
from hydra_kernels.triton_operators import _rows

FP32 = 1e-5


def compare(
    inputs: dict[str, torch.Tensor], cu_seqlens: torch.Tensor | None = None, return_final_states: bool = False
) -> None:
    found, expected = (
        with_gradients(
            lambda backend=backend, **values: quasiseparable_scan(
                **values, cu_seqlens=cu_seqlens, return_final_states=return_final_states, chunk_size=16, backend=backend
            ),
            {name: tensor.to(dtype) for name, tensor in inputs.items()},
        )
        for backend, dtype in (("triton", torch.float32), ("reference", torch.float64))
    )
    assert_all_close(found, expected, FP32, floor=1e-6)


@pytest.mark.parametrize(
    ("batch", "seqlen", "nheads", "headdim", "ngroups", "d_state"),
    [(1, 1, 1, 16, 1, 16), (2, 37, 4, 16, 2, 16), (1, 100, 2, 5, 1, 3), (1, 16, 3, 20, 3, 40)],
    ids=str,
)
def test_rows(batch: int, seqlen: int, nheads: int, headdim: int, ngroups: int, d_state: int) -> None:
    compare(make_inputs(batch, seqlen, nheads, headdim, ngroups, d_state))


@pytest.mark.parametrize("lengths", [[1], [1] * 5, [40, 1, 2, 35]], ids=str)
@pytest.mark.parametrize("edges", [False, True], ids=["closed", "states in and out"])
def test_packed(lengths: list[int], edges: bool) -> None:
    inputs = make_inputs(1, sum(lengths), 2, 5, 1, 3, documents=len(lengths) if edges else 0)
    compare(inputs, borders(lengths), return_final_states=edges)


@pytest.mark.parametrize("lengths", [[150], [70, 80]], ids=str)
def test_of_what_heads_have_forgotten_nothing_is_read(lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two parts to a segment, of which a head's decay reaches all, the nearest or none, and steps of exactly zero."""
    monkeypatch.setattr(chunks, "SEGMENT_TOKENS", 64)
    monkeypatch.setattr(chunks, "PART_TOKENS", 32)
    inputs = make_inputs(1, 150, 4, 5, 1, 3)
    inputs["A_H"] = torch.full((4,), -1.0, dtype=torch.float64)
    inputs["dt_2BLH"] *= torch.tensor([1e-3, 0.3, 1.0, 6.0])
    inputs["dt_2BLH"][:, :, 20:30] = 0.0
    compare(inputs, borders(lengths))


@pytest.mark.parametrize("rate", [10.0, 1e6])
def test_heads_that_forget_at_once_keep_their_digits(rate: float) -> None:
    """Neighbours see each other as much as ever. Of 1e6 a step nothing else is left, and A has no gradient."""
    inputs = make_inputs(1, 64, 2, 5, 1, 3)
    inputs["dt_2BLH"] *= 10.0
    inputs["A_H"] = torch.tensor([-rate, -2.0 * rate], dtype=torch.float64)
    found, expected = (
        with_gradients(
            lambda backend=backend, **values: quasiseparable_scan(**values, chunk_size=64, backend=backend),
            {name: tensor.to(dtype) for name, tensor in inputs.items()},
        )
        for backend, dtype in (("triton", torch.float32), ("reference", torch.float64))
    )
    assert_all_close(found, expected, 1e-4, floor=1e-6)


def test_documents_do_not_touch_each_other() -> None:
    lengths, changed = [20, 5, 30], slice(20, 25)
    inputs = {name: tensor.float() for name, tensor in make_inputs(1, 55, 2, 5, 1, 3).items()}
    y = quasiseparable_scan(**inputs, cu_seqlens=borders(lengths), chunk_size=16, backend="triton")
    for name in ("x_BLHP", "diagonal_BLH"):
        inputs[name][:, changed] *= 1e4
    for name in ("dt_2BLH", "B_2BLGN", "C_2BLGN"):
        inputs[name][:, :, changed] *= 1e4
    other = quasiseparable_scan(**inputs, cu_seqlens=borders(lengths), chunk_size=16, backend="triton")
    assert torch.equal(y[:, :20], other[:, :20]) and torch.equal(y[:, 25:], other[:, 25:])


def test_gradients_and_inputs_of_any_stride() -> None:
    inputs = make_inputs(1, 40, 2, 5, 1, 3, documents=2)

    def summed(dtype: torch.dtype, backend: str) -> dict[str, torch.Tensor]:
        leaves = {name: tensor.to(dtype).requires_grad_() for name, tensor in inputs.items()}
        # a sum's gradient is one number with strides of 0; every second of twice as many is not contiguous
        given = {name: leaf.repeat_interleave(2, dim=-1)[..., ::2] for name, leaf in leaves.items()}
        outputs = quasiseparable_scan(
            **given, cu_seqlens=borders([17, 23]), return_final_states=True, chunk_size=16, backend=backend
        )
        sum(output.sum() for output in outputs).backward()
        return {name: leaf.grad for name, leaf in leaves.items()}

    assert_all_close(summed(torch.float32, "triton"), summed(torch.float64, "reference"), FP32)


def test_heads_may_lie_further_apart_than_tokens() -> None:
    """As attention lays them out: (batch, heads, tokens, channels) seen the other way round. The kernels' constants
    do not depend on the number of tokens then either."""
    inputs = {name: tensor.float() for name, tensor in make_inputs(1, 20, 2, 16, 1, 16).items()}
    turned = inputs | {"x_BLHP": inputs["x_BLHP"].transpose(1, 2).contiguous().transpose(1, 2)}
    assert turned["x_BLHP"].stride(2) == 20 * 16 and _rows(turned["x_BLHP"], 0).stride() == (32, 16, 1)
    found, expected = (
        with_gradients(lambda **values: quasiseparable_scan(**values, chunk_size=16, backend="triton"), given)
        for given in (turned, inputs)
    )
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def every_second_head(x: torch.Tensor) -> torch.Tensor:
    return x.repeat_interleave(2, dim=2)[:, :, ::2]


def columns_from_an_odd_place(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(x.flatten(2), (1, 2))[:, :, 1:-2].unflatten(2, x.shape[2:])


@pytest.mark.parametrize(
    ("laid", "strides"), [(every_second_head, (64, 32, 1)), (columns_from_an_odd_place, (35, 16, 1))]
)
def test_heads_that_a_descriptor_would_mistake(laid: Any, strides: tuple[int, ...]) -> None:
    """Side by side, in rows that begin at multiples of 16 bytes, heads are a matrix that the copy engine can cut; not
    these."""
    inputs = {name: tensor.float() for name, tensor in make_inputs(1, 20, 2, 16, 1, 16).items()}
    assert _rows(laid(inputs["x_BLHP"]), 0).stride() == strides
    found, expected = (
        with_gradients(
            lambda x_BLHP, lay=lay, **values: quasiseparable_scan(
                lay(x_BLHP), **values, chunk_size=16, backend="triton"
            ),
            inputs,
        )
        for lay in (laid, torch.Tensor.contiguous)
    )
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("taps", [1, 3, 7])
@pytest.mark.parametrize("lengths", [None, [9, 1, 2, 25]], ids=str)
def test_convolution(taps: int, lengths: list[int] | None) -> None:
    generator = torch.Generator().manual_seed(taps)
    inputs = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in {"x_BLC": (1, 37, 130), "weight_C1K": (130, 1, taps), "bias_C": (130,)}.items()
    }
    cu_seqlens = None if lengths is None else borders(lengths)
    found, expected = (
        with_gradients(
            lambda backend=backend, **values: depthwise_conv_silu(**values, cu_seqlens=cu_seqlens, backend=backend),
            {name: tensor.to(dtype) for name, tensor in inputs.items()},
        )
        for backend, dtype in (("triton", torch.float32), ("reference", torch.float64))
    )
    assert_all_close(found, expected, FP32)


@pytest.mark.parametrize("path", [path for path in FILES if "long" not in path.stem], ids=lambda path: path.stem)
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_golden_mixer(path: object, recompute: bool) -> None:
    arguments, golden = load(path)
    mixer = HydraMixer(**arguments, backend="triton", recompute=recompute)
    mixer.load_state_dict({n.removeprefix("param."): t for n, t in golden.items() if n.startswith("param.")})
    u = golden["input"].float().requires_grad_()
    y = mixer(u)
    y.backward(golden["grad_output"].float())
    found = {"output": y.detach(), "grad_input": u.grad}
    found |= {
        f"grad.{name}": torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in mixer.named_parameters()
    }
    assert_all_close(found, {name: golden[name] for name in found}, FP32, floor=1e-6)


def test_two_backward_passes_are_bit_equal() -> None:
    inputs = {name: tensor.float() for name, tensor in make_inputs(1, 70, 4, 16, 1, 16).items()}
    first, second = (
        with_gradients(lambda **values: quasiseparable_scan(**values, chunk_size=16, backend="triton"), inputs)
        for _ in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_fp64_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="fp32, bf16 and fp16"):
        quasiseparable_scan(**make_inputs(1, 3), backend="triton")


@pytest.mark.parametrize("centred", [True, False], ids=["layer norm", "rms norm"])
@pytest.mark.parametrize(("tokens", "width"), [(1, 3), (21, 40), (3, 1100)], ids=str)
def test_add_norm(tokens: int, width: int, centred: bool) -> None:
    generator = torch.Generator().manual_seed(width)
    inputs = {name: torch.randn(tokens, width, generator=generator, dtype=torch.float64) for name in ("x", "branch")}
    inputs |= {name: torch.randn(width, generator=generator, dtype=torch.float64) for name in ("weight", "bias")}
    if not centred:
        del inputs["bias"]

    def textbook(x: torch.Tensor, branch: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
        total = x + branch
        if bias is None:
            return total / (total.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight
        centre = total - total.mean(-1, keepdim=True)
        return centre / (centre.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight + bias

    for backend, dtype, tolerance in (("triton", torch.float32, FP32), ("torch", torch.float64, 1e-12)):
        found = with_gradients(
            lambda x, branch, weight, bias=None, backend=backend: add_norm(
                x, branch, weight, bias, eps=1e-3, backend=backend
            ),
            {name: tensor.to(dtype) for name, tensor in inputs.items()},
        )
        assert_all_close(found, with_gradients(textbook, inputs), tolerance, floor=1e-6)


def test_add_norm_of_a_stream_in_fp32_and_a_layer_in_bf16() -> None:
    x, branch = torch.randn(5, 48).requires_grad_(), torch.randn(5, 48).bfloat16().requires_grad_()
    weight, bias = torch.randn(48, 2).unbind(1)  # not contiguous
    y = add_norm(x, branch, weight, bias, backend="triton")
    grad = torch.randn(5, 96)[:, ::2]
    y.backward(grad)
    total = (x.detach() + branch.detach().float()).requires_grad_()
    expected = torch.nn.functional.layer_norm(total, (48,), weight, bias)
    expected.backward(grad)
    assert y.dtype == torch.float32 and torch.allclose(y, expected, atol=1e-5)
    assert torch.allclose(x.grad, total.grad, atol=1e-5)
    assert branch.grad.dtype == torch.bfloat16 and torch.allclose(branch.grad.float(), x.grad, rtol=2**-7)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("seen", ["both", "stream", "twin"])
def test_add_norm_once_more_in_bf16(backend: str, seen: str) -> None:
    """Both results are the rounded norm, and the gradient is that of the sum of what both of them, or one, got back."""
    x, branch, weight, bias = (torch.randn(*size, requires_grad=True) for size in ((5, 48), (5, 48), (48,), (48,)))
    of_stream, of_twin = torch.randn(5, 48), torch.randn(5, 96).bfloat16()[:, ::2]
    stream, twin = add_norm(x, branch, weight, bias, also=torch.bfloat16, backend=backend)
    expected = torch.nn.functional.layer_norm(x + branch, (48,), weight, bias)
    torch.testing.assert_close(stream, expected, atol=1e-5, rtol=1e-5)
    assert twin.dtype == torch.bfloat16
    torch.testing.assert_close(twin.float(), stream, atol=0.0, rtol=2**-7)  # Triton's interpreter cuts, and rounds not
    results = {"both": (stream, twin), "stream": (stream,), "twin": (twin,)}[seen]
    grads = {"both": (of_stream, of_twin), "stream": (of_stream,), "twin": (of_twin,)}[seen]
    found = torch.autograd.grad(results, (x, branch, weight, bias), grads)
    total = sum(grad.float() for grad in grads)
    for gradient, wanted in zip(found, torch.autograd.grad(expected, (x, branch, weight, bias), total), strict=True):
        torch.testing.assert_close(gradient, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("backward", [False, True], ids=["states", "gradients"])
@pytest.mark.parametrize("readers", [(2, 5), (3, 700), (0, 0)], ids=str)
def test_what_enters_a_stretch(readers: tuple[int, int], backward: bool, backend: str) -> None:
    """The own states of all ranks on that side, each times the decays on its way; vectors of the neighbours."""
    size, state = 5, (3, 4, 6)
    parts = [Leaving.empty(state, readers, torch.empty(0)) for _ in range(size)]
    for part in parts:
        part.message.uniform_(-1, 1)
    for rank in range(size):
        entered = entered_from(
            torch.stack([part.message for part in parts]), parts[rank], rank, backward=backward, backend=backend
        )
        for direction, step in enumerate((-1, 1)):
            towards = -step if backward else step
            expected, decay = torch.zeros(state), torch.ones(state[0])
            for other in range(rank + towards, size if towards > 0 else -1, towards):
                expected += decay[:, None, None] * parts[other].own_2HPN[direction]
                decay = decay * parts[other].decay_2H[direction]
            torch.testing.assert_close(entered.states_2HPN[direction], expected)
            beside = rank + step
            vector = parts[beside].readout_2GN[direction] if 0 <= beside < size else torch.zeros(readers)
            assert torch.equal(entered.readout_2GN[direction], vector)
