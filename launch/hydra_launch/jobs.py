"""Which jobs were submitted for a run folder: RUN/launch/jobs.json. Light enough to read on a login node."""

import json
import time
from pathlib import Path

from hydra_scale.checkpoint.files import write_durably
from hydra_scale.errors import CheckpointError


def record_jobs(run_dir: Path, jobs: list[str]) -> None:
    """Note the job ids of the launch at hand.

    Raises:
        EnvironmentFault: the folder cannot be written.
    """
    record = {"jobs": jobs, "submitted": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    write_durably(run_dir / "launch" / "jobs.json", json.dumps(record).encode())


def recorded_jobs(run_dir: Path) -> list[str]:
    """Job ids of the newest launch; empty if there was none.

    Raises:
        CheckpointError: the record is damaged.
    """
    file = run_dir / "launch" / "jobs.json"
    try:
        return [str(job) for job in json.loads(file.read_text())["jobs"]]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file}: not a record of jobs: {error!r}; delete it when no job runs here") from None
