"""Convolution and gated norm against their textbook forms, every gradient."""

import pytest
import torch
from compare import assert_all_close, assert_close, with_gradients

from hydra_kernels import add_norm, depthwise_conv_silu, gated_rms_norm, sum_of_squares
from hydra_kernels.reference import gated_norm
from hydra_kernels.triton_language import interpreted
from hydra_kernels.triton_sums import sum_of_parts

LAYOUTS = {"row": None, "packed": [3, 1, 20, 7, 1], "one": [32]}


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def textbook(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """The sum over taps, token by token."""
    taps, rows, start = weight.shape[-1], [], 0
    for length in lengths:
        for t in range(length):
            total = bias
            for k in range(taps):
                if 0 <= t + k - taps // 2 < length:
                    total = total + weight[:, 0, k] * x[:, start + t + k - taps // 2]
            rows.append(total * torch.sigmoid(total))
        start += length
    return torch.stack(rows, 1)


@pytest.mark.parametrize("taps", [1, 3, 7, 9])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_convolution(taps: int, layout: str, backend: str) -> None:
    lengths = LAYOUTS[layout]
    cu_seqlens = None if lengths is None else torch.tensor([0, *lengths]).cumsum(0)
    inputs = {"x": draw(1 if lengths else 2, 32, 6), "weight": draw(6, 1, taps), "bias": draw(6)}
    found = with_gradients(
        lambda x, weight, bias: depthwise_conv_silu(x, weight, bias, cu_seqlens=cu_seqlens, backend=backend), inputs
    )
    expected = with_gradients(lambda x, weight, bias: textbook(x, weight, bias, lengths or [32]), inputs)
    assert_all_close(found, expected, 1e-12)


def test_convolution_without_bias_of_nothing_and_misused() -> None:
    x, weight = draw(1, 5, 2), draw(2, 1, 3)
    assert_close(depthwise_conv_silu(x, weight), textbook(x, weight, torch.zeros(2), [5]), 1e-12)
    for backend in ("torch", "reference"):
        assert depthwise_conv_silu(x[:, :0], weight, backend=backend).shape == (1, 0, 2)
    with pytest.raises(ValueError, match="weight has 4 taps; a centred convolution needs an odd number"):
        depthwise_conv_silu(x, draw(2, 1, 4))
    with pytest.raises(ValueError, match="weight has shape"):
        depthwise_conv_silu(x, draw(3, 1, 3))
    with pytest.raises(ValueError, match=r"bias has shape \(3,\); expected \(2,\)"):
        depthwise_conv_silu(x, weight, draw(3))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", ["z", "branch", "weight", "bias", "squares"])
def test_shapes_that_do_not_fit_are_named(name: str, backend: str) -> None:
    """Of either norm: a kernel would read behind their end."""
    device = "cpu" if interpreted else "cuda"
    x, row = draw(2, 3, 4).float().to(device), draw(4).float().to(device)
    with pytest.raises(ValueError, match=f"{name} has shape .*; expected"):
        if name in ("z", "squares"):
            z, squares = (x[:, :1], None) if name == "z" else (x, x[:, :1, :1])
            gated_rms_norm(x, z, row, squares_BL1=squares, backend=backend)
        else:
            given = {"branch": x, "weight": row, "bias": row}
            add_norm(x, **given | {name: given[name][:1]}, backend=backend)


BACKENDS = {"torch": (torch.float64, 1e-12), "triton": (torch.float32, 1e-5)}


@pytest.mark.parametrize("backend", BACKENDS)
def test_gated_norm(backend: str) -> None:
    dtype, tolerance = BACKENDS[backend]
    inputs = {"y": draw(2, 7, 12), "z": draw(2, 7, 12) * 3, "weight": draw(12)}
    found = with_gradients(
        lambda y, z, weight: gated_rms_norm(y, z, weight, eps=1e-5, backend=backend),
        {name: tensor.to(dtype) for name, tensor in inputs.items()},
    )
    assert_all_close(found, with_gradients(lambda y, z, weight: gated_norm(y, z, weight, 1e-5), inputs), tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gated_norm_of_split_channels_with_the_sums_added(backend: str) -> None:
    dtype, tolerance = BACKENDS[backend]
    inputs = {"y": draw(2, 7, 12), "z": draw(2, 7, 12), "weight": draw(12)}

    def split(y: torch.Tensor, z: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        squares = sum(sum_of_squares(part, backend=backend) for part in y.split([8, 4], -1))
        parts = zip(y.split([8, 4], -1), z.split([8, 4], -1), weight.split([8, 4]), strict=True)
        options = {"eps": 1e-5, "squares_BL1": squares, "width": 12, "backend": backend}
        return torch.cat([gated_rms_norm(*part, **options) for part in parts], -1)

    assert_all_close(
        with_gradients(split, {name: tensor.to(dtype) for name, tensor in inputs.items()}),
        with_gradients(lambda y, z, weight: gated_norm(y, z, weight, 1e-5), inputs),
        tolerance,
    )


def test_gated_norm_works_in_fp32() -> None:
    y, z = (draw(4, 4, 64) * 300).bfloat16(), draw(4, 4, 64).bfloat16()
    found = gated_rms_norm(y, z, torch.ones(64))
    assert found.dtype == torch.bfloat16
    assert sum_of_squares(y).dtype == torch.float32
    assert_close(found, gated_norm(y.double(), z.double(), torch.ones(64), 1e-5), 3e-3)


@pytest.mark.parametrize("shape", [(1, 3), (255, 7), (700, 2, 19)], ids=str)
def test_sums_of_parts(shape: tuple[int, ...]) -> None:
    parts = draw(*shape).float().to("cpu" if interpreted else "cuda")
    assert_close(sum_of_parts(parts), parts.double().sum(0), 1e-6)
