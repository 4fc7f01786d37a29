"""Writing a checkpoint: each rank its own slices into one safetensors file, then one manifest, then one rename.

Training stops for the copy to host memory. A thread of each rank then writes and hashes its file; it never enters a
collective. Ranks meet at step edges, in their main threads: one small all-reduce while a save is under way tells them
whether all have come far enough, so no collective of a save can cross one of training.
"""

import contextlib
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from hydra_scale.checkpoint.files import MANIFEST, MANIFEST_HASH, flush, publish, sha256_file
from hydra_scale.checkpoint.manifest import VERSION, CheckpointManifest, FileEntry, Piece, TensorEntry
from hydra_scale.checkpoint.snapshot import Record, Snapshot
from hydra_scale.errors import CheckpointError
from hydra_scale.parallel.slices import LocalSlice

Written = tuple[str, FileEntry, list[Record]]
"""What a rank has written: name, size and hash of its file, and the pieces in it."""


def _always() -> None:
    """Nothing stands against publishing."""


@dataclass
class _Save:
    """A save under way. `running` is this rank's own part, and once `is_written`, on rank 0, the publication."""

    folder: Path
    step: int
    state: dict[str, Any]
    may_publish: Callable[[], None]
    running: "Future[Any]"
    is_written: bool = False

    @property
    def aside(self) -> Path:
        return _aside(self.folder)


class Saver:
    """Saves checkpoints behind the back of training, one at a time; a context, at whose end its thread has ended.

    All ranks call the same methods in the same order. Leaving the context with a save under way abandons that save:
    nothing half-written is ever seen, and only `finish` may wait for other ranks.
    """

    def __init__(self, device: torch.device) -> None:
        """`device` is where the collectives of the job work."""
        self._rank, self._device = dist.get_rank(), device
        self._snapshot = Snapshot(f"rank{self._rank:05d}.safetensors")
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._save: _Save | None = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(cancel_futures=True)

    def prepare(self, slices: Iterable[LocalSlice]) -> None:
        """Make the buffers in host memory before training, which would otherwise stand still for it at the first save.

        They take 12 bytes a parameter of this rank's share.
        """
        self._snapshot.reserve(slices)

    def begin(
        self,
        folder: Path,
        step: int,
        slices: Iterable[LocalSlice],
        state: dict[str, Any],
        may_publish: Callable[[], None] = _always,
    ) -> None:
        """Copy this rank's slices and start to write checkpoint `folder`; the save before must have been finished.

        Rank 0 calls `may_publish` in its thread right before the rename; a CheckpointError from it leaves nothing
        published.
        """
        if self._save is not None:
            raise RuntimeError(f"save of {folder} begun before that of {self._save.folder} is finished")
        aside = _aside(folder)
        if self._rank == 0:
            with contextlib.suppress(OSError):  # told by the threads, which find no folder to write to
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir(parents=True)
        dist.barrier()
        self._snapshot.take(slices)
        self._save = _Save(folder, step, state, may_publish, self._in_background(_write_own_file, aside))

    @property
    def is_busy(self) -> bool:
        """Whether this rank's part of a save is still being written."""
        return self._save is not None and not self._save.running.done()

    def poll(self) -> int | None:
        """At a step edge: step of the save that has become visible since the last call, None if none has.

        Raises:
            CheckpointError: on every rank, if any rank could not write its part; nothing is published then.
        """
        while self._save is not None:
            busy = torch.tensor(not self._save.running.done(), dtype=torch.int32, device=self._device)
            dist.all_reduce(busy, op=dist.ReduceOp.MAX)
            if busy.item():
                return None
            if (step := self._advance(self._save)) is not None:
                return step
        return None

    def finish(self) -> int | None:
        """Wait for the save under way; returns and raises as `poll`."""
        step = None
        while self._save is not None:
            wait([self._save.running])
            step = self._advance(self._save)
        return step

    def _advance(self, save: _Save) -> int | None:
        """From written on all ranks to being published by rank 0, or from there to the end. Collective."""
        if not save.is_written:
            everyone: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, save.running.result())
            save.is_written, save.running = True, self._publication(save, everyone)
            return None
        self._save = None
        verdict = [save.running.result()]
        dist.broadcast_object_list(verdict, src=0)
        if verdict[0] is not None:
            raise CheckpointError(f"{save.folder}: not published: {verdict[0]}; older checkpoints are untouched")
        return save.step

    def _publication(self, save: _Save, everyone: list[Any]) -> "Future[str | None]":
        if self._rank == 0:
            return self._thread.submit(_publish_if_whole, save, everyone)
        done: Future[str | None] = Future()
        done.set_result(None)
        return done

    def _in_background(self, write: Callable[[Path, Snapshot], Written], aside: Path) -> "Future[Written | str]":
        def run() -> Written | str:
            try:
                return write(aside, self._snapshot)
            except Exception as error:  # whatever it is, all ranks must hear of it
                return f"rank {self._rank}: {error}; {_room(aside, self._snapshot)}"

        return self._thread.submit(run)


def save(
    folder: Path,
    step: int,
    slices: Iterable[LocalSlice],
    state: dict[str, Any],
    may_publish: Callable[[], None] = _always,
) -> None:
    """Write and publish checkpoint `folder` and wait for it; all ranks call it with their own slices.

    Raises:
        CheckpointError: as `Saver.poll`.
    """
    with Saver(torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")) as saver:
        saver.begin(folder, step, slices, state, may_publish)
        saver.finish()


def _aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.writing")


def _room(aside: Path, snapshot: Snapshot) -> str:
    needed = sum(tensor.nbytes for tensor in snapshot.tensors.values())
    with contextlib.suppress(OSError):
        return f"its file needs {needed:,} bytes, {shutil.disk_usage(aside.parent).free:,} are free"
    return f"its file needs {needed:,} bytes"


def _write_own_file(aside: Path, snapshot: Snapshot) -> Written:
    path = aside / snapshot.file
    save_file(snapshot.tensors, path)
    flush(path)
    return snapshot.file, FileEntry(bytes=path.stat().st_size, sha256=sha256_file(path)), snapshot.records


def _publish_if_whole(save: _Save, everyone: list[Any]) -> str | None:
    """Rank 0: merge the ranks' records, write the manifest, rename. Returns what went wrong, or None."""
    if failures := [each for each in everyone if isinstance(each, str)]:
        shutil.rmtree(save.aside, ignore_errors=True)  # it takes room that the next one may need
        return "; ".join(failures)
    try:
        manifest = _merge(save.step, save.state, everyone)
        manifest.check_whole(save.folder)
        (save.aside / MANIFEST).write_bytes(manifest.to_json())
        (save.aside / MANIFEST_HASH).write_text(sha256_file(save.aside / MANIFEST))
        save.may_publish()
        publish(save.aside, save.folder)
    except Exception as error:  # whatever it is, all ranks must hear of it
        return str(error)
    return None


def _merge(step: int, state: dict[str, Any], everyone: list[Written]) -> CheckpointManifest:
    heads: dict[str, tuple[str, tuple[int, ...]]] = {}
    pieces: dict[str, list[Piece]] = {}
    for _, _, records in everyone:
        for name, dtype, shape, piece in records:
            if heads.setdefault(name, (dtype, shape)) != (dtype, shape):
                raise CheckpointError(f"{name}: ranks disagree: {heads[name]} and {(dtype, shape)}")
            pieces.setdefault(name, []).append(piece)
    tensors = {
        name: TensorEntry(dtype=dtype, shape=shape, pieces=tuple(pieces[name]))  # type: ignore[arg-type]
        for name, (dtype, shape) in heads.items()
    }
    files = {file: entry for file, entry, _ in everyone}
    return CheckpointManifest(version=VERSION, step=step, state=state, files=files, tensors=tensors)
