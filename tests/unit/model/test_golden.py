"""The masked language model against the public implementation's outputs, loss and gradients in float64."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from alone import job_of_one
from safetensors.torch import load_file

from hydra_scale.convert.public_hydra import from_public, read_public, to_public

GOLDEN = Path(__file__).parents[2] / "golden"
FILES = sorted(GOLDEN.glob("bert_hydra*.safetensors"))
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


@pytest.fixture(scope="module", autouse=True)
def _job() -> Iterator[None]:
    with job_of_one():
        yield


def part(values: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in values.items() if name.startswith(prefix)}


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.detach().double() - expected).norm() / expected.norm().clamp_min(1e-30))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_logits_loss_and_all_gradients(path: Path, dtype: torch.dtype, tmp_path: Path) -> None:
    golden = load_file(path)
    source = tmp_path / "public.safetensors"
    torch.save(part(golden, "param."), source.with_suffix(".pt"))
    package = read_public(source.with_suffix(".pt"))
    model = package.build().to(dtype)

    rows, seqlen = golden["input_ids"].shape
    places = torch.arange(rows * seqlen)
    batch = SimpleNamespace(
        input_ids=golden["input_ids"].flatten(),
        position_ids=places % seqlen,
        token_keys=places,
        cu_seqlens=torch.arange(0, rows * seqlen + 1, seqlen),
        first_token=0,
        masked_positions=places,
        targets=golden["labels"].flatten(),
    )
    logits = model.logits(batch)
    assert relative(logits.view_as(golden["logits"]), golden["logits"]) < TOLERANCE[dtype]

    # the public loss is the mean where labels > 0
    batch.masked_positions = places[batch.targets > 0]
    batch.targets = batch.targets[batch.targets > 0]
    loss = model(batch).loss / len(batch.targets)
    loss.backward()
    assert relative(loss, golden["loss"][0]) < TOLERANCE[dtype]
    expected = from_public({n: g for n, g in part(golden, "grad.").items() if n != "cls.predictions.decoder.weight"})
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert found[name] is not None, name
        assert relative(found[name], gradient) < TOLERANCE[dtype], name


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_names_there_and_back(path: Path) -> None:
    public = part(load_file(path), "param.")
    back = to_public(from_public(public))
    assert back.keys() == public.keys()
    assert all(torch.equal(back[name], public[name]) for name in public)
