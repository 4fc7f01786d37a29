"""Which tensors the copy engine is given: nothing but time would tell if usual ones were refused."""

import pytest
import torch

from hydra_kernels.chunks import cut
from hydra_kernels.triton_scan import _Tiles


@pytest.mark.parametrize(
    ("headdim", "d_state", "columns", "described"),
    [(64, 64, 2304, True), (128, 16, 2304, True), (20, 64, 2304, False), (64, 40, 2304, False), (64, 64, 2305, False)],
    ids=str,
)
def test_usual_shapes_have_descriptors(headdim: int, d_state: int, columns: int, described: bool) -> None:
    rows = torch.zeros(100, columns, dtype=torch.bfloat16)
    x_THP = rows[:, : 4 * headdim].unflatten(1, (4, headdim))
    states = torch.zeros(2, 2, 4, headdim, d_state, dtype=torch.bfloat16)
    assert _Tiles.of(cut(100, 4, None, 64), states, x_THP).described == described
