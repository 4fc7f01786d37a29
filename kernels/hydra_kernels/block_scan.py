"""The quasiseparable scan on blocks of tokens: cost linear in the number of blocks, both directions at once.

Shape letters: K blocks, Q tokens of a block, G groups, R heads of a group, P channels of a head, N state width,
S documents; a leading 2 is (forward, backward). Blocks stand in the order of `blocks.BlockLayout`.

Within a block the output is a matrix times the tokens (`_WithinBlock`). Across blocks, every block writes what it adds
to the state (`_WriteStates`), the states are passed along each document (`_PassStates`), and every token reads the
state that entered its block (`_ReadStates`). The four are autograd functions because PyTorch would otherwise keep
every elementwise intermediate of size tokens * heads * Q or 2 * tokens * channels for the backward pass.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .precision import without_autocast

_MATRIX_ELEMENTS_ON_CPU, _MATRIX_ELEMENTS_ON_GPU = 1 << 18, 1 << 26
"""Block matrices are built this many numbers at a time: on a CPU so few that the passes over them stay in a core's
cache, on a GPU so many that launching a pass costs little beside it."""
_WITH_A_NEIGHBOUR = (slice(None, -1), slice(1, None))
"""Forward and backward, the tokens of a block that a neighbour in it reads."""


def block_scan(
    x_KQHP: torch.Tensor,
    dt_2KQH: torch.Tensor,
    A_H: torch.Tensor,
    B_2KQGN: torch.Tensor,
    C_2KQGN: torch.Tensor,
    diagonal_KQH: torch.Tensor | None,
    initial_2SHPN: torch.Tensor,
    blocks_per_step: list[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (K, Q, H, P) and final states (2, S, H, P, N).

    C holds at each token the vector it reads with, that of its neighbour. Filling has dt = 0 and its output is
    meaningless. All in one dtype, fp32 or fp64; documents in the layout's order.
    """
    num_groups = B_2KQGN.shape[3]
    x = x_KQHP.unflatten(2, (num_groups, -1)).transpose(1, 2)
    dt = dt_2KQH.unflatten(3, (num_groups, -1)).permute(0, 1, 3, 4, 2).contiguous()
    B, C = B_2KQGN.transpose(2, 3), C_2KQGN.transpose(2, 3)
    diagonal = None
    if diagonal_KQH is not None:
        diagonal = diagonal_KQH.unflatten(2, (num_groups, -1)).permute(0, 2, 3, 1)

    # Logarithms of decay, <= 0. Beside what a neighbour reads, whose decay is 1, smaller ones than this cannot be told
    # from nothing, and would leave no digits for differences of their sums.
    least = 1.4 * math.log(torch.finfo(dt.dtype).eps)
    log_decay = (dt * A_H.unflatten(0, (num_groups, -1))[..., None]).clamp_min(least)
    # From the block's edge where the direction enters it to ...
    upto = torch.stack((log_decay[0].cumsum(-1), _cumsum_from_right(log_decay[1])))  # ... behind each token,
    before = torch.stack((_shift(upto[0], 1), _shift(upto[1], -1)))  # ... in front of each token,
    through = torch.stack((upto[0, ..., -1], upto[1, ..., 0]))  # ... the far edge,
    # and from behind each token to the far edge.
    after = torch.stack((_shift(_cumsum_from_right(log_decay[0]), -1), _shift(log_decay[1].cumsum(-1), 1)))

    y = _WithinBlock.apply(x, dt, before, upto, B, C, diagonal)
    written = _WriteStates.apply(x, (dt * after.exp()).mT, B)
    initial = initial_2SHPN.unflatten(2, (num_groups, -1)).permute(0, 1, 2, 5, 3, 4)
    entering, final = _PassStates.apply(written, through.exp(), initial, blocks_per_step)
    y = y + _ReadStates.apply(entering, before.exp().mT, C)
    return y.transpose(1, 2).flatten(2, 3), final.permute(0, 1, 2, 4, 5, 3).flatten(2, 3)


def _cumsum_from_right(t: torch.Tensor) -> torch.Tensor:
    return t.flip(-1).cumsum(-1).flip(-1)


def _shift(t: torch.Tensor, by: int) -> torch.Tensor:
    """Move the last axis by one to the right (1) or left (-1), zero moving in."""
    return torch.nn.functional.pad(t[..., :-1] if by == 1 else t[..., 1:], (1, 0) if by == 1 else (0, 1))


class _WithinBlock(torch.autograd.Function):
    """y = M x with one matrix M (Q, Q) for each block and head, M = scores * decay * step + diagonal:

        below the diagonal  <Cf[i], Bf[j]> exp(before_f[i] - upto_f[j]) dtf[j]
        above the diagonal  <Cb[i], Bb[j]> exp(before_b[i] - upto_b[j]) dtb[j]

    Backward, with dM = dy x^T and U = dM * scores * decay taken below and above the diagonal separately:

        ddt[j] = sum_i U[i, j]     dupto[j] = -dt[j] ddt[j]     dbefore[i] = sum_j U[i, j] dt[j]

    the last two without the neighbour, whose decay is 1: what it adds to dupto[j] and to dbefore of its reader is the
    same with opposite signs, and where heads forget fast so much larger than the rest that only rounding is left of it.

        dscores = sum over the group's heads of dM * decay * step,   dC = dscores B,   dB = dscores^T C

    The matrices are rebuilt in the backward pass, a few blocks at a time.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        dt: torch.Tensor,
        before: torch.Tensor,
        upto: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        diagonal: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, dt, before, upto, B, C, diagonal)
        y = torch.empty_like(x)
        with without_autocast(x):
            for blocks in _block_slices(dt):
                M = _decay(before[:, blocks], upto[:, blocks]).mul_(_step_columns(dt[:, blocks]))
                M.mul_(_scores(C[:, blocks], B[:, blocks])[:, :, None])
                if diagonal is not None:
                    M.diagonal(dim1=-2, dim2=-1).copy_(diagonal[blocks])
                y[blocks] = (M @ x[blocks].transpose(2, 3)).transpose(2, 3)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, dt, before, upto, B, C, diagonal = ctx.saved_tensors
        dx, ddt, dbefore, dupto = map(torch.empty_like, (x, dt, before, upto))
        dB, dC = torch.empty_like(B), torch.empty_like(C)
        ddiagonal = None if diagonal is None else torch.empty_like(diagonal)
        with without_autocast(x):
            for blocks in _block_slices(dt):
                x_KGRQP, dy_KGRQP = x[blocks].transpose(2, 3), dy[blocks].transpose(2, 3).contiguous()
                decay = _decay(before[:, blocks], upto[:, blocks])
                scores = _scores(C[:, blocks], B[:, blocks])[:, :, None]
                step = _step_columns(dt[:, blocks])

                dM = dy_KGRQP @ x_KGRQP.mT
                if ddiagonal is not None:
                    ddiagonal[blocks] = dM.diagonal(dim1=-2, dim2=-1)
                U = dM.mul_(decay)
                dscores = (U * step).sum(2)
                U.mul_(scores)
                below = U.tril(-1)
                for direction, triangle in enumerate((below, U.sub_(below))):
                    steps = dt[direction, blocks]
                    beside = triangle.diagonal(2 * direction - 1, dim1=-2, dim2=-1)
                    of_neighbours = beside.clone()
                    beside.zero_()
                    ddt[direction, blocks] = triangle.sum(-2)
                    dbefore[direction, blocks] = (triangle @ steps[..., None])[..., 0]
                    dupto[direction, blocks] = -steps * ddt[direction, blocks]
                    ddt[direction, blocks][..., _WITH_A_NEIGHBOUR[direction]] += of_neighbours

                M = decay.mul_(step).mul_(scores)
                if diagonal is not None:
                    M.diagonal(dim1=-2, dim2=-1).copy_(diagonal[blocks])
                dx[blocks] = (M.mT @ dy_KGRQP).transpose(2, 3)
                for direction, dscore in enumerate((dscores.tril(-1), dscores.triu(1))):
                    dC[direction, blocks] = dscore @ B[direction, blocks]
                    dB[direction, blocks] = dscore.mT @ C[direction, blocks]
        return dx, ddt, dbefore, dupto, dB, dC, ddiagonal


def _block_slices(dt_2KGRQ: torch.Tensor) -> Iterator[slice]:
    _, num_blocks, num_groups, heads_per_group, block_len = dt_2KGRQ.shape
    elements = _MATRIX_ELEMENTS_ON_CPU if dt_2KGRQ.device.type == "cpu" else _MATRIX_ELEMENTS_ON_GPU
    at_once = max(1, elements // (num_groups * heads_per_group * block_len**2))
    for first in range(0, num_blocks, at_once):
        yield slice(first, first + at_once)


def _decay(before_2KGRQ: torch.Tensor, upto_2KGRQ: torch.Tensor) -> torch.Tensor:
    """exp(before[i] - upto[j]) (K, G, R, Q, Q): below the diagonal of the forward, above it of the backward direction.

    On its own side a direction's exponent is <= 0, on the other side >= 0, so the smaller of the two is the right one
    and nothing positive is ever exponentiated. The diagonal, where both are >= 0, is 1.
    """
    before, upto = before_2KGRQ[..., :, None], upto_2KGRQ[..., None, :]
    exponent = before[0] - upto[0]
    torch.minimum(exponent, before[1] - upto[1], out=exponent)
    exponent.diagonal(dim1=-2, dim2=-1).zero_()
    return exponent.exp_()


def _scores(C_2KGQN: torch.Tensor, B_2KGQN: torch.Tensor) -> torch.Tensor:
    """<C[i], B[j]> (K, G, Q, Q), forward below the diagonal and backward above it, 0 on it."""
    forward, backward = C_2KGQN @ B_2KGQN.mT
    return forward.tril_(-1).add_(backward.triu_(1))


def _step_columns(dt_2KGRQ: torch.Tensor) -> torch.Tensor:
    """dt[j] (K, G, R, Q, Q), of the forward direction below the diagonal and of the backward one above it."""
    block_len = dt_2KGRQ.shape[-1]
    below = torch.ones(block_len, block_len, dtype=torch.bool, device=dt_2KGRQ.device).tril(-1)
    return torch.where(below, dt_2KGRQ[0, ..., None, :], dt_2KGRQ[1, ..., None, :])


class _WriteStates(torch.autograd.Function):
    """What each block adds to the state leaving it: sum_j weight[j] B[j] x[j]^T, (2, K, G, N, R, P).

    weight (2, K, G, Q, R) is dt times the decay to the far edge.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight, B)
        with without_autocast(x):
            states = B.mT @ (weight[..., None] * x).flatten(-2)
        return states.unflatten(-1, x.shape[-2:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dstates: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, weight, B = ctx.saved_tensors
        dstates = dstates.flatten(-2)
        with without_autocast(x):
            dB = (weight[..., None] * x).flatten(-2) @ dstates.mT
            dwritten = (B @ dstates).unflatten(-1, x.shape[-2:])
            dweight = (dwritten * x).sum(-1)
            dx = dwritten.mul_(weight[..., None]).sum(0)
        return dx, dweight, dB


class _ReadStates(torch.autograd.Function):
    """What each token reads of the state that entered its block: sum of directions of decay[i] C[i]^T state.

    states (2, K, G, N, R, P), decay (2, K, G, Q, R) from the entering edge to the token; returns (K, G, Q, R, P).
    """

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, decay: torch.Tensor, C: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(states, decay, C)
        with without_autocast(states):
            read = (C @ states.flatten(-2)).unflatten(-1, states.shape[-2:])
        return read.mul_(decay[..., None]).sum(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, ...]:
        states, decay, C = ctx.saved_tensors
        head_shape = states.shape[-2:]
        states = states.flatten(-2)
        with without_autocast(dy):
            read = (C @ states).unflatten(-1, head_shape)
            ddecay = read.mul_(dy).sum(-1)
            decayed_dy = (decay[..., None] * dy).flatten(-2)
            dstates = (C.mT @ decayed_dy).unflatten(-1, head_shape)
            dC = decayed_dy @ states.mT
        return dstates, ddecay, dC


class _PassStates(torch.autograd.Function):
    """Along each document, in each direction: entering[k] is the state that the neighbouring block left,

        left[k] = gain[k] entering[k] + written[k],

    and entering of the first block is the initial state. Returns entering (2, K, G, N, R, P) and the state left by the
    last block, final (2, S, G, N, R, P). Backward is the same recurrence the other way:

        dentering[k] += gain[k] dleft[k]     dwritten[k] = dleft[k]     dgain[k] = <dleft[k], entering[k]>
    """

    @staticmethod
    def forward(
        ctx: Any, written: torch.Tensor, gain: torch.Tensor, initial: torch.Tensor, blocks_per_step: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        entering, final = torch.empty_like(written), initial.clone()
        for direction, steps in enumerate(_both_ways(blocks_per_step)):
            for blocks, documents in steps:
                state = final[direction, documents]  # of the documents that have this step, updated in place
                entering[direction, blocks] = state
                state.mul_(gain[direction, blocks, :, None, :, None]).add_(written[direction, blocks])
        ctx.save_for_backward(gain, entering)
        ctx.blocks_per_step = blocks_per_step
        return entering, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dentering: torch.Tensor, dfinal: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gain, entering = ctx.saved_tensors
        dwritten, dinitial = torch.empty_like(dentering), dfinal.clone()
        for direction, steps in enumerate(_both_ways(ctx.blocks_per_step)):
            for blocks, documents in reversed(steps):
                dstate = dinitial[direction, documents]
                dwritten[direction, blocks] = dstate
                dstate.mul_(gain[direction, blocks, :, None, :, None]).add_(dentering[direction, blocks])
        dgain = (dwritten * entering).sum((-3, -1))
        return dwritten, dgain, dinitial, None


def _both_ways(blocks_per_step: list[int]) -> tuple[list[tuple[slice, slice]], list[tuple[slice, slice]]]:
    """For each direction its steps in order: the blocks of a step, and the documents they belong to."""
    steps, first = [], 0
    for count in blocks_per_step:
        steps.append((slice(first, first + count), slice(0, count)))
        first += count
    return steps, steps[::-1]
