"""Halo mode in real processes: exact, also in training; runs end after a rank dies or hangs. See test_halo_mode.py."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_runs
import torch
from test_exact import _each

from dist_egnn import config
from dist_egnn.commands.evaluate import run_evaluation
from dist_egnn.commands.train import run_training
from dist_egnn.commands.verify import run_verification
from dist_egnn.data import halo
from dist_egnn.data.store import Store
from dist_egnn.distributed import comm, spawn
from dist_egnn.errors import Failure
from dist_egnn.evaluate import parallel_check
from dist_egnn.ops import tiling
from dist_egnn.train import trainer

SMALL = ["model.hidden=8", "model.layers=2", "loss.samples=4", "data.radius=0.27", "partition.halo=exchange"]


def _each_tiled(group: comm.Comm, settings: dict[str, config.Config], path: str, folder: str) -> None:
    tiling.MAX_UNTILED_BLOCKS = 0  # some tiles then run during the exchange
    _each(group, settings, path, folder)


@pytest.mark.parametrize(("parts", "names"), [(2, ["EGNN", "FastTFN"]), (4, ["FastEGNN", "RF"]), (8, ["FastEGNN"])])
def test_many_processes_equal_one_on_the_full_graph(make_store, tmp_path, parts, names):
    settings = {name: config.load(None, [f"model.name={name}", *SMALL, "model.tile=60"]) for name in names}
    store = Store(make_store(parts, "metis"))
    for name in settings:
        (tmp_path / name).mkdir()
    spawn.run_ranks(_each_tiled, parts, settings, str(store.path), str(tmp_path))
    for name, one in settings.items():
        errors = parallel_check.compare_with_one_process(one, store, 1, tmp_path / name)
        assert max(errors.values()) <= parallel_check.TOLERANCE, (name, errors)
        weights = len(list(trainer.build_model(one, (3, 1), comm.SingleProcess()).parameters()))
        assert sum(key.startswith("gradient") for key in errors) > weights / 2  # the last layer leaves some unused


def test_a_run_in_halo_mode_equals_one_process(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Partitioned, trained in batches, validated, evaluated: as without partitions."""
    keys = ["partition.method=random", "train.epochs=2", "train.batch_size=2", "model.hidden=8", "model.layers=2"]
    mse = {}
    for name, more in (("one", []), ("many", ["partition.parts=2", "partition.halo=exchange"])):
        run_training(tiny_runs.settings(small, tmp_path / name, *keys, *more))
        mse[name] = run_evaluation(tmp_path / name)["FastEGNN"]
    assert mse["many"] == pytest.approx(mse["one"], rel=1e-5)  # in bridge mode, METIS differs by 1e-4
    assert "halo: exchange" in (tmp_path / "many" / "config.yaml").read_text()
    capsys.readouterr()
    run_verification(tmp_path / "many" / "store", config.load(tmp_path / "many" / "config.yaml"))
    assert "2 processes against one on the full graph" in capsys.readouterr().out


def _signalled(group: comm.Comm, path: str, signal_number: int) -> None:
    """Exchange a halo again and again; rank 1 sends itself a signal meanwhile."""
    graph = Store(path).read(0, group.rank, True)
    halos = halo.get(graph)
    assert halos is not None
    halos.link(graph.ndata["x"], group)
    exchange = halos.exchange(torch.arange(graph.num_nodes()), group)
    h = torch.rand(graph.num_nodes(), 64)
    for k in range(10**6):
        if group.rank == 1 and k == 50:
            os.kill(os.getpid(), signal_number)
        exchange.start({"h": h})()


def test_a_rank_that_dies_or_hangs_in_the_exchange_ends_the_run(make_store: Callable[..., Path]) -> None:
    path = str(make_store(3, "kmeans"))
    with pytest.raises(Failure, match="process 1 of 3 died"):
        spawn.run_ranks(_signalled, 3, path, signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"(?i)time"):
        spawn.run_ranks(_signalled, 3, path, signal.SIGSTOP, timeout_s=10)
