"""Masked language modelling on held-out documents, beside what word frequencies alone would reach."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn

from hydra_scale.config import Config
from hydra_scale.data.loader import Batch, EvaluationData
from hydra_scale.model.masked_lm import LossSums
from hydra_scale.monitor.metrics import MaskedLmScore
from hydra_scale.topology import Topology


@torch.no_grad()
def evaluate(
    model: Callable[[Batch], LossSums], data: EvaluationData, config: Config, topology: Topology
) -> MaskedLmScore:
    """Score `model` on the first `evaluation.sequences` sequences; masks are the same in every evaluation.

    All ranks call it: each computes its share, with the same number of forward passes.
    """
    accelerator = topology.accelerator
    unigram = data.unigram
    log_probability = torch.from_numpy(unigram.log_probabilities)
    sums = torch.zeros(5, dtype=torch.float64)
    was_training = _set_training(model, False)
    for batch, counted in data.batches(
        config.evaluation.sequences, config.training.micro_batch_size, topology.batch_rank, topology.batch_size
    ):
        batch = batch.on(topology)
        with accelerator.autocast(config.training.precision):
            loss, num_correct = model(batch)
        if counted:
            targets = batch.targets.cpu()
            unigram_loss = -log_probability[targets].double().sum()
            unigram_correct = (targets == unigram.most_frequent).sum()
            values = (loss, num_correct, unigram_loss, unigram_correct, targets.numel())
            sums += torch.tensor([float(value) for value in values], dtype=torch.float64)
    _set_training(model, was_training)
    sums = sums.to(accelerator.device)
    dist.all_reduce(sums, group=topology.data_group)
    *totals, num_masked = sums.tolist()
    loss, accuracy, unigram_loss, unigram_accuracy = (total / max(1.0, num_masked) for total in totals)
    return MaskedLmScore(loss, accuracy, unigram_loss, unigram_accuracy, int(num_masked))


def _set_training(model: object, training: bool) -> bool:
    """Switch a module to training or evaluation; returns what it was."""
    if not isinstance(model, nn.Module):
        return False
    was_training = model.training
    model.train(training)
    return was_training
