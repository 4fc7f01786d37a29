"""A tokenizer.json of somebody else, from raw text to the exported model: its ids and special tokens everywhere."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from ranks import run_ranks
from runs import train
from sources import prepared
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Library
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hydra_data_prep.train_tokenizer import existing_tokenizer
from hydra_scale.config import MaskingConfig
from hydra_scale.convert.convert import Options, convert
from hydra_scale.data.masking import Masking
from hydra_scale.data.tokenizer import Tokenizer
from hydra_scale.errors import DataError

TEXTS = ["Hello  world,\nit's  [MASK] a tést", " lead and trail ", "", "eta oin shrdlu\n\n<mask> x", "日本 😀 ﬁne"]


def like_bert(files: list[str]) -> Library:
    """WordPiece, lower case; special tokens behind two ordinary ones."""
    library = Library(models.WordPiece(unk_token="[UNK]"))
    library.normalizer, library.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    special = ["[unused1]", "[unused2]", "[MASK]", "[SEP]", "[CLS]", "[UNK]", "[PAD]"]
    library.train(files, trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False))
    library.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 4))
    library.enable_padding(pad_id=6, pad_token="[PAD]", length=64)
    library.enable_truncation(16)
    return library


def like_roberta(files: list[str]) -> Library:
    """Bytes as BPE, nothing unknown, the mask last of all ids."""
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<s>", "<pad>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    library.train(files, trainer)
    library.add_special_tokens([AddedToken("<mask>", lstrip=True, special=True)])
    library.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return library


def like_t5(files: list[str]) -> Library:
    """Unigram that frames texts by itself in another way; its roles are named in a file beside it only."""
    library = Library(models.Unigram())
    library.pre_tokenizer, library.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<unk>", "<fill>", "<none>", "<begin>", "<end>"]
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=special, unk_token="<unk>", show_progress=False)
    library.train(files, trainer)
    library.post_processor = processors.TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 4)])
    return library


ROLES = {"mask_token": {"content": "<fill>"}, "pad_token": "<none>", "cls_token": "<begin>", "sep_token": "<end>"}
KINDS = {like_bert: (6, 5, 4, 3, 2), like_roberta: (1, None, 0, 2, 320), like_t5: (2, 0, 3, 4, 1)}


@pytest.fixture(scope="module", params=KINDS, ids=lambda make: make.__name__)
def given(request: pytest.FixtureRequest, prose: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple]:
    """The file and the ids of pad, unk, cls, sep and mask in it."""
    folder = tmp_path_factory.mktemp("given")
    request.param(sorted(map(str, prose.iterdir()))).save(str(folder / "tokenizer.json"))
    if request.param is like_t5:
        (folder / "tokenizer_config.json").write_text(json.dumps(ROLES))
    return folder / "tokenizer.json", KINDS[request.param]


def test_ids_are_those_of_the_file(given: tuple[Path, tuple], tmp_path: Path) -> None:
    path, special = given
    library = Library.from_file(str(path))
    library.no_padding()
    library.no_truncation()
    library.encode_special_tokens = True
    tokenizer = existing_tokenizer(str(path))
    assert tuple(tokenizer.special) == special
    tokenizer.save(tmp_path / "folder")
    for ours in (tokenizer, Tokenizer.load(tmp_path / "folder"), existing_tokenizer(str(path.parent))):
        assert ours.sha256 == tokenizer.sha256
        for num_threads in (1, 2):
            found = ours.encode([ours.normalise(text) for text in TEXTS], num_threads=num_threads)
            bodies = [library.encode(text, add_special_tokens=False).ids for text in TEXTS]
            assert [ids.tolist() for ids in found] == [[special[2], *body, special[3]] for body in bodies]
            assert not np.isin(np.concatenate(bodies), special[4]).any()  # no text is a mask
            assert [ours.decode(ids) for ids in found] == [library.decode(body) for body in bodies]


def test_masks_are_its_own(given: tuple[Path, tuple]) -> None:
    path, special = given
    tokenizer = existing_tokenizer(str(path))
    tokens = np.tile(np.arange(tokenizer.vocab_size, dtype=np.uint16), 50)
    offsets, sequences = np.arange(len(tokens)), np.zeros(len(tokens), np.int64)
    masked = Masking(MaskingConfig(), 1, tokenizer)(tokens, sequences, offsets, np.array([0]), 0.5)
    seen = masked.input_ids[masked.positions]
    reserved = list(Library.from_file(str(path)).get_added_tokens_decoder())
    assert not np.isin(masked.targets, reserved).any()
    assert 0.75 < (seen == special[4]).mean() < 0.85
    assert not np.isin(seen, [index for index in reserved if index != special[4]]).any()


def test_words_begin_where_the_file_marks_them(given: tuple[Path, tuple]) -> None:
    tokenizer = existing_tokenizer(str(given[0]))
    (ids,) = tokenizer.encode(["the lions hid in sand"], frame=False)
    pieces = [tokenizer.piece(token) for token in ids]
    begins = "".join("|" * bool(tokenizer.starts_word[token]) + tokenizer.piece(token) for token in ids)
    spelled = begins.replace("##", "").replace("\u2581", "").replace("\u0120", "").strip("|")
    assert spelled == "the|lions|hid|in|sand", pieces


def test_from_text_to_exported_models(prose: Path, tmp_path: Path) -> None:
    """Line breaks of the documents reach the tokenizer; the exported one gives the ids of the training."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for file in prose.iterdir():
        (texts / file.name).write_text("\n".join(file.read_text().split(" ", 2)))
    library = like_roberta(sorted(map(str, texts.iterdir())))
    library.save(str(tmp_path / "tokenizer.json"))
    data = prepared(texts, tmp_path / "data", tokenizer=str(tmp_path / "tokenizer.json"), eval_fraction=0.1)
    manifest = json.loads((data / "manifest.json").read_text())
    assert manifest["tokenizer"]["kind"] == "huggingface" and manifest["tokenizer"]["vocab_size"] == 321
    run_ranks(1, train, tmp_path / "run", [f"data.train={data}", "training.steps=2", "schedule.warmup_steps=1"])

    convert("run", "huggingface", tmp_path / "run", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (config["mask_token_id"], config["pad_token_id"], config["unk_token_id"]) == (320, 1, None)
    exported = AutoTokenizer.from_pretrained(tmp_path / "model")
    as_given = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    for text in [*TEXTS, "one <mask> more"]:
        assert exported(text).input_ids == as_given(text).input_ids
    assert (exported.mask_token, exported.mask_token_id, exported.cls_token) == ("<mask>", 320, "<s>")
    assert "... <mask> ..." in (tmp_path / "model" / "README.md").read_text()

    convert("run", "wheel", tmp_path / "run", tmp_path / "wheel", Options(name="given_encoder"))
    (wheel,) = (tmp_path / "wheel").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    assert "Requires-Dist: tokenizers" in next((tmp_path / "site").glob("*.dist-info/METADATA")).read_text()
    script = (
        "import given_encoder as g; e = g.load('cpu'); print(e.fill_mask('a <mask> b', top=2), e.tokenize('a\\nb'))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path / "site", capture_output=True, text=True, check=True
    )
    assert result.stdout.strip().endswith(str(as_given("a\nb").input_ids))


def changed(path: Path, tmp_path: Path, change: object) -> Path:
    values = json.loads(path.read_text())
    change(values)  # type: ignore[operator]
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    return tmp_path / "tokenizer.json"


def without_mask(values: dict) -> None:
    values["added_tokens"] = [token for token in values["added_tokens"] if token["content"] != "[MASK]"]
    del values["model"]["vocab"]["[MASK]"]


def test_mistakes_are_named(prose: Path, tmp_path: Path) -> None:
    path = tmp_path / "bert.json"
    like_bert(sorted(map(str, prose.iterdir()))).save(str(path))
    with pytest.raises(DataError, match=r"tokenizer.json: has no \[MASK\] token: .* add it to the file"):
        existing_tokenizer(str(changed(path, tmp_path, without_mask)))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": "[MASK]"}))
    with pytest.raises(DataError, match=r"tokenizer.json: one token stands for \[PAD\] and \[MASK\]; they must differ"):
        existing_tokenizer(str(changed(path, tmp_path, lambda values: None)))
    for content in ("{}", "[", json.dumps({"added_tokens": [], "model": {"vocab": 3}})):
        (tmp_path / "other.json").write_text(content)
        with pytest.raises(DataError, match=r"other.json: not a tokenizer.json of the tokenizers library"):
            existing_tokenizer(str(tmp_path / "other.json"))
    (tmp_path / "tokenizer_config.json").write_text("[]")  # says nothing of roles, as if it were not there
    with pytest.raises(DataError, match="the tokenizers library cannot read it"):
        existing_tokenizer(str(changed(path, tmp_path, lambda values: values["model"].update(type="Unheard"))))
    tokenizer = existing_tokenizer(str(path))
    tokenizer.save(tmp_path / "folder")
    (tmp_path / "folder" / "tokenizer.json").write_bytes(path.read_bytes().replace(b"unused1", b"unused9"))
    with pytest.raises(DataError, match="altered"):
        Tokenizer.load(tmp_path / "folder")
