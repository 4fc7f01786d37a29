"""What keeps layers from being CUDA graphs is told; tests/gpu/test_cuda_graphs.py runs them."""

import pytest
import torch
from runs import TINY

from hydra_scale.config import Config
from hydra_scale.config_file import load_config
from hydra_scale.model.captured import why_not_captured


def config(*settings: str) -> Config:
    return load_config(TINY, ["data.train=unused", *settings])


@pytest.mark.parametrize(
    "setting",
    ["zero.stage=2", "training.precision=bf16", "model.layer_pattern=HM", "parallel.tensor=2", "parallel.context=2"],
)
def test_nothing_keeps_packed_hydra_layers_on_a_gpu(setting: str) -> None:
    assert why_not_captured(config(setting), torch.device("cuda")) is None


@pytest.mark.parametrize(
    ("setting", "word"),
    [
        ("training.cuda_graphs=false", "cuda_graphs"),
        ("data.packing=false", "packing"),
        ("model.layer_pattern=HA model.attention.num_heads=4", "attention"),
        ("model.mixer.learnable_init_states=true", "initial states"),
        ("model.mixer.backend=torch", "backend"),
        ("parallel.tensor=2 parallel.context=2", "both heads and tokens"),
        ("parallel.context=2 parallel.exchange=heads", "other ranks' tokens"),
        ("zero.stage=3", "ZeRO 3"),
    ],
)
def test_what_does_is_named(setting: str, word: str) -> None:
    assert word in str(why_not_captured(config(*setting.split()), torch.device("cuda")))
    assert why_not_captured(config(*setting.split()), torch.device("cpu")) == "the device is no GPU"
