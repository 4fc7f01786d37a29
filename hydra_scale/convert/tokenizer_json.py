"""Our tokenizers as a Hugging Face `tokenizer.json` that gives the same ids; one that was given, as it is."""

import sentencepiece
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as HuggingFaceTokenizer

from hydra_scale.data.tokenizer import (
    SPECIAL_PIECES,
    UNK_ID,
    WHITESPACE,
    KmersTokenizer,
    NucleotidesTokenizer,
    Tokenizer,
)
from hydra_scale.errors import DataError

_SAMPLES = (
    "The film was good, although a little too long.", "  two  spaces\tand a\nnew line ", "", "Ünïcödé ﬁne ①②③ ｆｕｌｌ",
    "emoji 😀 and 漢字 and русский текст", "1,234.56 dollars (approx.) -- e-mail: a@b.co", "don't can't won't it's",
    "ACGTNacgtnRYKMUu-", "supercalifragilisticexpialidocious" * 3, "a\u0301 combining \u00a0 no-break \u2028 separator",
    "CamelCase snake_case \u2581 lower one eighth", "\u200b zero width \u00ad soft hyphen", "<unk> <s> </s> a<b>c",
)  # fmt: skip
_NEVER = -1e4  # score of the pieces that SentencePiece keeps out of its search: specials and bytes


def tokenizer_json(tokenizer: Tokenizer) -> HuggingFaceTokenizer:
    """The tokenizers-library twin of `tokenizer`, compared with it on a set of awkward texts.

    Known differences: a text that spells the name of a special or byte piece ("[MASK]", "<0x41>") gets that piece
    from the twin, and characters in training; a unigram model may order pieces of equal total score otherwise ("...."
    as ". ..." or "... ."; 4 of 4,000 movie reviews); nucleotides beyond ASCII are [UNK] one by one here.

    Raises:
        DataError: a text gets other ids: the export would not be the tokenizer of the training.
    """
    twin = _BUILDERS[tokenizer.kind](tokenizer)
    if not _frames(twin, tokenizer):
        cls, sep = (tokenizer.piece(index) for index in (tokenizer.special.cls, tokenizer.special.sep))
        twin.post_processor = processors.TemplateProcessing(
            single=f"{cls} $A {sep}",
            pair=f"{cls} $A {sep} $B:1 {sep}:1",
            special_tokens=[(cls, tokenizer.special.cls), (sep, tokenizer.special.sep)],
        )
    pieces = [tokenizer.piece(index) for index in tokenizer.special if index is not None]
    there = {token.content for token in twin.get_added_tokens_decoder().values()}
    twin.add_special_tokens([AddedToken(p, special=True, normalized=False) for p in pieces if p not in there])
    for text in filter(str.isascii, _SAMPLES) if isinstance(tokenizer, NucleotidesTokenizer) else _SAMPLES:
        if any(piece in text for piece in pieces):
            continue  # a known difference
        expected = tokenizer.encode([tokenizer.normalise(text)])[0].tolist()
        if (found := twin.encode(text).ids) != expected:
            raise DataError(f"tokenizer export: {text!r} gives ids {found}, in training {expected}; not published")
    return twin


def _frames(twin: HuggingFaceTokenizer, tokenizer: Tokenizer) -> bool:
    """Whether the twin puts [CLS] and [SEP] around a text by itself, as many given ones do."""
    body, framed = (twin.encode("a", add_special_tokens=frames).ids for frames in (False, True))
    return framed == [tokenizer.special.cls, *body, tokenizer.special.sep]


def _sentencepiece(tokenizer: Tokenizer) -> HuggingFaceTokenizer:
    (content,) = tokenizer.files().values()
    model = sentencepiece.SentencePieceProcessor(model_proto=content)
    ids = range(model.vocab_size())
    scores = [_NEVER if model.is_control(i) or model.is_byte(i) else model.get_score(i) for i in ids]
    pieces = [model.id_to_piece(i) for i in ids]
    twin = HuggingFaceTokenizer(_unigram(pieces, scores) if _is_unigram(content) else _bpe(pieces, scores))
    twin.normalizer = _text_normaliser()
    twin.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    twin.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return twin


def _is_unigram(content: bytes) -> bool:
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(content)
    return proto.trainer_spec.model_type == sentencepiece_model_pb2.TrainerSpec.UNIGRAM


def _unigram(pieces: list[str], scores: list[float]) -> models.Unigram:
    return models.Unigram(list(zip(pieces, scores, strict=True)), unk_id=UNK_ID, byte_fallback=True)


def _bpe(pieces: list[str], scores: list[float]) -> models.BPE:
    """Merges in the order of the pieces they make, which is the order in which SentencePiece applies them."""
    rank = {piece: index for index, piece in enumerate(pieces) if scores[index] > _NEVER}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in sorted(rank, key=lambda piece: (-scores[rank[piece]], rank[piece]))
        for cut in range(1, len(piece))
        if piece[:cut] in rank and piece[cut:] in rank
    ]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    return models.BPE(vocabulary, merges, unk_token=SPECIAL_PIECES[UNK_ID], fuse_unk=True, byte_fallback=True)


def _bytes(tokenizer: Tokenizer) -> HuggingFaceTokenizer:
    visible = {byte: symbol for symbol, byte in _byte_symbols().items()}
    vocabulary = {piece: index for index, piece in enumerate(SPECIAL_PIECES)}
    vocabulary |= {visible[byte]: len(SPECIAL_PIECES) + byte for byte in range(256)}
    twin = HuggingFaceTokenizer(models.BPE(vocabulary, []))
    twin.normalizer = _text_normaliser()
    twin.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    twin.decoder = decoders.ByteLevel()
    return twin


def _byte_symbols() -> dict[str, int]:
    """The symbol that the byte-level pre-tokenizer shows each byte as: printable Latin-1 as itself, others from 256."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _nucleotides(tokenizer: Tokenizer) -> HuggingFaceTokenizer:
    vocabulary = {tokenizer.piece(index): index for index in range(tokenizer.vocab_size)}
    twin = HuggingFaceTokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL_PIECES[UNK_ID]))
    to_upper = [normalizers.Replace(letter.lower(), letter) for letter in "ACGTURYSWKMBDHVN"]
    twin.normalizer = normalizers.Sequence(
        [
            normalizers.Replace(Regex(WHITESPACE), ""),
            *to_upper,
            normalizers.Replace("U", "T"),
            normalizers.Replace(Regex("[RYSWKMBDHV.-]"), "N"),
        ]
    )
    word = tokenizer.word.pattern if isinstance(tokenizer, KmersTokenizer) else "."
    twin.pre_tokenizer = pre_tokenizers.Split(Regex(word), "isolated")
    twin.decoder = decoders.Fuse()
    return twin


def _given(tokenizer: Tokenizer) -> HuggingFaceTokenizer:
    (content,) = tokenizer.files().values()
    twin = HuggingFaceTokenizer.from_buffer(content)
    twin.no_padding()
    twin.no_truncation()
    return twin


def _text_normaliser() -> normalizers.Normalizer:
    """`Tokenizer.normalise` in the other library's terms."""
    return normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(WHITESPACE), " "), normalizers.Strip()])


_BUILDERS = {"sentencepiece": _sentencepiece, "bytes": _bytes, "nucleotides": _nucleotides, "kmers": _nucleotides,
             "huggingface": _given}  # fmt: skip
