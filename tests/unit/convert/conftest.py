"""Runs and their Hugging Face folders, made once for all tests of conversion."""

from pathlib import Path

import pytest
from ranks import run_ranks
from runs import train
from sources import HYBRID, prepared

from hydra_scale.convert.convert import convert


@pytest.fixture(scope="session")
def data(prose: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(prose, tmp_path_factory.mktemp("pieces") / "data", vocab_size=400)


@pytest.fixture(scope="session")
def hydra(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `run` and `model`, its Hugging Face folder; Hydra layers only."""
    return _trained(tmp_path_factory.mktemp("hydra"), data, [])


@pytest.fixture(scope="session")
def hybrid(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Likewise with every kind of layer, the other norms, positions and initial states."""
    return _trained(tmp_path_factory.mktemp("hybrid"), data, HYBRID)


def _trained(folder: Path, data: Path, overrides: list[str]) -> Path:
    run_ranks(1, train, folder / "run", [f"data.train={data}", *overrides])
    assert convert("run", "huggingface", folder / "run", folder / "model") < 1e-5
    return folder
