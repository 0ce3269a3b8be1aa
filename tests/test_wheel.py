"""The wheel, installed into empty environments of both versions of Python: every command works outside a clone.

The other version than that of the tests: the interpreter in OTHER_PYTHON, or in .venv312, of an environment that has the
packages (`make setup` in another checkout).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from packaging.requirements import Requirement
from small_data import falling_swirl

ROOT = Path(__file__).parents[1]
OTHER = Path(os.environ.get("OTHER_PYTHON", ROOT / ".venv312" / "bin" / "python"))
needs_other = pytest.mark.skipif(not OTHER.exists(), reason=f"no {OTHER} with another version of Python")
SOURCES = ["setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md"]
# `python -m build`: a source archive, then the wheel from that
BUILD = """
import sys, tarfile
from setuptools import build_meta
with tarfile.open(build_meta.build_sdist(".")) as archive:
    archive.extractall("unpacked", filter="data")
"""
# a compiler that copies what `make setup` compiled from the same source, in place of ten seconds of work
COMPILER = """#!/bin/sh
for last; do :; done
name=${last##*/}
cp "NATIVE/${name%.*.partial}.so" "$last"
"""


def run(*words: object, cwd: Path, **env: str) -> str:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    command = [str(word) for word in words]
    done = subprocess.run(command, cwd=cwd, env=kept | env, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the source archive of a copy of this package."""
    folder = tmp_path_factory.mktemp("build")
    for name in SOURCES:
        shutil.copy(ROOT / name, folder / name)
    for name in ("dist_egnn", "partition", "tools"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    run(sys.executable, "-c", BUILD, cwd=folder)
    (source,) = (folder / "unpacked").iterdir()
    compiler = folder / "compiler"
    compiler.write_text(COMPILER.replace("NATIVE", str(ROOT / "dist_egnn" / "ops" / "native")))
    compiler.chmod(0o755)
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder)
    run(sys.executable, "-m", "pip", "wheel", *options, source, cwd=folder, CXX=str(compiler))
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_fits_every_python_and_has_the_kernels(wheel: Path) -> None:
    assert wheel.name.split("-")[2:4] == ["py3", "none"]
    assert wheel.stem.split("-")[4].startswith("linux_")
    with zipfile.ZipFile(wheel) as content:
        names = content.namelist()
        (about,) = [content.read(name).decode() for name in names if name.endswith("METADATA")]
    assert "dist_egnn/ops/native/message_mlp.base.so" in names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"dist_egnn"}
    requirements = [Requirement(line.split(": ")[1]) for line in about.splitlines() if line.startswith("Requires-Dist")]
    of: dict[str, set[str]] = {}
    for one in requirements:
        extra = str(one.marker).partition("extra == ")[2].strip('"')
        of.setdefault(extra, set()).add(f"{one.name}{one.specifier}")
    assert of["all"] == set.union(*(of[name] for name in of if name not in ("", "all", "dev")))


@pytest.fixture(
    scope="module", params=[Path(sys.executable), pytest.param(OTHER, marks=needs_other)], ids=["this", "other"]
)
def installed(wheel: Path, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program `distegnn` of an environment that has this package, and all others from the interpreter's own."""
    folder = tmp_path_factory.mktemp("empty") / "venv"
    run(request.param, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    options = ("--no-deps", "--no-index")
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, wheel, cwd=folder.parent)
    (packages,) = folder.glob("lib/python*/site-packages")
    torch = run(
        request.param, "-c", "import importlib.util as i; print(i.find_spec('torch').origin)", cwd=folder.parent
    )
    (packages / "others.pth").write_text(str(Path(torch).parents[1]))  # .pth files there are not read
    where = run(python, "-c", "import dist_egnn; print(dist_egnn.__file__)", cwd=folder.parent)
    assert Path(where.strip()) == packages / "dist_egnn" / "__init__.py"
    return folder / "bin" / "distegnn"


CONFIG: dict[str, Any] = {
    "data": {"path": "store", "radius": 0.3, "horizon": 1, "frames": 2},
    "model": {"hidden": 8, "layers": 1},
    "train": {"epochs": 1, "warmup": 0},
    "run": {"dir": "run"},
}
ERRORS: list[float] = []  # of the same training in each environment


def test_the_commands_work_outside_a_clone(installed: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "frames.npz", position=falling_swirl(60, 0)[0])
    (tmp_path / "my.yaml").write_text(json.dumps(CONFIG))

    def distegnn(line: str) -> str:
        return run(installed, *line.split(), cwd=tmp_path)

    distegnn("import frames.npz --out mine.h5 --dt 1 --split 0.5,0.25,0.25")
    distegnn("partition mine.h5 --config my.yaml --parts 1 --trainers 2 --shard-nodes 0 --out store")
    distegnn("train my.yaml")
    distegnn("rollout run --data mine.h5 --trajectory 0 --steps 2 --parts 1 --out rollout.vtkhdf")
    assert np.isfinite(pd.read_csv(tmp_path / "rollout.csv")["mse"]).all()
    ERRORS.append(error := pd.read_csv(tmp_path / "run" / "metrics.csv")["valid_mse"].item())
    assert error == pytest.approx(ERRORS[0], rel=1e-4)
    launch = f"{installed} launch my.yaml run.dir=launched --local"
    if any(installed.parents[1].glob("lib/python3.11")):
        run(*launch.split(), cwd=tmp_path)
        assert pd.read_csv(tmp_path / "launched" / "metrics.csv")["valid_mse"].item() == error
    else:
        refused = subprocess.run(launch.split(), cwd=tmp_path, capture_output=True, text=True, timeout=150, check=False)
        assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
        assert "error: dgl 2.1.0: " in refused.stderr


def test_doctor(installed: Path, tmp_path: Path) -> None:
    """Its exit code is 1 where the machine has a problem; it leaves nothing behind."""
    command = [installed, "doctor", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    found = {one["check"]: one for one in json.loads(done.stdout.splitlines()[-1])}
    well = {"python", "versions", "network", "torch", "dgl", "native", "group"}
    assert set(found) >= {*well, "threads", "memory", "disk", "shared memory", "gpu"}
    assert {found[name]["state"] for name in well} == {"ok"}
    assert done.returncode == ("problem" in {one["state"] for one in found.values()}), done.stdout
    assert list(tmp_path.iterdir()) == []
    assert "kernels for" in found["native"]["text"]


@pytest.mark.parametrize(
    ("versions", "given", "message"),
    [
        ({"python": "3.13"}, "python", "error: python is Python 3.13, but DGL has wheels for 3.11 and 3.12 only; .*"),
        ({"python3.12": "3.12"}, "", r"error: could not make .venv with python3.12; .* \(python3.12-venv\)\?"),
        ({}, "", "error: python3 does not run; install Python 3.11 or 3.12, or name one: make PYTHON=.*"),
    ],
)
def test_make_takes_the_python_that_is_there(
    versions: dict[str, str], given: str, message: str, tmp_path: Path
) -> None:
    """Interpreters that only print their version, or fail, as pyenv's do for versions that are not installed."""
    for name in ("python", "python3", "python3.11", "python3.12"):
        answer = f'[ "$1" = -c ] && echo {versions[name]}' if name in versions else "exit 127"
        (tmp_path / name).write_text(f"#!/bin/sh\n{answer}\n")
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "PYTHON": given}
    command = ["sh", str(ROOT / "tools" / "setup.sh")]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert re.fullmatch(message, done.stderr.splitlines()[-1])
    assert not (tmp_path / ".venv").exists()
