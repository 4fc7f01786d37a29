"""Exported folders load with transformers alone, fill masks, embed, train, and are exact under padding."""

import importlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import rows
from safetensors.torch import load_file
from sources import PUBLIC, prepared, state_dict, state_file
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from hydra_scale.convert.convert import convert
from hydra_scale.convert.huggingface import fill_mask
from hydra_scale.convert.tokenizer_json import tokenizer_json
from hydra_scale.data.manifest import read_manifest
from hydra_scale.data.tokenizer import Tokenizer
from hydra_scale.errors import CheckpointError

TOKENIZERS = [
    {"vocab_size": 400},
    {"vocab_size": 300, "model_type": "bpe"},
    {"tokenizer": "bytes"},
    {"tokenizer": "nucleotides"},
]


@pytest.fixture(params=["hydra", "hybrid"])
def exported(request: pytest.FixtureRequest) -> tuple[Path, Path]:
    """A run and its Hugging Face folder."""
    folder = request.getfixturevalue(request.param)
    return folder / "run", folder / "model"


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["fp64", "fp32"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_changes_nothing(exported: tuple[Path, Path], side: str, dtype: torch.dtype, tolerance: float) -> None:
    """A row of a batch gives what it gives alone: logits, and sentence embeddings."""
    model = AutoModelForMaskedLM.from_pretrained(exported[1], trust_remote_code=True, dtype=dtype).eval()
    ids, lengths = torch.randint(5, 400, (3, 40)), (40, 7, 1)
    place = torch.arange(40) if side == "right" else torch.arange(40).flip(0)
    mask = (place < torch.tensor(lengths)[:, None]).long()
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits
        embedded = model.hydra.embed(ids, mask)
        for row in range(3):
            alone = ids[row][mask[row].bool()][None]
            expected = model(input_ids=alone).logits[0]
            torch.testing.assert_close(logits[row][mask[row].bool()], expected, rtol=tolerance, atol=tolerance)
            mean = model.hydra(alone).last_hidden_state[0].mean(0)
            torch.testing.assert_close(embedded[row], mean, rtol=tolerance, atol=tolerance)


def test_works_offline_where_none_of_this_system_is_installed(exported: tuple[Path, Path]) -> None:
    script = (
        "import sys; sys.modules.update(dict.fromkeys(('hydra_kernels', 'hydra_scale', 'megatron', 'deepspeed')));"
        "from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer, pipeline;"
        "t = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True);"
        "m = AutoModelForMaskedLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval();"
        "b = t(['the end', 'a'], padding=True, return_tensors='pt');"
        "p = pipeline('fill-mask', model=sys.argv[1], trust_remote_code=True)('so [MASK] it', top_k=3);"
        "import json; print(json.dumps([m(**b).logits.shape[:2], m.hydra.embed(**b).shape, [g['score'] for g in p]]))"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    command = [sys.executable, "-c", script, str(exported[1])]
    result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, cwd="/", env=environment)
    assert result.returncode == 0, result.stderr
    (rows, _), embeddings, probabilities = json.loads(result.stdout.strip().splitlines()[-1])
    assert (rows, embeddings) == (2, [2, 64])
    assert probabilities == pytest.approx([p for _, p in fill_mask(exported[1], "so [MASK] it")], abs=1e-6)


def test_sequence_classification_trains_and_saves(exported: tuple[Path, Path], tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(exported[1], trust_remote_code=True, num_labels=3)
    trunk = AutoModel.from_pretrained(exported[1], trust_remote_code=True)
    assert torch.equal(model.hydra.embedding.word.weight, trunk.embedding.word.weight)
    ids = torch.randint(5, 400, (4, 20))
    model(input_ids=ids, labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    assert_every_gradient(model)
    several = torch.randint(0, 2, (4, 3)).float()
    output = model.eval()(input_ids=ids, labels=several)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(output.logits, several)
    torch.testing.assert_close(output.loss, expected)
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path, trust_remote_code=True).eval()
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    with pytest.raises(CheckpointError, match="no masked language model head among its"):
        convert("huggingface", "public-hydra", tmp_path, tmp_path / "o.pt")


def test_the_kind_of_problem_decides_the_loss(exported: tuple[Path, Path]) -> None:
    """As in the library: what `problem_type` says, whatever the labels' type and number."""
    functions = torch.nn.functional
    ids, values, several = torch.randint(5, 400, (4, 9)), torch.randn(4, 2), torch.randint(0, 2, (4, 2))
    for kind, labels, loss in (
        ("regression", values, lambda logits: functions.mse_loss(logits, values)),
        ("single_label_classification", several[:, 0], lambda logits: functions.cross_entropy(logits, several[:, 0])),
        (
            "multi_label_classification",
            several,
            lambda logits: functions.binary_cross_entropy_with_logits(logits, several.float()),
        ),
    ):
        model = AutoModelForSequenceClassification.from_pretrained(
            exported[1], trust_remote_code=True, num_labels=2, problem_type=kind
        ).eval()
        output = model(input_ids=ids, labels=labels)
        torch.testing.assert_close(output.loss, loss(output.logits))


def test_vectors_in_the_place_of_ids(exported: tuple[Path, Path]) -> None:
    """What adapters and probes pass, beside a mask; matrices of attention are refused, not left out."""
    mask = torch.tensor([[1] * 9, [1] * 4 + [0] * 5])
    ids = torch.randint(5, 400, (2, 9))
    for kind in (AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoModelForTokenClassification):
        model = kind.from_pretrained(exported[1], trust_remote_code=True).eval()
        words = model.get_input_embeddings()(ids)
        found = model(inputs_embeds=words, attention_mask=mask, output_attentions=False).logits
        torch.testing.assert_close(found, model(input_ids=ids, attention_mask=mask).logits)
        for both in ({}, {"input_ids": ids, "inputs_embeds": words}):
            with pytest.raises(ValueError, match="give input_ids or inputs_embeds, one of the two"):
                model(**both)
        with pytest.raises(ValueError, match="keeps no attention matrices"):
            model(input_ids=ids, output_attentions=True)


def test_the_modelling_file_names_all_others(hydra: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 5.0 copies to its cache what the modelling file names, and not what those name in turn."""
    (package := tmp_path / "copied_by_an_early_release").mkdir()
    (package / "__init__.py").touch()
    text = (hydra / "model" / "modeling_hydra.py").read_text()
    for name in ("modeling_hydra", *re.findall(r"^\s*from\s+\.(\S+)\s+import", text, flags=re.MULTILINE)):
        shutil.copy(hydra / "model" / f"{name}.py", package)
    monkeypatch.syspath_prepend(tmp_path)
    assert importlib.import_module(f"{package.name}.modeling_hydra").HydraForMaskedLM


def test_loaded_weights_are_not_drawn_again(exported: tuple[Path, Path]) -> None:
    """transformers 5.0 initialises every module after loading, and marks the parameters that it loaded."""
    model = AutoModelForMaskedLM.from_pretrained(exported[1], trust_remote_code=True)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    fresh = "head.dense.weight"
    for name, parameter in model.named_parameters():
        parameter._is_hf_initialized = name != fresh
    for module in model.modules():
        model._init_weights(module)
    changed = [name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])]
    assert changed == [fresh]


def test_token_classification_trains(exported: tuple[Path, Path]) -> None:
    model = AutoModelForTokenClassification.from_pretrained(exported[1], trust_remote_code=True, num_labels=5)
    ids, labels = torch.randint(5, 400, (2, 9)), torch.randint(0, 5, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, 4:], labels[1, 4:] = 0, -100
    output = model.eval()(input_ids=ids, attention_mask=mask, labels=labels)
    assert output.logits.shape == (2, 9, 5)
    alone = [model(input_ids=ids[:1]).logits[0], model(input_ids=ids[1:, :4]).logits[0]]
    expected = torch.nn.functional.cross_entropy(torch.cat(alone), torch.cat((labels[0], labels[1, :4])))
    torch.testing.assert_close(output.loss, expected)
    output.loss.backward()
    assert_every_gradient(model)


def test_masked_language_model_and_embeddings_train(exported: tuple[Path, Path]) -> None:
    model = AutoModelForMaskedLM.from_pretrained(exported[1], trust_remote_code=True)
    ids = torch.randint(5, 400, (2, 9))
    states = model(input_ids=ids, labels=ids, output_hidden_states=True)
    assert len(states.hidden_states) == len(model.hydra.encoder.layers) + 1
    states.loss.backward()
    assert_every_gradient(model)
    model.zero_grad()
    model.hydra.embed(ids).square().sum().backward()
    assert model.hydra.embedding.word.weight.grad.abs().sum() > 0


def test_long_rows_are_averaged_in_fp32(exported: tuple[Path, Path]) -> None:
    """In fp16 the sum over 30,000 tokens is beyond the largest number."""
    mean_over_tokens = sys.modules[
        AutoModel.from_pretrained(exported[1], trust_remote_code=True).__module__
    ].mean_over_tokens
    vectors, mask = torch.full((1, 30_000, 2), 3.5).half(), torch.ones(1, 30_000)
    vectors[0, 20_000:], mask[0, 20_000:] = torch.nan, 0
    assert mean_over_tokens(vectors, mask).tolist() == [[3.5, 3.5]]


def test_the_configuration_may_ask_for_tuples(exported: tuple[Path, Path]) -> None:
    ids = torch.randint(5, 400, (2, 9))
    for kind in (AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoModelForTokenClassification):
        model = kind.from_pretrained(exported[1], trust_remote_code=True, return_dict=False).eval()
        assert isinstance(model(ids), tuple) and not isinstance(model(ids, return_dict=True), tuple)
        assert kind is not AutoModel or model.embed(ids).shape == (2, 64)


def test_a_mask_of_another_shape_is_named(exported: tuple[Path, Path]) -> None:
    model = AutoModel.from_pretrained(exported[1], trust_remote_code=True)
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 8\); expected \(2, 9\)"):
        model(torch.zeros(2, 9, dtype=torch.long), torch.ones(2, 8))


def assert_every_gradient(model: torch.nn.Module) -> None:
    """Finite, and not all zero, for every parameter."""
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_what_transformers_saved_converts(hydra: Path, tmp_path: Path) -> None:
    """Fine-tuned and saved by the library, the weights reach the public form bit for bit."""
    model = AutoModelForMaskedLM.from_pretrained(hydra / "model", trust_remote_code=True)
    with torch.no_grad():
        model.hydra.embedding.word.weight.mul_(2)
    model.save_pretrained(tmp_path / "saved")
    convert("huggingface", "public-hydra", tmp_path / "saved", tmp_path / "public.safetensors")
    public = load_file(tmp_path / "public.safetensors")
    for name in ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"):
        assert torch.equal(public[name], model.hydra.embedding.word.weight)


def test_fill_mask_gives_probabilities(exported: tuple[Path, Path]) -> None:
    guesses = fill_mask(exported[1], "so [MASK] it", top=5)
    assert len(guesses) == 5
    assert sorted((p for _, p in guesses), reverse=True) == [p for _, p in guesses]
    with pytest.raises(CheckpointError, match=r"holds no \[MASK\]"):
        fill_mask(exported[1], "nothing to guess")


def test_the_card_has_the_numbers_of_the_run(hydra: Path, data: Path) -> None:
    card = (hydra / "model" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: fill-mask\n")
    for key in ("eval/loss", "eval/masked_accuracy", "eval/unigram_loss", "eval/unigram_accuracy"):
        assert f" {rows(hydra / 'run', key)[-1]:.4f} |" in card
    train = read_manifest(data).splits["train"]
    assert f"{train.documents:,} documents, {train.tokens:,} tokens, source `text`" in card
    assert f"Trained on {rows(hydra / 'run', 'tokens')[-1]:,} tokens" in card
    assert (hydra / "run" / "config.yaml").read_text() in card


def test_a_card_claims_nothing_it_does_not_know(tmp_path: Path) -> None:
    convert("public-hydra", "huggingface", state_file(PUBLIC[0], tmp_path), tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text()
    assert card.count("Not known to the conversion") == 2 and "bert_hydra.safetensors" in card
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert "mask_token_id" not in config  # the public model's tokenizer is not known here


@pytest.mark.parametrize("options", TOKENIZERS, ids=str)
def test_tokenizers_give_the_ids_of_training(prose: Path, tmp_path: Path, options: dict[str, object]) -> None:
    ours = Tokenizer.load(prepared(prose, tmp_path / "data", **options) / "tokenizer")
    twin = tokenizer_json(ours)
    for file in sorted(prose.iterdir()):
        text = file.read_text()
        assert twin.encode(text).ids == ours.encode([ours.normalise(text)])[0].tolist()
        assert twin.decode(twin.encode(text).ids) == ours.decode(ours.encode([ours.normalise(text)])[0])


@pytest.mark.parametrize("options", TOKENIZERS[1:3], ids=["bpe", "bytes"])
def test_any_text_gets_the_ids_of_training(prose: Path, tmp_path: Path, options: dict[str, object]) -> None:
    """2,000 strings of characters from all of Unicode; a unigram model may order ties otherwise, see tokenizer_json."""
    ours = Tokenizer.load(prepared(prose, tmp_path / "data", **options) / "tokenizer")
    twin, draw = tokenizer_json(ours), random.Random(5)
    ranges = [(0x20, 0x7E), (0xA0, 0x24F), (0x300, 0x36F), (0x400, 0x4FF), (0x2000, 0x206F), (0x3040, 0x9FFF),
              (0xAC00, 0xD7A3), (0xFB00, 0xFFFD), (0x1F300, 0x1FAFF)]  # fmt: skip
    for _ in range(2000):
        text = "".join(chr(draw.randint(*draw.choice(ranges))) for _ in range(draw.randint(0, 30)))
        assert twin.encode(text).ids == ours.encode([ours.normalise(text)])[0].tolist(), ascii(text)


def test_the_tokenizer_needs_no_code_of_the_folder(exported: tuple[Path, Path], data: Path) -> None:
    ours, text = Tokenizer.load(data / "tokenizer"), "the end of\ta ﬁne film"
    tokenizer = AutoTokenizer.from_pretrained(exported[1], trust_remote_code=False)
    assert tokenizer(text).input_ids == ours.encode([ours.normalise(text)])[0].tolist()


def test_special_tokens_reach_the_folder(exported: tuple[Path, Path]) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(exported[1])
    assert tokenizer.convert_tokens_to_ids(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]) == [0, 1, 2, 3, 4]
    assert (tokenizer.mask_token_id, tokenizer.pad_token_id) == (4, 0)


@pytest.mark.parametrize("golden", PUBLIC, ids=lambda path: path.stem)
def test_public_logits(golden: Path, tmp_path: Path) -> None:
    """The folder made from a public state dict gives the public implementation's logits, in float64."""
    assert convert("public-hydra", "huggingface", state_file(golden, tmp_path), tmp_path / "model") < 1e-12
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "model", trust_remote_code=True, dtype=torch.float64).eval()
    values = load_file(golden)
    logits = model(input_ids=values["input_ids"]).logits
    assert (logits - values["logits"]).norm() < 1e-10 * values["logits"].norm()
    assert len(model.state_dict()) == len(state_dict(golden))
