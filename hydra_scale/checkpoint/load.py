"""Reading a checkpoint: any rectangle of any of its tensors, from whichever files hold parts of it."""

from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

import torch
from safetensors import SafetensorError, safe_open

from hydra_scale.checkpoint.geometry import Rectangle, flat_range, placed
from hydra_scale.checkpoint.manifest import CheckpointManifest, TensorEntry, read_manifest
from hydra_scale.errors import CheckpointError
from hydra_scale.parallel.slices import MOMENTS, LocalSlice


class CheckpointReader:
    """An open checkpoint; `verify_files` of its manifest comes first, since nothing here re-reads the hashes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest: CheckpointManifest = read_manifest(folder)
        self._open_files: dict[str, safe_open] = {}

    def __enter__(self) -> "CheckpointReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open_files.clear()

    def parameters(self) -> dict[str, torch.Tensor]:
        """Every parameter, whole, under its name."""
        names = [name for name in self.manifest.tensors if name.startswith("parameter/")]
        return {name.removeprefix("parameter/"): self.tensor(name) for name in names}

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, whole."""
        entry = self._entry(name)
        result = torch.empty(entry.shape, dtype=getattr(torch, entry.dtype))
        self._fill(name, result, Rectangle((0,) * len(entry.shape), entry.shape))
        return result

    def fill_slices(self, slices: Iterable[LocalSlice]) -> None:
        """Write this layout's slices of parameters and moments, whatever layout saved them.

        Raises:
            CheckpointError: a tensor is absent, or of another shape or dtype, or not wholly there, or not finite.
        """
        for part in slices:
            for kind in ("parameter", *MOMENTS):
                name, flat = f"{kind}/{part.name}", getattr(part, kind)
                shape = self._entry(name).shape
                expected = part.placement.shape
                if shape != expected:
                    raise CheckpointError(f"{self.folder}: {name} has shape {shape}, the model expects {expected}")
                for start, box in flat_range(part.start, part.start + flat.numel(), part.shape):
                    view = flat.narrow(0, start - part.start, box.num_elements).view(box.size)
                    for source, index in placed(box, part.placement):
                        self._fill(name, view[index], source)
                if num_bad := int((~flat.isfinite()).sum()):
                    raise CheckpointError(
                        f"{self.folder}: {name} holds {num_bad} elements that are not finite (NaN or infinite); delete"
                        " this checkpoint to continue from the one before"
                    )

    def check_names(self, expected: set[str]) -> None:
        """Raises CheckpointError if the parameters are not exactly those of the model."""
        found = {n.removeprefix("parameter/") for n in self.manifest.tensors if n.startswith("parameter/")}
        for problem, names in (("lacks", expected - found), ("has unknown", found - expected)):
            if names:
                some = ", ".join(sorted(names)[:5])
                raise CheckpointError(f"{self.folder}: {problem} {len(names)} parameters of the model: {some}")

    def check_moments(self) -> None:
        """Raises CheckpointError if there are weights only."""
        if not any(name.startswith(f"{MOMENTS[0]}/") for name in self.manifest.tensors):
            raise CheckpointError(
                f"{self.folder}: holds weights and no moments, training cannot go on from it; start a new run with"
                " checkpoint.init_from"
            )

    def _entry(self, name: str) -> TensorEntry:
        try:
            return self.manifest.tensors[name]
        except KeyError:
            raise CheckpointError(f"{self.folder}: holds no tensor {name}") from None

    def _fill(self, name: str, target: torch.Tensor, box: Rectangle) -> None:
        entry = self._entry(name)
        if entry.dtype != str(target.dtype).removeprefix("torch."):
            raise CheckpointError(f"{self.folder}: {name} is {entry.dtype}, expected {target.dtype}; never cast here")
        read = 0
        for piece in entry.pieces:
            common = piece.rectangle.intersect(box)
            if common is None:
                continue
            index = common.within(piece.rectangle)
            try:
                file = self._file(piece.file)
                part = file.get_slice(piece.key)[index] if index else file.get_tensor(piece.key)
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{self.folder / piece.file}: {piece.key}: cannot be read ({error})") from None
            target[common.within(box)].copy_(part)
            read += common.num_elements
        if read != target.numel():
            raise CheckpointError(f"{self.folder}: {name}: read {read} of {target.numel()} elements")

    def _file(self, name: str) -> safe_open:
        if name not in self._open_files:
            self._open_files[name] = safe_open(self.folder / name, framework="pt")
        return self._open_files[name]
