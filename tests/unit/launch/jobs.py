"""Jobs as tests plan them."""

from pathlib import Path
from typing import Any

from hydra_launch.script import JobPlan

COMES_BACK = {1: True, 2: False, 3: False, 4: False, 5: True, 6: True, 7: False, 73: False, 137: True, 143: True}
"""Whether trainers that ended with a code are started again, by the job script as by the agent of one machine."""


def plan(run_dir: Path, **changes: Any) -> JobPlan:
    """A job of two nodes with four GPUs each."""
    usual: dict[str, Any] = {
        "run_dir": run_dir, "working_directory": Path("/work dir"), "nodes": 2, "gpus_per_node": 4,
        "processes_per_node": 4, "time": "1:00:00", "shape": "torchrun", "template": None, "segments": 1,
        "array_size": 0, "max_restarts": 2,
    }  # fmt: skip
    return JobPlan(**(usual | changes))
