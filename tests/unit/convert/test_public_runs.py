"""Trained here, used there: what the public class can be is written and comes back equal, the rest is refused."""

import json
from pathlib import Path

import pytest
import torch
from alone import job_of_one
from public_forward import Shape, logits
from ranks import run_ranks
from runs import train, weights
from safetensors.torch import load_file
from sources import constructor_arguments

from hydra_scale.config import MixerConfig, ModelConfig
from hydra_scale.convert.convert import convert
from hydra_scale.convert.package import EncoderPackage
from hydra_scale.convert.public_hydra import read_public, write_public
from hydra_scale.errors import CheckpointError

RUNS = {
    "tiny": ([], Shape(d_model=64, d_state=16, headdim=16)),
    "pre-positions": (
        ["norm_position=pre", "position_embedding=learned", "max_positions=128", "num_layers=3", "type_vocab_size=1"],
        Shape(d_model=64, d_state=16, headdim=16, prenorm=True, positions=128, num_layers=3, type_vocab_size=1),
    ),
    "widths": (
        ["d_model=24", "mixer.expand=3", "mixer.d_state=5", "mixer.headdim=12", "mixer.d_conv=3", "vocab_size=408",
         "embedding_norm_eps=1e-6", "head_norm_eps=1e-12"],
        Shape(d_model=24, expand=3, d_state=5, headdim=12, d_conv=3, eps=1e-6),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_a_run_reaches_the_public_class_and_comes_back(name: str, data: Path, tmp_path: Path) -> None:
    settings, shape = RUNS[name]
    overrides = [f"data.train={data}", "training.steps=5", *(f"model.{setting}" for setting in settings)]
    run_ranks(1, train, tmp_path / "run", overrides)
    convert("run", "public-hydra", tmp_path / "run", tmp_path / "public.safetensors")
    state = load_file(tmp_path / "public.safetensors")
    told = json.loads(constructor_arguments(tmp_path / "public.safetensors")["config"])
    vocab_size = told.pop("vocab_size")
    assert told == {key: value for key, value in shape.config.items() if key != "vocab_size"}
    assert vocab_size == len(state["cls.predictions.decoder.bias"])

    ids = torch.randint(0, vocab_size, (12,))
    with job_of_one():
        package = read_public(tmp_path / "public.safetensors")
        assert package.parameters.keys() == weights(tmp_path / "run").keys()
        for parameter, tensor in weights(tmp_path / "run").items():
            assert torch.equal(package.parameters[parameter], tensor), parameter
        in_fp64 = {parameter: tensor.double() for parameter, tensor in package.parameters.items()}
        model = EncoderPackage(package.model, in_fp64, None, {}).build()
        found = model.logits(OneRow(ids))
    expected = logits(state, ids, shape)
    assert (found - expected).norm() < 1e-10 * expected.norm()


class OneRow:
    """A document as the model's batch, every token masked."""

    def __init__(self, ids: torch.Tensor) -> None:
        self.input_ids = self.targets = ids
        self.position_ids = self.token_keys = self.masked_positions = torch.arange(len(ids))
        self.cu_seqlens, self.first_token = torch.tensor([0, len(ids)], dtype=torch.int32), 0


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (ModelConfig(layer_pattern="HM"), r"model\.layer_pattern has M: the public model has only H layers"),
        (ModelConfig(layer_pattern="HA"), r"model\.layer_pattern has A: the public model has only H layers"),
        (ModelConfig(norm="rmsnorm"), r"model\.norm is rmsnorm: .* has layernorm"),
        (ModelConfig(norm_eps=1e-6), r"model\.norm_eps is 1e-06: .* has 1e-05"),
        (ModelConfig(embedding_norm_eps=1e-5), r"model\.head_norm_eps is 1e-05: .* has 1e-12"),
        (ModelConfig(head_norm_eps=1e-5), r"model\.head_norm_eps is 1e-05: .* has 1e-12"),
        *(
            (ModelConfig(mixer=MixerConfig(**{key: value})), rf"model\.mixer\.{key} is .*: the public .* has ")
            for key, value in (
                ("ngroups", 2), ("dt_limit", (0.0, 0.1)), ("bias", True), ("conv_bias", False),
                ("learnable_init_states", True),
            )
        ),
    ],
)  # fmt: skip
def test_what_the_public_class_cannot_be_is_refused(model: ModelConfig, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        write_public(EncoderPackage(model, {}, None, {}), tmp_path / "o.safetensors")
    assert not list(tmp_path.iterdir())
