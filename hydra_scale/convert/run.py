"""A run of this system as a source, with what its folder tells about data, recipe and evaluation."""

import json
from pathlib import Path
from typing import Any

from hydra_scale.checkpoint.load import CheckpointReader
from hydra_scale.checkpoint.manifest import MANIFEST, CheckpointManifest, read_manifest, verify_files
from hydra_scale.config import Config
from hydra_scale.config_file import dump_config
from hydra_scale.convert.package import EncoderPackage
from hydra_scale.data.manifest import read_manifest as read_data_manifest
from hydra_scale.data.tokenizer import Tokenizer
from hydra_scale.errors import DataError
from hydra_scale.run_folder import RunFolder


def read_run(path: Path) -> EncoderPackage:
    """The newest whole checkpoint of a run folder, or the given one if `path` is RUN/checkpoints/step-N.

    Raises:
        CheckpointError, DataError: not a run folder, no whole checkpoint, or its tokenizer was altered.
    """
    path = path.resolve()
    is_checkpoint = path.parent.name == "checkpoints" and (path / MANIFEST).is_file()
    run = RunFolder(path.parents[1] if is_checkpoint else path)
    config = run.load_config()
    checkpoint = path if is_checkpoint else run.newest_checkpoint()
    if is_checkpoint:
        manifest = read_manifest(path)
        manifest.check_whole(path)
        verify_files(path, manifest)
    with CheckpointReader(checkpoint) as reader:
        origin = _origin(run, config, reader.manifest)
        return EncoderPackage(config.model, reader.parameters(), Tokenizer.load(run.tokenizer), origin)


def _origin(run: RunFolder, config: Config, manifest: CheckpointManifest) -> dict[str, Any]:
    return {
        "run": run.path.name,
        "step": manifest.step,
        "tokens": manifest.state["tokens"],
        "data": _data([Path(source.path) for source in config.data.sources], manifest.state["data"]),
        "evaluation": _evaluation(run.metrics_file, manifest.step),
        "config": dump_config(config),
    }


def _data(folders: list[Path], fingerprint: str) -> dict[str, Any]:
    """Name and fingerprint of the training data; its size and source too if the folder still holds the same data."""
    folder = folders[0]
    known: dict[str, Any] = {"folder": ", ".join(path.name for path in folders), "fingerprint": fingerprint}
    try:
        manifest = read_data_manifest(folder)
    except DataError:
        return known
    if "train" not in manifest.splits or manifest.fingerprint("train") != fingerprint:
        return known
    train = manifest.splits["train"]
    return known | {"source": manifest.source.get("source"), "documents": train.documents, "tokens": train.tokens}


def _evaluation(metrics_file: Path, step: int) -> dict[str, float] | None:
    """The last evaluation up to `step`, with its step; None if there was none."""
    if not metrics_file.is_file():
        return None
    rows = [json.loads(line) for line in metrics_file.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    evaluations = [row for row in rows if "eval/loss" in row and row["step"] <= step]
    return evaluations[-1] if evaluations else None
