"""A tokenizer.json that somebody else made, and which of its tokens play the five special parts."""

import json
from pathlib import Path
from typing import Any

from hydra_scale.data.tokenizer import SPECIAL_PIECES, GivenTokenizer, SpecialIds
from hydra_scale.errors import DataError

_ROLES: dict[str, tuple[str, ...]] = {
    "pad_token": ("[PAD]", "<pad>", "<|padding|>"),
    "unk_token": ("[UNK]", "<unk>"),
    "cls_token": ("[CLS]", "<cls>", "<s>", "<bos>", "[BOS]"),
    "sep_token": ("[SEP]", "<sep>", "</s>", "<eos>", "[EOS]"),
    "mask_token": ("[MASK]", "<mask>"),
}
"""Names by which they go, the first that is there being taken where no file beside says which."""
_BESIDE = ("tokenizer_config.json", "special_tokens_map.json")


def given_tokenizer(path: Path) -> GivenTokenizer:
    """The tokenizer in a `tokenizer.json`, with the roles that tokenizer_config.json or special_tokens_map.json names.

    Raises:
        DataError: not such a file, or no token of it is the mask, the padding, the first or the last of a text.
    """
    content = path.read_bytes()
    named = _named_beside(path.parent)
    try:
        values = json.loads(content)
        ids = {token["content"]: int(token["id"]) for token in values["added_tokens"]}
        vocabulary = values["model"]["vocab"]
        # unigram models list [piece, score] in the order of their ids
        pieces = dict(vocabulary) if isinstance(vocabulary, dict) else {p: i for i, (p, _) in enumerate(vocabulary)}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a tokenizer.json of the tokenizers library ({error!r}); copy it again") from None
    found = {role: _id_of(names, named.get(role), pieces | ids) for role, names in _ROLES.items()}
    missing = [piece for piece, (role, index) in zip(SPECIAL_PIECES, found.items(), strict=True)
               if index is None and role != "unk_token"]  # fmt: skip
    if missing:
        raise DataError(
            f"{path}: has no {', '.join(missing)} token: neither does {' or '.join(_BESIDE)} beside it name one, nor is"
            f" there one called {', '.join(name for names in _ROLES.values() for name in names)}; add it to the file"
        )
    pad, unk, cls, sep, mask = found.values()
    assert pad is not None and cls is not None and sep is not None and mask is not None
    return GivenTokenizer(content, SpecialIds(pad, unk, cls, sep, mask), str(path))


def _named_beside(folder: Path) -> dict[str, str]:
    """Role to token, as the files of a Hugging Face folder name them."""
    named: dict[str, str] = {}
    for name in _BESIDE:
        try:
            values: Any = json.loads((folder / name).read_bytes())
        except (OSError, ValueError):
            continue
        for role in _ROLES if isinstance(values, dict) else ():
            value = values.get(role)
            content = value.get("content") if isinstance(value, dict) else value
            if isinstance(content, str):
                named.setdefault(role, content)
    return named


def _id_of(names: tuple[str, ...], named: str | None, ids: dict[str, int]) -> int | None:
    candidates = names if named is None else (named, *names)
    return next((ids[name] for name in candidates if name in ids), None)
