"""Exports load with transformers alone, give the source's numbers, exact under padding, and round trips are equal."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from alone import job_of_one
from ranks import run_ranks
from runs import train, weights
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from hydra_data_prep.prepare import PrepareOptions, prepare
from hydra_scale.convert.convert import convert
from hydra_scale.convert.huggingface import fill_mask
from hydra_scale.convert.public_hydra import read_public
from hydra_scale.convert.tokenizer_json import tokenizer_json
from hydra_scale.data.tokenizer import Tokenizer
from hydra_scale.errors import CheckpointError, ConfigError

GOLDEN = sorted((Path(__file__).parents[2] / "golden").glob("bert_hydra*.safetensors"))
HYBRID = [
    "model.layer_pattern=HAM",
    "model.num_layers=3",
    "model.attention.num_heads=4",
    "model.norm=rmsnorm",
    "model.norm_position=pre",
    "model.position_embedding=learned",
    "model.mixer.learnable_init_states=true",
]
TOKENIZERS = [
    {"vocab_size": 400},
    {"vocab_size": 300, "model_type": "bpe"},
    {"tokenizer": "bytes"},
    {"tokenizer": "nucleotides"},
]


def prepared(prose: Path, folder: Path, **options: object) -> Path:
    prepare(PrepareOptions.model_validate({"source": "text", "input": (prose,), "output": folder} | options))
    return folder


@pytest.fixture(scope="module")
def data(prose: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(prose, tmp_path_factory.mktemp("pieces") / "data", vocab_size=400)


@pytest.fixture(scope="module", params=["hydra", "hybrid"])
def exported(request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run and its Hugging Face folder."""
    folder = tmp_path_factory.mktemp(request.param)
    run_ranks(1, train, folder / "run", [f"data.train={data}", *(HYBRID if request.param == "hybrid" else [])])
    assert convert("run", "huggingface", folder / "run", folder / "model") < 1e-5
    return folder / "run", folder / "model"


def test_padding_changes_nothing(exported: tuple[Path, Path]) -> None:
    model = AutoModelForMaskedLM.from_pretrained(exported[1], trust_remote_code=True, dtype=torch.float64).eval()
    ids = torch.randint(5, 400, (3, 40))
    lengths = (40, 7, 1)
    for side in ("right", "left"):
        mask = torch.zeros(3, 40, dtype=torch.long)
        for row, length in enumerate(lengths):
            mask[row, slice(0, length) if side == "right" else slice(40 - length, 40)] = 1
        with torch.no_grad():
            logits = model(input_ids=ids.where(mask.bool(), 0), attention_mask=mask).logits
            for row in range(3):
                alone = model(input_ids=ids[row][mask[row].bool()][None]).logits[0]
                torch.testing.assert_close(logits[row][mask[row].bool()], alone, rtol=1e-10, atol=1e-10)


def test_loads_where_none_of_this_system_is_installed(exported: tuple[Path, Path]) -> None:
    script = (
        "import sys; sys.modules.update(dict.fromkeys(('hydra_kernels', 'hydra_scale', 'megatron', 'deepspeed')));"
        "from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer;"
        "t = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True);"
        "m = AutoModelForMaskedLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval();"
        "b = t(['the end', 'a'], padding=True, return_tensors='pt');"
        "print(tuple(m(**b).logits.shape)[0], tuple(m.hydra.embed(b['input_ids'], b['attention_mask']).shape))"
    )
    command = [sys.executable, "-c", script, str(exported[1])]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/")
    assert result.stdout.split("\n")[-2] == "2 (2, 64)"


def test_classification_head_trains_and_saves(exported: tuple[Path, Path], tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(exported[1], trust_remote_code=True, num_labels=3)
    trunk = AutoModel.from_pretrained(exported[1], trust_remote_code=True)
    assert torch.equal(model.hydra.embedding.word.weight, trunk.embedding.word.weight)
    ids = torch.randint(5, 400, (4, 20))
    model(input_ids=ids, labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    assert all(
        p.grad is not None and p.grad.isfinite().all() for n, p in model.named_parameters() if "segment" not in n
    )
    model.eval().save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path, trust_remote_code=True).eval()
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


def test_fill_mask_gives_probabilities(exported: tuple[Path, Path]) -> None:
    guesses = fill_mask(exported[1], "so [MASK] it", top=5)
    assert len(guesses) == 5
    assert sorted((p for _, p in guesses), reverse=True) == [p for _, p in guesses]
    with pytest.raises(CheckpointError, match=r"holds no \[MASK\]"):
        fill_mask(exported[1], "nothing to guess")


@pytest.mark.parametrize("options", TOKENIZERS, ids=str)
def test_tokenizers_give_the_ids_of_training(prose: Path, tmp_path: Path, options: dict[str, object]) -> None:
    ours = Tokenizer.load(prepared(prose, tmp_path / "data", **options) / "tokenizer")
    twin = tokenizer_json(ours)
    for file in sorted(prose.iterdir()):
        text = file.read_text()
        assert twin.encode(text).ids == ours.encode([ours.normalise(text)])[0].tolist()
        assert twin.decode(twin.encode(text).ids) == ours.decode(ours.encode([ours.normalise(text)])[0])


def test_special_tokens_reach_the_folder(exported: tuple[Path, Path]) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(exported[1])
    assert tokenizer.convert_tokens_to_ids(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]) == [0, 1, 2, 3, 4]
    assert (tokenizer.mask_token_id, tokenizer.pad_token_id) == (4, 0)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_public_weights_to_hugging_face(path: Path, tmp_path: Path) -> None:
    """The folder made from a public state dict gives the public implementation's logits, in float64."""
    golden = load_file(path)
    save_file(
        {n.removeprefix("param."): t for n, t in golden.items() if n.startswith("param.")}, tmp_path / "p.safetensors"
    )
    assert convert("public-hydra", "huggingface", tmp_path / "p.safetensors", tmp_path / "model") < 1e-12
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "model", trust_remote_code=True, dtype=torch.float64).eval()
    output = model(input_ids=golden["input_ids"])
    assert (output.logits - golden["logits"]).norm() < 1e-10 * golden["logits"].norm()


def test_composer_checkpoint_and_back(tmp_path: Path) -> None:
    golden = load_file(GOLDEN[0])
    public = {n.removeprefix("param."): t for n, t in golden.items() if n.startswith("param.")}
    torch.save({"state": {"model": {f"model.{n}": t for n, t in public.items()}}}, tmp_path / "composer.pt")
    convert("public-hydra", "public-hydra", tmp_path / "composer.pt", tmp_path / "flat.safetensors")
    back = load_file(tmp_path / "flat.safetensors")
    assert back.keys() == public.keys()
    assert all(torch.equal(back[name], public[name]) for name in public)


def test_run_to_public_names(data: Path, tmp_path: Path) -> None:
    run_ranks(1, train, tmp_path / "run", [f"data.train={data}", "training.steps=5"])
    convert("run", "public-hydra", tmp_path / "run", tmp_path / "public.safetensors")
    with job_of_one():
        package = read_public(tmp_path / "public.safetensors")
    assert all(torch.equal(package.parameters[name], tensor) for name, tensor in weights(tmp_path / "run").items())


def test_mistakes_are_named(exported: tuple[Path, Path], tmp_path: Path) -> None:
    run, model = exported
    with pytest.raises(ConfigError, match="convert --to onnx: not available; choose one of huggingface, public-hydra"):
        convert("run", "onnx", run, tmp_path / "x")
    with pytest.raises(CheckpointError, match="exists already"):
        convert("run", "huggingface", run, model)
    with pytest.raises(CheckpointError, match="not a run folder"):
        convert("run", "huggingface", tmp_path, tmp_path / "x")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="weight: no counterpart"):
        convert("public-hydra", "huggingface", tmp_path / "other.pt", tmp_path / "x")
    (tmp_path / "evil.pt").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(CheckpointError, match="cannot be read as tensors"):
        convert("public-hydra", "huggingface", tmp_path / "evil.pt", tmp_path / "x")
    assert {entry.name for entry in tmp_path.iterdir()} == {"other.pt", "evil.pt"}
