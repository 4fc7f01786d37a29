"""Flips, shift and diagonal around mamba-ssm's causal scan, with a sequential stand-in for its Triton kernel."""

import sys
from types import ModuleType

import pytest
import torch
from compare import assert_all_close, with_gradients

from hydra_kernels.mamba_scan import mamba_scan
from hydra_kernels.reference import sequential_scan

MODULE = "mamba_ssm.ops.triton.ssd_combined"
CHUNK_SIZE = 16


def causal_scan(
    x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, chunk_size: int
) -> torch.Tensor:
    """mamba-ssm's definition: S = exp(A dt[t]) S + dt[t] x[t] B[t]^T, then y[t] = S C[t]: token t reads itself."""
    assert chunk_size == CHUNK_SIZE
    heads_per_group = x.shape[2] // B.shape[2]
    B, C = B.repeat_interleave(heads_per_group, dim=2), C.repeat_interleave(heads_per_group, dim=2)
    state = x.new_zeros(x.shape[0], x.shape[2], x.shape[3], B.shape[3])
    outputs = []
    for t in range(x.shape[1]):
        step = dt[:, t, :, None, None]
        state = torch.exp(A[:, None, None] * step) * state + step * x[:, t, :, :, None] * B[:, t, :, None, :]
        outputs.append((state * C[:, t, :, None, :]).sum(-1))
    return torch.stack(outputs, dim=1)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType(MODULE)
    module.mamba_chunk_scan_combined = causal_scan  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, MODULE, module)


def inputs(seqlen: int, ngroups: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seqlen)
    batch, nheads, headdim, d_state = 2, 4, 3, 5

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return {
        "x_BLHP": draw(batch, seqlen, nheads, headdim),
        "dt_2BLH": draw(2, batch, seqlen, nheads).exp(),
        "A_H": -draw(nheads).exp(),
        "B_2BLGN": draw(2, batch, seqlen, ngroups, d_state),
        "C_2BLGN": draw(2, batch, seqlen, ngroups, d_state),
        "diagonal_BLH": draw(batch, seqlen, nheads),
    }


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("ngroups", [1, 2])
@pytest.mark.parametrize("seqlen", [1, 2, 9])
def test_is_the_quasiseparable_scan_with_all_gradients(seqlen: int, ngroups: int) -> None:
    found = with_gradients(lambda **tensors: mamba_scan(**tensors, chunk_size=CHUNK_SIZE), inputs(seqlen, ngroups))
    expected = with_gradients(lambda **tensors: sequential_scan(**tensors)[0], inputs(seqlen, ngroups))
    assert_all_close(found, expected, 1e-12, floor=1e-9)


@pytest.mark.usefixtures("stand_in")
def test_without_a_diagonal_a_single_token_reads_nothing() -> None:
    y = mamba_scan(**inputs(1, 1) | {"diagonal_BLH": None}, chunk_size=CHUNK_SIZE)
    assert not y.any()


def test_says_what_to_install_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, MODULE, None)  # an import of it fails
    with pytest.raises(ValueError, match=r"pip install 'hydra-scale\[mamba\]'$") as caught:
        mamba_scan(**inputs(2, 1), chunk_size=CHUNK_SIZE)
    assert isinstance(caught.value.__cause__, ImportError)
    assert "\n" not in str(caught.value)
