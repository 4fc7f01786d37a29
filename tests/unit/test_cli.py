"""The command line: help is complete, mistakes are one line on standard error with their exit code, never a trace."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import run

TINY = str(Path(__file__).parents[2] / "configs" / "tiny.yaml")


def run_fresh(*arguments: object) -> subprocess.CompletedProcess[str]:
    """As people start it; `run` saves the imports."""
    command = [sys.executable, "-m", "hydra_scale.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def error(result: subprocess.CompletedProcess[str], code: int) -> str:
    """The error line; warnings and progress of libraries may stand before it."""
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("hydra-scale: error: ")]
    assert len(lines) == 1 and result.stderr.splitlines()[-1] == lines[0]
    return lines[0]


def pretrain(run_dir: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return run("pretrain", "--config", TINY, "--run-dir", run_dir, *overrides)


def test_help_names_every_command_and_option() -> None:
    overview = run_fresh("--help").stdout
    for command in (
        "prepare",
        "verify",
        "pretrain",
        "plan",
        "evaluate",
        "convert",
        "fill-mask",
        "doctor",
        "bench",
        "launch",
    ):
        assert command in overview
        help_text = run(command, "--help")
        assert help_text.returncode == 0 and "Usage" in help_text.stdout


def test_text_to_filled_mask_by_the_commands_of_the_readme(prose: Path, tmp_path: Path) -> None:
    data, folder, model = tmp_path / "data", tmp_path / "run", tmp_path / "model"
    prepared = run_fresh("prepare", "--source", "text", "--input", prose, "--output", data, "--vocab-size", 300)
    assert prepared.returncode == 0, prepared.stderr
    assert "documents" in prepared.stdout
    assert run("verify", data).returncode == 0
    settings = [f"data.train={data}", f"data.cache={tmp_path / 'cache'}", "training.steps=6"]
    trained = run_fresh("pretrain", "--config", TINY, "--run-dir", folder, *settings)
    assert trained.returncode == 0, trained.stderr
    assert {"config.yaml", "metrics.jsonl", "ledger.jsonl", "train.log", "tensorboard", "checkpoints"} <= {
        entry.name for entry in folder.iterdir()
    }
    evaluated = run_fresh("evaluate", "--run-dir", folder, "--data", data, "--sequences", 8)
    assert "unigram baseline" in evaluated.stdout, evaluated.stderr
    last = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][-1]
    converted = run_fresh("convert", "--from", "run", "--to", "huggingface", folder, model)
    assert "outputs differ from the source by" in converted.stdout, converted.stderr
    assert "[MASK]" in run_fresh("fill-mask", model, "so [MASK] it").stdout
    whole = run("evaluate", "--run-dir", folder, "--data", data)
    assert f"{last['eval/loss']:.4f}" in whole.stdout  # what training logged is what evaluation finds
    assert run("evaluate", "--run-dir", folder, "--data", f"file://{data}").stdout == whole.stdout


def test_bad_settings(tmp_path: Path, corpus: Path) -> None:
    assert "unknown key training.stepz; did you mean training.steps" in error(
        pretrain(tmp_path / "r", "training.stepz=1"), 2
    )
    assert "optimizer.lr: found 'fast'" in error(pretrain(tmp_path / "r", "optimizer.lr=fast"), 2)
    message = error(pretrain(tmp_path / "r", f"data.train={corpus}", "training.global_batch_size=6"), 2)
    assert "not divisible by micro_batch_size 4 x 1 data parallel ranks = 4; nearest: 4 or 8" in message
    assert "--model-type: found 'wordpiece'" in error(
        run("prepare", "--source", "text", "--output", tmp_path / "o", "--model-type", "wordpiece"), 2
    )
    assert not (tmp_path / "r").exists()


def test_a_time_to_stop_at_that_is_none(tmp_path: Path) -> None:
    message = error(run("pretrain", "--config", TINY, "--run-dir", tmp_path / "r", "--stop-at", "tomorrow"), 2)
    assert "--stop-at: found 'tomorrow', expected seconds since 1970 or an ISO 8601 time" in message


def test_bad_data(tmp_path: Path, corpus: Path) -> None:
    assert "nowhere/manifest.json: no such file" in error(pretrain(tmp_path / "r", f"data.train={tmp_path}/nowhere"), 3)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert str(empty) in error(run("prepare", "--source", "text", "--input", empty, "--output", tmp_path / "o"), 3)
    cut = tmp_path / "cut"
    shutil.copytree(corpus, cut)
    shard = cut / "train" / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    assert "shard-000000.tar" in error(pretrain(tmp_path / "r", f"data.train={cut}"), 3)
    assert not (tmp_path / "r").exists()


def test_a_damaged_shard_is_found_when_it_is_read(tmp_path: Path, corpus: Path) -> None:
    flipped = tmp_path / "flipped"
    shutil.copytree(corpus, flipped)
    shard = flipped / "train" / "shard-000000.tar"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    message = error(pretrain(tmp_path / "r", f"data.train={flipped}"), 3)
    assert "shard-000000.tar" in message and "sha256" in message


def test_data_of_another_tokenizer(tmp_path: Path, corpus: Path, prose: Path) -> None:
    other = tmp_path / "other"
    run(
        "prepare",
        "--source",
        "text",
        "--input",
        prose,
        "--output",
        other,
        "--tokenizer",
        "nucleotides",
        "--eval-fraction",
        0.1,
    )
    message = error(pretrain(tmp_path / "r", f"data.train={corpus}", f"data.eval={other}"), 3)
    assert "nucleotides" in message and "bytes" in message
    assert not (tmp_path / "r").exists()


def test_folders_of_other_runs(tmp_path: Path, corpus: Path) -> None:
    folder, settings = tmp_path / "run", [f"data.train={corpus}", "training.steps=5"]
    assert pretrain(folder, *settings).returncode == 0
    before = (folder / "metrics.jsonl").read_text()
    message = error(pretrain(folder, *settings, "model.d_model=32", "training.seed=9"), 4)
    assert "holds another run: model.d_model is 64 there and 32 here, training.seed is 1 there and 9 here;" in message
    assert "checkpoint.resume is never" in error(pretrain(folder, *settings, "checkpoint.resume=never"), 4)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    assert "holds thesis.tex but no config.yaml" in error(pretrain(tmp_path / "full", *settings), 4)
    assert "no config.yaml" in error(run("evaluate", "--run-dir", tmp_path / "full", "--data", corpus), 4)
    for manifest in folder.glob("checkpoints/*/manifest.json"):
        manifest.unlink()
    assert "1 checkpoints and none is whole" in error(pretrain(folder, *settings, "training.steps=6"), 4)
    assert (folder / "metrics.jsonl").read_text() == before


def test_data_that_changed_under_a_run(tmp_path: Path, corpus: Path, prose: Path) -> None:
    folder = tmp_path / "run"
    assert pretrain(folder, f"data.train={corpus}", "training.steps=5").returncode == 0
    other = tmp_path / "other"
    run(
        "prepare",
        "--source",
        "text",
        "--input",
        prose,
        "--output",
        other,
        "--tokenizer",
        "bytes",
        "--eval-fraction",
        0.2,
    )
    before = {
        path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.parent != folder / "watch"
    }
    message = error(pretrain(folder, f"data.train={other}", "training.steps=10"), 4)
    assert "was trained on data with fingerprint" in message and "or set data.accept_change=true to go on" in message
    assert all(
        path.read_bytes() == content for path, content in before.items()
    )  # a start that is refused changes nothing


def test_srun_without_rendezvous_is_refused(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert "SLURM_NTASKS is 2 but RANK is not set" in error(pretrain(tmp_path / "r", f"data.train={corpus}"), 6)


def test_doctor_finds_this_machine_sound() -> None:
    result = run("doctor")
    assert result.returncode == 0, result.stdout
    assert "mixer in torch.float32: relative difference" in result.stdout and "WRONG" not in result.stdout
