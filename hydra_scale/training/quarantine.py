"""Broken shards that a run does without, by `data.quarantine`.

They are found before the first step and stand in RUN/quarantine.json for good: the order of the data is a function of
what is left, so a later start must leave out the same ones, repaired or not. A shard that breaks later ends the run.
"""

import logging
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from pydantic import BaseModel, ConfigDict, ValidationError

from hydra_scale.checkpoint.files import write_durably
from hydra_scale.config import DataConfig
from hydra_scale.data.manifest import read_manifest
from hydra_scale.data.remote import localised
from hydra_scale.data.sequences import SetAside
from hydra_scale.data.shards import TokenStore
from hydra_scale.errors import CheckpointError, DataError
from hydra_scale.run_folder import RunFolder

log = logging.getLogger(__name__)
_THREADS = 8  # hashing leaves the interpreter free


class Quarantine(BaseModel):
    """Content of RUN/quarantine.json."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    shards: dict[str, dict[str, str]]
    """By the address of a training folder: names of its broken shards, and what is wrong with each."""

    @property
    def without(self) -> SetAside:
        """What readers of the data leave out."""
        return self.shards

    def write(self, run: RunFolder) -> None:
        """Leave it in the run folder, and say so, unless it stands there."""
        if run.quarantine_file.exists():
            return
        write_durably(run.quarantine_file, self.model_dump_json(indent=1).encode())
        for folder, shards in self.shards.items():
            for number, fault in enumerate(shards.values(), 1):
                log.warning("%s: broken shard %d of %d is left out: %s", folder, number, len(shards), fault)


def quarantine(config: DataConfig, run: RunFolder) -> Quarantine:
    """What the run left out when it began, or what is broken now. For the main rank.

    Raises:
        DataError: a folder has no whole shard, or a manifest, lengths or a file that cannot be done without is damaged.
        CheckpointError: RUN/quarantine.json is damaged.
    """
    if not config.quarantine:
        return Quarantine(shards={})
    try:
        return Quarantine.model_validate_json(run.quarantine_file.read_bytes())
    except FileNotFoundError:
        found = {source.path: _broken_shards(source.path, config) for source in config.sources}
        return Quarantine(shards={folder: shards for folder, shards in found.items() if shards})
    except ValidationError as error:
        raise CheckpointError(
            f"{run.quarantine_file}: not a record of broken shards: {error.errors()[0]['msg']}; restore it, or start"
            " another run: which shards this one left out is not known otherwise"
        ) from None


def _broken_shards(address: str, config: DataConfig) -> dict[str, str]:
    folder = localised(address, config)
    store = TokenStore(folder, read_manifest(folder, files_too=False), "train")
    with ThreadPoolExecutor(_THREADS) as threads:
        faults: Iterable[str | None] = threads.map(partial(_fault_of, store), range(len(store.entry.shards)))
        found = {shard.name: fault for shard, fault in zip(store.entry.shards, faults, strict=True) if fault}
    if len(found) == len(store.entry.shards):
        raise DataError(f"{store.folder}: none of its {len(found)} shards is whole; {next(iter(found.values()))}")
    return found


def _fault_of(store: TokenStore, number: int) -> str | None:
    try:
        store.check_shard(number)
    except DataError as error:
        return str(error)
    return None
