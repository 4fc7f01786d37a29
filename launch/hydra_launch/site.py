"""What is particular about a cluster: one YAML file, in which every value has a checked form."""

import re
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from hydra_scale.config import PositiveInt, Section
from hydra_scale.config_file import load_section
from hydra_scale.errors import ConfigError

_OF_LAUNCH = {
    "array", "chdir", "cpus-per-task", "dependency", "job-name", "no-requeue", "nodes", "ntasks", "ntasks-per-node",
    "open-mode", "output", "requeue", "signal", "time", "wrap",
}  # fmt: skip
"""Options of sbatch that the job script already has."""


def _form(pattern: str, expected: str) -> BeforeValidator:
    """Text of a form that a job script can hold; `expected` says in words what the pattern allows."""

    def check(value: Any) -> Any:
        if not isinstance(value, str) or not re.fullmatch(pattern, value):
            raise ValueError(f"found {value!r}; expected {expected}")
        return value

    return BeforeValidator(check)


def _not_of_launch(value: str) -> str:
    if (name := value.partition("=")[0].removeprefix("--")) in _OF_LAUNCH:
        raise ValueError(f"found {value!r}; the job script sets --{name} itself: see the options of `launch slurm`")
    return value


Word = Annotated[
    str, _form(r"[A-Za-z0-9][A-Za-z0-9_.,:@/+=\-]*", "a name of letters, digits and _ . , : @ / + = - alone")
]
"""A name of Slurm or of a module: no blank, no quote, no shell character."""
Path_ = Annotated[str, _form(r"[^\x00-\x1f]+", "a line of text; a number or yes stands in quotes")]
Directive = Annotated[
    str,
    AfterValidator(_not_of_launch),
    _form(r"--[a-z][a-z\-]*(=[A-Za-z0-9_.,:@/+=\-\[\]|&]+)?", "--name or --name=value without blanks and quotes"),
]
EnvironmentName = Annotated[str, _form(r"[A-Za-z_][A-Za-z0-9_]*", "the name of a variable")]


class Container(Section):
    """A container image in which the trainers run."""

    runtime: Literal["pyxis", "apptainer"]
    """pyxis: by srun, with enroot; apptainer: `apptainer exec`."""
    image: Path_
    """Image file or address, as the runtime takes it."""
    mounts: tuple[Path_, ...] = ()
    """host:container pairs; the run folder is mounted in any case."""

    def check(self, run_dir: Path) -> None:
        """Raise ConfigError if the run folder has no form that a mount can be written in."""
        if bad := re.search("[:,]", str(run_dir)):
            raise ConfigError(
                f"{str(run_dir)!r}: {bad[0]!r} divides the mounts of a container; choose another folder, or leave"
                " container out of the site file"
            )

    def srun_options(self, run_dir: Path) -> list[str]:
        """What srun is told."""
        if self.runtime == "apptainer":
            return []
        mounts = ",".join((f"{run_dir}:{run_dir}", *self.mounts))
        return [f"--container-image={self.image}", f"--container-mounts={mounts}"]

    def prefix(self, run_dir: Path) -> list[str]:
        """What stands before the command."""
        if self.runtime == "pyxis":
            return []
        binds = [part for mount in (f"{run_dir}:{run_dir}", *self.mounts) for part in ("--bind", mount)]
        return ["apptainer", "exec", "--nv", *binds, self.image]


class Site(Section):
    """A cluster; `launch/sites/example.yaml` shows all of it."""

    partition: Word | None = None
    """Where jobs go; absent: the cluster's default."""
    account: Word | None = None
    """Who pays."""
    qos: Word | None = None
    """Quality of service."""
    directives: tuple[Directive, ...] = ()
    """Further options of sbatch, one each."""
    gpu_directive: Annotated[
        str, _form(r"--[a-z\-]+=[A-Za-z0-9_:]*\{n\}", "an option of sbatch with {n}, such as --gres=gpu:{n}")
    ] = "--gpus-per-node={n}"
    """How the GPUs of a node are asked for; {n} is their number."""
    gpu_memory: Annotated[str, _form(r"\d+(\.\d+)?(GB|GiB)", "a size such as 80GB or 80GiB")] | None = None
    """Of a GPU, such as 80GB: a run that is predicted to need more is not submitted; absent: that is not looked at."""
    cpus_per_process: PositiveInt = 8
    """CPUs of each trainer."""
    notice_seconds: Annotated[int, Field(ge=5, le=65535)] = 180
    """Seconds before the time limit at which a run saves and stops; Slurm may be a minute earlier."""
    modules: tuple[Word, ...] = ()
    """Loaded in the job, in this order."""
    python: Path_ | None = None
    """Interpreter of the job; absent: that of the submitting process, or `python3` in a container."""
    network_interface: Word | None = None
    """Interface between the nodes, for NCCL and gloo; absent: they choose."""
    master_address: Word | None = None
    """Address of the first node; absent: its name from Slurm."""
    environment: dict[EnvironmentName, Path_] = Field(default_factory=dict)
    """Variables of the job."""
    container: Container | None = None
    """Absent: trainers run on the host."""

    def sbatch_lines(self, num_gpus: int) -> list[str]:
        """`#SBATCH` lines for nodes with `num_gpus` GPUs."""
        named = {"partition": self.partition, "account": self.account, "qos": self.qos}
        options = [f"--{name}={value}" for name, value in named.items() if value]
        if num_gpus:
            options.append(self.gpu_directive.replace("{n}", str(num_gpus)))
        return [f"#SBATCH {option}" for option in (*options, *self.directives)]

    def setup_lines(self) -> list[str]:
        """Lines of shell that prepare the environment; every value quoted."""
        variables = dict(self.environment)
        if self.network_interface:
            variables |= dict.fromkeys(("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"), self.network_interface)
        if self.master_address:
            variables["HYDRA_SCALE_MASTER_ADDR"] = self.master_address
        loads = [f"module load {module} || set_up_failed module load {module}" for module in self.modules]
        return loads + [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]

    def command(self, run_dir: Path) -> tuple[str, str]:
        """Options of srun and the command that is the job's Python, both as quoted shell words.

        Raises:
            ConfigError: the run folder cannot be mounted.
        """
        if self.container is None:
            return "", shlex.quote(self.python or sys.executable)
        self.container.check(run_dir)
        prefix = [*self.container.prefix(run_dir), self.python or "python3"]
        return shlex.join(self.container.srun_options(run_dir)), shlex.join(prefix)


def load_site(path: Path | None) -> Site:
    """The site in a YAML file; absent: the defaults.

    Raises:
        ConfigError: the file cannot be read, a key is unknown or a value has a form that is not allowed.
    """
    return load_section(Site, path) if path else Site()
