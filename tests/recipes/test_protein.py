"""recipes/protein: what stands in its files, what it does when interrupted, and what it says when it cannot."""

from __future__ import annotations

import errno
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple
from urllib.error import URLError

import numpy as np
import pytest

from dist_egnn.data import prepare as preparation
from dist_egnn.data.graphs import radius_edges
from dist_egnn.data.samples import SampleSpec, Snapshot, read_sample, select_snapshots
from dist_egnn.data.trajectories import Trajectories, Writer
from dist_egnn.utils import filesystem

RECIPE = Path(__file__).parents[2] / "recipes" / "protein"
for package in ("MDAnalysis", "MDAnalysisData", "MDAnalysisTests"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed (extra 'protein')", allow_module_level=True)
SIDE = 20.0


class Ran(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def prepare() -> ModuleType:
    spec = importlib.util.spec_from_file_location("protein_prepare", RECIPE / "prepare.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def call(prepare, capsys) -> Callable[..., Ran]:
    """call("--out", path, …): the command in this process."""

    def run(*arguments: object) -> Ran:
        capsys.readouterr()
        code = preparation.main(prepare.run, [str(a) for a in arguments])
        return Ran(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """As a user makes it: a process of its own."""
    out = tmp_path_factory.mktemp("protein") / "tiny.h5"
    command = [sys.executable, str(RECIPE / "prepare.py"), "--scale", "tiny", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "40 frames, 855 of 3,341 atoms; inputs: train 15, valid 5, test 5" in done.stdout
    return out


def md(folder: Path, frames: np.ndarray, boxes: np.ndarray | None = None) -> tuple[str, ...]:
    """A PDB and a DCD of alanines (N, CA, C, O; no charges) at frames (T, 4M, 3), as options."""
    import MDAnalysis

    n = frames.shape[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        u = MDAnalysis.Universe.empty(n, n // 4, atom_resindex=np.arange(n) // 4, trajectory=True)
        for name, value in (("names", ["N", "CA", "C", "O"] * (n // 4)), ("resnames", ["ALA"] * (n // 4))):
            u.add_TopologyAttr(name, value)
        u.add_TopologyAttr("resids", np.arange(n // 4) + 1)
        u.atoms.write(folder / "few.pdb")
        with MDAnalysis.Writer(str(folder / "few.dcd"), n) as out:
            for k, frame in enumerate(frames):
                u.atoms.positions = frame
                u.trajectory.ts.dimensions = None if boxes is None else boxes[k]
                out.write(u.atoms)
    return "--topology", str(folder / "few.pdb"), "--trajectory", str(folder / "few.dcd")


def walk(frames: int, nodes: int = 40) -> np.ndarray:
    """Nodes of a box of SIDE that drift about an Å a frame, wherever that leads: (frames, nodes, 3)."""
    draw = np.random.default_rng(0)
    drift = draw.normal(size=(nodes, 3))
    return draw.uniform(0, SIDE, (nodes, 3)) + drift * np.arange(frames)[:, None, None]


def boxes(frames: int, *box: float) -> np.ndarray:
    return np.tile(np.array(box or (SIDE, SIDE, SIDE, 90, 90, 90), np.float32), (frames, 1))


def samples(path: Path, horizon: int = 15) -> Counter:
    return Counter(s.split for s in select_snapshots(Trajectories(path), horizon, 0, 0, -1, 0))


def test_the_file_holds_what_mdanalysis_reads(tiny):
    import MDAnalysis
    from MDAnalysisTests.datafiles import DCD, PSF

    warnings.filterwarnings("ignore", module="MDAnalysis")  # plans of its own for version 3
    atoms = MDAnalysis.Universe(PSF, DCD).select_atoms("backbone")
    frames = np.stack([atoms.positions for _ in atoms.universe.trajectory[:40]])
    data = Trajectories(tiny)
    assert [(t.split, t.frames, t.nodes, t.periodic, t.velocity) for t in data] == [
        ("train", 30, 855, False, False),
        ("valid", 20, 855, False, False),
        ("test", 20, 855, False, False),
    ]
    for k, first in enumerate((0, 15, 20)):
        for t in range(data[k].frames):
            np.testing.assert_array_equal(data.position(k, t), frames[first + t])
        np.testing.assert_array_equal(data.attribute(k, "charge"), atoms.charges.astype(np.float32))
        assert data[k].dt == pytest.approx(1.0)  # ps
    np.testing.assert_array_equal(data.velocity(0, 3), frames[4] - frames[3])
    assert data.attribute(0, "charge").any()
    assert samples(tiny) == {"train": 15, "valid": 5, "test": 5}
    assert 5e4 < len(radius_edges(data.position(0, 0), 10.0)[0]) < 6e4  # the benchmark's mean is 55,107


def test_the_config_trains(tiny, tmp_path):
    command = [sys.executable, "-m", "dist_egnn.cli", "train", str(RECIPE / "config.yaml"), f"data.path={tiny}"]
    small = ["train.epochs=2", "model.hidden=4", "model.layers=1", f"run.dir={tmp_path / 'run'}"]
    done = subprocess.run([*command, *small], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "run" / "metrics.csv").read_text().splitlines()) == 3
    assert (tmp_path / "run" / "best.pt").is_file()


def test_run_py_ends_with_a_table(tiny, check_run_py):
    check_run_py(RECIPE, f"data.path={tiny}")


def test_a_full_disk_is_one_line_and_the_rest_can_follow(tiny, tmp_path, call, monkeypatch):
    """The second of three pieces meets it. Whole pieces stay, and the file is the same in the end, byte for byte."""
    out = tmp_path / "again.h5"
    add = Writer.add

    def full(self, position, **given):
        if given["split"] == "valid":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        add(self, position, **given)

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "add", full)
        ran = call("--scale", "tiny", "--out", out, "--workers", 1)
    assert (ran.code, ran.err.count("\n")) == (2, 1)
    assert f"error: {out}: No space left on device, " in ran.err
    assert " MB are free; correct that, then run the same command again" in ran.err
    assert not out.exists()
    assert {f.name for f in (tmp_path / "again.h5.parts").glob("*.h5*")} <= {"000000.h5", "000002.h5"}
    assert call("--scale", "tiny", "--out", out, "--workers", 3, "--seed", 5).code == 0
    assert out.read_bytes() == tiny.read_bytes()
    assert not (tmp_path / "again.h5.parts").exists()


def test_too_little_room_is_told_before(tmp_path, call, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    ran = call("--scale", "tiny", "--out", tmp_path / "x.h5")
    assert (ran.code, ran.err) == (
        2,
        f"error: {tmp_path / 'x.h5'}: disk full: needs 1.44 MB or more, 0.00 MB are free; "
        "free disk space or choose another path\n",
    )
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def remote(tmp_path, monkeypatch) -> Callable[[str], None]:
    """The benchmark's server, here: 4,187 frames of 8 atoms. remote("off" | "cut" | "on")."""
    from MDAnalysisData import adk_equilibrium, base

    (tmp_path / "server").mkdir()
    *_, trajectory = md(tmp_path / "server", walk(4187, 8))
    files = {"topology": tmp_path / "server" / "few.pdb", "trajectory": Path(trajectory)}
    archive = {
        key: base.RemoteFileMetadata(file.name, str(file), filesystem.sha256(file)) for key, file in files.items()
    }
    monkeypatch.setattr(adk_equilibrium, "ARCHIVE", archive)
    monkeypatch.setenv("MDANALYSIS_DATA", str(tmp_path / "home"))

    def switch(state: str) -> None:
        def retrieve(url, filename, **_):
            content = Path(url).read_bytes()
            if state == "off":
                raise URLError("no route to host")
            Path(filename).write_bytes(content if state == "on" else content[: len(content) // 2])
            if state == "cut":
                raise URLError("connection reset")

        monkeypatch.setattr(base, "urlretrieve", retrieve)

    return switch


def test_the_benchmark_has_its_published_splits(tmp_path, call, remote):
    """Without a network, and after a download that was cut short (which the library alone would take for whole)."""
    out = tmp_path / "full.h5"
    for state, cause in (("off", "no route to host"), ("cut", "connection reset")):
        remote(state)
        ran = call("--scale", "full", "--out", out)
        assert ran.code == 2
        last = ran.err.splitlines()[-1]
        assert last.startswith(f"error: AdK equilibrium cannot be fetched into {tmp_path / 'home' / 'adk_equilibrium'}")
        assert cause in last
        assert "--source adk-dims needs neither" in last
        assert not list(tmp_path.glob("full.h5*"))
    remote("on")
    ran = call("--scale", "full", "--out", out)
    assert ran.code == 0
    assert "few.pdb: not whole; fetching it again" in ran.err
    assert "no charges in this topology; the attribute 'charge' is 0 for every atom" in ran.out
    assert samples(out) == {"train": 2481, "valid": 827, "test": 863}
    data = Trajectories(out)
    for k, first in enumerate((0, 2481, 3308)):
        np.testing.assert_allclose(data.position(k, 0), walk(4187, 8)[first], rtol=1e-6, atol=1e-5)
    assert not data.attribute(0, "charge").any()
    ran = call("--scale", "full", "--out", tmp_path / "far.h5", "--horizon", 17)
    assert (ran.code, "4187 frames, too few for the published splits" in ran.err) == (2, True)


def test_a_periodic_box_is_kept_and_its_boundary_told_of(tmp_path, call):
    """The file holds atoms that jump to the other side; ours go on, so that forward differences are velocities."""
    true = walk(30)
    options = md(tmp_path, np.mod(true, SIDE), boxes(30))
    assert (np.abs(np.diff(np.mod(true, SIDE), axis=0)) > SIDE / 2).any()
    out = tmp_path / "box.h5"
    ran = call("--out", out, *options, "--horizon", 3, "--splits", 1, 1, 1)
    assert ran.code == 0
    data = Trajectories(out)
    assert samples(out, 3) == {"train": 9, "valid": 9, "test": 9}
    for k, first in enumerate((0, 9, 18)):
        assert data[k].periodic
        np.testing.assert_array_equal(data.box(k), [[0] * 3, [SIDE] * 3])
        moved = true[first : first + 12] - (true[first] - np.mod(true[first], SIDE))
        for t in range(12):
            np.testing.assert_allclose(data.position(k, t), moved[t], atol=1e-4)
    x = np.mod(true[0], SIDE)
    d = np.abs(x[:, None] - x[None])
    plain, image = (((np.linalg.norm(v, axis=2) <= 9.8).sum() - 40) for v in (d, np.minimum(d, SIDE - d)))
    assert 0 < plain < image
    assert f"{image - plain:,} of {image:,} pairs within 9.8 Å in frame 0 are neighbours across it" in ran.out
    spec = SampleSpec(9.8, 3, (), periodic=True)
    assert read_sample(data, Snapshot("train", 0, 0), spec).num_edges() == image
    assert call("--out", tmp_path / "open.h5", *options, "--horizon", 3, "--no-box").code == 0
    left = Trajectories(tmp_path / "open.h5")
    assert (left[0].periodic, left.box(0)) == (False, None)
    np.testing.assert_allclose(left.position(0, 11), np.mod(true[11], SIDE), atol=1e-4)


def test_boxes_that_the_format_cannot_hold(tmp_path, call):
    growing = boxes(30)
    growing[:, 1] *= np.linspace(1, 1.002, 30)
    vanishing = boxes(30)
    vanishing[20:] = 0
    cases = {
        r"frame 1\d: its box is 20 x 20.02\d* x 20, that of frame 0 is 20 x 20 x 20": growing,
        r"frame 20: its box is none, that of frame 0 is 20 x 20 x 20": vanishing,
        r"frame 0: its box has angles 90, 90, 60, and only orthorhombic": boxes(30, SIDE, SIDE, SIDE, 90, 90, 60),
    }
    for says, box in cases.items():
        options = md(tmp_path, walk(30), box)
        # one worker: another, which begins further on, may come first to its own first frame of the kind
        ran = call("--out", tmp_path / "x.h5", *options, "--horizon", 3, "--workers", 1)
        assert (ran.code, ran.err.count("error: "), ran.err.count("Traceback")) == (2, 1, 0)
        assert re.search(rf"few\.dcd: {says}.*--no-box leaves it out$", ran.err), ran.err
        assert not (tmp_path / "x.h5").exists()
        shutil.rmtree(tmp_path / "x.h5.parts", ignore_errors=True)


def test_mistakes_are_one_line(tmp_path, call):
    options = md(tmp_path, walk(30))
    (tmp_path / "other").mkdir()
    *_, other = md(tmp_path / "other", walk(30, 48))
    (tmp_path / "burst").mkdir()
    burst = walk(30)
    burst[17, 3, 1] = np.nan
    (tmp_path / "text.psf").write_text("no topology\n")
    atom = "C 0.0 0.0 0.0\n"
    (tmp_path / "jump.xyz").write_text("".join(f"{n}\n\n{atom * n}" for n in (4,) * 12 + (3,) + (4,) * 17))
    jump, own = ("--topology", tmp_path / "jump.xyz"), options[:2]
    mistakes: dict[tuple, str] = {
        ("--topology", "absent.psf"): "absent.psf: no such file",
        (*own, "--trajectory", "absent.dcd"): "absent.dcd: no such file",
        ("--trajectory", "absent.dcd"): "--trajectory: also needs --topology",
        (*own, "--source", "adk-dims"): "--source and --topology: name one of them",
        ("--topology", tmp_path / "text.psf"): "text.psf: MDAnalysis cannot read this as one system: ",
        (*own, "--trajectory", other): "MDAnalysis cannot read this as one system: ",
        (*options, "--select", "resname HOH"): "--select 'resname HOH': no atom of",
        (*options, "--select", "name CA and"): "--select 'name CA and': ",
        (*jump, "--select", "charge < 0"): "jump.xyz cannot answer it: ",
        (
            *jump,
            "--select",
            "all",
            "--horizon",
            3,
        ): " cannot be read (",  # the frame depends on which split is read first
        (*options, "--horizon", 28): "30 frames leave no input for some split when targets are 28 frames ahead",
        (*options, "--horizon", 40): "30 frames leave no input for some split when targets are 40 frames ahead",
        (*options, "--horizon", 0): "--horizon 0: must be at least 1",
        (*options, "--splits", 1, 0, 1): "--splits 1 0 1: three shares above 0",
        (*options, "--splits", 1, 1): "expected 3 arguments; see --help",
        md(tmp_path / "burst", burst): "few.dcd: frame 17: a position is NaN or infinite",
        ("--source", "adk"): "invalid choice: 'adk'",
    }
    for given, says in mistakes.items():
        ran = call("--out", tmp_path / "x.h5", *given)
        # before it, a slow machine may have shown progress
        assert (ran.code, ran.err.count("error: "), ran.err.count("Traceback")) == (2, 1, 0), (given, ran.err)
        assert ran.err.splitlines()[-1].startswith("error: ")
        assert says in ran.err, (given, ran.err)
        assert not (tmp_path / "x.h5").exists()
        shutil.rmtree(tmp_path / "x.h5.parts", ignore_errors=True)


def test_a_missing_library_names_the_extra(tmp_path, call, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    ran = call("--out", tmp_path / "x.h5")
    assert (ran.code, ran.err.count("\n")) == (2, 1)
    assert "MDAnalysis is not installed; make setup" in ran.err
