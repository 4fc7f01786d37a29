"""DeepSpeed's update under ZeRO 1 and 2 without what it does for weights of 16 bits only.

It keeps an fp32 copy of a rank's weights, which AdamW updates and which is then copied over them, scales gradients in
a pass of its own, and computes their norm parameter by parameter. Here weights are fp32, AdamW's kernel takes the
scale, and the norm is one of few tensors. Reads private names of DeepSpeed 0.19.8, which constraints.txt pins.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from hydra_kernels import AdamWNumbers, AdamWState, adamw_


def share_weights(zero: Any, data_group: dist.ProcessGroup) -> None:
    """Let AdamW update a rank's part of the weights in place: `zero`'s copy of it becomes that part."""
    rank = dist.get_rank(data_group)
    masters = zero.single_partition_of_fp32_groups
    for parts, master in zip(zero.parallel_partitioned_bit16_groups, masters, strict=True):
        master.data = parts[rank].data
    for parameter in (parameter for group in zero.bit16_groups for parameter in group):
        if (place := parameter._hp_mapping) is not None:  # a view of the copy, which would keep it alive
            address = place.hp_fragment_address
            place.hp_fragment = masters[place.param_group_index].narrow(0, address.start, address.numel)


def clip_in_update(zero: Any) -> None:
    """Let AdamW's kernel divide the gradients as it reads them, in DeepSpeed's own step."""

    def set_scale(gradients: list[torch.Tensor], norm: torch.Tensor | float) -> None:
        """norm: of all gradients; finite, or there would be no update."""
        scale = (float(norm) + 1e-6) / zero.clip_grad if zero.clip_grad > 0.0 else 1.0
        # without a scale AdamW does not write the gradients back
        zero.optimizer.grad_scale = torch.full((), scale, device=gradients[0].device) if scale > 1.0 else None

    zero.unscale_and_clip_grads = set_scale


def update_at_once(zero: Any, norm: torch.Tensor) -> None:
    """What follows from gradients that `FlatGradients` handed over, without the host having read their norm, for which
    `zero.step` lets the device wait: AdamW divides them by what clips, and leaves all as it is unless it is finite."""
    refused = norm.isfinite().logical_not().float()
    clip = zero.clip_grad
    divisor = ((norm + 1e-6) / clip).clamp(min=1.0).float() if clip > 0.0 else torch.ones_like(refused)
    for index, weights in enumerate(zero.single_partition_of_fp32_groups):
        group, state = zero.optimizer.param_groups[index], AdamWState(**zero.optimizer.state[weights])
        numbers = AdamWNumbers(group["lr"], group["betas"], group["eps"], group["weight_decay"])
        gradient = zero.averaged_gradients[index].flat_partition
        adamw_(weights.data, gradient, state, numbers, divisor=divisor, refused=refused)
    zero.update_lp_params()  # a rank's own part is in its place already


def norm_at_once(zero: Any) -> torch.Tensor:
    """Of the gradients of all parameters over all ranks, as `zero.scaled_global_norm`, which starts three kernels a
    parameter, in fp64, and waits for the device once a group: of a step's time on an H100 a tenth."""
    groups = enumerate(zero.params_in_partition)
    counted = [
        gradient for index, params in groups for gradient in _counted_here(zero.averaged_gradients[index], params)
    ]
    if counted:
        norm = torch.nn.utils.get_total_norm(counted, foreach=True)
    else:
        norm = torch.zeros((), device=zero.device)
    squares = norm.square()
    dist.all_reduce(squares, group=zero.dp_process_group)
    zero._model_parallel_all_reduce(squares, dist.ReduceOp.SUM)
    return squares.sqrt()


def _counted_here(gradients: list[Any], params: Iterable[Any]) -> Iterator[torch.Tensor]:
    """Those whose squares this rank adds to the sum: of what tensor ranks hold alike the first one does, of what
    pipeline stages hold alike the one that owns it. In one piece where all count and lie in one."""
    own = [gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False)]
    counted = [
        gradient
        for gradient, parameter in zip(own, params, strict=False)
        if not getattr(parameter, "ds_pipe_replicated", False)
        and (getattr(parameter, "tensor_model_parallel", False) or parallel_state.get_tensor_model_parallel_rank() == 0)
    ]
    flat = getattr(gradients, "flat_partition", None)
    yield from counted if flat is None or len(counted) < len(gradients) else [flat]
