"""`distegnn sweep`: sweep files and their errors, the numbers of the table, and sweeps of real runs, with a kill."""

from __future__ import annotations

import contextlib
import json
import math
import re
import statistics
import subprocess
from pathlib import Path

import pandas as pd
import pytest
import yaml
from processes import GUARD_S, kill, wait_until

from dist_egnn import config
from dist_egnn.commands import sweep, sweep_config
from dist_egnn.commands.evaluate import run_evaluation
from dist_egnn.commands.train import run_training
from dist_egnn.distributed.comm import SingleProcess
from dist_egnn.errors import Failure
from dist_egnn.evaluate.rollout_metrics import evaluate_rollouts, summarize
from dist_egnn.train import trainer
from dist_egnn.utils import filesystem

ROOT = Path(__file__).parents[2]
RECIPES = {"nbody/sweep": 17, "protein/sweep": 17, "fluid113k/sweep-partition": 11, "fluid113k/sweep-mmd": 25}


@pytest.fixture
def write(tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch):
    """write(**keys): a sweep file in an empty working folder, on a small base config; its path."""
    monkeypatch.chdir(tmp_path)
    data = {"path": str(small), "radius": 0.27, "horizon": 3, "frames": 2, "features": ["mass"]}
    Path("base.yaml").write_text(yaml.safe_dump({"data": data, "model": {"hidden": 8, "layers": 1}}), encoding="utf-8")

    def make(**keys) -> Path:
        path = Path("sweep.yaml")
        path.write_text(
            yaml.safe_dump({"config": "base.yaml", "out": "out", **keys}, sort_keys=False), encoding="utf-8"
        )
        return path

    return make


def write_result(run: sweep_config.Run, test_mse: float, **numbers: float) -> None:
    run.folder.mkdir(parents=True, exist_ok=True)
    result = {**dict.fromkeys(sweep.NUMBERS, 1.0), "test_mse": test_mse, **numbers}
    (run.folder / "result.json").write_text(json.dumps(result))


def test_runs_of_a_file(write):
    """The first seed of every setting comes first; two grids may share a run; runs that are cut alike share a store."""
    first = {"keys": {"model.name": ["EGNN", "FastEGNN"]}, "set": {"train.lr": 1e-3}}
    second = {"keys": {"model.name": ["EGNN", "FastEGNN"]}, "partition": {"parts": 2, "method": "random"}}
    third = {"keys": {"train.lr": [0.001], "model.name": ["EGNN"], "data.edge_drop": [0, 1]}}
    plan = sweep_config.load(write(grids=[first, second, third], seeds=[3, 1], set={"train.epochs": 7}))
    configs = [run.config for run in plan.runs]
    assert [c.train.seed for c in configs] == [3] * 5 + [1] * 5
    assert [c.model.name for c in configs] == ["EGNN", "FastEGNN", "EGNN", "FastEGNN", "EGNN"] * 2
    assert [c.partition.parts for c in configs] == [0, 0, 2, 2, 0] * 2
    assert {c.train.epochs for c in configs} == {7}
    assert [c.train.lr for c in configs] == [1e-3, 1e-3, 5e-4, 5e-4, 1e-3] * 2
    assert plan.varying == ["model.name", "train.lr", "data.edge_drop", "partition.parts", "partition.method"]
    # the first grid leaves edge_drop out; the third names it for the run they share
    assert [r.cell("data.edge_drop") for r in plan.runs[:5]] == ["0", "", "", "", "1"]
    assert [r.store is None for r in plan.runs[:5]] == [True, True, False, False, True]
    assert plan.runs[2].store == plan.runs[3].store == plan.runs[7].store
    assert str(plan.runs[2].folder) == "out/name=EGNN,parts=2,method=random,seed=3"


EGNN = {"keys": {"model.name": ["EGNN", "FastEGNN"]}}
PLOT = {"x": "train.lr", "lines": ["train.lr"]}
MISTAKES = {  # of a file
    "unknown key 'grid'; did you mean grids?": {"grid": [EGNN]},
    "unknown key 'data'; this is a config": {"data": {"radius": 1}},
    "key 'grids' is missing": {},
    "grids must be a list that is not empty": {"grids": []},
    "set: unknown key 'train.seed'; the sweep sets it": {"grids": [EGNN], "set": {"train.seed": 1}},
    "seeds=[0, 0]": {"grids": [EGNN], "seeds": [0, 0]},
    "baseline, keys that vary: unknown key 'model.hidden'": {"grids": [EGNN], "baseline": {"model.hidden": 8}},
    "baseline: no run has model.name=Linear": {"grids": [EGNN], "baseline": {"model.name": "Linear"}},
    "plot: key 'x' is missing": {"grids": [EGNN], "plot": {"lines": ["model.name"]}},
    "rollout: key 'steps' is missing": {"grids": [EGNN], "rollout": {"start": 1}},
    "rollout: steps must be a whole number": {"grids": [EGNN], "rollout": {"steps": 0}},
    "plot: runs differ in more": {"grids": [{"keys": {**EGNN["keys"], "train.lr": [1, 2]}}], "plot": PLOT},
}
GRID_MISTAKES = {
    "grids[0]: unknown key 'key'; did you mean keys?": {"key": {}},
    "grids[0].keys: unknown key 'model.nam'; did you mean model.name?": {"keys": {"model.nam": ["EGNN"]}},
    "grids[0].keys: model.name must be a list": {"keys": {"model.name": "EGNN"}},
    "grids[0]: model.name=EGN: unknown; did you mean EGNN?": {"keys": {"model.name": ["EGN"]}},
    "grids[0]: data.edge_drop=2.0: must lie in": {"keys": {"data.edge_drop": [0, 2]}},
    "grids[0].set: unknown key 'train.epoch'; did you mean train.epochs?": {"set": {"train.epoch": 3}},
    "grids[0].partition: unknown key 'part'; did you mean parts?": {"partition": {"part": 3}},
    "names of runs must differ": {"keys": {"data.path": ["a/b.h5", "a?b.h5"]}},
}


def test_mistakes_in_a_file_and_in_its_data(write, make_store):
    for says, keys in {**MISTAKES, **{says: {"grids": [grid]} for says, grid in GRID_MISTAKES.items()}}.items():
        with pytest.raises(Failure, match=rf"^sweep\.yaml: .*{re.escape(says)}.*\Z"):  # one line
            sweep_config.load(write(**keys))
    other = {"data.path": str(make_store(2)), "data.frames": 3}  # made with other features
    for given, match in (({"data.path": "absent.h5"}, r"absent\.h5"), (other, r"data\.features=.* in the config")):
        with pytest.raises(Failure, match=match):
            sweep_config.check_data(sweep_config.load(write(grids=[{"set": given}])))
    with pytest.raises(Failure, match=r"rollout of 99 steps.*small\.h5.*use at most"):
        sweep_config.check_data(sweep_config.load(write(grids=[EGNN], rollout={"steps": 99})))
    assert not Path("out").exists()


def test_table_and_plot(write):
    """Means, deviations and ratios, each to the baseline at its own edge_drop; not all seeds are finished."""
    both = {"keys": {"model.name": ["EGNN", "FastEGNN"], "data.edge_drop": [0, 0.5]}}
    grids, plot = [both, {"keys": {"model.name": ["Linear"]}}], {"x": "data.edge_drop", "lines": ["model.name"]}
    plan = sweep_config.load(write(grids=grids, seeds=[0, 1, 2], baseline={"model.name": "EGNN"}, plot=plot))
    errors = {("EGNN", "0"): [2.0, 4.0], ("EGNN", "0.5"): [5.0], ("FastEGNN", "0"): [1.0, 2.0], ("Linear", ""): [7.0]}
    for run in plan.runs:
        seeds = errors.get((run.cell("model.name"), run.cell("data.edge_drop")), [])
        if run.config.train.seed < len(seeds):
            write_result(run, seeds[run.config.train.seed], epochs=10 * (1 + run.config.train.seed))
    table = sweep.write_table(plan)
    assert plan.missing() == 15 - 6
    assert table["model.name"].tolist() == ["EGNN", "EGNN", "FastEGNN", "Linear"]
    assert table["seeds"].tolist() == [2, 1, 2, 1]
    assert table["test_mse"].tolist() == [3.0, 5.0, 1.5, 7.0]
    assert table["test_mse_std"].tolist() == pytest.approx([2**0.5, math.nan, 0.5**0.5, math.nan], nan_ok=True)
    # Linear has no edge_drop to compare at
    assert table["of_baseline"].tolist() == pytest.approx([1.0, 1.0, 0.5, math.nan], nan_ok=True)
    assert table["epochs"].tolist() == [15, 10, 15, 10]
    assert pd.read_csv("out/results.csv")["test_mse"].tolist() == table["test_mse"].tolist()
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


def test_without_time_or_lock_or_with_other_settings_nothing_starts(write):
    plan = sweep_config.load(write(grids=[EGNN]))
    assert sweep.execute(plan, minutes=0) == {}
    assert (plan.missing(), len(sweep.write_table(plan))) == (2, 0)
    with filesystem.lock_folder(plan.out, "busy"), pytest.raises(Failure, match="out: another sweep is at work there"):
        sweep.execute(plan)
    run = plan.runs[0]
    run.folder.mkdir(parents=True)
    (run.folder / "wanted.yaml").write_text(config.to_yaml(run.config))
    sweep_config.load(write(grids=[EGNN]))
    with pytest.raises(Failure, match=r"name=EGNN,seed=0: holds a run with train\.epochs=100, not 3"):
        sweep_config.load(write(grids=[EGNN], set={"train.epochs": 3}))


def test_a_sweep_of_real_runs(write, distegnn, small, capsys):
    """Two processes for two parts, one store for both seeds; a run that fails stops no other; nothing runs twice."""
    good = {"keys": {"model.name": ["FastEGNN"]}, "partition": {"parts": 2, "method": "random"}}
    file = write(grids=[good, {"keys": {"data.features": [["absent"]]}}], seeds=[0, 1], set={"train.epochs": 2})
    command = [distegnn, "sweep", "sweep.yaml", "--jobs", "2", "--minutes", "60"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=GUARD_S)
    assert ran.returncode == 1, ran.stderr
    assert "out: 2 of 4 runs are missing; repeat the command to do them\n" in ran.stdout
    assert len(re.findall(r"^failed: (?=.*features=).*'absent'", ran.stderr, re.M)) == 2
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

    judged = sweep_config.load(
        write(grids=[good], seeds=[0, 1], set={"train.epochs": 2}, rollout={"steps": 1, "start": 3})
    )
    assert judged.missing() == 2  # trained already: only their rollouts are missing
    before = {run.folder: (run.folder / "last.pt").stat().st_mtime_ns for run in judged.runs}
    assert sweep.execute(judged, jobs=2) == {}
    assert {run.folder: (run.folder / "last.pt").stat().st_mtime_ns for run in judged.runs} == before
    rms = [summarize(evaluate_rollouts(r.folder, 1, start=3, data=small)[0])["rms"][1] for r in judged.runs]
    (row,) = sweep.write_table(judged).to_dict("records")
    assert [row["rms_1"], row["rms_1_std"]] == pytest.approx([statistics.mean(rms), statistics.stdev(rms)], rel=1e-6)
    sweep.print_results(judged, sweep.write_table(judged), {})
    assert f"{row['rms_1']:.3g} ± {row['rms_1_std']:.1g}" in capsys.readouterr().out


def test_a_rollout_that_stopped_has_no_error(write, capsys):
    plan = sweep_config.load(write(grids=[EGNN], seeds=[0, 1], rollout={"steps": 20}))
    errors = {"rms_20": 0.5, "energy_error": 0.1, "outside": 0.0, "rollout": {"steps": 20}}
    for run in plan.runs:
        lost = run.setting == "name=FastEGNN" and run.config.train.seed
        write_result(run, 1.0, **errors | ({"rms_20": math.nan} if lost else {}))
    table = sweep.write_table(plan)
    assert table["rms_20"].tolist() == pytest.approx([0.5, math.nan], nan_ok=True)
    sweep.print_results(plan, table, {})
    assert "stopped" in capsys.readouterr().out


def is_free(folder: Path) -> bool:
    with contextlib.suppress(Failure), filesystem.lock_folder(folder, "it still runs"):
        return True
    return False


def test_a_killed_sweep_goes_on(write, distegnn):
    """Its run ends with it; the next sweep ends with the numbers of a run that was never killed."""
    (run,) = sweep_config.load(write(grids=[{"keys": {"model.name": ["EGNN"]}}], set={"train.epochs": 30})).runs
    command = [distegnn, "sweep", "sweep.yaml"]
    killed = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until((run.folder / "metrics.csv").exists, "the first epoch", killed)
    kill(killed)
    wait_until(lambda: is_free(run.folder), "the end of the killed sweep's run")
    subprocess.run(command, check=True, timeout=GUARD_S)
    metrics = pd.read_csv(run.folder / "metrics.csv")
    assert metrics["epoch"].tolist() == list(range(1, 31))

    run.config.run.dir = "whole"
    run_training(run.config)
    numbers = ["train_loss", "valid_mse"]
    pd.testing.assert_frame_equal(metrics[numbers], pd.read_csv("whole/metrics.csv")[numbers], rtol=0)
    result = json.loads(Path("out/name=EGNN,seed=0/result.json").read_text(encoding="utf-8"))
    assert (result["test_mse"], result["epochs"]) == (run_evaluation(Path("whole"))["EGNN"], 30)


@pytest.mark.parametrize(("file", "settings"), RECIPES.items())
def test_sweeps_of_the_recipes(monkeypatch, file, settings):
    """They are valid, and have as many runs as their first line says."""
    monkeypatch.chdir(ROOT)
    path = Path(f"recipes/{file}.yaml")
    plan = sweep_config.load(path)
    assert len(plan.runs) == 3 * settings
    assert f" {3 * settings} runs." in path.read_text(encoding="utf-8").split("config:")[0]
    assert plan.x
    if plan.runs[0].config.data.path.endswith("sample.h5"):
        sweep_config.check_data(plan)
