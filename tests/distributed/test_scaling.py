"""`hydra-scale bench scaling`: a mixed layout takes the step of one process, and the command goes on where it ended."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from commands import run
from ranks import run_ranks
from runs import TINY

from hydra_scale.bench.scaling_plan import Trial, Wanted, trials

SETTINGS = ["data.train=unused", "model.dropout=0.1"]


def found_by_rank(job: dict[str, Any]) -> list[dict[str, Any]]:
    """What a rank reports of a trial."""
    from hydra_scale.bench.scaling_rank import measure

    found: list[dict[str, Any]] = []
    measure(job, lambda values: found.append(json.loads(json.dumps(values))))
    return found


def measured(trial: Trial) -> dict[str, Any]:
    names = ("settings", "seqlen", "documents", "micro_batches", "steps")
    job = {"config": str(TINY), "warm_up": 1, **{name: getattr(trial, name) for name in names}}
    first, *others = run_ranks(trial.processes, found_by_rank, job)
    assert not any(others)
    before, after = first  # without and with the time split
    assert before["split"] is None and before["loss"] == after["loss"]
    return after


def test_a_mixed_layout_takes_the_step_of_one_process() -> None:
    """Loss and gradient norm to 1e-5 in fp32 on the same documents, with dropout; collectives are seen in the split."""
    alone, *mixed = trials(Wanted([TINY], SETTINGS, [4], ["mixed"], [], 32, 32, [], 1))
    (trial,) = (trial for trial in mixed if trial.name == "pipeline 2 x data 2")
    expected, found = measured(alone), measured(trial)
    assert found["tokens"] == expected["tokens"] == 32 * 4
    for number in ("loss", "grad_norm"):
        assert found[number] == pytest.approx(expected[number], rel=1e-5), number
    assert found["split"]["products"] > 0 and found["split"]["collectives"] > 0


def test_the_command_writes_a_page_and_does_not_measure_twice(tmp_path: Path) -> None:
    options = ["--tokens", 64, "--seqlen", 32, "--steps", 2, "--layout", "parallel.context=2", "--output", tmp_path]
    command = ["bench", "scaling", "--config", TINY, *options, "--report", tmp_path / "docs", *SETTINGS]
    done = run(*command)
    assert done.returncode == 0, done.stderr
    alone, context = csv.DictReader((tmp_path / "scaling.csv").open())
    assert alone["status"] == context["status"] == "ok" and context["seqlen"] == "128"
    speeds = [float(row["tokens_per_second"]) for row in (alone, context)]
    assert float(context["efficiency"]) == pytest.approx(speeds[1] / speeds[0] / 2, rel=1e-4)
    assert "| parallel.context=2 | 2 | 128 |" in (tmp_path / "docs" / "scaling.md").read_text()
    kept = (tmp_path / "scaling.jsonl").read_bytes()
    assert run(*command).returncode == 0 and (tmp_path / "scaling.jsonl").read_bytes() == kept
