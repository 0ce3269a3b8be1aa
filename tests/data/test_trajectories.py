"""trajectories.h5 and what is made of it: exact round trips, the choice of frames, and one clear error for bad input."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from dist_egnn.data.graphs import radius_edges
from dist_egnn.data.samples import SampleSpec, Snapshot, node_fields, read_sample, select_snapshots
from dist_egnn.data.trajectories import Trajectories, Writer
from dist_egnn.errors import Failure

WHAT = {"split": "train", "dt": 0.5, "source": "test"}
SPEC = SampleSpec(0.27, 3, ("mass",))


def walk(frames: int = 6, nodes: int = 5, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(frames, nodes, 3)).astype(np.float32)


def write(path: Path, *positions: np.ndarray, **more: object) -> Path:
    with Writer(path, {}) as out:
        for position in positions:
            out.add(position, **{**WHAT, **more})
    return path


@pytest.fixture
def copy(small: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(small, tmp_path / "copy.h5"))


def test_round_trip_is_exact(tmp_path):
    draw = np.random.default_rng(1)
    position, velocity = walk(7, 4), walk(7, 4, 2)
    attributes = {"charge": draw.normal(size=4).astype(np.float32), "mass": np.arange(4.0, dtype=np.float32)}
    box = np.array([[0, 0, -10], [19, 20, 30]], np.float32)
    meta = {"command": "make it", "seed": 3, "versions": {"engine": "1.2"}}
    with Writer(tmp_path / "new" / "t.h5", meta) as out:
        out.add(
            position,
            split="valid",
            dt=0.02,
            source="an engine",
            velocity=velocity,
            attributes=attributes,
            box=box,
            periodic=True,
        )
        out.add(walk(3, 9, 5), split="test", dt=1, source="other")
    data = Trajectories(tmp_path / "new" / "t.h5")
    assert data.meta == meta
    assert len(data) == 2
    first, second = data
    assert (first.split, first.frames, first.nodes, first.dt, first.source) == ("valid", 7, 4, 0.02, "an engine")
    assert (first.velocity, first.attributes, first.periodic) == (True, ("charge", "mass"), True)
    assert (second.split, second.frames, second.nodes, second.dt, second.source) == ("test", 3, 9, 1.0, "other")
    assert (second.velocity, second.attributes, second.periodic) == (False, (), False)
    for t in range(7):
        np.testing.assert_array_equal(data.position(0, t), position[t])
        np.testing.assert_array_equal(data.velocity(0, t), velocity[t])
    for name, value in attributes.items():
        np.testing.assert_array_equal(data.attribute(0, name), value)
    np.testing.assert_array_equal(data.box(0), box)
    assert data.box(1) is None
    assert data.position(1, 2).dtype == np.float32


def test_velocity_is_the_forward_difference_where_none_is_stored(tmp_path):
    x = walk(5, 3)
    data = Trajectories(write(tmp_path / "t.h5", x))
    for t in range(4):
        np.testing.assert_array_equal(data.velocity(0, t), x[t + 1] - x[t])


# the writer


def test_a_failed_write_leaves_nothing(tmp_path):
    path = tmp_path / "t.h5"

    def dying() -> None:
        with Writer(path, {}) as out:
            out.add(walk(), **WHAT)
            raise RuntimeError("engine died")

    with pytest.raises(RuntimeError, match="engine died"):
        dying()
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_keeps_what_was_there(tmp_path):
    path = write(tmp_path / "t.h5", walk())
    before = path.read_bytes()
    with pytest.raises(Failure, match="trajectory 000001: position holds NaN"):
        write(path, walk(seed=1), walk() * np.nan)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    write(path, walk(seed=1))
    assert path.read_bytes() != before


@pytest.mark.parametrize(
    ("position", "more", "says"),
    [
        (walk()[0], {}, r"position has shape \(5, 3\), expected \(T, N, 3\)"),
        (walk()[:, :, :2], {}, r"position has shape \(6, 5, 2\)"),
        (walk(), {"velocity": walk(5)}, r"velocity has shape \(5, 5, 3\), expected \(6, 5, 3\)"),
        (walk(), {"attributes": {"mass": np.ones(4)}}, r"attributes/mass has shape \(4,\), expected \(5,\)"),
        (walk(), {"attributes": {"mass": np.ones((5, 1))}}, r"attributes/mass has shape \(5, 1\)"),
        (walk(), {"box": np.ones(3)}, r"box has shape \(3,\), expected \(2, 3\)"),
        (walk(), {"split": "dev"}, "split 'dev' is none of train, valid, test"),
        (walk() * np.nan, {}, "position holds NaN"),
        (walk(), {"velocity": walk() * np.inf}, "velocity holds NaN or infinite"),
        (walk(), {"attributes": {"mass": np.array([1, 1, np.nan, 1, 1])}}, "attributes/mass holds NaN"),
        (walk().astype(float) * 1e300, {}, "position holds NaN or infinite"),  # beyond float32
    ],
)
@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
def test_writer_refuses(tmp_path, position, more, says):
    with pytest.raises(Failure, match=says) as caught:
        write(tmp_path / "t.h5", position, **more)
    assert f"{tmp_path / 't.h5'}: trajectory 000000:" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


# files that are not whole or not ours


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.9, 0.999])
def test_truncated_file(copy, kept):
    content = copy.read_bytes()
    copy.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(Failure, match="not a readable HDF5 file") as caught:
        Trajectories(copy)
    assert str(caught.value).startswith(f"{copy}:")


def test_damage_within_a_frame(copy):
    with h5py.File(copy) as file:
        chunk = file["trajectories/000001/position"].id.get_chunk_info_by_coord((10, 0, 0))
    content = bytearray(copy.read_bytes())
    content[chunk.byte_offset : chunk.byte_offset + chunk.size] = bytes(chunk.size)
    copy.write_bytes(content)
    data = Trajectories(copy)
    assert np.isfinite(data.position(1, 0)).all()
    with pytest.raises(Failure, match="position") as caught:
        data.position(1, 10)
    assert str(caught.value).startswith(f"{copy}: trajectory")


def test_missing_text_and_foreign_files(tmp_path):
    with pytest.raises(Failure, match="no such file"):
        Trajectories(tmp_path / "absent.h5")
    with pytest.raises(Failure, match="no such file"):
        Trajectories(tmp_path)
    text = tmp_path / "text.h5"
    text.write_text("x y z\n" * 1000)
    with pytest.raises(Failure, match=r"text\.h5: not a readable HDF5 file"):
        Trajectories(text)
    with h5py.File(tmp_path / "foreign.h5", "w") as file:
        file["position"] = walk()
    with pytest.raises(Failure, match=r"foreign\.h5: not a trajectories file"):
        Trajectories(tmp_path / "foreign.h5")
    with pytest.raises(Failure, match="holds no trajectory"):
        Trajectories(write(tmp_path / "empty.h5"))


def edit_attribute(path: Path, where: str, name: str, value: object) -> None:
    with h5py.File(path, "r+") as file:
        if value is None:
            del file[where].attrs[name]
        else:
            file[where].attrs[name] = value


@pytest.mark.parametrize(
    ("where", "name", "value", "says"),
    [
        ("/", "format", "other", "not a trajectories file"),
        ("/", "version", 2, "format version 2, this program reads 1"),
        ("/", "version", None, "version"),
        ("/", "meta", None, "meta"),
        ("/", "meta", "{", "meta"),
        ("trajectories/000002", "split", "dev", "trajectory 000002: attribute split"),
        ("trajectories/000002", "dt", None, "trajectory 000002: attribute .*dt"),
    ],
)
def test_wrong_attributes(copy, where, name, value, says):
    edit_attribute(copy, where, name, value)
    with pytest.raises(Failure, match=says) as caught:
        Trajectories(copy)
    assert str(caught.value).startswith(f"{copy}:")


@pytest.mark.parametrize(
    ("dataset", "shape", "says"),
    [
        ("position", None, "trajectory 000001: dataset 'position'"),
        ("position", (14, 250), "trajectory 000001: dataset 'position'"),
        ("velocity", (14, 7, 3), "velocity"),
        ("attributes/mass", (7,), "mass"),
    ],
)
def test_missing_and_misshapen_datasets(copy, dataset, shape, says):
    with h5py.File(copy, "r+") as file:
        del file["trajectories/000001"][dataset]
        if shape:
            file["trajectories/000001"][dataset] = np.zeros(shape, np.float32)
    with pytest.raises(Failure, match=says) as caught:
        read_sample(Trajectories(copy), Snapshot("train", 1, 0), SPEC)
    assert str(caught.value).startswith(f"{copy}: trajectory")


@pytest.mark.parametrize(
    ("dataset", "place", "field"),
    [
        ("position", (5, 17, 1), "x"),
        ("position", (8, 17, 1), "y"),
        ("velocity", (5, 17, 2), "v"),
        ("attributes/mass", (17,), "f"),
    ],
)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_not_finite(copy, dataset, place, field, bad):
    with h5py.File(copy, "r+") as file:
        file["trajectories/000001"][dataset][place] = bad
    with pytest.raises(
        Failure, match=f"trajectory 1, frame 5: field '{field}' is NaN or infinite at node 17"
    ) as caught:
        read_sample(Trajectories(copy), Snapshot("train", 1, 5), SPEC)
    assert str(caught.value).startswith(f"{copy}:")


# frames and features


def test_every_frame_that_has_a_target(small):
    found = list(select_snapshots(Trajectories(small), 3, 0, 0, -1, 0))
    wanted = [(k, t) for k in range(4) for t in range(11)]
    assert [(s.trajectory, s.frame) for s in found] == wanted
    assert [s.split for s in found] == ["train"] * 22 + ["valid"] * 11 + ["test"] * 11


@pytest.mark.parametrize(
    ("horizon", "first", "last", "allowed"),
    [
        (1, 0, -1, range(13)),
        (13, 0, -1, range(1)),
        (3, 4, -1, range(4, 11)),
        (3, 2, 5, range(2, 6)),
        (3, 9, 99, (9, 10)),
    ],
)
def test_frames_stay_in_range(small, horizon, first, last, allowed):
    data = Trajectories(small)
    assert {s.frame for s in select_snapshots(data, horizon, 0, first, last, 0)} == set(allowed)
    for count in range(1, len(allowed) + 3):
        for k in range(4):
            drawn = [s.frame for s in select_snapshots(data, horizon, count, first, last, 7) if s.trajectory == k]
            assert len(drawn) == min(count, len(allowed))
            assert drawn == sorted(set(drawn))
            assert set(drawn) <= set(allowed)


def test_frames_depend_on_seed_and_trajectory_alone(small, tmp_path):
    def drawn(data: Trajectories, seed: int) -> list[list[int]]:
        found = list(select_snapshots(data, 2, 4, 0, -1, seed))
        return [[s.frame for s in found if s.trajectory == k] for k in range(len(data))]

    data = Trajectories(small)
    assert drawn(data, 0) == drawn(data, 0)
    assert drawn(data, 0) != drawn(data, 1)
    assert len(set(map(tuple, drawn(data, 0)))) > 1  # trajectories do not share their draw
    # nor do they depend on what stands beside or in them
    other = write(tmp_path / "t.h5", walk(14, 3), walk(14, 3))
    assert drawn(Trajectories(other), 0) == drawn(data, 0)[:2]


@pytest.mark.parametrize(("horizon", "first", "last"), [(14, 0, -1), (3, 11, -1), (3, 6, 5), (3, 0, -2)])
def test_no_frame_is_left(small, horizon, first, last):
    draw = select_snapshots(Trajectories(small), horizon, 0, first, last, 0)
    if last == -2:
        assert next(draw).frame == 0  # any negative last means the end
        return
    with pytest.raises(Failure, match=rf"trajectory 0 has 14 frames.*{horizon} frames ahead.*lower data"):
        next(draw)


def test_horizon_must_be_positive(small):
    with pytest.raises(Failure, match=r"data\.horizon=0"):
        next(select_snapshots(Trajectories(small), 0, 0, 0, -1, 0))


def test_sample_has_the_fields_of_its_frames(tmp_path):
    draw = np.random.default_rng(0)
    position, velocity = draw.uniform(size=(2, 9, 30, 3)).astype(np.float32)
    charge, mass = (draw.normal(size=(2, 30)) * [[3], [1]]).astype(np.float32)
    path = write(tmp_path / "t.h5", position, velocity=velocity, attributes={"charge": charge, "mass": mass})
    data = Trajectories(path)
    spec = SampleSpec(0.4, 5, ("speed", "charge/max", "charge", "speed/max"), ("mass", "charge"), 0.25)
    graph = read_sample(data, Snapshot("train", 0, 2), spec)
    speed = np.linalg.norm(velocity[2], axis=1)
    wanted = {
        "x": position[2],
        "v": velocity[2],
        "y": position[7],
        "f": np.stack([speed, charge / np.abs(charge).max(), charge, speed / speed.max()], 1),
        "a": np.stack([mass, charge], 1),
        "gid": np.arange(30),
    }
    assert set(graph.ndata) == set(wanted)
    for name, value in wanted.items():
        np.testing.assert_allclose(graph.ndata[name], value, rtol=1e-6, err_msg=name)
        assert graph.ndata[name].dtype == (torch.int64 if name == "gid" else torch.float32)
    src, _ = radius_edges(position[2], 0.4)
    assert graph.num_edges() == round(0.75 * len(src))
    assert graph.edata["e"].shape == (graph.num_edges(), 2)
    assert float(graph.edata["e"].max()) <= 0.4


def test_features_are_optional_and_a_zero_scale_is_harmless(tmp_path):
    path = write(tmp_path / "t.h5", walk(), attributes={"charge": np.zeros(5)})
    graph = read_sample(Trajectories(path), Snapshot("train", 0, 0), SampleSpec(1.0, 1, ()))
    assert graph.ndata["f"].shape == graph.ndata["a"].shape == (5, 0)
    fields = node_fields(Trajectories(path), Snapshot("train", 0, 0), SampleSpec(1.0, 1, ("charge/max",)))
    np.testing.assert_array_equal(fields["f"], np.zeros((5, 1)))


@pytest.mark.parametrize(
    ("features", "attributes", "says"),
    [
        (("charge",), (), r"no node attribute 'charge' \(it has: mass, viscosity\)"),
        ((), ("masss",), "no node attribute 'masss'"),
        (("mass/min",), (), "feature 'mass/min': the only scaling is '/max'"),
        (("",), (), "no node attribute ''"),
    ],
)
def test_unknown_features(small, features, attributes, says):
    with pytest.raises(Failure, match=says):
        read_sample(Trajectories(small), Snapshot("train", 0, 0), SampleSpec(0.3, 1, features, attributes))
