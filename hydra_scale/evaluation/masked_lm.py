"""Masked language modelling on held-out documents, beside what word frequencies alone would reach."""

from collections.abc import Callable, Iterator

import torch

from hydra_scale.config import Config
from hydra_scale.data.loader import Batch, EvaluationData, on_rank
from hydra_scale.model.masked_lm import LossSums
from hydra_scale.monitor.metrics import MaskedLmScore
from hydra_scale.topology import Topology

_LOT_OF_A_STAGE = 4
"""Micro batches a stage that a pipeline scores at once: of its time less than a fifth is spent waiting."""


@torch.no_grad()
def evaluate(
    score: Callable[[list[Batch]], list[LossSums]], data: EvaluationData, config: Config, topology: Topology
) -> MaskedLmScore:
    """Score a model on the first `evaluation.sequences` sequences; masks are the same in every evaluation.

    All ranks call it: each computes its share, with the same number of forward passes. `score`: the model's sums for
    each micro batch; in a pipeline those of stages before the last are zero.
    """
    device = topology.accelerator.device
    unigram = data.unigram
    log_probability = torch.from_numpy(unigram.log_probabilities)
    sums = torch.zeros(5, dtype=torch.float64)
    for lot in _lots(data, config, topology):
        batches = on_rank([batch for batch, _ in lot], topology)
        for batch, (loss, num_correct), (_, counted) in zip(batches, score(batches), lot, strict=True):
            if counted and topology.stage.is_last:
                targets = batch.targets.cpu()
                unigram_loss = -log_probability[targets].double().sum()
                unigram_correct = (targets == unigram.most_frequent).sum()
                values = (loss, num_correct, unigram_loss, unigram_correct, targets.numel())
                sums += torch.tensor([float(value) for value in values], dtype=torch.float64)
    sums = sums.to(device)
    topology.sum_over_batch(sums)
    *totals, num_masked = sums.tolist()
    loss, accuracy, unigram_loss, unigram_accuracy = (total / max(1.0, num_masked) for total in totals)
    return MaskedLmScore(loss, accuracy, unigram_loss, unigram_accuracy, int(num_masked))


def _lots(data: EvaluationData, config: Config, topology: Topology) -> Iterator[list[tuple[Batch, bool]]]:
    """Micro batches, and whether they count, that are scored at once: one, or as many as fill a pipeline.

    A pipeline's lot is a multiple of its stages, as interleaving asks for; the last may end in some that do not count.
    """
    stages = topology.stage.size
    size = 1 if stages == 1 else _LOT_OF_A_STAGE * stages
    lot: list[tuple[Batch, bool]] = []
    for micro_batch in data.batches(
        config.evaluation.sequences, config.training.micro_batch_size, topology.batch_rank, topology.batch_size
    ):
        lot.append(micro_batch)
        if len(lot) == size:
            yield lot
            lot = []
    if lot:
        yield lot + [(lot[-1][0], False)] * (-len(lot) % stages)
