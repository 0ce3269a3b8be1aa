"""Periodic boxes: edges against brute force over images, models under moves to other images, the way through a store."""

from __future__ import annotations

import itertools
import math
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from dgl import DGLGraph
from dist_egnn.partition import store_writer
from dist_egnn.partition.verify import verify_store
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dist_egnn import cli, config
from dist_egnn.data import dataset, fields, graphs
from dist_egnn.data.graphs import radius_edges
from dist_egnn.data.samples import SampleSpec, Snapshot, build_sample, read_sample
from dist_egnn.data.store import Store
from dist_egnn.data.store_inputs import check_settings
from dist_egnn.data.trajectories import Trajectories, Writer, unwrap
from dist_egnn.errors import Failure
from dist_egnn.evaluate import parallel_check
from dist_egnn.models import network
from dist_egnn.ops import tiling
from dist_egnn.utils import filesystem

SHIFTS = np.array(list(itertools.product((-1, 0, 1), repeat=3)))


# radius graphs


def brute_force(x: np.ndarray, radius: float, side: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All pairs of which some image lies within the radius, by destination, then source; x within one box."""
    images = x[None] + (SHIFTS * side)[:, None]  # (27, N, 3)
    near = (np.linalg.norm(x[None, :, None] - images[:, None], axis=3) <= radius).any(0)
    np.fill_diagonal(near, False)
    dst, src = np.nonzero(near)
    return src, dst


@given(seed=st.integers(0, 2**32 - 1), n=st.integers(0, 50), share=st.floats(1e-3, 0.999), single=st.booleans())
def test_edges_go_to_the_nearest_image(seed, n, share, single):
    """Wherever the box lies, and whichever image of a node the file holds; shift leads to it, e is its distance."""
    draw = np.random.default_rng(seed)
    low, side = draw.normal(size=3) * 5, draw.uniform(1, 4, 3)
    x = low + draw.uniform(size=(n, 3)) * side
    radius = share * side.min() / 2
    if single:
        x = x.astype(np.float32).clip(low, low + side)
    for moved in (x, x + draw.integers(-3, 4, (n, 3)) * side):
        src, dst = radius_edges(moved, radius, side)
        for found, wanted in zip((src, dst), brute_force(x, radius, side), strict=True):
            np.testing.assert_array_equal(found, wanted)
        graph = graphs.build_graph(src, dst, {"x": moved}, side)
        shift, e = graph.edata["shift"].numpy(), graph.edata["e"].numpy()
        turns = shift / side
        np.testing.assert_allclose(turns, np.rint(turns), atol=1e-5 if single else 1e-12)
        images = x[src][:, None] + SHIFTS * side
        nearest = np.linalg.norm(x[dst][:, None] - images, axis=2).min(1) if len(src) else np.zeros(0)
        np.testing.assert_allclose(np.linalg.norm(moved[dst] - moved[src] - shift, axis=1), nearest, atol=1e-5)
        np.testing.assert_allclose(e, np.stack([nearest, nearest], 1), atol=1e-5)


def test_the_boundary_and_the_radius_belong_to_it():
    """Dyadic numbers, so that nothing is rounded: nodes on both faces are one place, and the radius itself counts."""
    side = np.full(3, 4.0)
    x = np.array([[-1.0, 0, 0], [3.0, 0, 0], [2.0, 0, 0], [-1.0 - 1e-20, 0, 0]])
    src, dst = radius_edges(x, 1.0, side)
    assert list(zip(dst.tolist(), src.tolist(), strict=True)) == [(i, j) for i in range(4) for j in range(4) if i != j]
    src, dst = radius_edges(x, np.nextafter(1.0, 0), side)
    assert set(zip(dst.tolist(), src.tolist(), strict=True)) == set(itertools.permutations((0, 1, 3), 2))


def test_without_neighbours_across_it_a_box_changes_nothing():
    x = np.random.default_rng(0).uniform(2, 3, (200, 3))
    for found, wanted in zip(radius_edges(x, 0.4, np.full(3, 5.0)), radius_edges(x, 0.4), strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("radius", [0.5, 0.51, math.inf])
def test_the_radius_is_below_half_the_box(radius):
    """At half of it exactly, two images of a node would be as near as each other."""
    side = np.array([1.0, 2, 2])
    assert len(radius_edges(np.zeros((2, 3)), np.nextafter(0.5, 0), side)[0]) == 2
    with pytest.raises(Failure, match=r"radius=.*below half the shortest side .*0\.5"):
        radius_edges(np.zeros((2, 3)), radius, side)


def test_edges_are_dropped_by_their_distance_to_the_image():
    x = np.array([[0.1, 0, 0], [3.9, 0, 0], [0.5, 0, 0]])  # 0.2, 0.4 and, across both, 0.6 apart
    src, dst = graphs.sample_edges(x, 1.0, 2 / 3, np.full(3, 4.0))
    assert sorted(zip(src.tolist(), dst.tolist(), strict=True)) == [(0, 1), (1, 0)]


# models; those that come later are held to the same

NETWORKS = [m.__name__ for m in network.MODELS.values() if issubclass(m, network.Network)]
PLAIN = [name for name in NETWORKS if not network.MODELS[name].virtual_nodes]  # type: ignore[attr-defined]
TWINS = [name for name in NETWORKS if name not in PLAIN]
SIDE = np.array([1.0, 1.1, 1.3])
RADIUS = 0.35


@pytest.fixture(autouse=True)
def no_graph_is_too_small_for_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "MAX_UNTILED_BLOCKS", 0)


def make(name: str, **options: Any) -> torch.nn.Module:
    torch.manual_seed(3)
    model = network.model_class(name)(features=3, node_attributes=2, **{"hidden": 8, "layers": 3, **options}).double()
    for key, parameter in model.named_parameters():
        if key.endswith(("phi_x.2.weight", "phi_xv.2.weight", "phi_z.2.weight")):
            torch.nn.init.normal_(parameter, std=0.1)  # not nearly zero, as it starts
    return model


def nodes(n: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Nodes all over the box, in float64."""
    draw = np.random.default_rng(seed)
    x, v = draw.random((n, 3)) * SIDE, draw.normal(0, 0.3, (n, 3))
    return {"x": x, "v": v, "f": draw.random((n, 3)), "a": draw.random((n, 2))}


def connected(given: dict[str, np.ndarray], **changed: np.ndarray) -> DGLGraph:
    """Their graph, some fields changed before."""
    given = given | changed
    return graphs.build_graph(*radius_edges(given["x"], RADIUS, SIDE), given, SIDE)


def step(model: torch.nn.Module, graph: DGLGraph) -> np.ndarray:
    """How far each node is predicted to move (N, 3)."""
    with torch.no_grad():
        return (model(graph)[0] - graph.ndata["x"]).numpy()


def close(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(np.abs(a - b).max() <= 1e-12)


@pytest.mark.parametrize("name", PLAIN)
def test_nodes_may_be_given_by_any_image(name):
    """Those that are moved by lattice vectors are predicted as much further, and nothing else changes."""
    given, model = nodes(60), make(name)
    graph = connected(given)
    assert 0.1 < float((graph.edata["shift"] != 0).any(1).double().mean()) < 0.9
    wanted = step(model, graph)
    draw = np.random.default_rng(1)
    for chosen in (draw.random(60) < 0.4, np.arange(60) == 7, np.ones(60, bool)):
        turns = draw.integers(-2, 3, (60, 3)) * chosen[:, None]
        assert turns.any()
        assert close(step(model, connected(given, x=given["x"] + turns * SIDE)), wanted)
    unaware = graph.clone()
    unaware.edata.pop("shift")
    assert np.abs(step(model, unaware) - wanted).max() > 1e-3  # it matters


@pytest.mark.parametrize("name", PLAIN)
def test_the_boundary_may_lie_anywhere(name):
    """The same nodes in a box laid elsewhere and wrapped into it: other pairs meet across the boundary."""
    given, model = nodes(60), make(name)
    graph = connected(given)
    other = connected(given, x=graphs.wrap(given["x"] + [0.37, -0.21, 0.6], SIDE))
    assert torch.equal(torch.stack(other.edges()), torch.stack(graph.edges()))
    across = [(g.edata["shift"] != 0).any(1) for g in (graph, other)]
    assert (across[0] & ~across[1]).any()
    assert (~across[0] & across[1]).any()
    assert close(step(model, other), step(model, graph))


@pytest.mark.parametrize("options", [{"tile": 40, "engine": "torch"}, {"tile": 40, "engine": "dgl"}, {"tile": 10**9}])
@pytest.mark.parametrize("name", PLAIN)
def test_a_periodic_box_is_one_among_its_images(name, options):
    """Nodes among explicit images in open space: two layers see no further than a box away."""
    given, model = nodes(25), make(name, layers=2, **options)
    many = {key: np.tile(value, (27, 1)) for key, value in given.items()}
    many["x"] = (given["x"] + (SHIFTS * SIDE)[:, None]).reshape(-1, 3)
    block = graphs.build_graph(*radius_edges(many["x"], RADIUS), many)
    middle = 25 * SHIFTS.tolist().index([0, 0, 0])
    assert SIDE.min() > 2 * RADIUS
    assert close(step(model, connected(given)), step(model, block)[middle : middle + 25])


@pytest.mark.parametrize("name", NETWORKS)
def test_all_nodes_may_be_moved_together(name):
    """By a lattice vector, which for virtual nodes is a translation like any other; rotations turn shifts, too."""
    given, model = nodes(60), make(name)
    wanted = step(model, connected(given))
    assert close(step(model, connected(given, x=given["x"] + SIDE * [2, -1, 3])), wanted)
    turn = np.linalg.qr(np.random.default_rng(2).normal(size=(3, 3)))[0]
    graph = connected(given)
    for kind, data in (("node", graph.ndata), ("edge", graph.edata)):
        for field in fields.TABLE:
            if field.on == kind and field.name in data and field.kind in ("point", "vector"):
                data[field.name] = data[field.name] @ torch.from_numpy(turn.T)
    assert close(step(model, graph), wanted @ turn.T)


@pytest.mark.parametrize("name", TWINS)
def test_virtual_nodes_need_positions_that_go_on(name):
    """What docs/conventions.md says of them: they see where a node is, not where its images are."""
    given, model = nodes(60), make(name)
    x = given["x"].copy()
    x[7, 0] += SIDE[0]
    assert np.abs(step(model, connected(given, x=x)) - step(model, connected(given))).max() > 1e-4


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_are_finite(name):
    """Also of nodes at one place, on both sides of the boundary."""
    given, model = nodes(30), make(name)
    given["x"][1] = given["x"][0] + SIDE
    graph = connected(given)
    assert graph.has_edges_between(0, 1)
    x = graph.ndata["x"].requires_grad_()
    predicted, z = model(graph)
    weight = torch.linspace(-1, 1, predicted.numel(), dtype=torch.float64).view_as(predicted)
    ((predicted * weight).sum() + z.pow(3).sum()).backward()
    found = [(key, p.grad) for key, p in model.named_parameters() if p.grad is not None]
    for key, gradient in [*found, ("x", x.grad)]:
        assert gradient.isfinite().all(), key
    assert len(found) > 10


# trajectories

BOXES = np.array([[2, 2, 4], [2, 2.5, 4], [2, 3, 4]])  # by trajectory
SETTINGS: dict[str, Any] = {"radius": 0.7, "horizon": 2, "features": ["speed"], "periodic": True}


def lattice(k: int, frames: int = 5) -> np.ndarray:
    """128 nodes of a shaken lattice in box k that drift apart, through the boundary and on: (T, N, 3).

    Multiples of 2⁻¹⁰, so that float32 holds them and their images exactly.
    """
    draw = np.random.default_rng(k)
    x = np.stack(np.meshgrid(*(np.arange(c) / c for c in (4, 4, 8)), indexing="ij"), -1).reshape(-1, 3) * BOXES[k]
    drift = draw.normal(0, 0.2, (128, 3))
    position = x + draw.normal(0, 0.1, (128, 3)) + drift * np.arange(frames)[:, None, None]
    return np.round(position * 1024) / 1024


def write(path: Path, *positions: np.ndarray, periodic: bool = True, box: bool = True) -> Path:
    with Writer(path, {}) as out:
        for k, (position, split) in enumerate(zip(positions, ("train", "valid", "test"), strict=False)):
            corners = np.stack([np.full(3, -0.5), BOXES[k] - 0.5]) if box else None
            out.add(position, split=split, dt=1, source="test", box=corners, periodic=periodic)
    return path


@pytest.fixture(scope="module")
def boxed(tmp_path_factory) -> Path:
    """trajectories.h5: three boxes, one a split."""
    return write(tmp_path_factory.mktemp("boxed") / "boxed.h5", *(lattice(k) for k in range(3)))


def inputs(path: Path, method: str = "metis", **changed: Any) -> store_writer.Inputs:
    settings = config.Data(**{**SETTINGS, **changed})
    data = Trajectories(path)
    return store_writer.build_inputs(data, parts=2, method=method, method_seed=0, settings=settings, shard_nodes=500)


def stored(path: Path, out: Path, method: str = "metis", **changed: Any) -> Store:
    store_writer.write_store(Trajectories(path), out, inputs(path, method, **changed), lambda *_: None)
    return Store(out)


@pytest.fixture(scope="module")
def store(boxed, tmp_path_factory) -> Store:
    return stored(boxed, tmp_path_factory.mktemp("store") / "store")


def edge_rows(graph: DGLGraph) -> Tensor:
    """Edges in the snapshot's numbers with their fields, sorted."""
    gid, (src, dst) = graph.ndata["gid"], graph.edges()
    rows = torch.cat([torch.stack([gid[src], gid[dst]], 1).double(), graph.edata["e"], graph.edata["shift"]], 1)
    return rows[(rows[:, 0] * 1000 + rows[:, 1]).argsort()]


def test_a_store_gives_back_the_edges_of_samples(boxed, store):
    """In each snapshot's own box; a part has those of its nodes."""
    assert verify_store(store, lambda *_: None)["snapshots"] == len(store.snapshots) == 9
    data, spec = Trajectories(boxed), inputs(boxed).sample
    for number, row in store.snapshots.iterrows():
        np.testing.assert_array_equal(store.sides(number), BOXES[row["trajectory"]])
        full = read_sample(data, Snapshot(row["split"], row["trajectory"], row["frame"]), spec)
        fields.validate(full, "sample", target=True)
        rows, parts = edge_rows(full), [store.read(number, p) for p in range(2)]
        part = torch.empty(128, dtype=torch.int64)
        for p, piece in enumerate(parts):
            part[piece.ndata["gid"]] = p
        ends = part[rows[:, :2].long()]
        for p, piece in enumerate(parts):
            assert torch.equal(edge_rows(piece), rows[(ends == p).all(1)])
            assert (piece.edata["shift"] != 0).any()
        assert torch.equal(edge_rows(store.whole(number)), rows[ends[:, 0] == ends[:, 1]])
        assert len(rows) == row["edges"] > len(radius_edges(full.ndata["x"].numpy(), 0.7)[0])


@pytest.mark.parametrize(("name", "halo"), [*((name, "bridge") for name in NETWORKS), ("FastEGNN", "exchange")])
def test_two_processes_equal_one(store, tmp_path, name, halo):
    keys = [f"model.name={name}", "model.hidden=8", "model.layers=2", "data.radius=0.7", f"partition.halo={halo}"]
    wanted = config.load(None, keys)
    found = parallel_check.compare(wanted, store, 4, tmp_path)
    assert max(found.values()) <= parallel_check.TOLERANCE, found


@pytest.mark.parametrize("method", ["metis", "bisection", "morton"])
def test_a_partition_does_not_ask_which_image(boxed, tmp_path, method):
    """Nodes that once went round the box are cut off with their neighbours there."""
    draw = np.random.default_rng(0)
    turned = [lattice(k) + draw.integers(-2, 3, (128, 3)) * BOXES[k] for k in range(3)]
    one, other = (
        stored(boxed, tmp_path / "a", method),
        stored(write(tmp_path / "b.h5", *turned), tmp_path / "b", method),
    )
    pd.testing.assert_frame_equal(other.parts_table, one.parts_table)
    for p in range(2):
        assert torch.equal(one.read(3, p).ndata["gid"], other.read(3, p).ndata["gid"])


def test_from_a_file_to_a_trained_model(boxed, tmp_path, monkeypatch, capfd):
    """The commands of the quickstart, on a lattice."""
    monkeypatch.chdir(tmp_path)
    data = ["data.radius=0.7", "data.horizon=2", "data.features=[speed]"]
    (tmp_path / "my.yaml").write_text("model: {hidden: 4, layers: 1}\ntrain: {epochs: 1}\nrun: {dir: run}\n")

    def distegnn(*words: str) -> str:
        cli.app([*words], standalone_mode=False)
        return capfd.readouterr().out

    options = ["--radius", "0.7", "data.horizon=2", "data.features=[speed]", "data.periodic=true"]
    assert "9 snapshots in 2 parts" in distegnn("partition", str(boxed), *options, "--out", "store")
    assert "snapshots.csv" in {f.name for f in (tmp_path / "store").iterdir()}
    told = distegnn("verify", "store", "--model", "my.yaml")
    assert "9 snapshots" in told
    assert "2 processes against one" in told
    with pytest.raises(Failure, match=r"data\.periodic=False in the config, but .*store was made with True"):
        distegnn("train", "my.yaml", "data.path=store", *data)
    distegnn("train", "my.yaml", "data.path=store", "data.periodic=true", *data)
    assert len((tmp_path / "run" / "metrics.csv").read_text().splitlines()) == 2
    assert math.isfinite(pd.read_csv(tmp_path / "run" / "metrics.csv")["valid_mse"].item())


# stores of before


@pytest.fixture
def old(boxed, tmp_path) -> Path:
    """A store as it was before there was data.periodic."""
    path = stored(boxed, tmp_path / "old", periodic=False).path
    manifest = yaml.safe_load((path / "manifest.yaml").read_text())
    assert manifest["inputs"].pop("periodic") is False
    (path / "manifest.yaml").write_text(yaml.safe_dump(manifest))
    return path


def test_an_old_store_is_one_without_periodic_boxes(boxed, old):
    found = Store(old)
    assert list(pd.read_csv(old / "snapshots.csv").columns)[-1] == "shard"
    assert found.sides(0) is None
    assert "shift" not in found.read(0, 1).edata
    verify_store(found, lambda *_: None)
    check_settings(found.inputs, str(found.path), config.Data(**{**SETTINGS, "periodic": False}))
    with pytest.raises(Failure, match=r"data\.periodic=True in the config, but .* was made with False"):
        check_settings(found.inputs, str(found.path), config.Data(**SETTINGS))
    assert not store_writer.write_store(Trajectories(boxed), old, inputs(boxed, periodic=False), lambda *_: None)
    with pytest.raises(Failure, match="exists and is not a store of these settings"):
        store_writer.write_store(Trajectories(boxed), old, inputs(boxed), lambda *_: None)


def test_verify_finds_a_box_that_is_not_the_edges(store, tmp_path):
    copy = Path(shutil.copytree(store.path, tmp_path / "store"))
    table = pd.read_csv(copy / "snapshots.csv", float_precision="round_trip")
    table.loc[4, "side_y"] *= 1.1
    table.to_csv(copy / "snapshots.csv", index=False)
    manifest = yaml.safe_load((copy / "manifest.yaml").read_text())
    manifest["files"]["snapshots.csv"] = filesystem.sha256(copy / "snapshots.csv")
    (copy / "manifest.yaml").write_text(yaml.safe_dump(manifest))
    with pytest.raises(Failure, match="snapshot 4: its edges are not those of its positions"):
        verify_store(Store(copy), lambda *_: None)


# what is refused


@pytest.mark.parametrize(
    ("given", "changed", "says"),
    [
        ({"periodic": False, "box": False}, {}, "trajectory 0 has no box, and data.periodic needs a periodic one"),
        ({"periodic": False}, {}, "trajectory 0 has a box with walls, and data.periodic needs a periodic one"),
        ({}, {"radius": 1.0}, r"trajectory 0: radius=1: .* below half .*, 1; lower"),
        ({}, {"radius": math.inf}, "trajectory 0: radius=inf: .* below half"),
    ],
)
def test_boxes_that_do_not_do(tmp_path, given, changed, says):
    """Said before anything is written or trained, with the file and the trajectory."""
    path = write(tmp_path / "t.h5", lattice(0), **given)
    with pytest.raises(Failure, match=says) as caught:
        stored(path, tmp_path / "store", **changed)
    assert str(caught.value).startswith(f"{path}: ")
    assert not (tmp_path / "store.partial").exists()
    wanted = config.Config(data=config.Data(**{**SETTINGS, "path": str(path), **changed}))
    with pytest.raises(Failure, match=says):
        dataset.open_dataset(wanted, 0, 1)


def test_a_box_and_a_setting_belong_together():
    given = {key: value.astype(np.float32) for key, value in nodes(10).items()}
    with pytest.raises(Failure, match=r"data\.periodic=true needs a box"):
        build_sample(given, SampleSpec(0.3, 1, (), periodic=True))
    with pytest.raises(Failure, match=r"data\.periodic=false: leave the box out"):
        build_sample(given, SampleSpec(0.3, 1, ()), SIDE)


def wrapped(k: int) -> np.ndarray:
    return np.mod(lattice(k), BOXES[k])


def test_a_node_that_jumps_across_is_refused_or_unwrapped(tmp_path):
    """The writer looks at every frame; unwrapping gives the way on from the images of the first frame."""
    assert np.abs(np.diff(wrapped(0), axis=0)).max() > 1.5
    with pytest.raises(Failure, match=r"trajectory 000000, frame \d: node \d+ moves by more than half of its periodic"):
        write(tmp_path / "t.h5", wrapped(0))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(Failure, match="trajectory 000000: periodic, but there is no box"):
        write(tmp_path / "t.h5", wrapped(0), box=False)
    for dtype in (np.float32, np.float64):
        position = wrapped(0).astype(dtype)
        unwrap(position, BOXES[0])
        np.testing.assert_array_equal(position, lattice(0) - lattice(0)[0] + wrapped(0)[0])
    data = Trajectories(write(tmp_path / "t.h5", position))
    assert np.abs(data.velocity(0, 2)).max() < 1


def test_a_jump_in_a_file_of_others_is_refused_when_read(tmp_path):
    path = write(tmp_path / "t.h5", lattice(0))
    with h5py.File(path, "r+") as file:
        file["trajectories/000000/position"][:] = wrapped(0)
    told = []
    for frame in range(4):
        try:
            read_sample(Trajectories(path), Snapshot("train", 0, frame), SampleSpec(0.7, 1, (), periodic=True))
        except Failure as failure:
            told.append(str(failure))
    assert told
    assert all(t.startswith(f"{path}: trajectory 0, frame ") and "unwrap" in t for t in told)
