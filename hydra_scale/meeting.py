"""All ranks come together before anything is shared: who is missing, and do they run the same code and settings.

Speaks through the rendezvous store alone, since a process group cannot form before everyone is there, and may break
in strange ways between different versions.
"""

import hashlib
import json
import os
import platform
import socket
from collections.abc import Mapping
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist

from hydra_scale.config import Config
from hydra_scale.config_file import flatten
from hydra_scale.errors import DistributedFault

_SHOWN = 8
_READ_SECONDS = 10.0


def facts_of(config: Config) -> dict[str, str]:
    """What must be equal on all ranks: code, versions, every setting (the seeds are among them)."""
    settings = {key: str(value) for key, value in flatten(config.model_dump(mode="json"))}
    return versions() | settings


def versions() -> dict[str, str]:
    """Of the code and of what computes."""
    return {"code": _hash_of_code(), "torch": torch.__version__, "python": platform.python_version()}


def meet(rank: int, world_size: int, timeout: timedelta, facts: Mapping[str, str]) -> dist.Store:
    """A store that all ranks have reached, with `facts` equal on all of them.

    Raises:
        DistributedFault: on all ranks that came; some did not within `timeout`, or a fact differs.
    """
    try:
        store = _store(rank, world_size, timeout)
        store.set(f"meeting/{rank}", json.dumps({"host": socket.gethostname(), "facts": dict(facts)}))
        if rank == 0:
            store.set("meeting/verdict", _judge(store, world_size, timeout))
        store.wait(["meeting/verdict"], timeout + timedelta(seconds=_READ_SECONDS))
        verdict = store.get("meeting/verdict").decode()
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise DistributedFault(
            f"rank {rank} of {world_size} on {socket.gethostname()}: no word from rank 0, at {where}, within"
            f" {timeout.total_seconds():g} s: {str(error).splitlines()[0]}; see whether it started, and whether"
            " this address can be reached"
        ) from None
    if verdict:
        _let_others_read(store, rank, world_size)
        raise DistributedFault(verdict)
    return store


def _store(rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """torchrun's agent hosts the store of its trainers; without one rank 0 does."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store, *_ = next(iter(dist.rendezvous("env://", rank, world_size, timeout=timeout)))
        return store
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not address or not port.isdigit():
        raise DistributedFault(
            f"MASTER_ADDR is {address!r}, MASTER_PORT {port!r}: expected where rank 0 is to be met, as torchrun sets"
            " them; start the ranks by torchrun or `hydra-scale launch`"
        )
    return dist.TCPStore(address, int(port), world_size, rank == 0, timeout, wait_for_workers=False, multi_tenant=True)


def _judge(store: dist.Store, world_size: int, timeout: timedelta) -> str:
    """What is wrong, empty if nothing is."""
    keys = [f"meeting/{rank}" for rank in range(world_size)]
    try:
        store.wait(keys, timeout)
    except RuntimeError:
        missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
        names = ", ".join(map(str, missing[:_SHOWN])) + (", ..." if len(missing) > _SHOWN else "")
        return (
            f"{world_size - len(missing)} of {world_size} ranks came within {timeout.total_seconds():g} s"
            f" (watchdog.join): missing rank {names}; see whether they started, and the log of their node"
        )
    entries = [json.loads(value) for value in store.multi_get(keys)]
    first = entries[0]
    for rank, entry in enumerate(entries):
        for key in sorted(first["facts"].keys() | entry["facts"].keys()):
            here, there = entry["facts"].get(key), first["facts"].get(key)
            if here != there:
                return (
                    f"rank {rank} on {entry['host']}: {key} is {here}, rank 0 on {first['host']} has {there};"
                    " start all ranks from one installation with the same settings"
                )
    return ""


def _let_others_read(store: dist.Store, rank: int, world_size: int) -> None:
    """Rank 0 may host the store: it leaves last of those that came."""
    store.set(f"meeting/{rank}/read", "")
    if rank == 0:
        came = [f"meeting/{r}/read" for r in range(world_size) if store.check([f"meeting/{r}"])]
        try:
            store.wait(came, timedelta(seconds=_READ_SECONDS))
        except RuntimeError:
            return  # some have died meanwhile


def _hash_of_code() -> str:
    """Of the sources of the packages that compute a step."""
    digest = hashlib.sha256()
    for package in ("hydra_scale", "hydra_kernels"):
        spec = find_spec(package)
        for folder in (spec.submodule_search_locations if spec else None) or ():
            for file in sorted(Path(folder).rglob("*.py")):
                digest.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]
