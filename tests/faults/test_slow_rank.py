"""A rank that computes more slowly than the others is named while the run goes on, with the same results."""

import json
import os
import time
from pathlib import Path
from typing import Any

from figures import Figures
from ranks import run_ranks
from runs import TINY, assert_same_run, train

SETTINGS = ["training.steps=24", "monitor.console_every=4", "watchdog.slow_for=2", "evaluation.every=24"]


def test_a_slow_rank_is_named_once(corpus: Path, tmp_path: Path, figures: Figures) -> None:
    settings = [f"data.train={corpus}", *SETTINGS]
    run_ranks(2, train, tmp_path / "undisturbed", [*settings, "watchdog.slow_rank=0"])
    run_ranks(2, train_slowly, tmp_path / "run", settings)
    assert_same_run(tmp_path / "run", tmp_path / "undisturbed")
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    (slow,) = [line for line in lines if "slow_rank" in line]
    assert (slow["step"], slow["slow_rank"]) == (8, 1) and slow["speed"] < 0.7
    assert "rank 1 on " in (tmp_path / "run" / "train.log").read_text()
    figures(14, f"a rank sleeps 0.2 s a step: named at step {slow['step']}, no false alarm", lost_steps=0)


def test_a_slow_rank_of_a_pipeline_is_named(corpus: Path, tmp_path: Path) -> None:
    """Two stages of two data ranks: the ranks of the second stage sleep all alike, one of the first longer than its
    peer, though less than they do; what stages wait for each other, and evaluations, count for nobody."""
    layout = [f"data.train={corpus}", "parallel.pipeline=2", "training.steps=4", "schedule.warmup_steps=1"]
    settings = [*layout, "monitor.console_every=2", "watchdog.slow_for=2", "evaluation.every=1"]
    run_ranks(4, train_in_stages, tmp_path / "run", settings)
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert [(line["step"], line["slow_rank"]) for line in lines if "slow_rank" in line] == [(4, 1)]


def train_in_stages(run_dir: Path, overrides: list[str]) -> None:
    """Each rank sleeps for its own time in a chunk of its stage, and not at all in evaluations."""
    import torch

    from hydra_scale.config_file import load_config
    from hydra_scale.parallel.pipeline import _Chunk
    from hydra_scale.training import pretrain

    forward, seconds = _Chunk.forward, (0.1, 0.3, 0.5, 0.5)[int(os.environ["RANK"])]

    def slow(self: _Chunk, batch: Any) -> Any:
        time.sleep(seconds if torch.is_grad_enabled() else 0.0)
        return forward(self, batch)

    _Chunk.forward = slow  # type: ignore[method-assign]
    pretrain.pretrain(load_config(TINY, overrides), run_dir)


def train_slowly(run_dir: Path, overrides: list[str]) -> None:
    """Rank 1 sleeps in each forward pass."""
    from hydra_scale.config_file import load_config
    from hydra_scale.training import assembly, pretrain

    build = assembly.build_model

    def build_slow(*args: Any) -> Any:
        model = build(*args)
        forward = model.forward

        def slow(*inputs: Any, **named: Any) -> Any:
            time.sleep(0.2)
            return forward(*inputs, **named)

        model.forward = slow  # type: ignore[method-assign]
        return model

    if os.environ["RANK"] == "1":
        assembly.build_model = build_slow
    pretrain.pretrain(load_config(TINY, overrides), run_dir)
