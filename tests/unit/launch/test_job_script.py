"""The job script, run by bash with stand-ins for srun and scontrol: when a job ends, and when it comes back."""

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from jobs import COMES_BACK
from waiting import wait_until

from hydra_launch.site import Site

Start = Callable[..., "subprocess.Popen[str]"]


def end(process: "subprocess.Popen[str]") -> tuple[int, str]:
    output, _ = process.communicate(timeout=60)
    return process.returncode, output


def recorded(tmp_path: Path, command: str) -> list[str]:
    file = tmp_path / command
    return file.read_text().splitlines() if file.exists() else []


def save(run: Path, step: int) -> None:
    (run / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)


@pytest.mark.parametrize(
    ("trainers", "code", "requeued", "said"),
    [
        ("touch '{run}/done'", 0, False, "the run is done"),
        ("exit 0", 75, True, "stopped early at step 800"),
        ("echo 73 >'{run}/launch/17.0.code'; exit 143", 73, False, "a restart does not cure"),
        ("kill -9 $$", 137, True, "ended with code 137; newest checkpoint: step 800"),
        ("touch '{run}/stop-request'; exit 0", 75, False, "not requeued: a stop is requested"),
    ],
)
def test_what_follows_from_the_end_of_the_trainers(
    start: Start, tmp_path: Path, trainers: str, code: int, requeued: bool, said: str
) -> None:
    run = tmp_path / "run"
    save(run, 90)
    save(run, 800)
    (run / "checkpoints" / "damaged-step-00000900").mkdir()
    found, output = end(start(run, trainers.format(run=run)))
    assert (found, recorded(tmp_path, "scontrol")) == (code, ["requeue 17"] if requeued else [])
    assert said in output and said in (run / "launch" / "history.log").read_text()


@pytest.mark.parametrize(("code", "requeued"), COMES_BACK.items())
def test_which_codes_bring_a_job_back(start: Start, tmp_path: Path, code: int, requeued: bool) -> None:
    found, output = end(start(tmp_path / "run", f"exit {code}"))
    assert (found, recorded(tmp_path, "scontrol")) == (code, ["requeue 17"] if requeued else [])
    assert f"code {code}" in output and ("a restart does not cure" in output) is not requeued


@pytest.mark.parametrize(("mark", "code"), [("done", 0), ("stop-request", 75)])
def test_a_run_that_is_done_or_to_stop_is_not_started(start: Start, tmp_path: Path, mark: str, code: int) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / mark).touch()
    assert end(start(run))[0] == code
    assert recorded(tmp_path, "srun") == recorded(tmp_path, "scontrol") == []


def test_gives_up_after_restarts_without_a_new_checkpoint(start: Start, tmp_path: Path) -> None:
    """max_restarts is 2: two restarts at the same step are allowed, a new checkpoint allows two more."""
    run = tmp_path / "run"
    outputs = []
    for attempt in range(7):
        if attempt == 2:
            save(run, 5)
        outputs.append(end(start(run, "exit 1", SLURM_RESTART_COUNT=str(attempt)))[1])
    gave_up = ["gave up: 2 restarts without a new checkpoint" in output for output in outputs]
    assert gave_up[:5] == [False, False, False, False, True]
    assert len(recorded(tmp_path, "scontrol")) == 4


@pytest.mark.parametrize(("number", "requeued"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_a_notice_becomes_the_stop_file(start: Start, tmp_path: Path, number: int, requeued: bool) -> None:
    """The trainers run on until they see the file; USR1 brings the job back, TERM leaves that to Slurm."""
    run = tmp_path / "run"
    process = start(run, 'until [ -e "$HYDRA_SCALE_STOP_FILE" ]; do sleep 0.05; done; exit 0', SLURM_RESTART_COUNT="3")
    wait_until(lambda: bool(recorded(tmp_path, "environment")), 20, "srun was not called")
    assert not (run / "launch" / "17.3.stop").exists()
    process.send_signal(number)
    code, output = end(process)
    assert code == 75 and (run / "launch" / "17.3.stop").exists(), output
    assert recorded(tmp_path, "scontrol") == (["requeue 17"] if requeued else [])


def test_a_notice_before_the_script_has_begun(start: Start, tmp_path: Path) -> None:
    """While it still asks Slurm for the names of its nodes: an untrapped USR1 would end it."""
    notify = 'read -r _ _ _ script _ </proc/$PPID/stat; kill -USR1 "$script"'
    code, output = end(start(tmp_path / "run", 'test -e "$HYDRA_SCALE_STOP_FILE" || exit 7', WHILE_ASKED=notify))
    assert code == 75 and recorded(tmp_path, "scontrol") == ["requeue 17"], output


def test_an_exit_code_survives_the_signals_that_end_the_wait(start: Start, tmp_path: Path) -> None:
    """USR1 ahead of the time limit, then TERM at it, and only then do the trainers end."""
    history = tmp_path / "run" / "launch" / "history.log"
    process = start(tmp_path / "run", f"until grep -q SIGTERM '{history}'; do sleep 0.05; done; exit 7")
    wait_until(lambda: bool(recorded(tmp_path, "environment")), 20, "srun was not called")
    process.send_signal(signal.SIGUSR1)
    wait_until(lambda: "SIGUSR1" in history.read_text(), 20, "USR1 was not heard")
    process.send_signal(signal.SIGTERM)
    assert end(process)[0] == 7


def test_a_chain_leaves_the_rest_to_its_next_job(start: Start, tmp_path: Path) -> None:
    code, output = end(start(tmp_path / "run", segments="3"))
    assert code == 75 and "a later job of the chain continues" in output and recorded(tmp_path, "scontrol") == []


def test_an_element_of_an_array_has_its_own_folder_and_requeues_itself(start: Start, tmp_path: Path) -> None:
    element = {"SLURM_ARRAY_JOB_ID": "15", "SLURM_ARRAY_TASK_ID": "3"}
    assert end(start(tmp_path / "sweep", **element))[0] == 75
    assert recorded(tmp_path, "scontrol") == ["requeue 15_3"]
    arguments = recorded(tmp_path, "srun")
    assert arguments[arguments.index("--run-dir") + 1] == str(tmp_path / "sweep" / "0003")
    assert "job 15_3.0: requeued" in (tmp_path / "sweep" / "0003" / "launch" / "history.log").read_text()


@pytest.mark.parametrize("shape", ["torchrun", "task"])
def test_what_the_trainers_are_given(start: Start, tmp_path: Path, shape: str) -> None:
    """Names that a shell would act on arrive as they are; the end of the job, less the notice, as --stop-at."""
    run = tmp_path / "a run'; $(touch pwned) `touch pwned` #"
    value = 'it\'s $HOME; $(touch pwned) "x" *'
    site = Site(environment={"GREETING": value}, network_interface="ib0", python="/opt/py thon", notice_seconds=100)
    code, output = end(start(run, "exit 73", site, shape=shape, SLURM_JOB_END_TIME="1000"))
    assert code == 73, output
    arguments = recorded(tmp_path, "srun")
    assert arguments[arguments.index("/opt/py thon") :] == [
        "/opt/py thon", "-m", "hydra_launch.node", shape, "--processes", "4", "--",
        "--config", f"{run}/config.yaml", "--run-dir", str(run), "--stop-at", "900",
    ]  # fmt: skip
    assert {"--kill-on-bad-exit=1", "--cpus-per-task=8" if shape == "task" else "--cpus-per-task=32"} <= set(arguments)
    names = '"$GREETING" "$GLOO_SOCKET_IFNAME" "$PYTHONPATH" "$HYDRA_SCALE_MASTER_ADDR"'
    shown = subprocess.run(
        ["bash", "-c", f'. "$0"; printf "%s|" {names}', str(tmp_path / "environment")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert shown.stdout.split("|")[:4] == [value, "ib0", f"{run}/launch/code", "first.host"]
    assert not list(tmp_path.rglob("pwned")) and not Path("pwned").exists()


@pytest.mark.parametrize("shape", ["torchrun", "task"])
def test_the_copy_of_the_code_is_what_runs(start: Start, tmp_path: Path, shape: str) -> None:
    """Not the checkout from which the job was submitted, nor what the site or the user put on the path."""
    run = tmp_path / "run"
    for place in (run / "launch" / "code", tmp_path / "checkout", tmp_path / "site"):
        (place / "hydra_scale").mkdir(parents=True)
        (place / "hydra_scale" / "__init__.py").write_text("print(__file__)")
        (place / f"only_{place.name}.py").write_text("print(__name__)")
    look = f"cd '{tmp_path}/checkout'; '{sys.executable}' -c 'import hydra_scale, only_site'"
    site = Site(environment={"PYTHONPATH": str(tmp_path / "site")})
    _, output = end(start(run, look, site, shape=shape, PYTHONPATH="/elsewhere"))
    assert f"{run}/launch/code/hydra_scale/__init__.py\nonly_site\n" in output, output


def test_a_module_that_cannot_be_loaded_ends_the_job(start: Start, tmp_path: Path) -> None:
    """`module` is a function of the shell that submits, which sbatch passes on."""
    function = {"BASH_FUNC_module%%": '() { [ "$2" != absent/1 ] && export LOADED=$LOADED:$2; }'}
    code, output = end(start(tmp_path / "run", 'echo "$LOADED"', Site(modules=("cuda/12", "mpi/4")), **function))
    assert code == 75 and ":cuda/12:mpi/4" in output
    for site, variables in ((Site(modules=("cuda/12", "absent/1")), function), (Site(modules=("absent/1",)), {})):
        code, output = end(start(tmp_path / "other", "echo trains", site, **variables))
        assert code == 2 and "not started: `module load absent/1` failed on " in output and "trains" not in output
    assert len(recorded(tmp_path, "scontrol")) == 1
