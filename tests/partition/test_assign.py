"""One conformance test for all partition methods, on ordinary and degenerate input; `quality` by brute force."""

from __future__ import annotations

import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple

import dgl
import numpy as np
import pytest
from dist_egnn.partition.assign import METHODS, assign, check_method, fill_empty_parts, quality, rebalance

from dist_egnn.data.graphs import radius_edges
from dist_egnn.errors import Failure

NONE = np.zeros(0, np.int64)
Case = tuple[np.ndarray, np.ndarray, np.ndarray]  # x, src, dst


def lattice_ball() -> np.ndarray:
    """About 2,000 lattice points in a ball, in random order."""
    x = np.stack(np.meshgrid(*[np.arange(-8.0, 9.0)] * 3, indexing="ij"), -1).reshape(-1, 3)
    return np.random.default_rng(0).permutation(x[(x**2).sum(1) <= 7.8**2])


def joined(x: np.ndarray, radius: float) -> Case:
    return x, *radius_edges(x, radius)


CASES: dict[str, Case] = {
    "ball": joined(lattice_ball(), 1.5),  # each joined to its up to 18 nearest
    "line": joined(np.random.default_rng(1).permutation(300)[:, None] * np.array([1.0, 2.0, -1.0]), 3.0),
    "coincident": joined(np.ones((90, 3)), 1.0),
    "two points": (np.repeat(np.eye(3)[:2], 2500, 0), NONE, NONE),  # more coincident points than landmarks
    "no edges": (np.random.default_rng(2).normal(size=(500, 3)), NONE, NONE),
    "fragments": (np.random.default_rng(3).normal(size=(100, 3)), np.array([0, 1]), np.array([1, 0])),
}


@pytest.mark.parametrize("parts", [1, 2, 3, 8])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", METHODS)
def test_conformance(method, case, parts):
    """Every part has nodes, balanced methods balance, a repeated call gives the same parts, inputs do not change."""
    arrays = [a.copy() for a in CASES[case]]
    part = assign(method, *arrays, parts, seed=5)
    assert (part.dtype, part.shape) == (np.int64, (len(arrays[0]),))
    counts = np.bincount(part)
    assert len(counts) == parts
    assert counts.min() >= 1
    if METHODS[method].balanced:
        assert counts.max() <= math.ceil(1.05 * len(part) / parts)
    if method in ("random", "bisection", "morton"):
        assert np.ptp(counts) <= 1
    np.testing.assert_array_equal(part, assign(method, *CASES[case], parts, seed=5))
    for array, original in zip(arrays, CASES[case], strict=True):
        np.testing.assert_array_equal(array, original)


@pytest.mark.parametrize(("nodes", "parts"), [(1, 1), (2, 2), (3, 3), (8, 8), (9, 7), (62, 60)])
@pytest.mark.parametrize("spread", [0.0, 1.0])
@pytest.mark.parametrize("method", METHODS)
def test_few_nodes_a_part(method, spread, nodes, parts):
    """METIS alone leaves parts empty here."""
    x = (spread * np.random.default_rng(nodes).normal(size=(nodes, 3))).astype(np.float32)
    counts = np.bincount(assign(method, *joined(x, math.inf), parts), minlength=parts)
    assert (counts.min() >= 1, counts.sum()) == (True, nodes)


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"random"}))
def test_spatial_methods_cut_far_fewer_edges_than_random(method):
    x, src, dst = CASES["ball"]
    cut = quality(assign(method, x, src, dst, 8), src, dst, 8)
    random = quality(assign("random", x, src, dst, 8), src, dst, 8)
    assert random.edge_cut == pytest.approx(7 / 8, abs=0.02)
    assert cut.edge_cut < 0.4 * random.edge_cut
    assert cut.halo < 0.4 * random.halo


def test_seed_changes_random():
    x, src, dst = CASES["ball"]
    assert (assign("random", x, src, dst, 8, 0) != assign("random", x, src, dst, 8, 1)).any()


def test_bisection_cuts_lattice_planes_straight():
    """Half of a 4×4×6 lattice of shuffled nodes is cut at one plane; 5 parts do not depend on the order of nodes."""
    x = np.stack(np.meshgrid(np.arange(4), np.arange(4), np.arange(6), indexing="ij"), -1).reshape(-1, 3)
    x = np.random.default_rng(0).permutation(x).astype(float)
    np.testing.assert_array_equal(assign("bisection", x, NONE, NONE, 2), x[:, 2] >= 3)
    shuffle = np.random.default_rng(1).permutation(len(x))
    part = assign("bisection", x, NONE, NONE, 5)
    np.testing.assert_array_equal(part[shuffle], assign("bisection", x[shuffle], NONE, NONE, 5))


needs_tunables = pytest.mark.skipif(
    "tcache_count=0" not in os.environ.get("GLIBC_TUNABLES", ""), reason="needs make test's GLIBC_TUNABLES"
)


@pytest.mark.parametrize(
    ("nodes", "seed", "radius", "parts", "calls", "litter"),
    [
        *((300, 0, radius, 8, 8, 50_000) for radius in (0.6, math.inf)),  # k-way METIS gives up to 8 results here
        pytest.param(260, 8, 0.24, 3, 100, 2000, marks=needs_tunables),  # with malloc's cache, 2 results in 20 calls
    ],
)
def test_metis_does_not_depend_on_the_heap(nodes, seed, radius, parts, calls, litter):
    """METIS reads memory that it never wrote; the heap differs before each call."""
    case = joined(np.random.default_rng(seed).uniform(size=(nodes, 3)), radius)
    draw, results = np.random.default_rng(), set()
    for _ in range(calls):
        for _ in range(30):
            draw.integers(-(2**62), 2**62, draw.integers(2, litter))  # freed at once
        results.add(assign("metis", *case, parts).tobytes())
    assert len(results) == 1


def test_threads_take_turns_in_metis_and_do_not_lose_output(monkeypatch, capsys):
    inside, most, plain = 0, 0, dgl.metis_partition_assignment

    def counted(*arguments, **options):
        nonlocal inside, most
        inside, most = inside + 1, max(most, inside + 1)
        print("another thread prints")
        time.sleep(0.05)
        inside -= 1
        return plain(*arguments, **options)

    monkeypatch.setattr(dgl, "metis_partition_assignment", counted)
    case = joined(np.random.default_rng(0).uniform(size=(60, 3)), 0.4)
    with ThreadPoolExecutor(3) as pool:
        parts = [*pool.map(lambda _: assign("metis", *case, 2).tolist(), range(3))]
    assert (most, parts[0] == parts[1] == parts[2]) == (1, True)
    assert capsys.readouterr().out == "another thread prints\n" * 3


def test_metis_without_edges_is_bisection_and_silent(capfd):
    x, src, dst = CASES["ball"]
    np.testing.assert_array_equal(assign("metis", x, NONE, NONE, 3), assign("bisection", x, NONE, NONE, 3))
    assign("metis", x, src, dst, 3)
    assert capfd.readouterr() == ("", "")


def test_empty_and_oversized_parts_are_corrected():
    x = np.random.default_rng(0).normal(size=(103, 3))
    part = np.full(103, 4)
    fill_empty_parts(x, part, 7)
    assert np.bincount(part, minlength=7).min() >= 1
    part = np.r_[np.full(97, 2), 0, 1, 3, 4, 5, 6]
    rebalance(x, part, np.full(7, 15))  # 7 · 15 = 105 places for 103 nodes
    counts = np.bincount(part, minlength=7)
    assert counts.max() <= 15
    assert counts.sum() == 103
    part, sizes = np.repeat([0, 1, 2], [60, 5, 38]), np.array([20, 50, 33])
    rebalance(x, part, sizes)
    np.testing.assert_array_equal(np.bincount(part), sizes)
    x, part = np.arange(10.0)[:, None] * [1.0, 0.0, 0.0], np.array([0] * 7 + [1] * 3)
    rebalance(x, part, np.full(2, 5))
    np.testing.assert_array_equal(part, [0] * 5 + [1] * 5)  # the nodes nearest to the receiver moved


@pytest.mark.parametrize("parts", [1, 3, 8])
def test_quality_is_the_brute_force_count(parts):
    x, src, dst = CASES["ball"]
    part = assign("kmeans", x, src, dst, parts)
    pairs = list(zip(src.tolist(), dst.tolist(), strict=True))
    cut = [(i, j) for i, j in pairs if part[i] != part[j]]
    halo = {(int(part[j]), i) for i, j in cut}
    result = quality(part, src, dst, parts)
    expected = (len(cut) / len(pairs), max(np.bincount(part)) * parts / len(x), len(halo), len(halo) / len(x))
    assert astuple(result) == pytest.approx(expected)
    empty = quality(part, NONE, NONE, parts)
    assert (empty.edge_cut, empty.balance, empty.halo) == (0.0, result.balance, 0)


FOLLOW = [name for name, method in METHODS.items() if method.balanced]
WEIGHTS = [[2.0, 1.0, 1.0], [1.0, 7.0], [0.3, 0.1, 0.1, 0.2, 0.1, 0.1, 0.05, 0.05]]


def needs_pymetis(method: str) -> None:
    if method == "metis":
        pytest.importorskip("pymetis", reason="METIS follows weights through pymetis, which is not installed")


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", FOLLOW)
def test_parts_follow_weights(method, case, weights):
    """Within two nodes; METIS within 5%. A repeated call gives the same parts."""
    needs_pymetis(method)
    x, src, dst = CASES[case]
    part = assign(method, x, src, dst, len(weights), 5, weights)
    assert part.dtype == np.int64
    counts = np.bincount(part, minlength=len(weights))
    share = len(x) * np.array(weights) / sum(weights)
    assert (np.abs(counts - share) <= np.maximum(2, 0.05 * share if method == "metis" else 0)).all()
    np.testing.assert_array_equal(part, assign(method, x, src, dst, len(weights), 5, weights))
    assert quality(part, src, dst, len(weights), weights).balance == pytest.approx((counts / share).max())


@pytest.mark.parametrize("parts", [2, 7, 30])
@pytest.mark.parametrize("method", METHODS)
def test_equal_weights_are_no_weights(method, parts):
    """METIS then balances to 2% or a node instead of 5%, and needs no pymetis."""
    x, src, dst = CASES["ball"]
    part, plain = assign(method, x, src, dst, parts, 5, [3] * parts), assign(method, x, src, dst, parts, 5)
    if method != "metis":
        np.testing.assert_array_equal(part, plain)
    else:
        even = len(x) / parts
        assert (np.abs(np.bincount(part) - even) <= np.ceil(0.02 * (even + 1)) + 1).all()
        assert (part == plain).mean() > 0.9


@pytest.mark.parametrize("method", sorted(set(FOLLOW) - {"random"}))
def test_weighted_parts_are_compact(method):
    """The edge cut is comparable to that of METIS into equal parts."""
    needs_pymetis(method)
    x, src, dst = CASES["ball"]
    cut = quality(assign(method, x, src, dst, 8, 0, [4, 2, 1, 1, 1, 1, 1, 1]), src, dst, 8).edge_cut
    equal = quality(assign("metis", x, src, dst, 8), src, dst, 8).edge_cut
    assert cut < (1.1 if method == "metis" else 2.2) * equal


@pytest.mark.parametrize(
    ("method", "parts", "weights", "message"),
    [
        ("metsi", 2, None, r"did you mean metis\? .*metis, random, kmeans, spectral, bisection, morton"),
        ("mortn", 2, None, "did you mean morton"),
        ("", 2, None, "one of metis"),
        ("metis", 0, None, "parts=0: must be at least 1"),
        ("kmeans", -1, None, "parts=-1"),
        ("random", 6, None, "parts=6: .* use parts=5"),
        ("kmeans", 2, [2, 1], "method=kmeans: .* use one of metis, random, bisection, morton"),
        ("spectral", 2, [2, 1], "method=spectral: "),
        ("morton", 2, [2, 1, 1], r"partition\.weights=\[2,1,1\]: 3 "),
        ("morton", 2, [2, 0], r"partition\.weights=\[2,0\]: must be positive"),
        ("morton", 2, [2, math.inf], "must be positive"),
        ("morton", 2, [2, math.nan], "must be positive"),
        ("bisection", 2, [99, 1], r"weights=\[99,1\]: process 1 .* raise its weight"),
    ],
)
def test_failures_name_the_remedy(method, parts, weights, message):
    with pytest.raises(Failure, match=message):
        assign(method, np.zeros((5, 3)), NONE, NONE, parts, 0, weights)


@pytest.mark.parametrize("method", METHODS)
def test_positions_must_be_finite(method):
    with pytest.raises(Failure, match="NaN or infinite"):
        assign(method, np.full((5, 3), np.nan), NONE, NONE, 2)


def test_metis_without_pymetis_is_one_line(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(Failure, match=r"method=metis: .*pip install pymetis"):
        check_method("metis", 2, [2, 1])
    check_method("metis", 2, None)
