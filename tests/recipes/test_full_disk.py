"""A full disk gives one line and exit code 2; complete files stay, and the same command continues."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import recipe_modules
from gns_files import METADATA, command, moving_positions

from dist_egnn.data.store import Store
from dist_egnn.data.trajectories import Trajectories, Writer
from dist_egnn.errors import Failure
from dist_egnn.utils import filesystem

RECIPES = Path(__file__).parents[2] / "recipes"
SWEEP = """
import sys
from pathlib import Path
import numpy as np
from dist_egnn.errors import Failure
from dist_egnn.data.trajectories import Writer

folder = Path(sys.argv[1])
draw = np.random.default_rng(0)
for free in range(0, 640_000, 32_000):
    (folder / "filler").write_bytes(bytes(4_194_304 - free))
    try:
        with Writer(folder / "x.h5", {"what": "x" * 5000}) as out:
            for _ in range(3):
                out.add(draw.normal(size=(8, 2000, 3)), split="train", dt=1.0, source="x", box=np.outer([-9, 9], np.ones(3)))
        print("whole")
    except Failure as failure:
        print(failure)
    (folder / "x.h5").unlink(missing_ok=True)
    assert [path.name for path in folder.iterdir()] == ["filler"]
"""


def test_writer_on_a_full_disk(small_disk):
    """Full at any point, also when the file is closed. In a process, because HDF5 by itself could crash it."""
    result = subprocess.run([sys.executable, "-c", SWEEP, str(small_disk)], capture_output=True, text=True, timeout=600)
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert set(lines[-2:]) == {"whole"}
    failures = [line for line in lines if line != "whole"]
    assert len(failures) > 10
    for line in failures:
        assert line.startswith(f"{small_disk / 'x.h5'}: disk full: needs 0."), line
    needs, free = zip(*([float(w) for w in line.split() if w[0].isdigit()] for line in failures), strict=True)
    assert all(n >= f for n, f in zip(needs, free, strict=True))
    np.testing.assert_allclose(free, 0.032 * np.arange(len(free)), atol=0.02)


def test_an_existing_file_is_kept(small_disk):
    path = small_disk / "x.h5"
    position = np.random.default_rng(0).normal(size=(4, 1000, 3))
    with Writer(path, {}) as out:
        out.add(position, split="train", dt=1.0, source="x")
    before = path.read_bytes()

    def write_endlessly() -> None:
        with Writer(path, {}) as out:
            while True:
                out.add(position, split="train", dt=1.0, source="x")

    with pytest.raises(Failure, match="disk full"):
        write_endlessly()
    assert path.read_bytes() == before
    assert [p.name for p in small_disk.iterdir()] == ["x.h5"]


def test_prepare_continues_after_a_full_disk(small_disk, tmp_path):
    """Full while parts are written, then while they are joined; then there is space."""
    source, draw = tmp_path / "hdf5", np.random.default_rng(0)
    source.mkdir()
    (source / "metadata.json").write_text(f'{{"bounds": {METADATA["bounds"]}, "dt": 0.005}}')
    for split, count in {"train": 4, "valid": 1, "test": 1}.items():
        with h5py.File(source / f"{split}.h5", "w") as file:
            for k in range(count):
                file[f"{k:05d}/particle_type"] = np.full(2000, 5)
                file[f"{k:05d}/position"] = moving_positions(draw)
    out, options = small_disk / "x.h5", ("--source", source, "--scale", "tiny", "--workers", 1, "--out")

    def run(path: Path) -> tuple[int, list[str]]:
        result = subprocess.run(command(*options, path), capture_output=True, text=True, timeout=600)
        return result.returncode, [line for line in result.stderr.splitlines() if " s left" not in line]

    def parts() -> set[str]:
        return {path.name for path in (small_disk / "x.h5.parts").glob("0*")}

    code, (line,) = run(out)
    assert code == 2
    assert line.startswith(f"error: {small_disk / 'x.h5.parts'}/00000"), line
    assert ".h5: disk full: needs 0." in line
    written = parts()
    assert written
    assert written < {f"{k:06d}.h5" for k in range(6)}
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    code, (line,) = run(out)
    assert code == 2
    size = sum(part.stat().st_size for part in (small_disk / "x.h5.parts").glob("0*"))
    assert line.startswith(f"error: {out}: disk full: needs {size / 1e6:.2f} MB or more, "), line
    assert parts() == {f"{k:06d}.h5" for k in range(6)}
    assert not out.exists()
    subprocess.run(["mount", "-o", "remount,size=32m", str(small_disk)], check=True)
    assert run(out) == (0, [])
    assert {path.name for path in small_disk.iterdir()} == {"x.h5", "x.h5.manifest.json"}
    assert run(tmp_path / "x.h5") == (0, [])
    assert out.read_bytes() == (tmp_path / "x.h5").read_bytes()


def test_partition_on_a_full_disk(small_disk, small, make_inputs):
    """Full at any point: one line and no store; with space the same call completes it."""
    from dist_egnn.partition import store_writer
    from dist_egnn.partition.verify import verify_store

    out, filler, inputs = small_disk / "store", small_disk / "filler", make_inputs(2)
    lines = set()
    for free in (0, 20_000, 300_000, 350_000, 400_000, 450_000, 500_000, 550_000, 650_000, 850_000):
        filler.write_bytes(bytes(4_194_304 - free))
        try:
            store_writer.write_store(Trajectories(small), out, inputs, lambda *_: None)
        except Failure as failure:
            lines.add(str(failure))
            assert not out.exists()
        filler.unlink()
        if out.exists():
            break
        if free == 300_000:  # later attempts continue from the work of earlier ones
            shutil.rmtree(small_disk / "store.partial")
    assert len(lines) > 3
    for line in lines:
        assert line.startswith(str(out)), line
        assert "\n" not in line
        assert "disk full" in line or "No space left" in line or "is the disk full?" in line, line
    store_writer.write_store(Trajectories(small), out, inputs, lambda *_: None)
    verify_store(Store(out), lambda *_: None)


def test_a_lost_end_of_a_file_is_an_error(small_disk):
    """DGL reports no error when the last page of a file does not fit on the disk."""
    import dgl
    import torch

    tensors = {"x": torch.ones(5000, 3)}  # 14.6 pages
    (small_disk / "filler").write_bytes(bytes(4_194_304 - 14 * 4096))
    dgl.data.utils.save_tensors(str(small_disk / "x"), tensors)
    assert (small_disk / "x").stat().st_size < 60_000
    (small_disk / "x").unlink()
    with pytest.raises(OSError, match="No space left"):
        filesystem.save_verified(small_disk / "x", 0, lambda path: dgl.data.utils.save_tensors(path, tensors))
    (small_disk / "filler").unlink()
    filesystem.save_verified(small_disk / "x", 60_000, lambda path: dgl.data.utils.save_tensors(path, tensors))
    np.testing.assert_array_equal(dgl.data.utils.load_tensors(str(small_disk / "x"))["x"], tensors["x"])


def test_the_engine_allocates_its_files_first(small_disk):
    """Writing to a sparse file would end the process with a signal hours later."""
    engine = recipe_modules.load("fluid113k", "engine", "fluid113k_engine")
    frames = engine.allocated(small_disk / "a.npy", (10, 1000, 3))
    frames[:] = 1
    with pytest.raises(OSError, match="No space left"):
        engine.allocated(small_disk / "b.npy", (100, 10000, 3))


def test_an_os_error_names_the_file_and_the_free_space(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 10**7, 10**7))
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    text = filesystem.describe_os_error(error, tmp_path / "x.h5")
    assert text.startswith(f"{tmp_path / 'x.h5'}: No space left on device, ")
    assert float(text.split()[-4].replace(",", "")) == 10
    assert (
        filesystem.describe_os_error(PermissionError(13, "Permission denied", "/a"), tmp_path / "x")
        == "/a: Permission denied"
    )


def test_two_writers_of_one_file(tmp_path):
    with Writer(tmp_path / "x.h5", {}) as one:
        one.add(np.zeros((2, 3, 3)), split="train", dt=1.0, source="x")
        with (
            pytest.raises(Failure, match=r"x\.h5: another process is writing it"),
            Writer(tmp_path / "x.h5", {}),
        ):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["x.h5"]
