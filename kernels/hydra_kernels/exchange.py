"""What the operations ask of whoever divides a sequence over ranks."""

from typing import NamedTuple, Protocol

import torch


class Exchange(Protocol):
    """How states and vectors travel when these tokens are a stretch, whose documents may go on elsewhere.

    Such documents have starts_T < 0 or ends_T > T. A leading 2 is (forward, backward); all in fp32.
    """

    def states(
        self, own_2HPN: torch.Tensor, decay_2H: torch.Tensor, readout_2GN: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What enters here: states, from what each stretch adds to one that passes and its decay; C of the neighbours,
        of whom the left gets that of the first token, the right that of the last."""

    def state_gradients(self, own_2HPN: torch.Tensor, decay_2H: torch.Tensor) -> torch.Tensor:
        """Gradients of the states that leave here, from what each stretch adds to one that passes back."""

    def readout_gradients(self, grad_2GN: torch.Tensor) -> torch.Tensor:
        """Of the first token's and the last token's C that were given away, (backward, forward) in [1] and [0]."""


class Entered(NamedTuple):
    """What came in from other stretches."""

    states_2HPN: torch.Tensor
    readout_2GN: torch.Tensor
