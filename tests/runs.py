"""Training runs for tests: what a rank executes, and what it left in its run folder."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from hydra_scale.config_file import load_config
from hydra_scale.errors import NumericsFault
from hydra_scale.run_folder import RunFolder

NOTES = {"stopped", "slow_rank", "skipped", "transient", "skipped_batches"}
"""Keys of lines of metrics.jsonl that tell what happened, and are no row of a step or an evaluation."""
TINY = Path(__file__).parents[1] / "configs" / "tiny.yaml"


def train(run_dir: Path, overrides: list[str]) -> None:
    """`hydra-scale pretrain --config configs/tiny.yaml`, inside a rank."""
    from hydra_scale.training.pretrain import pretrain

    pretrain(load_config(TINY, overrides), run_dir)


def fault_of(run_dir: Path, overrides: list[str]) -> str:
    """`train`; returns the fault in the numbers that ends it, empty if none does."""
    try:
        train(run_dir, overrides)
    except NumericsFault as error:
        return str(error)
    return ""


def before_call(function: Callable[..., Any], count: int, action: Callable[[], Any]) -> Callable[..., Any]:
    """`function`, which does `action` first when it is called for the `count`-th time."""
    calls = 0

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            action()
        return function(*args, **kwargs)

    return wrapper


def rows(run_dir: Path, key: str) -> list[float]:
    """One number a step (or evaluation) from metrics.jsonl, without the notes."""
    return [line[key] for line in metrics(run_dir) if key in line and not NOTES & line.keys()]


def notes(run_dir: Path, key: str) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that are notes of that kind."""
    return [line for line in metrics(run_dir) if key in line]


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def ledger(run_dir: Path) -> list[dict[str, Any]]:
    """The ledger's rows."""
    return [json.loads(line) for line in (run_dir / "ledger.jsonl").read_text().splitlines()]


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    """Parameters of the newest checkpoint."""
    return RunFolder(run_dir).newest_parameters()


def same_state(run_dir: Path, step: int, other: int) -> bool:
    """Whether two checkpoints of a run hold the same parameters and moments, bit for bit."""
    first, second = _state(run_dir, step), _state(run_dir, other)
    assert first and first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


def _state(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(RunFolder(run_dir).checkpoints.at(step).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {f"{path.name} {name}": file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def assert_same_run(run: Path, undisturbed: Path) -> None:
    """Bit-equal metrics, order of documents and weights; every step once."""
    for key in ("step", "tokens", "loss", "grad_norm", "lr", "masked_accuracy", "eval/loss", "eval/masked_accuracy"):
        assert rows(run, key) == rows(undisturbed, key), key
    assert ledger(run) == ledger(undisturbed)
    assert [row["step"] for row in ledger(run)] == list(range(1, len(ledger(run)) + 1))
    found, expected = weights(run), weights(undisturbed)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
