"""Weights of processes and the sizes of their parts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_egnn.errors import Failure
from dist_egnn.utils import part_weights

WEIGHTS = st.lists(st.floats(0.01, 100), min_size=1, max_size=40)


@given(WEIGHTS, st.integers(1, 100_000))
def test_sizes_are_within_a_node_of_their_shares(weights: list[float], nodes: int) -> None:
    share = nodes * part_weights.fractions(weights, len(weights))
    assert share.sum() == pytest.approx(nodes)
    if share.min() < 1 - 1e-6:
        with pytest.raises(Failure, match=f"process {share.argmin()} would get .* of {nodes} nodes"):
            part_weights.sizes(nodes, weights)
    elif share.min() > 1 + 1e-6:
        sizes = part_weights.sizes(nodes, weights)
        assert sizes.sum() == nodes
        assert sizes.min() >= 1
        assert np.abs(sizes - share).max() < 1 + 1e-6


def test_sizes_and_units_by_hand() -> None:
    assert part_weights.sizes(8, [2, 1, 1]).tolist() == [4, 2, 2]
    sizes = part_weights.sizes(5, [1.5, 1, 1, 1.5])  # shares of exactly 1 after a half
    assert (sizes.sum(), sizes.min()) == (5, 1)
    pairs = [((2, 1), (4, 2)), (None, None), ((2, 1), None), ((2, 1), (1, 2)), ((2, 1), (2, 1, 1))]
    assert [part_weights.equivalent(a, b) for a, b in pairs] == [True, True, False, False, False]
    assert part_weights.validate([5, 5], 2) is None
    assert part_weights.validate([2, 1], 2) == (2.0, 1.0)
