"""The job script: a template of plain bash, in which `{{ name }}` is filled in from checked and quoted values."""

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hydra_launch.site import Site
from hydra_scale.errors import ConfigError

TEMPLATES = Path(__file__).parent / "templates"
SHAPES = {"torchrun": TEMPLATES / "torchrun.sbatch", "task": TEMPLATES / "task_per_gpu.sbatch"}
"""torchrun: one agent a node; task: one srun task a trainer."""

_BLANK = re.compile(r"\{\{ *(\w+) *\}\}")
_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")


@dataclass(frozen=True)
class JobPlan:
    """What one sbatch file asks for."""

    run_dir: Path
    """Absolute; for an array, the folder of the sweep."""
    working_directory: Path
    nodes: int
    gpus_per_node: int
    processes_per_node: int
    time: str
    shape: str
    template: Path | None
    segments: int
    array_size: int
    """0: no array."""
    max_restarts: int

    @property
    def world_size(self) -> int:
        """Trainers of the job."""
        return self.nodes * self.processes_per_node


def render(plan: JobPlan, site: Site) -> str:
    """The sbatch file.

    Raises:
        ConfigError: a value has no safe form, the time is too short to stop in, or the template asks for the unknown.
    """
    if seconds(plan.time) < site.notice_seconds + 60:
        raise ConfigError(
            f"--time is {plan.time}: at least notice_seconds + 60 = {site.notice_seconds + 60} s are needed, since"
            " Slurm gives notice up to a minute early; ask for more time or lower notice_seconds of the site"
        )
    template = plan.template or SHAPES[plan.shape]
    try:
        text = template.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{template}: cannot be read as a job script: {error}; give --template a file") from None
    return fill_in(text, _values(plan, site), template)


def fill_in(text: str, values: Mapping[str, str], source: Path) -> str:
    """`text` with each `{{ name }}` replaced; a line that held nothing but an empty value disappears.

    Raises:
        ConfigError: a name that has no value, with its line.
    """
    lines = []
    for number, line in enumerate(text.splitlines(), 1):
        if unknown := [name for name in _BLANK.findall(line) if name not in values]:
            raise ConfigError(
                f"{source}:{number}: unknown word {{{{ {unknown[0]} }}}}; there are {', '.join(sorted(values))}"
            )
        filled = _BLANK.sub(lambda match: values[match[1]], line)
        if filled.strip() or not line.strip():
            lines.append(filled)
    return "\n".join(lines) + "\n"


def seconds(time: str) -> int:
    """Of a time as sbatch takes it: minutes, M:S, H:M:S, D-H, D-H:M or D-H:M:S.

    Raises:
        ConfigError: it is none of these.
    """
    match = _TIME.fullmatch(time)
    if match is None:
        raise ConfigError(f"--time is {time!r}, expected minutes, H:MM:SS or D-HH:MM:SS")
    numbers = [int(part) for part in match.groups()[1:] if part is not None]
    if match[1] is not None:
        hours, minutes, rest = (*numbers, 0, 0)[:3]
        return ((int(match[1]) * 24 + hours) * 60 + minutes) * 60 + rest
    hours, minutes, rest = {1: (0, *numbers, 0), 2: (0, *numbers), 3: tuple(numbers)}[len(numbers)]
    return (hours * 60 + minutes) * 60 + rest


def _values(plan: JobPlan, site: Site) -> dict[str, str]:
    srun_options, python = site.command(plan.run_dir)
    directives = site.sbatch_lines(plan.gpus_per_node)
    if plan.array_size:
        directives.append(f"#SBATCH --array=0-{plan.array_size - 1}")
    return {
        "job_name": "hydra-" + re.sub(r"[^A-Za-z0-9_.-]", "_", plan.run_dir.name),
        "nodes": str(plan.nodes),
        "processes_per_node": str(plan.processes_per_node),
        "cpus_per_process": str(site.cpus_per_process),
        "cpus_per_node": str(site.cpus_per_process * plan.processes_per_node),
        "time": plan.time,
        "notice_seconds": str(site.notice_seconds),
        "working_directory": _for_sbatch(plan.working_directory),
        "log": _for_sbatch(plan.run_dir) + f"/launch/{log_name(plan)}",
        "directives": "\n".join(directives),
        "run_dir": shlex.quote(str(plan.run_dir)),
        "setup": "\n".join(site.setup_lines()),
        "srun_options": srun_options,
        "python": python,
        "requeue": "no" if plan.segments > 1 else "yes",
        "max_restarts": str(plan.max_restarts),
    }


def log_name(plan: JobPlan) -> str:
    """File name of the job's log, in sbatch's pattern language."""
    return "job-%A_%a.log" if plan.array_size else "job-%j.log"


def _for_sbatch(path: Path) -> str:
    """A path between the double quotes of an #SBATCH line, which know no shell but % and a backslash."""
    if bad := re.search(r'[\x00-\x1f"\\%]', str(path)):
        raise ConfigError(f"{str(path)!r}: {bad[0]!r} cannot stand in a path given to sbatch; choose another folder")
    return str(path)
