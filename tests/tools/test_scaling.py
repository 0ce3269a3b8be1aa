"""tools/scaling: a rank alone computes what it computes in a group; the trips and the arithmetic of the model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import predict
import pytest
import scaling
import torch
from model import Fluid, Model, Network, Work
from torch import Tensor

from dist_egnn.data import halo
from dist_egnn.data.store import Store
from dist_egnn.distributed import comm, spawn
from dist_egnn.distributed.call_counter import simulated_group

PARTS = 3  # the gradients then take two trips


def step_result(config: Any, graph: Any, group: comm.Comm) -> list[Tensor]:
    """Gradients, summed, and parameters after a step."""
    learner = scaling.build_learner(config)
    scaling.timed_step(config, learner, graph, group)
    return [t.detach() for p in learner[0].parameters() for t in (p.grad, p)]


def real_step(config: Any, graph: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The result of a step in the real group, and what each of its calls received."""
    answers: list[Tensor] = []
    call = torch.distributed.all_to_all_single

    def all_to_all_single(received: Tensor, *args: Any, group: Any = None, async_op: bool = False) -> Any:
        call(received, *args, group=group)
        answers.append(received.clone())
        return SimpleNamespace(wait=lambda: None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed, "all_to_all_single", all_to_all_single)
        return step_result(config, graph, comm.ProcessGroup(60.0)), answers


def compare_with_alone(group: comm.Comm, config: Any) -> list[dict[str, Any]]:
    results = []
    for mode in scaling.MODES:
        graph = Store(config.data.path).read(0, group.rank, mode == "exchange")
        if halos := halo.get(graph):
            halos.link(graph.ndata["x"], group)
        real, answers = real_step(config, graph)
        with simulated_group(group.rank, group.size, iter(answers)) as (simulated, counter):
            same = step_result(config, graph, simulated)
        with simulated_group(group.rank, group.size) as (simulated, _):
            other = step_result(config, graph, simulated)
        differ = [sum(not torch.equal(a, b) for a, b in zip(real, one, strict=True)) for one in (same, other)]
        sent = [max(call.payload, call.received) for call in counter.calls]
        link = [t.numpy() for part in (halos.parts if halos else ()) for t in (*part.send_rows, *part.edge.values())]
        about = scaling.part_statistics(scaling.build_learner(config)[0], graph)
        results.append({"differ": differ, "sent": sent, "link": link, "about": about})
    return results


def test_a_rank_alone_equals_the_rank_in_a_group(tmp_path: Path) -> None:
    config = scaling.config_with_store(tmp_path, 600, "bisection", PARTS)
    ranks = spawn.run_ranks(compare_with_alone, PARTS, config)
    parts = scaling.link_halos([Store(config.data.path).read(0, rank, exchange=True) for rank in range(PARTS)])
    for rank, (bridge, exchange) in enumerate(ranks):
        for one in (bridge, exchange):
            same, simulated = one["differ"]
            assert same == 0
            assert simulated > 0, "the comparison cannot see a difference"
            expected = [size for _, size in Model().trips(PARTS, one["about"]["halo"])]
            assert sorted(one["sent"]) == sorted(expected)
        own = halo.get(parts[rank]).parts[0]  # type: ignore[union-attr]
        for linked, received in zip([*own.send_rows, *own.edge.values()], exchange["link"], strict=True):
            assert np.array_equal(linked.numpy(), received)


def test_trips_are_those_of_a_step() -> None:
    """docs/halo.md has the bytes, counted by `python tools/bench comm`."""
    bridge = Model().trips(2)
    assert (len(bridge), sum(size for _, size in bridge)) == (9, 2 * 3_264 + 1_141_532)
    forward = [size for phase, size in Model().trips(2, 2_714) if phase == "forward"]
    assert sum(forward) + 3_264 == pytest.approx(2_912_672, rel=1e-3)
    assert len(Model().trips(1)) == 0
    assert len(Model().trips(1024)) == 18


def test_waiting() -> None:
    net = Network(latency=1.0, bandwidth=100.0, call=0.5, message=0.25)
    assert net.trip(5, 200) == 2 + 0.5 + 4 * 0.25 + 2
    plain = Model(hidden=1, layers=2, virtual=1, parameters=2)  # sums of 7 numbers, gradients of 5; rows of 16 bytes
    trips = [4 * 28, 20, 16 * 4, 16 * 4, 16 * 4, 4 * 4]
    by_hand = 5 * 2.75 + (28 * 4 + 20) / 100
    assert plain.wait(net, 2) == pytest.approx(by_hand)
    rows = 4 * 2.75 + sum(trips[2:]) / 100
    assert plain.wait(net, 2, halo=4) == pytest.approx(by_hand + rows)
    assert plain.wait(net, 2, halo=4, inside=4.0) == pytest.approx(by_hand + rows - 2 * 0.5 - 2 * 1.5)
    assert plain.wait(net, 2, halo=4, inside=1e3) == pytest.approx(by_hand)


def test_work_is_fitted_and_a_cube_follows() -> None:
    draw = np.random.default_rng(0)
    n, e, q, m = (draw.uniform(10, 1000, 20) for _ in range(4))
    work = Work.fit(n, e, q, m, 3 * (e + q + 4 * n) + 5 * m)
    assert (work.edge, work.row) == pytest.approx((3, 5))
    fluid, net = Fluid(degree=15, halo=6, cross=20), Network(1.0, 1e9)
    assert fluid.step(work, net, 1, 1000, True) == pytest.approx((3 * 19_000, 0))
    step, wait = fluid.step(work, net, 8, 1000, True)
    assert wait == pytest.approx(Model().wait(net, 8, 600))
    assert step == pytest.approx(3 * 19_000 + 5 * 600 + wait)
    assert fluid.step(work, net, 8, 1000, False)[0] == pytest.approx(3 * 17_000 + Model().wait(net, 8))


def test_tables_follow_from_rows() -> None:
    """The software cost of trips of 1 ms + 2 ms · (P − 1) + bytes at 1 MB/s; the slowest rank of medians."""
    rows = [
        {"parts": p, "bytes": b, "cpu_s": 2e-3 * (p - 1) + noise, "wall_s": 1e-3 + 2e-3 * (p - 1) + b / 1e6}
        for p, b, noise in ((2, 0, 0.0), (2, 5_000, 0.0), (4, 0, 9.0), (4, 0, 0.0), (8, 0, 0.0))
    ]
    here = predict.fit_software(pd.DataFrame(rows))
    assert (here.call, here.message, here.bandwidth) == pytest.approx((1e-3, 2e-3, 1e6))
    shape = {"edges": 100, "cross": 0, "halo": 0, "interior": 0.0, "bytes": 8, "own": 10}
    setting = {"nodes": 20, "method": "metis", "parts": 2, "mode": "bridge"}
    turns = [(0, 1, 2.0), (0, 2, 4.0), (1, 1, 5.0), (1, 2, 1.0), (1, 3, 1.0)]
    ranks = [{**setting, "rank": r, "turn": t, **shape, "cpu_s": s, "one_s": 6.0} for r, t, s in turns]
    (row,) = predict.strong_scaling(predict.median_rows(pd.DataFrame(ranks)), here).itertuples()
    wait = Model().wait(here, 2)
    assert (row.own, row.balance, row.even) == pytest.approx((3.0, 3.0 / 2.0, 2.0))
    assert (row.wait, row.speedup) == pytest.approx((wait, 6.0 / (3.0 + wait)))
