"""trajectories.h5: exact round trips, and one clear error for every kind of bad input."""

from __future__ import annotations

import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest

from dist_egnn.data.samples import SampleSpec, Snapshot, count_columns, read_sample
from dist_egnn.data.trajectories import Trajectories, Trajectory, Writer
from dist_egnn.errors import Failure

DT = 0.25


def walk(frames: int = 6, nodes: int = 5, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(frames, nodes, 3)).astype(np.float32)


def write(path: Path, *positions: np.ndarray, split: str = "train", **more: object) -> Path:
    with Writer(path, {}) as out:
        for position in positions:
            out.add(position, split=split, dt=0.5, source="test", **more)
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
    path, more = tmp_path / "new" / "t.h5", {"velocity": velocity, "attributes": attributes, "box": box}
    with Writer(path, meta) as out:
        out.add(position, split="valid", dt=0.02, source="an engine", periodic=True, **more)
    with Writer(tmp_path / "other.h5", {}) as out:
        out.add(walk(5, 9, 5), split="test", dt=DT, source="other")
    data, other = Trajectories(path), Trajectories(tmp_path / "other.h5")
    assert data.meta == meta
    assert len(data) == len(other) == 1
    assert data[0] == Trajectory(
        "000000", "valid", 7, 4, 0.02, "an engine", True, ("charge", "mass"), (True,) * 3, {"charge": 1, "mass": 1}
    )
    assert other[0] == Trajectory("000000", "test", 5, 9, DT, "other", False, (), (False,) * 3)
    for t in range(7):
        np.testing.assert_array_equal(data.position(0, t), position[t])
        np.testing.assert_array_equal(data.velocity(0, t), velocity[t])
    for name, value in attributes.items():
        np.testing.assert_array_equal(data.attribute(0, name), value)
    np.testing.assert_array_equal(data.box(0), box)
    assert other.box(0) is None
    assert other.position(0, 2).dtype == np.float32
    difference = np.diff(walk(5, 9, 5), axis=0)
    for t in range(4):  # no velocities are stored
        np.testing.assert_array_equal(other.velocity(0, t, "forward"), difference[t])
        np.testing.assert_allclose(other.velocity(0, t + 1), difference[t] / DT, rtol=1e-6)
    with pytest.raises(Failure, match=r"frame 0: .* no frame before it"):
        other.velocity(0, 0)


def test_a_failed_write_leaves_the_old_file_or_nothing(tmp_path):
    path = tmp_path / "t.h5"
    with pytest.raises(ZeroDivisionError), Writer(path, {}) as out:
        out.add(walk(), split="train", dt=1 / len(walk(0)), source="test")
    assert list(tmp_path.iterdir()) == []
    before = write(path, walk()).read_bytes()
    with pytest.raises(Failure, match=r"trajectory 000001: position: .* is NaN"):
        write(path, walk(seed=1), walk() * np.nan)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    assert write(path, walk(seed=1)).read_bytes() != before


UNREADABLE = {"holds no trajectory": [], "holds 6 frames of 0 nodes": [walk(nodes=0)], "attribute 'charge/e'": [walk()]}


@pytest.mark.parametrize("message", UNREADABLE)
def test_a_file_that_cannot_be_read_replaces_nothing(tmp_path, message):
    before = write(tmp_path / "t.h5", walk()).read_bytes()
    with pytest.raises(Failure, match=rf"t\.h5: .*{message}"):
        write(tmp_path / "t.h5", *UNREADABLE[message], attributes={"charge/e": np.ones(5)} if "/" in message else {})
    assert (tmp_path / "t.h5").read_bytes() == before
    assert list(tmp_path.iterdir()) == [tmp_path / "t.h5"]


def test_a_refused_trajectory_is_not_in_the_file(tmp_path):
    """Whatever raises inside `add`, if the caller goes on with the next one."""
    box, options = np.array([[0, 0, 0], [1, 1, 1]]), {"split": "train", "dt": 1.0, "source": "test"}
    with Writer(tmp_path / "t.h5", {}) as out:
        for more in ({"velocity": walk() * np.nan}, {"attributes": {"a": ["x"] * 5}}, {"box": box, "periodic": True}):
            out.add(walk(seed=1), **options, velocity=walk())
            with pytest.raises((Failure, ValueError)):
                out.add(walk(), **{**options, "attributes": {"a": np.ones(5)}, **more})
    data = Trajectories(tmp_path / "t.h5")
    assert [(one.velocity, one.attributes) for one in data] == [(True, ())] * 3
    np.testing.assert_array_equal(data.position(2, 5), walk(seed=1)[5])


@pytest.mark.parametrize(
    ("position", "more", "message"),
    [
        (walk()[0], {}, r"position has shape \(5, 3\), expected \(T, N, 3\)"),
        (walk()[:, :, :2], {}, r"position has shape \(6, 5, 2\)"),
        (walk(), {"velocity": walk(5)}, r"velocity has shape \(5, 5, 3\), expected \(6, 5, 3\)"),
        (walk(), {"attributes": {"mass": np.ones(4)}}, r"attributes/mass has shape \(4,\), expected \(5,\)"),
        (walk(), {"box": np.ones(3)}, r"box has shape \(3,\), expected \(2, 3\)"),
        (walk(), {"split": "dev"}, "split 'dev'"),
        (walk() * np.nan, {}, "position: .* is NaN"),
        (walk(), {"velocity": walk() * np.inf}, "velocity: .* is NaN or infinite"),
        (walk(), {"attributes": {"mass": np.array([1, 1, np.nan, 1, 1])}}, "attributes/mass: .* is NaN"),
        (walk().astype(float) * 1e300, {}, "position: .* too large"),  # too large for float32
    ],
)
@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
def test_writer_refuses(tmp_path, position, more, message):
    with pytest.raises(Failure, match=f"t.h5: trajectory 000000: {message}"):
        write(tmp_path / "t.h5", position, **more)
    assert list(tmp_path.iterdir()) == []


def test_truncated_file(copy):
    content = copy.read_bytes()
    for share in (0.0, 0.01, 0.5, 0.9, 0.999):
        copy.write_bytes(content[: int(share * len(content))])
        with pytest.raises(Failure, match=r"^\S+copy\.h5: not a readable HDF5 file"):
            Trajectories(copy)


def test_damage_within_a_frame(copy):
    with h5py.File(copy) as file:
        chunk = file["trajectories/000001/position"].id.get_chunk_info_by_coord((10, 0, 0))
    content = bytearray(copy.read_bytes())
    content[chunk.byte_offset : chunk.byte_offset + chunk.size] = bytes(chunk.size)
    copy.write_bytes(content)
    data = Trajectories(copy)
    assert np.isfinite(data.position(1, 0)).all()
    with pytest.raises(Failure, match=r"^\S+copy\.h5: trajectory 1: 'position': cannot be read"):
        data.position(1, 10)


def test_missing_and_foreign_files(tmp_path):
    (tmp_path / "text.h5").write_text("x y z\n" * 1000)
    with h5py.File(tmp_path / "foreign.h5", "w") as file:
        file["position"] = walk()
    for name, message in (
        ("absent.h5", r"absent\.h5: no such file"),
        (".", "no such file"),
        ("text.h5", r"text\.h5: not a readable HDF5 file"),
        ("foreign.h5", r"foreign\.h5: not a trajectories file"),
    ):
        with pytest.raises(Failure, match=message):
            Trajectories(tmp_path / name)


@pytest.mark.parametrize(
    ("where", "name", "value", "message"),
    [
        ("/", "format", "other", "not a trajectories file"),
        ("/", "version", 2, "format version 2, this program reads 1"),
        ("/", "version", None, "version"),
        ("/", "meta", None, "meta"),
        ("/", "meta", "{", "meta"),
        ("trajectories/000001", "split", "dev", "trajectory 000001: attribute split"),
        ("trajectories/000001", "dt", None, "trajectory 000001: attribute .*dt"),
        ("trajectories/000001/position", None, None, "trajectory 000001: dataset 'position'"),
        ("trajectories/000001/position", None, (14, 250), "trajectory 000001: dataset 'position'"),
        ("trajectories/000001/velocity", None, (14, 7, 3), "trajectory .*velocity"),
        ("trajectories/000001/attributes/mass", None, (7,), "trajectory .*mass"),
    ],
)
def test_wrong_attributes_and_datasets(copy, where, name, value, message):
    """name: of an attribute, which takes the value; without a name, a dataset takes it as its shape. None removes."""
    with h5py.File(copy, "r+") as file:
        if name:
            del file[where].attrs[name]
            file[where].attrs.update({} if value is None else {name: value})
        else:
            del file[where]
            if value:
                file[where] = np.zeros(value, np.float32)
    with pytest.raises(Failure, match=rf"^\S+copy\.h5: .*{message}"):
        read_sample(Trajectories(copy), Snapshot("train", 1, 0), SampleSpec(0.27, 3, ("mass",)))


PLACES = [("position", (5, 17, 1), "x"), ("position", (8, 17, 1), "y"), ("velocity", (5, 17, 2), "v")]


@pytest.mark.parametrize(("dataset", "index", "field"), [*PLACES, ("attributes/mass", (17,), "f")])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_values(copy, dataset, index, field, bad):
    with h5py.File(copy, "r+") as file:
        file["trajectories/000001"][dataset][index] = bad
    message = rf"^\S+copy\.h5: trajectory 1, frame 5: field '{field}' is NaN or infinite at node 17"
    with pytest.raises(Failure, match=message):
        read_sample(Trajectories(copy), Snapshot("train", 1, 5), SampleSpec(0.27, 3, ("mass",)))


def shapes_of_attributes(frames: int = 6, nodes: int = 5) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0).normal
    shapes = {"mass": (nodes,), "kind": (nodes, 3), "heat": (frames, nodes), "field": (frames, nodes, 2)}
    return {name: draw(size=shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("framewise", [False, True])
def test_attributes_of_every_shape(tmp_path, framewise):
    position, velocity, attributes = walk(), walk(seed=1), shapes_of_attributes()
    constant = {name: attributes[name] for name in ("mass", "kind")}
    box = np.array([[-9] * 3, [9] * 3])
    with Writer(tmp_path / "t.h5", {}) as out:
        if framewise:
            with out.begin(
                split="train", dt=1, source="test", attributes=constant, box=box, periodic=True
            ) as trajectory:
                for t in range(6):
                    varying = {name: attributes[name][t] for name in ("heat", "field")}
                    trajectory.add_frame(position[t], velocity[t], varying)
        else:
            more = {"velocity": velocity, "attributes": attributes, "box": box, "periodic": True}
            out.add(list(position), split="train", dt=1, source="test", **more)
    data = Trajectories(tmp_path / "t.h5")
    assert (data[0].frames, data[0].nodes) == (6, 5)
    assert data[0].widths == {"field": 2, "heat": 1, "kind": 3, "mass": 1}
    assert data[0].varying == ("field", "heat")
    spec = SampleSpec(9.0, 1, ("kind/max", "heat", "field"), ("mass", "field"))
    for t in (0, 3, 4):
        graph = read_sample(data, Snapshot("train", 0, t), spec)
        np.testing.assert_array_equal(graph.ndata["x"], position[t])
        np.testing.assert_array_equal(graph.ndata["v"], velocity[t])
        kind, heat, field = attributes["kind"], attributes["heat"][t, :, None], attributes["field"][t]
        np.testing.assert_allclose(graph.ndata["f"], np.hstack([kind / abs(kind).max(), heat, field]), rtol=1e-6)
        np.testing.assert_array_equal(graph.ndata["a"], np.hstack([attributes["mass"][:, None], field]))


def test_a_frame_written_alone_equals_a_whole_trajectory(tmp_path):
    position = walk(11, 5)
    with Writer(tmp_path / "t.h5", {}) as out, out.begin(split="train", dt=0.5, source="test") as trajectory:
        frame = np.empty((5, 3), np.float32)  # one buffer for all frames, as a simulation has it
        for now in position:
            frame[:] = now
            trajectory.add_frame(frame)
    for path in (tmp_path / "t.h5", write(tmp_path / "whole.h5", position)):
        data = Trajectories(path)
        assert data[0] == Trajectory("000000", "train", 11, 5, 0.5, "test", False, (), (False,) * 3)
        np.testing.assert_array_equal([data.position(0, t) for t in range(11)], position)


def add_frames(out: Writer, *frames: tuple[np.ndarray, ...]) -> None:
    with out.begin(split="train", dt=1, source="test") as trajectory:
        for frame in frames:
            trajectory.add_frame(*frame)


def test_a_number_of_nodes_that_changes_is_refused_with_its_frame(tmp_path):
    frames = [*walk(7), *walk(2, nodes=4)]
    message = r"^\S+t\.h5: trajectory 000000, frame 7: has 4 nodes, frame 0 has 5"
    with Writer(tmp_path / "t.h5", {}) as out:
        with pytest.raises(Failure, match=message):
            out.add(frames, split="train", dt=1, source="test")
        with pytest.raises(Failure, match=message):
            add_frames(out, *((frame,) for frame in frames))
        with pytest.raises(Failure, match=r"frame 1: .*same arrays"):
            add_frames(out, (frames[0], frames[0]), (frames[0],))
        with pytest.raises(Failure, match="has no frame"):
            add_frames(out)
        out.add(walk(), split="test", dt=1, source="test")
    assert [trajectory.split for trajectory in Trajectories(tmp_path / "t.h5")] == ["test"]  # nothing else remains


def test_an_attribute_that_can_be_read_both_ways_is_refused(tmp_path):
    heat = np.random.default_rng(0).normal(size=(5, 5))  # 5 frames of 5 nodes
    with pytest.raises(Failure, match=r"attributes/heat \(5, 5\) may be \(T, N\) or \(N, k\); pass \(5, 5, 1\)"):
        write(tmp_path / "t.h5", walk(5, 5), attributes={"heat": heat})
    data = Trajectories(write(tmp_path / "t.h5", walk(5, 5), attributes={"heat": heat[..., None]}))
    np.testing.assert_allclose(data.attribute(0, "heat", 3)[:, 0], heat[3], rtol=1e-6)


def test_an_attribute_of_other_width_is_refused(tmp_path):
    with Writer(tmp_path / "t.h5", {}) as out:
        for width in (2, 3):
            out.add(walk(), split="train", dt=1, source="test", attributes={"kind": np.ones((5, width))})
    with pytest.raises(Failure, match=r"t\.h5: trajectory 1: attribute 'kind' has 3 columns, in trajectory 0 it has 2"):
        count_columns(Trajectories(tmp_path / "t.h5"), ["kind/max"])
