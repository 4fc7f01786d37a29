"""DeepSpeed ZeRO around a model: reduction of gradients, clipping, the AdamW step, and its state by parameter.

Reads some private names of DeepSpeed 0.19.8, which constraints.txt pins: where a rank's slice of a parameter and its
moments lie. Everything that touches them is in `ZeroOptimizer.local_slices` and `_seed_state`.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import nn

from hydra_scale.accelerator import import_deepspeed
from hydra_scale.config import Config
from hydra_scale.errors import CheckpointError
from hydra_scale.parallel.flat_gradients import FlatGradients
from hydra_scale.parallel.lean_update import clip_in_update, norm_at_once, share_weights, update_at_once
from hydra_scale.parallel.pipeline import Pipeline
from hydra_scale.parallel.placement import global_name, placement_of
from hydra_scale.parallel.slices import MOMENTS, LocalSlice
from hydra_scale.topology import Topology


class ZeroOptimizer:
    """A model under ZeRO. Parameters, gradients and moments are fp32; bf16 is a matter of autocast."""

    def __init__(self, model: nn.Module, config: Config, topology: Topology, groups: list[dict[str, Any]]) -> None:
        """`groups` are AdamW parameter groups with their weight decay; every trainable parameter is in one."""
        self._parameters = dict(model.named_parameters())
        self._is_first_tensor_rank = topology.tensor.rank == 0
        optimizer = torch.optim.AdamW(
            groups, lr=config.optimizer.lr, betas=config.optimizer.betas, eps=config.optimizer.eps, fused=True
        )
        self._engine, *_ = import_deepspeed().initialize(
            model=model,
            optimizer=optimizer,
            config=_deepspeed_config(config),
            mpu=_DataParallelUnit(topology),
        )
        self._zero = self._engine.optimizer
        self._device, self._fetch = topology.accelerator.device, topology.accelerator.fetch
        self._autocast = partial(topology.accelerator.autocast, config.training.precision)
        self._is_stage_3 = config.zero.stage == 3
        self._discards = False
        if not self._is_stage_3 and not config.zero.offload:
            share_weights(self._zero, topology.data_group)
            if config.zero.stage == 2:  # under 1 `update_at_once` does it
                clip_in_update(self._zero)
            # a CPU sums fp32 one by one: of 31 million elements 0.2% is lost, so DeepSpeed's fp64 remains there
            if self._device.type == "cuda":
                self._zero.scaled_global_norm = partial(norm_at_once, self._zero)
        norms = "_get_norm_groups" if self._is_stage_3 else "scaled_global_norm"
        setattr(self._zero, norms, partial(self._norms_or_invalid, getattr(self._zero, norms)))
        self._pipeline = Pipeline(model, config, topology) if topology.stage.size > 1 else None
        is_flat = config.zero.stage == 1 and not config.zero.offload
        self._flat = FlatGradients(self._zero, topology.data_group) if is_flat else None
        self._seed_state(0)

    @property
    def module(self) -> nn.Module:
        """The model as called through the engine: under autocast for bf16, split parameters gathered under ZeRO 3."""
        return self._engine

    @property
    def computing(self) -> list[nn.Module]:
        """The modules that a step calls for its forward passes: the model, or the chunks of a pipeline's stage."""
        return [self._engine.module] if self._pipeline is None else self._pipeline.chunks

    def accumulate(self, batches: list[Any], scale: float) -> torch.Tensor:
        """Forward and backward of the micro batches of a step; gradients of their loss times `scale` are averaged over
        the data ranks. Returns summed loss and right predictions, float64 (2,), zero before a pipeline's last stage."""
        if self._flat is not None:
            return self._accumulate_flat(self._flat, batches, scale)
        if self._pipeline is not None:
            with self._engine.no_sync(), self._autocast():
                scores = self._pipeline.train(batches, scale)
            self._pipeline.sum_tied_gradients()
            self._engine.set_gradient_accumulation_boundary(True)
            self._engine.allreduce_gradients()
            return torch.stack([torch.stack(score).double() for score in scores]).sum(0)
        sums = torch.zeros(2, dtype=torch.float64, device=self._device)
        for index, batch in enumerate(batches):
            loss, num_correct = self._engine(batch)
            self._engine.set_gradient_accumulation_boundary(index == len(batches) - 1)
            with self._autocast():  # megatron's linear layers remember that of the forward pass on CUDA only
                self._engine.backward(loss * scale)
            sums += torch.stack((loss.detach().double(), num_correct.double()))
        return sums

    def _accumulate_flat(self, flat: FlatGradients, batches: list[Any], scale: float) -> torch.Tensor:
        flat.start()
        scores: list[Any] = []
        with self._autocast():
            if self._pipeline is not None:
                scores = self._pipeline.train(batches, scale)
                self._pipeline.sum_tied_gradients()
            else:
                for batch in batches:
                    loss, num_correct = self._engine.module(batch)
                    (loss * scale).backward()
                    scores.append((loss.detach(), num_correct))
        flat.finish()
        return torch.stack([torch.stack(score).double() for score in scores]).sum(0)

    @torch.no_grad()
    def score(self, batches: list[Any]) -> list[Any]:
        """The model's sums for each micro batch, without dropout; zero before a pipeline's last stage."""
        self._engine.eval()
        with self._autocast():
            scores = [self._engine(b) for b in batches] if self._pipeline is None else self._pipeline.score(batches)
        self._engine.train()
        return scores

    def step(self, lr: float, discard: bool = False) -> float:
        """Clip, update with learning rate `lr`, forget the gradients; returns the norm before clipping.

        With a norm that is not finite, or `discard`, which all ranks ask for alike, there is no update and the norm
        returned is infinite.
        """
        self._discards = discard
        for group in self._zero.param_groups:
            group["lr"] = lr
        if self._flat is not None:
            return self._step_at_once()
        self._engine.step()
        norm = float(self._engine.get_global_grad_norm())
        if self._is_stage_3 and norm == float("inf") and (persistent := self._zero.persistent_parameters):
            persistent[0].all_gather(persistent)  # as after an update; DeepSpeed forgets it when it makes none
        return norm

    def _step_at_once(self) -> float:
        """The host learns the norm while the device updates."""
        norm = torch.as_tensor(self._zero.scaled_global_norm(), device=self._device)
        norm = torch.where(norm >= 0.0, norm, float("inf"))
        found = self._fetch(norm)
        update_at_once(self._zero, norm)
        return float(found.values())

    def sources_not_finite(self) -> list[int]:
        """Global ranks of the data group whose gradients of the step just refused were not finite; empty where that
        cannot be told: under ZeRO 2 and 3 and offload, which keep sums only. Collective."""
        return [] if self._flat is None else self._flat.sources_not_finite()

    def _norms_or_invalid(self, norms: Callable[[], Any]) -> Any:
        """What DeepSpeed takes for the gradient norm, or norms: -1 is how it marks one that is not finite."""
        found = norms()
        if not self._discards:
            return found
        return [torch.full_like(norm, -1.0) for norm in found] if self._is_stage_3 else -1.0

    def close(self) -> None:
        """Take DeepSpeed's hooks off the parameters; no step can follow."""
        self._engine.destroy()

    def local_slices(self) -> Iterator[LocalSlice]:
        """The slices of all parameters that this rank owns; views, so writing to them changes the optimizer."""
        return (part for part, _ in self._slices_with_weights())

    def prepare_load(self, num_updates: int) -> None:
        """Make moments of `num_updates` updates to be filled through `local_slices`; call `finish_load` afterwards."""
        self._seed_state(num_updates)

    def finish_load(self) -> None:
        """Carry freshly written fp32 slices into the weights that the model computes with."""
        if not self._is_stage_3:
            self._zero.update_lp_params()
            return
        for group in range(len(self._zero.fp32_partitioned_groups_flat)):
            self._zero._reassign_or_swap_out_partitioned_parameters(group)
        if persistent := self._zero.persistent_parameters:
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)

    def check_slices(self) -> None:
        """Assert that each fp32 slice equals the weights at the place it claims.

        DeepSpeed's own map of slices has been wrong under some settings (round_robin_gradients); a checkpoint written
        through a wrong map reloads bit-equal and trains wrong, so this is checked at start and after a load.

        Raises:
            CheckpointError: a slice lies elsewhere.
        """
        for part, weight in self._slices_with_weights():
            flat = weight.ds_tensor.data if self._is_stage_3 else weight.data.flatten()[part.start :]
            if not torch.equal(flat[: part.parameter.numel()].to(part.parameter), part.parameter):
                raise CheckpointError(f"{part.name}: the optimizer's slice at {part.start} is not this weight's slice")

    def _slices_with_weights(self) -> Iterator[tuple[LocalSlice, Any]]:
        read = self._slice_stage_3 if self._is_stage_3 else self._slice_stage_1_2
        for name, parameter in self._parameters.items():
            if (found := read(name, parameter)) is not None:
                yield found, parameter

    def _flat_groups(self) -> list[torch.Tensor]:
        if self._is_stage_3:
            return self._zero.fp32_partitioned_groups_flat
        return self._zero.single_partition_of_fp32_groups

    def _seed_state(self, step: int) -> None:
        """Give AdamW's state its place before the first step, as DeepSpeed does only after it."""
        inner = self._zero.optimizer
        for flat in self._flat_groups():
            inner.state[flat] = {
                "step": torch.tensor(float(step), dtype=torch.float32, device=flat.device),
                **{moment: torch.zeros_like(flat) for moment in MOMENTS},
            }
        if not self._is_stage_3:
            self._zero._hp_optimizer_states_linked = False
            self._zero._lazy_init_hp_params_optimizer_state()

    def _slice_stage_1_2(self, name: str, parameter: Any) -> LocalSlice | None:
        place = parameter._hp_mapping
        if place is None:
            return None
        # Not place.optim_fragment: it is linked for the first parameter group only.
        state = self._zero.optimizer.state[self._flat_groups()[place.param_group_index]]
        address = place.hp_fragment_address
        moments = [state[key].view(-1).narrow(0, address.start, address.numel) for key in MOMENTS]
        start = place.lp_fragment_address.start
        return self._described(name, parameter, parameter.shape, start, place.hp_fragment.data.view(-1), *moments)

    def _slice_stage_3(self, name: str, parameter: Any) -> LocalSlice | None:
        share = parameter.ds_tensor.ds_numel
        start = share * self._zero._get_param_partition_rank(parameter)
        length = max(0, min(share, parameter.ds_numel - start))  # the last shares may be padding
        if length == 0:
            return None
        parts = [
            self._zero._get_fp32_opt_state_partition(parameter, False, key)[0].data.narrow(0, 0, length)
            for key in (None, *MOMENTS)
        ]
        return self._described(name, parameter, parameter.ds_shape, start, *parts)

    def _described(
        self, name: str, parameter: Any, shape: torch.Size, start: int, *tensors: torch.Tensor
    ) -> LocalSlice:
        placement = placement_of(parameter)
        is_copy = placement.is_copy or (placement.shape == tuple(shape) and not self._is_first_tensor_rank)
        weight, exp_avg, exp_avg_sq = tensors
        return LocalSlice(
            global_name(name, parameter), tuple(shape), start, weight, exp_avg, exp_avg_sq, placement, is_copy
        )


def _deepspeed_config(config: Config) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": config.training.micro_batch_size,
        "gradient_accumulation_steps": 1,  # the loss is already divided by the whole batch's masked tokens
        "gradient_clipping": config.optimizer.clip_norm or 0.0,
        "zero_optimization": {
            "stage": config.zero.stage,
            "contiguous_gradients": True,
            "overlap_comm": False,
            "round_robin_gradients": False,
        }
        | ({"offload_optimizer": {"device": "cpu"}} if config.zero.offload else {}),
        # DeepSpeed would switch a surrounding autocast off. No module is named whose gradients may be reduced in bf16.
        "torch_autocast": {
            "enabled": config.training.precision == "bf16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
        "zero_force_ds_cpu_optimizer": False,
        "timers": {"throughput": {"enabled": False}},  # it waits for the device twice a step
        "steps_per_print": 2**62,
    }


class _DataParallelUnit:
    """What DeepSpeed asks of a Megatron-style `mpu`; its data parallel group is data x context."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        self._model_group = parallel_state.get_model_parallel_group()

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._topology.data_group

    def get_data_parallel_world_size(self) -> int:
        return self._topology.data_size

    def get_data_parallel_rank(self) -> int:
        return self._topology.data_rank

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._model_group

    def get_model_parallel_world_size(self) -> int:
        return dist.get_world_size(self._model_group)

    def get_model_parallel_rank(self) -> int:
        return dist.get_rank(self._model_group)

    def get_tensor_model_parallel_rank(self) -> int:
        return parallel_state.get_tensor_model_parallel_rank()
