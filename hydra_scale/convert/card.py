"""The model card: what the source told about itself, and nothing else."""

from typing import Any

from hydra_scale.convert.package import EncoderPackage

_USE = """```python
from transformers import AutoModelForMaskedLM, AutoTokenizer, pipeline

tokenizer = AutoTokenizer.from_pretrained("FOLDER", trust_remote_code=True)
model = AutoModelForMaskedLM.from_pretrained("FOLDER", trust_remote_code=True)
pipeline("fill-mask", model=model, tokenizer=tokenizer)("... [MASK] ...")
model.hydra.embed(**tokenizer(["a sentence", "another"], padding=True, return_tensors="pt"))  # mean over the tokens
```

The code that `trust_remote_code` runs is in this folder: `modeling_hydra.py`, `encoder_hydra.py` and the PyTorch
operations they import. AutoModel, AutoModelForSequenceClassification and AutoModelForTokenClassification load too."""

_EVALUATION_ROWS = (
    ("masked loss", "eval/loss", "eval/unigram_loss"),
    ("masked accuracy", "eval/masked_accuracy", "eval/unigram_accuracy"),
)


def front_matter() -> str:
    """The head of a card that model hubs read."""
    return "---\nlibrary_name: transformers\npipeline_tag: fill-mask\ntags:\n- hydra\n- fill-mask\n---\n"


def card(package: EncoderPackage, use: str = _USE) -> str:
    """Markdown: what it is, how to use it, data, training, evaluation; sections whose facts are unknown say so."""
    num_parameters = sum(tensor.numel() for tensor in package.parameters.values())
    kinds = package.model.layer_kinds
    names = (("H", "Hydra"), ("A", "attention"), ("M", "MLP"))
    layers = ", ".join(f"{kinds.count(kind)} {name}" for kind, name in names if kind in kinds)
    if package.tokenizer is not None:
        use = use.replace("[MASK]", package.tokenizer.piece(package.tokenizer.special.mask))
    return f"""# Hydra encoder, {num_parameters:,} parameters

A bidirectional state space encoder (Hydra) trained by masked language modelling: {layers} layers of width
{package.model.d_model}, {package.vocab_size:,} rows of vocabulary. Padding in a batch does not change any result.

{use}

## Training data

{_data(package.origin)}

## Evaluation

{_evaluation(package.origin)}

## Training

{_training(package.origin)}
"""


def _data(origin: dict[str, Any]) -> str:
    data = origin.get("data")
    if not data:
        return "Not known to the conversion that wrote this card."
    text = f"Prepared folder `{data['folder']}`, fingerprint `{data['fingerprint']}`"
    if "documents" in data:
        text += f": {data['documents']:,} documents, {data['tokens']:,} tokens, source `{data['source']}`"
    return f"{text}. Trained on {origin['tokens']:,} tokens, repetitions included."


def _evaluation(origin: dict[str, Any]) -> str:
    row = origin.get("evaluation")
    if not row:
        return "Not known to the conversion that wrote this card."
    lines = [
        f"On held-out documents at step {row['step']:,}, masked tokens only:",
        "",
        "| | model | unigram baseline |",
    ]
    lines.append("|---|---|---|")
    lines += [f"| {name} | {row[ours]:.4f} | {row[baseline]:.4f} |" for name, ours, baseline in _EVALUATION_ROWS]
    return "\n".join(lines)


def _training(origin: dict[str, Any]) -> str:
    facts = [f"- {key}: {value}" for key, value in origin.items() if key not in ("config", "data", "evaluation")]
    text = "\n".join(facts) or "Not known to the conversion that wrote this card."
    return f"{text}\n\n```yaml\n{origin['config']}```" if "config" in origin else text
