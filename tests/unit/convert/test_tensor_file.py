"""Files of tensors from outside: whole they are read, damaged they are refused by name, and never anything else."""

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hydra_scale.convert.tensor_file import read_tensors, write_tensors
from hydra_scale.errors import CheckpointError

TENSORS = {"model.a.weight": torch.arange(12.0).view(3, 4), "model.b": torch.ones(5, dtype=torch.bfloat16)}


def written(folder: Path, kind: str) -> bytes:
    path = folder / f"whole.{kind}"
    if kind == "safetensors":
        save_file(TENSORS, path)
    else:
        torch.save({"state": {"model": TENSORS, "step": 7}}, path)
    return path.read_bytes()


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_damaged(tmp_path: Path, kind: str, damage: str) -> None:
    """300 files: each gives tensors, or the named error on one line."""
    content, draw, path = written(tmp_path, kind), random.Random(3), tmp_path / f"damaged.{kind}"
    refused = 0
    for _ in range(300):
        place = draw.randrange(len(content))
        flipped = bytes([content[place] ^ (1 << draw.randrange(8))])
        path.write_bytes(content[:place] + (b"" if damage == "cut" else flipped + content[place + 1 :]))
        try:
            found, _ = read_tensors(path)
        except CheckpointError as error:
            assert str(error).startswith(f"{path}: ")
            assert "\n" not in str(error)
            refused += 1
        else:
            assert all(isinstance(tensor, torch.Tensor) for tensor in found.values())
    assert refused == 300 if damage == "cut" else refused > 30


def test_a_full_disk_is_an_error_of_the_disk(tmp_path: Path) -> None:
    """Which `convert` names with the place it wrote to; /dev/full takes nothing."""
    path = tmp_path / "full.pt"
    path.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        write_tensors(path, {"weight": torch.zeros(1_000_000)})
