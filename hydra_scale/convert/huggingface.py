"""A Hugging Face folder that `from_pretrained` loads without any of this system.

It holds what `hydra_scale.convert.exported` lists, the tokenizer in that library's form, its model classes and a model
card. This is the one place that needs the transformers library (extra `huggingface`).
"""

from pathlib import Path

import torch
from transformers import AutoModelForMaskedLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from hydra_scale.convert.card import card, front_matter
from hydra_scale.convert.exported import copy_code, write_contents
from hydra_scale.convert.package import EncoderPackage, Probe
from hydra_scale.convert.tokenizer_json import tokenizer_json
from hydra_scale.errors import CheckpointError

_MODELING = "modeling_hydra.py"
_LOADING = {
    "architectures": ["HydraForMaskedLM"],
    "auto_map": {
        "AutoConfig": "configuration_hydra.HydraConfig",
        "AutoModel": "modeling_hydra.HydraModel",
        "AutoModelForMaskedLM": "modeling_hydra.HydraForMaskedLM",
        "AutoModelForSequenceClassification": "modeling_hydra.HydraForSequenceClassification",
        "AutoModelForTokenClassification": "modeling_hydra.HydraForTokenClassification",
    },
}


def write_huggingface(package: EncoderPackage, folder: Path) -> None:
    """Write the folder's files.

    Raises:
        DataError: the tokenizer's twin gives other ids than in training.
    """
    folder.mkdir(parents=True)
    write_contents(package, folder, _LOADING)
    copy_code(folder, "configuration_hydra.py", _MODELING)
    _name_every_module(folder)
    if package.tokenizer is not None:
        _write_tokenizer(package, folder)
    (folder / "README.md").write_text(front_matter() + card(package), encoding="utf-8")


def run_huggingface(folder: Path, package: EncoderPackage, probe: Probe) -> torch.Tensor:
    """Logits of the folder, loaded as users load it: (batch, seqlen, vocab_size)."""
    disable_progress_bar()
    model = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True, dtype=package.dtype).eval()
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=probe.inputs, attention_mask=probe.attention_mask).logits
    return logits


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


def _name_every_module(folder: Path) -> None:
    """Have the modelling file name all others: transformers 5.0 brings those only that it names itself."""
    names = sorted(path.stem for path in folder.glob("*.py") if path.name != _MODELING)
    imports = "".join(f"    from .{name} import *\n" for name in names)
    with (folder / _MODELING).open("a", encoding="utf-8") as file:
        file.write(f"\n\nif False:  # never runs: it tells transformers 5.0 which files belong to this one\n{imports}")


def _write_tokenizer(package: EncoderPackage, folder: Path) -> None:
    assert package.tokenizer is not None
    special = package.tokenizer.special._asdict().items()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer_json(package.tokenizer),
        **{f"{part}_token": package.tokenizer.piece(index) for part, index in special if index is not None},
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)
