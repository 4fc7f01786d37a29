"""Names of the public Hydra masked language model against ours.

Tensors have the same layout in both: the tied output matrix appears twice there and once here, and nothing else
differs but names. Parameters of the mixer keep their names.
"""

import re
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hydra_scale.config import MixerConfig, ModelConfig
from hydra_scale.convert.package import EncoderPackage
from hydra_scale.errors import CheckpointError

_PAIRS = (
    ("bert.embeddings.word_embeddings.", "embedding.word."),
    ("bert.embeddings.token_type_embeddings.", "embedding.segment."),
    ("bert.embeddings.position_embeddings.", "embedding.position."),
    ("bert.embeddings.LayerNorm.", "embedding.norm."),
    ("bert.encoder.norm_f.", "encoder.final_norm."),
    ("cls.predictions.transform.dense.", "head.dense."),
    ("cls.predictions.transform.LayerNorm.", "head.norm."),
    ("cls.predictions.decoder.bias", "head.bias"),
)
_PUBLIC_LAYER, _OUR_LAYER = re.compile(r"bert\.encoder\.layer\.(\d+)\.layer\."), re.compile(r"encoder\.layers\.(\d+)\.")
_TIED = "cls.predictions.decoder.weight"
_BUFFERS = ("bert.embeddings.position_ids",)


def from_public(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our names for a public state dict; the tied output matrix must equal the word embedding.

    Raises:
        CheckpointError: a name that the public masked language model does not have, or an untied output matrix.
    """
    state = {name: tensor for name, tensor in state.items() if name not in _BUFFERS}
    tied = state.pop(_TIED, None)
    ours = {_rename(name, forward=True): tensor for name, tensor in state.items()}
    if tied is not None and not torch.equal(tied, ours["embedding.word.weight"]):
        raise CheckpointError(f"{_TIED}: differs from the word embedding; this system's output matrix is tied to it")
    return ours


def to_public(parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The public state dict of our parameters, the tied output matrix included."""
    public = {_rename(name, forward=False): tensor for name, tensor in parameters.items()}
    public[_TIED] = parameters["embedding.word.weight"]
    return public


def _rename(name: str, *, forward: bool) -> str:
    pattern, template = (
        (_PUBLIC_LAYER, r"encoder.layers.\1.") if forward else (_OUR_LAYER, r"bert.encoder.layer.\1.layer.")
    )
    if pattern.match(name):
        return pattern.sub(template, name, count=1)
    for public, ours in _PAIRS:
        source, target = (public, ours) if forward else (ours, public)
        if name.startswith(source):
            return target + name.removeprefix(source)
    raise CheckpointError(f"{name}: no counterpart in the {'public Hydra' if forward else 'trained'} model's names")


def read_public(path: Path) -> EncoderPackage:
    """A public masked language model from a `.safetensors` file or a `.pt` file (flat, or a Composer checkpoint).

    A `.pt` file is read with weights_only: it can hold tensors and plain values, no code. The configuration follows
    from the shapes; the public model has one group of B and C and no MLP.

    Raises:
        CheckpointError: unreadable, or not the state dict of a public Hydra masked language model.
    """
    parameters = from_public(_read_state(path))
    try:
        model = _infer_config(parameters)
    except KeyError as error:
        raise CheckpointError(f"{path}: holds no tensor {error}: not a public Hydra masked language model") from None
    return EncoderPackage(model, parameters, tokenizer=None, origin={"public checkpoint": path.name})


def write_public(package: EncoderPackage, path: Path) -> None:
    """The public state dict as one safetensors file, the tied matrix under both its names.

    Raises:
        CheckpointError: the model has layers or norms that the public one lacks.
    """
    model = package.model
    if set(model.layer_kinds) != {"H"} or model.norm != "layernorm" or model.mixer.ngroups != 1:
        raise CheckpointError(
            f"layers {''.join(sorted(set(model.layer_kinds)))}, norm {model.norm}, ngroups {model.mixer.ngroups}:"
            " the public masked language model has only H layers, layernorm and one group"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.clone() for name, tensor in to_public(package.parameters).items()}
    save_file(state, path, metadata={"format": "pt"})


def difference_from_public(package: EncoderPackage, path: Path) -> float:
    """0 if the file reads back to the very same parameters.

    Raises:
        CheckpointError: it does not.
    """
    back = read_public(path)
    for name, tensor in package.parameters.items():
        if name not in back.parameters or not torch.equal(back.parameters[name], tensor):
            raise CheckpointError(f"{path}: {name} does not read back equal; not published")
    return 0.0


def _read_state(path: Path) -> dict[str, torch.Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, EOFError, UnpicklingError) as error:
        raise CheckpointError(f"{path}: cannot be read as tensors ({error}); give a .safetensors or .pt file") from None
    if "state" in content:  # a Composer checkpoint
        content = {name.removeprefix("model."): value for name, value in content["state"]["model"].items()}
    return content


def _infer_config(parameters: dict[str, torch.Tensor]) -> ModelConfig:
    mixer = "encoder.layers.0.mixer."
    vocab_size, d_model = parameters["embedding.word.weight"].shape
    nheads, d_inner = parameters[f"{mixer}fc_D.weight"].shape
    conv_channels, _, d_conv = parameters[f"{mixer}conv1d.weight"].shape
    positions = parameters.get("embedding.position.weight")
    return ModelConfig(
        d_model=d_model,
        num_layers=1 + max(int(name.split(".")[2]) for name in parameters if name.startswith("encoder.layers.")),
        norm_position="pre" if "encoder.final_norm.weight" in parameters else "post",
        vocab_size=vocab_size,
        type_vocab_size=parameters["embedding.segment.weight"].shape[0],
        position_embedding="none" if positions is None else "learned",
        max_positions=512 if positions is None else positions.shape[0],
        mixer=MixerConfig(
            d_state=(conv_channels - d_inner) // 4,
            d_conv=d_conv,
            headdim=d_inner // nheads,
            expand=d_inner // d_model,
        ),
    )
