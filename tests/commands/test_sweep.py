"""`distegnn sweep`: sweep files and their errors, the numbers of the table, and sweeps of real runs, with a kill."""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml

from dist_egnn import config
from dist_egnn.commands import sweep, sweep_config
from dist_egnn.commands.evaluate import run_evaluation
from dist_egnn.commands.train import run_training
from dist_egnn.distributed.comm import SingleProcess
from dist_egnn.errors import Failure
from dist_egnn.train import trainer
from dist_egnn.utils import filesystem

RADIUS, HORIZON = 0.27, 3
ROOT = Path(__file__).parents[2]
FLUID = [("fluid113k/sweep-partition", 11), ("fluid113k/sweep-mmd", 25)]


@pytest.fixture
def write(tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch):
    """write(**keys): a sweep file in an empty working folder, on a small base config; its path."""
    monkeypatch.chdir(tmp_path)
    base = {
        "data": {"path": str(small), "radius": RADIUS, "horizon": HORIZON, "frames": 2, "features": ["mass"]},
        "model": {"hidden": 8, "layers": 1},
    }
    Path("base.yaml").write_text(yaml.safe_dump(base))

    def make(**keys) -> Path:
        Path("sweep.yaml").write_text(yaml.safe_dump({"config": "base.yaml", "out": "out", **keys}, sort_keys=False))
        return Path("sweep.yaml")

    return make


def distegnn(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dist_egnn.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)


def write_result(run: sweep_config.Run, test_mse: float, **numbers: float) -> None:
    """Write the result of a run."""
    run.folder.mkdir(parents=True, exist_ok=True)
    result = {**dict.fromkeys(sweep.NUMBERS, 1.0), "test_mse": test_mse, **numbers}
    (run.folder / "result.json").write_text(json.dumps(result))


def test_runs_of_a_file(write):
    """The first seed of every setting comes first; two grids may share a run; runs that are cut alike share a store."""
    first = {"keys": {"model.name": ["EGNN", "FastEGNN"]}, "set": {"train.lr": 1e-3}}
    second = {"keys": {"model.name": ["EGNN", "FastEGNN"]}, "partition": {"parts": 2, "method": "random"}}
    third = {"keys": {"train.lr": [0.001], "model.name": ["EGNN"], "data.edge_drop": [0, 1]}}
    plan = sweep_config.load(write(grids=[first, second, third], seeds=[3, 1], set={"train.epochs": 7}))
    assert [(r.config.train.seed, r.config.model.name, r.config.partition.parts) for r in plan.runs[:5]] == [
        (3, "EGNN", 0),
        (3, "FastEGNN", 0),
        (3, "EGNN", 2),
        (3, "FastEGNN", 2),
        (3, "EGNN", 0),
    ]
    assert [r.setting for r in plan.runs[5:]] == [r.setting for r in plan.runs[:5]]
    assert {r.config.train.epochs for r in plan.runs} == {7}
    assert [r.config.train.lr for r in plan.runs[:5]] == [1e-3, 1e-3, 5e-4, 5e-4, 1e-3]
    assert plan.varying == ["model.name", "train.lr", "data.edge_drop", "partition.parts", "partition.method"]
    # the first grid leaves edge_drop out; the third names it for the run they share
    assert [r.cell("data.edge_drop") for r in plan.runs[:5]] == ["0", "", "", "", "1"]
    assert [r.store is None for r in plan.runs[:5]] == [True, True, False, False, True]
    assert plan.runs[2].store == plan.runs[3].store == plan.runs[7].store
    assert str(plan.runs[2].folder) == "out/name=EGNN,parts=2,method=random,seed=3"


EGNN = {"keys": {"model.name": ["EGNN", "FastEGNN"]}}
MISTAKES = {
    "unknown key 'grid'; did you mean grids?": {"grid": [EGNN]},
    "unknown key 'data'; this is a config": {"data": {"radius": 1}},
    "key 'grids' is missing": {},
    "grids must be a list that is not empty": {"grids": []},
    "grids[0]: unknown key 'key'; did you mean keys?": {"grids": [{"key": {}}]},
    "grids[0].keys: unknown key 'model.nam'; did you mean model.name?": {"grids": [{"keys": {"model.nam": ["EGNN"]}}]},
    "grids[0].keys: model.name must be a list": {"grids": [{"keys": {"model.name": "EGNN"}}]},
    "grids[0]: model.name=EGN: unknown; did you mean EGNN?": {"grids": [{"keys": {"model.name": ["EGN"]}}]},
    "grids[0]: data.edge_drop=2.0: must lie in": {"grids": [{"keys": {"data.edge_drop": [0, 2]}}]},
    "grids[0].set: unknown key 'train.epoch'; did you mean train.epochs?": {"grids": [{"set": {"train.epoch": 3}}]},
    "set: train.seed is set by the sweep; use the file's key 'seeds'": {"grids": [EGNN], "set": {"train.seed": 1}},
    "grids[0].partition: unknown key 'part'; did you mean parts?": {"grids": [{"partition": {"part": 3}}]},
    "seeds=[0, 0]": {"grids": [EGNN], "seeds": [0, 0]},
    "baseline, keys that vary: unknown key 'model.hidden'": {"grids": [EGNN], "baseline": {"model.hidden": 8}},
    "baseline: no run has model.name=Linear": {"grids": [EGNN], "baseline": {"model.name": "Linear"}},
    "plot: key 'x' is missing": {"grids": [EGNN], "plot": {"lines": ["model.name"]}},
    "plot: runs differ in more than x and lines": {
        "grids": [{"keys": {"model.name": ["EGNN", "Linear"], "train.lr": [1, 2]}}],
        "plot": {"x": "train.lr", "lines": ["train.lr"]},
    },
    "names of runs must differ": {"grids": [{"keys": {"data.path": ["a/b.h5", "a?b.h5"]}}]},
}


@pytest.mark.parametrize("says", MISTAKES)
def test_mistakes_in_a_file(write, says):
    with pytest.raises(Failure) as caught:
        sweep_config.load(write(**MISTAKES[says]))
    assert str(caught.value).startswith("sweep.yaml: ")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not Path("out").exists()


def test_missing_data_and_a_store_with_other_settings(write, make_store):
    with pytest.raises(Failure, match=r"absent\.h5"):
        sweep_config.check_data(sweep_config.load(write(grids=[{"set": {"data.path": "absent.h5"}}])))
    store = str(make_store(2))  # made with other features
    with pytest.raises(Failure, match=r"data\.features=.* in the config"):
        sweep_config.check_data(sweep_config.load(write(grids=[{"set": {"data.path": store, "data.frames": 3}}])))


def test_table_and_plot(write):
    """Means, deviations and ratios, each to the baseline at its own edge_drop; not all seeds are finished."""
    both = {"keys": {"model.name": ["EGNN", "FastEGNN"], "data.edge_drop": [0, 0.5]}}
    linear = {"keys": {"model.name": ["Linear"]}}
    plan = sweep_config.load(
        write(
            grids=[both, linear],
            seeds=[0, 1, 2],
            baseline={"model.name": "EGNN"},
            plot={"x": "data.edge_drop", "lines": ["model.name"]},
        )
    )
    errors = {("EGNN", "0"): [2.0, 4.0], ("EGNN", "0.5"): [5.0], ("FastEGNN", "0"): [1.0, 2.0], ("Linear", ""): [7.0]}
    for run in plan.runs:
        seeds = errors.get((run.cell("model.name"), run.cell("data.edge_drop")), [])
        if run.config.train.seed < len(seeds):
            write_result(run, seeds[run.config.train.seed], epochs=10 * (1 + run.config.train.seed))
    found = sweep.write_table(plan)
    assert plan.missing() == 15 - 6
    assert found["model.name"].tolist() == ["EGNN", "EGNN", "FastEGNN", "Linear"]
    assert found["seeds"].tolist() == [2, 1, 2, 1]
    assert found["test_mse"].tolist() == [3.0, 5.0, 1.5, 7.0]
    assert found["test_mse_std"][0] == pytest.approx(statistics.stdev([2.0, 4.0]))
    assert found["test_mse_std"].isna().tolist() == [False, True, False, True]
    assert found["of_baseline"].tolist()[:3] == [1.0, 1.0, 0.5]
    assert pd.isna(found["of_baseline"][3])  # Linear has no edge_drop to compare at
    assert found["epochs"].tolist() == [15, 10, 15, 10]
    pd.testing.assert_frame_equal(
        pd.read_csv("out/results.csv", keep_default_na=False, dtype=str)[["seeds"]], found[["seeds"]].astype(str)
    )
    assert len(pd.read_csv("out/runs.csv")) == 6
    assert Path("out/plot.png").read_bytes().startswith(b"\x89PNG")


def test_one_baseline_for_all_rows(write):
    keys = {"model.name": ["EGNN", "FastEGNN"], "data.edge_drop": [0, 1]}
    one = {"model.name": "EGNN", "data.edge_drop": 0}
    plan = sweep_config.load(write(grids=[{"keys": keys}, {"keys": {"model.name": ["Linear"]}}], baseline=one))
    for n, run in enumerate(plan.runs):
        write_result(run, 2.0 + n)
    assert sweep.write_table(plan)["of_baseline"].tolist() == [1.0, 1.5, 2.0, 2.5, 3.0]
    assert not Path("out/plot.png").exists()


def test_a_run_with_other_settings_is_refused(write):
    plan = sweep_config.load(write(grids=[EGNN]))
    folder = plan.runs[0].folder
    folder.mkdir(parents=True)
    (folder / "wanted.yaml").write_text(config.to_yaml(plan.runs[0].config))
    sweep_config.load(write(grids=[EGNN]))
    with pytest.raises(Failure, match=r"name=EGNN,seed=0: holds a run with train\.epochs=100, not 3"):
        sweep_config.load(write(grids=[EGNN], set={"train.epochs": 3}))


def test_without_time_or_lock_nothing_starts(write):
    plan = sweep_config.load(write(grids=[EGNN]))
    assert sweep.execute(plan, minutes=0) == {}
    assert plan.missing() == 2
    assert len(sweep.write_table(plan)) == 0
    with filesystem.lock_folder(plan.out, "busy"), pytest.raises(Failure, match="out: another sweep is at work there"):
        sweep.execute(plan)


def test_a_sweep_of_real_runs(write):
    """Two processes for two parts, one store for both seeds; a run that fails stops no other; nothing runs twice."""
    good = {"keys": {"model.name": ["FastEGNN"]}, "partition": {"parts": 2, "method": "random"}}
    bad = {"keys": {"data.features": [["absent"]]}}
    file = write(grids=[good, bad], seeds=[0, 1], set={"train.epochs": 2})
    ran = distegnn("sweep", str(file), "--jobs", "2", "--minutes", "60")
    assert ran.returncode == 1, ran.stderr
    assert "out: 2 of 4 runs are missing; repeat the command to do them\n" in ran.stdout
    failed = [line for line in ran.stderr.splitlines() if line.startswith("failed: ")]
    assert len(failed) == 2
    assert all("'absent'" in line and "features=" in line for line in failed)
    assert len(list(Path("out/stores").iterdir())) == 1

    (row,) = pd.read_csv("out/results.csv").to_dict("records")
    plan = sweep_config.load(file)
    done = [run for run in plan.runs if run.result() is not None]
    model = trainer.build_model(done[0].config, (1, 0), SingleProcess())
    expected = {"model.name": "FastEGNN", "seeds": 2, "epochs": 2, "processes": 2}
    assert {**row, **expected, "parameters": sum(p.numel() for p in model.parameters())} == row
    errors = [pd.read_csv(r.folder / "evaluate.csv").set_index("prediction")["mse"]["FastEGNN"] for r in done]
    assert errors[0] != errors[1]
    assert row["test_mse"] == pytest.approx(statistics.mean(errors), rel=1e-9)
    assert row["test_mse_std"] == pytest.approx(statistics.stdev(errors), rel=1e-6)
    epochs = [pd.read_csv(r.folder / "metrics.csv") for r in done]
    assert row["valid_mse"] == pytest.approx(statistics.mean(e["valid_mse"].min() for e in epochs))
    assert row["seconds"] == pytest.approx(statistics.mean(e["epoch_s"].sum() for e in epochs))
    assert "best validation MSE" in (done[0].folder / "log.txt").read_text()

    good_only = sweep_config.load(write(grids=[good], seeds=[0, 1], set={"train.epochs": 2}))
    before = {f: f.stat().st_mtime_ns for f in Path("out").glob("*/*")}
    assert sweep.execute(good_only) == {}
    assert good_only.missing() == 0
    assert {f: f.stat().st_mtime_ns for f in Path("out").glob("*/*")} == before


def test_a_killed_sweep_goes_on(write):
    """Its run ends with it; the next sweep ends with the numbers of a run that was never killed."""
    file = write(grids=[{"keys": {"model.name": ["EGNN"]}}], set={"train.epochs": 30})
    (run,) = sweep_config.load(file).runs
    command = [sys.executable, "-m", "dist_egnn.cli", "sweep", str(file)]
    killed = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 200
    while not (run.folder / "metrics.csv").exists():  # the first epoch
        assert time.monotonic() < until
        time.sleep(0.02)
    killed.kill()
    killed.wait()
    while True:
        assert time.monotonic() < until, "the run outlives its sweep"
        with contextlib.suppress(Failure), filesystem.lock_folder(run.folder, "it still runs"):
            break
        time.sleep(0.02)
    ran = distegnn("sweep", str(file))
    assert ran.returncode == 0, ran.stderr
    metrics = pd.read_csv(run.folder / "metrics.csv")
    assert metrics["epoch"].tolist() == list(range(30))

    run.config.run.dir = "whole"
    run_training(run.config)
    numbers = ["train_loss", "valid_mse"]
    pd.testing.assert_frame_equal(metrics[numbers], pd.read_csv("whole/metrics.csv")[numbers], rtol=0)
    result = json.loads(Path("out/name=EGNN,seed=0/result.json").read_text())
    assert (result["test_mse"], result["epochs"]) == (run_evaluation(Path("whole"))["EGNN"], 30)


def test_the_command(write):
    assert "  seeds: [0, 1, 2]\n" in distegnn("sweep", "--help").stdout  # the file, line by line
    ran = distegnn("sweep", str(write(grids=[EGNN], seed=[0])))
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr == "error: sweep.yaml: unknown key 'seed'; did you mean seeds?\n"


@pytest.mark.parametrize(("file", "settings"), [("nbody/sweep", 17), ("protein/sweep", 17), *FLUID])
def test_sweeps_of_the_recipes(monkeypatch, file, settings):
    """They are valid, and have as many runs as their first line says."""
    monkeypatch.chdir(ROOT)
    path = Path(f"recipes/{file}.yaml")
    plan = sweep_config.load(path)
    assert len(plan.runs) == 3 * settings
    assert f" {3 * settings} runs." in path.read_text().split("config:")[0]
    assert plan.x
    if plan.runs[0].config.data.path.endswith("sample.h5"):
        sweep_config.check_data(plan)
