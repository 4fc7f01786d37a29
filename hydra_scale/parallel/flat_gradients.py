"""Gradients of ZeRO 1: one tensor a parameter group, laid out like its weights, that the backward pass adds to.

DeepSpeed by itself copies each gradient three times, which takes thousands of small kernels a step. Here a gradient has
its place in the tensor that ranks sum with one collective and AdamW reads. Reads private names of DeepSpeed 0.19.8,
which constraints.txt pins.
"""

from dataclasses import dataclass
from math import inf
from typing import Any

import torch
import torch.distributed as dist
from torch.linalg import vector_norm

_sum_shares = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # its name before torch 2.13


class OwnGradients(list[torch.Tensor]):
    """This rank's part of a group's gradients, parameter by parameter, as DeepSpeed's norm reads it."""

    flat_partition: torch.Tensor
    """The same in one piece, with the zeros that fill it up: what DeepSpeed's step takes if it finds this name."""


@dataclass(frozen=True)
class _Group:
    flat: torch.Tensor
    """Gradients of all parameters of the group, filled up with zeros to equal shares of the ranks."""
    own: OwnGradients


class FlatGradients:
    """The gradients of a ZeRO 1 optimizer, from the first micro batch to the update."""

    def __init__(self, zero: Any, data_group: dist.ProcessGroup) -> None:
        """`zero`: DeepSpeed's optimizer, whose own handling of gradients ends here. Parameters get `main_grad`, the
        place of their gradient, which stays where it is as CUDA graphs want it."""
        for hook in zero._grad_acc_hooks:
            hook.remove()
        zero._grad_acc_hooks.clear()
        zero._update_model_bit16_weights = lambda group: None  # weights are views of the flat ones already
        zero.free_grad_in_param_list = lambda params: None  # gradients stay where they are
        zero.zero_grad = lambda set_to_none=True: None  # `start` does it
        self._zero, self._data_group = zero, data_group
        rank, size = dist.get_rank(data_group), dist.get_world_size(data_group)
        flats = zip(zero.bit16_groups_flat, zero.bit16_groups, strict=True)
        self._groups = [_group(flat, params, rank, size) for flat, params in flats]

    def start(self) -> None:
        """Zeros, where backward passes will add."""
        for group in self._groups:
            group.flat.zero_()

    def finish(self) -> None:
        """Average over the ranks, each its own share, and hand it to DeepSpeed's step."""
        size = dist.get_world_size(self._data_group)
        for index, group in enumerate(self._groups):
            if size > 1:
                share = group.own.flat_partition
                _sum_shares(share, group.flat, group=self._data_group)
                share.div_(size)
            self._zero.averaged_gradients[index] = group.own

    def sources_not_finite(self) -> list[int]:
        """Global ranks of the data group that put in what is not finite, between a step and the next `start`.

        A rank still has what it put into the others' shares. Of its own only the average is left: where that is not
        finite and nobody else is to blame for it, the rank is. Collective, one small gather.
        """
        size = dist.get_world_size(self._data_group)
        largest_GR = torch.stack([vector_norm(group.flat.view(size, -1), inf, dim=1) for group in self._groups])
        own_R = largest_GR.isfinite().all(0).logical_not()
        bad_RR = torch.empty(size, size, dtype=torch.uint8, device=own_R.device)
        dist.all_gather_into_tensor(bad_RR.view(-1), own_R.byte(), group=self._data_group)
        is_own_RR = torch.eye(size, dtype=torch.bool, device=own_R.device)
        others_RR = bad_RR.bool() & ~is_own_RR  # rank, whose share
        alone_R = bad_RR.diagonal().bool() & ~others_RR.any(0)
        places = (others_RR.any(1) | alone_R).nonzero()[:, 0].tolist()
        return [dist.get_global_rank(self._data_group, place) for place in places]


def _group(weights: torch.Tensor, params: list[Any], rank: int, size: int) -> _Group:
    flat = torch.zeros_like(weights)
    share = flat.numel() // size
    first, end = rank * share, (rank + 1) * share
    own = OwnGradients()
    for parameter in params:
        start = parameter.data.storage_offset() - weights.storage_offset()
        stop = start + parameter.numel()
        parameter.grad = parameter.main_grad = flat[start:stop].view_as(parameter)
        if max(start, first) < min(stop, end):
            own.append(flat[max(start, first) : min(stop, end)])
    own.flat_partition = flat[first:end]
    return _Group(flat, own)
