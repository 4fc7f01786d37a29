"""A checkpoint is whole or refused: round trip, every single kind of damage, and what a crash leaves."""

import json
import os
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from figures import Figures
from ranks import run_ranks, run_to_death
from safetensors.torch import save as serialised

from hydra_scale.checkpoint import folder as folder_module
from hydra_scale.checkpoint import manifest as manifest_module
from hydra_scale.checkpoint import save as save_module
from hydra_scale.checkpoint.files import sha256_file
from hydra_scale.checkpoint.folder import CheckpointFolder
from hydra_scale.checkpoint.load import CheckpointReader
from hydra_scale.checkpoint.manifest import read_manifest, verify_files
from hydra_scale.errors import CheckpointError
from hydra_scale.parallel.slices import LocalSlice

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


def test_every_flipped_bit_and_every_cut_is_caught(folder: CheckpointFolder, figures: Figures) -> None:
    path, count = write(folder, 1), 0
    for file in sorted(path.iterdir()):
        content = file.read_bytes()
        for place in range(0, len(content), max(1, len(content) // 97)):
            file.write_bytes(content[:place] + bytes([content[place] ^ (1 << place % 8)]) + content[place + 1 :])
            assert_refused(path)
            file.write_bytes(content[:place])
            assert_refused(path)
            count += 2
        file.unlink()
        assert_refused(path)
        file.write_bytes(content)
    verify_files(path, read_manifest(path))
    figures(21, "a bit of a checkpoint's file, or its end: refused by name", times=count)


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


IN_DELETION = 1 + 3 + 1
NUM_OPERATIONS = 1 + 3 * 3 + (1 + 3 + 1) + (1 + 1) + IN_DELETION
"""mkdir; three files written in two halves each; fsync of the rank's file, then of all and of the folder; rename and
fsync of the parent; to delete the older one: rename, three unlinks, rmdir."""


@pytest.mark.parametrize("asynchronous", [False, True], ids=["waited-for", "behind-training"])
def test_killed_at_any_file_operation_the_old_or_the_new_checkpoint_stands(
    folder: CheckpointFolder, figures: Figures, asynchronous: bool
) -> None:
    """Every open for writing, half-done write, flush, rename, mkdir, unlink and rmdir, retention's included."""
    write(folder, 1)
    exit_code, count = -signal.SIGKILL, 0
    seen = set()
    while exit_code:
        count += 1
        exit_code = run_to_death(save_and_die, folder.path, count, asynchronous)
        assert exit_code in (0, -signal.SIGKILL)
        newest = folder.newest_whole()
        assert newest in (folder.at(1), folder.at(2))
        with CheckpointReader(newest) as reader:
            step = reader.manifest.step
            assert newest == folder.at(step)
            assert all(torch.equal(reader.parameters()[name], three[0]) for name, three in tensors(step).items())
        seen.add((step, exit_code))
        folder.clear_unfinished()
        assert {entry.name for entry in folder.path.iterdir()} <= {"step-00000001", "step-00000002"}
        if folder.steps() == [1]:
            assert write(folder, 2).is_dir()
        for left in folder.steps():
            shutil.rmtree(folder.at(left))
        write(folder, 1)
    assert count - 1 == NUM_OPERATIONS
    where, num_saving = "behind training" if asynchronous else "waited for", NUM_OPERATIONS - IN_DELETION
    figures(10 if asynchronous else 9, f"SIGKILL at every file operation of a save, {where}", times=num_saving)
    figures(39, f"SIGKILL at every file operation of a deletion, behind a save {where}", times=IN_DELETION)
    assert seen == {(1, -signal.SIGKILL), (2, -signal.SIGKILL), (2, 0)}


def save_and_die(path: Path, count: int, asynchronous: bool) -> None:
    """Save step 2 and delete step 1, but be killed at the count-th operation that changes the file system."""
    left = count

    def may_die() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def dying(operation: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            may_die()
            return operation(*args, **kwargs)

        return wrapper

    def in_halves(target: Path, content: bytes) -> None:
        may_die()
        with target.open("wb") as stream:
            may_die()
            stream.write(content[: len(content) // 2])
            stream.flush()
            may_die()
            stream.write(content[len(content) // 2 :])

    def save_in_halves(tensors: dict[str, torch.Tensor], target: Path) -> None:
        in_halves(target, serialised(tensors))

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    for name in ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir"):
        setattr(os, name, dying(getattr(os, name)))
    Path.write_bytes = in_halves  # type: ignore[method-assign,assignment]
    Path.write_text = lambda self, text: in_halves(self, text.encode())  # type: ignore[method-assign,assignment]
    save_module.save_file = save_in_halves
    folder = CheckpointFolder(path)
    if asynchronous:
        with save_module.Saver(torch.device("cpu")) as saver:
            saver.begin(folder.at(2), 2, slices(tensors(2)), {"tokens": 2})
            while saver.poll() is None:
                pass
    else:
        write(folder, 2)
    folder.retain(1)


CHANGES = {"mkdir": "os.mkdir", "rename": "os.rename", "unlink": "os.remove", "rmdir": "os.rmdir", "open": "open"}
"""What the test above dies at, and the interpreter's own word for it."""
LOOKS = ("os.listdir", "os.scandir")


def test_nothing_changes_the_file_system_behind_the_test_above(folder: CheckpointFolder) -> None:
    """The interpreter's audit sees as many changes as are intercepted there, of no other kind."""
    write(folder, 1)
    audited, intercepted = run_ranks(1, save_and_count, folder.path)[0]
    assert audited == {CHANGES[name]: count for name, count in intercepted.items()}
    assert sum(intercepted.values()) == 1 + 3 + (1 + 1 + 3 + 1)


def save_and_count(path: Path) -> tuple[Counter[str], Counter[str]]:
    """Changes of the file system under `path` while step 2 is saved and step 1 deleted: audited, and intercepted."""
    audited: Counter[str] = Counter()
    intercepted: Counter[str] = Counter()

    def counted(name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            intercepted[name] += 1
            return operation(*args, **kwargs)

        return wrapper

    def listen(event: str, args: tuple[Any, ...]) -> None:
        reads = event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        within_folder = len(args) > 1 and type(args[1]) is int and args[1] >= 0  # given by a descriptor
        if listening and not reads and (event == "open" or event.startswith("os.")) and event not in LOOKS:
            audited[event] += str(path) in str(args[0]) or within_folder

    listening = False
    sys.addaudithook(listen)
    for name in ("rename", "replace", "mkdir", "unlink", "rmdir"):
        setattr(os, name, counted(name, getattr(os, name)))
    Path.write_bytes = counted("open", Path.write_bytes)  # type: ignore[method-assign]
    Path.write_text = counted("open", Path.write_text)  # type: ignore[method-assign]
    save_module.save_file = counted("open", lambda tensors, target: target.open("wb").write(serialised(tensors)))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    listening = True
    write(CheckpointFolder(path), 2)
    CheckpointFolder(path).retain(1)
    listening = False
    return audited, intercepted


def test_what_the_disk_does_not_give_is_named_and_passed_over(
    folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A bad sector in the newest: the one before it is used, on every rank, which wait for the first."""
    write(folder, 1)
    bad, sound = write(folder, 2), manifest_module.sha256_file

    def from_a_bad_disk(path: Path) -> str:
        if path.parent == bad:
            raise OSError(5, "Input/output error")
        return sound(path)

    monkeypatch.setattr(manifest_module, "sha256_file", from_a_bad_disk)
    assert folder.newest_whole() == folder.at(1)
    assert "rank00000.safetensors: cannot be read: Input/output error; look at the disk" in caplog.text
    with CheckpointReader(folder.at(1)) as reader, pytest.raises(CheckpointError, match="layer.bias@0: cannot be read"):
        (folder.at(1) / "rank00000.safetensors").unlink()
        reader.tensor("parameter/layer.bias")


def test_what_cannot_be_deleted_does_not_end_the_run(
    folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2, 3, 4):
        write(folder, step)
    remove = folder_module.remove_folder

    def busy(path: Path) -> None:
        if path == folder.at(1):
            raise OSError(16, "Device or resource busy")
        remove(path)

    with monkeypatch.context() as patch:
        patch.setattr(folder_module, "remove_folder", busy)
        folder.retain(2)
    assert folder.steps() == [1, 3, 4]
    assert "step-00000001: cannot be deleted: [Errno 16] Device or resource busy" in caplog.text
    folder.retain(2)
    assert folder.steps() == [3, 4]


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
    (path / "manifest.sha256").write_text(sha256_file(path / "manifest.json"))
    with pytest.raises(CheckpointError, match="version 99, this program reads 1"):
        read_manifest(path)


def rewrite_manifest(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """With a hash that agrees: crafted, or a fault at the save."""
    values = json.loads((path / "manifest.json").read_text())
    change(values)
    (path / "manifest.json").write_text(json.dumps(values))
    (path / "manifest.sha256").write_text(sha256_file(path / "manifest.json"))


def lead_outside(values: dict[str, Any]) -> None:
    values["tensors"]["parameter/conv"]["pieces"][0]["file"] = "../step-00000001/rank00000.safetensors"


@pytest.mark.parametrize("change", [lead_outside, lambda values: values.update(step=7)], ids=["outside", "other-step"])
def test_a_manifest_that_agrees_with_its_hash_and_lies(folder: CheckpointFolder, change: Any) -> None:
    write(folder, 1)
    rewrite_manifest(write(folder, 2), change)
    assert folder.newest_whole() == folder.at(1)


def test_what_cannot_be_read_is_named(folder: CheckpointFolder) -> None:
    path = write(folder, 1)
    rewrite_manifest(path, lambda values: values["tensors"]["parameter/conv"]["pieces"][0].update(key="gone"))
    with CheckpointReader(path) as reader, pytest.raises(CheckpointError, match=r"safetensors: gone: cannot be read"):
        reader.tensor("parameter/conv")
    (path / "manifest.json").write_text("[" * 200_000)
    (path / "manifest.sha256").write_text(sha256_file(path / "manifest.json"))
    with pytest.raises(CheckpointError, match="not a checkpoint manifest"):
        read_manifest(path)


def test_a_tensor_with_a_piece_missing_is_never_half_read(folder: CheckpointFolder) -> None:
    with CheckpointReader(write(folder, 1)) as reader:
        name = "parameter/layer.weight"
        entry = reader.manifest.tensors[name]
        reader.manifest.tensors[name] = entry.model_copy(update={"pieces": entry.pieces[1:]})
        with pytest.raises(CheckpointError, match=r"parameter/layer.weight: read \d+ of 15 elements"):
            reader.parameters()


def test_what_is_not_finite_is_refused_by_name_and_number(folder: CheckpointFolder) -> None:
    values = tensors(1)
    values["conv"][1].view(-1)[3:5] = torch.tensor([torch.nan, torch.inf])
    save_module.save(folder.at(1), 1, slices(values), {})
    with (
        CheckpointReader(folder.at(1)) as reader,
        pytest.raises(CheckpointError, match="exp_avg/conv holds 2 elements that are not finite"),
    ):
        reader.fill_slices([LocalSlice("conv", SHAPES["conv"], 0, *(torch.zeros(12) for _ in range(3)))])


def test_a_file_that_the_manifest_does_not_list_is_told_and_not_read(
    folder: CheckpointFolder, caplog: pytest.LogCaptureFixture
) -> None:
    (write(folder, 1) / "model.pt").write_bytes(b"\x80\x04")
    assert folder.newest_whole() == folder.at(1)
    assert "holds model.pt, which its manifest does not list; not read" in caplog.text


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
