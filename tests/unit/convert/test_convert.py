"""Every pair of forms: weights come back bit for bit, what does not agree is not published, mistakes are named."""

import datetime
import fractions
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from alone import job_of_one
from ranks import run_ranks
from runs import train, weights
from safetensors.torch import load_file, save_file
from sources import MIXERS, PUBLIC, constructor_arguments, prepared, state_dict, state_file
from typer.testing import CliRunner

import hydra_scale.convert
from hydra_scale.cli import app
from hydra_scale.convert import convert as rooms
from hydra_scale.convert import public_hydra
from hydra_scale.convert.convert import SOURCES, TARGETS, Options, convert
from hydra_scale.convert.public_hydra import read_public
from hydra_scale.errors import CheckpointError, ConfigError, EnvironmentFault


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("golden", PUBLIC, ids=lambda path: path.stem)
def test_public_to_each_form_and_back(golden: Path, tmp_path: Path) -> None:
    source = state_file(golden, tmp_path)
    convert("public-hydra", "huggingface", source, tmp_path / "folder")
    convert("huggingface", "wheel", tmp_path / "folder", tmp_path / "wheel", Options(name="encoder"))
    convert("wheel", "public-hydra", tmp_path / "wheel", tmp_path / "flat.pt")
    convert("public-hydra", "public-hydra", tmp_path / "flat.pt", tmp_path / "back.safetensors")
    assert_equal(load_file(tmp_path / "back.safetensors"), state_dict(golden))


def test_16_bit_weights_are_stored_as_they_came(tmp_path: Path) -> None:
    halves = {name: tensor.bfloat16() for name, tensor in state_dict(PUBLIC[0]).items()}
    torch.save(halves, tmp_path / "halves.pt")
    assert convert("public-hydra", "huggingface", tmp_path / "halves.pt", tmp_path / "folder") < 1e-5
    assert '"dtype": "bfloat16"' in (tmp_path / "folder" / "config.json").read_text()
    convert("huggingface", "public-hydra", tmp_path / "folder", tmp_path / "back.safetensors")
    assert_equal(load_file(tmp_path / "back.safetensors"), halves)


def test_16_bit_weights_are_widened_in_graphs(tmp_path: Path) -> None:
    """docs/convert.md; that of ONNX is verified as it is written."""
    torch.save({name: tensor.bfloat16() for name, tensor in state_dict(PUBLIC[0]).items()}, tmp_path / "halves.pt")
    convert("public-hydra", "torch-export", tmp_path / "halves.pt", tmp_path / "graph.pt2")
    weights = torch.export.load(tmp_path / "graph.pt2").state_dict
    assert weights and {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert convert("public-hydra", "onnx", tmp_path / "halves.pt", tmp_path / "graph.onnx") < 1e-4


def test_composer_checkpoint(tmp_path: Path) -> None:
    """As trainers write it: a prefix on every name, clocks and states of generators beside the weights."""
    public = state_dict(PUBLIC[0])
    rest = {"timestamp": {"total_wct": datetime.timedelta(hours=1)}, "optimizers": {"AdamW": {"state": {}}}}
    generators = [{"numpy": np.random.RandomState(1).get_state(), "torch": torch.get_rng_state()}]
    model = {f"model.{name}": tensor for name, tensor in public.items()}
    torch.save({"state": {"model": model, **rest}, "rng": generators}, tmp_path / "composer.pt")
    convert("public-hydra", "public-hydra", tmp_path / "composer.pt", tmp_path / "flat.safetensors")
    assert_equal(load_file(tmp_path / "flat.safetensors"), public)
    torch.save(model, tmp_path / "prefixed.pt")
    convert("public-hydra", "public-hydra", tmp_path / "prefixed.pt", tmp_path / "plain.safetensors")
    assert_equal(load_file(tmp_path / "plain.safetensors"), public)


@pytest.mark.parametrize("golden", PUBLIC, ids=lambda path: path.stem)
def test_a_trained_model_has_the_public_names_and_shapes(golden: Path, prose: Path, tmp_path: Path) -> None:
    data = prepared(prose, tmp_path / "data", tokenizer="nucleotides")
    model = ["d_model=32", "num_layers=3", "mixer.d_state=8", "mixer.headdim=8", "mixer.chunk_size=32"]
    model += ["norm_position=pre"] if "prenorm" in golden.stem else []
    overrides = [f"data.train={data}", "training.steps=5", *(f"model.{setting}" for setting in model)]
    run_ranks(1, train, tmp_path / "run", overrides)
    convert("run", "public-hydra", tmp_path / "run", tmp_path / "public.safetensors")
    found = load_file(tmp_path / "public.safetensors")
    assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in state_dict(golden).items()}
    with job_of_one():
        back = read_public(tmp_path / "public.safetensors")
    assert_equal(back.parameters, weights(tmp_path / "run"))


def test_a_certain_checkpoint_of_a_run(hydra: Path, tmp_path: Path) -> None:
    checkpoints = sorted((hydra / "run" / "checkpoints").iterdir())
    assert len(checkpoints) == 3
    for number, checkpoint in enumerate((checkpoints[0], checkpoints[-1])):
        convert("run", "public-hydra", checkpoint, tmp_path / f"{number}.safetensors")
    convert("run", "public-hydra", hydra / "run", tmp_path / "newest.safetensors")
    first, last, newest = (load_file(tmp_path / f"{name}.safetensors") for name in ("0", "1", "newest"))
    assert_equal(newest, last)
    assert not torch.equal(first["bert.embeddings.LayerNorm.bias"], last["bert.embeddings.LayerNorm.bias"])


@pytest.mark.parametrize("golden", MIXERS, ids=lambda path: path.stem)
def test_bare_mixers(golden: Path, tmp_path: Path) -> None:
    """There and back, and with the public class's arguments the public outputs."""
    state, arguments = state_dict(golden), constructor_arguments(golden)
    settings = [f"model.mixer.{name}={arguments[name]}" for name in ("ngroups", "dt_limit") if name in arguments]
    convert(
        "mixer", "mixer", state_file(golden, tmp_path), tmp_path / "told.safetensors", Options(settings=tuple(settings))
    )
    convert("mixer", "mixer", tmp_path / "told.safetensors", tmp_path / "bare.pt")
    assert_equal(torch.load(tmp_path / "bare.pt", weights_only=True), state)
    values = load_file(golden)
    mixer = rooms.read_mixer(tmp_path / "told.safetensors").build()
    assert (mixer(values["input"]) - values["output"]).norm() < 1e-10 * values["output"].norm()


def test_the_mixer_of_a_layer(tmp_path: Path) -> None:
    source, public = state_file(PUBLIC[0], tmp_path), state_dict(PUBLIC[0])
    convert("public-hydra", "mixer", source, tmp_path / "mixer.safetensors", Options(layer=2))
    prefix = "bert.encoder.layer.2.layer.mixer."
    layer = {name.removeprefix(prefix): tensor for name, tensor in public.items() if name.startswith(prefix)}
    assert_equal(load_file(tmp_path / "mixer.safetensors"), layer)


@pytest.mark.parametrize("target", ["public-hydra", "huggingface", "mixer", "wheel"])
def test_what_differs_from_its_source_is_not_published(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One number of one tensor is written a thousandth too large."""
    source = state_file(PUBLIC[0], tmp_path)
    written = tmp_path / "written"

    def slightly_off(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        name = next(name for name in tensors if name.endswith("fc_D.weight"))
        return tensors | {
            name: tensors[name] * (1 + 1e-3 * (torch.arange(tensors[name].numel()) == 0).view_as(tensors[name]))
        }

    from hydra_scale.convert import bare_mixer, exported

    for module, function in ((public_hydra, "write_tensors"), (bare_mixer, "write_tensors")):
        write = getattr(module, function)
        monkeypatch.setattr(module, function, lambda path, t, *rest, write=write: write(path, slightly_off(t), *rest))
    names = exported._exported_names
    monkeypatch.setattr(exported, "_exported_names", lambda parameters: names(slightly_off(parameters)))
    suffix = "" if target in ("huggingface", "wheel") else ".safetensors"
    options = Options(name="encoder") if target == "wheel" else Options()
    with pytest.raises(CheckpointError, match=r"its outputs differ from the source's by \d.*; not published"):
        convert("public-hydra", target, source, written.with_suffix(suffix), options)
    assert {entry.name for entry in tmp_path.iterdir()} == {source.name}


def test_forms_that_do_not_convert_are_named(tmp_path: Path) -> None:
    for source, target, message in (
        ("run", "tflite", "convert --to tflite: not available; choose one of huggingface, wheel, public-hydra"),
        ("huggingface", "run", "convert --to run: not available: only training writes runs; choose one of huggingface"),
        ("torch-export", "mixer", "convert --from torch-export: not available; choose one of run, public-hydra, mixer"),
        *(("mixer", t, f"--from mixer --to {t}: a mixer alone is no encoder; it converts to mixer or torch-export or ")
          for t in TARGETS if t not in ("mixer", "torch-export", "onnx")),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            convert(source, target, tmp_path / "in", tmp_path / "out")


def test_the_help_names_every_form() -> None:
    text = "".join(CliRunner().invoke(app, ["convert", "--help"]).output.split())
    sources, targets = re.search(r"--from<str>(.*?)\[required\]--to<str>(.*?)\[required\]", text).groups()
    assert (set(sources.split("|")), set(targets.split("|"))) == (set(SOURCES), set(TARGETS))


def test_options_that_would_be_ignored_are_refused(tmp_path: Path) -> None:
    for source in set(SOURCES) - {"public-hydra", "mixer"}:
        with pytest.raises(ConfigError, match=f"a {source} knows its settings"):
            convert(source, "public-hydra", tmp_path, tmp_path / "o", Options(settings=("model.norm_eps=1e-6",)))
    for options, message in (
        (Options(name="encoder"), "--name and --package-version belong to --to wheel"),
        (Options(version="1.0"), "--name and --package-version belong to --to wheel"),
        (Options(layer=1), "--layer belongs to the conversion of an encoder --to mixer only"),
    ):
        with pytest.raises(ConfigError, match=message):
            convert("run", "huggingface", tmp_path, tmp_path / "o", options)


def test_settings_the_shapes_do_not_tell(tmp_path: Path) -> None:
    source = state_file(PUBLIC[0], tmp_path)
    with job_of_one():
        assert read_public(source, ["model.mixer.dt_limit=[0.0, 0.5]"]).model.mixer.dt_limit == (0.0, 0.5)
    with pytest.raises(ConfigError, match="unknown key model.mixer.dt_limits; did you mean model.mixer.dt_limit"):
        convert("public-hydra", "huggingface", source, tmp_path / "o", Options(settings=("model.mixer.dt_limits=1",)))
    changed = Options(settings=("model.mixer.dt_limit=[0.0, 0.5]",))
    with pytest.raises(
        CheckpointError, match=r"model.mixer.dt_limit is \(0.0, 0.5\): the public masked language model"
    ):
        convert("public-hydra", "public-hydra", source, tmp_path / "o.pt", changed)
    mixer = state_file(MIXERS[0], tmp_path)
    with pytest.raises(ConfigError, match="'model.d_model=3': the shapes of a mixer tell all but model.mixer.ngroups"):
        convert("mixer", "mixer", mixer, tmp_path / "o.pt", Options(settings=("model.d_model=3",)))


def test_groups_that_shapes_do_not_tell(tmp_path: Path) -> None:
    """Two groups of 4 look like one of 8; metadata tell it, or settings, and what is written says it again."""
    state = state_dict(PUBLIC[0])
    save_file(state, tmp_path / "plain.safetensors")
    save_file(state, tmp_path / "told.safetensors", metadata={"ngroups": "2", "dt_limit": "[0.0, 0.01]"})
    prefixed = {f"model.{name}": tensor for name, tensor in state.items()}
    save_file(prefixed, tmp_path / "prefixed.safetensors", metadata={"ngroups": "2"})
    settings = ("model.mixer.ngroups=2", "model.mixer.dt_limit=[0.0, 0.01]")
    told, given = read_public(tmp_path / "told.safetensors"), read_public(tmp_path / "plain.safetensors", settings)
    assert told.model == given.model
    assert (told.model.mixer.ngroups, told.model.mixer.d_state, told.model.mixer.dt_limit) == (2, 4, (0.0, 0.01))
    assert read_public(tmp_path / "prefixed.safetensors").model.mixer.d_state == 4
    assert read_public(tmp_path / "plain.safetensors").model.mixer.d_state == 8
    assert convert("public-hydra", "huggingface", tmp_path / "told.safetensors", tmp_path / "folder") < 1e-5
    convert("public-hydra", "mixer", tmp_path / "told.safetensors", tmp_path / "mixer.safetensors", Options(layer=1))
    assert rooms.read_mixer(tmp_path / "mixer.safetensors").mixer == told.model.mixer.model_copy(
        update={"chunk_size": 256}
    )


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("bert.embeddings.word_embeddings.weight", torch.zeros(4)),
        ("bert.encoder.layer.0.layer.mixer.fc_D.weight", torch.zeros(4)),
        ("bert.encoder.layer.0.layer.mixer.fc_D.weight", torch.zeros(0, 64)),
        ("bert.encoder.layer.0.layer.mixer.conv1d.weight", torch.zeros(96, 1, 4)),
        ("bert.encoder.layer.0.layer.mixer.conv1d.weight", torch.zeros(96, 7)),
        ("bert.encoder.layer.0.layer.mixer.in_proj.weight", torch.zeros(4, 0)),
    ],
)
def test_shapes_of_no_model_are_named(name: str, tensor: torch.Tensor, tmp_path: Path) -> None:
    state = state_dict(PUBLIC[0])
    assert name in state
    state.pop("cls.predictions.decoder.weight")
    torch.save(state | {name: tensor}, tmp_path / "odd.pt")
    with pytest.raises(CheckpointError, match=r"odd\.pt: not a public Hydra masked language model: "):
        read_public(tmp_path / "odd.pt")
    torch.save({n: t for n, t in state.items() if ".layer." not in n}, tmp_path / "odd.pt")
    with pytest.raises(CheckpointError, match=r"odd\.pt: not a public Hydra masked language model: "):
        read_public(tmp_path / "odd.pt")


def test_sources_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    public = state_dict(PUBLIC[0])
    bias = "bert.encoder.layer.1.layer.norm.bias"
    cases = {
        "other.pt": ({"weight": torch.zeros(1)}, "weight: no counterpart"),
        "list.pt": ([torch.zeros(1)], "holds no named tensors"),
        "untied.pt": (public | {"cls.predictions.decoder.weight": torch.zeros(64, 32)}, "differs from the word embedd"),
        "short.pt": ({n: t for n, t in public.items() if n != bias}, "lacks 1 of 42 tensors: bert.encoder.layer.1"),
        "shape.pt": (public | {bias: torch.zeros(31)}, r"norm.bias has shape \(31,\), expected \(32,\)"),
        "nan.pt": (public | {bias: torch.full((32,), torch.nan)}, "norm.bias holds 32 values that are not finite"),
        "code.pt": ({"weight": fractions.Fraction(1, 3)}, "fractions.Fraction, which could run code"),
    }
    for name, (content, message) in cases.items():
        torch.save(content, tmp_path / name)
        with pytest.raises(CheckpointError, match=message):
            convert("public-hydra", "huggingface", tmp_path / name, tmp_path / "out")
    (tmp_path / "evil.pt").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(CheckpointError, match="cannot be read as tensors"):
        convert("public-hydra", "huggingface", tmp_path / "evil.pt", tmp_path / "out")
    with pytest.raises(CheckpointError, match="not a run folder"):
        convert("run", "huggingface", tmp_path, tmp_path / "out")
    with pytest.raises(CheckpointError, match="not the configuration of an exported model"):
        convert("huggingface", "public-hydra", tmp_path, tmp_path / "out.pt")
    with pytest.raises(CheckpointError, match="found 0 wheels"):
        convert("wheel", "public-hydra", tmp_path, tmp_path / "out.pt")
    assert {entry.name for entry in tmp_path.iterdir()} == {*cases, "evil.pt"}


def test_what_the_public_model_lacks_is_named(hybrid: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="model.layer_pattern has A, M: the public model has only H layers"):
        convert("run", "public-hydra", hybrid / "run", tmp_path / "o.pt")
    with pytest.raises(ConfigError, match="--layer 1: not a Hydra layer of this model; they are 0"):
        convert("run", "mixer", hybrid / "run", tmp_path / "o.pt", Options(layer=1))
    with pytest.raises(ConfigError, match=r"o.bin: the name of the file to write must end in .safetensors or .pt"):
        convert("run", "mixer", hybrid / "run", tmp_path / "o.bin")
    with pytest.raises(ConfigError, match=r"o.onnx: the name of the file to write must end in .pt2"):
        convert("run", "torch-export", hybrid / "run", tmp_path / "o.onnx")
    with pytest.raises(CheckpointError, match="exists already"):
        convert("run", "huggingface", hybrid / "run", hybrid / "model")
    assert not list(tmp_path.iterdir())


def test_transformers_is_needed_for_its_own_form_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = state_file(PUBLIC[0], tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "hydra_scale.convert.huggingface", raising=False)
    monkeypatch.delattr(hydra_scale.convert, "huggingface", raising=False)
    with pytest.raises(EnvironmentFault, match="transformers: not installed; pip install"):
        convert("public-hydra", "huggingface", source, tmp_path / "folder")
    convert("public-hydra", "public-hydra", source, tmp_path / "public.pt")


@pytest.mark.parametrize(
    ("form", "name"),
    [("huggingface", "m"), ("public-hydra", "m.safetensors"), ("public-hydra", "m.pt"), ("torch-export", "m.pt2")],
)
def test_a_place_that_takes_no_files_is_named(form: str, name: str, hydra: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=f"file/{name}: cannot be written: .*; choose another output"):
        convert("run", form, hydra / "run", tmp_path / "file" / name)


def test_written_files_are_as_readable_as_others(hydra: Path, tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    save_file({"a": torch.zeros(1)}, tmp_path / "library.safetensors")
    assert (hydra / "model" / "model.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_the_public_configuration_in_the_metadata_counts(tmp_path: Path) -> None:
    """Its epsilon is used; an activation that this system lacks is refused, not replaced."""
    state = state_dict(PUBLIC[0])
    save_file(state, tmp_path / "eps.safetensors", metadata={"config": json.dumps({"layer_norm_eps": 1e-3})})
    save_file(state, tmp_path / "plain.safetensors")
    assert (
        read_public(tmp_path / "eps.safetensors").model
        == read_public(tmp_path / "plain.safetensors", ["model.embedding_norm_eps=1e-3"]).model
    )
    assert read_public(tmp_path / "plain.safetensors").model.embedding_norm_eps == 1e-12
    save_file(state, tmp_path / "relu.safetensors", metadata={"config": json.dumps({"hidden_act": "relu"})})
    with pytest.raises(CheckpointError, match=r"relu\.safetensors: its configuration says hidden_act: 'relu'; this"):
        read_public(tmp_path / "relu.safetensors")
