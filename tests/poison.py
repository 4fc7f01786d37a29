"""Memory that nobody wrote to holds NaN, so that reading it fails a comparison."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """In the process of the test; for the conftest of a folder whose tests run kernels."""
    deterministic, fill = (
        (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True, warn_only=True)  # with it torch.empty fills with NaN
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3, device="cuda" if torch.cuda.is_available() else "cpu").isnan().all()
    yield
    torch.use_deterministic_algorithms(deterministic[0], warn_only=deterministic[1])
    torch.utils.deterministic.fill_uninitialized_memory = fill
