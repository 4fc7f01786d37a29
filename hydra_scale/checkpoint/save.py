"""Writing a checkpoint: each rank its own slices into one safetensors file, then one manifest, then one rename."""

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from hydra_scale.checkpoint.files import MANIFEST, MANIFEST_HASH, publish, sha256_file
from hydra_scale.checkpoint.geometry import flat_range, placed
from hydra_scale.checkpoint.manifest import VERSION, CheckpointManifest, FileEntry, Piece, TensorEntry
from hydra_scale.errors import CheckpointError
from hydra_scale.parallel.zero import MOMENTS, LocalSlice

Record = tuple[str, str, tuple[int, ...], Piece]
"""Tensor name, dtype, global shape, and a piece of it."""


def save(
    folder: Path,
    step: int,
    slices: Iterable[LocalSlice],
    state: dict[str, Any],
    may_publish: Callable[[], None] = lambda: None,
) -> None:
    """Write and publish checkpoint `folder`; all ranks call it with their own slices.

    Rank 0 calls `may_publish` right before the rename; a CheckpointError from it leaves nothing published.

    Raises:
        CheckpointError: on every rank, if any rank could not write its part; nothing is published then.
    """
    aside = folder.with_name(f".{folder.name}.writing")
    rank = dist.get_rank()
    if rank == 0:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    dist.barrier()
    try:
        mine: tuple[str, FileEntry, list[Record]] | str = _write_own_file(aside, rank, slices)
    except OSError as error:
        mine = f"rank {rank}: {error}"
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    verdict = [_publish_if_whole(aside, folder, step, state, everyone, may_publish) if rank == 0 else None]
    dist.broadcast_object_list(verdict, src=0)
    if verdict[0] is not None:
        raise CheckpointError(f"{folder}: not published: {verdict[0]}; older checkpoints are untouched")


def _write_own_file(folder: Path, rank: int, slices: Iterable[LocalSlice]) -> tuple[str, FileEntry, list[Record]]:
    file = f"rank{rank:05d}.safetensors"
    tensors: dict[str, torch.Tensor] = {}
    records: list[Record] = []
    for part in slices:
        if part.is_copy:
            continue
        for kind in ("parameter", *MOMENTS):
            name, flat = f"{kind}/{part.name}", getattr(part, kind)
            for start, box in flat_range(part.start, part.start + flat.numel(), part.shape):
                view = flat.narrow(0, start - part.start, box.num_elements).view(box.size)
                for target, index in placed(box, part.placement):
                    key = f"{name}@{'_'.join(map(str, target.offset))}"
                    tensors[key] = view[index].detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
                    piece = Piece(file=file, key=key, offset=target.offset, size=target.size)
                    records.append((name, str(view.dtype).removeprefix("torch."), part.placement.shape, piece))
    path = folder / file
    save_file(tensors, path)
    return file, FileEntry(bytes=path.stat().st_size, sha256=sha256_file(path)), records


def _publish_if_whole(
    aside: Path, final: Path, step: int, state: dict[str, Any], everyone: list[Any], may_publish: Callable[[], None]
) -> str | None:
    """Rank 0: merge the ranks' records, write the manifest, rename. Returns what went wrong, or None."""
    if failures := [each for each in everyone if isinstance(each, str)]:
        return "; ".join(failures)
    try:
        manifest = _merge(step, state, everyone)
        manifest.check_whole(final)
        content = manifest.to_json()
        (aside / MANIFEST).write_bytes(content)
        (aside / MANIFEST_HASH).write_text(sha256_file(aside / MANIFEST))
        may_publish()
        publish(aside, final)
    except (OSError, CheckpointError) as error:
        return str(error)
    return None


def _merge(step: int, state: dict[str, Any], everyone: list[tuple[str, FileEntry, list[Record]]]) -> CheckpointManifest:
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
