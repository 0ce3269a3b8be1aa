"""parts × replicas: groups that share the batches of a step train what one group trains, and end as one."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import PLAIN_TRAIN, ActAfterStep, assert_same, outcome, settings

from dist_egnn import config
from dist_egnn.commands.evaluate import run_evaluation
from dist_egnn.commands.train import resume_training, run_training
from dist_egnn.data import dataset
from dist_egnn.data.store import Store
from dist_egnn.distributed import comm, spawn
from dist_egnn.errors import Failure
from dist_egnn.evaluate import parallel_check
from dist_egnn.launch import hostfile, main, supervisor
from dist_egnn.planning import plan
from dist_egnn.train import trainer
from dist_egnn.train.state import TrainingState
from dist_egnn.utils import signals


@contextmanager
def doubled() -> Iterator[None]:
    """Models are in float64, so that nothing but rounding at 1e-16 parts the sums of groups; their last weights at full
    size."""
    plain = trainer.build_model

    def build(*given: Any) -> torch.nn.Module:
        model = plain(*given).double()
        parallel_check.randomize_output_weights(model)
        return model

    trainer.build_model = build
    try:
        yield
    finally:
        trainer.build_model = plain


Result = dict[str, Any]


def _optimise(world: comm.Comm, settings: list[config.Config]) -> list[Result]:
    """For each config, two epochs: gradients of every step by name, what the sums came to, validation, and weights."""
    return [_one(world, each) for each in settings]


def _one(world: comm.Comm, settings: config.Config) -> Result:
    group = world.split(settings.train.replicas)
    read = dataset.open_dataset(settings, group.rank, world.size)
    if world.size == 1 and dataset.is_store(settings.data.path):
        store = Store(settings.data.path)
        read.read = lambda n: store.whole(n, settings.partition.halo == "exchange")
    with doubled():
        model = trainer.build_model(settings, read.widths, group)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    found: Result = {"steps": 0, "calls": []}
    state = TrainingState()
    for epoch in range(2):
        for _ in trainer.Trainer(group, settings, model, optimizer, read, state).steps():
            found["steps"] += 1
            for name, p in model.named_parameters():
                found[f"gradient {found['steps']} {name}"] = p.grad.numpy().copy()
        for name in ("loss", "mse", "batches", "grad_norm"):
            found[f"{name} {epoch}"] = state.sums[name]
        found[f"valid {epoch}"] = valid = trainer.evaluate_split(model, read, "valid", settings, group)
        state.end_epoch(valid, settings.train)
    for name, p in model.named_parameters():
        found[f"weight {name}"] = p.detach().numpy().copy()
    return found


def _same(many: Result, one: Result) -> None:
    assert many.keys() == one.keys()
    largest = max(abs(g).max() for name, g in one.items() if name.startswith("gradient"))
    for name, value in one.items():
        if name.startswith("gradient"):  # one that symmetry makes zero is rounding only
            assert abs(many[name] - value).max() <= 1e-10 * max(abs(value).max(), 1e-3 * largest), name
        elif name.startswith("weight"):
            assert many[name] == pytest.approx(value, rel=1e-8, abs=1e-10), name
        else:  # what travels beside the gradients is float32
            assert many[name] == pytest.approx(value, rel=1e-10 if name.startswith("valid") else 1e-6), name


def _cases(small: Path, store: Path, replicas: int) -> list[config.Config]:
    """Of six training samples: steps of four and of two batches; of two and of one, which leaves one of two groups
    idle."""
    width = ["model.hidden=8", "model.layers=2", "train.clip=0", f"train.replicas={replicas}"]
    none = small.parent / "none"
    halved = ["train.batch_size=2", "train.accumulate=2", "partition.parts=2"]
    return [
        settings(store, none, *width, *halved),
        settings(store, none, *width, *halved, "partition.halo=exchange"),
        settings(small, none, *width, "train.accumulate=4"),
    ]


def test_groups_train_what_one_process_does(small: Path, make_store: Callable[..., Path]) -> None:
    """2 × 2 in bridge and in halo mode, and 1 × 4, plain data parallelism: gradients of each step, losses, validation,
    weights."""
    store = make_store(2, "metis")
    many = _cases(small, store, 2)
    many[-1].train.replicas = 4
    expected = _optimise(comm.SingleProcess(), _cases(small, store, 1))
    assert [one["steps"] for one in expected] == [4, 4, 4]
    for ranks in spawn.run_ranks(_optimise, 4, many):
        for found, one in zip(ranks, expected, strict=True):
            _same(found, one)


class DoubleActAfterStep(ActAfterStep):
    """ActAfterStep in float64."""

    def __call__(self, *given: Any) -> Any:
        with doubled():
            return super().__call__(*given)


def _double(*given: Any) -> Any:
    with doubled():
        return PLAIN_TRAIN(*given)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_ends_early_goes_on_with_another_number_of_groups(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: int
) -> None:
    """Rank 1 is killed, or asked to stop, in the second epoch; one process goes on and ends where one process ends."""
    more = ["train.epochs=3", "train.lr=1e-3"]
    monkeypatch.setattr(trainer, "train", _double)
    run_training(settings(small, tmp_path / "one", *more))
    monkeypatch.setattr(trainer, "train", DoubleActAfterStep(4, 1, _signal, how))
    with pytest.raises(Failure if how == signal.SIGKILL else signals.Stopped):
        run_training(settings(small, tmp_path / "two", *more, "train.replicas=2"))
    monkeypatch.setattr(trainer, "train", _double)
    resume_training(tmp_path / "two", ["train.replicas=1"])
    one, two = outcome(tmp_path / "one"), outcome(tmp_path / "two")
    for name, value in one.items():
        if isinstance(value, torch.Tensor):
            assert torch.allclose(value.double(), two[name].double(), rtol=1e-8, atol=1e-10), name
    rows = [[[float(cell) for cell in row] for row in each["rows"]] for each in (one, two)]
    assert len(rows[0]) == 3
    for a, b in zip(*rows, strict=True):
        assert b == pytest.approx(a, rel=1e-6)


def _signal(how: int) -> None:
    os.kill(os.getpid(), how)


def _hangs(world: comm.Comm) -> None:
    group = world.split(2)
    if world.rank == 3:
        os.kill(os.getpid(), signal.SIGSTOP)
    group.sum(torch.ones(3))


def test_a_group_gives_up_a_rank_that_hangs() -> None:
    """torch would give a group of some ranks half an hour, whatever the group of all was given."""
    with pytest.raises(RuntimeError, match=r"(?is)process 2 of 4: .*time"):
        spawn.run_ranks(_hangs, 4, timeout_s=3)


def test_evaluation_is_shared(small: Path, tmp_path: Path) -> None:
    """Plain data parallelism by the command's own functions: three groups, three test samples, no store."""
    more = ["train.epochs=1", "train.accumulate=3", "train.warmup=0"]
    run_training(settings(small, tmp_path, *more, "train.replicas=3"))
    many = run_evaluation(tmp_path)
    one = trainer.evaluate(comm.SingleProcess(), settings(small, tmp_path, *more), tmp_path / "best.pt")
    assert many == pytest.approx(one, rel=1e-6)


def test_what_is_not_finite_ends_all_groups_with_one_line(small: Path, tmp_path: Path) -> None:
    messages = []
    for replicas in (1, 2):
        run = tmp_path / f"{replicas}"
        with pytest.raises(Failure, match="the last good checkpoint") as caught:
            run_training(settings(small, run, "train.lr=1e30", "train.clip=0", f"train.replicas={replicas}"))
        messages.append(str(caught.value).replace(str(run), "RUN"))
    assert messages[0] == messages[1]


def test_groups_that_would_never_work_are_refused(small: Path, tmp_path: Path) -> None:
    wanted = settings(small, tmp_path / "run", "train.accumulate=9", "train.replicas=3", "train.batch_size=4")
    with pytest.raises(Failure, match=r"train\.replicas=3: .* only 2 batches of train\.batch_size=4"):
        run_training(wanted)
    assert not (tmp_path / "run" / "config.yaml").exists()
    with pytest.raises(Failure, match=r"train\.replicas=3: .*train\.replicas=1"):
        plan.make_plan(wanted)


def test_launch_trains_the_same(
    make_store: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two groups beside one server, bit for bit; in a folder with a file that is not DGL."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dgl.py").write_text("raise SystemExit('a file of the user, not DGL')\n")
    local_, launched = (
        settings(make_store(1, shard_nodes=0), tmp_path / name, "train.epochs=2", "train.replicas=2")
        for name in ("local", "launched")
    )
    spawn.run_ranks(trainer.train, 2, local_)
    options = {"resume": False, "port": 0, "max_restarts": 3, "dry_run": False, "dispatch": False}
    main.run(launched, [hostfile.LOCALHOST], **options)
    assert_same(tmp_path / "launched", tmp_path / "local")


def test_ranks_are_where_their_parts_are() -> None:
    """Two groups of four ranks on two machines, and as the trainers count."""
    wanted = config.load(None, ["train.replicas=2", "train.accumulate=2"])
    job = supervisor.Job(wanted, ["a", "b"], ["lo", "lo"], 2, [1, 1], False, 0, 0)
    assert job.ranks() == [0, 0, 1, 1, 0, 0, 1, 1]
