"""recipes/fluid113k: initial scenes, and engines that fail or are killed."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from fluid113k import RADIUS, RECIPE, physics, prepare, run
from fluid113k import engine as simulation
from processes import GUARD_S, has_ended, kill, wait_until


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
open(folder + "/whole", "w").close()
"""
FIRST_DONE = "while not os.path.exists(os.path.dirname(folder) + '/000000.h5'): time.sleep(0.02)"


@pytest.fixture
def engine(tmp_path, monkeypatch):
    """engine(lines): replace the engine by a program with these lines, in which nothing moves."""
    (tmp_path / "fake").mkdir()
    monkeypatch.setattr(prepare, "__file__", str(tmp_path / "fake" / "prepare.py"))
    monkeypatch.setattr(prepare.importlib.util, "find_spec", lambda name: name)
    version = prepare.importlib.metadata.version
    monkeypatch.setattr(
        prepare.importlib.metadata, "version", lambda name: "0.0" if name == "pysplishsplash" else version(name)
    )
    return lambda lines="": (tmp_path / "fake" / "engine.py").write_text(STILL.format(lines))


SMALL = ("--particles", 1000, "--trajectories", 2, 1, 1, "--frames", 16)


def test_simulated_trajectories_equal_their_records(tmp_path, engine):
    engine()
    assert run("--out", tmp_path / "a.h5", *SMALL, "--quantum", 0.001, "--records", tmp_path / "records") == 0
    assert run("--from-records", tmp_path / "records", "--out", tmp_path / "b.h5") == 0
    with h5py.File(tmp_path / "a.h5") as a, h5py.File(tmp_path / "b.h5") as b:
        assert [g.attrs["split"] for g in a["trajectories"].values()] == ["train", "train", "valid", "test"]
        for name, group in a["trajectories"].items():
            other = b["trajectories"][name]
            for key in ("position", "velocity", "attributes/mass", "attributes/viscosity", "box"):
                np.testing.assert_array_equal(group[key], other[key], err_msg=key)
            for key in set(group.attrs) - {"source"}:
                np.testing.assert_array_equal(group.attrs[key], other.attrs[key], err_msg=key)
            np.testing.assert_allclose(group["position"][0], prepare.draw(0, int(name), 1000).position, atol=6e-4)


def test_a_failed_engine_ends_the_others_and_keeps_finished_work(tmp_path, engine, capsys):
    engine(f"if k == 3:\n  {FIRST_DONE}\n  sys.exit('no more memory')\nif k in (1, 2): time.sleep(3600)")
    assert run("--out", tmp_path / "b.h5", *SMALL, "--workers", 4) == 2
    assert capsys.readouterr().err == "error: trajectory 3: no more memory\n"
    assert [p.name for p in (tmp_path / "b.h5.parts").glob("*.h5")] == ["000000.h5"]
    engine()
    assert run("--out", tmp_path / "b.h5", *SMALL, "--workers", 2) == 0
    assert run("--out", tmp_path / "a.h5", *SMALL, "--workers", 1) == 0
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith("b.h5")) == ["b.h5", "b.h5.manifest.json"]


def test_progress_counts_frames(tmp_path, engine, monkeypatch):
    """During a simulation, over all trajectories, including those of an earlier run."""
    engine(f"if k > 0:\n  {FIRST_DONE}\n  sys.exit('no more memory')")
    options = ("--out", tmp_path / "x.h5", *SMALL, "--workers", 1)
    assert run(*options) == 2
    go, events = tmp_path / "go", []

    @contextlib.contextmanager
    def progress_bar(title, total, initial=0):
        def tick(note="", completed=None):
            events.append((title, total, initial, completed, note))
            if completed == 16 + 5:
                go.touch()

        yield tick

    monkeypatch.setattr(prepare.preparation.progress, "progress_bar", progress_bar)
    monkeypatch.setattr(prepare.preparation, "POLL_S", 0.02)
    engine(f"""if k == 1:
  open(folder + "/frames", "w").write("5")
  ends = time.monotonic() + 600
  while not os.path.exists({str(go)!r}):
    if time.monotonic() > ends: sys.exit("the frames were not counted")
    time.sleep(0.02)""")
    assert run(*options) == 0
    simulating = [(total, done, to, note) for title, total, done, to, note in events if title == "x.h5 (frames)"]
    assert {(total, done) for total, done, *_ in simulating} == {(64, 16)}
    reached = [to for *_, to, _ in simulating]
    assert reached == sorted(reached)
    assert {21, 32, 48, 64} <= set(reached)
    assert simulating[-1][3] == "trajectory 3"
    assert [to for title, _, _, to, _ in events if title == "x.h5 (joining)"] == [None] * 4


def test_no_simulation_starts_without_room_for_its_frames(tmp_path, engine, monkeypatch, capsys):
    engine("sys.exit('was started')")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 10**5, 10**5))
    assert run("--out", tmp_path / "x.h5", *SMALL, "--workers", 1) == 2
    (line,) = capsys.readouterr().err.splitlines()
    numbers = 16 * prepare.draw(0, 0, 1000).position.size  # of positions; as many velocities; both again in the part
    says = f"needs {4 * 4 * numbers / 1e6:.2f} MB or more, 0.10 MB are free"
    folder = re.escape(str(tmp_path / "x.h5.parts"))  # the trajectory that fails first is not fixed
    assert re.match(rf"error: {folder}/00000\d\.engine: disk full: {re.escape(says)}", line), line


LEGS = """
def leg(end):
    open(folder + '/calls', 'a').write(f"{job['leg']} ")
    if not os.path.exists(folder + '/state.npz'):
        open(folder + '/frames', 'w').write('8')
        np.savez(folder + '/state.npz', done=8)
        sys.exit(0)
    if end:
        sys.exit(end)
"""


def test_finished_legs_are_kept_when_one_fails(tmp_path, engine, capsys, monkeypatch):
    monkeypatch.setattr(prepare, "LARGE", 500)
    monkeypatch.setattr(prepare, "LEG", 8)
    one = ("--out", tmp_path / "b.h5", "--particles", 1000, "--trajectories", 1, 0, 0, "--frames", 16)
    engine(LEGS + "leg('no more memory')")
    assert run(*one) == 2
    assert "no more memory" in capsys.readouterr().err
    calls = tmp_path / "b.h5.parts" / "000000.engine" / "calls"
    assert calls.read_text() == "8 8 "
    calls.with_name("frames").write_text("16")  # left by a leg that was killed at its end
    engine(LEGS + "leg(0)\nassert [open(folder + name).read() for name in ('/calls', '/frames')] == ['8 8 8 ', '8']")
    assert run(*one) == 0
    assert not (tmp_path / "b.h5.parts").exists()


@pytest.mark.parametrize(
    ("lines", "options", "message"),
    [
        ("assert os.environ['OMP_NUM_THREADS'] == '1'", (), ""),
        ("assert os.environ['OMP_NUM_THREADS'] == '3'", ("--threads", 3), ""),
        ("sys.exit(0)", (), "error: .*without a new frame, after 0 of 16"),
        (
            "if k == 1: job['position'][5, 1] = -0.01",
            (),
            "error: trajectory 1: particle 5 is outside the box at frame 0",
        ),
        (
            "if k == 1: job['position'] = job['position'] * 0.9 + job['box'][1] * 0.1",
            (),
            "warning: trajectory 1: density 13",
        ),
    ],
    ids=["one thread", "threads", "no frame", "outside", "density"],
)
def test_messages_of_a_simulation(tmp_path, engine, capsys, lines, options, message):
    engine(lines)
    code = 2 if message.startswith("error") else 0
    assert run("--out", tmp_path / "x.h5", *SMALL, *options) == code
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == (1 if message else 0)
    assert re.match(message, "".join(errors))


WITH_FAKE = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import prepare
prepare.__file__ = sys.argv.pop(1)
prepare.importlib.util.find_spec = lambda name: name
prepare.importlib.metadata.version = lambda name: "0.0"
sys.exit(prepare.preparation.main(prepare.run))
"""
# the first engine goes on for half a second after prepare.py was killed; others must not begin before it has ended
OUTLIVES = """
above = os.path.dirname(os.path.dirname(folder))
if os.path.exists(above + "/started"):
    if not os.path.exists(above + "/ended"): sys.exit("the engine of the killed run is still running")
else:
    parent = os.getppid()
    open(above + "/started", "w").close()
    while os.getppid() == parent: time.sleep(0.01)
    time.sleep(0.5)
    open(folder + "/frames.new", "w").close()
    open(above + "/ended", "w").close()
    sys.exit(1)
"""


def test_a_rerun_waits_for_the_engine_of_a_killed_run(tmp_path, engine):
    engine(OUTLIVES)
    words = map(str, (RECIPE, prepare.__file__, "--out", tmp_path / "x.h5", *SMALL, "--workers", 1))
    command = [sys.executable, "-c", WITH_FAKE, *words]
    process = subprocess.Popen(command)
    wait_until((tmp_path / "started").exists, "the engine", process)
    assert kill(process) == -signal.SIGKILL
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "ended").exists()


def test_missing_records_of_an_interrupted_run(tmp_path, engine, capsys):
    engine(f"if k > 0:\n  {FIRST_DONE}\n  sys.exit('killed')")
    options = ("--out", tmp_path / "x.h5", *SMALL)
    assert run(*options, "--records", tmp_path / "one") == 2
    engine()
    assert run(*options, "--records", tmp_path / "two") == 2
    first = tmp_path / "two" / "sim_0001_00.msgpack.zst"
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {first}: missing")


def test_a_missing_engine_names_the_command_to_install(tmp_path, monkeypatch, capsys):
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


IN_LEGS = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import prepare
prepare.LARGE, prepare.LEG = 500, 7
sys.exit(prepare.preparation.main(prepare.run))
"""


@needs_engine
@pytest.mark.parametrize("legs", [False, True])
def test_killed_and_resumed_gives_the_same_bytes(tmp_path, legs):
    """Killed when a first trajectory, or a first leg of the only one, is complete."""
    first, second = tmp_path / "a.h5", tmp_path / "b.h5"
    words = ["--particles", "1000", "--trajectories", "1", "0", "0", "--frames", "25", "--out"]
    in_legs = [sys.executable, "-c", IN_LEGS, str(RECIPE), *words]

    def words_for(out: Path, workers: str) -> list[str]:
        return [*in_legs, str(out)] if legs else [*command(out), "--workers", workers]

    subprocess.run(words_for(first, "2"), check=True)
    process = subprocess.Popen(words_for(second, "1"))
    done = tmp_path / "b.h5.parts" / ("000000.engine/state.npz" if legs else "000000.h5")
    wait_until(done.exists, "the first part", process)
    kill(process)
    assert not second.exists()
    subprocess.run(words_for(second, "2"), check=True)
    assert first.read_bytes() == second.read_bytes()


@needs_engine
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_no_engine_outlives_prepare(tmp_path, sent, code):
    """Also if only prepare.py receives the signal."""
    process = subprocess.Popen([*command(tmp_path / "x.h5"), "--workers", "1", "--frames", "4000"])
    wait_until((tmp_path / "x.h5.parts" / "000000.engine" / "log").exists, "the engine", process)  # which makes it
    tasks = Path(f"/proc/{process.pid}/task").iterdir()
    (child,) = {int(c) for task in tasks for c in (task / "children").read_text().split()}
    process.send_signal(sent)
    assert process.wait(GUARD_S) == code
    wait_until(lambda: has_ended(child), "the end of the engine")


@pytest.mark.parametrize(("earlier", "remaining"), [((), 3.98), ((3.6, 0.002), 0.38)])
def test_a_leg_ends_when_the_trajectory_does(tmp_path, earlier, remaining):
    """The engine counts time from the start of the leg."""
    scene = prepare.draw(0, 0, 1000)
    job = {"position": scene.position, "velocity": scene.velocity, "box": scene.box, "gravity": np.array([0, -9.81, 0])}
    simulation.write_scene(tmp_path, job | {"radius": RADIUS, "frames": 200, "dt": 0.02}, *earlier)
    configuration = json.loads((tmp_path / "scene.json").read_text())["Configuration"]
    assert remaining < configuration["stopAt"] < remaining + 0.001
    assert configuration["timeStepSize"] == (earlier[1] if earlier else 0.005)


@needs_engine
def test_the_simulated_fluid_is_physical(tmp_path):
    out = tmp_path / "x.h5"
    subprocess.run([*command(out), "--workers", "2"], check=True)
    with h5py.File(out) as file:
        for group in file["trajectories"].values():
            keys = ("position", "velocity", "attributes/mass", "box")
            position, velocity, mass, box = (group[key][()] for key in keys)
            assert physics.first_outside(position, box) is None
            assert physics.trajectory_violations(position, velocity, mass, box, RADIUS) == []
            assert physics.inner_density(position[-1], mass, box, RADIUS) == pytest.approx(1000, rel=0.05)
            fall = np.diff(position[:4], axis=0).mean(1) / group.attrs["dt"]
            np.testing.assert_allclose(np.diff(fall, axis=0)[:, 1] / group.attrs["dt"], -9.81, atol=0.01)
