"""Sums over what the programs of a kernel found, in an order that never changes."""

import torch

from .triton_language import interpreted, tl, triton

_ROWS, _COLUMNS = (16, 1024) if interpreted else (256, 16)
"""Of a tile. The interpreter runs one program after the other, so there are few of them there."""


@triton.jit
def _sum_kernel(parts, out, num_parts, num_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < num_columns
    row = tl.arange(0, ROWS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    first = 0
    while first < num_parts:
        place = parts + (first + row).to(tl.int64)[:, None] * num_columns + column[None, :]
        total += tl.load(place, mask=(first + row < num_parts)[:, None] & inside[None, :], other=0.0)
        first += ROWS
    tl.store(out + column, tl.sum(total, 0), mask=inside)


def sum_of_parts(parts: torch.Tensor) -> torch.Tensor:
    """Over the first dimension of a contiguous fp32 tensor of few columns, where PyTorch's sum takes up to three times
    as long (4 MB on an H200: 14 us, this 4.5)."""
    out = torch.empty(parts.shape[1:], dtype=torch.float32, device=parts.device)
    grid = (triton.cdiv(out.numel(), _COLUMNS),)
    _sum_kernel[grid](parts, out, len(parts), out.numel(), ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=4)
    return out
