"""Pictures as documents: what stands in the shards is what numpy made the pictures of."""

import io
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pictures import folder_of, options, pictures
from PIL import Image

from hydra_data_prep.images import ImageOptions, read_images
from hydra_data_prep.prepare import prepare
from hydra_data_prep.verify import verify
from hydra_scale.errors import ConfigError, DataError, EnvironmentFault


@pytest.mark.parametrize("color", ["grey", "rgb"])
def test_pixels_in_shards_are_those_of_the_pictures(color: str, tmp_path: Path, read_tokens: Any) -> None:
    values = pictures(color)
    report = prepare(options(folder_of(tmp_path / "in", values), tmp_path / "data", image_color=color))
    verify(tmp_path / "data")
    expected = [[2, *(each.ravel().astype(int) + 5), 3] for each in (*values[0::2], *values[1::2])]
    train, held_out = (read_tokens(tmp_path / "data", split) for split in ("train", "eval"))
    assert len(held_out) == report.eval_documents >= 1
    assert sorted(train + held_out) == sorted(expected)
    assert train == [each for each in expected if each in train]


def test_resized_by_the_shorter_side_and_cropped_to_the_middle(tmp_path: Path) -> None:
    """4 x 16 pixels of four stripes keep the middle two; enlarged, they stay stripes but for the overshoot at edges."""
    stripes = np.repeat(np.array([10, 60, 160, 250], np.uint8), 4)[None].repeat(4, 0)
    corpus = folder_of(tmp_path, stripes[None])
    (same,) = read_images([corpus], ImageOptions(4))
    assert np.array_equal(np.frombuffer(same, np.uint8).reshape(4, 4), [[60, 60, 160, 160]] * 4)
    (larger,) = read_images([corpus], ImageOptions(16))
    found = np.frombuffer(larger, np.uint8).reshape(16, 16)
    assert (found == found[0]).all() and abs(found.mean() - 110) < 1
    assert (abs(found[0, :5].astype(int) - 60) < 10).all() and (abs(found[0, 11:].astype(int) - 160) < 10).all()
    (colored,) = read_images([corpus], ImageOptions(4, "rgb"))
    assert np.array_equal(np.frombuffer(colored, np.uint8).reshape(4, 4, 3)[0], [[v] * 3 for v in (60, 60, 160, 160)])


def test_divided_and_duplicate_pictures(tmp_path: Path) -> None:
    corpus = folder_of(tmp_path / "in", np.concatenate([pictures("grey"), pictures("grey")[:5]]))
    report = prepare(options(corpus, tmp_path / "data"))
    assert (report.dropped["duplicates"], report.train_documents + report.eval_documents) == (5, 20)
    part = prepare(options(corpus, tmp_path / "part", part=(1, 5)))
    assert part.num_read == 5


def bomb() -> bytes:
    """A PNG whose header claims 100,000 x 100,000 pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def png(values: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "PNG")
    return stream.getvalue()


def odd_tiff() -> bytes:
    """The number of rows in a strip is no whole number."""
    stream = io.BytesIO()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(stream, "TIFF")
    content = bytearray(stream.getvalue())
    content[72] ^= 1
    return bytes(content)


def flipped(content: bytes) -> bytes:
    """With one bit changed in the middle of the pixels."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (bomb(), "refused as a decompression bomb .*; make it smaller or remove it"),
        (png(pictures("grey")[0])[:60], "cannot be read as a picture .*; repair or remove it"),
        (flipped(png(pictures("grey")[5])), "cannot be read as a picture .*; repair or remove it"),
        (b"no picture", "cannot be read as a picture .*; repair or remove it"),
        (b"", "cannot be read as a picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "cannot be read as a picture"),
        (odd_tiff(), "cannot be read as a picture .*; repair or remove it"),
        (png(np.full((8, 8), 1000, np.uint16)), "a picture of mode I;16, expected 8 bits a value; convert it"),
    ],
    ids=["bomb", "cut", "flipped", "text", "empty", "postscript", "tiff", "deep"],
)
def test_pictures_that_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    corpus = folder_of(tmp_path / "in", pictures("grey")[:3])
    (corpus / "class1" / "odd.png").write_bytes(content)
    with pytest.raises(DataError, match=f"class1/odd.png: {message}"):
        prepare(options(corpus, tmp_path / "data"))
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_size": None}, "--source images needs --image-size N"),
        ({"tokenizer": "nucleotides"}, "takes --tokenizer bytes, found nucleotides"),
        ({"quality": "gopher"}, "are for text; leave them out"),
        ({"source": "text"}, "are for --source images, found text"),
    ],
)
def test_refused_settings(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare(options(folder_of(tmp_path / "in", pictures("grey")[:1]), tmp_path / "data", **values))


def test_without_pillow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(EnvironmentFault, match=r"pip install 'hydra-scale\[images\]'"):
        read_images([tmp_path], ImageOptions(8))
