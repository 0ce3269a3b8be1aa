"""Periodic boxes: edges against brute force over images, trajectories, stores, training, and errors for bad boxes."""

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
from dist_egnn.data import dataset, domain, fields, graphs
from dist_egnn.data.edges import EdgeRule, edges_of
from dist_egnn.data.graphs import radius_edges
from dist_egnn.data.samples import SampleSpec, Snapshot, build_sample, read_sample
from dist_egnn.data.store import Store
from dist_egnn.data.store_inputs import check_settings
from dist_egnn.data.trajectories import Trajectories, Writer, unwrap
from dist_egnn.distributed.comm import SingleProcess
from dist_egnn.errors import Failure
from dist_egnn.evaluate import parallel_check, rollout, rollout_metrics
from dist_egnn.models import network
from dist_egnn.train import checkpoint, trainer
from dist_egnn.utils import filesystem

NETWORKS = [name for name, model in network.MODELS.items() if issubclass(model, network.Network)]
SHIFTS = np.array(list(itertools.product((-1, 0, 1), repeat=3)))


def brute_force(x: np.ndarray, radius: float, side: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All pairs with some image within the radius, sorted by destination, then source; x within one box."""
    images = x + (SHIFTS * side)[:, None]  # (27, N, 3)
    within = (np.linalg.norm(x[:, None] - images[:, None], axis=3) <= radius).any(0)
    np.fill_diagonal(within, False)
    dst, src = np.nonzero(within)
    return src, dst


@given(seed=st.integers(0, 2**32 - 1), n=st.integers(0, 50), share=st.floats(1e-3, 0.999), single=st.booleans())
def test_edges_go_to_the_nearest_image(seed, n, share, single):
    """For any place of the box and any image of each node; shift leads to the nearest image, e is its distance."""
    draw = np.random.default_rng(seed)
    low, side = draw.normal(size=3) * 5, draw.uniform(1, 4, 3)
    x = low + draw.uniform(size=(n, 3)) * side
    radius = share * side.min() / 2
    if single:
        x = x.astype(np.float32).clip(low, low + side)
    for moved in (x, x + draw.integers(-3, 4, (n, 3)) * side):
        src, dst = radius_edges(moved, radius, side)
        np.testing.assert_array_equal([src, dst], brute_force(x, radius, side))
        graph = graphs.build_graph(src, dst, {"x": moved}, side)
        shift, e = graph.edata["shift"].numpy(), graph.edata["e"].numpy()
        turns = shift / side
        np.testing.assert_allclose(turns, np.rint(turns), atol=1e-5 if single else 1e-12)
        images = x[src][:, None] + SHIFTS * side
        nearest = np.linalg.norm(x[dst][:, None] - images, axis=2).min(1) if len(src) else np.zeros(0)
        np.testing.assert_allclose(np.linalg.norm(moved[dst] - moved[src] - shift, axis=1), nearest, atol=1e-5)
        np.testing.assert_allclose(e, np.stack([nearest, nearest], 1), atol=1e-5)


def test_both_faces_are_the_same_place_and_the_radius_is_included():
    """With dyadic numbers, so that nothing is rounded. At half the box, two images of a node have the same distance."""
    side = np.full(3, 4.0)
    x = np.array([[-1.0, 0, 0], [3.0, 0, 0], [2.0, 0, 0], [-1.0 - 1e-20, 0, 0]])
    for radius, nodes in ((1.0, range(4)), (np.nextafter(1.0, 0), (0, 1, 3))):
        src, dst = radius_edges(x, radius, side)
        assert list(zip(dst.tolist(), src.tolist(), strict=True)) == list(itertools.permutations(nodes, 2))
    x, side = np.zeros((2, 3)), np.array([1.0, 2, 2])
    assert len(radius_edges(x, np.nextafter(0.5, 0), side)[0]) == 2
    for radius in (0.5, 0.51, math.inf):
        with pytest.raises(Failure, match=r"radius=.*below half .*0\.5"):
            radius_edges(x, radius, side)
    x = np.array(
        [[0.1, 0, 0], [3.9, 0, 0], [0.5, 0, 0]]
    )  # 0.2, 0.4 and, across both, 0.6 apart: the longest is dropped
    src, dst = edges_of(x, EdgeRule(radius=1.0, edge_drop=2 / 3), np.full(3, 4.0))
    assert sorted(zip(src.tolist(), dst.tolist(), strict=True)) == [(0, 1), (1, 0)]


BOXES = np.array([[2, 2, 4], [2, 2.5, 4], [2, 3, 4]])  # by trajectory
SETTINGS: dict[str, Any] = {"radius": 0.7, "horizon": 2, "features": ["speed"], "periodic": True, "velocity": "forward"}


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
    data, settings = Trajectories(path), config.Data(**{**SETTINGS, **changed})
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


def test_a_store_has_the_edges_of_samples(boxed, store):
    """In each snapshot's own box; a part has the edges among its nodes."""
    assert verify_store(store, lambda *_: None)["snapshots"] == len(store.snapshots) == 9
    data, spec = Trajectories(boxed), inputs(boxed).sample
    for number, row in store.snapshots.iterrows():
        np.testing.assert_array_equal(store.sides(number), BOXES[row["trajectory"]])
        full = read_sample(data, Snapshot(row["split"], row["trajectory"], row["frame"]), spec)
        fields.validate(full, "sample", target=True)
        rows, parts = edge_rows(full), [store.read(number, p) for p in range(2)]
        owner = torch.empty(128, dtype=torch.int64)
        for p, part in enumerate(parts):
            owner[part.ndata["gid"]] = p
        ends = owner[rows[:, :2].long()]
        for p, part in enumerate(parts):
            assert torch.equal(edge_rows(part), rows[(ends == p).all(1)])
            assert (part.edata["shift"] != 0).any()
        assert torch.equal(edge_rows(store.whole(number)), rows[ends[:, 0] == ends[:, 1]])
        assert len(rows) == row["edges"] > len(radius_edges(full.ndata["x"].numpy(), 0.7)[0])


@pytest.mark.parametrize(("name", "halo"), [*((name, "bridge") for name in NETWORKS), ("FastEGNN", "exchange")])
def test_two_processes_equal_one(store, tmp_path, name, halo):
    keys = [f"model.name={name}", "model.hidden=8", "model.layers=2", "data.radius=0.7", f"partition.halo={halo}"]
    errors = parallel_check.compare(config.load(None, keys), store, 4, tmp_path)
    assert max(errors.values()) <= parallel_check.TOLERANCE, errors


@pytest.mark.parametrize("method", ["metis", "bisection", "morton"])
def test_a_partition_does_not_depend_on_the_images(boxed, tmp_path, method):
    """Nodes that crossed the boundary go to the part of their neighbours there."""
    draw = np.random.default_rng(0)
    turned = [lattice(k) + draw.integers(-2, 3, (128, 3)) * BOXES[k] for k in range(3)]
    one = stored(boxed, tmp_path / "a", method)
    other = stored(write(tmp_path / "b.h5", *turned), tmp_path / "b", method)
    pd.testing.assert_frame_equal(other.parts_table, one.parts_table)
    for p in range(2):
        assert torch.equal(one.read(3, p).ndata["gid"], other.read(3, p).ndata["gid"])


def test_from_a_file_to_a_trained_model(boxed, tmp_path, monkeypatch, capfd):
    """The commands of the quickstart, on a lattice."""
    monkeypatch.chdir(tmp_path)
    data = ["data.radius=0.7", "data.horizon=2", "data.features=[speed]", "data.velocity=forward"]
    (tmp_path / "my.yaml").write_text("model: {hidden: 4, layers: 1}\ntrain: {epochs: 1}\nrun: {dir: run}\n")

    def distegnn(*words: str) -> str:
        cli.app([*words], standalone_mode=False)
        return capfd.readouterr().out

    options = ["--radius", "0.7", *data[1:], "data.periodic=true"]
    assert "9 snapshots in 2 parts" in distegnn("partition", str(boxed), *options, "--out", "store")
    output = distegnn("verify", "store", "--model", "my.yaml")
    assert "9 snapshots" in output
    assert "2 processes against one" in output
    with pytest.raises(Failure, match=r"data\.periodic=False .*store was made with True"):
        distegnn("train", "my.yaml", "data.path=store", *data)
    distegnn("train", "my.yaml", "data.path=store", "data.periodic=true", *data)
    assert math.isfinite(pd.read_csv(tmp_path / "run" / "metrics.csv")["valid_mse"].item())


def test_an_older_store_has_no_periodic_boxes(boxed, tmp_path):
    """A store from before data.periodic existed."""
    old = stored(boxed, tmp_path / "old", periodic=False).path
    manifest = yaml.safe_load((old / "manifest.yaml").read_text())
    assert manifest["inputs"].pop("periodic") is False
    (old / "manifest.yaml").write_text(yaml.safe_dump(manifest))
    store = Store(old)
    assert list(store.snapshots.columns)[-1] == "shard"
    assert store.sides(0) is None
    assert "shift" not in store.read(0, 1).edata
    verify_store(store, lambda *_: None)
    check_settings(store.inputs, str(old), config.Data(**{**SETTINGS, "periodic": False}))
    with pytest.raises(Failure, match=r"data\.periodic=True .* was made with False"):
        check_settings(store.inputs, str(old), config.Data(**SETTINGS))
    assert not store_writer.write_store(Trajectories(boxed), old, inputs(boxed, periodic=False), lambda *_: None)
    with pytest.raises(Failure, match="store of these settings"):
        store_writer.write_store(Trajectories(boxed), old, inputs(boxed), lambda *_: None)


def test_verify_finds_a_box_that_contradicts_the_edges(store, tmp_path):
    copy = Path(shutil.copytree(store.path, tmp_path / "store"))
    table = pd.read_csv(copy / "snapshots.csv", float_precision="round_trip")
    table.loc[4, "side_y"] *= 1.1
    table.to_csv(copy / "snapshots.csv", index=False)
    manifest = yaml.safe_load((copy / "manifest.yaml").read_text())
    manifest["files"]["snapshots.csv"] = filesystem.sha256(copy / "snapshots.csv")
    (copy / "manifest.yaml").write_text(yaml.safe_dump(manifest))
    with pytest.raises(Failure, match="snapshot 4: its edges "):
        verify_store(Store(copy), lambda *_: None)


UNSUITABLE: list[tuple[dict, dict, str]] = [
    ({"periodic": False, "box": False}, {}, r"has no box, .*set data\.periodic=false"),
    ({"periodic": False}, {}, r"has a box with walls, .*set data\.periodic=false"),
    ({}, {"radius": 1.0}, "radius=1: .* below half .*, 1; lower"),
    ({}, {"radius": math.inf}, "radius=inf: .* below half"),
]


def test_unsuitable_boxes_are_refused(tmp_path):
    """Before anything is written or trained, with the file and the trajectory."""
    for number, (box, changed, message) in enumerate(UNSUITABLE):
        path = write(tmp_path / f"{number}.h5", lattice(0), **box)
        settings = config.Config(data=config.Data(**{**SETTINGS, "path": str(path), **changed}))
        with pytest.raises(Failure, match=rf"^{path}: trajectory 0:? {message}"):
            stored(path, tmp_path / "store", **changed)
        with pytest.raises(Failure, match=rf"^{path}: trajectory 0:? {message}"):
            dataset.open_dataset(settings, 0, 1)
    assert not (tmp_path / "store.partial").exists()
    for periodic, side in ((True, None), (False, np.ones(3))):  # a box is given exactly if periodic
        with pytest.raises(Failure, match=rf"data\.periodic={str(periodic).lower()}"):
            build_sample({"x": np.zeros((2, 3), np.float32)}, SampleSpec(0.3, 1, (), periodic=periodic), side)


def wrapped(k: int) -> np.ndarray:
    return np.mod(lattice(k), BOXES[k])


def test_wrapped_positions_are_refused_and_can_be_unwrapped(tmp_path):
    """The writer checks every frame; unwrapping starts from the images of the first frame."""
    path = tmp_path / "t.h5"
    assert np.abs(np.diff(wrapped(0), axis=0)).max() > 1.5
    with pytest.raises(Failure, match=r"trajectory 000000, frame \d: node \d+ moves .*unwrap"):
        write(path, wrapped(0))
    with pytest.raises(Failure, match="trajectory 000000: periodic, but there is no box"):
        write(path, wrapped(0), box=False)
    assert list(tmp_path.iterdir()) == []
    for dtype in (np.float32, np.float64):
        position = wrapped(0).astype(dtype)
        unwrap(position, BOXES[0])
        np.testing.assert_array_equal(position, lattice(0) - lattice(0)[0] + wrapped(0)[0])
    assert np.abs(Trajectories(write(path, position)).velocity(0, 2)).max() < 1
    spec = SampleSpec(0.7, 1, (), periodic=True, velocity="forward")
    path = write(tmp_path / "foreign.h5", lattice(0))  # a foreign file is refused when it is read
    with h5py.File(path, "r+") as file:
        file["trajectories/000000/position"][:] = wrapped(0)
    jumps = (np.abs(np.diff(wrapped(0), axis=0)) > BOXES[0] / 2).any((1, 2)).nonzero()[0]
    assert len(jumps)
    for frame in jumps:
        with pytest.raises(Failure, match=f"^{path}: trajectory 0, frame {frame}: .*unwrap"):
            read_sample(Trajectories(path), Snapshot("train", 0, frame), spec)


def test_walls_stand_on_the_axes_that_are_not_periodic(tmp_path):
    """A channel: periodic along x and z, walls at y = −1 and 1, through a file and a store."""
    rng, box, g = np.random.default_rng(0), np.array([[0, -1, 0], [2, 1, 1.5]]), [0.01, -0.02, 0]
    x = rng.uniform(*box, (90, 3)) + rng.uniform(-0.05, 0.2, (90, 3)) * np.arange(4)[:, None, None] * [1, 0.2, 1]
    with Writer(tmp_path / "a.h5", {}) as out:
        for split in ("train", "valid", "test"):
            out.add(x, split=split, dt=1.0, source="", box=box, periodic=(True, False, True), gravity=g)
    data = Trajectories(tmp_path / "a.h5")
    assert (data[0].periodic, data[0].axes) == (True, (True, False, True))
    side = data.sides(0, 0.4)
    shifts = np.array(list(itertools.product([-2, 0, 2], [0], [-1.5, 0, 1.5])))
    images = np.linalg.norm(x[2][:, None, None] - x[2][None, :, None] - shifts, axis=3).min(2) <= 0.4
    expected = {*zip(*(images & ~np.eye(90, dtype=bool)).nonzero(), strict=True)}
    src, dst = graphs.radius_edges(x[2], 0.4, side)
    assert {*zip(dst.tolist(), src.tolist(), strict=True)} == expected
    assert (images.sum(1) > (np.linalg.norm(x[2][:, None] - x[2], axis=2) <= 0.4).sum(1)).any()  # across the boundary

    keys = [f"data.path={tmp_path / 'a.h5'}", "data.radius=0.4", "data.horizon=1", "data.history=2", "data.walls=box"]
    keys += ["data.periodic=true", "data.features=[]", "model.name=EGNN", "model.hidden=8", "model.layers=2"]
    made = config.load(None, [*keys, "data.velocity_scale=1"])
    inputs = store_writer.build_inputs(data, parts=2, method="metis", settings=made.data)
    store_writer.write_store(data, tmp_path / "store", inputs, lambda *_: None)
    samples, store = dataset.open_dataset(made, 0, 1), Store(tmp_path / "store")
    verify_store(store, lambda *_: None)
    sample, stored = samples[0], store.whole(0, exchange=True)
    for graph in (sample, stored):
        around = domain.get(graph)
        assert around.normals[0].tolist() == [[0, 1, 0], [0, -1, 0]]
        assert around.points[0, :, 1].tolist() == [-1, 1]
        assert np.allclose(around.sides[0, [0, 2]], [2, 1.5])
    torch.manual_seed(0)
    model = trainer.build_model(made, samples.widths, SingleProcess(), samples.statistics()).double()
    outputs = {}
    for name, shift in {"given": [0, 0, 0], "image": [2, 0, -3], "moved": [0, 2, 0]}.items():
        fields = {
            key: value.double().clone() for key, value in sample.ndata.items() if key in ("x", "v", "past", "f", "a")
        }
        fields["x"][7] += torch.tensor(shift)
        moved = graphs.build_graph(*(end.long().numpy() for end in sample.edges()), fields, side)
        with torch.no_grad():
            outputs[name] = model(domain.attach(moved, domain.get(sample)))[0] - fields["x"]
    assert torch.allclose(outputs["image"], outputs["given"], atol=1e-9)
    assert not torch.allclose(outputs["moved"], outputs["given"], atol=1e-9)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(config.to_yaml(made))
    checkpoint.save(run / "best.pt", checkpoint.weights_only(model.float(), made))
    table = rollout.run_rollout(run, trajectory=0, start=2, steps=1, out=tmp_path / "out.vtkhdf")
    with torch.no_grad():
        error = model(sample)[0] - sample.ndata["y"]
    assert table["mse"][1] == pytest.approx(float(error.square().mean()), rel=1e-4)
    flight = 2 * x[2] - x[1] + g
    flight[:, 1] = flight[:, 1].clip(-1, 1)  # ends at the walls only
    assert table["ballistic_mse"][1] == pytest.approx(np.square(flight - x[3]).mean(), rel=1e-4)
    measured, _ = rollout_metrics.evaluate_rollouts(run, 1, data=data.path, start=2)
    assert measured["ballistic_mse"].iloc[-1] == pytest.approx(table["ballistic_mse"][1], rel=1e-5)
    with pytest.raises(Failure, match=r"data\.walls=box: .*some directions; set data\.periodic=true"):
        dataset.open_dataset(config.load(None, [*keys, "data.periodic=false"]), 0, 1)[0]
