"""Broken shards at the start of a run: by setting it leaves them out, alike on all ranks and in every start."""

import json
import shutil
from pathlib import Path

import pytest
from ranks import run_ranks
from runs import assert_same_run, ledger, rows, train

from hydra_data_prep.assemble import join, without_broken
from hydra_data_prep.parts import part_of, parts_in, prepare_part
from hydra_data_prep.prepare import PrepareOptions
from hydra_scale.config import DataConfig
from hydra_scale.data.loader import TrainingData
from hydra_scale.errors import CheckpointError, DataError
from hydra_scale.run_folder import RunFolder
from hydra_scale.training.quarantine import quarantine

STEPS = ["training.steps=8", "checkpoint.every=4", "evaluation.every=4", "checkpoint.keep=9"]


@pytest.fixture
def damaged(prose: Path, tmp_path: Path) -> Path:
    """Of six shards one altered, one cut, one missing."""
    parts, folder = tmp_path / "parts", tmp_path / "damaged"
    options = PrepareOptions(source="text", input=(prose,), output=parts, tokenizer="bytes", eval_fraction=0.1)
    for task in range(6):
        prepare_part(part_of(options, task, 6))
    join(parts_in(parts), folder)
    altered, cut, missing = (folder / "train" / f"shard-{number:06d}.tar" for number in (1, 3, 4))
    content = bytearray(altered.read_bytes())
    content[len(content) // 2] ^= 1
    altered.write_bytes(content)
    cut.write_bytes(cut.read_bytes()[:-700])
    missing.unlink()
    return folder


def test_a_run_without_its_broken_shards(damaged: Path, tmp_path: Path) -> None:
    """Batches, losses and evaluations are those of a folder that never had them; so they are after a restart, though
    the shards have been repaired."""
    healed = tmp_path / "healed"
    without_broken(damaged, healed)
    run_ranks(1, train, tmp_path / "healed run", [f"data.train={healed}", *STEPS])
    settings = [f"data.train={damaged}", "data.quarantine=true", *STEPS]
    for num_ranks in (1, 2):
        run_ranks(num_ranks, train, tmp_path / f"{num_ranks}", settings)
        assert ledger(tmp_path / f"{num_ranks}") == ledger(tmp_path / "healed run")
        for key in ("loss", "grad_norm", "eval/loss"):
            expected = rows(tmp_path / "healed run", key)
            assert rows(tmp_path / f"{num_ranks}", key) == pytest.approx(expected, rel=1e-5), key
    record = json.loads((tmp_path / "1" / "quarantine.json").read_text())["shards"][str(damaged)]
    assert [*record] == [f"shard-{number:06d}.tar" for number in (1, 3, 4)]
    for fault, what in zip(record.values(), ("sha256 is ", " bytes, the manifest says ", "missing; "), strict=True):
        assert what in fault
    assert "broken shard 3 of 3 is left out" in (tmp_path / "1" / "train.log").read_text()

    run = RunFolder(tmp_path / "1")
    shutil.copytree(run.path, tmp_path / "whole")
    shutil.rmtree(run.checkpoints.at(8))
    (run.path / "done").unlink()
    (damaged / "train" / "shard-000004.tar").write_bytes((damaged / "train" / "shard-000000.tar").read_bytes())
    run_ranks(1, train, run.path, settings)
    assert_same_run(run.path, tmp_path / "whole")


def test_without_the_setting_a_broken_shard_ends_the_run(damaged: Path, tmp_path: Path) -> None:
    config = DataConfig(train=str(damaged))
    assert not quarantine(config, RunFolder(tmp_path / "run")).shards
    with pytest.raises(DataError, match=r"shard-000004.tar: missing, as 1 of \d+ shards; copy the folder again"):
        TrainingData(config, 0)


def test_refused(damaged: Path, tmp_path: Path) -> None:
    config, run = DataConfig(train=str(damaged), quarantine=True), RunFolder(tmp_path)
    run.quarantine_file.write_text("{}")
    with pytest.raises(CheckpointError, match=r"quarantine.json: not a record of broken shards: .* restore it, or"):
        quarantine(config, run)
    run.quarantine_file.unlink()
    for shard in (damaged / "train").glob("shard-*.tar"):
        shard.write_bytes(b"")
    with pytest.raises(DataError, match=r"train: none of its \d+ shards is whole; .*shard-000000.tar: "):
        quarantine(config, run)
