"""A run folder kept as version 1 of the format was written on 2026-11-24: later versions read it alike.

tests/golden/run_v1 is what `pretrain` left under its config.yaml, on two tensor ranks, without the logs; with it the
logits (fp32) that `read_run(...).run` gave then for the token ids beside them.
"""

from pathlib import Path

import torch
from alone import job_of_one
from figures import Figures
from safetensors.torch import load_file

from hydra_scale.checkpoint.load import CheckpointReader
from hydra_scale.checkpoint.manifest import verify_files
from hydra_scale.convert.package import Probe
from hydra_scale.convert.run import read_run
from hydra_scale.run_folder import RunFolder

KEPT = Path(__file__).parents[2] / "golden" / "run_v1"


def test_logits_of_a_kept_run(figures: Figures) -> None:
    """Those that the version that wrote it gave, fp32."""
    expected = load_file(KEPT / "expected.safetensors")
    with job_of_one(), torch.no_grad():
        rows = read_run(KEPT).run(Probe(expected["input_ids"], tuple(expected["lengths"].tolist())), "logits")
    assert (torch.cat(rows) - expected["logits"]).norm() <= 1e-5 * expected["logits"].norm()
    figures(40, "a run folder of format version 1: its logits within 1e-5")


def test_a_kept_checkpoint_is_whole_and_has_its_moments() -> None:
    folder = RunFolder(KEPT).newest_checkpoint()
    with CheckpointReader(folder) as reader:
        assert reader.manifest.version == 1 and reader.manifest.step == 6
        verify_files(folder, reader.manifest)
        reader.check_moments()
