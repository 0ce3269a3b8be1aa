"""parts × replicas: groups that share the batches of a step train what one group trains, and end as one."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import PLAIN_TRAIN, ActAfterStep, assert_same, outcome, resume_training, settings

from dist_egnn import config
from dist_egnn.commands.evaluate import run_evaluation
from dist_egnn.commands.train import run_training
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
    """Models are in float64, so that sums of groups differ by rounding at 1e-16, and have large output weights."""
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


def _optimise(world: comm.Comm, settings: config.Config) -> Result:
    """Two epochs: gradients of every step by name, sums, validation errors, and weights."""
    group = world.split(settings.train.replicas)
    read = dataset.open_dataset(settings, group.rank, world.size)
    if world.size == 1 and dataset.is_store(settings.data.path):
        store = Store(settings.data.path)
        read.read = lambda n: store.whole(n, settings.partition.halo == "exchange")
    with doubled():
        model = trainer.build_model(settings, read.widths, group)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    result, state = Result(steps=0), TrainingState()
    for epoch in range(2):
        for _ in trainer.Trainer(group, settings, model, optimizer, read, state).steps():
            result["steps"] += 1
            for name, p in model.named_parameters():
                result[f"gradient {result['steps']} {name}"] = p.grad.numpy().copy()
        result |= {f"{name} {epoch}": state.sums[name] for name in ("loss", "mse", "batches", "grad_norm")}
        result[f"valid {epoch}"] = valid = trainer.evaluate_split(model, read, "valid", settings, group)
        state.end_epoch(valid, settings.train)
    return result | {f"weight {name}": p.detach().numpy() for name, p in model.named_parameters()}


def _optimise_all(world: comm.Comm, settings: list[config.Config]) -> list[Result]:
    return [_optimise(world, each) for each in settings]


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
    """Six training samples in steps of four and two batches, or of two and one, which leaves one of two groups idle."""
    width = ["model.hidden=8", "model.layers=2", "train.clip=0", f"train.replicas={replicas}"]
    none, plain = small.parent / "none", settings(small, small.parent / "none", *width, "train.accumulate=4")
    halved = [*width, "train.batch_size=2", "train.accumulate=2", "partition.parts=2"]
    return [*(settings(store, none, *halved, f"partition.halo={mode}") for mode in ("bridge", "exchange")), plain]


def test_groups_train_what_one_process_does(small, make_store):
    """2 × 2 in bridge and in halo mode, and 1 × 4, plain data parallelism."""
    store = make_store(2, "metis")
    many = _cases(small, store, 2)
    many[-1].train.replicas = 4
    expected = _optimise_all(comm.SingleProcess(), _cases(small, store, 1))
    assert [one["steps"] for one in expected] == [4, 4, 4]
    for results in spawn.run_ranks(_optimise_all, 4, many):
        for result, one in zip(results, expected, strict=True):
            _same(result, one)


def _double(train: Callable[..., Any], *given: Any) -> Any:
    with doubled():
        return train(*given)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_ends_early_continues_with_another_number_of_groups(small, tmp_path, monkeypatch, number):
    """Rank 1 receives a signal in the second epoch; one process continues and ends where one process ends."""
    more, plain = ["train.epochs=3", "train.lr=1e-3"], partial(_double, PLAIN_TRAIN)
    monkeypatch.setattr(trainer, "train", plain)
    run_training(settings(small, tmp_path / "one", *more))
    monkeypatch.setattr(trainer, "train", partial(_double, ActAfterStep(4, 1, signal.raise_signal, number)))
    with pytest.raises(Failure if number == signal.SIGKILL else signals.Stopped):
        run_training(settings(small, tmp_path / "two", *more, "train.replicas=2"))
    monkeypatch.setattr(trainer, "train", plain)
    resume_training(tmp_path / "two", ["train.replicas=1"])
    one, two = outcome(tmp_path / "one"), outcome(tmp_path / "two")
    for name, value in one.items():
        if isinstance(value, torch.Tensor):
            assert torch.allclose(value.double(), two[name].double(), rtol=1e-8, atol=1e-10), name
    rows = [[[float(cell) for cell in row] for row in each["rows"]] for each in (one, two)]
    assert len(rows[0]) == 3
    for a, b in zip(*rows, strict=True):
        assert b == pytest.approx(a, rel=1e-6)


def _hangs(world: comm.Comm) -> None:
    group = world.split(2)
    if world.rank == 3:
        signal.raise_signal(signal.SIGSTOP)
    group.sum(torch.ones(3))


def test_a_group_gives_up_a_rank_that_hangs() -> None:
    """torch would give a group of some ranks half an hour, whatever the group of all was given."""
    with pytest.raises(RuntimeError, match=r"(?is)process 2 of 4: .*time"):
        spawn.run_ranks(_hangs, 4, timeout_s=10)


def test_evaluation_is_shared(small: Path, tmp_path: Path) -> None:
    """Plain data parallelism by the command's own functions: three groups, three test samples, no store."""
    more = ["train.epochs=1", "train.accumulate=3", "train.warmup=0"]
    run_training(settings(small, tmp_path, *more, "train.replicas=3"))
    many = run_evaluation(tmp_path)
    one = trainer.evaluate(comm.SingleProcess(), settings(small, tmp_path, *more), tmp_path / "best.pt")
    assert many == pytest.approx(one, rel=1e-6)


def test_divergence_ends_all_groups_with_one_message(small: Path, tmp_path: Path) -> None:
    messages = set()
    for replicas in (1, 2):
        run = tmp_path / f"{replicas}"
        with pytest.raises(Failure, match=r"last\.pt") as caught:
            run_training(settings(small, run, "train.lr=1e30", "train.clip=0", f"train.replicas={replicas}"))
        messages.add(str(caught.value).replace(str(run), "RUN"))
    assert len(messages) == 1


def test_groups_that_would_never_work_are_refused(small: Path, tmp_path: Path) -> None:
    chosen = settings(small, tmp_path / "run", "train.accumulate=9", "train.replicas=3", "train.batch_size=4")
    with pytest.raises(Failure, match=r"train\.replicas=3: .* only 2 batches of train\.batch_size=4"):
        run_training(chosen)
    assert not (tmp_path / "run" / "config.yaml").exists()
    with pytest.raises(Failure, match=r"train\.replicas"):
        plan.make_plan(chosen)


@pytest.mark.servers
def test_launch_trains_the_same(make_store, tmp_path, monkeypatch):
    """Two groups beside one server, bit for bit; in a folder with a file that is not DGL."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dgl.py").write_text("raise SystemExit('a file of the user, not DGL')\n")
    store, more = make_store(1, shard_nodes=0), ["train.epochs=2", "train.replicas=2"]
    spawn.run_ranks(trainer.train, 2, settings(store, tmp_path / "local", *more))
    options = {"resume": False, "port": 0, "max_restarts": 3, "dry_run": False, "dispatch": False, "plan": False}
    main.run(settings(store, tmp_path / "launched", *more), [hostfile.LOCALHOST], **options)
    assert_same(tmp_path / "launched", tmp_path / "local")


def test_ranks_are_where_their_parts_are() -> None:
    """Two groups of four ranks on two machines, and as the trainers count."""
    chosen = config.load(None, ["train.replicas=2", "train.accumulate=2"])
    job = supervisor.Job(chosen, ["a", "b"], ["lo", "lo"], 2, [1, 1], False, 0, 0)
    assert job.ranks() == [0, 0, 1, 1, 0, 0, 1, 1]
