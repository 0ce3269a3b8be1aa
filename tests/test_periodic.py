"""Radius graphs in a periodic box: against brute force over the images themselves."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_egnn.errors import Failure
from dist_egnn.graphs import radius_edges

SHIFTS = np.array(list(itertools.product((-1, 0, 1), repeat=3)))


def brute_force(x: np.ndarray, radius: float, box: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All pairs of which some image lies within the radius, by destination, then source; x within the box."""
    images = x[None] + (SHIFTS * (box[1] - box[0]))[:, None]  # (27, N, 3)
    near = (np.linalg.norm(x[None, :, None] - images[:, None], axis=3) <= radius).any(0)
    np.fill_diagonal(near, False)
    dst, src = np.nonzero(near)
    return src, dst


@given(seed=st.integers(0, 2**32 - 1), n=st.integers(0, 50), share=st.floats(1e-3, 1.0), single=st.booleans())
def test_edges_go_to_the_nearest_image(seed, n, share, single):
    """Wherever the box lies, and whichever image of a node the file holds."""
    draw = np.random.default_rng(seed)
    low = draw.normal(size=3) * 5
    box = np.stack([low, low + draw.uniform(1, 4, 3)])
    side = box[1] - box[0]
    x = low + draw.uniform(size=(n, 3)) * side
    radius = share * side.min() / 2
    if single:
        x = x.astype(np.float32).clip(box[0], box[1])
    for moved in (x, x + draw.integers(-3, 4, (n, 3)) * side):
        for found, wanted in zip(radius_edges(moved, radius, box), brute_force(x, radius, box), strict=True):
            np.testing.assert_array_equal(found, wanted)


def test_the_boundary_and_the_radius_belong_to_it():
    """Dyadic numbers, so that nothing is rounded: nodes on both faces are one place, and the radius itself counts."""
    box = np.array([[-1.0] * 3, [3.0] * 3])
    x = np.array([[-1.0, 0, 0], [3.0, 0, 0], [2.0, 0, 0], [-1.0 - 1e-20, 0, 0]])
    src, dst = radius_edges(x, 1.0, box)
    assert list(zip(dst.tolist(), src.tolist(), strict=True)) == [(i, j) for i in range(4) for j in range(4) if i != j]
    src, dst = radius_edges(x, np.nextafter(1.0, 0), box)
    assert set(zip(dst.tolist(), src.tolist(), strict=True)) == set(itertools.permutations((0, 1, 3), 2))


def test_without_neighbours_across_it_a_box_changes_nothing():
    x = np.random.default_rng(0).uniform(2, 3, (200, 3))
    for found, wanted in zip(radius_edges(x, 0.4, np.array([[0.0] * 3, [5.0] * 3])), radius_edges(x, 0.4), strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("radius", [0.51, math.inf])
def test_the_radius_is_at_most_half_the_box(radius):
    box = np.array([[0.0, 0, 0], [1, 2, 2]])
    assert len(radius_edges(np.zeros((2, 3)), 0.5, box)[0]) == 2
    with pytest.raises(Failure, match=r"radius=.*at most half its shortest side, 0\.5"):
        radius_edges(np.zeros((2, 3)), radius, box)
