"""Parameter counts of the published recipes, initial weights that no layout changes, and the optimizer's groups."""

import math
from pathlib import Path

import pytest
import torch
from alone import job_of_one

from hydra_scale.config import Config, ModelConfig, OptimizerConfig
from hydra_scale.config_file import load_config
from hydra_scale.errors import ConfigError
from hydra_scale.model.build import build_model, parameter_groups, vocab_size_for
from hydra_scale.model.initialise import initialise
from hydra_scale.model.masked_lm import MaskedLanguageModel

CONFIGS = Path(__file__).parents[3] / "configs"


@pytest.mark.parametrize(
    ("name", "count"), [("hydra-base", 112_086_712), ("hydra-large", 334_175_264), ("bert-base", 109_514_298)]
)
def test_published_parameter_counts(name: str, count: int) -> None:
    config = load_config(CONFIGS / f"{name}.yaml")
    with job_of_one(), torch.device("meta"):
        model = MaskedLanguageModel(config.model, vocab_size_for(config, 30_522))
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def small(**changes: object) -> MaskedLanguageModel:
    hybrid = {"d_model": 64, "num_layers": 3, "layer_pattern": "HAM", "position_embedding": "learned"}
    parts = {"attention": {"num_heads": 4}, "mixer": {"headdim": 16, "d_state": 8, "learnable_init_states": True}}
    config = ModelConfig.model_validate(hybrid | parts | changes)
    with job_of_one():
        model = MaskedLanguageModel(config, 128)
        for parameter in model.parameters():
            parameter.data.fill_(math.nan)  # what initialisation misses shows
        initialise(model, config, seed=3)
    return model


def test_initial_weights_have_the_published_distributions() -> None:
    parameters = {name: parameter.detach() for name, parameter in small().named_parameters()}
    assert all(parameter.isfinite().all() for parameter in parameters.values())
    for name in ("embedding.word.weight", "encoder.layers.0.mixer.in_proj.weight", "encoder.layers.1.mixer.qkv.weight",
                 "encoder.layers.2.mixer.up.weight", "head.dense.weight"):  # fmt: skip
        assert parameters[name].std() == pytest.approx(0.02, rel=0.1), name
        assert abs(parameters[name].mean()) < 0.002
    convolution = parameters["encoder.layers.0.mixer.conv1d.weight"]
    assert 0.9 * 7**-0.5 < convolution.abs().max() <= 7**-0.5
    step = torch.nn.functional.softplus(parameters["encoder.layers.0.mixer.dt_bias"])
    assert (step > 0.99e-3).all() and (step < 0.101).all()
    ones = [name for name, p in parameters.items() if p.ndim == 1 and (p == 1).all()]
    assert {name.rpartition(".")[2] for name in ones} == {"D", "weight"}
    zeros = {name.rpartition(".")[2] for name, p in parameters.items() if not p.any()}
    assert zeros == {"bias", "A_log", "init_states"}


def test_initial_weights_depend_on_name_and_seed_alone() -> None:
    one, other = dict(small().named_parameters()), dict(small(num_layers=1, norm_position="pre").named_parameters())
    common = one.keys() & other.keys()
    assert "encoder.layers.0.mixer.in_proj.weight" in common
    assert all(torch.equal(one[name], other[name]) for name in common)


def test_only_matrices_decay() -> None:
    model = small()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, kept = parameter_groups(model, OptimizerConfig(weight_decay=0.1))
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    kept_leaves = {names[id(p)].rpartition(".")[2] for p in kept["params"]}
    assert kept_leaves == {"bias", "weight", "dt_bias", "A_log", "D", "init_states"}
    assert all(
        names[id(p)].endswith(("norm.weight", "conv1d.weight"))
        for p in kept["params"]
        if names[id(p)].endswith("weight")
    )
    assert {"fc_D", "in_proj", "out_proj", "word", "qkv", "up"} <= {
        names[id(p)].split(".")[-2] for p in decayed["params"]
    }
    assert len(decayed["params"]) + len(kept["params"]) == len(names)
    (everything,) = parameter_groups(model, OptimizerConfig(decay="all"))
    assert len(everything["params"]) == len(names)


def test_vocabulary_sizes() -> None:
    config = Config.model_validate({"data": {"train": "x"}})
    assert [vocab_size_for(config, size) for size in (1, 64, 65, 4096)] == [64, 64, 128, 4096]
    fixed = Config.model_validate({"data": {"train": "x"}, "model": {"vocab_size": 100}})
    with pytest.raises(ConfigError, match="model.vocab_size is 100: the tokenizer of data.train has 101 tokens"):
        vocab_size_for(fixed, 101)


def test_kernels_on_a_device_that_cannot_run_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hydra_kernels.triton_language.interpreted", False)
    config = load_config(CONFIGS / "tiny.yaml", ["model.mixer.backend=triton"])
    with job_of_one(), pytest.raises(ConfigError, match=r"model\.mixer\.backend is 'triton' but"):
        build_model(config, 128, torch.device("cpu"))
