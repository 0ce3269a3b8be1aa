"""recipes/fluid113k: the published records both ways, the physics, engines that fail or are killed."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import h5py
import msgpack
import numpy as np
import pytest
import zstandard

RECIPE = Path(__file__).parents[2] / "recipes" / "fluid113k"
RADIUS = 0.025


def load(name: str) -> ModuleType:
    """A file of the recipe as a module."""
    spec = importlib.util.spec_from_file_location(name, RECIPE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


physics, records = load("physics"), load("records")
prepare = load("prepare")
del sys.modules["prepare"]  # every recipe has one


def run(*words: object) -> int:
    return prepare.preparing.main(prepare.run, [str(word) for word in words])


def block(n: int = 12, frames: int = 20, dt: float = 0.02) -> tuple[np.ndarray, np.ndarray]:
    """A cube of n³ particles at rest density in free fall: position, velocity (T, n³, 3)."""
    lattice = np.stack(np.meshgrid(*[np.arange(n) * 2 * RADIUS] * 3, indexing="ij"), -1).reshape(-1, 3)
    t = dt * np.arange(frames)[:, None, None]
    gravity = np.array([0, -9.81, 0])
    position = lattice + [-0.3, 1.5, -0.3] + gravity * t**2 / 2
    return position.astype(np.float32), np.broadcast_to(gravity * t, position.shape).astype(np.float32)


MASS = 1000 * (2 * RADIUS) ** 3
BOX = np.array([[-0.5, 0, -0.5], [0.5, 2.5, 0.5]], np.float32)


# ---- records as others write them: msgpack and zstd alone, the arrays' encoding by hand


def raw(array: np.ndarray) -> dict:
    head = {b"nd": True, b"type": array.dtype.str, b"kind": b"", b"shape": list(array.shape)}
    return head | {b"data": array.tobytes()}


def frame_of(number: int, t: int, position: np.ndarray, velocity: np.ndarray, first: bool) -> dict:
    n = len(position)
    corners = np.array(np.meshgrid(*BOX.T)).reshape(3, 8).T.copy()
    walls = {"box": raw(corners), "box_normals": raw(-np.sign(corners))}
    return (walls if first else {}) | {
        "frame_id": {b"nd": False, b"type": "<i8", b"data": t.to_bytes(8, "little")},
        "scene_id": f"sim_{number:04d}",
        "pos": raw(position),
        "vel": raw(velocity),
        "m": raw(np.full(n, MASS, np.float32)),
        "viscosity": raw(np.full(n, 0.01, np.float32)),
    }


def pack(path: Path, frames: object) -> None:
    path.write_bytes(zstandard.ZstdCompressor(level=3).compress(msgpack.packb(frames, use_bin_type=True)))


def foreign(folder: Path, number: int, position: np.ndarray, velocity: np.ndarray) -> list[Path]:
    """20 frames as the authors' files hold them: two in each of the first four files, one in each of the other twelve."""
    folder.mkdir(exist_ok=True)
    paths, t = [folder / f"sim_{number:04d}_{k:02d}.msgpack.zst" for k in range(16)], 0
    for k, path in enumerate(paths):
        count = 2 if k < 4 else 1
        pack(path, [frame_of(number, s, position[s], velocity[s], s == t) for s in range(t, t + count)])
        t += count
    return paths


@pytest.fixture
def authors(tmp_path: Path) -> Path:
    """A folder with trajectory 7 of somebody else."""
    foreign(tmp_path / "records", 7, *block(4))
    return tmp_path / "records"


def test_foreign_records_read_back_equal(tmp_path, authors):
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


def test_frames_rounding_and_velocities_of_records(tmp_path, authors):
    out, position = tmp_path / "x.h5", block(4)[0]
    assert run("--from-records", authors, "--out", out, "--frames", 5, "--quantum", 0.125, "--no-velocity") == 0
    with h5py.File(out) as file:
        group = file["trajectories/000000"]
        np.testing.assert_array_equal(group["position"], np.rint(position[:5] * 8) / 8)
        assert "velocity" not in group


def plain(value: object) -> np.ndarray:
    assert isinstance(value, dict)
    shape = value[b"shape"] if value[b"nd"] else ()
    return np.frombuffer(value[b"data"], value[b"type"]).reshape(shape)


def test_what_we_write_has_the_published_layout(tmp_path):
    """Read by msgpack and zstd alone."""
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
            assert (plain(frame["frame_id"]), plain(frame["frame_id"]).dtype, frame["scene_id"]) == (
                t,
                "<i8",
                "sim_0003",
            )
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


def test_round_trip_of_a_scene_scaled_down(tmp_path):
    position, velocity = block(4, dt=0.01)
    mass = np.linspace(1, 2, 64, dtype=np.float32)
    record = records.Record(position, velocity, mass, mass / 100, BOX, 0.0097299179)
    records.write(tmp_path, 12345, record, RADIUS)
    found = records.read(tmp_path, 12345)
    for name, value in vars(record).items():
        np.testing.assert_array_equal(getattr(found, name), value, err_msg=name)


def rewrite(path: Path, change) -> None:
    frames = msgpack.unpackb(zstandard.decompress(path.read_bytes()), raw=False)
    pack(path, change(frames))


def without(key: str):
    return lambda frames: [{k: v for k, v in frame.items() if k != key} for frame in frames]


def replaced(key: str, value: object):
    return lambda frames: [frame | {key: value} for frame in frames]


class Bomb:
    """Unpickling it runs code."""

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
    "no maps": (lambda path: pack(path, [1]), "frame 0: is no map"),
    "an array that lies": (
        lambda path: rewrite(path, replaced("pos", raw(np.zeros((4, 3))) | {b"shape": [9, 3]})),
        "no readable msgpack inside",
    ),
    "pickles": (lambda path: rewrite(path, replaced("pos", OBJECTS)), "an array of Python objects"),
    "fewer particles": (
        lambda path: rewrite(path, replaced("pos", raw(np.zeros((4, 3))))),
        "key 'pos' has shape (4, 3), expected floats (64, 3)",
    ),
    "integers": (
        lambda path: rewrite(path, replaced("vel", raw(np.zeros((64, 3), int)))),
        "key 'vel' has shape (64, 3), expected floats (64, 3)",
    ),
    "text": (lambda path: rewrite(path, replaced("m", "heavy")), "key 'm' has shape (), expected floats (64)"),
    "no walls": (
        lambda path: rewrite(path, replaced("box", raw(np.zeros((0, 3))))),
        "key 'box' has shape (0, 3), expected floats (M, 3)",
    ),
    "another time": (lambda path: rewrite(path, replaced("frame_id", 3)), "key 'frame_id' is 3, expected 9"),
    **{
        f"no {key}": (lambda path, key=key: rewrite(path, without(key)), f"frame 0: key '{key}' is missing")
        for key in ("pos", "vel", "m", "viscosity", "frame_id", "scene_id", "box", "box_normals")
    },
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_records_are_one_clear_line(tmp_path, authors, capsys, kind):
    path = authors / "sim_0007_05.msgpack.zst"  # frame 9
    damage, says = DAMAGE[kind]
    damage(path)
    assert run("--from-records", authors, "--out", tmp_path / "x.h5") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {path}: ")
    assert says in line
    assert "fetch" in line
    assert not (tmp_path / "x.h5").exists()


def test_mended_records_go_on_to_the_same_bytes(tmp_path, authors):
    for number in (8, 9):
        foreign(authors, number, *block(4))
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


def test_shares_of_trajectories():
    assert prepare.shares(140) == (100, 20, 20)
    assert prepare.shares(14) == (10, 2, 2)
    assert [prepare.shares(k) for k in (1, 2, 3, 4)] == [(1, 0, 0), (1, 1, 0), (1, 1, 1), (2, 1, 1)]
    assert all(sum(prepare.shares(k)) == k and min(prepare.shares(k)) > 0 for k in range(3, 300))


def test_trajectories_in_the_order_of_their_numbers(tmp_path):
    folder = tmp_path / "records"
    for k, number in enumerate((2, 10, 9999, 10000)):
        position, velocity = block(3)
        foreign(folder, number, position + np.float32(0.01 * k), velocity)
    for more, splits in (([], "train train valid test"), (["--trajectories", 0, 1, 2], "valid test test")):
        assert run("--from-records", folder, "--out", tmp_path / "x.h5", *more) == 0
        with h5py.File(tmp_path / "x.h5") as file:
            groups = list(file["trajectories"].values())
            assert " ".join(group.attrs["split"] for group in groups) == splits
            starts = [group["position"][0, 0, 0] for group in groups]
        np.testing.assert_allclose(starts, [-0.3 + 0.01 * k for k in range(len(starts))], atol=1e-6)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--from-records", "{}", "--scale", "tiny"], "--scale means a simulation"),
        (["--from-records", "{}", "--particles", 2000], "--particles means a simulation"),
        (["--from-records", "{}", "--records", "{}"], "not allowed with"),
        (["--from-records", "{}", "--trajectories", 1, 1, 0], "--trajectories: 2 wanted"),
        (["--from-records", "{}/nothing"], "no file named like sim_0001_00.msgpack.zst"),
        (["--records", "{}", "--frames", 15], "take 16 or more"),
        (["--trajectories", 0, 0, 0], "not all of them 0"),
        (["--frames", 1], "--frames 1: must be at least 2"),
        (["--particles", 0], "--particles 0: must be at least 1"),
        (["--quantum", -1], "--quantum -1.0: must be at least 0"),
    ],
)
def test_options_that_cannot_be(tmp_path, authors, capsys, words, says):
    assert run("--out", tmp_path / "x.h5", *(str(word).format(authors) for word in words)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line


def test_scales():
    for scale, sizes in prepare.SIZES.items():
        options = prepare.parse(["--out", "x.h5", "--scale", scale])
        assert (options.particles, tuple(options.trajectories), options.frames) == sizes
        assert len(options.splits) == sum(sizes[1])
    assert prepare.parse(["--out", "x.h5"]).particles == prepare.SIZES["small"][0]
    options = prepare.parse(["--out", "x.h5", "--scale", "full", "--frames", "20", "--trajectories", "1", "0", "0"])
    assert (options.particles, options.frames, options.splits) == (113_140, 20, ["train"])


# ---- physics


def test_density_of_a_block_and_of_one_too_dense():
    position, velocity = block()
    mass = np.full(len(position[0]), MASS)
    assert physics.inner_density(position[0], mass, BOX, RADIUS) == pytest.approx(1000, rel=0.01)
    assert physics.complaints(position, velocity, mass, BOX, RADIUS) == []
    (complaint,) = physics.complaints(position, velocity, 1.1 * mass, BOX, RADIUS)
    assert complaint.startswith("density 11")
    thin = position[0][position[0][:, 1] < 1.65]
    assert np.isnan(physics.inner_density(thin, mass[: len(thin)], BOX, RADIUS))


def test_energy_that_grows():
    position, velocity = block()
    mass = np.full(len(position[0]), MASS)
    energies = physics.energy(position, velocity, mass, 0.5)
    height = position[0, :, 1].mean() - 0.5
    np.testing.assert_allclose(energies, mass.sum() * 9.81 * height, rtol=1e-5)
    assert physics.energy_gain(np.array([10.0, 4.0, 4.5, 3.0, 3.8])) == pytest.approx(0.08)
    (complaint,) = physics.complaints(position, 1.5 * velocity, mass, BOX, RADIUS)
    assert complaint.startswith("energy rises by")


def test_who_is_outside():
    position = block()[0]
    assert physics.first_outside(position, BOX) is None
    position[3, 17, 1] = 2.6
    position[5, 2, 0] = -9
    assert physics.first_outside(position, BOX) == (3, 17)


def test_the_sample_obeys():
    with h5py.File(RECIPE / "sample.h5") as file:
        for group in file["trajectories"].values():
            position, box, mass = group["position"][()], group["box"][()], group["attributes/mass"][()]
            assert physics.first_outside(position, box) is None
            for t in (0, 30, 45, 59):
                assert physics.inner_density(position[t], mass, box, RADIUS) == pytest.approx(1000, rel=0.01)
            velocity = np.diff(position, axis=0) / group.attrs["dt"]
            middle = (position[1:] + position[:-1]) / 2
            assert physics.energy_gain(physics.energy(middle, velocity, mass, 0.0)) < 0.001


def test_scenes_fit_their_box():
    sizes = []
    for k in range(20):
        scene = prepare.draw(0, k, 1500)
        s = (1500 / 113_140) ** (1 / 3)
        np.testing.assert_allclose(scene.box[1] - scene.box[0], s * np.array([5, 10, 5]))
        assert ((scene.position >= scene.box[0] + 0.0999) & (scene.position <= scene.box[1] - 0.0999)).all()
        assert (np.abs(scene.velocity) <= np.sqrt(s) * np.array([4, 1, 4])).all()
        assert scene.dt == pytest.approx(np.sqrt(s) / 50)
        np.testing.assert_array_equal(scene.position, prepare.draw(0, k, 1500).position)
        sizes.append(len(scene.position))
    assert np.mean(sizes) == pytest.approx(1500, rel=0.15)
    assert not np.array_equal(prepare.draw(1, 0, 1500).velocity, prepare.draw(0, 0, 1500).velocity)


# ---- engines

STILL = """
import os, sys, time
import numpy as np
folder = sys.argv[1]
job = dict(np.load(folder + "/job.npz"))
k = int(os.path.basename(folder).split(".")[0])
{}
x = np.repeat(job["position"][None], job["frames"], 0)
n = x.shape[1]
results = dict(position=x, velocity=0 * x, mass=np.full(n, 0.125), viscosity=np.full(n, 0.01))
for name, value in results.items():
    np.save(folder + "/" + name + ".npy", value.astype(np.float32))
"""
FIRST_DONE = "while not os.path.exists(os.path.dirname(folder) + '/000000.h5'): time.sleep(0.02)"


@pytest.fixture
def engine(tmp_path, monkeypatch):
    """engine(lines): lets a small program, where nothing moves, with these lines in it, stand for the engine."""
    (tmp_path / "fake").mkdir()
    monkeypatch.setattr(prepare, "__file__", str(tmp_path / "fake" / "prepare.py"))
    monkeypatch.setattr(prepare.importlib.util, "find_spec", lambda name: name)
    version = prepare.importlib.metadata.version
    monkeypatch.setattr(
        prepare.importlib.metadata, "version", lambda name: "0.0" if name == "pysplishsplash" else version(name)
    )
    return lambda lines="": (tmp_path / "fake" / "engine.py").write_text(STILL.format(lines))


SMALL = ("--particles", 1000, "--trajectories", 2, 1, 1, "--frames", 16)


def test_what_is_simulated_and_its_records_are_the_same_trajectories(tmp_path, engine):
    engine()
    assert run("--out", tmp_path / "a.h5", *SMALL, "--quantum", 0.001, "--records", tmp_path / "records") == 0
    assert run("--from-records", tmp_path / "records", "--out", tmp_path / "b.h5") == 0
    with h5py.File(tmp_path / "a.h5") as a, h5py.File(tmp_path / "b.h5") as b:
        assert [g.attrs["split"] for g in a["trajectories"].values()] == ["train", "train", "valid", "test"]
        for name, group in a["trajectories"].items():
            other = b["trajectories"][name]
            for key in ("position", "velocity", "attributes/mass", "attributes/viscosity", "box"):
                np.testing.assert_array_equal(group[key], other[key], err_msg=key)
            assert {**group.attrs, "source": ""} == {**other.attrs, "source": ""}
            np.testing.assert_allclose(group["position"][0], prepare.draw(0, int(name), 1000).position, atol=6e-4)


def test_an_engine_that_fails_ends_the_others_and_the_rest_is_kept(tmp_path, engine, capsys):
    engine(f"if k == 3:\n  {FIRST_DONE}\n  sys.exit('no more memory')\nif k in (1, 2): time.sleep(60)")
    started = time.monotonic()
    assert run("--out", tmp_path / "b.h5", *SMALL, "--workers", 4) == 2
    assert time.monotonic() - started < 20
    assert capsys.readouterr().err == "error: trajectory 3: no more memory\n"
    assert [p.name for p in (tmp_path / "b.h5.parts").glob("*.h5")] == ["000000.h5"]
    engine()
    assert run("--out", tmp_path / "b.h5", *SMALL, "--workers", 2) == 0
    assert run("--out", tmp_path / "a.h5", *SMALL, "--workers", 1) == 0
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith("b.h5")) == ["b.h5", "b.h5.manifest.json"]


def test_a_particle_outside_is_refused(tmp_path, engine, capsys):
    engine("if k == 1: job['position'][5, 1] = -0.01")
    assert run("--out", tmp_path / "x.h5", *SMALL) == 2
    assert (
        capsys.readouterr().err
        == "error: trajectory 1: particle 5 is outside the box at frame 0; take another --seed\n"
    )


def test_a_doubtful_trajectory_is_told_of(tmp_path, engine, capsys):
    engine("if k == 1: job['position'] = job['position'] * 0.9 + job['box'][1] * 0.1")
    assert run("--out", tmp_path / "x.h5", *SMALL) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: trajectory 1: density 13")


def test_records_in_another_folder_than_before_are_missed(tmp_path, engine, capsys):
    engine(f"if k > 0:\n  {FIRST_DONE}\n  sys.exit('killed')")
    words = ("--out", tmp_path / "x.h5", *SMALL)
    assert run(*words, "--records", tmp_path / "one") == 2
    engine()
    assert run(*words, "--records", tmp_path / "two") == 2
    first = tmp_path / "two" / "sim_0001_00.msgpack.zst"
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {first}: missing")


def test_without_the_engine_one_line_says_how_to_get_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare.importlib.util, "find_spec", lambda name: None)
    assert run("--out", tmp_path / "x.h5", "--scale", "tiny") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "SPlisHSPlasH is not installed; .venv/bin/pip install -e '.[fluid]'" in line


def loadable() -> bool:
    try:
        ctypes.CDLL("libGLdispatch.so.0")
    except OSError:
        return False
    return importlib.util.find_spec("pysplishsplash") is not None


needs_engine = pytest.mark.skipif(not loadable(), reason="pysplishsplash or its libraries are not installed")
REAL = ("--scale", "tiny", "--trajectories", 2, 1, 0, "--frames", 24)


def command(out: Path) -> list[str]:
    return [sys.executable, str(RECIPE / "prepare.py"), "--out", str(out), *map(str, REAL)]


@needs_engine
def test_the_engine_killed_and_resumed_gives_the_same_bytes(tmp_path):
    first, second = tmp_path / "a.h5", tmp_path / "b.h5"
    subprocess.run([*command(first), "--workers", "2"], check=True)
    process = subprocess.Popen([*command(second), "--workers", "1"])
    piece, deadline = tmp_path / "b.h5.parts" / "000000.h5", time.monotonic() + 60
    while not piece.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert not second.exists()
    subprocess.run([*command(second), "--workers", "2"], check=True)
    assert first.read_bytes() == second.read_bytes()


@needs_engine
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_no_engine_outlives_prepare(tmp_path, sent, code):
    """Also where the signal reaches prepare.py alone."""
    process = subprocess.Popen([*command(tmp_path / "x.h5"), "--workers", "1", "--frames", "4000"])
    deadline = time.monotonic() + 60

    def wait_for(condition) -> None:
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.05)

    wait_for((tmp_path / "x.h5.parts" / "000000.engine" / "log").exists)  # the engine makes it
    tasks = Path(f"/proc/{process.pid}/task").iterdir()
    (child,) = {int(c) for task in tasks for c in (task / "children").read_text().split()}
    process.send_signal(sent)
    assert process.wait(20) == code
    state = Path(f"/proc/{child}/status")
    wait_for(lambda: not state.exists() or "zombie" in state.read_text())


@needs_engine
def test_the_simulated_fluid_obeys(tmp_path):
    out = tmp_path / "x.h5"
    subprocess.run([*command(out), "--workers", "2"], check=True)
    with h5py.File(out) as file:
        for group in file["trajectories"].values():
            keys = ("position", "velocity", "attributes/mass", "box")
            position, velocity, mass, box = (group[key][()] for key in keys)
            assert physics.first_outside(position, box) is None
            assert physics.complaints(position, velocity, mass, box, RADIUS) == []
            assert physics.inner_density(position[-1], mass, box, RADIUS) == pytest.approx(1000, rel=0.05)
            fall = np.diff(position[:4], axis=0).mean(1) / group.attrs["dt"]
            np.testing.assert_allclose(np.diff(fall, axis=0)[:, 1] / group.attrs["dt"], -9.81, atol=0.01)
