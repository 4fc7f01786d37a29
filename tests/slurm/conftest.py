"""One cluster for all tests of this folder, where Slurm is installed."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import SEARCH, Cluster, why_not_here


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes; this process speaks to it too."""
    if reason := why_not_here():
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("cluster"), num_nodes=2) as running, pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", running.environment["SLURM_CONF"])
        patch.setenv("PATH", SEARCH)
        yield running


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its nodes are one host, whose name need not resolve."""
    file = tmp_path_factory.mktemp("site") / "site.yaml"
    places = {"python": os.sys.executable, "network_interface": "lo", "master_address": "127.0.0.1"}
    settings = [f"{key}: {value}" for key, value in places.items()]
    file.write_text(
        "\n".join([*settings, "cpus_per_process: 1", "notice_seconds: 5", "environment: {OMP_NUM_THREADS: '1'}"])
    )
    return file
