"""`prepare`: documents -> cleaned and split -> tokenizer -> token shards and manifest, published by one rename.

Two passes. The first reads the source once, cleans, drops duplicates, splits, and lays the documents down as lines of
two plain files. The second trains the tokenizer on a sample of the train lines and
tokenises both files. Memory holds one batch, the shard block being filled, and a hash for each document.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from hydra_data_prep.archives import read_debs, read_wheels
from hydra_data_prep.cleaning import CleanDocument, Cleaning, Filter, Labelled
from hydra_data_prep.fasta import FastaOptions
from hydra_data_prep.images import Classes, ClassFolders, ImageOptions, find_classes, read_images
from hydra_data_prep.language import LanguageFilter
from hydra_data_prep.near_duplicates import NearDuplicates
from hydra_data_prep.publish import check_free, published
from hydra_data_prep.quality import GopherFilter
from hydra_data_prep.registry import CORPORA, read_corpus
from hydra_data_prep.report import Report, report_of
from hydra_data_prep.sources import DocumentUnit, SourceOptions, list_files, read_files, source_suffixes
from hydra_data_prep.spool import Spool
from hydra_data_prep.train_tokenizer import existing_tokenizer, train_sentencepiece
from hydra_scale.data.manifest import (
    DROPPED,
    LABELLED,
    PLAIN,
    TOKENIZER_FOLDER,
    WORDS,
    Manifest,
    SplitEntry,
    TokenizerEntry,
)
from hydra_scale.data.shard_writer import ShardWriter
from hydra_scale.data.shards import Split, token_dtype
from hydra_scale.data.tokenizer import SPECIAL_PIECES, Tokenizer, normalise_text
from hydra_scale.errors import ConfigError, DataError, EnvironmentFault

SourceKind = Literal[
    "text", "html", "jsonl", "csv", "parquet", "fasta", "wheel", "deb", "images",
    "movie-reviews", "state-of-the-union", "debian-docs", "genomes", "ribosomal-genes",
]  # fmt: skip
Progress = Callable[[str, int, int | None], None]
"""progress(stage, done, total): called now and then; total is None where it cannot be known."""

DEFAULT_VOCAB_SIZE = 16384
DEFAULT_LANGUAGE_CONFIDENCE = 0.5
_BATCH_BYTES = 1 << 20
_REPORT_EVERY = 1000  # documents
_FILES_OF = {
    "text_field": ("jsonl", "csv", "parquet"),
    "document_unit": ("text",),
    "window": ("fasta",),
    "reverse_complement": ("fasta",),
    "soft_mask": ("fasta",),
}
"""Options of how files are read, and the sources of such files; archives and corpora may hold any."""


class PrepareOptions(BaseModel):
    """What to prepare, and how."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    source: SourceKind
    """Kind of the input; or a corpus of the registry, which is downloaded and takes no input."""
    input: tuple[Path, ...] = ()
    """Files and folders to read."""
    output: Path
    """Folder to write; must not exist or be empty."""
    tokenizer: str = "sentencepiece"
    """sentencepiece (trained on the documents), bytes, nucleotides, kmers:K, or the path of a SentencePiece model, a
    tokenizer folder or a prepared folder."""
    vocab_size: Annotated[int, Field(ge=len(SPECIAL_PIECES), le=2**31 - 1)] | None = None
    """Pieces of the tokenizer to train; absent: 16,384."""
    model_type: Literal["unigram", "bpe"] | None = None
    """Kind of SentencePiece model to train; absent: unigram."""
    tokenizer_sample: Annotated[int, Field(ge=1)] = 32 << 20
    """Bytes of train text, about, that the tokenizer is trained on: every k-th document."""
    eval_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.01
    """Fraction of the documents held out, chosen by the hash of their text; at least one unless it is 0."""
    text_field: str = "text"
    """Field or column that holds the text (jsonl, csv, parquet, and such members of archives)."""
    document_unit: DocumentUnit = "file"
    """What is one document of a text file: file, paragraph (ends at an empty line) or line."""
    window: Annotated[int, Field(ge=0)] = 0
    """Bases of a document of a FASTA file; 0: a whole record."""
    reverse_complement: bool = False
    """Add the reverse complement of each document of a FASTA file."""
    soft_mask: Literal["keep", "hide"] = "keep"
    """Lower-case bases of a FASTA file: read like others, or as N."""
    image_size: Annotated[int, Field(ge=1)] | None = None
    """Pixels of a side of the squares to which pictures are resized and cropped."""
    image_color: Literal["grey", "rgb"] | None = None
    """Values of a pixel: one (absent), or red, green and blue."""
    image_labels: ClassFolders | None = None
    """folders: the class of a picture is the folder inside the input in which it lies; none: pictures have no class;
    absent: folders, if all pictures lie in such folders and there are two or more."""
    min_characters: Annotated[int, Field(ge=1)] = 1
    """Documents with fewer characters after normalisation are dropped."""
    max_characters: Annotated[int, Field(ge=1)] | None = None
    """Documents with more characters after normalisation are dropped; absent: none is."""
    near_duplicates: Annotated[float, Field(gt=0.0, le=0.98)] | None = None
    """Drop documents whose runs of five words are to this share (Jaccard) those of an earlier one; absent: only exact
    duplicates are dropped. Above 0.98 datasketch has no bands for it."""
    language: str | None = None
    """Drop documents that are not in this language (ISO 639 code, as en)."""
    language_confidence: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    """Least probability of that language; absent: 0.5."""
    quality: Literal["gopher"] | None = None
    """Drop documents that break one of these rules; that of English stop words holds for --language en, or none."""
    shard_size: Annotated[int, Field(ge=1)] = 256 << 20
    """Bytes of a shard, about."""
    threads: Annotated[int, Field(ge=1, le=1024)] = 1
    """Threads of SentencePiece."""
    part: tuple[int, int] | None = None
    """(i, n): the i-th of n parts of a preparation, counted from 0, which can run at the same time; `join` makes one
    folder of them."""
    divide: Literal["files", "documents"] = "files"
    """files: a part reads every n-th file, and duplicates are found inside a part only; documents: each part reads all
    files and keeps the documents that fall to it by the hash of their text, so duplicates are found everywhere."""
    cache: Path | None = None
    """Where downloads are kept; absent: hydra-scale in the user's cache folder."""


def prepare(options: PrepareOptions, progress: Progress = lambda stage, done, total: None) -> Report:
    """Make a prepared folder. Same documents and options, same bytes; a crash leaves nothing under the final name.

    Raises:
        ConfigError: options contradict each other.
        DataError: the source is empty, missing or damaged, the output is not empty, or the tokenizer does not fit.
        EnvironmentFault: the disk is full or not writable, a download or an optional package is missing.
    """
    _check(options)
    tokenizer = None if options.tokenizer == "sentencepiece" else existing_tokenizer(options.tokenizer)
    classes = find_classes(options.input, options.image_labels) if options.source == "images" else None
    documents = _open_source(options, classes)
    near = NearDuplicates(options.near_duplicates) if options.near_duplicates else None
    filters = _filters(options)
    keep = options.part if options.divide == "documents" else None
    with published(options.output.absolute()) as folder:
        normalise = tokenizer.normalise if tokenizer else normalise_text
        cleaning = Cleaning(normalise, options.min_characters, options.max_characters, keep, near, filters)
        spool = Spool(folder, binary=options.source == "images")
        spool.fill(_counted(cleaning(documents), cleaning, progress), options.eval_fraction)
        if not spool.splits:
            raise DataError(_nothing_kept(options, cleaning))
        if tokenizer is None:
            tokenizer = _train(spool, options, progress)
        tokenizer.save(folder / TOKENIZER_FOLDER)
        labelled = classes is not None
        writers = {
            split: _write_split(spool, split, folder, tokenizer, options, progress, labelled) for split in spool.splits
        }
        spool.remove()
        source = described(options) | {DROPPED: dict(cleaning.dropped), WORDS: spool.num_words}
        entries = {split: writer.entry for split, writer in writers.items()}
        _manifest(tokenizer, source, entries, classes).write(folder)
    return report_of(options.output)


def described(options: PrepareOptions) -> dict[str, JsonValue]:
    """What the manifest says of the source: all options that have a part in the content."""
    return options.model_dump(mode="json", exclude={"output", "cache", "threads", "part"})


def _check(options: PrepareOptions) -> None:
    if (options.source in CORPORA) == bool(options.input):
        wanted = "no --input: it is downloaded" if options.input else "--input FILE_OR_FOLDER ..."
        raise ConfigError(f"--source {options.source} takes {wanted}")
    trained = options.tokenizer == "sentencepiece"
    if options.part and trained:
        raise ConfigError(
            "a preparation in parts (--processes, --tasks) needs a tokenizer that all of them share; prepare a sample"
            " first and give its folder as --tokenizer"
        )
    if options.part and options.divide == "files" and options.source in CORPORA:
        raise ConfigError(f"--source {options.source} is not divided by files; give --divide documents")
    if not trained and (options.vocab_size is not None or options.model_type is not None):
        flag = "--vocab-size" if options.vocab_size is not None else "--model-type"
        raise ConfigError(f"{flag} is for a tokenizer to train; --tokenizer {options.tokenizer} is fixed: leave it out")
    _check_reading(options)
    _check_images(options)
    if options.max_characters is not None and options.max_characters < options.min_characters:
        raise ConfigError(
            f"--max-characters {options.max_characters} is below --min-characters {options.min_characters}: raise it"
        )
    if options.language_confidence is not None and options.language is None:
        raise ConfigError("--language-confidence is the least for --language; give one, as --language en")
    check_free(options.output)


def _check_reading(options: PrepareOptions) -> None:
    """How files are read is not to be said of sources that have no such files: nothing would become of it."""
    for name, sources in _FILES_OF.items():
        is_given = getattr(options, name) != PrepareOptions.model_fields[name].default
        if is_given and options.source not in (*sources, "wheel", "deb", *CORPORA):
            raise ConfigError(
                f"--{name.replace('_', '-')} is for --source {', '.join(sources)}, wheel, deb or a corpus, found"
                f" {options.source}; leave it out"
            )


def _check_images(options: PrepareOptions) -> None:
    if options.source != "images":
        if (options.image_size, options.image_color, options.image_labels) != (None, None, None):
            raise ConfigError(
                f"--image-size, --image-color and --image-labels are for --source images, found {options.source}"
            )
        return
    if options.image_size is None:
        raise ConfigError("--source images needs --image-size N: pictures become N x N pixels")
    if options.tokenizer != "bytes":
        raise ConfigError(f"--source images takes --tokenizer bytes, found {options.tokenizer}")
    if options.language or options.quality or options.near_duplicates:
        raise ConfigError("--source images: --language, --quality and --near-duplicates are for text; leave them out")


def _filters(options: PrepareOptions) -> list[Filter]:
    filters: list[Filter] = []
    if options.quality:
        filters.append(GopherFilter(english=options.language in (None, "en")))
    if options.language:
        confidence = options.language_confidence
        least = DEFAULT_LANGUAGE_CONFIDENCE if confidence is None else confidence
        filters.append(LanguageFilter(options.language, least))
    return filters


def _open_source(
    options: PrepareOptions, classes: Classes | None
) -> Iterator[str] | Iterator[bytes] | Iterator[Labelled]:
    if options.source == "images":
        how_large = ImageOptions(options.image_size or 0, options.image_color or "grey")
        return read_images(inputs_of(options), how_large, classes)
    fasta = FastaOptions(options.window, options.reverse_complement, options.soft_mask)
    how = SourceOptions(options.text_field, options.document_unit, fasta)
    if options.source in CORPORA:
        return read_corpus(options.source, options.cache or _user_cache(), how)
    if options.source in ("wheel", "deb"):
        return (read_wheels if options.source == "wheel" else read_debs)(inputs_of(options), how)
    return read_files(options.source, inputs_of(options), how)


def _nothing_kept(options: PrepareOptions, cleaning: Cleaning) -> str:
    dropped = ", ".join(f"{number:,} {reason}" for reason, number in cleaning.dropped.items() if number)
    if options.part and options.divide == "documents" and not dropped:
        number, count = options.part
        return (
            f"--source {options.source}: none of its {cleaning.num_read:,} documents falls to part {number} of {count};"
            " give fewer --processes or --tasks"
        )
    return (
        f"--source {options.source}: none of its {cleaning.num_read:,} documents is kept"
        f"{f' ({dropped})' if dropped else ''}; check --input, --min-characters and what else drops documents"
    )


def inputs_of(options: PrepareOptions) -> Sequence[Path]:
    """What this part reads.

    Raises:
        ConfigError: there are fewer files than parts.
        DataError: a path is missing, or a folder has no such file.
    """
    if options.part is None or options.divide == "documents":
        return options.input
    number, count = options.part
    files = list_files(options.input, source_suffixes(options.source))
    if len(files) < count:
        raise ConfigError(
            f"--input holds {len(files)} files for {count} parts; give fewer --processes or --tasks, or --divide"
            " documents"
        )
    return files[number::count]


def _user_cache() -> Path:
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hydra-scale"
    except RuntimeError:
        raise EnvironmentFault("this user has no home folder for downloads; give --cache FOLDER") from None


def _counted(documents: Iterator[CleanDocument], cleaning: Cleaning, progress: Progress) -> Iterator[CleanDocument]:
    for number, document in enumerate(documents):
        if number % _REPORT_EVERY == 0:
            progress("reading documents", cleaning.num_read, None)
        yield document
    progress("reading documents", cleaning.num_read, cleaning.num_read)


def _train(spool: Spool, options: PrepareOptions, progress: Progress) -> Tokenizer:
    stride = -(-spool.size("train") // options.tokenizer_sample) or 1
    sample = (text for number, text in enumerate(spool.documents("train")) if number % stride == 0)
    progress("training the tokenizer", 0, None)
    size, kind = options.vocab_size or DEFAULT_VOCAB_SIZE, options.model_type or "unigram"
    tokenizer = train_sentencepiece(sample, size, kind, num_threads=options.threads)
    progress("training the tokenizer", size, size)
    return tokenizer


def _write_split(
    spool: Spool,
    split: Split,
    folder: Path,
    tokenizer: Tokenizer,
    options: PrepareOptions,
    progress: Progress,
    labelled: bool,
) -> ShardWriter:
    stage, done, total = f"tokenising the {split} split", 0, spool.size(split)
    # no two samples of a joined folder have the same key
    key = split if options.part is None else f"{split}-part{options.part[0]:05d}"
    with ShardWriter(folder / split, key, tokenizer.vocab_size, options.shard_size, labelled=labelled) as writer:
        for texts, labels, size in _batches(spool.documents(split)):
            writer.add(tokenizer.encode(texts, num_threads=options.threads), labels)
            done += size
            progress(stage, min(done, total), total)
    progress(stage, total, total)
    return writer


def _batches(documents: Iterator[Any]) -> Iterator[tuple[list[Any], list[int], int]]:
    """Documents of about a million characters together, the label of each if they have labels, and that number."""
    texts: list[Any] = []
    labels: list[int] = []
    size = 0
    for document in documents:
        text = document.content if isinstance(document, Labelled) else document
        if isinstance(document, Labelled):
            labels.append(document.label)
        texts.append(text)
        size += len(text) + 1
        if size >= _BATCH_BYTES:
            yield texts, labels, size
            texts, labels, size = [], [], 0
    if texts:
        yield texts, labels, size


def _manifest(
    tokenizer: Tokenizer, source: dict[str, JsonValue], splits: dict[Split, SplitEntry], classes: Classes | None
) -> Manifest:
    return Manifest(
        version=LABELLED if classes else PLAIN,
        classes=classes.names if classes else None,
        tokenizer=TokenizerEntry(
            kind=tokenizer.kind,
            sha256=tokenizer.sha256,
            vocab_size=tokenizer.vocab_size,
            special_ids={piece: index for index, piece in enumerate(SPECIAL_PIECES)},
        ),
        dtype="uint16" if token_dtype(tokenizer.vocab_size).itemsize == 2 else "uint32",
        source=source,
        splits=splits,
    )
