"""Tiles of matrices in memory: how kernels load them, by Hopper's copy engine or by pointers.

The copy engine takes a descriptor of a matrix whose rows begin at multiples of 16 bytes and brings whole tiles into
shared memory, with neither registers nor instructions of the threads that wait for them; what lies outside the matrix
is zero. `described` gives a descriptor where a matrix and its tiles allow one and the matrix itself elsewhere, and
kernels take either: DESCRIBED says which.
"""

from collections.abc import Sequence
from typing import Any

import torch

from .triton_language import padded_width, tl, triton

if triton is not None:
    from triton.tools.tensor_descriptor import TensorDescriptor

_ALIGNMENT = 16
_MOST_ROWS = 2**31
"""Descriptors count in 32 bits."""


def fits(matrix: torch.Tensor, columns: int) -> bool:
    """Whether a descriptor can cut tiles of so many columns, without padding, out of a matrix."""
    size = matrix.element_size()
    aligned = matrix.data_ptr() % _ALIGNMENT == 0 and matrix.stride(0) * size % _ALIGNMENT == 0
    return aligned and matrix.stride(1) == 1 and padded_width(columns) == columns and len(matrix) < _MOST_ROWS


def described(matrix: torch.Tensor, tile: Sequence[int], *, use: bool) -> Any:
    """A descriptor of a matrix, cut in tiles (rows, columns), or without `use` the matrix."""
    return TensorDescriptor.from_tensor(matrix, list(tile)) if use else matrix


@triton.jit
def load_tile(base, first, row, stride_row, known, column, width):
    """base[first + row, column] (rows, columns), zero where the row is not known or the column is not below width."""
    return tl.load(
        base + first.to(tl.int64) * stride_row + (row[:, None] * stride_row + column[None, :]),
        mask=known[:, None] & (column < width)[None, :], other=0.0,
    )  # fmt: skip


@triton.jit
def load_head(matrix, head, first, row, stride_row, stride_head, known, p, P, DESCRIBED: tl.constexpr):
    """Rows first + row of one head's P columns; a descriptor's heads lie side by side."""
    if DESCRIBED:
        tile = matrix.load([first, head * P])
    else:
        tile = load_tile(matrix + head * stride_head, first, row, stride_row, known, p, P)
    return tile


@triton.jit
def load_state(states, place, p, n, P: tl.constexpr, N: tl.constexpr, DESCRIBED: tl.constexpr):
    """The state (P, N) at a place of many that lie one behind the other."""
    if DESCRIBED:
        state = states.load([(place * P).to(tl.int32), 0])
    else:
        target = states + place.to(tl.int64) * (P * N) + (p[:, None] * N + n[None, :])
        state = tl.load(target, mask=(p < P)[:, None] & (n < N)[None, :], other=0.0)
    return state


@triton.jit
def load_readers(
    vectors, readout, place, first, row, known, outside, stride_token, column, width, HAS_READOUT: tl.constexpr
):  # fmt: skip
    """C of the neighbour each token reads with; outside the document, where a token is, the given read-out vector."""
    tile = load_tile(vectors, first, row, stride_token, known, column, width)
    if HAS_READOUT:
        given = tl.load(readout + place + column[None, :], mask=outside[:, None] & (column < width)[None, :], other=0.0)
        tile += given.to(tile.dtype)
    return tile


@triton.jit
def neighbours(token, start, stop, live, num_tokens, ALIGNED: tl.constexpr, HAS_READOUT: tl.constexpr):
    """Which tokens have a left and a right neighbour here, and which read with a vector that is given instead.

    ALIGNED: the first and last of every document. Else those whose document goes on before the first token (start < 0)
    or behind the last (stop > num_tokens); if no vector is given, C has rows there.
    """
    left, right = live & (token > start), live & (token + 1 < stop)
    left_known, right_known = left, right
    if HAS_READOUT:
        left_known, right_known = left & (token > 0), right & (token + 1 < num_tokens)
    if ALIGNED:
        left, right = live, live
    return left_known, right_known, left & ~left_known, right & ~right_known
