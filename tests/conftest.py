"""A small prepared corpus of made-up prose, shared by the tests that train."""

import os
import random
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton: kernels run on CPU tensors then

from hydra_data_prep.prepare import PrepareOptions, prepare

pytest_plugins = ["fault_table", "s3_server"]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tests share two cores with the ranks they start."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 120 documents, 20 to 1,200 characters, words drawn with the frequencies 1 / rank."""
    folder = tmp_path_factory.mktemp("prose")
    draw = random.Random(7)
    words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 8))) for _ in range(300)]
    weights = [1 / rank for rank in range(1, len(words) + 1)]
    for number in range(120):
        text = " ".join(draw.choices(words, weights, k=draw.randint(4, 240)))
        (folder / f"{number:03d}.txt").write_text(text)
    return folder


@pytest.fixture(scope="session")
def corpus(prose: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`prose` prepared with the bytes tokenizer: about 70,000 tokens, a tenth held out."""
    output = tmp_path_factory.mktemp("data") / "corpus"
    prepare(PrepareOptions(source="text", input=(prose,), output=output, tokenizer="bytes", eval_fraction=0.1))
    return output
