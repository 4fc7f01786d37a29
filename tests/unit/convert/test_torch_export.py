"""Exported programs take any number of rows of any length, and give the public outputs on padded rows."""

import shutil
from pathlib import Path

import pytest
import torch
from alone import job_of_one
from runs import weights
from safetensors.torch import load_file, save_file
from sources import MIXERS, PUBLIC, constructor_arguments, state_dict, state_file

from hydra_scale.convert import convert as rooms
from hydra_scale.convert.bare_mixer import read_mixer
from hydra_scale.convert.convert import convert
from hydra_scale.convert.package import Probe
from hydra_scale.convert.padded import PaddedMixer
from hydra_scale.convert.run import read_run
from hydra_scale.errors import CheckpointError


def padded(rows: list[torch.Tensor], left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows as one batch whose padding is not zeros, and its mask."""
    seqlen = max(map(len, rows))
    batch = torch.full((len(rows), seqlen, *rows[0].shape[1:]), 7, dtype=rows[0].dtype)
    mask = torch.zeros(len(rows), seqlen, dtype=torch.int64)
    for index, row in enumerate(rows):
        place = slice(seqlen - len(row), None) if left else slice(len(row))
        batch[index, place], mask[index, place] = row, 1
    return batch, mask


@pytest.mark.parametrize("golden", MIXERS, ids=lambda path: path.stem)
def test_the_padded_mixer_gives_the_public_outputs(golden: Path, tmp_path: Path) -> None:
    """Whole rows against the golden file; a row cut short against `HydraMixer` alone, padded on either side."""
    arguments, values = constructor_arguments(golden), load_file(golden)
    settings = [f"model.mixer.{name}={arguments[name]}" for name in ("ngroups", "dt_limit") if name in arguments]
    package = read_mixer(state_file(golden, tmp_path), settings)
    mixer = PaddedMixer(package.d_model, **package.mixer.model_dump(exclude={"backend"}), dtype=torch.float64)
    mixer.load_state_dict(package.parameters)
    whole = values["input"]
    y = mixer(whole, torch.ones(whole.shape[:2], dtype=torch.int64))
    assert (y - values["output"]).norm() < 1e-10 * values["output"].norm()
    rows = [whole[0], whole[-1, : len(whole[0]) // 2 + 1]]
    for left in (False, True):
        batch, mask = padded(rows, left)
        y = mixer(batch, mask)
        for index, row in enumerate(rows):
            expected = package.run(Probe(row[None], (len(row),)), "vectors")[0]
            torch.testing.assert_close(y[index][mask[index].bool()], expected, rtol=1e-10, atol=1e-10)
        assert (y[mask == 0] == 0).all()


def test_an_exported_mixer_and_one_that_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, exported = state_file(MIXERS[0], tmp_path), tmp_path / "mixer.pt2"
    assert convert("mixer", "torch-export", source, exported) < 1e-12
    values = load_file(MIXERS[0])
    y = torch.export.load(exported).module()(values["input"], torch.ones(values["input"].shape[:2], dtype=torch.int64))
    assert (y - values["output"]).norm() < 1e-10 * values["output"].norm()

    state = state_dict(MIXERS[0])
    save_file(state | {"D": state["D"] * (1 + 1e-6)}, tmp_path / "other.safetensors")
    monkeypatch.setattr(rooms, "write_exported", lambda package, path: shutil.copy(exported, path))
    with pytest.raises(CheckpointError, match=r"its outputs differ from the source's by \d.*; not published"):
        convert("mixer", "torch-export", tmp_path / "other.safetensors", tmp_path / "other.pt2")
    assert {entry.name for entry in tmp_path.glob("*.pt2")} == {exported.name}


@pytest.mark.parametrize("golden", PUBLIC[:1], ids=lambda path: path.stem)
def test_an_exported_encoder_gives_the_public_logits(golden: Path, tmp_path: Path) -> None:
    """Its vectors through the public head, in float64, at the golden file's own shape."""
    assert convert("public-hydra", "torch-export", state_file(golden, tmp_path), tmp_path / "encoder.pt2") < 1e-12
    program = torch.export.load(tmp_path / "encoder.pt2").module()
    values, public = load_file(golden), state_dict(golden)
    ids = values["input_ids"]
    x = program(ids, torch.ones_like(ids))
    head, functional = "cls.predictions.", torch.nn.functional
    x = functional.gelu(functional.linear(x, *(public[f"{head}transform.dense.{leaf}"] for leaf in ("weight", "bias"))))
    norm = [public[f"{head}transform.LayerNorm.{leaf}"] for leaf in ("weight", "bias")]
    logits = functional.linear(functional.layer_norm(x, x.shape[-1:], *norm, 1e-12), public[f"{head}decoder.weight"])
    logits = logits + public[f"{head}decoder.bias"]
    assert (logits - values["logits"]).norm() < 1e-10 * values["logits"].norm()


def test_a_hybrid_at_many_shapes(hybrid: Path, tmp_path: Path) -> None:
    """Attention, MLP, positions and initial states; one row and several, shorter and longer than when exported."""
    convert("run", "torch-export", hybrid / "run", tmp_path / "encoder.pt2")
    program = torch.export.load(tmp_path / "encoder.pt2").module()
    with job_of_one():
        package = read_run(hybrid / "run")
        assert package.parameters.keys() == weights(hybrid / "run").keys()
        for lengths in ((1,), (63,), (64, 2), (65, 64, 1), (130, 129), (400,)):
            rows = [torch.randint(5, 400, (length,)) for length in lengths]
            expected = [package.run(Probe(row[None], (len(row),)), "vectors")[0] for row in rows]
            for left in (False, True):
                batch, mask = padded(rows, left)
                found = program(batch, mask)
                for index, vectors in enumerate(expected):
                    torch.testing.assert_close(found[index][mask[index].bool()], vectors, rtol=1e-4, atol=1e-4)
