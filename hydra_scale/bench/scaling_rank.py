"""One process of `hydra-scale bench scaling`: python -m hydra_scale.bench.scaling_rank JOB.json RESULT.json"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hydra_scale.bench.instrument import instrument_for, interleave
from hydra_scale.bench.scaling import NUM_WARM_UP
from hydra_scale.bench.training import BERT_VOCAB_SIZE, for_batch, optimizer_steps, random_batch
from hydra_scale.config_file import load_config
from hydra_scale.topology import joined

_MICRO_BATCHES_A_STAGE = 4
"""Of a pipeline: at two stages a ninth of a step is its bubble, (p - 1) / (m + p - 1)."""


def measure(job: dict[str, Any]) -> dict[str, Any] | None:
    """Milliseconds of each timed step, the slowest rank's, and what the first step gave; on the main rank only."""
    config = load_config(Path(job["config"]), job["overrides"])
    with joined(config.parallel) as topology:
        instrument, device = instrument_for(topology.accelerator.device), topology.accelerator.device
        ranks, stages = topology.world_size // topology.batch_size, topology.stage.size
        num_batches = 1 if stages == 1 else _MICRO_BATCHES_A_STAGE * stages
        tokens = job["tokens"] * ranks // num_batches  # of a micro batch, which those ranks share
        seqlen = min(job["seqlen"] or tokens, tokens)
        vocab_size = config.model.vocab_size or BERT_VOCAB_SIZE
        batch = random_batch(vocab_size, tokens // seqlen, seqlen, seed=topology.batch_rank)
        settings, batches = for_batch(config, batch, topology.batch_size * num_batches), [batch] * num_batches
        with optimizer_steps(settings, vocab_size, topology, batches) as step:
            first = step()
            interleave([step], NUM_WARM_UP - 1, instrument)
            (times,) = interleave([step], job["num_steps"], instrument)
        slowest = torch.tensor([*times, float(instrument.peak() or 0)], dtype=torch.float64, device=device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        if not topology.is_main:
            return None
    *milliseconds, peak = slowest.tolist()
    return {
        "d_model": config.model.d_model,
        "seqlen": seqlen,
        "tokens": (tokens // seqlen) * seqlen * num_batches * topology.batch_size,
        "milliseconds": milliseconds,
        "peak_gib": peak / 2**30 or None,
        "loss": first.loss,
        "grad_norm": first.grad_norm,
    }


def main() -> None:
    """Read the job, measure, write the result."""
    job, result = (Path(argument) for argument in sys.argv[1:])
    found = measure(json.loads(job.read_text()))
    if found is not None:
        result.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
