"""recipes/protein: the content of its files, interruptions and error messages."""

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
import recipe_modules

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


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def prepare() -> ModuleType:
    return recipe_modules.load("protein", "prepare", "protein_prepare")


@pytest.fixture
def call(prepare, capsys) -> Callable[..., Result]:
    """call("--out", path, …): the command in this process."""

    def run(*arguments: object) -> Result:
        capsys.readouterr()
        code = preparation.main(prepare.run, [str(a) for a in arguments])
        return Result(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """The tiny file, prepared in a process."""
    out = tmp_path_factory.mktemp("protein") / "tiny.h5"
    command = [sys.executable, str(RECIPE / "prepare.py"), "--scale", "tiny", "--out", str(out)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert (process.returncode, process.stderr) == (0, "")
    assert "40 frames, 855 of 3,341 atoms; inputs: train 15, valid 5, test 5" in process.stdout
    return out


def md(folder: Path, frames: np.ndarray, boxes: np.ndarray | None = None) -> tuple[str, ...]:
    """A PDB and a DCD of alanines (N, CA, C, O; no charges) at frames (T, 4M, 3), as options."""
    import MDAnalysis

    folder.mkdir(exist_ok=True)
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
    """Nodes that start in a box of SIDE and drift about 1 Å per frame: (frames, nodes, 3)."""
    draw = np.random.default_rng(0)
    drift = draw.normal(size=(nodes, 3))
    return draw.uniform(0, SIDE, (nodes, 3)) + drift * np.arange(frames)[:, None, None]


def boxes(frames: int, *box: float) -> np.ndarray:
    return np.tile(np.array(box or (SIDE, SIDE, SIDE, 90, 90, 90), np.float32), (frames, 1))


def samples(path: Path, horizon: int = 15) -> Counter:
    return Counter(s.split for s in select_snapshots(Trajectories(path), horizon, 0, 0, -1, 0, difference="forward"))


def test_the_file_equals_what_mdanalysis_reads(tiny):
    import MDAnalysis
    from MDAnalysisTests.datafiles import DCD, PSF

    warnings.filterwarnings("ignore", module="MDAnalysis")  # deprecations for version 3
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
    np.testing.assert_array_equal(data.velocity(0, 3, "forward"), frames[4] - frames[3])
    assert data.attribute(0, "charge").any()
    assert samples(tiny) == {"train": 15, "valid": 5, "test": 5}
    assert 5e4 < len(radius_edges(data.position(0, 0), 10.0)[0]) < 6e4  # the benchmark's mean is 55,107


def test_run_py_prints_a_table(tiny, check_run_py):
    check_run_py(RECIPE, f"data.path={tiny}")


def test_a_full_disk_is_one_line_and_the_command_continues(tiny, tmp_path, call, monkeypatch):
    """At the second of three parts. Complete parts stay, and the final file has the same bytes."""
    out = tmp_path / "again.h5"
    add = Writer.add

    def full(self, position, **arguments):
        if arguments["split"] == "valid":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        add(self, position, **arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "add", full)
        result = call("--scale", "tiny", "--out", out, "--workers", 1)
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert f"error: {out}: No space left on device, " in result.err
    assert "run the same command again" in result.err
    assert not out.exists()
    assert {f.name for f in (tmp_path / "again.h5.parts").glob("*.h5*")} <= {"000000.h5", "000002.h5"}
    assert call("--scale", "tiny", "--out", out, "--workers", 3, "--seed", 5).code == 0
    assert out.read_bytes() == tiny.read_bytes()
    assert not (tmp_path / "again.h5.parts").exists()


def test_too_little_disk_space_fails_before_any_work(tmp_path, call, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    result = call("--scale", "tiny", "--out", tmp_path / "x.h5")
    assert result.code == 2
    assert result.err.startswith(f"error: {tmp_path / 'x.h5'}: disk full: needs 1.44 MB or more")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def remote(tmp_path, monkeypatch) -> Callable[[str], None]:
    """A local substitute for the benchmark's server: 4,187 frames of 8 atoms. remote("off" | "cut" | "on")."""
    from MDAnalysisData import adk_equilibrium, base

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
    """Also after failed and interrupted downloads; the library itself would accept an incomplete file."""
    out = tmp_path / "full.h5"
    for state, cause in (("off", "no route to host"), ("cut", "connection reset")):
        remote(state)
        result = call("--scale", "full", "--out", out)
        assert result.code == 2
        last = result.err.splitlines()[-1]
        assert last.startswith(f"error: AdK equilibrium cannot be fetched into {tmp_path / 'home' / 'adk_equilibrium'}")
        assert cause in last
        assert "--source adk-dims" in last
        assert not list(tmp_path.glob("full.h5*"))
    remote("on")
    result = call("--scale", "full", "--out", out)
    assert result.code == 0
    assert "few.pdb: incomplete; fetching it again" in result.err
    assert "no charges in this topology; the attribute 'charge' is 0 for every atom" in result.out
    assert samples(out) == {"train": 2481, "valid": 827, "test": 863}
    data = Trajectories(out)
    for k, first in enumerate((0, 2481, 3308)):
        np.testing.assert_allclose(data.position(k, 0), walk(4187, 8)[first], rtol=1e-6, atol=1e-5)
    assert not data.attribute(0, "charge").any()
    result = call("--scale", "full", "--out", tmp_path / "far.h5", "--horizon", 17)
    assert (result.code, "4187 frames, too few for the published splits" in result.err) == (2, True)


def test_a_periodic_box_is_kept_and_its_pairs_counted(tmp_path, call):
    """Atoms that jump to the other side in the input are unwrapped, so that forward differences are velocities."""
    true = walk(30)
    options = md(tmp_path, np.mod(true, SIDE), boxes(30))
    assert (np.abs(np.diff(np.mod(true, SIDE), axis=0)) > SIDE / 2).any()
    out = tmp_path / "box.h5"
    result = call("--out", out, *options, "--horizon", 3, "--splits", 1, 1, 1)
    assert result.code == 0
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
    assert (
        f"{image - plain:,} of {image:,} pairs within 9.8 Å in frame 0 are neighbours across its boundary" in result.out
    )
    spec = SampleSpec(9.8, 3, (), periodic=True, velocity="forward")
    assert read_sample(data, Snapshot("train", 0, 0), spec).num_edges() == image
    assert call("--out", tmp_path / "open.h5", *options, "--horizon", 3, "--no-box").code == 0
    left = Trajectories(tmp_path / "open.h5")
    assert (left[0].periodic, left.box(0)) == (False, None)
    np.testing.assert_allclose(left.position(0, 11), np.mod(true[11], SIDE), atol=1e-4)


def test_invalid_input_gives_one_line(tmp_path, call):
    options = md(tmp_path, walk(30))
    *_, other = md(tmp_path / "other", walk(30, 48))
    burst = walk(30)
    burst[17, 3, 1] = np.nan
    growing, vanishing, skew = boxes(30), boxes(30), boxes(30, SIDE, SIDE, SIDE, 90, 90, 60)
    growing[:, 1] *= np.linspace(1, 1.002, 30)
    vanishing[20:] = 0
    one = ("--horizon", 3, "--workers", 1)  # one worker, so that the first such frame is reported
    (tmp_path / "text.psf").write_text("no topology\n")
    atom = "C 0.0 0.0 0.0\n"
    (tmp_path / "jump.xyz").write_text("".join(f"{n}\n\n{atom * n}" for n in (4,) * 12 + (3,) + (4,) * 17))
    jump, own = ("--topology", tmp_path / "jump.xyz"), options[:2]
    mistakes: dict[tuple, str] = {
        ("--topology", "absent.psf"): r"absent\.psf: no such file",
        (*own, "--trajectory", "absent.dcd"): r"absent\.dcd: no such file",
        ("--trajectory", "absent.dcd"): "--trajectory: also needs --topology",
        (*own, "--source", "adk-dims"): "--source and --topology: give only one of them",
        ("--topology", tmp_path / "text.psf"): r"text\.psf: MDAnalysis cannot read this as one system: ",
        (*own, "--trajectory", other): "MDAnalysis cannot read this as one system: ",
        (*options, "--select", "resname HOH"): "--select 'resname HOH': no atom of",
        (*options, "--select", "name CA and"): "--select 'name CA and': ",
        (*jump, "--select", "charge < 0"): "cannot be applied to ",
        (*jump, "--select", "all", "--horizon", 3): r" cannot be read \(",  # which frame depends on the workers
        (*options, "--horizon", 28): "30 frames leave a split without inputs if targets are 28 frames ahead",
        (*options, "--horizon", 40): "30 frames leave a split without inputs if targets are 40 frames ahead",
        (*options, "--horizon", 0): "--horizon 0: must be at least 1",
        (*options, "--splits", 1, 0, 1): "--splits 1 0 1: three numbers above 0",
        (*options, "--splits", 1, 1): "expected 3 arguments; see --help",
        md(tmp_path / "burst", burst): r"few\.dcd: frame 17: a position is NaN or infinite",
        (*md(tmp_path / "growing", walk(30), growing), *one): r"few\.dcd: frame 1\d: its box is 20 x 20\.02\d* x 20, .*"
        r" 20 x 20 x 20.*--no-box$",
        (*md(tmp_path / "vanishing", walk(30), vanishing), *one): r"few\.dcd: frame 20: its box is none, .*--no-box$",
        (*md(tmp_path / "skew", walk(30), skew), *one): r"few\.dcd: frame 0: .* angles 90, 90, 60, .*--no-box$",
        ("--source", "adk"): "invalid choice: 'adk'",
    }
    for arguments, message in mistakes.items():
        code, _, err = call("--out", tmp_path / "x.h5", *arguments)
        # a slow machine may have printed progress first
        assert (code, err.count("error: "), err.count("Traceback")) == (2, 1, 0), (arguments, err)
        last = err.splitlines()[-1]
        assert last.startswith("error: ")
        assert re.search(message, last), (arguments, err)
        assert not (tmp_path / "x.h5").exists()
        shutil.rmtree(tmp_path / "x.h5.parts", ignore_errors=True)


def test_a_missing_library_names_the_extra(tmp_path, call, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = call("--out", tmp_path / "x.h5")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "MDAnalysis is not installed; run make setup" in result.err
