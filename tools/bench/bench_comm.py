"""The collective calls of one training step and the data that each process sends."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import bench_data
import torch

from dist_egnn.config import Config
from dist_egnn.data import halo
from dist_egnn.data.dataset import open_dataset
from dist_egnn.distributed import comm, spawn
from dist_egnn.distributed.call_counter import PHASES, Call, counted_collectives
from dist_egnn.train import trainer


def count_calls(group: comm.Comm, config: Config, snapshot: int | None = None) -> dict[str, list[Call]]:
    """The collectives that this process calls in one training step, by phase.

    snapshot: its number, by default that of the first training snapshot.
    """
    dataset = open_dataset(config, group.rank, group.size)
    model = trainer.build_model(config, dataset.widths, group)
    graph = dataset[dataset.splits["train"][0] if snapshot is None else snapshot]
    if halos := halo.get(graph):
        halos.link(graph.ndata["x"], group)  # once per snapshot, not per step
    with counted_collectives() as counter:
        loss, _ = trainer.compute_loss(config, model, graph, group, torch.Generator().manual_seed(0))
        counter.enter("backward")
        loss.backward()
        counter.enter("gradients")
        group.sum_gradients(model.parameters(), torch.zeros(3))
    return {phase: [call for call in counter.calls if call.phase == phase] for phase in PHASES}


def measure_communication(
    nodes: int, degree: float, parts: int, model: dict[str, Any], halo_mode: str = "bridge"
) -> dict[str, Any]:
    """Calls, numbers and bytes of each phase of a step on ``parts`` processes, and the formula (P − 1)(3 + 3C + HC)."""
    with tempfile.TemporaryDirectory(prefix="dist_egnn-") as folder:
        config = bench_data.config_with_store(Path(folder), nodes, degree, parts, 1, model, halo_mode)
        ranks = spawn.run_ranks(count_calls, parts, config)
    sizes = [[(call.phase, call.name, call.payload) for calls in rank.values() for call in calls] for rank in ranks]
    hidden, virtual_nodes = config.model.hidden, config.model.virtual_nodes
    phases = {
        phase: {
            "calls": len(calls),
            "collectives": sorted({call.name for call in calls}),
            "floats": [call.payload // call.width for call in calls],
            "bytes": sum(call.payload for call in calls),
        }
        for phase, calls in ranks[0].items()
    }
    return {
        "parts": parts,
        "layers": config.model.layers,
        "formula": (parts - 1) * (3 + 3 * virtual_nodes + hidden * virtual_nodes),
        "alike": all(rank == sizes[0] for rank in sizes),
        "phases": phases,
    }
