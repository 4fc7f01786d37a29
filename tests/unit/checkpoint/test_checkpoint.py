"""A checkpoint is whole or refused: round trip, every single kind of damage, and what a crash leaves."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_to_death

from hydra_scale.checkpoint import files
from hydra_scale.checkpoint import save as save_module
from hydra_scale.checkpoint.folder import CheckpointFolder
from hydra_scale.checkpoint.load import CheckpointReader
from hydra_scale.checkpoint.manifest import read_manifest, verify_files
from hydra_scale.errors import CheckpointError
from hydra_scale.parallel.zero import LocalSlice

pytestmark = pytest.mark.usefixtures("alone")
SHAPES = {"layer.weight": (5, 3), "layer.bias": (5,), "conv": (4, 1, 3)}


def tensors(seed: int) -> dict[str, tuple[torch.Tensor, ...]]:
    generator = torch.Generator().manual_seed(seed)
    return {name: tuple(torch.randn(shape, generator=generator) for _ in range(3)) for name, shape in SHAPES.items()}


def slices(values: dict[str, tuple[torch.Tensor, ...]]) -> list[LocalSlice]:
    """Each tensor cut in two uneven flat slices, as two ranks would own them."""
    found = []
    for name, three in values.items():
        cut = three[0].numel() // 3 + 1
        for start, stop in ((0, cut), (cut, three[0].numel())):
            found.append(LocalSlice(name, SHAPES[name], start, *(t.flatten()[start:stop] for t in three)))
    return found


def write(folder: CheckpointFolder, step: int) -> Path:
    save_module.save(folder.at(step), step, slices(tensors(step)), {"tokens": step})
    return folder.at(step)


@pytest.fixture
def folder(tmp_path: Path) -> CheckpointFolder:
    (tmp_path / "checkpoints").mkdir()
    return CheckpointFolder(tmp_path / "checkpoints")


def test_round_trip_through_other_slices(folder: CheckpointFolder) -> None:
    with CheckpointReader(write(folder, 7)) as reader:
        assert (reader.manifest.step, reader.manifest.state) == (7, {"tokens": 7})
        for name, (parameter, exp_avg, _) in tensors(7).items():
            assert torch.equal(reader.parameters()[name], parameter)
            assert torch.equal(reader.tensor(f"exp_avg/{name}"), exp_avg)
            other = LocalSlice(name, SHAPES[name], 1, *(torch.full((3,), torch.nan) for _ in range(3)))
            reader.fill_slices([other])
            assert torch.equal(other.parameter, parameter.flatten()[1:4])
            assert torch.equal(other.exp_avg, exp_avg.flatten()[1:4])


def test_every_flipped_bit_and_every_cut_is_caught(folder: CheckpointFolder) -> None:
    path = write(folder, 1)
    for file in sorted(path.iterdir()):
        content = file.read_bytes()
        for place in range(0, len(content), max(1, len(content) // 97)):
            file.write_bytes(content[:place] + bytes([content[place] ^ (1 << place % 8)]) + content[place + 1 :])
            assert_refused(path)
            file.write_bytes(content[:place])
            assert_refused(path)
        file.unlink()
        assert_refused(path)
        file.write_bytes(content)
    verify_files(path, read_manifest(path))


def assert_refused(path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"step-00000001"):
        verify_files(path, read_manifest(path))


def test_a_damaged_newest_gives_way_to_the_one_before(
    folder: CheckpointFolder, caplog: pytest.LogCaptureFixture
) -> None:
    write(folder, 5)
    damaged = write(folder, 10) / "rank00000.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert folder.newest_whole() == folder.at(5)
    folder.set_aside_after(5)
    assert folder.steps() == [5]
    assert (folder.path / "damaged-step-00000010").is_dir()
    write(folder, 10)
    assert folder.newest_whole() == folder.at(10)


def test_none_whole_is_an_error_and_none_at_all_is_not(folder: CheckpointFolder) -> None:
    assert folder.newest_whole() is None
    (write(folder, 5) / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="1 checkpoints and none is whole"):
        folder.newest_whole()


def test_a_missing_slice_is_not_published(folder: CheckpointFolder) -> None:
    with pytest.raises(CheckpointError, match=r"not published: .*parameter/layer.weight: its pieces hold 9 elements"):
        save_module.save(folder.at(3), 3, slices(tensors(3))[1:], {})
    assert folder.steps() == []


NUM_OPERATIONS = 15  # writes, flushes, renames and deletions of one save and one retention


@pytest.mark.parametrize("count", range(1, NUM_OPERATIONS + 2))
def test_killed_at_any_file_operation_the_old_or_the_new_checkpoint_stands(
    folder: CheckpointFolder, count: int
) -> None:
    write(folder, 1)
    exit_code = run_to_death(save_and_die, folder.path, count)
    newest = folder.newest_whole()
    assert newest in (folder.at(1), folder.at(2))
    assert exit_code == (0 if count > NUM_OPERATIONS else -signal.SIGKILL)
    with CheckpointReader(newest) as reader:
        step = reader.manifest.step
        assert all(torch.equal(reader.parameters()[name], three[0]) for name, three in tensors(step).items())
    folder.clear_unfinished()
    assert {entry.name for entry in folder.path.iterdir()} <= {"step-00000001", "step-00000002"}
    if folder.steps() == [1]:
        assert write(folder, 2).is_dir()


def save_and_die(path: Path, count: int) -> None:
    """Save step 2 and delete step 1, but be killed at the count-th write, flush, rename or deletion."""
    left = count

    def dying(operation: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return operation(*args, **kwargs)

        return wrapper

    for owner, name in (
        (files, "flush"), (save_module, "flush"), (Path, "rename"), (Path, "write_bytes"), (Path, "write_text"),
        (Path, "mkdir"),
        (files.shutil, "rmtree"), (save_module, "save_file"),
    ):  # fmt: skip
        setattr(owner, name, dying(getattr(owner, name)))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    folder = CheckpointFolder(path)
    write(folder, 2)
    folder.retain(1)


def test_wrong_shapes_names_and_versions_are_named(folder: CheckpointFolder) -> None:
    path = write(folder, 1)
    with CheckpointReader(path) as reader:
        wrong = LocalSlice("layer.bias", (6,), 0, *(torch.zeros(6) for _ in range(3)))
        with pytest.raises(CheckpointError, match=r"parameter/layer.bias has shape \(5,\), the model expects \(6,\)"):
            reader.fill_slices([wrong])
        with pytest.raises(CheckpointError, match=r"lacks 1 parameters of the model: other"):
            reader.check_names({*SHAPES, "other"})
        with pytest.raises(CheckpointError, match=r"has unknown 1 parameters of the model: conv"):
            reader.check_names(set(SHAPES) - {"conv"})
    values = json.loads((path / "manifest.json").read_text()) | {"version": 99}
    (path / "manifest.json").write_text(json.dumps(values))
    (path / "manifest.sha256").write_text(files.sha256_file(path / "manifest.json"))
    with pytest.raises(CheckpointError, match="version 99, this program reads 1"):
        read_manifest(path)


def test_a_tensor_with_a_piece_missing_is_never_half_read(folder: CheckpointFolder) -> None:
    with CheckpointReader(write(folder, 1)) as reader:
        name = "parameter/layer.weight"
        entry = reader.manifest.tensors[name]
        reader.manifest.tensors[name] = entry.model_copy(update={"pieces": entry.pieces[1:]})
        with pytest.raises(CheckpointError, match=r"parameter/layer.weight: read \d+ of 15 elements"):
            reader.parameters()


def test_retention_keeps_the_newest_by_number(folder: CheckpointFolder) -> None:
    for step in (20, 5, 100):
        write(folder, step)
    folder.retain(2)
    assert folder.steps() == [20, 100]


def test_retention_by_multiples_and_by_loss(folder: CheckpointFolder) -> None:
    for step in range(10, 100, 10):
        write(folder, step)
    folder.retain(2, every=40, losses={30: 1.0, 10: 2.0, 20: 0.5, 90: 3.0, 25: 0.1}, best=2)
    assert folder.steps() == [20, 30, 40, 80, 90]
