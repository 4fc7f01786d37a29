"""Memory that nobody wrote to holds NaN, so that reading it fails a comparison; segments are short."""

from collections.abc import Iterator

import pytest
import torch

from hydra_kernels import chunks


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    deterministic, fill = (
        torch.are_deterministic_algorithms_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True)  # with it torch.empty fills with NaN
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture(autouse=True)
def _short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two chunks a segment, and two parts, so that states cross segments at small shapes."""
    monkeypatch.setattr(chunks, "SEGMENT_TOKENS", 32)
    monkeypatch.setattr(chunks, "PART_TOKENS", 16)
