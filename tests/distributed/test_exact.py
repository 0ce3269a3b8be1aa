"""P real processes compute what one does on the same cut graph: outputs, loss, every gradient (float64, 1e-10)."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dgl
import pytest
import torch
import torch.distributed as dist
from processes import GUARD_S, has_ended, kill, wait_until

from dist_egnn import config
from dist_egnn.data.store import Store
from dist_egnn.distributed import comm, spawn
from dist_egnn.errors import Failure
from dist_egnn.evaluate import parallel_check
from dist_egnn.models import network
from dist_egnn.ops.native import library as native
from dist_egnn.train import trainer

SETTINGS = ["model.hidden=16", "model.layers=3", "loss.samples=4"]
OPTIONS = ["model.attention=true", "model.normalize=true", "model.tile=300", "model.engine=torch"]


CASES = [(parts, "metis", 1, overrides) for parts in (2, 4) for overrides in ([], OPTIONS)]
CASES += [(2, "random", 1, []), (2, "morton", 1, []), (2, "metis", 2, []), (4, "metis", 1, ["model.tile=10"])]
CASES += [(8, "metis", 1, []), (2, "metis", 1, ["train.threads=2", "model.tile=20"])]
if native.library():
    CASES += [(2, "metis", 1, ["model.engine=native", f"partition.halo={mode}"]) for mode in ("bridge", "exchange")]


def differences(store: Path, folder: Path, *overrides: str) -> dict[str, float]:
    return parallel_check.compare(config.load(None, [*SETTINGS, *overrides]), Store(store), 1, folder)


@pytest.mark.parametrize(("parts", "method", "trainers", "overrides"), CASES)
def test_many_processes_equal_one(make_store, tmp_path, parts, method, trainers, overrides):
    """With every partition, also with several trainers on each of two machines."""
    errors = differences(make_store(parts, method, trainers=trainers), tmp_path, *overrides)
    assert max(errors.values()) <= parallel_check.TOLERANCE, errors
    assert sum(name.startswith("gradient") for name in errors) > 40


def _each(group: comm.Comm, settings: dict[str, config.Config], path: str, folder: str) -> None:
    """Every model in one group of processes, which take longer to start than to compute."""
    for name, one in settings.items():
        parallel_check.save_rank_results(group, one, path, 1, f"{folder}/{name}")


@pytest.mark.parametrize("parts", [2, 4])
def test_many_processes_equal_one_for_every_model(make_store, tmp_path, parts):
    small = ["model.hidden=8", "model.layers=2", "loss.samples=4", "data.radius=0.27"]
    settings = {name: config.load(None, [f"model.name={name}", *small]) for name in network.MODELS}
    for name in ("EGNN", "RF", "SchNet"):
        settings[f"published {name}"] = config.load(None, [f"model.name={name}", "model.as_published=true", *small])
    store = Store(make_store(parts, "metis"))
    for name in settings:
        (tmp_path / name).mkdir()
    spawn.run_ranks(_each, parts, settings, str(store.path), str(tmp_path))
    for name, one in settings.items():
        errors = parallel_check.compare_with_one_process(one, store, 1, tmp_path / name)
        assert max(errors.values()) <= parallel_check.TOLERANCE, (name, errors)
        weights = len(list(trainer.build_model(one, (3, 1), comm.SingleProcess()).parameters()))
        assert sum(key.startswith("gradient") for key in errors) > weights / 2  # all but some of the last layer's


def _run_without(group: comm.Comm, missing: str, *args: object) -> None:
    """`save_rank_results` with one of the sums missing."""

    def forward(ctx: Any, t: torch.Tensor, own: object) -> torch.Tensor:
        ctx.comm = own
        return t.detach().clone()

    if missing == "forward":
        comm._Sum.forward = staticmethod(forward)  # type: ignore[method-assign]
    elif missing == "backward":
        comm._Sum.backward = staticmethod(lambda ctx, grad: (grad, None))  # type: ignore[method-assign]
    elif missing == "gradients":
        comm.ProcessGroup.sum_gradients = comm.SingleProcess.sum_gradients  # type: ignore[assignment, method-assign]
    parallel_check.save_rank_results(group, *args)  # type: ignore[arg-type]


@pytest.mark.parametrize("missing", ["forward", "backward", "gradients"])
def test_the_comparison_fails_without_any_one_sum(make_store, tmp_path, missing, monkeypatch):
    run = spawn.run_ranks
    patched = lambda _, size, *args, **options: run(_run_without, size, missing, *args, **options)  # noqa: E731
    monkeypatch.setattr(spawn, "run_ranks", patched)
    assert max(differences(make_store(2, "metis"), tmp_path).values()) > 1e-6


def _calls(group: comm.Comm, settings: config.Config, path: str) -> tuple[list[int], list[int]]:
    """Numbers per exchange with the one other rank, in a forward and in a backward pass."""
    sent: list[int] = []
    plain = dist.all_to_all_single

    def counted(taken: torch.Tensor, *args: object, **options: object) -> object:
        sent.append(taken.numel())
        return plain(taken, *args, **options)

    dist.all_to_all_single = counted
    store = Store(path)
    graph = dgl.batch([store.read(n, group.rank) for n in (0, 1)])
    model = trainer.build_model(settings, (3, 2), group)
    loss, _ = trainer.compute_loss(settings, model, graph, group, torch.Generator().manual_seed(0))
    forward = list(sent)
    loss.backward()
    return forward, sent[len(forward) :]


def test_a_step_exchanges_once_a_layer_and_direction(make_store: Callable[..., Path]) -> None:
    settings = config.load(None, SETTINGS)
    path = make_store(2, "metis", features=["viscosity", "mass", "speed"], node_attributes=["viscosity", "mass"])
    for forward, backward in spawn.run_ranks(_calls, 2, settings, str(path)):
        assert forward == backward == [2 * (3 + 9 + 48)] * 3  # 3 + 3C + HC numbers a graph, two graphs


def _losses(group: comm.Comm, settings: config.Config, path: str) -> list[float]:
    """The losses of three optimizer steps on batches of two snapshots."""
    store, model, losses = Store(path), trainer.build_model(settings, (3, 1), group).double(), []
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    read = (lambda n: store.read(n, group.rank)) if group.size > 1 else store.whole
    for step in range(3):
        graph = dgl.batch([read(n) for n in (step, step + 1)])
        optimizer.zero_grad()
        loss, _ = trainer.compute_loss(settings, model, graph, group, torch.Generator().manual_seed(step))
        loss.backward()
        group.sum_gradients(model.parameters())
        optimizer.step()
        losses.append(float(group.sum(loss.detach())))
    return losses


def test_training_on_batches_equals_one_process(make_store: Callable[..., Path]) -> None:
    settings, path = config.load(None, SETTINGS), str(make_store(4, "metis"))
    one = _losses(comm.SingleProcess(), settings, path)
    for many in spawn.run_ranks(_losses, 4, settings, path):
        assert many == pytest.approx(one, rel=1e-9)


def _dies(group: comm.Comm, folder: str) -> None:
    Path(folder, str(os.getpid())).touch()
    if group.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    while True:
        group.sum(torch.ones(3))


def test_a_killed_process_ends_the_run_and_leaves_none(tmp_path: Path) -> None:
    with pytest.raises(Failure, match="process 1 of 3 died"):
        spawn.run_ranks(_dies, 3, str(tmp_path))
    assert all(has_ended(int(file.name)) for file in tmp_path.iterdir())


def _refuses(group: comm.Comm) -> None:
    if group.rank == 1:
        raise Failure("this file: that key: do this")
    group.sum(torch.ones(1))


def test_the_first_cause_is_what_is_reported() -> None:
    with pytest.raises(Failure, match="this file: that key: do this"):
        spawn.run_ranks(_refuses, 2)


def _loses_a_process(group: comm.Comm, path: str) -> None:
    if group.rank:
        os._exit(3)
    try:
        group.sum(torch.ones(1))
    except ConnectionError as error:
        Path(path).write_text(str(error), encoding="utf-8")


def test_a_lost_process_is_an_error_of_one_line(tmp_path: Path) -> None:
    with pytest.raises(Failure, match="process 1 of 2 died"):
        spawn.run_ranks(_loses_a_process, 2, str(tmp_path / "error"))
    assert re.fullmatch(r"another process is lost \(.*\)", (tmp_path / "error").read_text(encoding="utf-8"))


LAUNCHER = """
import sys
sys.path[:0] = {folders!r}
from dist_egnn.distributed import spawn
from test_exact import _waits
if __name__ == "__main__":
    spawn.run_ranks(_waits, 2, sys.argv[1])
"""


def _waits(group: comm.Comm, folder: str) -> None:
    Path(folder, str(os.getpid())).touch()
    time.sleep(GUARD_S)


def test_a_killed_launcher_leaves_no_process_and_no_folder(tmp_path: Path) -> None:
    script, pids = tmp_path / "launch.py", tmp_path / "pids"
    script.write_text(LAUNCHER.format(folders=[*map(str, Path(__file__).parents[:2])]))
    pids.mkdir()
    with tempfile.TemporaryDirectory() as temporary:  # a short name: the path of a socket in it has at most 107 letters
        environment = {**os.environ, "TMPDIR": temporary}
        launcher = subprocess.Popen([sys.executable, str(script), str(pids)], env=environment)
        try:
            wait_until(lambda: len(list(pids.iterdir())) == 2, "two ranks", launcher)
            assert list(Path(temporary).glob("dist_egnn-*"))
        finally:
            kill(launcher)
        wait_until(lambda: all(has_ended(int(file.name)) for file in pids.iterdir()), "the ranks' end")
        wait_until(lambda: not list(Path(temporary).glob("dist_egnn-*")), "the folder's end")
