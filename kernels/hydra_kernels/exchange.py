"""What the operations ask of whoever divides a sequence over ranks, and what they hand over."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch

from .backends import resolve_backend
from .triton_language import available

if available:
    from .triton_states import chain_messages


class Leaving(NamedTuple):
    """What a stretch gives to those beside it, laid end to end in one message. A leading 2 is (forward, backward)."""

    message: torch.Tensor
    """One dimension; the others are parts of it, in this order."""
    own_2HPN: torch.Tensor
    """What the stretch adds to a state that passes."""
    decay_2H: torch.Tensor
    """Of a passing state; zero where a border of documents lies."""
    readout_2GN: torch.Tensor
    """C of the last token, with which the right neighbour reads forward, and of the first, for the left one."""

    @classmethod
    def empty(cls, state: tuple[int, int, int], readers: tuple[int, int], like: torch.Tensor) -> "Leaving":
        """For states (H, P, N) and vectors (G, N), (0, 0) if none travel; uninitialised, with the dtype of `like`."""
        return cls.within(like.new_empty(cls._size(state, readers)), state, readers)

    @classmethod
    def within(cls, message: torch.Tensor, state: tuple[int, int, int], readers: tuple[int, int]) -> "Leaving":
        """The parts of a message."""
        num_states, num_heads = 2 * state[0] * state[1] * state[2], state[0]
        own, decay, readout = message.split([num_states, 2 * num_heads, 2 * readers[0] * readers[1]])
        return cls(message, own.view(2, *state), decay.view(2, num_heads), readout.view(2, *readers))

    @staticmethod
    def _size(state: tuple[int, int, int], readers: tuple[int, int]) -> int:
        return 2 * (state[0] * state[1] * state[2] + state[0] + readers[0] * readers[1])

    def of(self, message: torch.Tensor) -> "Leaving":
        """Another stretch's, of the same shapes."""
        _, num_heads, headdim, d_state = self.own_2HPN.shape
        _, num_groups, width = self.readout_2GN.shape
        return self.within(message, (num_heads, headdim, d_state), (num_groups, width))


class Entered(NamedTuple):
    """What came in from other stretches: forward from the left, backward from the right."""

    states_2HPN: torch.Tensor
    readout_2GN: torch.Tensor
    """C of the token in front of the first and of the one behind the last; zeros where there is none."""


class Exchange(Protocol):
    """How states and vectors travel when these tokens are a stretch, whose documents may go on elsewhere.

    Such documents have starts_T < 0 or ends_T > T. States and vectors are fp32. Each method begins a transfer and
    returns a function that waits for it and gives what came: the caller computes something else in between.
    """

    def states(self, leaving: Leaving) -> Callable[[], Entered]:
        """What enters here."""

    def state_gradients(self, leaving: Leaving) -> Callable[[], torch.Tensor]:
        """Gradients (2, H, P, N) of the states that leave here, from what each stretch adds to one that passes back;
        without vectors."""

    def rows(
        self, to_left: torch.Tensor, to_right: torch.Tensor, into: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
        """What the left neighbour sends to the right and the right one to the left, zeros beyond the ends; `into`
        these tensors if given. In any dtype."""


def entered_from(
    messages_WM: torch.Tensor, leaving: Leaving, rank: int, *, backward: bool = False, backend: str = "auto"
) -> Entered:
    """What enters the stretch of a rank, from the messages of all W; `leaving`: its own.

    E_{r+1} = own_r + decay_r E_r along the ranks for [0] and against them for [1], E = 0 at the ends; `backward`, for
    gradients, the other way round. Raises ValueError for an unknown backend.
    """
    if resolve_backend(backend, messages_WM) == "triton":
        return Entered(*chain_messages(messages_WM, leaving.own_2HPN, leaving.readout_2GN, rank, backward))
    parts, size = [leaving.of(message) for message in messages_WM], len(messages_WM)
    entering, readout = torch.zeros_like(leaving.own_2HPN), torch.zeros_like(leaving.readout_2GN)
    before, behind = range(rank), range(size - 1, rank, -1)
    for direction, ranks in enumerate((behind, before) if backward else (before, behind)):
        for other in ranks:
            own_HPN, decay_H = parts[other].own_2HPN[direction], parts[other].decay_2H[direction]
            entering[direction] = own_HPN + decay_H[:, None, None] * entering[direction]
    for direction, beside in enumerate((rank - 1, rank + 1)):
        if 0 <= beside < size:
            readout[direction] = parts[beside].readout_2GN[direction]
    return Entered(entering, readout)
