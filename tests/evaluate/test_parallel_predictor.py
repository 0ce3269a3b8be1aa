"""dist_egnn.load on several processes: equal to one, stopped with the object, and after kills."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_predictor import RUNS, settings, write

import dist_egnn
from dist_egnn.errors import Failure
from dist_egnn.evaluate.parallel_predictor import ParallelPredictor
from dist_egnn.evaluate.predictor import Predictor


def arguments(n: int = 150) -> tuple[Any, ...]:
    rng = np.random.default_rng(3)
    features = {"mass": rng.uniform(0.5, 2, n), "viscosity": rng.uniform(0.5, 2, n)}
    return rng.uniform(size=(n, 3)), 0.1 * rng.normal(size=(n, 3)), features


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for_end(pids: list[int]) -> None:
    deadline = time.monotonic() + 60
    while any(map(alive, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("more", [[*RUNS["named"], "data.edge_drop=0"], RUNS["options"]], ids=["radius", "edge drop"])
def test_two_processes_equal_one_in_float64(small, tmp_path, more):
    path = write(settings(small, tmp_path / "run", *more))
    before = {*os.listdir("/dev/shm")}
    with ParallelPredictor(path, 2, double=True) as predict:
        for n in (150, 60):
            for two, one in zip(predict(*arguments(n)), Predictor(path, double=True)(*arguments(n)), strict=True):
                assert two.dtype == np.float64
                np.testing.assert_allclose(two, one, rtol=0, atol=1e-10)
        _, z = predict.with_virtual(*arguments())
        np.testing.assert_allclose(z, Predictor(path, double=True).with_virtual(*arguments())[1], rtol=0, atol=1e-10)
        with pytest.raises(Failure, match="parts=2"):
            predict(*(value[:1] for value in arguments()[:2]), {"mass": np.ones(1), "viscosity": np.ones(1)})
        with pytest.raises(Failure, match="features: 'viscosity' is missing"):
            predict(*arguments()[:2])
        assert predict(*arguments()).shape == (150, 3)
        pids = [process.pid for process in predict._processes]
    assert not any(map(alive, pids))
    assert {*os.listdir("/dev/shm")} == before
    with pytest.raises(Failure, match="closed; load the run again"):
        predict(*arguments())


def test_a_killed_process_and_models_without_halos(small, tmp_path):
    path = write(settings(small, tmp_path / "run", *RUNS["named"]))
    predict = dist_egnn.load(path, processes=2)
    pids = [process.pid for process in predict._processes]
    os.kill(pids[1], signal.SIGKILL)
    with pytest.raises(Failure, match=r"process 1 of 2 died"):
        predict(*arguments())
    assert not any(map(alive, pids))
    with pytest.raises(Failure, match="processes=0: must be at least 1"):
        dist_egnn.load(path, processes=0)


SCRIPT = """
import sys, time, dist_egnn
predict = dist_egnn.load(sys.argv[1], processes=2)
print(*(process.pid for process in predict._processes), flush=True)
time.sleep(1000)
"""


def test_a_killed_parent_leaves_no_process(small, tmp_path):
    path = write(settings(small, tmp_path / "run", *RUNS["named"]))
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", SCRIPT, str(path)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as parent:
        pids = [int(word) for word in parent.stdout.readline().split()]
        parent.kill()
    assert len(pids) == 2
    wait_for_end(pids)
    assert [path for path in tmp_path.iterdir() if path.name.startswith("dist_egnn-")] == []
