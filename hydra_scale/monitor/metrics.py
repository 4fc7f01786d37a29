"""The names of all metrics, in one place: as keys of metrics.jsonl and as TensorBoard tags."""

from dataclasses import dataclass
from typing import Any, NamedTuple

TENSORBOARD_TAGS = {
    "loss": "train/loss",
    "masked_accuracy": "train/masked_accuracy",
    "grad_norm": "train/grad_norm",
    "lr": "optim/lr",
    "tokens": "progress/tokens",
    "tokens_per_sec": "throughput/tokens_per_sec",
    "data_wait": "throughput/data_wait_seconds",
    "peak_memory_gib": "memory/peak_gib",
    "eval/loss": "eval/loss",
    "eval/masked_accuracy": "eval/masked_accuracy",
    "eval/unigram_loss": "eval/unigram_loss",
    "eval/unigram_accuracy": "eval/unigram_accuracy",
}
"""Key of metrics.jsonl to TensorBoard tag; the x-axis of all is the step."""


class LedgerEntry(NamedTuple):
    """What a step trains on."""

    batch: int
    """Its number, counted from 1."""
    num_skipped: int
    """Batches left out between the step before and this one."""
    documents: str
    """Hash of the batch's document ids."""


@dataclass(frozen=True)
class StepResult:
    """What a step did, over all ranks."""

    loss: float
    """Mean over the masked tokens of the global batch, before the update."""
    masked_accuracy: float
    grad_norm: float
    """Global norm before clipping."""
    num_tokens: int
    num_masked: int


@dataclass(frozen=True)
class MaskedLmScore:
    """Means over the masked tokens of the held-out sequences, natural logarithms."""

    loss: float
    masked_accuracy: float
    unigram_loss: float
    """Loss of predicting each token with its frequency in the training split."""
    unigram_accuracy: float
    """Accuracy of always predicting the most frequent token of the training split."""
    num_masked: int


def step_row(
    step: int, tokens: int, lr: float, result: StepResult, seconds: float, data_wait: float, peak_bytes: int
) -> dict[str, Any]:
    """The row of one training step. tokens: trained on so far; tokens_per_sec: of this step, over all ranks;
    data_wait: seconds of the step in which the main rank waited for its batch."""
    return {
        "step": step,
        "tokens": tokens,
        "loss": result.loss,
        "masked_accuracy": result.masked_accuracy,
        "grad_norm": result.grad_norm,
        "lr": lr,
        "tokens_per_sec": result.num_tokens / seconds,
        "data_wait": data_wait,
        "peak_memory_gib": peak_bytes / 2**30,
    }


def evaluation_row(step: int, score: MaskedLmScore) -> dict[str, Any]:
    """The row of one evaluation."""
    return {
        "step": step,
        "eval/loss": score.loss,
        "eval/masked_accuracy": score.masked_accuracy,
        "eval/unigram_loss": score.unigram_loss,
        "eval/unigram_accuracy": score.unigram_accuracy,
    }
