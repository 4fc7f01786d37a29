"""`hydra-scale bench data`: reading, positioning, memory, size and preparation of data, beside other pipelines.

Everything but the last rows runs on one core, on the documents of one prepared folder, in files that were just read
or written, so the page cache is warm. A batch is packed, masked, int64, with what is to be predicted. The last rows
prepare with several processes: `hydra_scale.bench.data_scaling`.
"""

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from hydra_data_prep.prepare import PrepareOptions, prepare
from hydra_scale.bench.cores import on_cores
from hydra_scale.bench.data_peers import (
    Batches,
    DocumentTar,
    FlatFile,
    StreamingFolder,
    collator_mask,
    datatrove_tokens,
    packed_and_masked,
    whole_tensor_mask,
)
from hydra_scale.bench.data_scaling import preparation_on_cores
from hydra_scale.bench.instrument import Timing
from hydra_scale.bench.peers import PeerMissing, Peers, attempt
from hydra_scale.bench.table import Row
from hydra_scale.config import DataConfig
from hydra_scale.data.loader import TrainingData
from hydra_scale.data.manifest import ShardEntry, read_manifest
from hydra_scale.data.order import SequenceOrder
from hydra_scale.data.shards import TokenStore
from hydra_scale.data.tokenizer import SentencePieceTokenizer

PEERS = ("webdataset", "webdataset-collator", "streaming", "memory-map", "datatrove")
_MASK_RATE = 0.3
_SEED = 0
_NUM_WARM_UP = 20


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    folder: Path
    """Of `prepare`; its train split is used."""
    seqlen: int
    num_sequences: int
    """Sequences of a batch."""
    num_timed: int
    """Batches that are timed; peers end sooner if their documents do."""
    num_flat: int
    """Batches over which the growth of memory is measured."""
    num_documents: int
    """Documents that peers and preparation are given, the first ones."""
    peers: Sequence[str]
    num_processes: int
    """Processes that prepare together, each on a core of its own; 1: only one process prepares."""
    tokens_each: int
    """Tokens, about, that each of them prepares."""


def run(plan: Plan, peers: Peers) -> Iterator[list[Row]]:
    """Rows, one subject after the other; files of peers lie in a temporary folder meanwhile."""
    with tempfile.TemporaryDirectory(prefix="hydra-scale-bench-") as temporary:
        with _one_core():
            bench = _Bench(plan, peers, Path(temporary))
            yield [bench.load_ours(), *bench.load_peers()]
            yield [bench.position_ours(), *bench.position_peers()]
            yield bench.sizes()
            yield [bench.memory(), *billion_documents(Path(temporary))]
            yield bench.preparation()
        if plan.num_processes > 1:
            yield bench.preparation_on_cores()


class _Bench:
    """The documents of a plan, and one method a subject."""

    def __init__(self, plan: Plan, peers: Peers, temporary: Path) -> None:
        self._plan, self._peers, self._temporary = plan, peers, temporary
        self._config = DataConfig(train=str(plan.folder), seqlen=plan.seqlen, mask_rate=_MASK_RATE)
        self._data = TrainingData(self._config, _SEED)
        self._tokenizer = self._data.tokenizer
        store = TokenStore(plan.folder, read_manifest(plan.folder), "train")
        count = min(plan.num_documents, len(store.lengths))
        stops = store.lengths[:count].astype(np.int64)
        tokens = store.gather(np.arange(count), np.zeros(count, np.int64), stops)
        self._documents = np.split(tokens, np.cumsum(stops)[:-1])
        self._batch_tokens = plan.num_sequences * plan.seqlen
        self._foreign: dict[str, DocumentTar | StreamingFolder] = {}

    def load_ours(self) -> Row:
        row = self._row("load", "hydra-scale")
        self._took(row, (self._batch(step) for step in range(self._plan.num_timed + _NUM_WARM_UP)))
        return row

    def load_peers(self) -> Iterator[Row]:
        for name in self._plan.peers:
            if name != "datatrove":
                row = self._row("load", name)
                _, row.status = attempt(partial(self._load_peer, name, row))
                yield row

    def position_ours(self) -> Row:
        """Opening the folder anew at a far step, each time in another epoch, to the first batch."""
        row = self._row("position", "hydra-scale")
        times = []
        for turn in range(1, 8):
            started = time.perf_counter()
            self._batch(turn * 10_000_019, TrainingData(self._config, _SEED))
            times.append(1e3 * (time.perf_counter() - started))
        row.took(Timing.of(times))
        row.tokens = None
        return row

    def position_peers(self) -> Iterator[Row]:
        """Skipping the first nine tenths of the documents, which is what these pipelines can do."""
        for name in ("webdataset", "streaming"):
            if name in self._plan.peers:
                row = self._row("position", name)
                _, row.status = attempt(partial(self._skip, name, row))
                row.tokens = None
                yield row

    def sizes(self) -> list[Row]:
        """Of our shards with lengths.npy and the manifest, and of the peers' files."""
        split = read_manifest(self._plan.folder).splits["train"]
        size = sum(file.bytes for file in (split.lengths, *split.shards))
        size += (self._plan.folder / "manifest.json").stat().st_size
        itemsize = self._documents[0].itemsize
        rows = [Row("size", "hydra-scale", size_ratio=size / (split.tokens * itemsize))]
        bare = sum(document.nbytes for document in self._documents)
        for name, peer in self._foreign.items():
            rows.append(Row("size", name, size_ratio=_bytes_under(peer.path) / bare))
        return rows

    def memory(self) -> Row:
        """Growth of the process's own memory over the batches that follow the first tenth of as many."""
        row = Row("memory", "hydra-scale", seqlen=self._plan.seqlen, tokens=self._plan.num_flat * self._batch_tokens)
        _, row.status = attempt(partial(self._measure_growth, row))
        return row

    def preparation(self) -> list[Row]:
        """JSON lines of the documents' text to shards, with the tokenizer of the folder; the tokenizer alone."""
        texts = self._texts()
        source = self._temporary / "texts.jsonl"
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        num_tokens = sum(len(ids) for ids in self._tokenizer.encode(texts))
        rows = []
        for name, make in self._preparations(texts, source):
            row = Row("prepare", name, tokens=num_tokens)
            seconds, row.status = attempt(lambda make=make: _seconds(make()))  # type: ignore[misc]
            if seconds:
                row.milliseconds, row.tokens_per_second = 1e3 * seconds, num_tokens / seconds
            rows.append(row)
        return rows

    def preparation_on_cores(self) -> list[Row]:
        """The same with one process and with several."""
        plan, num_tokens = self._plan, sum(map(len, self._documents))
        arguments = (self._texts(), num_tokens, plan.folder, plan.num_processes, plan.tokens_each, self._temporary)
        rows, status = attempt(partial(preparation_on_cores, *arguments))
        return rows or [Row("prepare on cores", "hydra-scale", processes=plan.num_processes, status=status)]

    def _texts(self) -> list[str]:
        return [self._tokenizer.decode(document) for document in self._documents]

    def _preparations(self, texts: list[str], source: Path) -> Iterator[tuple[str, Callable[[], Callable[[], object]]]]:
        options = PrepareOptions(
            source="jsonl", input=(source,), output=self._temporary / "prepared", tokenizer=str(self._plan.folder)
        )
        yield "hydra-scale", lambda: partial(prepare, options)
        yield "tokenizer alone", lambda: partial(self._tokenizer.encode, texts)
        if "datatrove" in self._plan.peers:
            yield "datatrove", lambda: self._datatrove(source)

    def _datatrove(self, source: Path) -> Callable[[], object]:
        self._peers.datatrove()
        if not isinstance(self._tokenizer, SentencePieceTokenizer):
            raise PeerMissing("datatrove reads the tokenizer.json of a SentencePiece folder only")
        return datatrove_tokens(self._peers, source, self._twin(), self._temporary / "datatrove")

    def _twin(self) -> Path:
        """The tokenizer in the form that other libraries read."""
        from hydra_scale.convert.tokenizer_json import tokenizer_json  # needs the optional package tokenizers

        path = self._temporary / "tokenizer.json"
        if not path.exists():
            tokenizer_json(self._tokenizer).save(str(path))
        return path

    def _load_peer(self, name: str, row: Row) -> None:
        plan, vocab_size = self._plan, self._tokenizer.vocab_size
        if name == "memory-map":
            flat = FlatFile(self._documents, self._temporary, vocab_size)
            batches: Batches = flat.batches(plan.num_sequences, plan.seqlen, _MASK_RATE)
        else:
            documents = self._foreign_form(name.removesuffix("-collator")).documents()
            mask = (
                collator_mask(_MASK_RATE, self._twin(), self._peers)
                if name.endswith("-collator")
                else whole_tensor_mask(_MASK_RATE, vocab_size)
            )
            batches = packed_and_masked(documents, plan.num_sequences, plan.seqlen, mask)
        self._took(row, batches)

    def _skip(self, name: str, row: Row) -> None:
        form, num_skipped = self._foreign_form(name), len(self._documents) * 9 // 10
        started = time.perf_counter()
        next(islice(form.documents(), num_skipped, None))
        row.milliseconds = 1e3 * (time.perf_counter() - started)

    def _foreign_form(self, name: str) -> DocumentTar | StreamingFolder:
        if name not in self._foreign:
            form = DocumentTar if name == "webdataset" else StreamingFolder
            self._foreign[name] = form(self._documents, self._temporary, self._peers)
        return self._foreign[name]

    def _measure_growth(self, row: Row) -> None:
        first = self._plan.num_flat // 10
        for step in range(first):
            self._batch(step)
        before = _own_memory()
        for step in range(first, first + self._plan.num_flat):
            self._batch(step)
        row.growth_mib = (_own_memory() - before) / 2**20

    def _batch(self, step: int, data: TrainingData | None = None) -> object:
        count = self._plan.num_sequences
        return (data or self._data).micro_batches(step, 0, 1, count, count)

    def _row(self, what: str, implementation: str) -> Row:
        return Row(what, implementation, seqlen=self._plan.seqlen, tokens=self._batch_tokens)

    def _took(self, row: Row, batches: Iterator[object]) -> None:
        """Fill in the time of a batch; the rate is that of all timed batches together.

        Raises:
            PeerMissing: there are too few documents for a batch.
        """
        marks = [time.perf_counter() for _ in islice(batches, self._plan.num_timed + _NUM_WARM_UP)]
        marks = marks[min(_NUM_WARM_UP, len(marks) // 2) :]
        if len(marks) < 2:
            raise PeerMissing("too few documents for two batches; raise --documents or choose a larger folder")
        row.took(Timing.of(list(1e3 * np.diff(marks))))
        row.tokens_per_second = self._batch_tokens * (len(marks) - 1) / (marks[-1] - marks[0])


def billion_documents(temporary: Path) -> list[Row]:
    """Opening the manifest and the order of 10^9 documents, and the first batch at far positions of it.

    The manifest is made up: 4,000 shards of 500 blocks of 500 documents. Lengths stay on disk in a real folder, so here
    they are one number seen 10^9 times; the offsets of documents take 8 bytes for each 32 of them more.
    """
    rows = [Row("10^9 documents", name) for name in ("manifest", "order", "position")]
    _, status = attempt(partial(_measure_billion, temporary, *rows))
    for row in rows:
        row.status = status
    return rows


def _measure_billion(folder: Path, manifest: Row, order: Row, position: Row) -> None:
    num_shards, num_blocks, documents, length = 4000, 500, 500, 235
    blocks = [(1024 + i * 236_032, documents, documents * length) for i in range(num_blocks)]
    path = folder / "shards.json"
    with path.open("w") as file:
        for number in range(num_shards):
            totals = {"documents": documents * num_blocks, "tokens": documents * num_blocks * length}
            entry = {"name": f"shard-{number:06d}.tar", "bytes": 1 << 27, "sha256": f"{number:064x}"}
            file.write(json.dumps(entry | totals | {"blocks": blocks}) + "\n")
    before, started = _own_memory(), time.perf_counter()
    with path.open() as file:
        shards = [ShardEntry.model_validate_json(line) for line in file]
    manifest.milliseconds = 1e3 * (time.perf_counter() - started)
    manifest.growth_mib = (_own_memory() - before) / 2**20
    sizes = np.array([block.documents for shard in shards for block in shard.blocks])
    before, started = _own_memory(), time.perf_counter()
    lengths = np.broadcast_to(np.uint32(length), int(sizes.sum()))
    opened = SequenceOrder(lengths, 512, _SEED, packing=True, blocks=sizes)
    order.milliseconds = 1e3 * (time.perf_counter() - started)
    opened.pieces(0, 32)
    times = [_seconds(partial(opened.pieces, turn * 10_000_019, 32)) for turn in range(1, 12)]
    position.took(Timing.of([1e3 * seconds for seconds in times]))
    order.growth_mib = (_own_memory() - before) / 2**20


@contextmanager
def _one_core() -> Iterator[None]:
    """This process on one of its cores, and PyTorch on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with on_cores(1):
            yield
    finally:
        torch.set_num_threads(threads)


def _own_memory() -> int:
    """Bytes of this process that are no file's, as Linux counts them.

    Raises:
        PeerMissing: not on Linux.
    """
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    for line in lines:
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise PeerMissing("the memory of a process is read from Linux's /proc")


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _bytes_under(path: Path) -> int:
    return path.stat().st_size if path.is_file() else sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
