"""Finished checkpoints copied behind a URL while training goes on, and fetched from there into an empty run folder.

A checkpoint there is visible once its manifest is, which is written last and deleted first. Nothing here ends a run but
what is asked of it at its start: an upload that fails is a warning, the checkpoint on disk is whole.
"""

import logging
import re
import shutil
from concurrent import futures
from concurrent.futures import Future
from functools import partial
from pathlib import Path

from hydra_scale.background import Background
from hydra_scale.checkpoint.files import MANIFEST, MANIFEST_HASH, publish
from hydra_scale.checkpoint.folder import CheckpointFolder
from hydra_scale.checkpoint.manifest import read_manifest, verify_files
from hydra_scale.errors import CheckpointError, ConfigError, EnvironmentFault
from hydra_scale.remote import file_system, make_folder, no_bucket, retried, why

log = logging.getLogger(__name__)
_NAME = re.compile(r"step-(\d{8})")


class RemoteCheckpoints:
    """URL/step-00001000 and the like. One process of a job uses it."""

    def __init__(self, address: str, keep: int | None) -> None:
        """`keep` is how many stay there; None: all.

        Raises:
            ConfigError, EnvironmentFault: the URL cannot be used here.
        """
        self._address, self._keep = address, keep
        self._files, self._root = file_system(address, ConfigError)
        self._background = Background("upload")
        self._begun: list[tuple[str, Future[str | None]]] = []

    def steps(self) -> list[int]:
        """Steps of the checkpoints that are visible there, oldest first.

        Raises:
            ConfigError: there is no such bucket.
            EnvironmentFault: the store does not answer, or refuses.
        """
        try:
            return self._steps()
        except ConfigError:
            raise
        except Exception as error:  # stores raise classes of their own
            raise EnvironmentFault(f"{self._address}: cannot be listed {why(error)}") from None

    def begin(self, folder: Path) -> None:
        """Upload a published checkpoint, after those begun before it."""
        self._begun.append((f"upload of {folder.name}", self._background.submit(self._told, folder)))

    def withdraw(self, step: int) -> None:
        """Delete the checkpoint of a step there: the run went back behind it."""
        name = f"step-{step:08d}"
        self._begun.append((f"deletion of {name}", self._background.submit(self._withdrawn, name)))

    def tell(self) -> None:
        """Log the failures of uploads that have ended since the last call."""
        ended = [work for _, work in self._begun if work.done()]
        self._begun = [(what, work) for what, work in self._begun if work not in ended]
        for work in ended:
            if problem := work.result():
                log.warning("%s", problem)

    def close(self, wait: float) -> None:
        """End after all that was begun, at most `wait` seconds from now, with 0 at once.

        What is not done by then is named in one warning; what has not been started is not.
        """
        futures.wait([work for _, work in self._begun], timeout=wait)
        self.tell()
        for _, work in self._begun:
            work.cancel()
        self._background.close()
        if left := ", ".join(what for what, _ in self._begun):
            log.warning(
                "%s: not finished after %g s: %s; if the run goes on it uploads the newest again",
                self._address,
                wait,
                left,
            )

    def fetch_newest(self, target: CheckpointFolder) -> Path | None:
        """Copy the newest whole checkpoint from there into `target`; None if none is visible there.

        Raises:
            CheckpointError: there are some and none is whole.
            EnvironmentFault: the store does not answer, or refuses.
        """
        steps, problems = self.steps(), []
        for step in reversed(steps):
            final = target.at(step)
            aside = final.with_name(f".{final.name}.writing")
            try:
                self._fetch(final.name, aside)
            except CheckpointError as error:
                problems.append(str(error))
                log.warning("damaged checkpoint passed over: %s", error)
                continue
            except Exception as error:
                raise EnvironmentFault(f"{self._address}/{final.name}: cannot be fetched {why(error)}") from None
            publish(aside, final)
            log.info("%s: fetched from %s", final, self._address)
            return final
        if problems:
            raise CheckpointError(f"{self._address}: {len(problems)} checkpoints and none is whole: {problems[0]}")
        return None

    def _fetch(self, name: str, aside: Path) -> None:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)

        def get(file: str) -> None:
            try:
                retried(partial(self._files.get_file, f"{self._root}/{name}/{file}", str(aside / file)))
            except FileNotFoundError:
                raise CheckpointError(f"{self._address}/{name}/{file}: missing") from None

        for file in (MANIFEST, MANIFEST_HASH):
            get(file)
        manifest = read_manifest(aside)
        manifest.check_whole(aside)
        for file in manifest.files:
            if Path(file).name != file:
                raise CheckpointError(f"{self._address}/{name}: its manifest lists {file!r}, not the name of a file")
            get(file)
        verify_files(aside, manifest)

    def _told(self, folder: Path) -> str | None:
        """Upload and delete what is too many; what went wrong, or None."""
        try:
            self._upload(folder)
            for step in self._steps()[: -self._keep] if self._keep else ():
                self._delete(f"step-{step:08d}")
        except Exception as error:  # whatever it is, training goes on and says so
            return f"{folder.name} is not at {self._address}: {error!r}; it stays whole in {folder.parent}"
        return None

    def _withdrawn(self, name: str) -> str | None:
        try:
            self._delete(name)
        except Exception as error:  # as above
            return f"{name} of before the run went back is still at {self._address}: {error!r}; delete it by hand"
        return None

    def _upload(self, folder: Path) -> None:
        target = f"{self._root}/{folder.name}"
        if retried(partial(self._files.exists, f"{target}/{MANIFEST}")):
            self._delete(folder.name)
        retried(partial(make_folder, self._files, target))
        for name in (*read_manifest(folder).files, MANIFEST_HASH, MANIFEST):
            retried(partial(self._files.put_file, str(folder / name), f"{target}/{name}"))

    def _delete(self, name: str) -> None:
        retried(partial(self._files.rm_file, f"{self._root}/{name}/{MANIFEST}"))
        retried(partial(self._files.rm, f"{self._root}/{name}", recursive=True))

    def _steps(self) -> list[int]:
        self._files.invalidate_cache()
        try:
            found = retried(partial(self._files.ls, self._root, detail=False))
        except FileNotFoundError as error:
            if no_bucket(error):
                raise ConfigError(
                    f"checkpoint.upload {self._address}: no such bucket; make it, or correct the name"
                ) from None
            return []
        names = [match for path in found if (match := _NAME.fullmatch(path.rstrip("/").rpartition("/")[2]))]
        visible = [name for name in names if retried(partial(self._files.exists, f"{self._root}/{name[0]}/{MANIFEST}"))]
        return sorted(int(name[1]) for name in visible)
