"""Memory that nobody wrote to holds NaN; segments are short."""

import pytest
from poison import poisoned_memory as poisoned_memory

from hydra_kernels import chunks


@pytest.fixture(autouse=True)
def _short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two chunks a segment, and two parts, so that states cross segments at small shapes."""
    monkeypatch.setattr(chunks, "SEGMENT_TOKENS", 32)
    monkeypatch.setattr(chunks, "PART_TOKENS", 16)
