"""One process of `hydra-scale bench scaling`: python -m hydra_scale.bench.scaling_rank JOB.json RESULT.json"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hydra_scale.bench.instrument import instrument_for, interleave
from hydra_scale.bench.trace import recorded, split_of
from hydra_scale.bench.training import BERT_VOCAB_SIZE, for_documents, numbered_batch, optimizer_steps
from hydra_scale.config_file import load_config
from hydra_scale.data.loader import Batch
from hydra_scale.topology import Topology, joined


def measure(job: dict[str, Any], report: Callable[[dict[str, Any]], None]) -> None:
    """Tell `report` on the main rank: milliseconds of each timed step, the slowest rank's, and what the first step
    gave; then the same with where the time of a step goes."""
    config = load_config(Path(job["config"]), job["settings"])
    with joined(config.parallel) as topology:
        instrument, device = instrument_for(topology.accelerator.device), topology.accelerator.device
        settings = for_documents(config, job["seqlen"], job["documents"], job["micro_batches"] * topology.batch_size)
        profiled = 2 if job["micro_batches"] == 1 else 1  # steps; a trace of many micro batches is long
        vocab_size = config.model.vocab_size or BERT_VOCAB_SIZE
        with optimizer_steps(settings, vocab_size, topology, _batches(job, vocab_size, topology)) as step:
            first = step()
            interleave([step], job["warm_up"] - 1, instrument)
            (times,) = interleave([step], job["steps"], instrument)
            slowest = torch.tensor([*times, float(instrument.peak() or 0)], dtype=torch.float64, device=device)
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            *milliseconds, peak = slowest.tolist()
            found = {
                "d_model": config.model.d_model,
                "tokens": settings.training.global_batch_size * job["seqlen"],
                "milliseconds": milliseconds,
                "peak_gib": peak / 2**30 or None,
                "loss": first.loss,
                "grad_norm": first.grad_norm,
                "split": None,
            }
            if not topology.is_main:
                interleave([step], profiled, instrument)
                return
            report(found)
            found["split"] = asdict(split_of(*recorded(step, profiled, device, instrument), device))
            report(found)


def _batches(job: dict[str, Any], vocab_size: int, topology: Topology) -> list[Batch]:
    """This rank's micro batches of one global batch, which is the same in any layout."""
    count, documents = job["micro_batches"], job["documents"]
    first = topology.batch_rank * count
    return [numbered_batch(vocab_size, (first + n) * documents, documents, job["seqlen"]) for n in range(count)]


def main() -> None:
    """Read the job, measure, write the result, whole each time."""
    job, result = (Path(argument) for argument in sys.argv[1:])

    def report(found: dict[str, Any]) -> None:
        aside = result.with_suffix(".aside")
        aside.write_text(json.dumps(found))
        aside.replace(result)

    measure(json.loads(job.read_text()), report)


if __name__ == "__main__":
    main()
