"""Context parallelism: each rank holds a stretch of every micro batch, and states, not tokens, travel between ranks.

Rank r of W scans its stretch in both directions from what enters it. What it adds to a passing state is F_r, the decay
of its whole stretch a_r, so E_{r+1} = F_r + a_r E_r enters the next rank, E_0 = 0, and the same leftwards for the
backward scan. A document border inside a stretch sets a_r = 0 and cuts the chain. Gradients of E run the same chain the
other way. The bytes are those of the states, whatever the sequence length (docs/parallelism.md).
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from hydra_kernels import Entered, Leaving, entered_from
from hydra_scale.topology import Context

_Message = tuple[int, torch.Tensor]
"""A neighbour, -1 (left) or +1 (right), and what goes there or comes from there."""

_BLOCKS = 4
"""Parts in which the neighbour exchange sends the heads, so that a rank passes one on while the next arrives."""


def _begin_transfer(context: Context, sends: list[_Message], receives: list[_Message]) -> list[dist.Work]:
    """Send and receive at once; beyond the ends nothing happens."""
    operations = []
    for operation, pairs in ((dist.isend, sends), (dist.irecv, receives)):
        for step, tensor in pairs:
            if (peer := context.neighbour(step)) is not None:
                operations.append(dist.P2POp(operation, tensor, peer, context.group))
    return dist.batch_isend_irecv(operations) if operations else []


def begin_swap(
    context: Context,
    to_left: torch.Tensor,
    to_right: torch.Tensor,
    into: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    """Send to both neighbours. The function returned waits and gives what the left one sent to the right and the right
    one to the left, `into` where that is given; zeros beyond the ends. All of one shape, `into` contiguous."""
    to_left, to_right = to_left.contiguous(), to_right.contiguous()
    from_left, from_right = into or to_left.new_empty(2, *to_left.shape)
    sides = [(-1, from_left), (1, from_right)]
    for step, came in sides:
        if context.neighbour(step) is None:
            came.zero_()
    works = _begin_transfer(context, [(-1, to_left), (1, to_right)], sides)

    def finish() -> tuple[torch.Tensor, torch.Tensor]:
        for work in works:
            work.wait()
        return from_left, from_right

    return finish


class _Halo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TE: torch.Tensor, width: int, context: Context) -> torch.Tensor:
        ctx.width, ctx.context = width, context
        from_left, from_right = begin_swap(context, x_TE[:width], x_TE[-width:])()
        return torch.cat((from_left, x_TE, from_right))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        width = ctx.width
        from_left, from_right = begin_swap(ctx.context, grad[:width], grad[-width:])()
        grad_x = grad[width:-width]  # in place: the rows with a halo are divided into parts, whose own this gradient is
        grad_x[:width] += from_left
        grad_x[-width:] += from_right
        return grad_x, None, None


def with_halo(x_TE: torch.Tensor, width: int, context: Context) -> torch.Tensor:
    """(T, E) with the `width` rows that stand before and after it on the neighbours, zeros beyond the ends.

    Every rank holds at least `width` rows. Returns (T + 2 width, E).
    """
    if width == 0:
        return x_TE
    return _Halo.apply(x_TE, width, context)


class _ProjectedBetween(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: torch.Tensor, weight_ED: torch.Tensor, width: int) -> torch.Tensor:
        ctx.width = width
        ctx.save_for_backward(x_TD, weight_ED)
        projected = x_TD.new_empty(len(x_TD) + 2 * width, len(weight_ED))
        torch.mm(x_TD, weight_ED.to(x_TD.dtype).T, out=projected[width : width + len(x_TD)])
        return projected

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_TD, weight_ED = ctx.saved_tensors
        grad = grad[ctx.width : ctx.width + len(x_TD)]
        return grad @ weight_ED.to(grad.dtype), (grad.T @ x_TD).to(weight_ED.dtype), None


def projected_between(x_TD: torch.Tensor, weight_ED: torch.Tensor, width: int) -> torch.Tensor:
    """x W^T in x's dtype, with `width` rows left free on either side, where `hydra_mix_of_stretch` puts those of the
    neighbours: to lay them beside a finished product would copy it. (T, D) to (T + 2 width, E)."""
    return _ProjectedBetween.apply(x_TD, weight_ED, width)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, own: torch.Tensor, decay: torch.Tensor, readout: torch.Tensor, context: Context
    ) -> tuple[torch.Tensor, torch.Tensor]:
        entered = _begin_chain(_leaving(own, decay, readout), context, "torch")()
        ctx.context, ctx.dtype = context, readout.dtype
        ctx.save_for_backward(decay, entered.states_2HPN)
        return entered.states_2HPN, entered.readout_2GN.to(readout.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_entering: torch.Tensor, grad_readout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        decay, entering = ctx.saved_tensors
        # what came from the left goes back to the left, where it is found as what comes from the right
        leaving = _leaving(grad_entering, decay, grad_readout.flip(0))
        returned = _begin_chain(leaving, ctx.context, "torch", backward=True)()
        grad_own = returned.states_2HPN
        return grad_own, (grad_own * entering).sum((2, 3)), returned.readout_2GN.flip(0).to(ctx.dtype), None


def _leaving(own_2HPN: torch.Tensor, decay_2H: torch.Tensor, readout_2GN: torch.Tensor) -> Leaving:
    _, num_heads, headdim, d_state = own_2HPN.shape
    _, num_groups, width = readout_2GN.shape
    parts = (own_2HPN, decay_2H, readout_2GN)
    message = torch.cat([part.flatten().to(own_2HPN.dtype) for part in parts])
    return Leaving.within(message, (num_heads, headdim, d_state), (num_groups, width))


def exchange_states(
    own_2HPN: torch.Tensor, decay_2H: torch.Tensor, readout_2GN: torch.Tensor, context: Context
) -> tuple[torch.Tensor, torch.Tensor]:
    """States (2, H, P, N) and read-out vectors (2, G, N) that enter this rank's stretch: forward from the left,
    backward from the right.

    own, decay: what this rank adds to a passing state, and that state's decay; zeros where a document border lies.
    readout: C of the last token, which the right neighbour reads forward with, and of the first, for the left one.
    """
    return _Exchange.apply(own_2HPN, decay_2H, readout_2GN, context)


class StateExchange:
    """The same on Triton kernels for `hydra_kernels.hydra_mix_of_stretch`, which differentiates by itself."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def states(self, leaving: Leaving) -> Callable[[], Entered]:
        """What enters here."""
        return _begin_chain(leaving, self._context, "triton")

    def state_gradients(self, leaving: Leaving) -> Callable[[], torch.Tensor]:
        """Of the states that leave here: the chain the other way round."""
        entering = _begin_chain(leaving, self._context, "triton", backward=True)
        return lambda: entering().states_2HPN

    def rows(
        self, to_left: torch.Tensor, to_right: torch.Tensor, into: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
        """From the left and from the right neighbour."""
        return begin_swap(self._context, to_left, to_right, into)


def _begin_chain(leaving: Leaving, context: Context, backend: str, backward: bool = False) -> Callable[[], Entered]:
    """E_{r+1} = own_r[0] + decay_r[0] E_r along the ranks, and with [1] against them, or `backward` the other way
    round; vectors from both neighbours."""
    if context.exchange == "neighbour":
        return partial(_chain_by_neighbours, leaving, context, backward)
    messages = leaving.message.new_empty(context.size, leaving.message.numel())
    work = dist.all_gather_into_tensor(messages.view(-1), leaving.message, group=context.group, async_op=True)

    def finish() -> Entered:
        work.wait()
        return entered_from(messages, leaving, context.rank, backward=backward, backend=backend)

    return finish


def _chain_by_neighbours(leaving: Leaving, context: Context, backward: bool) -> Entered:
    vectors = leaving.readout_2GN
    if vectors.numel():  # first: NCCL wants all ranks of a group in its first transfer
        vectors = torch.stack(begin_swap(context, vectors[1], vectors[0])())
    own, decay = leaving.own_2HPN, leaving.decay_2H
    if not backward:
        return Entered(_passed_on(own, decay, context), vectors)
    return Entered(_passed_on(own.flip(0), decay.flip(0), context).flip(0), vectors)


def _passed_on(own: torch.Tensor, decay: torch.Tensor, context: Context) -> torch.Tensor:
    """Block b of the heads leaves the rank at distance s from its direction's start in turn s + b."""
    entering = torch.zeros_like(own)
    num_blocks = 1 if context.size == 2 else min(_BLOCKS, own.shape[1])  # of two ranks none passes anything on
    edges = [block * own.shape[1] // num_blocks for block in range(num_blocks + 1)]
    blocks = [slice(*pair) for pair in pairwise(edges)]
    distance = (context.rank, context.size - 1 - context.rank)
    for turn in range(context.size - 1 + num_blocks - 1):
        sends, receives, arrived = [], [], []
        for direction, onward in enumerate((1, -1)):
            leaving, coming = turn - distance[direction], turn - distance[direction] + 1
            if 0 <= leaving < num_blocks:
                part = blocks[leaving]
                passing = decay[direction, part, None, None] * entering[direction, part]
                sends.append((onward, own[direction, part] + passing))
            if 0 <= coming < num_blocks and distance[direction] > 0:
                buffer = torch.empty_like(own[direction, blocks[coming]])
                receives.append((-onward, buffer))
                arrived.append((direction, blocks[coming], buffer))
        for work in _begin_transfer(context, sends, receives):
            work.wait()
        for direction, part, buffer in arrived:
            entering[direction, part] = buffer
    return entering


class _Redivide(torch.autograd.Function):
    """From tokens to heads or back; the gradient goes the other way."""

    @staticmethod
    def forward(ctx: Any, x_THX: torch.Tensor, by_heads: bool, num_tokens: int, context: Context) -> torch.Tensor:
        ctx.by_heads, ctx.num_tokens, ctx.context = by_heads, num_tokens, context
        return (_tokens_to_heads if by_heads else _heads_to_tokens)(x_THX, num_tokens, context)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        back = _heads_to_tokens if ctx.by_heads else _tokens_to_heads
        return back(grad, ctx.num_tokens, ctx.context), None, None, None


def tokens_to_heads(x_THX: torch.Tensor, num_tokens: int, context: Context) -> torch.Tensor:
    """From (T, all H, ...) of this rank's tokens to (all num_tokens, H / W, ...) of its heads."""
    return _Redivide.apply(x_THX, True, num_tokens, context)


def heads_to_tokens(x_THX: torch.Tensor, num_tokens: int, context: Context) -> torch.Tensor:
    """Undoes `tokens_to_heads`."""
    return _Redivide.apply(x_THX, False, num_tokens, context)


def _lengths(num_tokens: int, context: Context) -> list[int]:
    stretches = (context.stretch(num_tokens, rank) for rank in range(context.size))
    return [end - first for first, end in stretches]


def _tokens_to_heads(x_THX: torch.Tensor, num_tokens: int, context: Context) -> torch.Tensor:
    lengths = _lengths(num_tokens, context)
    of_rank = x_THX.unflatten(1, (context.size, -1)).transpose(0, 1).flatten(0, 1).contiguous()
    here = [len(x_THX)] * context.size
    result = of_rank.new_empty(num_tokens, *of_rank.shape[1:])
    dist.all_to_all_single(result, of_rank, lengths, here, group=context.group)
    return result


def _heads_to_tokens(x_THX: torch.Tensor, num_tokens: int, context: Context) -> torch.Tensor:
    lengths = _lengths(num_tokens, context)
    here = lengths[context.rank]
    received = x_THX.new_empty(context.size * here, *x_THX.shape[1:])
    dist.all_to_all_single(received, x_THX.contiguous(), [here] * context.size, lengths, group=context.group)
    return received.unflatten(0, (context.size, here)).transpose(0, 1).flatten(1, 2)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TE: torch.Tensor, first: int, num_rows: int, context: Context) -> torch.Tensor:
        ctx.context, ctx.rows = context, slice(first, first + len(x_TE))
        lengths = _lengths(num_rows, context)
        longest = max(lengths)
        padded = x_TE.new_zeros(longest, x_TE.shape[1])
        padded[: len(x_TE)] = x_TE
        gathered = x_TE.new_empty(context.size, longest, x_TE.shape[1])
        dist.all_gather_into_tensor(gathered.view(-1, x_TE.shape[1]), padded, group=context.group)
        return torch.cat([rows[:length] for rows, length in zip(gathered, lengths, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        total = grad.contiguous().clone()
        dist.all_reduce(total, group=ctx.context.group)
        return total[ctx.rows], None, None, None


def gather_rows(x_TE: torch.Tensor, first: int, num_rows: int, context: Context) -> torch.Tensor:
    """The rows of all ranks (num_rows, E), this rank's being those from `first` on."""
    return _GatherRows.apply(x_TE, first, num_rows, context)
