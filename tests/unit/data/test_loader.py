"""Batches: every number of ranks and micro batches gives the same run, and nothing sees another document."""

import hashlib
import threading
import time
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_up import Documents, WriteFolder, random_documents

from hydra_scale.config import DataConfig
from hydra_scale.data.loader import Batch, EvaluationData, TrainingData, Unigram
from hydra_scale.data.tokenizer import MASK_ID, SEP_ID
from hydra_scale.errors import DataError

SEQLEN = 48
GLOBAL = 12
PACKING = pytest.mark.parametrize("packing", [True, False], ids=["packed", "unpacked"])


@pytest.fixture
def folder(write_folder: WriteFolder, documents: Documents) -> Path:
    return write_folder(documents, random_documents(31, seed=8))


def config(folder: Path, **options: Any) -> DataConfig:
    return DataConfig(train=str(folder), seqlen=SEQLEN, **options)


def original(batch: Batch) -> torch.Tensor:
    """The tokens before masking."""
    tokens = batch.input_ids.clone()
    tokens[batch.masked_positions] = batch.targets
    return tokens


def pieces(batch: Batch) -> list[tuple[int, list[int], list[int], list[int]]]:
    """(document, tokens, corrupted tokens, keys) of each piece."""
    parts = [
        tensor.split(batch.cu_seqlens.diff().tolist())
        for tensor in (original(batch), batch.input_ids, batch.token_keys)
    ]
    return [(d, *(p.tolist() for p in ps)) for d, *ps in zip(batch.documents.tolist(), *parts, strict=True)]


@PACKING
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("micro_batch_size", [1, 3, 5])
def test_global_batch_is_the_same_for_every_layout(
    packing: bool, num_ranks: int, micro_batch_size: int, folder: Path
) -> None:
    data = TrainingData(config(folder, packing=packing), seed=3)
    for step in (0, 1, 57):
        whole = data.micro_batches(step, 0, 1, GLOBAL, GLOBAL)
        ranks = [data.micro_batches(step, rank, num_ranks, GLOBAL, micro_batch_size) for rank in range(num_ranks)]
        assert len({len(batches) for batches in ranks}) == 1
        assert sum(batch.num_sequences for batch in chain(*ranks)) == GLOBAL
        assert list(chain(*(pieces(batch) for batch in chain(*ranks)))) == pieces(whole[0])


@PACKING
def test_batch_is_consistent(packing: bool, folder: Path, documents: Documents) -> None:
    (batch,) = TrainingData(config(folder, packing=packing), seed=3).micro_batches(0, 0, 1, GLOBAL, GLOBAL)
    lengths = batch.cu_seqlens.diff()
    num_tokens = int(batch.cu_seqlens[-1])
    assert batch.cu_seqlens.dtype == torch.int32
    for tensor in (batch.input_ids, batch.position_ids, batch.token_keys):
        assert (tensor.dtype, tensor.shape) == (torch.int64, (num_tokens,))
    assert (batch.masked_positions.dtype, batch.targets.dtype) == (torch.int64, torch.int64)
    assert lengths.min() > 0
    assert batch.max_seqlen == lengths.max()
    assert batch.position_ids.tolist() == list(chain(*(range(n) for n in lengths.tolist())))
    assert len(batch.documents) == len(lengths)
    assert 0 < len(batch.targets) < num_tokens
    assert (batch.input_ids == MASK_ID).sum() > 0
    if packing:
        assert batch.token_keys.tolist() == list(range(GLOBAL * SEQLEN))
    else:
        expected = [sequence * SEQLEN + place for sequence, n in enumerate(lengths.tolist()) for place in range(n)]
        assert batch.token_keys.tolist() == expected


def test_packed_run_holds_every_document_whole_in_each_epoch(folder: Path, documents: Documents) -> None:
    """Two epochs read batch by batch, glued together again: each document twice, nothing else."""
    data = TrainingData(config(folder), seed=3)
    total = sum(map(len, documents))
    sequences = -(-2 * total // SEQLEN)
    tokens = torch.cat([original(data.micro_batches(step, 0, 1, 1, 1)[0]) for step in range(sequences)])
    for epoch in range(2):
        found = tokens[epoch * total : (epoch + 1) * total].numpy()
        ends = np.flatnonzero(found == SEP_ID) + 1
        read = sorted(part.tolist() for part in np.split(found, ends[:-1]))
        assert read == sorted(document.tolist() for document in documents)


def test_unpacked_sequence_keeps_its_frame_when_cut(folder: Path, documents: Documents) -> None:
    data = TrainingData(config(folder, packing=False), seed=3)
    cut = 0
    for step in range(13):
        (batch,) = data.micro_batches(step, 0, 1, GLOBAL, GLOBAL)
        for document, tokens, _, _ in pieces(batch):
            whole = documents[document].tolist()
            expected = whole if len(whole) <= SEQLEN else [*whole[: SEQLEN - 1], SEP_ID]
            cut += len(whole) > SEQLEN
            assert tokens == expected
    assert cut > 10


def test_ledger_is_the_hash_of_document_start_stop(folder: Path, documents: Documents) -> None:
    """Recomputed from the tokens: random documents are told apart by their content."""
    data = TrainingData(config(folder), seed=3)
    (batch,) = data.micro_batches(5, 0, 1, GLOBAL, GLOBAL)
    rows = []
    for document, tokens, _, _ in pieces(batch):
        whole = documents[document].tolist()
        start = next(s for s in range(len(whole)) if whole[s : s + len(tokens)] == tokens)
        rows.append((document, start, start + len(tokens)))
    assert any(start > 0 for _, start, _ in rows)
    assert data.ledger_hash(5, GLOBAL) == hashlib.sha256(np.array(rows, "<i8").tobytes()).hexdigest()
    assert data.ledger_hash(5, GLOBAL) != data.ledger_hash(6, GLOBAL)


def test_masks_change_from_epoch_to_epoch(write_folder: WriteFolder) -> None:
    """One document, one sequence an epoch: the same tokens under other masks."""
    folder = write_folder(random_documents(1, longest=90))
    data = TrainingData(config(folder, packing=False), seed=3)
    batches = [data.micro_batches(step, 0, 1, 1, 1)[0] for step in range(4)]
    assert len({tuple(original(batch).tolist()) for batch in batches}) == 1
    assert len({tuple(batch.masked_positions.tolist()) for batch in batches}) == 4


def test_data_that_begin_late_give_their_first_batches(folder: Path) -> None:
    """As after a change of data, also where batches are skipped since."""
    fresh, late = (TrainingData(config(folder), seed=3) for _ in range(2))
    late.begin_at(7)
    for step, skipped, first in ((7, (), 0), (9, (), 2), (9, ((8, 9),), 4), (9, ((1, 2),), 4)):
        (one,) = late.micro_batches(step, 0, 1, GLOBAL, GLOBAL, skipped)
        (other,) = fresh.micro_batches(first, 0, 1, GLOBAL, GLOBAL)
        assert one.input_ids.equal(other.input_ids) and one.documents.equal(other.documents)
    assert late.ledger_hash(9, GLOBAL) == fresh.ledger_hash(2, GLOBAL)


def test_seed_changes_order_and_masks(folder: Path) -> None:
    one, other = (TrainingData(config(folder), seed).micro_batches(0, 0, 1, GLOBAL, GLOBAL)[0] for seed in (1, 2))
    assert one.documents.tolist() != other.documents.tolist()
    assert one.masked_positions.tolist() != other.masked_positions.tolist()


def test_prefetch_gives_the_same_batches(folder: Path) -> None:
    data = TrainingData(config(folder), seed=3)
    with data.prefetch(4, 11, 1, 2, GLOBAL, 3) as steps:
        found = [(step, [pieces(batch) for batch in batches]) for step, batches, _ in steps]
    expected = [(step, [pieces(batch) for batch in data.micro_batches(step, 1, 2, GLOBAL, 3)]) for step in range(4, 11)]
    assert found == expected


def test_prefetch_passes_errors_on_and_ends_its_thread(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = TrainingData(config(folder), seed=3)
    whole = data.micro_batches

    def fail_at_6(step: int, *args: int) -> list[Batch]:
        if step == 6:
            raise DataError("shard-000002.tar: gone")
        return whole(step, *args)

    monkeypatch.setattr(data, "micro_batches", fail_at_6)
    seen = []
    with pytest.raises(DataError, match="gone"), data.prefetch(0, 100, 0, 1, GLOBAL, 3) as steps:
        seen.extend(step for step, _, _ in steps)
    assert seen == [0, 1, 2, 3, 4, 5]


def test_prefetch_tells_how_long_a_step_waited(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch of step 3 is made only when the main thread has been seen waiting for it a while."""
    data = TrainingData(config(folder), seed=3)
    asked = threading.Event()

    def make(step: int, *args: int) -> list[Batch]:
        if step == 3:
            assert asked.wait(60)
            begun = time.perf_counter()
            while time.perf_counter() - begun < 0.05:
                pass
        return []

    monkeypatch.setattr(data, "micro_batches", make)
    waited = {}
    with data.prefetch(0, 6, 0, 1, GLOBAL, 3) as steps:
        for step, _, seconds in steps:
            waited[step] = seconds
            if step == 2:
                asked.set()
    assert waited[3] == max(waited.values()) >= 0.04


def test_prefetch_stays_two_steps_ahead_and_stops(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = TrainingData(config(folder), seed=3)
    made: list[int] = []
    monkeypatch.setattr(data, "micro_batches", lambda step, *args: made.append(step) or [])
    before = threading.active_count()
    with data.prefetch(0, 1000, 0, 1, GLOBAL, 3) as steps:
        for step, _, _ in steps:
            assert made[-1] <= step + 2
            if step == 20:
                break
    assert max(made) <= 22
    assert threading.active_count() == before


@PACKING
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 7])
def test_evaluation_covers_the_sequences_once(packing: bool, num_ranks: int, folder: Path) -> None:
    data = EvaluationData(config(folder, packing=packing))
    expected = [d.tolist() for d in random_documents(31, seed=8)]
    ranks = [list(data.batches(10_000, 2, rank, num_ranks)) for rank in range(num_ranks)]
    assert len({len(batches) for batches in ranks}) == 1
    turns = chain(*zip(*ranks, strict=True))  # batch by batch over the ranks is the order of the data
    counted = [batch for batch, counts in turns if counts]
    tokens = torch.cat([original(batch) for batch in counted]).tolist()
    if packing:
        assert tokens == list(chain(*expected))
    else:
        cut = [d if len(d) <= SEQLEN else [*d[: SEQLEN - 1], SEP_ID] for d in expected]
        assert tokens == list(chain(*cut))
    keys = torch.cat([batch.token_keys for batch in counted])
    assert len(keys.unique()) == len(keys)


def test_evaluation_takes_the_first_sequences_with_fixed_masks(folder: Path) -> None:
    data = EvaluationData(config(folder))
    first = [pieces(batch) for batch, _ in data.batches(7, 3, 0, 1)]
    assert [batch.num_sequences for batch, _ in data.batches(7, 3, 0, 1)] == [3, 3, 1]
    again = EvaluationData(config(folder, mask_rate=0.5))
    assert first == [pieces(batch) for batch, _ in again.batches(7, 3, 0, 1)]
    one_by_one = [pieces(batch) for batch, _ in again.batches(7, 1, 0, 1)]
    assert list(chain(*first)) == list(chain(*one_by_one))


def test_evaluation_without_targets_is_refused(write_folder: WriteFolder) -> None:
    """Two tokens a document that are never masked, and one that is, at so low a rate that it seldom happens."""
    folder = write_folder(random_documents(31), [np.array([2, 100, 3])] * 2)
    with pytest.raises(DataError, match="no token of its eval split is masked at rate 1e-06, .* --eval-fraction"):
        EvaluationData(config(folder, eval_mask_rate=1e-6)).check_targets(100)
    EvaluationData(config(folder, eval_mask_rate=0.999)).check_targets(100)


def test_evaluation_has_its_own_mask_rate(folder: Path) -> None:
    data = EvaluationData(config(folder, eval_mask_rate=0.6))
    batches = [batch for batch, _ in data.batches(10_000, 8, 0, 1)]
    ordinary = sum(int((original(batch) >= 5).sum()) for batch in batches)
    masked = sum(len(batch.targets) for batch in batches)
    assert abs(masked - 0.6 * ordinary) < 5 * np.sqrt(0.6 * 0.4 * ordinary)


def test_unigram_is_the_smoothed_frequency() -> None:
    unigram = Unigram.from_counts(np.array([0, 0, 90, 90, 0, 7, 0, 1]), np.arange(8) < 5)
    assert unigram.most_frequent == 5
    assert np.exp(unigram.log_probabilities).tolist() == pytest.approx([0] * 5 + [8 / 11, 1 / 11, 2 / 11])


def test_unigram_of_a_folder_is_of_its_train_split(folder: Path, documents: Documents) -> None:
    counts = np.bincount(np.concatenate(documents), minlength=261)[5:] + 1
    found = EvaluationData(config(folder)).unigram
    assert np.exp(found.log_probabilities[5:]) == pytest.approx(counts / counts.sum())
    assert found.most_frequent == 5 + counts.argmax()


def test_batch_moves_to_a_device(folder: Path) -> None:
    (batch,) = TrainingData(config(folder), seed=3).micro_batches(0, 0, 1, 4, 4)
    moved = batch.moved(lambda tensor: tensor.to("meta"))
    places = {name: value.device.type for name, value in vars(moved).items() if isinstance(value, torch.Tensor)}
    assert places.pop("cu_seqlens") == "cpu"
    assert set(places.values()) == {"meta"}
    assert (moved.max_seqlen, moved.num_sequences) == (batch.max_seqlen, 4)
