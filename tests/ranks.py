"""The one launcher of distributed tests: a server imports everything once, then each rank is a fork of it, with the
variables that `hydra-scale launch` sets.

Functions given to `run_ranks` are module-level functions of test files; they run with the variables of torchrun set.
"""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from hydra_launch.environment import defaults

forks = multiprocessing.get_context("forkserver")
"""Starts processes that have imported everything: an interpreter needs four seconds of a core for that."""
if not torch.cuda.is_available():  # no fork of a process that has touched CUDA can use it: there each rank imports
    forks.set_forkserver_preload(["hydra_scale.training.pretrain", "deepspeed", "hydra_kernels"])
    os.environ["DS_ACCELERATOR"] = "cpu"  # inherited by the server, which imports deepspeed itself


def run_ranks(num_ranks: int, function: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
    """Call `function(*args)` in `num_ranks` processes that form one job; returns their results in rank order.

    Raises:
        AssertionError: a rank raised (with its trace), died or did not return in time.
    """
    port = _free_port()
    channels = [forks.Pipe(duplex=False) for _ in range(num_ranks)]
    processes = [
        forks.Process(target=_rank_main, args=(send, rank, num_ranks, port, function, args))
        for rank, (_, send) in enumerate(channels)
    ]
    for process in processes:
        process.start()
    for _, send in channels:
        send.close()
    try:
        return _collect([receive for receive, _ in channels], timeout)
    finally:
        for process in processes:
            process.kill()
            process.join()


def run_to_death(function: Callable[..., Any], *args: Any, timeout: float = 120.0) -> int:
    """Call `function(*args)` in a process of its own that may kill itself; returns 0 or minus the signal."""
    receive, send = forks.Pipe(duplex=False)
    process = forks.Process(target=_rank_main, args=(send, 0, 1, _free_port(), function, args))
    process.start()
    send.close()
    try:
        assert receive.poll(timeout), f"neither returned nor died within {timeout} s"
        try:
            failure, _ = receive.recv()
            assert failure is None, failure
        except EOFError:
            pass
        process.join()
        assert process.exitcode is not None
        return process.exitcode
    finally:
        process.kill()
        process.join()


def end_ranks(num_ranks: int, function: Callable[..., Any], *args: Any, timeout: float = 60.0) -> list[int]:
    """As `run_ranks`, for ranks that end themselves or are killed: returns their exit codes, minus the signal if one
    killed them; an exception counts as its `exit_code` or 1, a normal return as 0.

    Raises:
        AssertionError: a rank did not end in time.
    """
    port = _free_port()
    processes = [
        forks.Process(target=_ending_rank, args=(rank, num_ranks, port, function, args)) for rank in range(num_ranks)
    ]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(timeout)
            assert process.exitcode is not None, f"process {process.name} did not end within {timeout} s"
        return [int(process.exitcode or 0) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()


def _ending_rank(rank: int, num_ranks: int, port: int, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    _become_rank(rank, num_ranks, port)
    try:
        function(*args)
    except Exception as error:
        traceback.print_exc()
        os._exit(getattr(error, "exit_code", 1))


def _collect(receivers: list[Connection], timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    pending = {receiver: rank for rank, receiver in enumerate(receivers)}
    while pending:
        ready = wait(list(pending), timeout)
        assert ready, f"ranks {sorted(pending.values())} did not return within {timeout} s"
        for receiver in ready:
            rank = pending.pop(receiver)  # type: ignore[call-overload]
            try:
                failure, results[rank] = receiver.recv()  # type: ignore[union-attr]
            except EOFError:
                failure = "died without a word"
            assert failure is None, f"rank {rank}: {failure}"
    return [results[rank] for rank in sorted(results)]


def _rank_main(
    send: Connection, rank: int, num_ranks: int, port: int, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    _become_rank(rank, num_ranks, port)
    try:
        send.send((None, function(*args)))
    except BaseException:
        send.send((traceback.format_exc(), None))


def _become_rank(rank: int, num_ranks: int, port: int) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    os.environ.update(defaults(os.environ, num_ranks))
    torch.set_num_threads(1)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
