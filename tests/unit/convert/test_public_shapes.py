"""Public state dicts of many shapes give, read here, as a folder and as a wheel, what the mathematics gives."""

import importlib
import json
import logging
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from alone import job_of_one
from public_forward import Shape, State, logits, mixed, random_state
from safetensors.torch import load_file, save_file
from sources import MIXERS, PUBLIC, constructor_arguments, state_dict
from transformers import AutoModelForMaskedLM

from hydra_scale.convert.bare_mixer import read_mixer
from hydra_scale.convert.convert import Options, convert
from hydra_scale.convert.package import Probe
from hydra_scale.convert.public_hydra import read_public, write_public
from hydra_scale.convert.wheel import write_wheel
from hydra_scale.errors import CheckpointError

INF = float("inf")
LENGTHS = (9, 4, 1)
FIRST, SEGMENTS = "bert.encoder.layer.0.layer.mixer.", "bert.embeddings.token_type_embeddings.weight"
SHAPES = {
    "narrow-heads": Shape(headdim=4, d_state=3, d_conv=3),
    "one-head": Shape(headdim=32, d_state=16, d_conv=1, num_layers=1),
    "wide-inside": Shape(expand=3, headdim=16, d_conv=5, num_layers=3, vocab_size=61),
    "not-wider": Shape(expand=1, headdim=2, d_model=10, d_state=1, d_conv=9, vocab_size=40),
    "positions": Shape(positions=16, type_vocab_size=3),
    "positions-pre": Shape(positions=9, prenorm=True, num_layers=5, eps=1e-5),
    "eps": Shape(eps=1e-3),
    "pre": Shape(prenorm=True, d_state=24, vocab_size=8, type_vocab_size=1, eps=1e-2),
    "groups": Shape(ngroups=2, headdim=4),
    "groups-clamp": Shape(ngroups=4, headdim=8, d_state=5, dt_limit=(0.1, 0.6), prenorm=True),
    "biases": Shape(bias=True, init_states=True),
    "no-conv-bias": Shape(conv_bias=False, dt_limit=(0.0, 0.3)),
    "all": Shape(ngroups=2, bias=True, init_states=True, dt_limit=(0.05, INF), positions=12, num_layers=3, eps=1e-4),
}


def written(shape: Shape, state: State, folder: Path, form: str = "config") -> tuple[Path, tuple[str, ...]]:
    """A file of the state dict, and the settings that it needs. `form`: what the file itself tells, and its format."""
    clamp = [str(bound) if bound < INF else ".inf" for bound in shape.dt_limit]
    settings = [f"model.mixer.ngroups={shape.ngroups}", f"model.mixer.dt_limit=[{', '.join(clamp)}]"]
    if form == "config":
        own = {"ngroups": shape.ngroups, "dt_limit": list(shape.dt_limit)}
        distinct = {name: tensor.clone() for name, tensor in state.items()}
        save_file(distinct, folder / "public.safetensors", metadata={"config": json.dumps(shape.config | own)})
        return folder / "public.safetensors", ()
    torch.save({"state": {"model": {f"model.{n}": t for n, t in state.items()}, "rank": 0}}, folder / "public.pt")
    return folder / "public.pt", (*settings, f"model.embedding_norm_eps={shape.eps}")


def rows_of(shape: Shape) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(0, shape.vocab_size, (length,), generator=draw) for length in LENGTHS]


def assert_near(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-10) -> None:
    assert found.shape == expected.shape
    assert (found.double() - expected).norm() < tolerance * expected.norm()


def padded(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(rows, batch_first=True),
        "attention_mask": pad([torch.ones_like(row) for row in rows], batch_first=True),
    }


@pytest.mark.parametrize("golden", PUBLIC, ids=lambda path: path.stem)
def test_the_mathematics_is_that_of_the_public_class(golden: Path) -> None:
    values = load_file(golden)
    shape = Shape(d_model=32, num_layers=3, vocab_size=64, d_state=8, prenorm="prenorm" in golden.stem)
    for ids, expected in list(zip(values["input_ids"], values["logits"], strict=True))[:2]:
        assert_near(logits(state_dict(golden), ids, shape), expected)


@pytest.mark.parametrize("golden", [path for path in MIXERS if "long" not in path.stem], ids=lambda path: path.stem)
def test_the_mathematics_is_that_of_the_public_mixer(golden: Path) -> None:
    values, arguments = load_file(golden), constructor_arguments(golden)
    told = json.loads(arguments.get("ngroups", "1")), tuple(json.loads(arguments.get("dt_limit", "[0.0, Infinity]")))
    for u, expected in list(zip(values["input"], values["output"], strict=True))[:1]:
        assert_near(mixed(state_dict(golden), u, *told), expected)


@pytest.mark.parametrize("golden", PUBLIC, ids=lambda path: path.stem)
def test_a_recorded_computation_is_read_as_it_is(golden: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Parameters beside gradients, inputs and outputs, with the configuration in the metadata."""
    values = load_file(golden)
    with job_of_one(), caplog.at_level(logging.INFO, "hydra_scale"):
        package = read_public(golden)
        for ids, row in zip(values["input_ids"], values["logits"], strict=True):
            assert_near(package.run(Probe(ids[None], (len(ids),)), "logits")[0], row)
    assert "tensors are parameters, the other" in caplog.text and "does not tell" not in caplog.text


@pytest.mark.parametrize("golden", MIXERS, ids=lambda path: path.stem)
def test_a_recorded_mixer_is_read_as_it_is(golden: Path) -> None:
    values = load_file(golden)
    assert_near(read_mixer(golden).build()(values["input"]), values["output"])


@pytest.mark.parametrize("form", ["config", "composer"])
@pytest.mark.parametrize("name", SHAPES)
def test_logits_of_every_form(name: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape, state = SHAPES[name], random_state(SHAPES[name])
    source, settings = written(shape, state, tmp_path, form)
    rows = rows_of(shape)
    expected = [logits(state, row, shape) for row in rows]
    batch = padded(rows)
    with job_of_one():
        package = read_public(source, settings)
        for found, row in zip(package.run(Probe(batch["input_ids"], LENGTHS), "logits"), expected, strict=True):
            assert_near(found, row)
    convert("public-hydra", "huggingface", source, tmp_path / "folder", Options(settings=settings))
    folder = AutoModelForMaskedLM.from_pretrained(tmp_path / "folder", trust_remote_code=True, dtype="auto").eval()
    write_wheel(package, tmp_path / "wheel", "an_encoder", "1")
    with zipfile.ZipFile(next((tmp_path / "wheel").iterdir())) as archive:
        archive.extractall(tmp_path / "site")
    monkeypatch.syspath_prepend(tmp_path / "site")
    for module in [module for module in sys.modules if module.partition(".")[0] == "an_encoder"]:
        monkeypatch.delitem(sys.modules, module)
    wheel = importlib.import_module("an_encoder").load(device="cpu")
    for found in (folder(**batch).logits, wheel.logits(**batch)):
        for row, alone in zip(found, expected, strict=True):
            assert_near(row[: len(alone)], alone)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("name", SHAPES)
def test_written_back_equal_or_refused(name: str, suffix: str, tmp_path: Path) -> None:
    """Names, types and bits; what the public class cannot be told is refused, for it would compute something else."""
    shape, state = SHAPES[name], random_state(SHAPES[name])
    source, _ = written(shape, state, tmp_path)
    target = tmp_path / f"back{suffix}"
    if not shape.expressible:
        with pytest.raises(CheckpointError, match=r"model\.mixer\.\w+ is .*: the public masked language model has "):
            convert("public-hydra", "public-hydra", source, target)
        return
    convert("public-hydra", "public-hydra", source, target)
    back = load_file(target) if suffix == ".safetensors" else torch.load(target, weights_only=True)
    assert back.keys() == state.keys()
    for tensor in state:
        assert back[tensor].dtype == state[tensor].dtype and torch.equal(back[tensor], state[tensor]), tensor
    if suffix == ".safetensors":
        assert constructor_arguments(target).keys() >= {"config"}
        told = json.loads(constructor_arguments(target)["config"])
        assert told == shape.config


@pytest.mark.parametrize("name", SHAPES)
def test_a_mixer_of_every_shape(name: str, tmp_path: Path) -> None:
    shape, state = SHAPES[name], random_state(SHAPES[name])
    source, _ = written(shape, state, tmp_path)
    convert("public-hydra", "mixer", source, tmp_path / "layer.safetensors")
    mixer = {n.removeprefix(FIRST): t for n, t in state.items() if n.startswith(FIRST)}
    back = load_file(tmp_path / "layer.safetensors")
    assert back.keys() == mixer.keys() and all(torch.equal(back[n], t) for n, t in mixer.items())
    torch.save(mixer, tmp_path / "bare.pt")
    settings = tuple(setting for setting in written(shape, state, tmp_path, "composer")[1] if "mixer" in setting)
    u = torch.randn(11, shape.d_model, dtype=torch.float64)
    for path, given in ((tmp_path / "layer.safetensors", ()), (tmp_path / "bare.pt", settings)):
        assert_near(read_mixer(path, given).build()(u[None])[0], mixed(mixer, u, shape.ngroups, shape.dt_limit))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_with_one_parameter_in_fp32(dtype: torch.dtype, tmp_path: Path) -> None:
    """As the public class is under dtype=...: all in 16 bits but D."""
    shape = Shape()
    state = {n: t.float() if n.endswith(".D") else t.to(dtype) for n, t in random_state(shape).items()}
    source, _ = written(shape, state, tmp_path)
    rows = rows_of(shape)
    convert("public-hydra", "huggingface", source, tmp_path / "folder")
    convert("huggingface", "public-hydra", tmp_path / "folder", tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    assert all(back[n].dtype == t.dtype and torch.equal(back[n], t) for n, t in state.items())
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "folder", trust_remote_code=True).eval()
    assert torch.equal(model.hydra.encoder.layers[0].mixer.D, state["bert.encoder.layer.0.layer.mixer.D"])
    model = model.double()
    for row, alone in zip(model(**padded(rows)).logits, rows, strict=True):
        assert_near(row[: len(alone)], logits(state, alone, shape))


@pytest.mark.parametrize(
    "prefix", ["", "model.", "module.", "model.module.", "module.model.", "state.model.model.", "_orig_mod.model."]
)
def test_prefixes_of_wrappers(prefix: str, tmp_path: Path) -> None:
    state = random_state(Shape())
    prefixed = {f"{prefix}{name}": tensor for name, tensor in state.items()}
    save_file({name: tensor.clone() for name, tensor in prefixed.items()}, tmp_path / "flat.safetensors")
    found = [read_public(tmp_path / "flat.safetensors")]
    for number, content in enumerate(
        (prefixed, {"model": prefixed}, {"state_dict": prefixed, "epoch": 3}, {"state": {"model": prefixed}})
    ):
        torch.save(content, tmp_path / f"{number}.pt")
        found.append(read_public(tmp_path / f"{number}.pt"))
    loop: dict[str, object] = {}
    loop["model"] = loop
    torch.save(loop, tmp_path / "loop.pt")
    with pytest.raises(CheckpointError, match=r"loop\.pt: holds no named tensors"):
        read_public(tmp_path / "loop.pt")
    for package in found:
        assert package.parameters.keys() == found[0].parameters.keys()
        assert torch.equal(package.parameters["head.bias"], state["cls.predictions.decoder.bias"])


def test_one_output_matrix_or_two_and_either_name_of_its_bias(tmp_path: Path) -> None:
    state, word = random_state(Shape()), "bert.embeddings.word_embeddings.weight"
    matrix, bias, alias = (f"cls.predictions.{name}" for name in ("decoder.weight", "decoder.bias", "bias"))
    without = {name: tensor for name, tensor in state.items() if name not in (matrix, bias)}
    for extra in ({bias: state[bias]}, {alias: state[bias]}, {bias: state[bias], alias: state[bias]}):
        torch.save(without | extra, tmp_path / "one.pt")
        write_public(read_public(tmp_path / "one.pt"), tmp_path / "two.pt")
        two = torch.load(tmp_path / "two.pt", weights_only=True)
        assert two.keys() == state.keys() and torch.equal(two[matrix], state[word])
        assert torch.equal(two[bias], state[bias])
    for extra, message in (
        ({bias: state[bias], alias: state[bias] + 1}, r"cls\.predictions\.bias: differs from cls.*decoder\.bias"),
        ({bias: state[bias], matrix: state[word] + 1}, r"decoder\.weight: differs from the word embedding"),
        ({bias: state[bias], matrix: state[word].float()}, r"decoder\.weight: differs from the word embedding"),
    ):
        torch.save(without | extra, tmp_path / "differs.pt")
        with pytest.raises(CheckpointError, match=message):
            read_public(tmp_path / "differs.pt")


def test_what_a_file_does_not_tell_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_file({n: t.clone() for n, t in random_state(Shape()).items()}, tmp_path / "silent.safetensors")
    with caplog.at_level(logging.INFO, "hydra_scale"):
        read_public(tmp_path / "silent.safetensors", ["model.mixer.ngroups=2"])
        assert "taken as model.mixer.dt_limit=(0.0, inf), model.embedding_norm_eps=1e-12, give" in caplog.text
        caplog.clear()
        source, _ = written(Shape(), random_state(Shape()), tmp_path)
        read_public(source)
        assert not caplog.text


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"d_state": 2}, r"says d_state: 2, its tensors 4; of several groups say model\.mixer\.ngroups=N"),
        ({"headdim": 16}, "says headdim: 16, its tensors 8"),
        ({"num_hidden_layers": 3}, "says num_hidden_layers: 3, its tensors 2"),
        ({"is_prenorm": True}, "says is_prenorm: True, its tensors False"),
        ({"use_position_embeddings": True}, "says use_position_embeddings: True, its tensors False"),
        ({"vocab_size": 32}, "says vocab_size: 32, its tensors 24"),
        ({"ngroups": 3}, "ngroups is 3; it must divide the 4 heads"),
        ({"layer_norm_eps": "tiny"}, r"embedding_norm_eps: .*, found 'tiny'"),
        ({"matrix_mixer_type": "toeplitz"}, "says matrix_mixer_type: 'toeplitz'; this system has 'hydra' only"),
    ],
)
def test_a_configuration_that_is_not_of_the_tensors(stated: dict[str, object], message: str, tmp_path: Path) -> None:
    state = {n: t.clone() for n, t in random_state(Shape()).items()}
    save_file(state, tmp_path / "odd.safetensors", metadata={"config": json.dumps(Shape().config | stated)})
    with pytest.raises(CheckpointError, match=rf"odd\.safetensors: .*{message}"):
        read_public(tmp_path / "odd.safetensors")


def test_the_vocabulary_may_be_padded(tmp_path: Path) -> None:
    state = {n: t.clone() for n, t in random_state(Shape()).items()}
    save_file(
        state, tmp_path / "padded.safetensors", metadata={"config": json.dumps(Shape().config | {"vocab_size": 19})}
    )
    assert read_public(tmp_path / "padded.safetensors").vocab_size == 24


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cls.predictions.decoder.bias": None}, "lacks 1 of 31 tensors: cls.predictions.decoder.bias"),
        ({"bert.encoder.layer.1.layer.norm.bias": None}, "lacks 1 of 31 tensors: bert.encoder.layer.1.layer.norm"),
        ({f"{FIRST}D": torch.ones(4, dtype=torch.int8)}, "mixer.D holds int8, expected floats"),
        ({"bert.encoder.layer.7.layer.mixer.D": torch.ones(4)}, "has 3 layers, the last numbered 7"),
        ({"bert.pooler.dense.weight": torch.ones(16, 16)}, r"bert\.pooler\.dense\.weight: no counterpart"),
        ({SEGMENTS: None}, f"no tensor {SEGMENTS}"),
        ({f"{FIRST}fc_D.weight": None}, rf"no tensor {FIRST}fc_D"),
        ({"bert.embeddings.position_ids": torch.arange(9).flip(0)}, "position_ids: expected 0, 1, 2"),
    ],
)  # fmt: skip
def test_tensors_are_called_as_in_the_file(
    change: dict[str, torch.Tensor | None], message: str, tmp_path: Path
) -> None:
    state = {n: t for n, t in (random_state(Shape()) | change).items() if t is not None}
    torch.save(state, tmp_path / "odd.pt")
    with pytest.raises(CheckpointError, match=rf"odd\.pt: .*{message}"):
        convert("public-hydra", "public-hydra", tmp_path / "odd.pt", tmp_path / "out.pt")
