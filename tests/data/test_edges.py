"""Edges from the nearest nodes, given by the file, and complete: their definition, the file, stores, configs."""

from __future__ import annotations

import math
from pathlib import Path

import h5py
import numpy as np
import pytest
from dist_egnn.partition import store_writer
from dist_egnn.partition.verify import verify_store
from hypothesis import example, given
from hypothesis import strategies as st
from small_data import DATA, EDGES, random_pairs

from dist_egnn import config
from dist_egnn.data.edges import EdgeRule, edges_among, edges_of, knn_edges
from dist_egnn.data.graphs import squared_lengths, wrap
from dist_egnn.data.samples import Snapshot, read_sample
from dist_egnn.data.store import Store
from dist_egnn.data.store_inputs import check_settings
from dist_egnn.data.trajectories import OPEN, Trajectories, Writer, both_directions
from dist_egnn.errors import Failure

sides = st.sampled_from([None, (1.0, 1.0, 1.0), (0.3, 2.0, 7.5), (1.0, OPEN, 0.7)])


def points(kind: str, n: int, seed: int) -> np.ndarray:
    """Random, on a lattice (most distances tie), or a few places with many nodes each."""
    draw = np.random.default_rng(seed)
    x = draw.uniform(-2, 3, (n, 3))
    return {"random": x, "lattice": np.rint(x) / 4, "few": np.rint(x / 4)}[kind].astype(np.float32)


kinds = st.sampled_from(["random", "lattice", "few"])


@given(kind=kinds, n=st.integers(0, 50), k=st.integers(1, 12), side=sides, seed=st.integers(0, 99))
@example(kind="few", n=40, k=3, side=(1.0, 1.0, 1.0), seed=0)
def test_knn_is_brute_force_for_any_selection_of_nodes(kind, n, k, side, seed):
    x, side = points(kind, n, seed), None if side is None else np.array(side)
    exact = x.astype(np.float64) if side is None else wrap(x, side)
    everyone, nodes = np.arange(n), np.random.default_rng(seed).permutation(n)[: n // 2]
    expected = []
    for i in range(n):
        order = np.lexsort((everyone, squared_lengths(exact, everyone, np.full(n, i), side)))
        expected.append(sorted(order[order != i][:k].tolist()))
    for chosen in (everyone, nodes):
        src, dst = knn_edges(x, k, side, chosen)
        assert src.dtype == dst.dtype == np.int64
        assert dst.tolist() == [i for i in chosen.tolist() for _ in expected[i]]
        assert src.tolist() == [j for i in chosen.tolist() for j in expected[i]]


RULES = [EdgeRule(radius=0.6), EdgeRule("knn", neighbours=4), EdgeRule("given"), EdgeRule("complete"), EdgeRule()]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("side", [None, np.array([2.0, 2.5, 3.0])], ids=["open", "periodic"])
def test_edges_among_nodes_are_those_of_the_whole_graph(rule, side):
    if rule == EdgeRule() and side is not None:
        pytest.skip("a radius that is infinite does not fit into a box")
    x, pairs = points("random", 60, 1), both_directions(np.unique(np.sort(random_pairs(60, 0), 1), axis=0))
    nodes = np.random.default_rng(0).permutation(60)[:25]
    src, dst = edges_of(x, rule, side, pairs)
    assert (np.diff(dst * 60 + src) > 0).all()
    inside = np.isin(src, nodes) & np.isin(dst, nodes)
    own_src, own_dst = edges_among(x, nodes, rule, side, pairs)
    among = sorted(zip(nodes[own_src].tolist(), nodes[own_dst].tolist(), strict=True))
    assert among == sorted(zip(src[inside].tolist(), dst[inside].tolist(), strict=True))
    assert among


def write(path: Path, pairs: object) -> Path:
    with Writer(path, {}) as out:
        out.add(np.random.default_rng(0).normal(size=(3, 5, 3)), split="train", dt=1.0, source="test", edges=pairs)
    return path


def test_the_file_has_each_edge_once_and_the_graph_both_directions(tmp_path):
    path = write(tmp_path / "a.h5", [[3, 1], [0, 4], [1, 3], [0, 4]])
    with h5py.File(path) as file:
        dataset = file["trajectories/000000/edges"]
        assert (dataset.dtype, dataset[()].tolist()) == (np.int32, [[0, 4], [1, 3]])
    assert np.transpose(Trajectories(path).edges(0)).tolist() == [[4, 0], [3, 1], [1, 3], [0, 4]]
    assert np.transpose(Trajectories(write(tmp_path / "b.h5", np.zeros((0, 2), int))).edges(0)).tolist() == []


BAD = [
    ([[0, 1], [0, 5]], r"edge 1, \[0, 5\]: .*0 to 4"),
    ([[-1, 1]], r"edge 0, \[-1, 1\]"),
    ([[0, 1], [2, 2]], "edge 1.*itself"),
]
BAD += [([[0, 1, 2]], r"\(1, 3\)"), ([[0.0, 1.0]], "float64"), ([0, 1], r"\(2,\)")]


@pytest.mark.parametrize(("pairs", "message"), BAD)
def test_invalid_edges_are_refused_by_writer_and_reader(tmp_path, pairs, message):
    with pytest.raises(Failure, match=rf"a\.h5: trajectory 000000: edges.*{message}"):
        write(tmp_path / "a.h5", pairs)
    with h5py.File(write(tmp_path / "b.h5", [[0, 1]]), "r+") as file:
        del file["trajectories/000000/edges"]
        file["trajectories/000000/edges"] = pairs
    with pytest.raises(Failure, match=rf"b\.h5: trajectory 0: edges.*{message}"):
        Trajectories(tmp_path / "b.h5").edges(0)


def test_a_file_without_edges(tmp_path):
    settings = config.Data(edges="given", horizon=1, features=[])
    data = Trajectories(write(tmp_path / "a.h5", None))
    inputs = store_writer.build_inputs(data, parts=2, method="bisection", settings=settings)
    with pytest.raises(Failure, match=r"a\.h5: trajectory 0 has no edges.*Writer.*or set data\.edges="):
        store_writer.write_store(data, tmp_path / "store", inputs, lambda *_: None)


LAYOUTS = [("knn", "bisection", 0.0), ("knn", "metis", 0.4), ("given", "metis", 0.0), ("given", "bisection", 0.4)]


@pytest.mark.parametrize(("edges", "method", "drop"), [*LAYOUTS, ("complete", "metis", 0.4)])
def test_a_store_has_the_edges_of_the_samples(make_store, make_inputs, small, edges, method, drop):
    more = {**EDGES[edges], "edge_drop": drop, "frames": 1}
    store = Store(make_store(3, method, **more))
    counts, data = verify_store(store, lambda *_: None), Trajectories(small)
    total = 0
    for number, row in store.snapshots.iterrows():
        snapshot = Snapshot(row["split"], row["trajectory"], row["frame"])
        sample, n = read_sample(data, snapshot, make_inputs(3, method, **more).sample), row["nodes"]
        keys = [(src * n + dst).sort().values for src, dst in (store.whole(number, True).edges(), sample.edges())]
        assert keys[0].tolist() == keys[1].tolist()
        total += len(keys[0])
    assert counts["edges"] == total
    if not drop:
        n = store.snapshots["nodes"].to_numpy()
        pairs = [
            2 * len(np.unique(np.sort(random_pairs(size, k), 1), axis=0)) for k, size in enumerate((200, 250, 220, 210))
        ]
        assert total == {"knn": 7 * n.sum(), "given": sum(pairs), "complete": (n * (n - 1)).sum()}[edges]


def test_verify_finds_other_edges(make_store):
    store = Store(make_store(3, "metis", **EDGES["given"], edge_drop=0.4, frames=1))
    store.snapshots.loc[1, "edge_digest"] = store.snapshots.loc[0, "edge_digest"]
    with pytest.raises(Failure, match=r"snapshot 1: its edges are not those of its source.*distegnn partition"):
        verify_store(store, lambda *_: None)


@pytest.mark.parametrize("edges", EDGES)
def test_a_store_of_other_edges_is_refused(make_store, edges):
    store = Store(make_store(3, "metis", **EDGES[edges], edge_drop=0.4, frames=1))
    given = {**DATA, **EDGES[edges], "edge_drop": 0.4, "frames": 1}
    check_settings(store.inputs, "store", config.Data(**given))
    for key, value in (("edges", "radius"), ("neighbours", 3)):
        with pytest.raises(Failure, match=rf"data\.{key}={value} in the config, .*distegnn partition"):
            check_settings(store.inputs, "store", config.Data(**{**given, key: value}))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["data.edges=all"], r"data\.edges=all: .*radius, knn, given or complete"),
        (["data.edges=knn"], r"data\.neighbours=0: .*set data\.neighbours="),
        (["data.neighbours=3"], r"data\.neighbours=3: .*data\.edges=knn"),
        (["data.edges=given", "data.radius=1"], r"data\.radius=1\.0: data\.edges=given .*leave it out"),
        (["data.edges=complete", "data.radius=1"], r"data\.radius=1\.0: data\.edges=complete .*leave it out"),
    ],
)
def test_keys_that_contradict_each_other(keys, message):
    with pytest.raises(Failure, match=message):
        config.load(None, keys)
    assert config.load(None, ["data.edges=given", "data.radius=1", "data.history=1"]).data.radius == 1
    assert config.load(None, ["data.edges=complete"]).data.radius == math.inf
