"""Batches for the model: order, gathering and masking put together, for training and for evaluation."""

import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from hydra_scale.config import DataConfig
from hydra_scale.data.manifest import MANIFEST, TOKENIZER_FOLDER
from hydra_scale.data.masking import Masking
from hydra_scale.data.sequences import MixedSplits, PreparedSplit, SetAside
from hydra_scale.data.shards import token_counts
from hydra_scale.data.skipping import Skipped, batch_of
from hydra_scale.data.tokenizer import Tokenizer
from hydra_scale.errors import DataError
from hydra_scale.topology import Topology

_EVALUATION_SEED = 0
_STEPS_AHEAD = 2


@dataclass(frozen=True)
class Batch:
    """S pieces of documents laid end to end, T tokens, M of them to predict. No piece sees another."""

    input_ids: torch.Tensor
    """int64 (T,), corrupted."""
    cu_seqlens: torch.Tensor
    """int32 (S + 1,): piece i is tokens [cu_seqlens[i], cu_seqlens[i + 1])."""
    max_seqlen: int
    """Tokens of the longest piece."""
    position_ids: torch.Tensor
    """int64 (T,), counted from the start of each piece."""
    masked_positions: torch.Tensor
    """int64 (M,) into T, ascending."""
    targets: torch.Tensor
    """int64 (M,), the tokens that stood there."""
    token_keys: torch.Tensor
    """int64 (T,), sequence * seqlen + offset: the token's place in the run, for draws that follow the token."""
    num_sequences: int
    documents: torch.Tensor
    """int64 (S,), the document of each piece."""
    first_token: int = 0
    """Of a stretch of a batch: where it begins. `cu_seqlens` and the counts of pieces stay those of the whole."""

    def on(self, topology: Topology, at_least: int = 0) -> "Batch":
        """What a rank holds of it, on its device: all, or its stretch under context parallelism.

        Under sequence parallelism and in pipelines tokens are divided evenly, and there are `at_least` so many of them
        to divide: then a piece of nothing may follow the last.
        """
        context, tensor = topology.context, topology.tensor
        parts = (1 if context is None else context.size) * (tensor.size if tensor.sequence else 1)
        divides_evenly = tensor.sequence or topology.stage.size > 1
        longest = max(at_least, self.input_ids.numel())
        whole = self.padded(-(-longest // parts) * parts) if divides_evenly else self
        here = whole if context is None else whole.stretch(*context.stretch(whole.input_ids.numel()))
        return here.moved(topology.accelerator.send)

    def padded(self, length: int) -> "Batch":
        """With one piece more, of token 0 and nothing to predict, up to `length` tokens."""
        num_tokens = self.input_ids.numel()
        missing = length - num_tokens
        if missing == 0:
            return self
        tokens = {name: getattr(self, name) for name in ("input_ids", "position_ids", "token_keys")}
        longer: dict[str, Any] = {name: torch.nn.functional.pad(t, (0, missing)) for name, t in tokens.items()}
        end = self.cu_seqlens.new_tensor([num_tokens + missing])
        return replace(self, cu_seqlens=torch.cat((self.cu_seqlens, end)), **longer)

    def stretch(self, first: int, end: int) -> "Batch":
        """Tokens [first, end) and the masked positions among them, counted from `first`."""
        begin, stop = torch.searchsorted(self.masked_positions, torch.tensor([first, end])).tolist()
        return replace(
            self,
            first_token=first,
            input_ids=self.input_ids[first:end],
            position_ids=self.position_ids[first:end],
            token_keys=self.token_keys[first:end],
            masked_positions=self.masked_positions[begin:stop] - first,
            targets=self.targets[begin:stop],
        )

    def moved(self, send: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        """The batch with its tensors where `send` brings them; borders stay on the host, where they are checked."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        del tensors["cu_seqlens"]
        sent: dict[str, Any] = {name: send(tensor) for name, tensor in tensors.items()}
        return replace(self, **sent)


class Prefetched(NamedTuple):
    """A step's micro batches."""

    step: int
    batches: list[Batch]
    waited: float
    """Seconds between asking for them and having them."""


def on_rank(batches: list[Batch], topology: Topology) -> list[Batch]:
    """What a rank holds of each. Stages of a pipeline know the length of what they receive: all are as the longest."""
    longest = max(batch.input_ids.numel() for batch in batches) if topology.stage.size > 1 else 0
    return [batch.on(topology, at_least=longest) for batch in batches]


class Unigram(NamedTuple):
    """What the frequencies of tokens alone predict."""

    most_frequent: int
    """The likeliest ordinary token."""
    log_probabilities: np.ndarray
    """float64 (vocab_size,), add-one smoothed over the ordinary tokens; -inf at special ones, never targets."""

    @classmethod
    def from_counts(cls, counts: np.ndarray, is_special: np.ndarray) -> "Unigram":
        """From occurrences of each id, int64 (vocab_size,)."""
        smoothed = np.where(is_special, 0.0, counts + 1.0)
        with np.errstate(divide="ignore"):
            return cls(int(smoothed.argmax()), np.log(smoothed / smoothed.sum()))


class _Batches:
    """Makes the batch of any range of sequences: lays them out and masks them."""

    def __init__(self, sequences: PreparedSplit | MixedSplits, config: DataConfig, seed: int, tokenizer: Tokenizer):
        self._sequences, self._seqlen = sequences, config.seqlen
        self._masking = Masking(config.masking, seed, tokenizer)

    def __call__(self, first: int, count: int, mask_rate: float) -> Batch:
        """Sequences [first, first + count)."""
        pieces, tokens = self._sequences.lay_out(first, count)
        lengths = pieces.stops - pieces.starts
        borders = np.concatenate([[0], np.cumsum(lengths)])
        places = np.arange(len(tokens))
        sequences = np.repeat(pieces.sequences, lengths)
        first_piece = np.searchsorted(pieces.sequences, pieces.sequences, side="left")
        offsets = places - np.repeat(borders[first_piece], lengths)
        masked = self._masking(tokens, sequences, offsets, borders[:-1], mask_rate)
        return Batch(
            input_ids=torch.from_numpy(masked.input_ids),
            cu_seqlens=torch.from_numpy(borders.astype(np.int32)),
            max_seqlen=int(lengths.max()),
            position_ids=torch.from_numpy(places - np.repeat(borders[:-1], lengths)),
            masked_positions=torch.from_numpy(masked.positions),
            targets=torch.from_numpy(masked.targets),
            token_keys=torch.from_numpy(sequences * self._seqlen + offsets),
            num_sequences=count,
            documents=torch.from_numpy(pieces.documents),
        )


class TrainingData:
    """The training sequences of a run. Any batch is a function of its number: nothing has to be saved to resume.

    Args:
        config: folders, sequence length, packing and masks.
        seed: of the order and of the masks.
        without: shards that are as if they had never been prepared.

    Raises:
        ConfigError: the weight of a source is too small to count.
        DataError: a folder is missing, damaged, or inconsistent.
    """

    def __init__(self, config: DataConfig, seed: int, without: SetAside | None = None) -> None:
        self._config, self._first_batch = config, 0
        self._sequences = MixedSplits(config, seed, without or {})
        first = self._sequences.splits[0]
        self.tokenizer = first.tokenizer
        self.tokenizer_folder = first.folder / TOKENIZER_FOLDER
        self.fingerprint = self._sequences.fingerprint
        """Hash of the tokens and their order in the folders: a run may continue only on data with the same one."""
        self._batch = _Batches(self._sequences, config, seed, self.tokenizer)

    @property
    def reading(self) -> str:
        """The shard of each source that was last read from, or is being read."""
        return ", ".join(str(split.store.reading) for split in self._sequences.splits if split.store.reading)

    def begin_at(self, batch: int) -> None:
        """The batches after `batch` are those from the first sequence on: the run had other data before."""
        self._first_batch = batch

    def micro_batches(
        self,
        step: int,
        rank: int,
        num_ranks: int,
        global_batch_size: int,
        micro_batch_size: int,
        skipped: Skipped = (),
    ) -> list[Batch]:
        """What data parallel rank `rank` of `num_ranks` computes in step `step`, counted from 0.

        The global batch is sequences [step * global_batch_size, (step + 1) * global_batch_size) of the run, whatever
        the number of ranks, unless batches are `skipped` or the data did not `begin_at` 0; each rank takes an equal
        stretch of it. The mask rate is the step's. `num_ranks` divides `global_batch_size`.

        Raises:
            DataError: a shard is missing, cut or altered.
        """
        share = global_batch_size // num_ranks
        begin = (batch_of(step + 1, skipped) - 1 - self._first_batch) * global_batch_size + rank * share
        firsts, rate = range(begin, begin + share, micro_batch_size), self._config.mask_rate_at(step)
        return [self._batch(first, min(micro_batch_size, begin + share - first), rate) for first in firsts]

    def ledger_hash(self, batch: int, global_batch_size: int) -> str:
        """Hex sha256 of a global batch, counted from 0: its (document, start, stop), int64, in order."""
        pieces = self._sequences.pieces((batch - self._first_batch) * global_batch_size, global_batch_size)
        rows = np.stack([pieces.documents, pieces.starts, pieces.stops], axis=1)
        return hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest()

    @contextmanager
    def prefetch(
        self,
        first_step: int,
        last_step: int,
        rank: int,
        num_ranks: int,
        global_batch_size: int,
        micro_batch_size: int,
        skipped: Skipped = (),
    ) -> Iterator[Iterator[Prefetched]]:
        """Steps [first_step, last_step), made by one thread that stays two steps ahead.

        An error of the thread is raised where its step is asked for. Leaving the context ends the thread.
        """

        def make(step: int) -> list[Batch]:
            return self.micro_batches(step, rank, num_ranks, global_batch_size, micro_batch_size, skipped)

        with ThreadPoolExecutor(1, "hydra-scale-data") as thread:
            yield _ahead(thread, make, range(first_step, last_step))


class EvaluationData:
    """Held-out sequences in manifest order, with the same masks in every evaluation.

    Args:
        config: its eval folder is used, or else its first train folder.
        tokenizer: the tokenizer of the model, which must be the one of the data; absent: not compared.
        without: shards of train splits that may be damaged.

    Raises:
        DataError: the folder is missing, damaged, without an eval split, or of another tokenizer.
    """

    def __init__(self, config: DataConfig, tokenizer: Tokenizer | None = None, without: SetAside | None = None) -> None:
        address = config.eval or config.sources[0].path
        self._split = PreparedSplit(address, "eval", config, None, (without or {}).get(address, ()))
        self._mask_rate, folder = config.eval_mask_rate, self._split.folder
        self.tokenizer = self._split.tokenizer
        self._batch = _Batches(self._split, config, _EVALUATION_SEED, self.tokenizer)
        if tokenizer is not None and tokenizer.sha256 != self.tokenizer.sha256:
            raise DataError(
                f"{folder / MANIFEST}: prepared with tokenizer {self.tokenizer.kind} {self.tokenizer.sha256[:12]}, the"
                f" model's is {tokenizer.kind} {tokenizer.sha256[:12]}; prepare it with `--tokenizer TRAIN_FOLDER`"
            )
        counts = token_counts(folder, self._split.manifest, "train")
        self.unigram = Unigram.from_counts(counts, self.tokenizer.is_special)
        """Frequencies in the train split of the same folder."""

    def check_targets(self, num_sequences: int) -> None:
        """Raises DataError: of these sequences no token is masked, so that nothing could be scored."""
        if not any(len(batch.targets) for batch, _ in self.batches(num_sequences, 1, 0, 1)):
            raise DataError(
                f"{self._split.folder}: no token of its eval split is masked at rate {self._mask_rate:g}, so there is"
                " nothing to score; prepare again with a larger --eval-fraction, set data.eval to another folder, or,"
                " where it leaves no room for words, raise data.seqlen"
            )

    def batches(
        self, num_sequences: int, micro_batch_size: int, rank: int, num_ranks: int
    ) -> Iterator[tuple[Batch, bool]]:
        """This rank's share of the first `num_sequences` sequences, or of all there are, as (batch, counted).

        Every rank gets the same number of batches, since forward passes may be collective: a rank with nothing left
        gets one again that is not to be counted.
        """
        total = min(num_sequences, self._split.order.num_sequences or 0)
        firsts = range(0, total, micro_batch_size)
        for turn in range(-(-len(firsts) // num_ranks)):
            mine = turn * num_ranks + rank
            first = firsts[min(mine, len(firsts) - 1)]
            batch = self._batch(first, min(micro_batch_size, total - first), self._mask_rate)
            yield batch, mine < len(firsts)


def _ahead(thread: ThreadPoolExecutor, make: Callable[[int], list[Batch]], steps: range) -> Iterator[Prefetched]:
    pending: deque[Future[list[Batch]]] = deque(thread.submit(make, step) for step in steps[:_STEPS_AHEAD])
    for index, step in enumerate(steps):
        asked = time.perf_counter()
        batches = pending.popleft().result()
        waited = time.perf_counter() - asked
        if index + _STEPS_AHEAD < len(steps):
            pending.append(thread.submit(make, steps[index + _STEPS_AHEAD]))
        yield Prefetched(step, batches, waited)
