"""A run that was killed, stopped, or resumed on other parts ends as one that was never interrupted, bit for bit."""

from __future__ import annotations

import functools
import multiprocessing
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from processes import GUARD_S, wait_until
from small_data import falling_swirl
from tiny_runs import PLAIN_TRAIN, ActAfterStep, assert_same, file_contents, resume_training, settings

from dist_egnn import cli, config
from dist_egnn.commands.evaluate import run_evaluation
from dist_egnn.commands.train import run_training
from dist_egnn.data.trajectories import Writer
from dist_egnn.distributed import spawn
from dist_egnn.errors import Failure
from dist_egnn.train import checkpoint, run_dir, run_writer, trainer
from dist_egnn.utils import signals

LONG, SHORT = "train.epochs=10", "train.epochs=4"  # 30 steps, 12 steps
END_OF_EPOCH = "train.checkpoint_minutes=10"  # no checkpoints inside an epoch


@pytest.fixture(scope="module")
def inputs(small: Path, make_store: Callable[..., Path]) -> dict[int, Path]:
    """What to train on, by number of processes."""
    return {1: small, 2: make_store(2)}


@pytest.fixture(scope="module")
def whole(inputs: dict[int, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """whole(processes, *overrides): the folder of a run that nothing interrupted, made once."""

    @functools.cache
    def make(parts: int, *more: str) -> Path:
        run = tmp_path_factory.mktemp("whole") / "run"
        run_training(settings(inputs[parts], run, *more))
        return run

    return make


@pytest.mark.parametrize("parts", [1, 2])
def test_two_runs_with_one_seed_are_equal(inputs, whole, tmp_path, parts):
    run_training(settings(inputs[parts], tmp_path / "again", SHORT))
    assert_same(tmp_path / "again", whole(parts, SHORT))
    run_training(settings(inputs[parts], tmp_path / "other", SHORT, "train.seed=1"))
    with pytest.raises(AssertionError):
        assert_same(tmp_path / "other", whole(parts, SHORT))


def _train_and_die(chosen: config.Config, resume: bool, writes: int, delay_s: float) -> None:
    """Train; kill -9 this process some time after it wrote so many checkpoints."""
    save = run_writer.RunWriter.save

    def counting_save(*arguments: Any, **options: Any) -> None:
        nonlocal writes
        save(*arguments, **options)
        writes -= 1
        if writes == 0:
            threading.Timer(delay_s, os.kill, (os.getpid(), signal.SIGKILL)).start()
        elif writes < -2:  # the machine is so slow that the run might end before the kill
            time.sleep(GUARD_S)

    run_writer.RunWriter.save = counting_save
    run_training(chosen, resume)


def test_killed_four_times_at_random(inputs, whole, tmp_path):
    """In a step, in validation, or while writing."""
    draw, run = random.Random(0), tmp_path / "run"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dist_egnn.train.trainer"])
    for _ in range(4):
        start = (settings(inputs[1], run, LONG), run_dir.can_resume(run))
        process = context.Process(target=_train_and_die, args=(*start, draw.choice([2, 3, 3]), draw.uniform(0, 0.01)))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    state = checkpoint.last_state(run)
    assert (state.epoch, state.step) > (1, 0)
    resume_training(run, [])
    assert_same(run, whole(1, LONG))
    starts = [(s["epoch"], s["step"]) for s in yaml.safe_load((run / "about.yaml").read_text())]
    assert starts[0] == (1, 0)
    assert starts == sorted(starts)
    assert len({*starts}) > 2


class Killed(BaseException):
    """Stands for a kill: nothing may catch it."""


@pytest.mark.parametrize("nth", range(1, 13))
def test_killed_before_any_rename(inputs, whole, tmp_path, monkeypatch, nth):
    """The first rename makes the first checkpoint, the twelfth lies in the second epoch."""
    plain, count = os.replace, 0

    def replace(*paths: object) -> None:
        nonlocal count
        count += 1
        if count == nth:
            raise Killed
        plain(*paths)

    chosen = settings(inputs[1], tmp_path / "run", SHORT, END_OF_EPOCH)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(Killed):
            run_training(chosen)
    started = (tmp_path / "run" / "config.yaml").exists()
    assert started == (nth > 2)
    run_training(chosen, resume=started)
    assert_same(tmp_path / "run", whole(1, SHORT))


def test_killed_ranks(inputs, whole, tmp_path, monkeypatch):
    chosen = settings(inputs[2], tmp_path / "run", SHORT)
    for k, (step, rank) in enumerate([(2, 0), (4, 1), (1, 0)]):
        monkeypatch.setattr(trainer, "train", ActAfterStep(step, rank, signal.raise_signal, signal.SIGKILL))
        with pytest.raises(Failure, match=f"process {rank} of 2 died"):
            run_training(chosen, resume=k > 0)
    monkeypatch.setattr(trainer, "train", PLAIN_TRAIN)
    resume_training(tmp_path / "run", [])
    assert_same(tmp_path / "run", whole(2, SHORT))


STOPS: list[tuple] = [(1, 3, "rank", signal.SIGTERM, 3)]  # after the last step of an epoch
STOPS += [(1, 4, "rank", signal.SIGINT, 5)]  # after the first: the current step is completed
STOPS += [(1, 5, "rank", signal.SIGHUP, 6)]  # the terminal was closed
STOPS += [(2, 4, "rank", signal.SIGTERM, 5), (2, 4, "launcher", signal.SIGTERM, None)]  # rank 1 tells the other


def _stop(pid: int, number: int) -> None:
    """Send the launcher a signal, and wait until its request has reached this rank."""
    os.kill(pid, number)
    wait_until(signals.stop_requested, "the request to stop")


@pytest.mark.parametrize("case", STOPS)
def test_a_signal_stops_all_ranks_at_the_end_of_the_step(inputs, whole, tmp_path, monkeypatch, capsys, case):
    parts, after, to, number, steps = case
    run = tmp_path / "run"
    before = [signal.getsignal(s) for s in signals.STOP_SIGNALS]
    act = (_stop, os.getpid()) if to == "launcher" else (signal.raise_signal,)
    monkeypatch.setattr(trainer, "train", ActAfterStep(after, parts - 1, *act, number))
    with pytest.raises(SystemExit) as caught:
        run_training(settings(inputs[parts], run, SHORT, END_OF_EPOCH))
    assert caught.value.code == signals.EXIT_STOPPED == 75
    assert [signal.getsignal(s) for s in signals.STOP_SIGNALS] == before
    last = checkpoint.load(run / "last.pt")
    assert steps in (None, 3 * last["epoch"] + last["step"])
    error = capsys.readouterr().err
    assert f"stopped in epoch {last['epoch'] + 1} after step {last['step']}; " in error
    assert error.endswith(f"distegnn train --resume {run}\n")
    monkeypatch.setattr(trainer, "train", PLAIN_TRAIN)
    resume_training(run, [])
    assert_same(run, whole(parts, SHORT))


def test_a_second_ctrl_c_interrupts():
    with signals.catch_stop_signals():
        assert not signals.stop_requested()
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.stop_requested()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # no effect
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert not signals.stop_requested()


def test_the_command(inputs, tmp_path, distegnn):
    """Ctrl-C and --resume as users type them; an override adds the last epochs."""
    run, path = tmp_path / "run", tmp_path / "my.yaml"
    endless = settings(inputs[1], run, "train.epochs=1000000", "train.schedule=constant")
    path.write_text(config.to_yaml(endless))
    with subprocess.Popen([distegnn, "train", path], stderr=subprocess.PIPE, text=True) as process:
        wait_until((run / "metrics.csv").exists, "the first epoch", process)
        process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=GUARD_S)[1]
    assert process.returncode == 75
    assert f"distegnn train --resume {run}\n" in error
    epochs = checkpoint.load(run / "last.pt")["epoch"] + 2
    subprocess.run([distegnn, "train", "--resume", run, f"train.epochs={epochs}"], check=True)
    assert pd.read_csv(run / "metrics.csv")["epoch"].tolist() == list(range(1, epochs + 1))
    assert config.load(run / "config.yaml").train.epochs == epochs
    for arguments, message in (((), "config is missing"), ((path, "--resume", run), r"my\.yaml: --resume")):
        with pytest.raises(Failure, match=message):
            cli.app(["train", *map(str, arguments)], standalone_mode=False)


def test_on_another_number_of_parts(small, make_store, tmp_path, monkeypatch):
    """Without edges nothing is cut: from one process to two and back, the numbers are those of one, up to rounding."""
    free, run = ("data.edge_drop=1", "train.epochs=6"), tmp_path / "run"
    run_training(settings(small, tmp_path / "whole", *free))
    monkeypatch.setattr(trainer, "train", ActAfterStep(4, 0, signal.raise_signal, signal.SIGTERM))
    with pytest.raises(SystemExit):
        run_training(settings(small, run, *free))
    with pytest.raises(SystemExit):
        resume_training(run, [f"data.path={make_store(2, 'random', edge_drop=1.0)}"])
    monkeypatch.setattr(trainer, "train", PLAIN_TRAIN)
    resume_training(run, [f"data.path={small}"])
    rows, expected = (pd.read_csv(folder / "metrics.csv") for folder in (run, tmp_path / "whole"))
    assert rows["epoch"].tolist() == list(range(1, 7))
    for column in ("train_loss", "valid_mse", "lr", "grad_norm"):
        assert rows[column].tolist() == pytest.approx(expected[column].tolist(), rel=1e-3)
    starts = yaml.safe_load((run / "about.yaml").read_text())
    assert [(s["processes"], s["epoch"], s["step"]) for s in starts] == [(1, 1, 0), (2, 2, 2), (1, 4, 0)]


def test_a_resume_can_partition(small, tmp_path):
    run = tmp_path / "run"
    run_training(settings(small, run, "train.epochs=1"))
    before = (run / "metrics.csv").read_bytes()
    resume_training(run, ["partition.parts=2", "partition.method=random", "train.epochs=2"])
    assert (run / "metrics.csv").read_bytes().startswith(before)
    assert config.load(run / "config.yaml").data.path == str(run / "store-2")
    assert run_evaluation(run)["FastEGNN"] > 0
    with pytest.raises(Failure, match=r"partition\.parts=3"):
        resume_training(run, ["partition.parts=3", "train.epochs=3"])


@pytest.mark.parametrize(("seeds", "frames", "what"), [(1, 14, "positions"), (0, 16, "frames")])
def test_other_data_are_refused(small, tmp_path, seeds, frames, what):
    """With the same numbers of trajectories, nodes and frames; and with other frames."""
    run, other = tmp_path / "run", tmp_path / "other.h5"
    run_training(settings(small, run, "train.epochs=1"))
    before = file_contents(run)
    with Writer(other, {}) as out:
        for k, (nodes, split) in enumerate(zip((200, 250, 220, 210), ("train", "train", "valid", "test"), strict=True)):
            x, v, attributes = falling_swirl(nodes, k + seeds)
            x, v = (torch.cat([torch.from_numpy(a), torch.from_numpy(a[:2])])[:frames].numpy() for a in (x, v))
            out.add(x, split=split, dt=1.0, source="test", velocity=v, attributes=attributes)
    with pytest.raises(Failure, match=rf"other\.h5: its {what} are not those .* data\.path"):
        resume_training(run, [f"data.path={other}", "train.epochs=2"])
    assert file_contents(run) == before


def test_a_finished_run_stays_as_it_is_and_settings_that_decide_numbers_cannot_change(whole, capsys):
    before = file_contents(whole(1, SHORT))
    for key, value in {"train.seed": 1, "model.hidden": 8, "loss.mmd": 0, "data.radius": 1}.items():
        with pytest.raises(Failure, match=rf"{key}=.*, not {value}.*train\.epochs, "):
            resume_training(whole(1, SHORT), [f"{key}={value}"])
    resume_training(whole(1, SHORT), [])
    assert "set train.epochs" in capsys.readouterr().out
    assert {**file_contents(whole(1, SHORT)), "about.yaml": before["about.yaml"]} == before


def _resume_elsewhere(comm, chosen: config.Config) -> bytes:
    """Resume a run whose folder only rank 0 can see, as on another host; returns the random state at the end."""
    if comm.rank:
        chosen.run.dir = "/nowhere/run"
    trainer.train(comm, chosen, True)
    return bytes(torch.get_rng_state().numpy())


def test_only_rank_0_needs_the_folder(inputs, whole, tmp_path, monkeypatch):
    chosen = settings(inputs[2], tmp_path / "run", SHORT)
    with pytest.raises(Failure, match=f"{tmp_path}/run/last.pt: no such checkpoint"):  # and not that of rank 1
        spawn.run_ranks(_resume_elsewhere, 2, chosen)
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "train", ActAfterStep(6, 0, signal.raise_signal, signal.SIGTERM))
        with pytest.raises(SystemExit):
            run_training(chosen)
    first, second = spawn.run_ranks(_resume_elsewhere, 2, chosen)
    assert first == second  # the ranks' random states, so a checkpoint needs that of rank 0 only
    assert_same(tmp_path / "run", whole(2, SHORT))
