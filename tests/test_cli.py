"""The command line as a process: its exit codes, and what it prints to which stream."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest

from dist_egnn.config import load
from dist_egnn.data.samples import select_snapshots
from dist_egnn.data.trajectories import Trajectories

RADIUS, HORIZON = 0.27, 3


class Ran(NamedTuple):
    code: int
    out: str
    err: str


def python(*arguments: object, cwd: Path, **env: str) -> Ran:
    command = [sys.executable, *map(str, arguments)]
    shared = {"cwd": cwd, "env": os.environ | env}
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False, **shared)
    return Ran(done.returncode, done.stdout, done.stderr)


def distegnn(*arguments: object, cwd: Path) -> Ran:
    return python("-m", "dist_egnn.cli", *arguments, cwd=cwd)


def files(folder: Path) -> dict[str, tuple[int, bytes]]:
    found = sorted(f for f in folder.rglob("*") if f.is_file())
    return {str(f.relative_to(folder)): (f.stat().st_mtime_ns, f.read_bytes()) for f in found}


def test_import_is_light_and_silent(tmp_path):
    heavy = "{'torch', 'dgl', 'pandas', 'typer', 'omegaconf'}"
    assert python("-c", f"import dist_egnn, sys; print(*{heavy} & set(sys.modules))", cwd=tmp_path) == (0, "\n", "")


@pytest.mark.parametrize(("before", "after"), [("", ""), ("glibc.malloc.check=0", "glibc.malloc.check=0:")])
def test_the_process_replaces_itself_once(tmp_path, before, after):
    """METIS needs a malloc setting that is read when a process starts; arguments, id and other settings stay."""
    code = (
        "import os, sys; from dist_egnn import cli; "
        "print(os.getpid(), 'tcache' in os.environ['GLIBC_TUNABLES'], flush=True); "
        "cli.main = lambda *_: print(os.environ['GLIBC_TUNABLES'], sys.argv[1:], sys.flags.no_user_site); cli.console()"
    )
    ran = python("-s", "-c", code, "a b", "--c=*", cwd=tmp_path, GLIBC_TUNABLES=before)
    (first, had), (second, has), said = (line.split(maxsplit=1) for line in ran.out.splitlines())
    assert (ran.code, ran.err, first, had, has) == (0, "", second, "False", "True")
    assert said == [f"{after}glibc.malloc.tcache_count=0", "['a b', '--c=*'] 1"]


def test_help(tmp_path):
    """The help of each command: tests/test_examples.py."""
    shown = distegnn("--help", cwd=tmp_path)
    assert (shown.code, shown.err) == (0, "")
    assert distegnn(cwd=tmp_path) == shown  # a bare `distegnn` asks for help
    assert "  partition " in shown.out


def test_mistakes_are_one_line(tmp_path, small):
    (tmp_path / "text.h5").write_text("x y z\n")
    (tmp_path / "bad.yaml").write_text("train: {epoch: 1}")
    mistakes = {
        "evalute runs": "evalute",
        "partition": "data",
        "partition --partz 3": "--partz",
        "train bad.yaml": r"bad\.yaml: .*'train\.epoch'; did you mean train\.epochs\?",
        "train absent.yaml": r"absent\.yaml: ",
        "partition a.h5 --radius 1 --out store train.epochs=3": r"'train\.epochs=3': only data",
        "config train.epoch=1": r"override 'train\.epoch=1': .*did you mean train\.epochs\?",
        "partition text.h5 --radius 1 --out store": r"text\.h5: ",
        f"partition {small} --radius 0.27": r"--out is missing",
    }
    before = files(tmp_path)
    with ThreadPoolExecutor(2) as pool:
        ran = list(pool.map(lambda line: distegnn(*line.split(), cwd=tmp_path), mistakes))
    for (line, says), (code, out, err) in zip(mistakes.items(), ran, strict=True):
        assert code == 2, (line, err)
        assert out == "", line
        assert re.fullmatch(r"error: .+\n", err), (line, err)  # one line: . stops at its end
        assert re.search(says, err), (line, err)
    assert files(tmp_path) == before
    assert sorted(f.name for f in tmp_path.iterdir()) == ["bad.yaml", "text.h5"]


def test_debug_shows_the_traceback(tmp_path):
    code, _, err = distegnn("--debug", "config", "train.epoch=1", cwd=tmp_path)
    assert code != 0
    assert err.startswith("Traceback")
    assert "did you mean train.epochs?" in err.splitlines()[-1]


def test_config_prints_what_train_reads(tmp_path):
    code, out, err = distegnn("config", "train.epochs=7", "data.features=[mass]", cwd=tmp_path)
    assert (code, err) == (0, "")
    (tmp_path / "my.yaml").write_text(out)
    assert "epochs: 7  # " in out
    assert "features: [mass]  # " in out
    assert load(tmp_path / "my.yaml") == load(None, ["train.epochs=7", "data.features=[mass]"])


def test_compare_shows_every_method(tmp_path, small):
    code, out, _ = distegnn("partition", small, "--parts", 3, "--radius", RADIUS, "--compare", cwd=tmp_path)
    assert code == 0
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines()[3:]}
    assert list(rows) == ["metis", "random", "kmeans", "spectral", "bisection", "morton"]
    cut = {name: float(row[0].removesuffix("%")) for name, row in rows.items()}
    assert 0 < cut["metis"] < cut["random"]
    assert list(tmp_path.iterdir()) == []


def test_partition_then_verify(tmp_path, small):
    arguments = ("--parts", 2, "--radius", RADIUS, f"data.horizon={HORIZON}", "data.frames=2", "--out", "store")
    code, out, _ = distegnn("partition", small, *arguments, cwd=tmp_path)
    assert code == 0
    assert "store: 8 snapshots in 2 parts" in out
    assert re.search(r"^  metis +\d", out, re.M)
    before = files(tmp_path)
    code, out, _ = distegnn("verify", "store", cwd=tmp_path)
    assert code == 0
    assert re.fullmatch(r"store: whole: \d+ files, 8 snapshots, [\d,]+ nodes, [\d,]+ edges\n", out)
    assert files(tmp_path) == before


@pytest.fixture(scope="module")
def run(small, tmp_path_factory) -> tuple[list[object], Path, Ran]:
    """A run of one epoch: its arguments, its working folder, its output."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "my.yaml").write_text(
        f"data: {{path: {small}, radius: {RADIUS}, horizon: {HORIZON}, frames: 2}}\n"
        "model: {hidden: 8, layers: 1}\ntrain: {epochs: 5}\nrun: {dir: elsewhere}\n"
    )
    arguments: list[object] = ["train", "my.yaml", "train.epochs=1", "run.dir=runs/one"]
    return arguments, folder, distegnn(*arguments, cwd=folder)


def test_train_then_evaluate(run, small):
    _, folder, ran = run
    assert ran.code == 0, ran.err
    assert "runs/one: best validation MSE" in ran.out
    assert sorted(f.name for f in folder.iterdir()) == ["my.yaml", "runs"]
    one = folder / "runs" / "one"
    assert {"best.pt", "last.pt", "config.yaml", "about.yaml", "metrics.csv", "tensorboard"} <= {
        f.name for f in one.iterdir()
    }
    assert len(pd.read_csv(one / "metrics.csv")) == 1

    code, out, err = distegnn("evaluate", "runs/one", cwd=folder)
    assert code == 0, err
    rows = [line.split() for line in out.splitlines()[3:]]
    assert [row[0] for row in rows] == ["static", "linear", "FastEGNN"]
    found = {name: float(value) for name, value, _ in rows}
    # the baselines by their definition, from the file
    data = Trajectories(small)
    pairs: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {"train": [], "valid": [], "test": []}
    for s in select_snapshots(data, HORIZON, 2, 0, -1, 0):
        x, y = data.position(s.trajectory, s.frame), data.position(s.trajectory, s.frame + HORIZON)
        pairs[s.split].append((data.velocity(s.trajectory, s.frame).astype(float), (y - x).astype(float)))
    t = sum((v * d).sum() for v, d in pairs["train"]) / sum((v * v).sum() for v, _ in pairs["train"])
    error = {"static": [d for _, d in pairs["test"]], "linear": [d - t * v for v, d in pairs["test"]]}
    for name, values in error.items():
        assert found[name] == pytest.approx((np.concatenate(values) ** 2).mean(), rel=1e-3)
    assert 0 < found["FastEGNN"] < 10 * found["static"]
    table = pd.read_csv(one / "evaluate.csv").set_index("prediction")["mse"]
    assert table.to_dict() == pytest.approx(found, rel=1e-3)


def test_a_second_run_in_the_same_folder_is_refused(run):
    arguments, folder, _ = run
    before = files(folder)
    code, out, err = distegnn(*arguments, cwd=folder)
    assert (code, out) == (2, "")
    assert re.fullmatch(r"error: runs/one: .*run\.dir.* distegnn train --resume runs/one\n", err)
    assert files(folder) == before


def test_rollout_report_render(run, small):
    folder = run[1]
    rolled = ("--data", small, "--trajectory", 3, "--steps", 2, "--out", "runs/rolled.vtkhdf")
    for arguments, says, made in (
        (("rollout", "runs/one", *rolled), "runs/rolled.vtkhdf: 3 frames", "rolled.vtkhdf"),
        (("report", "runs/one", "--rollout", "runs/rolled.vtkhdf", "--out", "runs/one.html"), "one.html", "one.html"),
        (("render", "runs/rolled.vtkhdf", "--out", "runs/a.gif", "--every", 2, "--colour", "error"), "2 pic", "a.gif"),
    ):
        code, out, err = distegnn(*arguments, cwd=folder)
        assert (code, err) == (0, ""), err
        assert says in out
        assert (folder / "runs" / made).stat().st_size > 1000
