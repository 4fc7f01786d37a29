"""What a rank owns of a parameter and of its moments, and where that belongs: what checkpoints are made of."""

from dataclasses import dataclass

import torch

from hydra_scale.parallel.placement import Placement

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class LocalSlice:
    """Elements [start, start + len) of a flattened parameter of this rank, in fp32, and where it belongs."""

    name: str
    """Of the global tensor."""
    shape: tuple[int, ...]
    """Of the parameter as this rank holds it."""
    start: int
    parameter: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    divided: Placement | None = None
    """Where the parameter belongs in the global tensor; absent: it is the global tensor."""
    is_copy: bool = False
    """Another rank has the same, and it is that one's to save."""

    @property
    def placement(self) -> Placement:
        return self.divided or Placement.whole(self.shape)
