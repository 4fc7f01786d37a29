"""ONNX graphs in ONNX Runtime: any number of rows of any length, beside the golden mixer and the model of the run."""

import sys
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from alone import job_of_one
from safetensors.torch import load_file, save_file
from sources import MIXERS, state_dict, state_file
from test_torch_export import padded

from hydra_scale.convert.convert import convert
from hydra_scale.convert.package import Probe
from hydra_scale.convert.run import read_run
from hydra_scale.errors import ConfigError, EnvironmentFault


def run(path: Path, inputs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    (vectors,) = session.run(["vectors"], dict(zip(names, (inputs.numpy(), mask.numpy()), strict=True)))
    return torch.from_numpy(vectors)


def test_a_hybrid_at_many_shapes(hybrid: Path, tmp_path: Path) -> None:
    assert convert("run", "onnx", hybrid / "run", tmp_path / "encoder.onnx") < 1e-5
    assert [path.name for path in tmp_path.iterdir()] == ["encoder.onnx"]  # weights included
    graph = onnx.load(tmp_path / "encoder.onnx").graph
    shapes = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph.input}
    assert shapes == {"input_ids": ["batch", "seqlen"], "attention_mask": ["batch", "seqlen"]}
    with job_of_one():
        package = read_run(hybrid / "run")
        for lengths in ((1,), (63,), (64, 2), (65, 64, 1), (130, 129), (400,)):
            rows = [torch.randint(5, 400, (length,)) for length in lengths]
            expected = [package.run(Probe(row[None], (len(row),)), "vectors")[0] for row in rows]
            for left in (False, True):
                batch, mask = padded(rows, left)
                found = run(tmp_path / "encoder.onnx", batch, mask)
                for index, vectors in enumerate(expected):
                    torch.testing.assert_close(found[index][mask[index].bool()], vectors, rtol=1e-4, atol=1e-4)


def test_a_mixer_gives_the_public_outputs_in_fp32_only(tmp_path: Path) -> None:
    values = load_file(MIXERS[0])
    with pytest.raises(ConfigError, match=r"mixer.onnx: the weights are torch.float64, .*convert --to torch-export"):
        convert("mixer", "onnx", state_file(MIXERS[0], tmp_path), tmp_path / "mixer.onnx")
    save_file({name: tensor.float() for name, tensor in state_dict(MIXERS[0]).items()}, tmp_path / "m.safetensors")
    assert convert("mixer", "onnx", tmp_path / "m.safetensors", tmp_path / "mixer.onnx") < 1e-5
    whole = values["input"].float()
    y = run(tmp_path / "mixer.onnx", whole, torch.ones(whole.shape[:2], dtype=torch.int64))
    assert (y - values["output"]).norm() < 1e-5 * values["output"].norm()


def test_what_stands_in_the_way_is_named(hybrid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"o.pt2: the name of the file to write must end in .onnx"):
        convert("run", "onnx", hybrid / "run", tmp_path / "o.pt2")
    monkeypatch.setattr("hydra_scale.convert.onnx_export._LARGEST", 1000)
    with pytest.raises(ConfigError, match=r"bytes of weights, one ONNX file holds 1,000"):
        convert("run", "onnx", hybrid / "run", tmp_path / "o.onnx")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(EnvironmentFault, match=r"onnxscript: not installed; pip install 'hydra-scale\[onnx\]'"):
        convert("run", "onnx", hybrid / "run", tmp_path / "o.onnx")
    assert not list(tmp_path.iterdir())
