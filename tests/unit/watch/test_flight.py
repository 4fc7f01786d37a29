"""The flight recorder's file, written by ranks that have done collectives."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch._C import _distributed_c10d

from hydra_scale.watch.flight import write_flight_record


def test_the_last_collectives_are_written_down(tmp_path: Path) -> None:
    run_ranks(2, communicate_and_write, tmp_path)
    for rank in range(2):
        entries = json.loads((tmp_path / f"flight-rank{rank:05d}.json").read_text())["entries"]
        assert [(entry["profiling_name"], entry["input_sizes"]) for entry in entries[-2:]] == [
            ("gloo:all_reduce", [[3]]), ("gloo:broadcast", [[5]])
        ]  # fmt: skip
        assert entries[-1]["collective_seq_id"] == entries[-2]["collective_seq_id"] + 1


def communicate_and_write(folder: Path) -> None:
    dist.init_process_group("gloo")
    dist.all_reduce(torch.ones(3))
    dist.broadcast(torch.ones(5), src=0)
    write_flight_record(folder, dist.get_rank())
    dist.destroy_process_group()


def test_the_record_of_nccl_is_asked_for_under_nccl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name and arguments of PyTorch 2.11 with CUDA, which a PyTorch for the CPU lacks."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr(
        _distributed_c10d, "_dump_nccl_trace_json", lambda includeCollectives, onlyActive: b"{}", raising=False
    )
    write_flight_record(tmp_path, 7)
    assert (tmp_path / "flight-rank00007.json").read_bytes() == b"{}"


def test_there_is_no_record_without_a_process_group(tmp_path: Path) -> None:
    write_flight_record(tmp_path, 0)
    assert not list(tmp_path.iterdir())
