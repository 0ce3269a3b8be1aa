"""Shared fixtures: run.py in a process, a small disk, folders of GNS and the modules of recipes/water3d."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import pytest
from gns_files import METADATA, RECIPE, framed, record, trajectories


@pytest.fixture
def check_run_py(tmp_path, distegnn) -> Callable[..., None]:
    """check_run_py(recipe, *keys): run.py with one epoch of a small EGNN writes and prints a complete table."""

    import pandas as pd

    def check(recipe: Path, *keys: object) -> None:
        small = ["--epochs", "1", "--models", "EGNN", "model.hidden=4", "model.layers=1", "train.batch_size=4"]
        command = [
            distegnn.with_name("python"),
            str(recipe / "run.py"),
            *small,
            *map(str, keys),
            "--out",
            str(tmp_path / "run"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        table = pd.read_csv(tmp_path / "run" / "results.csv").set_index("prediction")
        names = [name.removesuffix(" (published)") for name in table.index]
        assert names == ["static", "linear", "EGNN"]
        assert np.isfinite(table).all(axis=None)
        assert (table > 0).all(axis=None)
        assert [line.split()[0] for line in done.stdout.splitlines()[-3:]] == names
        assert (tmp_path / "run" / "EGNN" / "best.pt").exists()

    return check


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A separate disk of 4 MB, which can be full."""
    if os.geteuid() or shutil.which("mount") is None:
        pytest.skip("only root can mount a small disk")
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("no right to mount a small disk here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def gns_folder(tmp_path):
    """A folder in the layout of GNS."""
    folder = tmp_path / "Water-3D"
    folder.mkdir()
    (folder / "metadata.json").write_text(json.dumps(METADATA))
    for split, content in trajectories().items():
        payloads = [record(k, *arrays) for k, arrays in enumerate(content)]
        (folder / f"{split}.tfrecord").write_bytes(b"".join(framed(p) for p in payloads))
    return folder


@pytest.fixture
def hdf5_folder(tmp_path):
    folder = tmp_path / "hdf5"
    folder.mkdir()
    (folder / "metadata.json").write_text(json.dumps({k: METADATA[k] for k in ("bounds", "dt")}))
    for split, content in trajectories().items():
        with h5py.File(folder / f"{split}.h5", "w") as file:
            for k, (kind, position) in enumerate(content):
                file[f"{k:05d}/particle_type"], file[f"{k:05d}/position"] = kind, position
    return folder


def loaded(monkeypatch, name: str, path: Path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def gns(monkeypatch):
    """recipes/water3d/gns.py as a module."""
    return loaded(monkeypatch, "gns", RECIPE / "gns.py")


@pytest.fixture
def water3d(gns, monkeypatch):
    """recipes/water3d/prepare.py as a module; in this process, with threads as workers."""
    module = loaded(monkeypatch, "water3d_prepare", RECIPE / "prepare.py")
    monkeypatch.setattr(
        module.preparation, "ProcessPoolExecutor", lambda workers, *_, **__: ThreadPoolExecutor(workers)
    )
    return module
