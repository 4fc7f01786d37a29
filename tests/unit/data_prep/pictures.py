"""Folders of small pictures of random values."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hydra_data_prep.prepare import PrepareOptions

SIZE = 8


def pictures(color: str) -> np.ndarray:
    """uint8 (20, 8, 8) or (20, 8, 8, 3), every value from 0 to 255 among them."""
    shape = (20, SIZE, SIZE) if color == "grey" else (20, SIZE, SIZE, 3)
    values = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    values[:4].flat[:256] = np.arange(256)
    return values


def folder_of(path: Path, values: np.ndarray) -> Path:
    for number, each in enumerate(values):
        (path / f"class{number % 2}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(each).save(path / f"class{number % 2}" / f"{number:02d}.png")
    return path


def options(corpus: Path, output: Path, **values: Any) -> PrepareOptions:
    defaults = {"source": "images", "input": (corpus,), "output": output, "tokenizer": "bytes", "image_size": SIZE}
    return PrepareOptions(**defaults | values)
