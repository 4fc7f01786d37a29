"""Sources to convert: the golden files of the public implementation, and settings of small runs."""

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hydra_data_prep.prepare import PrepareOptions, prepare

GOLDEN = Path(__file__).parents[2] / "golden"
PUBLIC = sorted(GOLDEN.glob("bert_hydra*.safetensors"))
MIXERS = sorted(GOLDEN.glob("mixer_*.safetensors"))
HYBRID = [
    "model.layer_pattern=HAM",
    "model.num_layers=3",
    "model.attention.num_heads=4",
    "model.norm=rmsnorm",
    "model.norm_position=pre",
    "model.position_embedding=learned",
    "model.mixer.learnable_init_states=true",
]


def prepared(prose: Path, folder: Path, **options: object) -> Path:
    """`prose` as a prepared folder."""
    prepare(PrepareOptions.model_validate({"source": "text", "input": (prose,), "output": folder} | options))
    return folder


def state_dict(golden: Path) -> dict[str, torch.Tensor]:
    """Names and tensors of the public class."""
    return {name.removeprefix("param."): t for name, t in load_file(golden).items() if name.startswith("param.")}


def state_file(golden: Path, folder: Path) -> Path:
    """The state dict alone as a file."""
    path = folder / golden.name
    save_file(state_dict(golden), path)
    return path


def constructor_arguments(golden: Path) -> dict[str, str]:
    """Arguments of the public class as a golden file of a mixer holds them: JSON by name."""
    with safe_open(golden, "pt") as file:
        return file.metadata()
