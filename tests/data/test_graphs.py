"""Radius graph, complete graph, edge dropping and node orders, each against its definition."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dist_egnn.data.graphs import build_graph, drop_longest, in_edges, morton_order, radius_edges
from dist_egnn.errors import Failure

seeds = st.integers(0, 2**32 - 1)


def brute_force(x: np.ndarray, radius: float) -> tuple[np.ndarray, np.ndarray]:
    """All pairs within the radius, sorted by destination, then source."""
    x = x.astype(np.float64)
    within = np.linalg.norm(x[:, None] - x[None], axis=2) <= radius
    np.fill_diagonal(within, False)
    dst, src = np.nonzero(within)
    return src, dst


def assert_radius_graph(x: np.ndarray, radius: float) -> None:
    """Equality with brute force, sorted by destination and source, and symmetry, which verifies brute_force itself."""
    src, dst = radius_edges(x, radius)
    assert src.dtype == dst.dtype == np.int64
    np.testing.assert_array_equal([src, dst], brute_force(x, radius))
    assert set(zip(src, dst, strict=True)) == set(zip(dst, src, strict=True))


@given(seed=seeds, n=st.integers(0, 60), radius=st.floats(1e-9, 4.0), single=st.booleans())
def test_radius_graph_of_random_points(seed, n, radius, single):
    """Of points all over, and of nodes that share a few of them."""
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(n, 3)).astype(np.float32 if single else np.float64)
    assert_radius_graph(x, radius)
    assert_radius_graph(x[draw.integers(0, min(n, 5), n)] if n else x, radius)


# integer vectors of integer length: with a power of two as spacing, a neighbour lies exactly at the radius
EXACT = {1: (0, 0, 1), 3: (1, 2, 2), 5: (0, 3, 4), 7: (2, 3, 6), 9: (4, 4, 7)}


@settings(max_examples=60)
@given(seed=seeds, length=st.sampled_from(sorted(EXACT)), power=st.integers(-12, 12), shift=st.integers(-100, 100))
@example(seed=0, length=3, power=-2, shift=0)
def test_radius_graph_includes_the_radius_itself(seed, length, power, shift):
    draw = np.random.default_rng(seed)
    cells = draw.integers(0, 8, (draw.integers(60), 3)) + shift
    x = np.concatenate([cells, [[shift] * 3], [np.add(EXACT[length], shift)]]) * 2.0**power
    radius = length * 2.0**power
    assert np.linalg.norm(x[-1] - x[-2]) == radius
    assert_radius_graph(x, radius)
    last = len(x) - 1
    for inside, r in ((True, radius), (False, np.nextafter(radius, 0))):
        src, dst = radius_edges(x, r)
        assert ((src == last) & (dst == last - 1)).any() == inside


@pytest.mark.parametrize("n", [0, 1, 2, 3, 500])
def test_complete_graph(n):
    """Also without a limit of neighbours."""
    x = np.random.default_rng(0).normal(size=(n, 3))
    src, dst = radius_edges(x, math.inf)
    assert list(zip(dst.tolist(), src.tolist(), strict=True)) == [(i, j) for i in range(n) for j in range(n) if i != j]
    assert src.dtype == dst.dtype == np.int64
    np.testing.assert_array_equal([src, dst], radius_edges(x, 1e6))


@given(seed=seeds, n=st.integers(0, 30), p=st.floats(0, 1))
@example(seed=0, n=20, p=0.0)
@example(seed=0, n=20, p=1.0)
def test_drop_longest_keeps_the_shortest(seed, n, p):
    x = np.random.default_rng(seed).normal(size=(n, 3))
    src, dst = radius_edges(x, 2.0)
    short = drop_longest(x, src, dst, p)
    assert len(short[0]) == len(short[1]) == round((1 - p) * len(src))
    # a subsequence of the edges: the same order, no new ones, none twice
    number = {edge: k for k, edge in enumerate(zip(src.tolist(), dst.tolist(), strict=True))}
    numbers = [number[edge] for edge in zip(short[0].tolist(), short[1].tolist(), strict=True)]
    assert numbers == sorted(set(numbers))
    length = np.linalg.norm(x[src] - x[dst], axis=1)
    assert length[numbers].max(initial=0) <= np.delete(length, np.array(numbers, int)).min(initial=math.inf)


def test_invalid_input_is_refused():
    for radius in (0.0, -1.0, math.nan):
        with pytest.raises(Failure, match=r"radius=.*positive"):
            radius_edges(np.zeros((3, 3)), radius)
    for radius, bad in itertools.product((1.0, math.inf), (math.nan, math.inf)):
        x = np.zeros((4, 3))
        x[2, 1] = bad
        with pytest.raises(Failure, match="NaN or infinite"):
            radius_edges(x, radius)
    for p in (-0.1, 1.1, math.nan):
        with pytest.raises(Failure, match="edge_drop="):
            drop_longest(np.zeros((2, 3)), np.array([0]), np.array([1]), p)


def test_build_graph_sets_fields_and_edge_lengths():
    x = np.array([[0, 0, 0], [3, 4, 0], [0, 0, 2], [0, 0, 2], [9, 9, 9]], np.float32)  # the last one has no edge
    src, dst = np.array([0, 2, 3, 1]), np.array([1, 0, 2, 2])
    graph = build_graph(src, dst, {"x": x, "gid": np.arange(5)})
    torch.testing.assert_close(graph.edata["e"], torch.tensor([5.0, 2.0, 0.0, 29**0.5])[:, None].expand(4, 2))
    assert torch.equal(graph.ndata["x"], torch.from_numpy(x))
    np.testing.assert_array_equal(torch.stack(graph.edges()), [src, dst])
    none = np.zeros(0, np.int64)
    graph = build_graph(none, none, {"x": x})
    assert (graph.num_nodes(), graph.num_edges()) == (5, 0)
    assert graph.edata["e"].shape == (0, 2)


@given(seed=seeds, n=st.integers(0, 200), graphs=st.integers(1, 4), flat=st.integers(0, 3))
def test_morton_order_is_a_permutation_and_keeps_graphs_together(seed, n, graphs, flat):
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(n, 3))
    x[:, :flat] = 1.0  # a plane, a line, one point
    group = np.sort(draw.integers(0, graphs, n))
    for order in (morton_order(x), morton_order(x, group)):
        np.testing.assert_array_equal(np.sort(order), np.arange(n))
    np.testing.assert_array_equal(group[order], group)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_morton_order_of_a_lattice(scale):
    """The definition: bits of the axes interleaved, x the lowest."""
    cells = np.stack(np.meshgrid(*[np.arange(4)] * 3, indexing="ij"), -1).reshape(-1, 3)
    key = sum(((cells[:, axis] >> bit) & 1) << (3 * bit + axis) for bit in range(2) for axis in range(3))
    shuffled = np.random.default_rng(0).permutation(64)
    # two corner points set the grid's extent; an offset keeps the cells away from its lines
    order = morton_order(scale * np.concatenate([cells[shuffled] + 0.25, [[0.0] * 3], [[4.0] * 3]]))
    np.testing.assert_array_equal(key[shuffled][order[order < 64]], np.arange(64))


@given(seed=seeds, n=st.integers(1, 20), e=st.integers(0, 60))
def test_in_edges_follow_their_destinations(seed, n, e):
    draw = np.random.default_rng(seed)
    dst = np.sort(draw.integers(0, n, e))
    indptr = np.concatenate([[0], np.cumsum(np.bincount(dst, minlength=n))])
    order = draw.permutation(n)
    ends, edges = in_edges(indptr, order)
    expected = [np.flatnonzero(dst == node).tolist() for node in order]
    assert [edges[a:b].tolist() for a, b in itertools.pairwise(ends)] == expected
