"""What other people's data pipelines do with the same documents: packed, masked, int64 batches on one core.

Each peer gets the documents in its own plain form, one sample a document. Masks are drawn in whole-tensor operations of
PyTorch, so that what is compared is how documents are read, packed and found again; `webdataset-collator` has the
collator of transformers instead, as most recipes do.
"""

import io
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hydra_scale.bench.peers import Peers
from hydra_scale.data.tokenizer import MASK_ID, SPECIAL_PIECES

Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]
"""(inputs, labels), int64 (sequences, seqlen) each; labels are -100 where nothing is predicted."""

Mask = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""inputs -> (corrupted inputs, labels), (sequences, seqlen) each."""

_NUM_SPECIAL = MASK_ID + 1


class DocumentTar:
    """WebDataset as its tutorials have it: a tar with one .npy member a document, decoded and packed in turn."""

    def __init__(self, documents: Sequence[np.ndarray], folder: Path, peers: Peers) -> None:
        self._webdataset = peers.webdataset()
        self.path = folder / "documents.tar"
        with tarfile.open(self.path, "w") as tar:
            for number, document in enumerate(documents):
                content = io.BytesIO()
                np.save(content, document)
                member = tarfile.TarInfo(f"{number:08d}.npy")
                member.size = content.tell()
                content.seek(0)
                tar.addfile(member, content)

    def documents(self) -> Iterator[np.ndarray]:
        """All of them, in order."""
        samples = self._webdataset.WebDataset(str(self.path), shardshuffle=False).decode()
        return (sample["npy"] for sample in samples)


class StreamingFolder:
    """MosaicML streaming: its own shards with one column of bytes."""

    def __init__(self, documents: Sequence[np.ndarray], folder: Path, peers: Peers) -> None:
        self._streaming, self.path = peers.streaming(), folder / "streaming"
        self._dtype = documents[0].dtype
        with self._streaming.MDSWriter(out=str(self.path), columns={"tokens": "bytes"}) as writer:
            for document in documents:
                writer.write({"tokens": document.tobytes()})

    def documents(self) -> Iterator[np.ndarray]:
        """All of them, in order."""
        samples = self._streaming.StreamingDataset(local=str(self.path), shuffle=False, batch_size=1)
        return (np.frombuffer(sample["tokens"], self._dtype) for sample in samples)


class FlatFile:
    """A memory-mapped file of all tokens with the documents' ends beside it, and one numpy generator a sequence."""

    def __init__(self, documents: Sequence[np.ndarray], folder: Path, vocab_size: int) -> None:
        self.path = folder / "tokens.bin"
        np.concatenate(documents).tofile(self.path)
        self._dtype, self._vocab_size = documents[0].dtype, vocab_size
        self._lengths = np.array([len(document) for document in documents])
        self._starts = np.cumsum(self._lengths) - self._lengths

    def batches(self, num_sequences: int, seqlen: int, mask_rate: float) -> Batches:
        """Of a shuffled epoch."""
        tokens = np.memmap(self.path, self._dtype, "r")
        visits = np.random.default_rng(0).permutation(len(self._lengths))
        ends = np.cumsum(self._lengths[visits])
        size = num_sequences * seqlen
        for first in range(0, int(ends[-1]) - size + 1, size):
            begin, last = np.searchsorted(ends, [first, first + size - 1], side="right")
            used = visits[begin : last + 1]
            lengths = self._lengths[used]
            place = np.arange(lengths.sum()) + np.repeat(self._starts[used] - np.cumsum(lengths) + lengths, lengths)
            skipped = first - (int(ends[begin]) - int(lengths[0]))
            inputs = tokens[place[skipped : skipped + size]].astype(np.int64)
            draws = np.concatenate([self._draws(first // seqlen + i, seqlen) for i in range(num_sequences)])
            masked, labels = self._mask(inputs, draws, mask_rate)
            shape = (num_sequences, seqlen)
            yield torch.from_numpy(masked).reshape(shape), torch.from_numpy(labels).reshape(shape)

    def _draws(self, sequence: int, seqlen: int) -> np.ndarray:
        return np.random.Generator(np.random.Philox(key=0, counter=[0, 0, 0, sequence])).random(seqlen, np.float32)

    def _mask(self, inputs: np.ndarray, draws: np.ndarray, mask_rate: float) -> tuple[np.ndarray, np.ndarray]:
        """One number a token decides whether it is masked and, by where below the rate it lies, with what."""
        chosen = (draws < mask_rate) & (inputs >= _NUM_SPECIAL)
        labels = np.where(chosen, inputs, -100)
        random = _NUM_SPECIAL + (draws * (1 << 23)).astype(np.int64) % (self._vocab_size - _NUM_SPECIAL)
        tenth = draws / mask_rate
        shown = np.where(tenth < 0.8, MASK_ID, np.where(tenth < 0.9, random, inputs))
        return np.where(chosen, shown, inputs), labels


def packed_and_masked(documents: Iterator[np.ndarray], num_sequences: int, seqlen: int, mask: Mask) -> Batches:
    """Documents laid end to end and cut, each full batch masked."""
    waiting: list[np.ndarray] = []
    size, num_waiting = num_sequences * seqlen, 0
    for document in documents:
        waiting.append(document)
        num_waiting += len(document)
        if num_waiting >= size:
            tokens = np.concatenate(waiting)
            waiting, num_waiting = [tokens[size:]], len(tokens) - size
            yield mask(torch.from_numpy(tokens[:size].astype(np.int64)).view(-1, seqlen))


def whole_tensor_mask(mask_rate: float, vocab_size: int) -> Mask:
    """80/10/10 in a handful of operations on the whole batch."""

    def mask(inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = (torch.rand(inputs.shape) < mask_rate) & (inputs >= _NUM_SPECIAL)
        labels = inputs.masked_fill(~chosen, -100)
        lot = torch.rand(inputs.shape)
        random = torch.randint(_NUM_SPECIAL, vocab_size, inputs.shape)
        shown = torch.where(lot < 0.8, MASK_ID, torch.where(lot < 0.9, random, inputs))
        return torch.where(chosen, shown, inputs), labels

    return mask


def collator_mask(mask_rate: float, tokenizer_json: Path, peers: Peers) -> Mask:
    """DataCollatorForLanguageModeling of transformers, on a list of tensors."""
    transformers = peers.transformers()
    pad, unk, cls, sep, mask_token = SPECIAL_PIECES
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer_json),
        pad_token=pad,
        unk_token=unk,
        cls_token=cls,
        sep_token=sep,
        mask_token=mask_token,
    )
    collator = transformers.DataCollatorForLanguageModeling(tokenizer, mlm_probability=mask_rate)

    def mask(inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        batch = collator([{"input_ids": row} for row in inputs])
        return batch["input_ids"], batch["labels"]

    return mask


def datatrove_tokens(peers: Peers, texts: Path, tokenizer_json: Path, output: Path) -> Callable[[], Any]:
    """A call that runs datatrove's reader and tokeniser over JSON lines, one task, as its examples do."""
    executor, reader, tokens = peers.datatrove()

    def run() -> None:
        steps = [
            reader.JsonlReader(str(texts.parent), glob_pattern=texts.name),
            tokens.DocumentTokenizer(
                str(output),
                tokenizer_name_or_path=str(tokenizer_json),
                eos_token=None,
                shuffle_documents=False,
                local_working_dir=str(output / "working"),
            ),
        ]
        executor.LocalPipelineExecutor(steps, tasks=1, logging_dir=str(output / "logs")).run()

    return run
