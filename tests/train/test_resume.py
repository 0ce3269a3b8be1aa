"""A run that was killed, stopped, or taken to other parts ends as one that was never interrupted, bit for bit."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from small import falling_swirl
from tiny_runs import PLAIN_TRAIN, At, assert_same, settings

from dist_egnn import config
from dist_egnn.commands.evaluate import run_evaluation
from dist_egnn.commands.train import resume_training, run_training
from dist_egnn.data.trajectories import Writer
from dist_egnn.distributed import spawn
from dist_egnn.errors import Failure
from dist_egnn.train import checkpoint, run_dir, trainer
from dist_egnn.utils import signals

LONG, SHORT = "train.epochs=20", "train.epochs=4"  # 60 steps, 12 steps


@pytest.fixture(scope="module")
def inputs(small: Path, make_store: Callable[..., Path]) -> dict[int, Path]:
    """What to train on, by number of processes."""
    return {1: small, 2: make_store(2)}


@pytest.fixture(scope="module")
def whole(inputs: dict[int, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """whole(processes, *overrides): the folder of a run that nothing interrupted, made once."""
    made: dict[tuple[object, ...], Path] = {}

    def make(parts: int, *more: str) -> Path:
        key = (parts, *more)
        if key not in made:
            folder = tmp_path_factory.mktemp("whole") / "run"
            run_training(settings(inputs[parts], folder, *more))
            made[key] = folder
        return made[key]

    return make


@pytest.mark.parametrize("parts", [1, 2])
def test_two_runs_with_one_seed_are_equal(inputs, whole, tmp_path, parts):
    run_training(settings(inputs[parts], tmp_path / "again", SHORT))
    assert_same(tmp_path / "again", whole(parts, SHORT))
    run_training(settings(inputs[parts], tmp_path / "other", SHORT, "train.seed=1"))
    with pytest.raises(AssertionError):
        assert_same(tmp_path / "other", whole(parts, SHORT))


def _inode(path: Path) -> int:
    try:
        return path.stat().st_ino
    except FileNotFoundError:  # also while the new one takes the place of the old one
        return 0


def _killed(settings_: config.Config, again: bool, writes: int, then_s: float) -> bool:
    """Train in a process and kill -9 it some time after it wrote so many checkpoints; whether it was not done before."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dist_egnn.train.trainer"])
    process = context.Process(target=run_training, args=(settings_, again))
    last = Path(settings_.run.dir) / "last.pt"
    seen = _inode(last)
    process.start()
    while process.is_alive() and writes:
        if (now := _inode(last)) not in (seen, 0):
            seen, writes = now, writes - 1
        time.sleep(0.0005)
    time.sleep(then_s)
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


def test_killed_ten_times_at_random(inputs, whole, tmp_path):
    """Anywhere: in a step, in validation, in the midst of writing."""
    draw, chosen = random.Random(0), settings(inputs[1], tmp_path / "run", LONG)
    for k in range(10):
        assert _killed(chosen, run_dir.can_resume(tmp_path / "run"), draw.choice([1, 1, 2]), draw.uniform(0, 0.01)), (
            f"done before kill {k}"
        )
    state = checkpoint.load_last(tmp_path / "run")[0]
    assert (state["epoch"], state["step"]) > (2, 0)
    resume_training(tmp_path / "run", [])
    assert_same(tmp_path / "run", whole(1, LONG))
    starts = yaml.safe_load((tmp_path / "run" / "about.yaml").read_text())
    stands = [(s["epoch"], s["step"]) for s in starts]
    assert stands[0] == (0, 0)
    assert stands == sorted(stands)
    assert len({*stands}) > 5


class Died(BaseException):
    """As a kill: nothing may catch it."""


@pytest.mark.parametrize("nth", range(1, 13))
def test_killed_before_any_rename(inputs, whole, tmp_path, monkeypatch, nth):
    """The first rename makes the first checkpoint, the twelfth lies in the second epoch."""
    plain, count = os.replace, 0

    def replace(*paths: object) -> None:
        nonlocal count
        count += 1
        if count == nth:
            raise Died
        plain(*paths)

    chosen = settings(inputs[1], tmp_path / "run", SHORT, "train.checkpoint_minutes=10")
    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(Died):
        run_training(chosen)
    monkeypatch.setattr(os, "replace", plain)
    begun = (tmp_path / "run" / "config.yaml").exists()
    assert begun == (nth > 2)
    run_training(chosen, resume=begun)
    assert_same(tmp_path / "run", whole(1, SHORT))


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_ranks_killed(inputs, whole, tmp_path, monkeypatch):
    chosen = settings(inputs[2], tmp_path / "run", SHORT)
    for k, (step, rank) in enumerate([(2, 0), (4, 1), (1, 0)]):
        monkeypatch.setattr(trainer, "train", At(step, rank, _kill))
        with pytest.raises(Failure, match=f"process {rank} of 2 died"):
            run_training(chosen, resume=k > 0)
    monkeypatch.setattr(trainer, "train", PLAIN_TRAIN)
    resume_training(tmp_path / "run", [])
    assert_same(tmp_path / "run", whole(2, SHORT))


@pytest.mark.parametrize(("after", "steps", "number"), [(3, 3, "SIGTERM"), (4, 5, "SIGINT"), (5, 6, "SIGTERM")])
def test_a_signal_stops_at_the_end_of_the_step(inputs, whole, tmp_path, monkeypatch, capsys, after, steps, number):
    """It comes after an epoch's last step, after its first, and after its second: the step in work is done first."""
    _stop(inputs, whole, tmp_path, monkeypatch, capsys, At(after, 0, _send, 0, number), 1, steps)


@pytest.mark.parametrize("to", ["launcher", "rank"])
def test_a_signal_stops_all_ranks(inputs, whole, tmp_path, monkeypatch, capsys, to):
    """Whoever gets it: the launcher passes it on, a rank tells the others."""
    act = At(4, 1, _send, os.getpid() if to == "launcher" else 0, "SIGTERM")
    _stop(inputs, whole, tmp_path, monkeypatch, capsys, act, 2, None if to == "launcher" else 5)


def _send(to: int, number: str) -> None:
    os.kill(to or os.getpid(), getattr(signal, number))


def _stop(inputs, whole, tmp_path, monkeypatch, capsys, act: At, parts: int, steps: int | None) -> None:
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    monkeypatch.setattr(trainer, "train", act)
    with pytest.raises(SystemExit) as caught:
        run_training(settings(inputs[parts], tmp_path / "run", SHORT, "train.checkpoint_minutes=10"))
    assert caught.value.code == signals.EXIT_STOPPED == 75
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == before
    state = checkpoint.load(tmp_path / "run" / "last.pt")
    if steps is not None:
        assert 3 * state["epoch"] + state["step"] == steps
    line = (
        f"stopped in epoch {state['epoch']} after step {state['step']}; go on: distegnn train --resume {tmp_path}/run\n"
    )
    assert capsys.readouterr().err.endswith(line)
    monkeypatch.setattr(trainer, "train", PLAIN_TRAIN)
    resume_training(tmp_path / "run", [])
    assert_same(tmp_path / "run", whole(parts, SHORT))


def test_a_second_ctrl_c_is_an_interruption():
    with signals.catch_stop_signals():
        assert not signals.stop_requested()
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.stop_requested()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # nothing new
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert not signals.stop_requested()


def test_the_command(inputs, whole, tmp_path):
    """Ctrl-C and --resume as users type them; the last epochs are added by an override."""

    def distegnn(*words: object) -> list[str]:
        return [sys.executable, "-m", "dist_egnn.cli", *map(str, words)]

    path = tmp_path / "my.yaml"
    path.write_text(
        config.to_yaml(settings(inputs[1], tmp_path / "run", "train.epochs=5000", "train.schedule=constant"))
    )
    with subprocess.Popen(distegnn("train", path), stderr=subprocess.PIPE, text=True) as stopped:
        until = time.monotonic() + 100
        while not (tmp_path / "run" / "metrics.csv").exists():
            assert time.monotonic() < until
            assert stopped.poll() is None
            time.sleep(0.02)
        stopped.send_signal(signal.SIGINT)
        says = stopped.communicate(timeout=60)[1]
    assert stopped.returncode == 75
    assert f"go on: distegnn train --resume {tmp_path / 'run'}\n" in says
    epochs = checkpoint.load(tmp_path / "run" / "last.pt")["epoch"] + 2
    done = subprocess.run(
        distegnn("train", "--resume", tmp_path / "run", f"train.epochs={epochs}"), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert pd.read_csv(tmp_path / "run" / "metrics.csv")["epoch"].tolist() == list(range(epochs))
    assert config.load(tmp_path / "run" / "config.yaml").train.epochs == epochs
    for words, says in (
        (("train",), "the config is missing: distegnn train CONFIG, or distegnn train --resume RUN"),
        (("train", path, "--resume", tmp_path / "run"), "my.yaml: --resume .*/run goes on under the run's own config"),
    ):
        with pytest.raises(Failure, match=says):
            _in_process(*words)


def _in_process(*words: object) -> None:
    from dist_egnn import cli

    cli.app([*map(str, words)], standalone_mode=False)


# another number of parts


def test_on_another_number_of_parts(small, make_store, tmp_path, monkeypatch):
    """Without edges nothing is cut: from one process to two and back, the numbers are those of one, up to rounding."""
    free, run = ("data.edge_drop=1", "train.epochs=6"), tmp_path / "run"
    run_training(settings(small, tmp_path / "whole", *free))
    monkeypatch.setattr(trainer, "train", At(4, 0, _send, 0, "SIGTERM"))
    with pytest.raises(SystemExit):
        run_training(settings(small, run, *free))
    with pytest.raises(SystemExit):
        resume_training(run, [f"data.path={make_store(2, 'random', edge_drop=1.0)}"])
    monkeypatch.setattr(trainer, "train", PLAIN_TRAIN)
    resume_training(run, [f"data.path={small}"])
    rows, expected = (pd.read_csv(f / "metrics.csv") for f in (run, tmp_path / "whole"))
    assert rows["epoch"].tolist() == list(range(6))
    for column in ("train_loss", "valid_mse", "lr", "grad_norm"):
        assert rows[column].tolist() == pytest.approx(expected[column].tolist(), rel=1e-3)
    starts = yaml.safe_load((run / "about.yaml").read_text())
    assert [(s["processes"], s["epoch"], s["step"]) for s in starts] == [(1, 0, 0), (2, 1, 2), (1, 3, 0)]


def test_parts_made_at_a_resume(small, tmp_path):
    run_training(settings(small, tmp_path / "run", "train.epochs=1"))
    before = (tmp_path / "run" / "metrics.csv").read_bytes()
    resume_training(tmp_path / "run", ["partition.parts=2", "partition.method=random", "train.epochs=2"])
    assert (tmp_path / "run" / "metrics.csv").read_bytes().startswith(before)
    resumed = config.load(tmp_path / "run" / "config.yaml")
    assert resumed.data.path == str(tmp_path / "run" / "store-2")
    assert run_evaluation(tmp_path / "run")["FastEGNN"] > 0
    with pytest.raises(Failure, match=r"partition\.parts=3, but .* was made for 2"):
        resume_training(tmp_path / "run", ["partition.parts=3", "train.epochs=3"])


@pytest.mark.parametrize(("seeds", "frames", "what"), [(1, 14, "positions"), (0, 16, "frames")])
def test_other_data_are_refused(small, tmp_path, seeds, frames, what):
    """With as many trajectories, nodes and frames; and with other frames."""
    run_training(settings(small, tmp_path / "run", "train.epochs=1"))
    kept = {f: f.read_bytes() for f in (tmp_path / "run").iterdir() if f.is_file()}
    with Writer(tmp_path / "other.h5", {}) as out:
        for k, (nodes, split) in enumerate(zip((200, 250, 220, 210), ("train", "train", "valid", "test"), strict=True)):
            x, v, attributes = falling_swirl(nodes, k + seeds)
            x, v = (torch.cat([torch.from_numpy(a), torch.from_numpy(a[:2])])[:frames].numpy() for a in (x, v))
            out.add(x, split=split, dt=1.0, source="test", velocity=v, attributes=attributes)
    with pytest.raises(Failure, match=f"other.h5: its {what} are not those that .*/run was trained on"):
        resume_training(tmp_path / "run", [f"data.path={tmp_path / 'other.h5'}", "train.epochs=2"])
    assert {f: f.read_bytes() for f in (tmp_path / "run").iterdir() if f.is_file()} == kept


@pytest.mark.parametrize(
    "given", ["train.seed=1", "train.batch_size=2", "model.hidden=8", "loss.mmd=0", "data.radius=1"]
)
def test_what_decides_the_numbers_is_kept(whole, given):
    key, value = given.split("=")
    with pytest.raises(Failure, match=rf"{key}=.*, not {value}.*train\.epochs, "):
        resume_training(whole(1, SHORT), [given])


def test_a_run_at_its_end_stays_as_it_is(whole, capsys):
    kept = outcome_bytes(whole(1, SHORT))
    resume_training(whole(1, SHORT), [])
    assert "train.epochs=N" in capsys.readouterr().out
    assert outcome_bytes(whole(1, SHORT)) == kept


def outcome_bytes(run: Path) -> dict[str, bytes]:
    return {name: (run / name).read_bytes() for name in ("last.pt", "best.pt", "metrics.csv", "config.yaml")}


def _elsewhere(comm, chosen: config.Config) -> None:
    """Go on with a run whose folder only rank 0 sees, as on another host."""
    if comm.rank:
        chosen.run.dir = "/nowhere/run"
    trainer.train(comm, chosen, True)


def test_only_rank_0_needs_the_folder(inputs, whole, tmp_path):
    with pytest.raises(Failure, match=f"{tmp_path}/run/last.pt: no such checkpoint"):  # and not that of rank 1
        spawn.run_ranks(_elsewhere, 2, settings(inputs[2], tmp_path / "run", SHORT))
    run_training(settings(inputs[2], tmp_path / "run", "train.epochs=2", "train.schedule=constant"))
    run_training(settings(inputs[2], tmp_path / "other", SHORT, "train.schedule=constant"))
    spawn.run_ranks(_elsewhere, 2, settings(inputs[2], tmp_path / "run", SHORT, "train.schedule=constant"))
    assert_same(tmp_path / "run", tmp_path / "other")


def _shared(comm, contents: list[bytes]) -> list[bytes]:
    return [comm.broadcast(content if comm.rank == 0 else b"not mine") for content in contents]


@pytest.mark.parametrize("size", [1, 2])
def test_what_rank_0_shares(size):
    contents = [b"", b"a", bytes(range(256)) * 1000]
    assert spawn.run_ranks(_shared, size, contents) == [contents] * size


def _state(comm, chosen: config.Config) -> bytes:
    trainer.train(comm, chosen)
    return bytes(torch.get_rng_state().numpy())


def test_random_states_of_ranks_are_alike(inputs, tmp_path):
    """So a checkpoint needs rank 0's only."""
    first, second = spawn.run_ranks(_state, 2, settings(inputs[2], tmp_path / "run", "train.epochs=1"))
    assert first == second
