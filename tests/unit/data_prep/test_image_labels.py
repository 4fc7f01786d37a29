"""Pictures in folders of classes: the label in the shards is the place of the folder among the sorted names."""

from pathlib import Path

import numpy as np
import pytest
import webdataset
from pictures import options, pictures
from PIL import Image
from typer.testing import CliRunner

from hydra_data_prep.assemble import join
from hydra_data_prep.parts import part_of, parts_in, prepare_part
from hydra_data_prep.prepare import prepare
from hydra_data_prep.verify import verify
from hydra_scale.cli import app
from hydra_scale.data.documents import Documents
from hydra_scale.data.manifest import read_manifest
from hydra_scale.errors import ConfigError, DataError

PLACES = ["zebra/0.png", "ant/1.png", "Bee/2.png", "ant/deeper/3.png", "zebra/a b/4.png", "Bee/5.png", "ant/6.png"]
CLASSES = ("Bee", "ant", "zebra")
"""As sorted by torchvision's ImageFolder, by code points."""


def corpus_of(folder: Path, places: list[str] = PLACES) -> Path:
    for place, values in zip(places, pictures("grey"), strict=False):
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(values).save(folder / place)
    return folder


def expected(places: list[str] = PLACES, classes: tuple[str, ...] = CLASSES) -> dict[bytes, int]:
    """The label of each picture, by its pixels."""
    labels = [classes.index(place.split("/")[0]) for place in places]
    return {values.tobytes(): label for values, label in zip(pictures("grey"), labels, strict=False)}


def read(folder: Path) -> dict[bytes, int | None]:
    """The same of a prepared folder, both splits: 256 bytes behind the five special tokens of the bytes tokenizer."""
    documents = [d for split in read_manifest(folder).splits for d in Documents(folder, split)]
    return {(d.tokens[1:-1] - 5).astype(np.uint8).tobytes(): d.label for d in documents}


def test_labels_are_those_of_the_folders(tmp_path: Path) -> None:
    report = prepare(options(corpus_of(tmp_path / "in"), tmp_path / "data", eval_fraction=0.3))
    verify(tmp_path / "data")
    assert read_manifest(tmp_path / "data").classes == CLASSES
    assert report.classes == {"Bee": 2, "ant": 3, "zebra": 2} and report.eval_documents >= 1
    assert read(tmp_path / "data") == expected()
    paths = [str(path) for path in sorted((tmp_path / "data").glob("*/*.tar"))]
    samples = list(webdataset.WebDataset(paths, shardshuffle=False).decode())
    found = {}
    for sample in samples:
        tokens = np.split(sample["tokens.npy"], np.cumsum(sample["lengths.npy"])[:-1])
        values = [(each[1:-1] - 5).astype(np.uint8).tobytes() for each in tokens]
        found |= dict(zip(values, sample["labels.npy"].tolist(), strict=True))
    assert found == expected()


def test_parts_know_the_classes_of_all_pictures(tmp_path: Path) -> None:
    """Of seven parts none sees more than one class; joined they are what one preparation is."""
    corpus = corpus_of(tmp_path / "in")
    for task in range(7):
        assert prepare_part(part_of(options(corpus, tmp_path / "parts", eval_fraction=0.0), task, 7)) is not None
    join(parts_in(tmp_path / "parts"), tmp_path / "data")
    verify(tmp_path / "data")
    assert read_manifest(tmp_path / "data").classes == CLASSES
    assert read(tmp_path / "data") == expected()


def test_inputs_share_their_classes(tmp_path: Path) -> None:
    """cat of one input is cat of the other."""
    corpus_of(tmp_path, places := ["a/cat/0.png", "a/dog/1.png", "b/cow/2.png", "b/cat/3.png"])
    prepare(options(tmp_path / "a", tmp_path / "data", input=(tmp_path / "a", tmp_path / "b")))
    assert read(tmp_path / "data") == expected([place[2:] for place in places], ("cat", "cow", "dog"))


def test_a_picture_in_two_classes_is_counted(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path / "in")
    for copy in ("zebra/1.png", "ant/7.png"):
        (corpus / copy).write_bytes((corpus / "ant" / "1.png").read_bytes())
    report = prepare(options(corpus, tmp_path / "data"))
    assert (report.dropped["duplicates"], report.dropped["duplicates with another label"]) == (1, 1)
    assert read(tmp_path / "data") == expected()


@pytest.mark.parametrize(
    ("places", "labels", "classes"),
    [
        (["0.png", "1.png"], None, None),
        (["some/0.png", "some/1.png"], None, None),
        (["some/0.png", "some/1.png"], "folders", ("some",)),
        (["a/0.png", "b/1.png"], "none", None),
        (["a/0.png", "1.png"], "none", None),
    ],
)
def test_what_is_a_class(
    places: list[str], labels: str | None, classes: tuple[str, ...] | None, tmp_path: Path
) -> None:
    """One folder is none, unless it is asked for."""
    prepare(options(corpus_of(tmp_path / "in", places), tmp_path / "data", image_labels=labels))
    verify(tmp_path / "data")
    assert read_manifest(tmp_path / "data").classes == classes
    assert read_manifest(tmp_path / "data").version == (2 if classes else 1)
    assert set(read(tmp_path / "data").values()) == ({0} if classes else {None})


@pytest.mark.parametrize(
    ("places", "labels", "message"),
    [
        (
            ["a/0.png", "1.png"],
            None,
            "in/1.png: lies in no folder of a class, .*, others in a; move it or give",
        ),
        (
            ["a/0.png", "b/2.png", "1.png"],
            "folders",
            "in/1.png: lies in no folder of a class, .*, others in a, b",
        ),
        (["0.png", "1.png"], "folders", "in/0.png: lies in no folder of a class, .*, no other does; move it or give"),
    ],
)
def test_pictures_outside_of_classes(places: list[str], labels: str | None, message: str, tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path / "in", places)
    with pytest.raises(DataError, match=message):
        prepare(options(corpus, tmp_path / "data", image_labels=labels))
    assert not (tmp_path / "data").exists()


def test_on_the_command_line(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path / "in")
    command = ["prepare", "--source", "images", "--input", str(corpus), "--tokenizer", "bytes", "--image-size", "8"]
    done = CliRunner().invoke(app, [*command, "--output", str(tmp_path / "data")])
    assert "classes    3: 2 Bee, 3 ant, 2 zebra\n" in done.output
    done = CliRunner().invoke(app, [*command, "--output", str(tmp_path / "plain"), "--image-labels", "none"])
    assert "classes" not in done.output and read_manifest(tmp_path / "plain").classes is None
    with pytest.raises(ConfigError, match="--image-labels: found 'files'; input should be 'folders' or 'none'"):
        CliRunner().invoke(
            app, [*command, "--output", str(tmp_path / "x"), "--image-labels", "files"], catch_exceptions=False
        )
