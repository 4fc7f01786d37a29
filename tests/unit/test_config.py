"""Configuration files: precedence, round trip, and the error of each kind of mistake."""

from pathlib import Path

import pytest
import yaml

from hydra_scale.config import Config
from hydra_scale.config_file import dump_config, load_config
from hydra_scale.errors import ConfigError

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configurations_parse_and_round_trip(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    assert load_config(write(tmp_path, dump_config(config))) == config


def test_defaults_then_file_then_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, "data: {train: x, seqlen: 64}\noptimizer: {lr: 1e-3}\n")
    config = load_config(path, ["data.seqlen=32", "model.mixer.dt_limit=[0.0, 5.0]", "optimizer.clip_norm=null"])
    assert (config.data.seqlen, config.optimizer.lr, config.training.seed) == (32, 1e-3, 1)
    assert config.model.mixer.dt_limit == (0.0, 5.0)
    assert config.optimizer.clip_norm is None


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("data: {train: x}\ntraining:\n  stepss: 5\n", [], ":3: unknown key training.stepss; did you mean training."),
        ("data: {train: x}\n", ["model.mixer.dstate=3"], "did you mean model.mixer.d_state?"),
        ("data: {train: x}\ntraining:\n  steps: many\n", [], ":3: training.steps: found 'many'"),
        ("data: {train: x}\n", ["optimizer.lr=-1"], "optimizer.lr: found -1; input should be greater than 0"),
        ("data: {train: x}\n", ["optimizer.lr=.nan"], "optimizer.lr: found nan"),
        ("data: {train: x}\n", ["watchdog.step=0.005"], "watchdog.step: found 0.005; input should be greater than or"),
        ("data: {train: x}\n", ["optimizer.lr=yes"], "optimizer.lr: found True; expected a number"),
        ("data: {train: x}\n", ["numerics.check_replicas_every=true"], "found True; expected a number"),
        ("data: {train: x}\ndata: {train: y}\n", [], ":2: data is given twice, first at"),
        ("data: {train: x}\n", ["model.mixer.d_conv=4"], "d_conv is 4; a centred convolution needs an odd number"),
        ("data: {train: x}\n", ["model.d_model=100"], "mixer.headdim is 64; it must divide expand * d_model = 200"),
        ("data: {train: x}\n", ["schedule.warmup_steps=5000"], "schedule.warmup_steps is 5000; at most training.steps"),
        ("schedule: {warmup_steps: 9}\ndata: {train: x}\n", ["training.steps=5"], "override 'training.steps=5': sched"),
        ("model:\n  mixer:\n    dt_min: 1\ndata: {train: x}\n", [], ":3: model.mixer: dt_min is 1, above dt_max"),
        ("data: {train: x}\n", ["data.mask_rate=[[0, 1], [0, 0]]"], "override 'data.mask_rate=[[0, 1], [0, 0]]': data"),
        ("data: {train: x}\n", ["model.mixer.dt_min=1"], "model.mixer: dt_min is 1, above dt_max 0.1"),
        ("data: {train: x}\n", ["model.mixer.dt_limit=[0.5, 0.1]"], "dt_limit is [0.5, 0.1]; expected the smallest"),
        ("data: {train: x}\n", ["model.mixer.dt_limit=[.nan, .nan]"], "dt_limit is [nan, nan]; expected"),
        ("data: {train: x}\n", ["model.layer_pattern=M", "model.mlp.expansion=0.0001"], "expansion is 0.0001; times"),
        ("data: {train: x}\n", ["model.mlp.expansion=.inf"], "mlp.expansion: found inf; input should be a finite"),
        ("data: {train: x}\n", ["schedule.kind=wsd", "schedule.decay_steps=950"], "decay_steps is 950; at most"),
        ("data: {train: x}\n", ["checkpoint.fetch=true"], "checkpoint: fetch is true and upload is absent"),
        ("data: {train: x}\n", ["training.steps=99999999999999999999"], "training.steps: found 99999999999999999999"),
        ("data: {train: x}\n", ["checkpoint.keep=1"], "checkpoint.keep: found 1"),
        ("data: {train: x}\n", ["zero.buckets=3"], "unknown key zero.buckets"),
        ("data: {train: x}\n", ["zeor.stage=3"], "override 'zeor.stage=3': unknown key zeor; did you mean zero"),
        ("data: {train: x}\n", ["seqlen"], "override 'seqlen': expected the form section.key=value"),
        ("training: {steps: 3}\n", [], "data is missing"),
        ("- a\n- b\n", [], "found a list at the top"),
        ("a: [1, 2\n", [], "not valid YAML"),
        ("a: !!python/object/apply:os.getcwd []\n", [], "not valid YAML"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_that_names_it(tmp_path: Path, text: str, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, text), overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.train=[{pat: x}]", "data.train.0.path is missing"),
        ("data.train=[{path: x, weight: 0}]", "data.train.0.weight: found 0"),
        ("data.train=[]", "data.train: found []"),
        ("data.train=5", "data.train: found 5"),
        ("data.mask_rate=1.5", "data.mask_rate: found 1.5"),
        ("data.mask_rate=[[0, 2]]", "data.mask_rate.0.1: found 2"),
        ("data.mask_rate=[[5, 0.1], [3, 0.2]]", "mask_rate has the steps [5, 3]; expected ascending ones"),
    ],
)
def test_of_two_forms_the_error_is_about_the_one_that_was_meant(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, "data: {train: x}\n"), [override])
    assert message in str(caught.value)


def test_several_folders_survive_a_round_trip(tmp_path: Path) -> None:
    overrides = ["data.train=[{path: a, weight: 2}, {path: b}]", "data.mask_rate=[[0, 0.4], [9, 0.2]]"]
    config = load_config(write(tmp_path, "data: {train: x}\n"), overrides)
    assert [(source.path, source.weight) for source in config.data.sources] == [("a", 2.0), ("b", 1.0)]
    assert load_config(write(tmp_path, dump_config(config))) == config


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot be read"):
        load_config(tmp_path / "nowhere.yaml")


def test_every_setting_is_documented() -> None:
    def undocumented(schema: dict, path: str = "") -> list[str]:
        found = []
        for name, prop in schema.get("properties", {}).items():
            reference = prop.get("$ref") or next((a.get("$ref") for a in prop.get("allOf", [])), None)
            if reference is None and "description" not in prop:
                found.append(f"{path}.{name}")
        return found

    schema = Config.model_json_schema()
    missing = [key for name, section in schema["$defs"].items() for key in undocumented(section, name)]
    assert not missing


def test_yaml_of_a_resolved_configuration_is_plain(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "data: {train: x}\n"))
    assert yaml.safe_load(dump_config(config))["model"]["mixer"]["dt_limit"] == [0.0, float("inf")]
