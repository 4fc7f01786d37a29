"""What a Hugging Face folder and a wheel have in common: configuration, weights, tokenizer, origin and code.

config.json              shape of the encoder
model.safetensors        weights, the tied output matrix left out
training_tokenizer/      the tokenizer of the training, if the source has one
origin.json              where the model came from
encoder_hydra.py ...     the encoder, and the modules of hydra_kernels it imports, all in one folder
"""

import json
import shutil
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from hydra_scale.config import AttentionConfig, MixerConfig, MlpConfig, ModelConfig
from hydra_scale.config_file import in_short
from hydra_scale.convert.package import EncoderPackage, widest_dtype
from hydra_scale.convert.tensor_file import write_safetensors
from hydra_scale.data.tokenizer import PAD_ID, Tokenizer
from hydra_scale.errors import CheckpointError

MODEL_TYPE = "hydra_scale"
CONFIG, WEIGHTS, ORIGIN, TOKENIZER = "config.json", "model.safetensors", "origin.json", "training_tokenizer"
ENCODER_CODE = "encoder_hydra.py"
_SAME_NAMES = (
    "d_model", "norm", "norm_position", "norm_eps", "embedding_norm_eps", "type_vocab_size", "position_embedding",
    "max_positions", "initializer_range",
)  # fmt: skip
"""Settings of ModelConfig that config.json holds under the same name."""
_TIED = "head.decoder.weight"


def write_contents(package: EncoderPackage, folder: Path, extra_config: dict[str, Any] | None = None) -> None:
    """Write everything but the code into a folder that exists."""
    _write_json(folder / CONFIG, (extra_config or {}) | _config(package))
    write_safetensors(folder / WEIGHTS, _exported_names(package.parameters))
    _write_json(folder / ORIGIN, package.origin)
    if package.tokenizer is not None:
        package.tokenizer.save(folder / TOKENIZER)


def copy_code(folder: Path, *names: str) -> None:
    """Copy the encoder, the modules of hydra_kernels, and `names` of exported_files/ into a folder that exists."""
    ours = files("hydra_scale.convert") / "exported_files"
    kernels = [entry for entry in files("hydra_kernels").iterdir() if entry.name.endswith(".py")]
    for entry in (ours / ENCODER_CODE, *(ours / name for name in names), *kernels):
        if entry.name != "__init__.py":
            with as_file(entry) as source:
                shutil.copyfile(source, folder / entry.name)


def read_contents(folder: Path) -> EncoderPackage:
    """The package that `write_contents` wrote, or that transformers saved after loading it. No code of it is run.

    Raises:
        CheckpointError: not such a folder, or not the weights of a masked language model.
        DataError: the tokenizer in it was altered.
    """
    try:
        values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        found = values.get("model_type")
        if found != MODEL_TYPE:
            raise CheckpointError(f"{folder / CONFIG}: model_type is {found!r}, expected {MODEL_TYPE!r}")
        model = _model_config(values)
        origin_file = folder / ORIGIN
        origin = json.loads(origin_file.read_text(encoding="utf-8")) if origin_file.is_file() else {}
    except OSError as error:
        raise CheckpointError(
            f"{folder / CONFIG}: not the configuration of an exported model: {error.strerror}; give a folder of"
            " `convert --to huggingface`"
        ) from None
    except KeyError as error:
        raise CheckpointError(
            f"{folder / CONFIG}: not the configuration of an exported model: lacks {error}; copy it again"
        ) from None
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{folder / CONFIG}: not the configuration of an exported model: {in_short(error)}; copy it again"
        ) from None
    tokenizer = Tokenizer.load(folder / TOKENIZER) if (folder / TOKENIZER).is_dir() else None
    return EncoderPackage(model, _read_weights(folder), tokenizer, origin)


def _read_weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    try:
        files = sorted(folder.glob("model*.safetensors"))  # transformers cuts large models into several
        if not files:
            raise CheckpointError(f"{folder}: holds no {WEIGHTS}; copy it again")
        for path in files:
            found |= load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: its weights cannot be read ({error}); copy it again") from None
    if "head.decoder.bias" not in found:
        raise CheckpointError(
            f"{folder}: no masked language model head among its {len(found)} tensors; give a folder of HydraForMaskedLM"
        )
    tied = found.pop(_TIED, None)
    if tied is not None and not torch.equal(tied, found["hydra.embedding.word.weight"]):
        raise CheckpointError(f"{folder}: {_TIED} differs from the word embedding; this system ties them")
    found["head.bias"] = found.pop("head.decoder.bias")
    return {name.removeprefix("hydra."): tensor for name, tensor in found.items()}


def _exported_names(parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names of the exported classes: the trunk under `hydra.`, the tied output matrix left out."""
    renamed = {}
    for name, tensor in parameters.items():
        name = "head.decoder.bias" if name == "head.bias" else name
        renamed[name if name.startswith("head.") else f"hydra.{name}"] = tensor
    return renamed


def _config(package: EncoderPackage) -> dict[str, Any]:
    model = package.model
    mixer = model.mixer.model_dump(exclude={"backend"})
    mixer["dt_limit"] = [str(bound) for bound in model.mixer.dt_limit]  # JSON has no infinity
    return {
        "model_type": MODEL_TYPE,
        "vocab_size": package.vocab_size,
        "num_hidden_layers": model.num_layers,
        "layer_kinds": model.layer_kinds,
        **{name: getattr(model, name) for name in _SAME_NAMES},
        "head_norm_eps": model.eps_in_head,
        "mixer": mixer,
        "num_attention_heads": model.attention.num_heads,
        "mlp_width": round(model.mlp.expansion * model.d_model),
        "tie_word_embeddings": True,
        "dtype": str(widest_dtype(package.parameters)).removeprefix("torch."),
        **({"pad_token_id": PAD_ID} if package.tokenizer is None else _special_ids(package.tokenizer)),
    }


def _special_ids(tokenizer: Tokenizer) -> dict[str, int | None]:
    return {f"{part}_token_id": index for part, index in tokenizer.special._asdict().items()}


def _model_config(values: dict[str, Any]) -> ModelConfig:
    """The inverse of `_config`; a repeated pattern comes back written out."""
    mixer = values["mixer"] | {"dt_limit": tuple(map(float, values["mixer"]["dt_limit"]))}
    return ModelConfig(
        num_layers=values["num_hidden_layers"],
        layer_pattern=values["layer_kinds"],
        vocab_size=values["vocab_size"],
        head_norm_eps=values.get("head_norm_eps"),  # folders of earlier versions have one epsilon for both
        mixer=MixerConfig.model_validate(mixer),
        attention=AttentionConfig(num_heads=values["num_attention_heads"]),
        mlp=MlpConfig(expansion=values["mlp_width"] / values["d_model"]),
        **{name: values[name] for name in _SAME_NAMES},
    )


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
