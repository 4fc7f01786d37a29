"""Training runs for tests: what a rank executes, and what it left in its run folder."""

import json
from pathlib import Path
from typing import Any

import torch

from hydra_scale.config_file import load_config
from hydra_scale.run_folder import RunFolder

TINY = Path(__file__).parents[1] / "configs" / "tiny.yaml"


def train(run_dir: Path, overrides: list[str]) -> None:
    """`hydra-scale pretrain --config configs/tiny.yaml`, inside a rank."""
    from hydra_scale.training.pretrain import pretrain

    pretrain(load_config(TINY, overrides), run_dir)


def rows(run_dir: Path, key: str) -> list[float]:
    """One number a step (or evaluation) from metrics.jsonl, without notes of stops, slow ranks and skipped steps."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [line[key] for line in lines if key in line and not {"stopped", "slow_rank", "skipped"} & line.keys()]


def ledger(run_dir: Path) -> list[dict[str, Any]]:
    """The ledger's rows."""
    return [json.loads(line) for line in (run_dir / "ledger.jsonl").read_text().splitlines()]


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    """Parameters of the newest checkpoint."""
    return RunFolder(run_dir).newest_parameters()


def assert_same_run(run: Path, undisturbed: Path) -> None:
    """Bit-equal metrics, order of documents and weights; every step once."""
    for key in ("step", "tokens", "loss", "grad_norm", "lr", "masked_accuracy", "eval/loss", "eval/masked_accuracy"):
        assert rows(run, key) == rows(undisturbed, key), key
    assert ledger(run) == ledger(undisturbed)
    assert [row["step"] for row in ledger(run)] == list(range(1, len(ledger(run)) + 1))
    found, expected = weights(run), weights(undisturbed)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
