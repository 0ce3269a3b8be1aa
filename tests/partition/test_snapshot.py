"""In-edges computed box by box are those of the whole graph, and give the same store as all edges in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from dist_egnn.partition import neighbors, snapshot, store_writer
from hypothesis import example, given
from hypothesis import strategies as st
from store_content import content

from dist_egnn.config import Data
from dist_egnn.data import edges, graphs
from dist_egnn.data.edges import EdgeRule, edges_of
from dist_egnn.data.trajectories import Trajectories, Writer
from dist_egnn.errors import Failure
from dist_egnn.utils import memory


def points(kind: str, n: int, draw: np.random.Generator) -> np.ndarray:
    """float32; on a lattice many points lie at the radius itself and on the faces of boxes."""
    if kind == "lattice":
        cell = np.stack(np.unravel_index(draw.permutation(1000)[:n], (10, 10, 10)), 1)
        return np.float32(0.1) * cell.astype(np.float32)
    x = draw.uniform(-3, 4, (n, 3)) if kind == "even" else draw.normal(0, 0.5, (n, 3)) ** 3
    return x.astype(np.float32)


@given(
    kind=st.sampled_from(["even", "clustered", "lattice"]),
    n=st.integers(1, 400),
    radius=st.sampled_from([0.1, 0.2, 0.45]),
    side=st.sampled_from([None, (1.0, 1.0, 1.0), (0.95, 2.0, 7.5)]),
    box=st.integers(1, 60),
    seed=st.integers(0, 9),
)
@example(kind="lattice", n=400, radius=0.1, side=(1.0, 1.0, 1.0), box=7, seed=0)
@example(kind="lattice", n=400, radius=0.2, side=None, box=1, seed=1)
def test_in_neighbors_are_those_of_the_whole_graph(kind, n, radius, side, box, seed):
    draw = np.random.default_rng(seed)
    x = points(kind, n, draw)
    sides = None if side is None else np.array(side)
    wrapped = x if sides is None else graphs.wrap(x, sides)
    nodes = draw.permutation(n)[: draw.integers(1, n + 1)]
    for rule in (EdgeRule(radius=radius), EdgeRule("knn", neighbours=round(30 * radius))):
        src, dst = edges_of(x, rule, sides)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(neighbors, "BOX", box)
            patch.setattr(edges, "BLOCK", box)
            indptr, sources = neighbors.in_neighbors(wrapped, rule, nodes, sides)
        expected = [src[dst == node] for node in nodes]
        assert np.diff(indptr).tolist() == [len(each) for each in expected]
        assert sources.tolist() == [node for each in expected for node in each.tolist()]


def test_mean_degree():
    x = points("even", 400, np.random.default_rng(0))
    for radius, side in ((0.9, None), (1.3, np.array([4.0, 4.0, 4.0]))):
        mean = len(graphs.radius_edges(x, radius, side)[0]) / len(x)
        assert neighbors.mean_degree(x, EdgeRule(radius=radius), side) == pytest.approx(mean, rel=0.15)
    assert neighbors.mean_degree(x, EdgeRule()) == 399


@pytest.fixture(scope="module")
def boxed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """trajectories.h5 of a periodic box, 700 nodes, and one of walls, 900 nodes; three frames."""
    draw, path = np.random.default_rng(3), tmp_path_factory.mktemp("boxed") / "boxed.h5"
    with Writer(path, {"command": "test_snapshot.py"}) as out:
        for n, split in ((700, "train"), (900, "test")):
            x = draw.uniform(0, 4, (n, 3)) + draw.normal(0, 0.01, (3, n, 3)).cumsum(0)
            out.add(x, split=split, dt=1.0, source="test", box=np.array([[0] * 3, [4] * 3]), periodic=True)
    return path


CASES = [
    {"method": "bisection", "parts": 3},
    {"method": "morton", "parts": 4, "periodic": True},
    {"method": "bisection", "parts": 2, "trainers": 3, "periodic": True},
    {"method": "random", "parts": 2, "shard_nodes": 0},
    {"method": "kmeans", "parts": 3},
    {"method": "morton", "parts": 3, "weights": (2, 1, 1)},
    {"method": "bisection", "parts": 2, "trainers": 2, "weights": (3, 1, 2, 2), "periodic": True},
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_stores_are_equal(boxed, tmp_path, monkeypatch, case):
    """Byte for byte, with boxes of 50 nodes and with all edges in memory."""
    options = {"parts": 2, "trainers": 1, "shard_nodes": 1000} | case
    settings = Data(radius=0.5, horizon=1, features=["speed"], periodic=options.pop("periodic", False), last_frame=1)
    data = Trajectories(boxed)
    inputs = store_writer.build_inputs(data, settings=settings, **options)
    monkeypatch.setattr(neighbors, "BOX", 50)
    calls = []
    in_neighbors = neighbors.in_neighbors
    monkeypatch.setattr(neighbors, "in_neighbors", lambda *args: (calls.append(1), in_neighbors(*args))[1])
    store_writer.write_store(data, tmp_path / "boxes", inputs, lambda *_: None)
    monkeypatch.setattr(snapshot, "needs_all_edges", lambda inputs: True)
    store_writer.write_store(data, tmp_path / "all edges", inputs, lambda *_: None)
    assert len(calls) == 2 * options["parts"]  # snapshots × parts, and none with all edges in memory
    assert content(tmp_path / "boxes") == content(tmp_path / "all edges")


@pytest.mark.parametrize(
    ("settings", "all_edges"),
    [({}, False), ({"method": "metis"}, True), ({"edge_drop": 0.1}, True), ({"radius": float("inf")}, True)],
)
def test_too_little_memory_fails_before_any_work(make_inputs, small, tmp_path, monkeypatch, settings, all_edges):
    """Only where all edges must be in memory: 300 MB suffice for the program alone."""
    monkeypatch.setattr(memory, "available_memory", lambda *_: 0.3e9)
    inputs = make_inputs(2, settings.pop("method", "bisection"), **settings)
    if not all_edges:
        assert store_writer.write_store(Trajectories(small), tmp_path / "store", inputs, lambda *_: None)
        return
    monkeypatch.setattr(snapshot, "edges_of", lambda *_: pytest.fail("edges were made"))
    with pytest.raises(Failure, match=r"250 nodes, .* edges, .* 0\.3 GB .*; use bisection") as caught:
        store_writer.write_store(Trajectories(small), tmp_path / "store", inputs, lambda *_: None)
    assert str(small) in str(caught.value)
    assert not list(tmp_path.iterdir())  # nothing that would block a run with another method
