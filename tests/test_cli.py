"""The command line as a process: its exit codes, and what it prints to which stream."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest

from dist_egnn import __version__
from dist_egnn.config import load
from dist_egnn.data.samples import select_snapshots
from dist_egnn.data.trajectories import Trajectories

RADIUS, HORIZON = 0.27, 3


class Ran(NamedTuple):
    code: int
    out: str
    err: str


def ran(*command: object, cwd: Path, **env: str) -> Ran:
    words, env = [str(word) for word in command], {**os.environ, **env}
    done = subprocess.run(words, capture_output=True, text=True, timeout=500, cwd=cwd, env=env)
    return Ran(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def run(distegnn: Path, tmp_path: Path) -> Callable[..., Ran]:
    """run(*words): a command in the test's folder."""
    return lambda *words: ran(distegnn, *words, cwd=tmp_path)


def files(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {str(f): (f.stat().st_mtime_ns, f.read_bytes()) for f in folder.rglob("*") if f.is_file()}


@pytest.mark.parametrize(("before", "after"), [("", ""), ("glibc.malloc.check=0", "glibc.malloc.check=0:")])
def test_a_process_that_may_partition_replaces_itself_once(tmp_path, before, after):
    """METIS needs a malloc setting that is read when a process starts; arguments, id and other settings stay."""
    code = (
        "import os, sys; from dist_egnn import cli; "
        "print(os.getpid(), 'tcache' in os.environ['GLIBC_TUNABLES'], flush=True); "
        "cli.main = lambda *_: print(os.environ['GLIBC_TUNABLES'], sys.argv[1:], sys.flags.no_user_site); cli.console()"
    )
    report = ran(sys.executable, "-c", code, "report", cwd=tmp_path, GLIBC_TUNABLES=before)[1]
    assert (report.count("False"), len(report.splitlines())) == (1, 2)
    code, out, err = ran(sys.executable, "-s", "-c", code, "train", "--c=* b", cwd=tmp_path, GLIBC_TUNABLES=before)
    (first, had), (second, has), last = (line.split(maxsplit=1) for line in out.splitlines())
    assert (code, err, first, had, has) == (0, "", second, "False", "True")
    assert last == [f"{after}glibc.malloc.tcache_count=0", "['train', '--c=* b'] 1"]


def test_help(run):
    """tests/test_examples.py shows the help of each command."""
    code, out, err = run()
    assert (code, "  partition " in out, err) == (0, True, "")
    assert "\n    seeds: [0, 1, 2]\n" in run("sweep", "--help").out  # the file, line by line


def test_mistakes_are_one_line(run, tmp_path, small):
    (tmp_path / "text.h5").write_text("x y z\n")
    (tmp_path / "bad.yaml").write_text("train: {epoch: 1}")
    mistakes = {
        "evalute runs": "evalute",
        "partition": "data",
        "partition --partz 3": "--partz",
        "train bad.yaml": r"bad\.yaml: .*'train\.epoch'; did you mean train\.epochs\?",
        "train data.path=a.h5": r"override 'data\.path=a\.h5': .*name one first: CONFIG data\.path=a\.h5$",
        "train absent.yaml": r"absent\.yaml: ",
        "partition a.h5 --radius 1 --out store train.epochs=3": r"'train\.epochs=3': only data",
        "config train.epoch=1": r"override 'train\.epoch=1': .*did you mean train\.epochs\?",
        "partition text.h5 --radius 1 --out store": r"text\.h5: ",
        f"partition {small} --radius 0.27": r"--out is missing",
    }
    before = files(tmp_path)
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda line: run(*line.split()), mistakes))
    for (line, message), (code, out, err) in zip(mistakes.items(), results, strict=True):
        assert (code, out) == (2, ""), (line, err)
        assert re.fullmatch(r"error: .+\n", err), (line, err)  # one line: . stops at its end
        assert re.search(message, err), (line, err)
    assert files(tmp_path) == before
    code, _, err = run("--debug", "config", "train.epoch=1")
    assert (code, err.splitlines()[0][:9]) == (1, "Traceback")
    assert "did you mean train.epochs?" in err.splitlines()[-1]


def test_config_prints_what_train_reads(run, tmp_path):
    code, out, err = run("config", "train.epochs=7", "data.features=[mass]")
    assert (code, err) == (0, "")
    (tmp_path / "my.yaml").write_text(out)
    assert load(tmp_path / "my.yaml") == load(None, ["train.epochs=7", "data.features=[mass]"])


def test_compare_shows_every_method(run, tmp_path, small):
    code, out, _ = run("partition", small, "--parts", 3, "--radius", RADIUS, "--compare")
    assert code == 0
    cut = {line.split()[0]: float(line.split()[1].removesuffix("%")) for line in out.splitlines()[3:]}
    assert list(cut) == ["metis", "random", "kmeans", "spectral", "bisection", "morton"]
    assert 0 < cut["metis"] < cut["random"]
    assert list(tmp_path.iterdir()) == []


def test_partition_then_verify(run, tmp_path, small):
    arguments = ("--parts", 2, "--radius", RADIUS, f"data.horizon={HORIZON}", "data.frames=2", "--out", "store")
    code, out, _ = run("partition", small, *arguments)
    assert (code, "store: 8 snapshots in 2 parts" in out) == (0, True)
    before = files(tmp_path)
    code, out, _ = run("verify", "store")
    assert (code, out.startswith("store: whole: "), " 8 snapshots, " in out) == (0, True, True)
    assert files(tmp_path) == before


def test_the_version(run):
    assert run("--version") == (0, f"distegnn {__version__}\n", "")


def test_train_then_evaluate(run, small, tmp_path):
    (tmp_path / "my.yaml").write_text(
        f"data: {{path: {small}, radius: {RADIUS}, horizon: {HORIZON}, frames: 2}}\n"
        "model: {hidden: 8, layers: 1}\ntrain: {epochs: 5}\nrun: {dir: elsewhere}\n"
    )
    train = ("train", "my.yaml", "train.epochs=1", "run.dir=runs/one")
    code, out, err = run(*train)
    assert (code, "runs/one: best validation MSE" in out) == (0, True), err
    assert sorted(f.name for f in tmp_path.iterdir()) == ["my.yaml", "runs"]
    one = tmp_path / "runs" / "one"
    names = {"best.pt", "last.pt", "config.yaml", "about.yaml", "metrics.csv", "tensorboard"}
    assert names <= {f.name for f in one.iterdir()}
    assert len(pd.read_csv(one / "metrics.csv")) == 1

    before = files(tmp_path)  # a second run in the same folder is refused
    code, out, err = run(*train)
    assert (code, out) == (2, "")
    assert re.fullmatch(r"error: runs/one: .*run\.dir.* distegnn train --resume runs/one\n", err)
    assert files(tmp_path) == before

    code, out, err = run("evaluate", "runs/one")
    assert code == 0, err
    rows = [line.split() for line in out.splitlines()[3:]]
    assert [row[0] for row in rows] == ["static", "linear", "FastEGNN"]
    printed = {name: float(value) for name, value, _ in rows}
    # the baselines by their definition, from the file
    data = Trajectories(small)
    pairs: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {"train": [], "valid": [], "test": []}
    for s in select_snapshots(data, HORIZON, 2, 0, -1, 0):
        x, y = data.position(s.trajectory, s.frame), data.position(s.trajectory, s.frame + HORIZON)
        pairs[s.split].append((data.velocity(s.trajectory, s.frame).astype(float), (y - x).astype(float)))
    t = sum((v * d).sum() for v, d in pairs["train"]) / sum((v * v).sum() for v, _ in pairs["train"])
    error = {"static": [d for _, d in pairs["test"]], "linear": [d - t * v for v, d in pairs["test"]]}
    for name, values in error.items():
        assert printed[name] == pytest.approx((np.concatenate(values) ** 2).mean(), rel=1e-3)
    assert 0 < printed["FastEGNN"] < 10 * printed["static"]
    table = pd.read_csv(one / "evaluate.csv").set_index("prediction")["mse"]
    assert table.to_dict() == pytest.approx(printed, rel=1e-3)
