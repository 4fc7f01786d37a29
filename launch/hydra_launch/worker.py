"""`hydra-scale` as a child of the agent: it does not outlive its parent."""

import ctypes
import os
import signal
import sys

PARENT = "HYDRA_SCALE_AGENT_PID"
_PR_SET_PDEATHSIG = 1


def main() -> None:
    """An agent that is killed cannot stop its trainers; Linux does it then (prctl(2), PR_SET_PDEATHSIG)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the agent too, which decides
    if os.getppid() != int(os.environ[PARENT]):
        sys.exit("hydra-scale: the agent died before its trainer began")
    from hydra_scale.cli import main as hydra_scale

    hydra_scale()


if __name__ == "__main__":
    main()
