"""recipes/fluid113k: published records are read and written, damaged ones rejected; options."""

from __future__ import annotations

import os
import pickle
import re
from pathlib import Path

import h5py
import msgpack
import numpy as np
import pytest
import zstandard
from fluid113k import BOX, MASS, RADIUS, RECIPE, block, pack, prepare, raw, records, run, write_authors_records


@pytest.fixture
def authors(tmp_path: Path) -> Path:
    """A folder with trajectory 7, written independently of the recipe."""
    write_authors_records(tmp_path / "records", 7, *block(4))
    return tmp_path / "records"


def test_records_of_the_authors_are_read(tmp_path, authors):
    position, velocity = block(4)
    assert run("--from-records", authors, "--out", tmp_path / "x.h5") == 0
    with h5py.File(tmp_path / "x.h5") as file:
        group = file["trajectories/000000"]
        np.testing.assert_array_equal(group["position"], position)
        np.testing.assert_array_equal(group["velocity"], velocity)
        np.testing.assert_array_equal(group["attributes/mass"], np.full(64, MASS, np.float32))
        np.testing.assert_array_equal(group["attributes/viscosity"], np.full(64, 0.01, np.float32))
        np.testing.assert_array_equal(group["box"], BOX)
        assert (group.attrs["split"], group.attrs["dt"]) == ("train", 0.02)
        np.testing.assert_array_equal(group.attrs["gravity"], [0, -9.81, 0])
    options = ("--out", tmp_path / "y.h5", "--frames", 5, "--quantum", 0.125, "--no-velocity")
    assert run("--from-records", authors, *options) == 0
    with h5py.File(tmp_path / "y.h5") as file:
        group = file["trajectories/000000"]
        np.testing.assert_array_equal(group["position"], np.rint(position[:5] * 8) / 8)
        assert "velocity" not in group


def plain(value: object) -> np.ndarray:
    assert isinstance(value, dict)
    shape = value[b"shape"] if value[b"nd"] else ()
    return np.frombuffer(value[b"data"], value[b"type"]).reshape(shape)


def test_written_records_have_the_published_layout(tmp_path):
    """Read with msgpack and zstd only."""
    position, velocity = block(4)
    mass, viscosity = np.full(64, MASS, np.float32), np.full(64, 0.01, np.float32)
    records.write(tmp_path, 3, records.Record(position, velocity, mass, viscosity, BOX, 0.02), RADIUS)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"sim_0003_{k:02d}.msgpack.zst" for k in range(16)]
    t = 0
    for k in range(16):
        data = zstandard.ZstdDecompressor().decompress((tmp_path / f"sim_0003_{k:02d}.msgpack.zst").read_bytes())
        frames = msgpack.unpackb(data, raw=False)
        assert len(frames) == (2 if k < 4 else 1)
        for j, frame in enumerate(frames):
            walls = {"box", "box_normals"} if j == 0 else set()
            assert set(frame) == {"frame_id", "scene_id", "pos", "vel", "m", "viscosity"} | walls
            number = plain(frame["frame_id"])
            assert (number, number.dtype, frame["scene_id"]) == (t, "<i8", "sim_0003")
            for key, expected in {"pos": position[t], "vel": velocity[t], "m": mass, "viscosity": viscosity}.items():
                assert frame[key][b"type"] == "<f4"
                np.testing.assert_array_equal(plain(frame[key]), expected)
            t += 1
        points, normals = plain(frames[0]["box"]), plain(frames[0]["box_normals"])
        np.testing.assert_array_equal([points.min(0), points.max(0)], BOX)
        inside = points + 0.1 * normals  # into the box
        axis = np.abs(normals).argmax(1)
        rows = np.arange(len(points))
        assert ((inside > BOX[0]) & (inside < BOX[1]))[rows, axis].all()
        assert (np.isin(points[rows, axis], BOX)).all()


def test_docs_describe_the_layout(tmp_path):
    """The table of the recipe's page has all keys of a first frame, their types and shapes, and which are in it only."""
    page = (RECIPE / "README.md").read_text()
    section = page.split("## The published records\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| (\w+)(?: \((.*)\))? \| (.*) \|$", section, re.M)
    documented = {
        key: (kind, tuple(re.findall(r"\w+", shape)), "first frame" in meaning) for key, kind, shape, meaning in rows
    }
    mass = np.full(64, MASS, np.float32)
    records.write(tmp_path, 3, records.Record(*block(4), mass, mass, BOX, 0.01), RADIUS)
    path = tmp_path / "sim_0003_00.msgpack.zst"
    first, second = msgpack.unpackb(zstandard.decompress(path.read_bytes()), raw=False)
    written = {}
    for key, value in first.items():
        array = plain(value) if isinstance(value, dict) else np.array(value)
        kind = {"U": "text", "f": "float32" if array.ndim else "float", "i": "int64"}[array.dtype.kind]
        shape = tuple({3: "3", 64: "N"}.get(size, "M") for size in array.shape)
        written[key] = (kind, shape, key not in second)
    assert documented == written
    assert "200 frames are eight files of 13 and eight of 12" in " ".join(section.split())
    assert [len(part) for part in np.array_split(np.arange(200), records.FILES)] == [13] * 8 + [12] * 8


def test_round_trip_of_a_scaled_scene(tmp_path):
    position, velocity = block(4, dt=0.01)
    mass = np.linspace(1, 2, 64, dtype=np.float32)
    record = records.Record(position, velocity, mass, mass / 100, BOX, 0.0097299179)
    records.write(tmp_path, 12345, record, RADIUS)
    result = records.read(tmp_path, 12345)
    for name, value in vars(record).items():
        np.testing.assert_array_equal(getattr(result, name), value, err_msg=name)


def rewrite(change):
    """Damage that changes each frame of a file."""

    def damage(path: Path) -> None:
        frames = msgpack.unpackb(zstandard.decompress(path.read_bytes()), raw=False)
        pack(path, [change(frame) for frame in frames])

    return damage


def replaced(key: str, value: object):
    return rewrite(lambda frame: frame | {key: value})


class Bomb:
    """Runs code when unpickled."""

    def __reduce__(self):
        return os._exit, (99,)


OBJECTS = {b"nd": True, b"type": "|O", b"kind": b"O", b"shape": [1], b"data": pickle.dumps(Bomb())}
DAMAGE = {
    "no file": (Path.unlink, "no such file; a trajectory has 16 files"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-20]), "ends too early"),
    "empty": (lambda path: path.write_bytes(b""), "ends too early"),
    "not zstd": (lambda path: path.write_bytes(b"hello, this is text"), "no readable zstd file"),
    "not msgpack": (lambda path: path.write_bytes(zstandard.compress(b"\xc1\x00")), "no readable msgpack inside"),
    "no list": (lambda path: pack(path, {"pos": 1}), "holds no list of frames"),
    "no frames": (lambda path: pack(path, []), "holds no list of frames"),
    "no maps": (lambda path: pack(path, [1]), "frame 0: is not a map"),
    "a wrong shape": (replaced("pos", raw(np.zeros((4, 3))) | {b"shape": [9, 3]}), "no readable msgpack inside"),
    "pickles": (replaced("pos", OBJECTS), "an array of Python objects"),
    "fewer particles": (replaced("pos", raw(np.zeros((4, 3)))), "key 'pos' has shape (4, 3), expected floats (64, 3)"),
    "integers": (replaced("vel", raw(np.zeros((64, 3), int))), "key 'vel' has shape (64, 3), expected floats (64, 3)"),
    "text": (replaced("m", "heavy"), "key 'm' has shape (), expected floats (64)"),
    "no walls": (replaced("box", raw(np.zeros((0, 3)))), "key 'box' has shape (0, 3), expected floats (M, 3)"),
    "another time": (replaced("frame_id", 3), "key 'frame_id' is 3, expected 9"),
}
for key in ("pos", "vel", "m", "viscosity", "frame_id", "scene_id", "box", "box_normals"):
    without = rewrite(lambda frame, key=key: {k: v for k, v in frame.items() if k != key})
    DAMAGE[f"no {key}"] = (without, f"frame 0: key '{key}' is missing")


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_records_give_one_line(tmp_path, authors, capsys, kind):
    path = authors / "sim_0007_05.msgpack.zst"  # frame 9
    damage, message = DAMAGE[kind]
    damage(path)
    assert run("--from-records", authors, "--out", tmp_path / "x.h5") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {path}: ")
    assert message in line
    assert "fetch" in line
    assert not (tmp_path / "x.h5").exists()


def test_repaired_records_continue_to_the_same_bytes(tmp_path, authors):
    for number in (8, 9):
        write_authors_records(authors, number, *block(4))
    path = authors / "sim_0009_03.msgpack.zst"
    whole = path.read_bytes()
    assert run("--from-records", authors, "--out", tmp_path / "a.h5", "--workers", 2) == 0
    path.unlink()
    assert run("--from-records", authors, "--out", tmp_path / "b.h5", "--workers", 1) == 2
    done = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "b.h5.parts").glob("*.h5")}
    assert set(done) == {"000000.h5", "000001.h5"}
    path.write_bytes(whole)
    assert run("--from-records", authors, "--out", tmp_path / "b.h5") == 0
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()
    assert not (tmp_path / "b.h5.parts").exists()


def test_run_py_from_records_to_a_table(tmp_path, authors, check_run_py):
    for number in (8, 9):
        write_authors_records(authors, number, *block(4))
    assert run("--from-records", authors, "--out", tmp_path / "x.h5") == 0
    check_run_py(RECIPE, f"data.path={tmp_path / 'x.h5'}", "data.horizon=5", "data.frames=4")


def test_split_counts():
    assert prepare.split_counts(140) == (100, 20, 20)
    assert prepare.split_counts(14) == (10, 2, 2)
    assert [prepare.split_counts(k) for k in (1, 2, 3, 4)] == [(1, 0, 0), (1, 1, 0), (1, 1, 1), (2, 1, 1)]
    assert all(sum(prepare.split_counts(k)) == k and min(prepare.split_counts(k)) > 0 for k in range(3, 300))


def test_trajectories_in_the_order_of_their_numbers(tmp_path):
    folder = tmp_path / "records"
    for k, number in enumerate((2, 10, 9999, 10000)):
        position, velocity = block(3)
        write_authors_records(folder, number, position + np.float32(0.01 * k), velocity)
    for more, splits in (([], "train train valid test"), (["--trajectories", 0, 1, 2], "valid test test")):
        assert run("--from-records", folder, "--out", tmp_path / "x.h5", *more) == 0
        with h5py.File(tmp_path / "x.h5") as file:
            groups = list(file["trajectories"].values())
            assert " ".join(group.attrs["split"] for group in groups) == splits
            starts = [group["position"][0, 0, 0] for group in groups]
        np.testing.assert_allclose(starts, [-0.3 + 0.01 * k for k in range(len(starts))], atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--from-records", "{}", "--scale", "tiny"], "--scale is for simulations"),
        (["--from-records", "{}", "--particles", 2000], "--particles is for simulations"),
        (["--from-records", "{}", "--threads", 2], "--threads is for simulations"),
        (["--from-records", "{}", "--records", "{}"], "not allowed with"),
        (["--from-records", "{}", "--trajectories", 1, 1, 0], "--trajectories: 2 requested"),
        (["--from-records", "{}/nothing"], "no file named like sim_0001_00.msgpack.zst"),
        (["--records", "{}", "--frames", 15], "use 16 or more"),
        (["--trajectories", 0, 0, 0], "at least one above 0"),
        (["--frames", 1], "--frames 1: must be at least 2"),
        (["--particles", 0], "--particles 0: must be at least 1"),
        (["--threads", 0], "--threads 0: must be at least 1"),
        (["--quantum", -1], "--quantum -1.0: must be at least 0"),
    ],
)
def test_invalid_options(tmp_path, authors, capsys, arguments, message):
    assert run("--out", tmp_path / "x.h5", *(str(argument).format(authors) for argument in arguments)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_scales():
    for scale, sizes in prepare.SIZES.items():
        options = prepare.parse(["--out", "x.h5", "--scale", scale])
        assert (options.particles, tuple(options.trajectories), options.frames) == sizes
        assert len(options.splits) == sum(sizes[1])
    assert prepare.parse(["--out", "x.h5"]).particles == prepare.SIZES["small"][0]
    options = prepare.parse(["--out", "x.h5", "--scale", "full", "--frames", "20", "--trajectories", "1", "0", "0"])
    assert (options.particles, options.frames, options.splits) == (113_140, 20, ["train"])
