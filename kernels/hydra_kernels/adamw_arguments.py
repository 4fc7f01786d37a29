"""What an AdamW update takes beside the weights and their gradient."""

from typing import NamedTuple

import torch


class AdamWState(NamedTuple):
    """What an update reads and writes beside the weights: fp32, as torch.optim.AdamW keeps it."""

    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    step: torch.Tensor
    """Updates so far, without dimensions, on the weights' device."""


class AdamWNumbers(NamedTuple):
    """Of a parameter group."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
