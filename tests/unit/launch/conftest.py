"""A stand-in for Slurm's commands, to run job scripts with."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jobs import plan

from hydra_launch.script import TEMPLATES, render
from hydra_launch.site import Site

SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then eval "$WHILE_ASKED"; echo first.host; else echo "$*" >>"$RECORD/scontrol"; fi
"""
SRUN = '#!/bin/bash\nprintf "%s\\n" "$@" >"$RECORD/srun"\nexport -p >"$RECORD/environment"\neval "$TRAINERS"\n'


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., "subprocess.Popen[str]"]:
    """Starts a rendered job script in bash, with srun and scontrol that write down how they were called."""
    stubs = tmp_path / "bin"
    stubs.mkdir()
    for name, text in (("scontrol", SCONTROL), ("srun", SRUN)):
        (stubs / name).write_text(text)
        (stubs / name).chmod(0o755)

    def start(run: Path, trainers: str = "exit 0", site: Site | None = None, **variables: str) -> Any:
        changes = {key: variables.pop(key) for key in ("shape",) if key in variables}
        script = render(plan(run, **changes, segments=int(variables.pop("segments", "1"))), site or Site())
        (run / "launch").mkdir(parents=True, exist_ok=True)
        (run / "launch" / "job.sh").write_bytes((TEMPLATES / "job.sh").read_bytes())
        (run / "launch" / "job.sbatch").write_text(script)
        environment = {"PATH": f"{stubs}:/usr/bin:/bin", "RECORD": str(tmp_path), "TRAINERS": trainers}
        slurm = {"SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "n[1-2]"}
        return subprocess.Popen(
            ["bash", str(run / "launch" / "job.sbatch")], env=environment | slurm | variables, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    return start
