"""What `launch` accepts, writes and refuses, without Slurm."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from jobs import plan
from runs import TINY
from typer.testing import CliRunner

from hydra_launch.commands import launch
from hydra_launch.environment import SlurmTask, check_network, defaults, port_of
from hydra_launch.freeze import PACKAGES, freeze_code
from hydra_launch.script import SHAPES, fill_in, render, seconds
from hydra_launch.site import Container, Site, load_site
from hydra_launch.submission import open_run, read_sweep
from hydra_scale import preflight
from hydra_scale.cli import app
from hydra_scale.config import Config, DataConfig
from hydra_scale.config_file import dump_config, load_config
from hydra_scale.errors import CheckpointError, ConfigError, DistributedFault, EnvironmentFault, HydraScaleError
from hydra_scale.run_marks import RunMarks

SITES = Path(__file__).parents[3] / "launch" / "sites"
TASK = {
    "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8", "SLURM_NODEID": "1", "SLURM_NNODES": "2",
    "SLURM_JOB_ID": "70001", "HYDRA_SCALE_MASTER_ADDR": "10.0.0.1",
}  # fmt: skip


def options(script: str) -> dict[str, str]:
    """Of the #SBATCH lines, as sbatch reads them: all before the first command."""
    lines = script.splitlines()
    head = lines[: next(number for number, line in enumerate(lines) if line and not line.startswith("#"))]
    found = [line.removeprefix("#SBATCH --") for line in head if line.startswith("#SBATCH ")]
    assert len(found) == sum("#SBATCH --" in line for line in lines)
    return {name: value.strip('"') for name, _, value in (option.partition("=") for option in found)}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_script_asks_slurm_for_the_plan(shape: str, tmp_path: Path) -> None:
    script = render(plan(tmp_path / "my run", shape=shape, array_size=3), load_site(SITES / "example.yaml"))
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    found = options(script)
    tasks = ("1", "32") if shape == "torchrun" else ("4", "8")
    assert (found["nodes"], found["ntasks-per-node"], found["cpus-per-task"]) == ("2", *tasks)
    assert (found["gpus-per-node"], found["partition"], found["array"], found["time"]) == ("4", "gpu", "0-2", "1:00:00")
    assert found["signal"] == "B:USR1@180" and "requeue" in found and "exclusive" in found
    assert found["output"] == f"{tmp_path}/my run/launch/job-%A_%a.log" and found["chdir"] == "/work dir"
    assert "{{" not in script and "module load cuda/12.8" in script
    assert "partition" not in options(render(plan(tmp_path, gpus_per_node=0, shape=shape), Site()))


def test_containers_hold_the_run_folder() -> None:
    pyxis, apptainer = (
        Container(runtime=each, image="/i m.sqsh", mounts=("/d:/d",)) for each in ("pyxis", "apptainer")
    )  # type: ignore[arg-type]
    assert Site(container=pyxis).command(Path("/r")) == (
        "'--container-image=/i m.sqsh' --container-mounts=/r:/r,/d:/d", "python3"
    )  # fmt: skip
    assert Site(container=apptainer).command(Path("/r")) == (
        "", "apptainer exec --nv --bind /r:/r --bind /d:/d '/i m.sqsh' python3"
    )  # fmt: skip
    assert Site().command(Path("/r")) == ("", sys.executable)
    for name in ("/a:b", "/a,b"):
        with pytest.raises(ConfigError, match="divides the mounts of a container"):
            Site(container=pyxis).command(Path(name))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("partion: gpu", "site.yaml:1: unknown key partion; did you mean partition?"),
        ("partition: 'gpu; rm -rf ~'", "site.yaml:1: partition: found 'gpu; rm -rf ~'; expected a name of letters"),
        ("account: |\n  a\n  #SBATCH --uid=root", "account: found"),
        ("modules: ['cuda; id']", "modules.0: found 'cuda; id'"),
        ("directives: ['--mem=0\\n#SBATCH --uid=0']", "directives.0: found"),
        ('directives: ["--wrap=$(id)"]', "directives.0: found"),
        ("environment: {'A B': x}", "environment.A B"),
        ('environment: {A: "x\\ny"}', "environment.A: found"),
        ("python: !!python/object/apply:os.system [id]", "not valid YAML"),
        ("partition: a\npartition: b", "site.yaml:2: partition is given twice"),
        ("container: {runtime: docker, image: x}", "container.runtime: found 'docker'"),
        ("gpu_directive: --gres=gpu", "gpu_directive: found"),
        ("gpu_memory: big", "gpu_memory: found 'big'; expected a size such as 80GB"),
        ("environment: {A: 1}", "environment.A: found 1; expected a line of text; a number or yes stands in quotes"),
        ("cpus_per_process: yes", "site.yaml:1: cpus_per_process: found True; expected a number"),
        ("directives: [--array=0-3]", "directives.0: found '--array=0-3'; the job script sets --array itself"),
        ("directives: [--no-requeue]", "the job script sets --no-requeue itself"),
        ("notice_seconds: 0", "notice_seconds: found 0"),
        ("- a", "found a list at the top"),
    ],
)
def test_bad_sites(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "site.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_site(tmp_path / "site.yaml")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("time", "expected"),
    [("90", 5400), ("90:30", 5430), ("2:03:04", 7384), ("1-2", 93600), ("1-2:03", 93780), ("1-2:03:04", 93784)],
)
def test_times_mean_what_sbatch_says(time: str, expected: int) -> None:
    assert seconds(time) == expected


@pytest.mark.parametrize("name", ['a"b', "a\nb", "a%jb", "a\\b"])
def test_paths_that_sbatch_would_misread(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot stand in a path given to sbatch"):
        render(plan(tmp_path / name), Site())


def test_templates_of_the_user(tmp_path: Path) -> None:
    mine = tmp_path / "mine.sbatch"
    mine.write_text("#!/bin/bash\n#SBATCH --nodes={{nodes}}\n{{ setup }}\n\necho ${#a[@]} {{ time }}\n")
    assert render(plan(tmp_path, template=mine), Site()) == "#!/bin/bash\n#SBATCH --nodes=2\n\necho ${#a[@]} 1:00:00\n"
    with pytest.raises(ConfigError, match=r"mine.sbatch:1: unknown word \{\{ hosts \}\}; there are cpus_per_node"):
        fill_in("{{ hosts }}", {"cpus_per_node": "1"}, mine)
    with pytest.raises(ConfigError, match="cannot be read as a job script"):
        render(plan(tmp_path, template=tmp_path / "absent"), Site())


def test_environment_of_a_task() -> None:
    task = SlurmTask.read(TASK)
    port = str(port_of(70001, 0))
    assert task.ranks() == {
        "RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": port
    }  # fmt: skip
    assert SlurmTask.read(TASK | {"SLURM_RESTART_COUNT": "2"}).master_port == port_of(70001, 2)
    ports = {port_of(job, restarts) for job in range(70_000, 70_020) for restarts in range(10)}
    assert len(ports) == 200 and min(ports) >= 20_000 and max(map(port_of, range(10**6), [0] * 10**6)) < 32_000


def test_doctor_takes_its_place_among_the_tasks_of_srun(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless torchrun has given it one already."""
    seen: list[str] = []
    monkeypatch.setattr(preflight, "examine_nodes", lambda *_: seen.append(os.environ["RANK"]))
    usual = TASK | {"HYDRA_SCALE_MASTER_ADDR": "127.0.0.1"}
    for variables in (usual | {"RANK": "1"}, usual):
        with pytest.MonkeyPatch.context() as patch:
            for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
                patch.setenv(name, "")  # put back when all is done
                patch.delenv(name)
            for name, value in variables.items():
                patch.setenv(name, value)
            assert CliRunner().invoke(app, ["doctor", "--nodes"]).exit_code == 0
            assert variables is not usual or os.environ["MASTER_PORT"] == str(port_of(70001, 0))
    assert seen == ["1", "5"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"SLURM_PROCID": ""}, "SLURM_PROCID is ''"),
        ({"SLURM_NTASKS": "two"}, "SLURM_NTASKS is 'two'"),
        ({"SLURM_PROCID": "8"}, "SLURM_PROCID=8, SLURM_LOCALID=1, SLURM_NTASKS=8"),
        ({"SLURM_NODEID": "2"}, "contradict each other"),
        ({"HYDRA_SCALE_MASTER_ADDR": "", "SLURM_JOB_NODELIST": "n[1-"}, "SLURM_JOB_NODELIST is 'n[1-'"),
    ],
)
def test_contradictory_environments(changes: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(DistributedFault) as caught:
        SlurmTask.read(TASK | changes)
    assert message in str(caught.value)


def test_defaults_leave_what_is_set_alone() -> None:
    chosen = defaults({"OMP_NUM_THREADS": "3", "SLURM_JOB_ID": "9"}, 10_000, Path("/r"))
    assert "OMP_NUM_THREADS" not in chosen and defaults({}, 10_000)["OMP_NUM_THREADS"] == "1"
    assert chosen["TORCH_FR_DUMP_TEMP_FILE"] == "/r/launch/flight-9.0-rank"


@pytest.mark.parametrize(("cpus", "sharing", "threads"), [("8", 4, "2"), ("8", 1, "8"), ("64", 1, "16"), ("", 4, "4")])
def test_threads_are_those_that_slurm_gave(
    cpus: str, sharing: int, threads: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a node of 16: a task without an agent has its CPUs for itself, an agent's trainers share them."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    assert defaults({"SLURM_CPUS_PER_TASK": cpus}, sharing)["OMP_NUM_THREADS"] == threads


@pytest.mark.parametrize(
    ("address", "variables", "message"),
    [
        ("no.such.host.invalid", {}, "finds no address of the first node by this name"),
        ("127.0.0.1", {"GLOO_SOCKET_IFNAME": "absent0"}, "GLOO_SOCKET_IFNAME is 'absent0'"),
        ("127.0.0.1", {"GLOO_SOCKET_IFNAME": "l"}, "GLOO_SOCKET_IFNAME is 'l'"),
        ("127.0.0.1", {"NCCL_SOCKET_IFNAME": "=l"}, "NCCL_SOCKET_IFNAME is '=l'"),
        ("127.0.0.1", {"NCCL_SOCKET_IFNAME": "absent,away"}, "set network_interface of the site file"),
        ("127.0.0.1", {"NCCL_SOCKET_IFNAME": "l", "GLOO_SOCKET_IFNAME": "lo"}, ""),
        ("127.0.0.1", {"NCCL_SOCKET_IFNAME": "^docker0"}, ""),
    ],
)
def test_networks_that_cannot_work(address: str, variables: dict[str, str], message: str) -> None:
    task = SlurmTask.read(TASK | {"HYDRA_SCALE_MASTER_ADDR": address})
    with pytest.raises(EnvironmentFault) if message else nullcontext() as caught:
        check_network(variables, task)
    assert message in str(getattr(caught, "value", ""))


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("", 0)) as server:
        first = replace(SlurmTask.read(TASK), rank=0, master_port=server.getsockname()[1])
        with pytest.raises(EnvironmentFault, match=f"port {first.master_port} of .*: Address already in use"):
            check_network({}, replace(first, master_address="127.0.0.1"))
    check_network({}, replace(first, master_address="127.0.0.1"))


def test_frozen_code_runs_without_the_checkout(tmp_path: Path) -> None:
    for _ in range(2):  # a second launch replaces the first copy
        freeze_code(tmp_path / "code")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["code"]
    assert not list(tmp_path.rglob("__pycache__"))
    names = ",".join(PACKAGES)
    shown = subprocess.run(
        [sys.executable, "-c", f"import {names}, hydra_scale.cli; print({names})"],
        env={"PYTHONPATH": str(tmp_path / "code")}, cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert shown.stdout.count(str(tmp_path / "code")) == len(PACKAGES)


def slurm(run: Path, *more: str) -> tuple[str, HydraScaleError | None]:
    """Output and named failure of a dry run on two CPU nodes of two processes each."""
    usual = ["--config", str(TINY), "--run-dir", str(run), "--nodes=2", "--gpus-per-node=0", "--processes-per-node=2"]
    result = CliRunner().invoke(launch, ["slurm", *usual, "--dry-run", *more])
    assert result.exception is None or isinstance(result.exception, HydraScaleError), result.exception
    return result.output, result.exception


def test_a_dry_run_shows_everything_and_changes_nothing(tmp_path: Path) -> None:
    output, failure = slurm(tmp_path / "my run", "training.micro_batch_size=2", "--segments=2")
    assert failure is None and "4 trainers, 2 job(s); nothing was written or submitted" in output
    assert "#SBATCH --nodes=2" in output and list(tmp_path.iterdir()) == []
    assert "4 trainers = data 4 x context 1 x pipeline 1 x tensor 1; ZeRO 1; 1 micro batches of 2" in output
    line, tunnel = output.partition("TensorBoard  ")[2].splitlines()[:2]
    program, *options = shlex.split(line)  # as a shell takes it when it is pasted
    assert os.access(program, os.X_OK) and options == ["--port", "6006", "--logdir", str(tmp_path / "my run")]
    assert tunnel.startswith("             ssh -N -L 6006:localhost:6006 ")
    resolved = output.partition("config.yaml\n")[2].partition("\n\n")[0]
    (tmp_path / "shown.yaml").write_text(resolved)
    assert load_config(tmp_path / "shown.yaml", []) == load_config(TINY, ["training.micro_batch_size=2"])


def test_gpus_too_small_for_the_run_are_refused(tmp_path: Path) -> None:
    """8.3 GB are predicted for configs/hydra-base.yaml on 32 GPUs."""
    site = tmp_path / "site.yaml"
    given = ["--config", str(TINY.with_name("hydra-base.yaml")), "--gpus-per-node=8", "--nodes=4", f"--site={site}"]
    command = ["slurm", *given, "--run-dir", str(tmp_path / "run"), "--dry-run", "data.train=x"]
    site.write_text("gpu_memory: 80GB")
    shown = CliRunner().invoke(launch, command).output
    assert "memory       8.3 GB of a GPU, predicted" in shown
    assert "data         x: not on this machine; the nodes must see it" in shown
    assert "data         " not in CliRunner().invoke(launch, [*command[:-1], f"data.train={tmp_path}"]).output
    site.write_text("gpu_memory: 9GB")
    failure = CliRunner().invoke(launch, command).exception
    assert isinstance(failure, ConfigError) and "predicted to need 8.3 GB, of gpu_memory 9GB" in str(failure)
    assert "hydra-scale plan --gpus 32 --gpu-memory 9GB" in str(failure)


@pytest.mark.parametrize("name", ["n" * 300, "file/run"])
def test_folders_that_cannot_be(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    run = tmp_path / name
    assert "cannot be a run folder" in str(slurm(run, "training.micro_batch_size=2")[1])
    local = ["local", "--config", str(TINY), "--run-dir", str(run), "--processes=1"]
    for command in (local, ["status", "--run-dir", str(run)], ["stop", "--run-dir", str(run)]):
        assert isinstance(CliRunner().invoke(launch, command).exception, HydraScaleError)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["training.micro_batch_size=4"], "8: not divisible by micro_batch_size 4 x 4 data parallel ranks = 16"),
        (["training.stepz=3"], "did you mean training.steps?"),
        (["--shape=mpi"], "--shape is 'mpi', expected torchrun or task"),
        (["--gpus-per-node=4"], "a GPU has one trainer"),
        (["training.micro_batch_size=2", "--time=3"], "at least notice_seconds + 60 = 240 s are needed"),
        (["training.micro_batch_size=2", "--time=soon"], "--time is 'soon'"),
        (["--site=nowhere.yaml"], "nowhere.yaml: cannot be read"),
        (["--array=nowhere.txt"], "nowhere.txt: cannot be read as a sweep"),
    ],
)
def test_refused_before_anything_is_written(tmp_path: Path, more: list[str], message: str) -> None:
    _, failure = slurm(tmp_path / "run", *more)
    assert message in str(failure) and list(tmp_path.iterdir()) == []


def test_sweeps(tmp_path: Path) -> None:
    sweep = tmp_path / "sweep.txt"
    sweep.write_text("# rates\noptimizer.lr=1 'data.train=a b'\n\n")
    assert read_sweep(sweep) == [["optimizer.lr=1", "data.train=a b"]]
    _, failure = slurm(tmp_path / "runs", f"--array={sweep}", "--segments=2", "training.micro_batch_size=2")
    assert "--array and --segments" in str(failure)
    sweep.write_text("optimizer.lr=fast")
    assert "optimizer.lr: found 'fast'" in str(slurm(tmp_path / "runs", f"--array={sweep}")[1])
    sweep.write_text("optimizer.lr=1e-3 trainin.seed=2")
    told = str(slurm(tmp_path / "runs", f"--array={sweep}", "training.micro_batch_size=2")[1])
    assert told.startswith("run `optimizer.lr=1e-3 trainin.seed=2` of --array: override 'trainin.seed=2': unknown key")
    sweep.write_text("optimizer.lr=1e-3\ntraining.micro_batch_size=3")
    told = str(slurm(tmp_path / "runs", f"--array={sweep}", "training.micro_batch_size=2")[1])
    assert told.startswith("run `training.micro_batch_size=3` of --array: training.global_batch_size is 8: not")
    sweep.write_text('optimizer.lr=1e-3\ndata.train="a b\n')
    assert str(slurm(tmp_path / "runs", f"--array={sweep}")[1]).startswith(f"{sweep}:2: No closing quotation; divide")
    sweep.write_text("# none\n")
    with pytest.raises(ConfigError, match="no run in it"):
        read_sweep(sweep)


def test_folders_of_runs_that_are_done_or_others(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    settings = Config(data=DataConfig(train="data"))
    (run / "config.yaml").write_text(dump_config(settings))
    assert "holds another run" in str(slurm(run, "training.micro_batch_size=2")[1])
    (run / "config.yaml").unlink()
    RunMarks(run).mark_done(20)
    assert "holds done but no config.yaml" in str(slurm(run, "training.micro_batch_size=2")[1])


@pytest.mark.parametrize(
    ("steps", "asked", "is_done"),
    [(20, "", True), (21, "", False), (20, "[[3,4]]", True), (20, "[[2,5],[9,9]]", True), (20, "[[5,6]]", False)],
)
def test_a_done_run_goes_on_for_more_steps_or_other_batches(
    tmp_path: Path, steps: int, asked: str, is_done: bool
) -> None:
    """20 steps without batches 2 to 5 and 9. As a run, and as one of an array beside one that is not done."""
    overrides = [
        "training.micro_batch_size=2",
        f"training.steps={steps}",
        *([f"data.skip_batches={asked}"] * bool(asked)),
    ]
    settings = load_config(TINY, overrides)
    for folder in (tmp_path / "run", tmp_path / "runs" / "0"):
        open_run(folder, settings)
        RunMarks(folder).mark_done(20, ((2, 5), (9, 9)))
    failure = slurm(tmp_path / "run", *overrides)[1]
    assert ("the run is done; raise training.steps" in str(failure)) if is_done else failure is None
    open_run(tmp_path / "runs" / "0", settings)  # as a submission does for each run of an array
    assert RunMarks(tmp_path / "runs" / "0").steps_done() == (20 if is_done else 0)


def test_variables_that_would_override_the_job_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value, message in (
        ("SBATCH_TIMELIMIT", "5", "SBATCH_TIMELIMIT is '5' in the environment and --time is '24:00:00' in"),
        ("SBATCH_NO_REQUEUE", "1", "SBATCH_NO_REQUEUE is '1' in the environment and --requeue is ''"),
        ("SBATCH_OUTPUT", "x", "SBATCH_OUTPUT is 'x' in the environment and --output is '"),
        ("SBATCH_TIMELIMIT", "24:00:00", ""),
        ("SBATCH_REQUEUE", "1", ""),
        ("SBATCH_ACCOUNT", "mine", ""),  # the site names none
    ):
        with monkeypatch.context() as patch:
            patch.setenv(variable, value)
            failure = slurm(tmp_path / "run", "training.micro_batch_size=2")[1]
        assert message in str(failure) if message else failure is None


def test_a_job_may_launch_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new job does not take itself for the same element, in its second restart."""
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(f"#!/bin/bash\nexport -p >'{tmp_path}/seen'; echo 18\n")
    sbatch.chmod(0o755)
    of_the_job = {"SLURM_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "4", "SLURM_RESTART_COUNT": "2"}
    for name, value in (of_the_job | {"SLURM_CONF": "/c", "PATH": f"{sbatch.parent}:/usr/bin:/bin"}).items():
        monkeypatch.setenv(name, value)
    arguments = ["--config", str(TINY), "--run-dir", str(tmp_path / "run"), "--nodes=1", "--gpus-per-node=0"]
    assert "jobs         18" in CliRunner().invoke(launch, ["slurm", *arguments]).output
    assert re.findall(r"SLURM_\w+", (tmp_path / "seen").read_text()) == ["SLURM_CONF"]


def test_without_slurm_the_reason_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    arguments = ["--config", str(TINY), "--run-dir", str(tmp_path / "run"), "--nodes=1", "--gpus-per-node=0"]
    result = CliRunner().invoke(launch, ["slurm", *arguments])
    assert isinstance(result.exception, EnvironmentFault) and "sbatch: not found" in str(result.exception)


def test_status_and_stop_by_folder(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "launch").mkdir(parents=True)
    for command in ("status", "stop"):
        assert isinstance(CliRunner().invoke(launch, [command, "--run-dir", str(run)]).exception, CheckpointError)
    (run / "config.yaml").touch()
    (run / "checkpoints" / "step-00000004").mkdir(parents=True)
    (run / "metrics.jsonl").write_text(json.dumps({"step": 6, "loss": 1.0}) + '\n{"step": 7, "lo')
    (run / "launch" / "history.log").write_text("a\nb: requeued\n")
    shown = CliRunner().invoke(launch, ["status", "--run-dir", str(run)]).output
    assert "not done; last step 6; newest checkpoint 4" in shown and "b: requeued" in shown
    assert "asked to stop" in CliRunner().invoke(launch, ["stop", "--run-dir", str(run)]).output
    assert "stop requested; last step 6" in CliRunner().invoke(launch, ["status", "--run-dir", str(run)]).output
    RunMarks(run).mark_done(7)
    assert "done, 7 steps" in CliRunner().invoke(launch, ["status", "--run-dir", str(run)]).output
    RunMarks(run).withdraw_stop()
    assert "done, 7 steps; nothing to stop" in CliRunner().invoke(launch, ["stop", "--run-dir", str(run)]).output
    assert not RunMarks(run).stop_request.exists()
    RunMarks(run).claim()  # by a start that trains for more steps
    assert "not done; last step 6" in CliRunner().invoke(launch, ["status", "--run-dir", str(run)]).output


def test_status_and_stop_do_without_pytorch(tmp_path: Path) -> None:
    """They answer in a fraction of a second, on a login node too."""
    (tmp_path / "config.yaml").touch()
    for command in ("status", "stop"):
        program = (
            f"import sys; from hydra_scale.cli import app; app(['launch', '{command}', '--run-dir', '.'],"
            " standalone_mode=False); print('torch' in sys.modules)"
        )
        python = [sys.executable, "-c", program]
        shown = subprocess.run(python, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert shown.stdout.endswith("False\n"), shown.stdout


@pytest.mark.parametrize("mark", ["done", "epoch"])
def test_damaged_marks_are_named(tmp_path: Path, mark: str) -> None:
    (tmp_path / mark).write_text('{"ste')
    with pytest.raises(CheckpointError, match=f"{mark}: not a"):
        _ = RunMarks(tmp_path).steps_done() if mark == "done" else RunMarks(tmp_path).claim()


def test_the_first_failure_of_a_job_leaves_its_exit_code(tmp_path: Path) -> None:
    """Tasks that Slurm started wrongly: 6, unless another task has failed before."""
    command = [sys.executable, "-m", "hydra_launch.node", "task", "--processes", "1", "--", "--run-dir", str(tmp_path)]
    variables = os.environ | TASK | {"SLURM_PROCID": "9", "HYDRA_SCALE_STOP_FILE": str(tmp_path / "17.0.stop")}
    for before, after in (("", "6\n"), ("3\n", "3\n")):
        (tmp_path / "17.0.code").unlink(missing_ok=True)
        if before:
            (tmp_path / "17.0.code").write_text(before)
        result = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
        assert result.returncode == 6 and "contradict each other" in result.stderr
        assert (tmp_path / "17.0.code").read_text() == after
    wrong = variables | {"SLURM_PROCID": "0"}
    for shape, expected in (("task", "2 nodes x 3 a node = 6"), ("torchrun", "2 nodes x 1 a node = 2")):
        by_hand = [*command[:3], shape, "--processes", "3", *command[6:]]
        result = subprocess.run(by_hand, env=wrong, capture_output=True, text=True, check=False)
        assert result.returncode == 6 and f"SLURM_NTASKS is 8: expected {expected}" in result.stderr
    del variables["HYDRA_SCALE_STOP_FILE"]
    result = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert result.returncode == 1 and "HYDRA_SCALE_STOP_FILE is not set" in result.stderr
