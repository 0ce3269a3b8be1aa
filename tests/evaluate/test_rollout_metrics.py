"""Evaluation of rollouts: uniform motion and a linear model, whose errors have a closed form."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dist_egnn import Trajectories, Writer, cli, config
from dist_egnn.distributed import comm
from dist_egnn.errors import Failure
from dist_egnn.evaluate import rollout_metrics, selection
from dist_egnn.evaluate.vtkhdf import Rollout
from dist_egnn.train import checkpoint, trainer

DT, HORIZON, STEPS, FRAMES = 0.5, 2, 6, 14
U = {2: np.array([0.3, -0.4, 0.0]), 3: np.array([0.0, 0.1, 0.2])}  # velocities of the test trajectories
BOX = np.array([[0.0, -9.0, -9.0], [4.0, 9.0, 9.0]])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """x = x0 + u t in a box; nodes of kind 1 do not move."""
    path, draw = tmp_path_factory.mktemp("uniform") / "a.h5", np.random.default_rng(0)
    with Writer(path, {}) as out:
        for k, split in enumerate(("train", "valid", "test", "test")):
            x, kind = draw.uniform(0, 2, (40, 3)), np.r_[np.zeros(30), np.ones(10)]
            v = np.where(kind[:, None] == 0, U.get(k, U[2]), 0) * np.ones((FRAMES, 1, 1))
            t = DT * np.arange(FRAMES)[:, None, None]
            about = {"attributes": {"kind": kind, "mass": np.full(40, 3.0)}, "box": BOX, "gravity": [0, -1, 0]}
            out.add(x + v * t, split=split, dt=DT, source="", velocity=v, **about)
    return path


def make_run(folder: Path, data: Path, ratio: float) -> Path:
    """A run of the model x + ratio · v · (time of a step)."""
    keys = [f"data.path={data}", f"run.dir={folder}", f"data.horizon={HORIZON}", "data.radius=0.5", "data.features=[]"]
    keys += ["data.velocity_scale=1", "data.fixed=kind=1", "model.name=Linear"]
    made = config.load(None, keys)
    model = trainer.build_model(made, (0, 0), comm.SingleProcess())
    model.t.data.fill_(ratio * HORIZON * DT)  # type: ignore[union-attr, operator]
    folder.mkdir()
    (folder / "config.yaml").write_text(config.to_yaml(made))
    checkpoint.save(folder / "best.pt", checkpoint.weights_only(model, made))
    return folder


@pytest.mark.parametrize("ratio", [1.0, 1.1])
def test_errors_in_closed_form(tmp_path: Path, data: Path, ratio: float) -> None:
    """v_k = ratio^k u, so that the moving nodes are off by the vector Σ_{i≤k} (ratio^i − 1) u τ; at ratio 1 by none."""
    run, tau, file = make_run(tmp_path / "run", data, ratio), HORIZON * DT, Trajectories(data)
    table, stopped = rollout_metrics.evaluate_rollouts(run, STEPS)
    assert (sorted(set(table["trajectory"])), stopped) == ([2, 3], {})
    written = pd.read_csv(run / rollout_metrics.FILE, float_precision="round_trip")
    pd.testing.assert_frame_equal(written, table, check_dtype=False)
    off = tau * (np.cumsum(ratio ** np.arange(STEPS + 1.0)) - np.arange(STEPS + 1) - 1)
    for k, rows in table.set_index("step").groupby("trajectory"):
        u2 = U[k] @ U[k]
        steps = np.arange(STEPS + 1)
        close = {"rtol": 1e-4, "atol": 1e-10}
        np.testing.assert_allclose(rows["mse"], off**2 * u2 / 3, **close)
        np.testing.assert_allclose(rows["static_mse"], (steps * tau) ** 2 * u2 / 3, **close)
        np.testing.assert_allclose(rows["linear_mse"], 0, atol=1e-12)
        np.testing.assert_allclose(rows["kinetic_energy"], 30 * 3 * u2 / 2 * ratio ** (2 * steps), rtol=1e-4)
        np.testing.assert_allclose(rows["energy_error"], ratio ** (2 * steps) - 1, rtol=1e-4, atol=1e-5)
        shifted = rows["sinkhorn"].dropna()
        assert [*shifted.index] == [1, 2, 4, 5, 6]
        np.testing.assert_allclose(shifted, off[shifted.index] ** 2 * u2, rtol=1e-2, atol=1e-4)
        flow = {2: [1.0, 0, 0], 3: [0, 0, 1.0]}[k]  # horizontal: normal to gravity
        frames = [file.position(k, HORIZON * step)[:30].astype(float) for step in steps]
        fronts = [np.quantile(x @ flow, 0.95) for x in frames]
        np.testing.assert_allclose(rows["true_front"], fronts, rtol=1e-6)
        np.testing.assert_allclose(rows["front"], fronts + off * (U[k] @ flow), rtol=1e-5)
        x = frames[STEPS] + off[STEPS] * U[k]
        assert rows["outside"][STEPS] == np.mean((x[:, 0] > 4) | (x[:, 0] < 0))
        assert rows["true_outside"][STEPS] == np.mean(frames[STEPS][:, 0] > 4)
        every = file.position(k, 0).astype(float)
        counts = (np.linalg.norm(every[:30, None] - every, axis=2) <= 0.5).sum(1) - 1
        assert (rows["neighbours"][0], rows["max_neighbours"][0]) == (counts.mean(), counts.max())
    summary = rollout_metrics.summarize(table)
    assert [*summary.index] == [1, 5, 6]
    lengths = np.array([np.linalg.norm(u) for u in U.values()])
    assert summary["rms"][5] == pytest.approx(off[5] * lengths.mean(), rel=1e-4, abs=1e-6)
    assert summary["static_std"][5] == pytest.approx(5 * tau * lengths.std(ddof=1), rel=1e-4)
    assert summary["mse"][5] == pytest.approx((off[1:6] ** 2).mean() * (lengths**2).mean() / 3, rel=1e-4, abs=1e-12)


@pytest.mark.parametrize("ratio", [1.0, 1.1, 40.0])
def test_the_error_that_chooses_a_checkpoint(tmp_path: Path, data: Path, ratio: float) -> None:
    """Two rollouts of three steps cover the validation trajectory; one that must stop counts with its limit."""
    run = make_run(tmp_path / "run", data, ratio)
    made = config.load(run / "config.yaml", ["train.select=rollout", "train.select_steps=3"])
    assert list(selection._windows(made, Trajectories(data))) == [(1, 0), (1, 7)]
    made.train.select_data = selection.trajectories_file(made)
    model = trainer.build_model(made, (0, 0), comm.SingleProcess())
    checkpoint.load_weights(model, checkpoint.load(run / "best.pt"), run / "best.pt")
    off = HORIZON * DT * (np.cumsum(ratio ** np.arange(4.0)) - np.arange(4) - 1)
    squares = off**2 * (U[2] @ U[2]) / 3
    if ratio == 40:
        squares[2:] = (10 * 18) ** 2  # ten sides of the box
    error = selection.rollout_error(comm.SingleProcess(), made, model, [])
    assert error == pytest.approx(squares[1:].mean(), rel=1e-4, abs=1e-10)


def test_a_rollout_that_stops_has_no_means_beyond(tmp_path: Path, data: Path, monkeypatch, capsys) -> None:
    """The energy grows by a factor of 25 in a step: over 30 after the second."""
    run = make_run(tmp_path / "run", data, 5.0)
    monkeypatch.setattr(sys, "argv", ["distegnn", "evaluate", str(run), "--rollout", "5", "--trajectory", "2"])
    cli.main()
    printed = capsys.readouterr()
    assert "warning: trajectory 2: stopped at step " in printed.err
    assert printed.out.splitlines()[-2].split() == ["5"]
    rows = pd.read_csv(run / rollout_metrics.FILE)
    assert [*rows["step"]] == [0, 1, 2, 3, 4, 5]
    assert rows["mse"].notna()[1]
    assert rows["mse"].isna()[5]


def test_all_trajectories_of_a_split_are_written(tmp_path: Path, data: Path, monkeypatch, capsys) -> None:
    """One after the other, also those after one that stops."""
    for ratio, code in ((1.0, 0), (5.0, 2)):
        run, out = make_run(tmp_path / f"run-{code}", data, ratio), tmp_path / f"out-{code}"
        arguments = ["rollout", str(run), "--trajectory", "test", "--steps", "3", "--out", str(out)]
        monkeypatch.setattr(sys, "argv", ["distegnn", *arguments])
        if code:
            with pytest.raises(SystemExit, match="2"):
                cli.main()
        else:
            cli.main()
        names = sorted(file.name for file in out.iterdir())
        assert names == [f"trajectory-{k}.{suffix}" for k in (2, 3) for suffix in ("csv", "vtkhdf")]
        with Rollout(out / "trajectory-3.vtkhdf") as frames:
            assert (frames.meta["trajectory"], len(frames)) == (3, 2 if code else 4)
    assert f"error: {out}: 2 of 2 rollouts stopped early" in capsys.readouterr().err


def test_wrong_options_are_refused(tmp_path: Path, data: Path, monkeypatch, capsys) -> None:
    run = make_run(tmp_path / "run", data, 1.0)
    for options, message in (
        ({"steps": 7}, r"rollout of 7 steps: trajectory 2 of .*a\.h5 ends 6 steps after frame 0; use at most 6"),
        ({"steps": 6, "start": 3}, r"ends 5 steps after frame 3"),
        ({"steps": 1, "trajectory": 9}, r"--trajectory 9: .* 0 to 3"),
        ({"steps": 1, "trajectory": "some"}, r"--trajectory some: use a number, all, "),
    ):
        with pytest.raises(Failure, match=message):
            rollout_metrics.evaluate_rollouts(run, **options)
    (run / rollout_metrics.FILE).mkdir()
    table, _ = rollout_metrics.evaluate_rollouts(run, 1, trajectory=2)  # the measures are returned all the same
    assert len(table) == 2
    assert f"warning: {run / rollout_metrics.FILE}" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["distegnn", "evaluate", str(run), "--start", "1"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "--start: is an option of rollouts; add --rollout" in capsys.readouterr().err
