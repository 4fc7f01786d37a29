"""Collects what faults cost, and writes it as a table between two markers of a Markdown file: --fault-table FILE."""

from pathlib import Path

import pytest
from figures import Figures

BEGIN, END = "<!-- make test-faults: begin -->\n", "<!-- make test-faults: end -->\n"
_FIGURES = pytest.StashKey[Figures]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fault-table", type=Path, help="Markdown file whose table of figures is written anew.")


@pytest.fixture
def figures(request: pytest.FixtureRequest) -> Figures:
    """Takes what a test measured."""
    return request.config.stash.setdefault(_FIGURES, Figures())


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Nothing is written when a test has failed."""
    file = session.config.getoption("fault_table", None)
    if file is None or exitstatus != 0:
        return
    before, _, rest = file.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    table = session.config.stash.get(_FIGURES, Figures()).text()
    print(f"\n{table}")
    file.write_text(f"{before}{BEGIN}\n{table}\n\n{END}{after}", encoding="utf-8")
