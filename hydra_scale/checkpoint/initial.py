"""Weights to start a new run from: those of another run, the moments and the step not among them."""

from pathlib import Path

import torch
from torch import nn

from hydra_scale.checkpoint.folder import CheckpointFolder
from hydra_scale.checkpoint.load import CheckpointReader
from hydra_scale.checkpoint.manifest import read_manifest, verify_files
from hydra_scale.errors import CheckpointError
from hydra_scale.parallel.placement import global_name, placement_of

_ROWS_OF_THE_VOCABULARY = ("embedding.word.weight", "head.bias")


@torch.no_grad()
def start_from(model: nn.Module, source: Path, names: set[str]) -> Path:
    """Copy the weights of a run folder's newest whole checkpoint, or of a checkpoint, into this rank's parameters.

    `names` are those of the whole model, of which a pipeline's stage holds some. A vocabulary of another size shares
    the first rows; further ones keep what they have. Returns the checkpoint.

    Raises:
        CheckpointError: there is none, it is damaged, its weights are not finite, or it is of a model of other shapes.
    """
    folder = _checkpoint_of(source)
    parameters = dict(model.named_parameters())
    with CheckpointReader(folder) as reader:
        reader.check_names(names)
        for name, parameter in parameters.items():
            placement, logical = placement_of(parameter), global_name(name, parameter)
            found = reader.tensor(f"parameter/{logical}")
            if not torch.isfinite(found).all():
                raise CheckpointError(
                    f"checkpoint.init_from {folder}: {logical} holds numbers that are not finite; give an earlier one"
                )
            if tuple(found.shape) == placement.shape:
                parameter.copy_(placement.part_of(found))
            elif logical in _ROWS_OF_THE_VOCABULARY and tuple(found.shape[1:]) == placement.shape[1:]:
                for here, start, length in placement.pieces():
                    rows = found[start : start + length]
                    parameter[here : here + len(rows)].copy_(rows)
            else:
                raise CheckpointError(
                    f"checkpoint.init_from {folder}: {logical} has shape {tuple(found.shape)}, the model expects"
                    f" {placement.shape}; give a run of the same model (only the vocabulary may differ)"
                )
    return folder


def _checkpoint_of(source: Path) -> Path:
    if (source / "checkpoints").is_dir():
        folder = CheckpointFolder(source / "checkpoints").newest_whole()
        if folder is not None:
            return folder
    elif source.is_dir():
        manifest = read_manifest(source)
        manifest.check_whole(source)
        verify_files(source, manifest)
        return source
    raise CheckpointError(
        f"checkpoint.init_from {source}: no checkpoint there; give a run folder or RUN/checkpoints/step-N"
    )
