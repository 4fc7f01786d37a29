"""How tokens are cut: what kernels, their fake implementations and `hydra-scale plan` must agree on."""

import pytest

from hydra_kernels import chunks
from hydra_kernels.chunks import cut, num_segments, segment_tokens


@pytest.fixture(autouse=True)
def _usual_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "SEGMENT_TOKENS", 2048)
    monkeypatch.setattr(chunks, "PART_TOKENS", 1024)


@pytest.mark.parametrize("num_tokens", [1, 63, 64, 1000, 2048, 2049, 16384, 50_001, 65536, 131_072, 2**20])
@pytest.mark.parametrize("num_heads", [1, 24, 32, 64])
def test_chunks_of_any_size_make_the_same_segments(num_tokens: int, num_heads: int) -> None:
    """Forward and backward chunks differ, and the backward pass starts from what the forward one kept of segments."""
    for size in (16, 32, 64, 128):
        found = cut(num_tokens, num_heads, None, size)
        assert found.num_segments == num_segments(num_tokens, num_heads)
        assert (found.num_segments - 1) * found.per_segment < found.num <= found.num_segments * found.per_segment
        assert found.per_segment % found.parts == 0


@pytest.mark.parametrize(
    ("num_tokens", "num_heads", "expected"),
    [(1, 32, 2048), (16384, 32, 2048), (65535, 32, 4096), (65536, 32, 8192), (65536, 64, 16384), (2**20, 64, 16384)],
)
def test_segments_grow_while_512_programs_are_left(num_tokens: int, num_heads: int, expected: int) -> None:
    assert segment_tokens(num_tokens, num_heads) == expected
