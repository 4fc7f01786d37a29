"""Exported packages on a CUDA device: the public logits, and the CPU's numbers."""

import importlib
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMaskedLM

from hydra_scale.convert.convert import Options, convert

pytestmark = pytest.mark.gpu
GOLDEN = sorted((Path(__file__).parents[1] / "golden").glob("bert_hydra*.safetensors"))


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda path: path.stem)
def test_public_logits(golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wheel and the folder on the GPU, in float64 and in float32; the wheel goes there by itself."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    values = load_file(golden)
    source = tmp_path / "public.safetensors"
    save_file({n.removeprefix("param."): t for n, t in values.items() if n.startswith("param.")}, source)
    convert("public-hydra", "wheel", source, tmp_path / "wheel", Options(name=golden.stem))
    convert("public-hydra", "huggingface", source, tmp_path / "folder")
    with zipfile.ZipFile(next((tmp_path / "wheel").glob("*.whl"))) as archive:
        archive.extractall(tmp_path / "site")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    package = importlib.import_module(golden.stem)
    ids = values["input_ids"]
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        encoder = package.load(dtype=dtype)
        assert encoder.device.type == "cuda"
        folder = AutoModelForMaskedLM.from_pretrained(tmp_path / "folder", trust_remote_code=True, dtype=dtype).cuda()
        with torch.no_grad():
            found = (encoder.logits(ids), folder.eval()(input_ids=ids.cuda()).logits)
        for logits in found:
            assert (logits.cpu() - values["logits"]).norm() < tolerance * values["logits"].norm()
