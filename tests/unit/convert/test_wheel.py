"""Wheels install with pip and run where nothing of this system is, with the numbers and tokens of their source."""

import base64
import csv
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import time
import zipfile
from email import message_from_bytes
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
from alone import job_of_one
from safetensors.torch import load_file, save_file
from sources import PUBLIC, prepared, state_file
from transformers import AutoModelForMaskedLM
from typer.testing import CliRunner

from hydra_scale.cli import app
from hydra_scale.convert import wheel
from hydra_scale.convert.convert import Options, convert
from hydra_scale.convert.huggingface import fill_mask
from hydra_scale.convert.package import Probe
from hydra_scale.convert.public_hydra import read_public
from hydra_scale.convert.run import read_run
from hydra_scale.convert.wheel import read_wheel, write_wheel
from hydra_scale.data.tokenizer import Tokenizer
from hydra_scale.errors import CheckpointError, ConfigError, EnvironmentFault

TEXTS = [
    "so it is",
    "",
    "  two  spaces\tand a\nnew line ",
    "Ünïcödé ﬁne ①②③",
    "emoji 😀 漢字",
    "a [MASK] spelt out",
    "x" * 300,
]
LENGTHS = (90, 7, 1)
SCRIPT = """
import importlib.abc, json, sys
BLOCKED = {"deepspeed", "megatron", "triton", "transformers", "tokenizers", "hydra_scale", "hydra_kernels", "pydantic"}
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Block())

import torch
from safetensors.torch import load_file, save_file
import golden_post, golden_pre, my_encoder

given = load_file(sys.argv[1])
tensors = {}
for module in (golden_post, golden_pre):
    encoder = module.load(device="cpu")
    tensors[module.__name__] = encoder.logits(given[module.__name__])
    try:
        encoder.tokenize("a")
    except ValueError as error:
        assert "has no tokenizer" in str(error)
    else:
        raise AssertionError("tokenised without a tokenizer")
encoder = my_encoder.load(device="cpu")
tensors["logits"] = encoder.logits(given["input_ids"], given["attention_mask"])
tensors["fp64"] = my_encoder.load(device="cpu", dtype=torch.float64).logits(given["input_ids"], given["attention_mask"])
texts = json.loads(sys.argv[2])
tensors["embeddings"] = encoder.embed(texts, batch_size=3)
tensors["alone"] = torch.cat([encoder.embed([text]) for text in texts])
assert my_encoder.load(device="cpu", dtype=torch.bfloat16).embed([]).dtype == torch.bfloat16
assert 0 < len(encoder.fill_mask("so [MASK] it", top=10**6)) < 10**6
try:
    encoder.embed("letters")
except ValueError as error:
    assert "give a list" in str(error)
else:
    raise AssertionError("embedded letter by letter")
encoder.model(given["input_ids"], given["attention_mask"]).sum().backward()
untouched = [n for n, p in encoder.model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
save_file(tensors, sys.argv[3])
loaded = sorted(BLOCKED & {name.partition(".")[0] for name in sys.modules})
print(json.dumps({"tokens": [encoder.tokenize(text) for text in texts],
                  "fill": encoder.fill_mask("so [MASK] it", top=3), "untouched": untouched, "loaded": loaded}))
"""


@pytest.fixture(scope="module")
def wheels(hydra: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three wheels: both golden files of the public model, and a run."""
    folder = tmp_path_factory.mktemp("wheels")
    for golden, name in zip(PUBLIC, ("golden_post", "golden_pre"), strict=True):
        write_wheel(read_public(state_file(golden, folder)), folder / name, name, "1")
    options = ["--name", "my_encoder", "--package-version", "1.02"]
    arguments = ["convert", "--from", "run", "--to", "wheel", hydra / "run", folder / "my_encoder", *options]
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert float(re.search(r"written; outputs differ from the source by (\S+) ", result.output)[1]) < 1e-5
    return folder


@pytest.fixture(scope="module")
def installed(wheels: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, Any]]:
    """What went into the installed packages in another Python, and the tensors and values that came out."""
    files = sorted(str(path) for path in wheels.glob("*/*.whl"))
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-index",
        "--no-deps",
        "--target",
        str(wheels / "site"),
    ]
    subprocess.run([*pip, *files], check=True, env=os.environ | {"PYTHONPATH": ""})
    ids = torch.randint(5, 400, (len(LENGTHS), max(LENGTHS)), generator=torch.Generator().manual_seed(1))
    given = {"input_ids": ids, "attention_mask": Probe(ids, LENGTHS).attention_mask}
    given |= {n: load_file(g)["input_ids"] for g, n in zip(PUBLIC, ("golden_post", "golden_pre"), strict=True)}
    save_file(given, wheels / "given")
    command = [sys.executable, "-c", SCRIPT, str(wheels / "given"), json.dumps(TEXTS), str(wheels / "outputs")]
    environment = os.environ | {"PYTHONPATH": str(wheels / "site"), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/", env=environment)
    assert result.returncode == 0, result.stderr
    return given, load_file(wheels / "outputs"), json.loads(result.stdout)


def test_public_logits(installed: Any) -> None:
    """float64, 1e-10 from the public implementation's."""
    _, found, values = installed
    assert values["loaded"] == []
    for golden, name in zip(PUBLIC, ("golden_post", "golden_pre"), strict=True):
        expected = load_file(golden)["logits"]
        assert (found[name] - expected).norm() < 1e-10 * expected.norm()


def test_numbers_of_the_run(installed: Any, hydra: Path) -> None:
    given, found, values = installed
    assert values["untouched"] == []
    with job_of_one():
        expected = read_run(hydra / "run").run(Probe(given["input_ids"], LENGTHS), "logits")
    for row, logits in enumerate(expected):
        torch.testing.assert_close(found["logits"][row, : LENGTHS[row]], logits, rtol=1e-5, atol=1e-5)
    model = AutoModelForMaskedLM.from_pretrained(hydra / "model", trust_remote_code=True, dtype=torch.float64).eval()
    folder = model(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).logits
    torch.testing.assert_close(found["fp64"], folder, rtol=1e-10, atol=1e-10)


def test_tokens_of_the_training(installed: Any, hydra: Path) -> None:
    tokenizer = Tokenizer.load(hydra / "run" / "tokenizer")
    expected = [tokenizer.encode([tokenizer.normalise(text)])[0].tolist() for text in TEXTS]
    assert installed[2]["tokens"] == expected


def test_embeddings_and_masks(installed: Any, hydra: Path) -> None:
    """A text embedded among others is as alone, and as the folder embeds its tokens; masks are filled as there."""
    _, found, values = installed
    torch.testing.assert_close(found["embeddings"], found["alone"], rtol=1e-5, atol=1e-6)
    model = AutoModelForMaskedLM.from_pretrained(hydra / "model", trust_remote_code=True).eval()
    for tokens, vector in zip(values["tokens"], found["embeddings"], strict=True):
        torch.testing.assert_close(model.hydra.embed(torch.tensor([tokens]))[0], vector, rtol=1e-5, atol=1e-6)
    expected = fill_mask(hydra / "model", "so [MASK] it")
    assert [p for _, p in values["fill"]] == pytest.approx([p for _, p in expected], abs=1e-6)
    for (word, _), (twin, _) in zip(values["fill"], expected, strict=True):
        assert word == twin or not twin or twin.startswith("[")  # nothing to show is shown as the piece itself


@pytest.mark.parametrize("kind", ["bytes", "nucleotides"])
def test_other_tokenizers_travel_too(kind: str, prose: Path, hydra: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(prepared(prose, tmp_path / "data", tokenizer=kind) / "tokenizer")
    package = read_run(hydra / "run")
    package = type(package)(package.model, package.parameters, tokenizer, package.origin)
    write_wheel(package, tmp_path / "out", "other", "1")
    back = read_wheel(tmp_path / "out")
    assert back.tokenizer is not None and back.tokenizer.sha256 == tokenizer.sha256
    assert back.origin == package.origin


def test_the_same_source_gives_the_same_bytes(wheels: Path, hydra: Path, tmp_path: Path) -> None:
    path = wheels / "my_encoder" / "my_encoder-1.2-py3-none-any.whl"
    time.sleep(max(0.0, path.stat().st_mtime + 2 - time.time()))  # the clock of zip files ticks every 2 seconds
    write_wheel(read_run(hydra / "run"), tmp_path / "again", "my_encoder", "1.2")
    assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_record_and_metadata(wheels: Path, hydra: Path) -> None:
    with zipfile.ZipFile(wheels / "my_encoder" / "my_encoder-1.2-py3-none-any.whl") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
        assert {member.date_time for member in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    record = members["my_encoder-1.2.dist-info/RECORD"].decode()
    listed = {name: (digest, size) for name, digest, size in csv.reader(io.StringIO(record))}
    assert listed.keys() == members.keys()
    for name, content in members.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        expected = ("", "") if name.endswith("RECORD") else (f"sha256={digest}", str(len(content)))
        assert listed[name] == expected
    metadata = message_from_bytes(members["my_encoder-1.2.dist-info/METADATA"])
    needs = {need.split(">")[0] for need in metadata.get_all("Requires-Dist") or ()}
    assert needs == {"torch", "safetensors", "numpy", "sentencepiece"}
    assert (metadata["Name"], metadata["Version"]) == ("my_encoder", "1.2")
    assert (hydra / "run" / "config.yaml").read_text() in members["my_encoder-1.2.dist-info/METADATA"].decode()


@pytest.mark.parametrize(
    "name", ["My", "a-b", "9a", "a__b", "a_", "class", "json", "torch", "transformers", "../a", ""]
)
def test_names_that_cannot_be_imported_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--name .*: (expected lower-case|is the name of another package)"):
        convert("run", "wheel", tmp_path, tmp_path / "o", Options(name=name))


def test_mistakes_are_named(wheels: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give the name of the package to build as --name my_encoder"):
        convert("run", "wheel", tmp_path, tmp_path / "o")
    with pytest.raises(ConfigError, match="--package-version one: not a version of a Python package"):
        convert("run", "wheel", tmp_path, tmp_path / "o", Options(name="a", version="one"))
    whole = (wheels / "my_encoder" / "my_encoder-1.2-py3-none-any.whl").read_bytes()
    (tmp_path / "cut.whl").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"cut.whl: not a wheel"):
        convert("wheel", "public-hydra", tmp_path / "cut.whl", tmp_path / "o.pt")
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as archive:
        archive.writestr("other/__init__.py", "")
    with pytest.raises(CheckpointError, match=r"other.whl: holds no exported encoder"):
        convert("wheel", "public-hydra", tmp_path / "other.whl", tmp_path / "o.pt")


def test_a_checkout_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(wheel, "requires", absent)
    with pytest.raises(EnvironmentFault, match="without being installed, .* run `pip install --editable .` where"):
        convert("public-hydra", "wheel", state_file(PUBLIC[0], tmp_path), tmp_path / "o", Options(name="a"))
    assert not (tmp_path / "o").exists()
