"""A Hugging Face folder that `from_pretrained` loads without any of this system.

It holds config.json, model.safetensors, the tokenizer, the model's code (huggingface_files/ and the hydra_kernels
modules, copied) and a model card. This is the one place that needs the transformers library (extra `huggingface`).
"""

import json
import shutil
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForMaskedLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from hydra_scale.convert.package import EncoderPackage
from hydra_scale.convert.tokenizer_json import tokenizer_json
from hydra_scale.data.tokenizer import SPECIAL_PIECES
from hydra_scale.errors import CheckpointError

_CODE = ("configuration_hydra.py", "modeling_hydra.py")
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}
_AUTO_CLASSES = {
    "AutoConfig": "configuration_hydra.HydraConfig",
    "AutoModel": "modeling_hydra.HydraModel",
    "AutoModelForMaskedLM": "modeling_hydra.HydraForMaskedLM",
    "AutoModelForSequenceClassification": "modeling_hydra.HydraForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_hydra.HydraForTokenClassification",
}


def write_huggingface(package: EncoderPackage, folder: Path) -> None:
    """Write the folder's files; the caller publishes it once `difference_from_source` is small."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(_config(package), indent=2) + "\n", encoding="utf-8")
    save_file(_to_huggingface(package.parameters), folder / "model.safetensors", metadata={"format": "pt"})
    for name in _CODE:
        with as_file(files("hydra_scale.convert") / "huggingface_files" / name) as source:
            shutil.copy(source, folder / name)
    for entry in files("hydra_kernels").iterdir():
        if entry.name.endswith(".py") and entry.name != "__init__.py":
            with as_file(entry) as source:
                shutil.copy(source, folder / entry.name)
    if package.tokenizer is not None:
        _write_tokenizer(package, folder)
    (folder / "README.md").write_text(_card(package), encoding="utf-8")


def difference_from_source(package: EncoderPackage, folder: Path) -> float:
    """Largest difference between the logits of the folder, as users load it, and of this system's model.

    A batch of a long, a short and a one-token row, the padding random. Relative to the largest logit.

    Raises:
        CheckpointError: the difference is beyond rounding.
    """
    generator = torch.Generator().manual_seed(0)
    shortest = min(70, package.model.max_positions if package.model.position_embedding == "learned" else 70)
    lengths = (shortest, 9, 1)
    input_ids = torch.randint(0, package.vocab_size, (len(lengths), shortest), generator=generator)
    mask = (torch.arange(shortest) < torch.tensor(lengths)[:, None]).long()
    dtype = package.parameters["head.bias"].dtype
    disable_progress_bar()
    exported = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True, dtype=dtype).eval()
    ours = package.build()
    with torch.no_grad():
        found = exported(input_ids=input_ids, attention_mask=mask).logits
        expected = [ours.logits(_row(input_ids[row, :length])) for row, length in enumerate(lengths)]
    scale = max(float(row.abs().max()) for row in expected)
    gaps = [float((found[i, :n] - row).abs().max()) for i, (n, row) in enumerate(zip(lengths, expected, strict=True))]
    difference = max(gaps) / scale
    if not difference <= _TOLERANCE[dtype]:
        raise CheckpointError(
            f"{folder}: its logits differ from the source by {difference:.1e} (relative), at most"
            f" {_TOLERANCE[dtype]:.0e} is rounding; not published"
        )
    return difference


class _row:
    """One document as the model's batch, every position asked for."""

    def __init__(self, input_ids: torch.Tensor) -> None:
        self.input_ids = input_ids
        self.position_ids = self.token_keys = self.masked_positions = torch.arange(input_ids.numel())
        self.cu_seqlens = torch.tensor([0, input_ids.numel()], dtype=torch.int32)
        self.first_token = 0
        self.targets = input_ids


def fill_mask(folder: Path, text: str, top: int = 3) -> list[tuple[str, float]]:
    """The likeliest tokens for the first [MASK] of `text`, with their probabilities.

    Raises:
        CheckpointError: `folder` is not an exported model, or the text has no mask.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: no config.json; give a folder written by `convert --to huggingface`")
    disable_progress_bar()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True).eval()
    inputs = tokenizer(text, return_tensors="pt")
    places = (inputs["input_ids"][0] == tokenizer.mask_token_id).nonzero()
    if not len(places):
        raise CheckpointError(f"{text!r}: holds no {tokenizer.mask_token}; put one where a word is to be guessed")
    with torch.no_grad():
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    best = logits[0, places[0, 0]].softmax(-1).topk(top)
    words = [tokenizer.decode([token]).strip() for token in best.indices.tolist()]
    return list(zip(words, best.values.tolist(), strict=True))


def _to_huggingface(parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names of the exported classes: the trunk under `hydra.`, the tied output matrix left out."""
    renamed = {}
    for name, tensor in parameters.items():
        name = "head.decoder.bias" if name == "head.bias" else name
        renamed[name if name.startswith("head.") else f"hydra.{name}"] = tensor.contiguous()
    return renamed


def _config(package: EncoderPackage) -> dict[str, Any]:
    model = package.model
    mixer = model.mixer.model_dump(exclude={"backend"})
    mixer["dt_limit"] = [str(bound) for bound in model.mixer.dt_limit]  # JSON has no infinity
    special = {f"{name}_token_id": index for index, name in enumerate(("pad", "unk", "cls", "sep", "mask"))}
    return {
        "model_type": "hydra_scale",
        "architectures": ["HydraForMaskedLM"],
        "auto_map": _AUTO_CLASSES,
        "vocab_size": package.vocab_size,
        "d_model": model.d_model,
        "num_hidden_layers": model.num_layers,
        "layer_kinds": model.layer_kinds,
        "norm": model.norm,
        "norm_position": model.norm_position,
        "norm_eps": model.norm_eps,
        "embedding_norm_eps": model.embedding_norm_eps,
        "type_vocab_size": model.type_vocab_size,
        "position_embedding": model.position_embedding,
        "max_positions": model.max_positions,
        "initializer_range": model.initializer_range,
        "mixer": mixer,
        "num_attention_heads": model.attention.num_heads,
        "mlp_width": round(model.mlp.expansion * model.d_model),
        "tie_word_embeddings": True,
        "dtype": str(package.parameters["head.bias"].dtype).removeprefix("torch."),
        **special,
    }


def _write_tokenizer(package: EncoderPackage, folder: Path) -> None:
    assert package.tokenizer is not None
    pad, unk, cls, sep, mask = SPECIAL_PIECES
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer_json(package.tokenizer),
        pad_token=pad,
        unk_token=unk,
        cls_token=cls,
        sep_token=sep,
        mask_token=mask,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)
    package.tokenizer.save(folder / "training_tokenizer")


def _card(package: EncoderPackage) -> str:
    num_parameters = sum(tensor.numel() for tensor in package.parameters.values())
    origin = "\n".join(f"- {key}: {value}" for key, value in package.origin.items() if key != "config")
    settings = (
        f"\n## Training configuration\n\n```yaml\n{package.origin['config']}```\n" if "config" in package.origin else ""
    )
    return f"""---
library_name: transformers
pipeline_tag: fill-mask
---
# Hydra encoder, {num_parameters:,} parameters

A bidirectional state space encoder (Hydra) trained by masked language modelling with hydra-scale.

```python
from transformers import AutoModelForMaskedLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER", trust_remote_code=True)
model = AutoModelForMaskedLM.from_pretrained("FOLDER", trust_remote_code=True)
```

The code it trusts is in this folder: `modeling_hydra.py` and the PyTorch operations it imports. Padding in a batch
does not change any result. `model.hydra.embed(**inputs)` gives mean-pooled sentence vectors.

## Origin

{origin}
{settings}"""
