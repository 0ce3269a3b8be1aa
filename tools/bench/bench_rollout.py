"""The steps of a simulator's rollout by phase: neighbour search, partition, exchange, model, watch, writing."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import bench_data
import numpy as np

from dist_egnn.config import Config
from dist_egnn.config import load as load_config
from dist_egnn.data.dataset import sample_spec
from dist_egnn.data.trajectories import Writer
from dist_egnn.distributed import spawn
from dist_egnn.distributed.comm import SingleProcess
from dist_egnn.evaluate import rollout
from dist_egnn.evaluate.boundary_conditions import RolloutJob
from dist_egnn.train import checkpoint, trainer

GRAVITY, DT = np.array([0.0, -9.81, 0.0]), 0.01
MANAGEMENT = ("search", "partition", "exchange")  # what a step of one process on a fixed graph would not do


def write_fall(path: Path, nodes: int) -> None:
    """A block of particles that has fallen in a box for 20 frames and falls for four more, without reaching its floor."""
    x, t = bench_data.block(nodes), DT * np.arange(20, 24)[:, None, None]
    extent = np.ptp(x, 0)
    box = np.stack([x.min(0) - [0.5, 1, 0.5] * extent, x.max(0) + 0.5 * extent])
    with Writer(path, {"command": "python tools/bench"}) as out:
        position = x + 0.5 * GRAVITY * (t**2 - t[0] ** 2)
        out.add(position, split="test", dt=DT, source="python tools/bench", box=box, gravity=GRAVITY.tolist())


def simulator_config(path: Path, radius: float, parts: int, halo: str, model: dict[str, Any]) -> Config:
    """Two past velocities, walls and gravity. model: values of model.*."""
    keys = [f"data.path={path}", f"data.radius={radius}", "data.horizon=1", "data.history=2", "data.walls=box"]
    keys += ["data.features=[]", "data.velocity_scale=1", f"partition.parts={parts}", f"partition.halo={halo}"]
    keys += ["model.predicts=acceleration", "model.normalize=true", *(f"model.{k}={v}" for k, v in model.items())]
    return load_config(None, keys)


def measure_rollout(
    nodes: int, degree: float, parts: int, steps: int, repartition: int, halo: str, model: dict[str, Any]
) -> dict[str, Any]:
    """Seconds of a step by phase: elapsed and of the processor, each of the slowest process. A new model's weights."""
    with tempfile.TemporaryDirectory(prefix="dist_egnn-") as folder:
        path, weights, out = (Path(folder, name) for name in ("fall.h5", "best.pt", "rollout.vtkhdf"))
        write_fall(path, nodes)
        radius = bench_data.radius_for(bench_data.block(nodes), degree)
        config = simulator_config(path, radius, parts, halo, model)
        made = trainer.build_model(config, (0, 0), SingleProcess(), (9.81 * DT**2, 0.1 * 9.81 * DT**2, 1.0))
        checkpoint.save(weights, checkpoint.weights_only(made, config))
        spec, files = sample_spec(config.data, ()), (str(weights), str(path))
        job = RolloutJob(config, *files, spec, 0, 3, steps, repartition, "none", str(out), limit=0)
        ranks = spawn.run_ranks(rollout.roll_out, parts, job)
    stopped, laps = ranks[0][0], [laps for _, laps in ranks]
    phases = {
        phase: {
            "wall_s": max(one.wall[phase] for one in laps) / steps,
            "cpu_s": max(one.cpu[phase] for one in laps) / steps,
        }
        for phase in laps[0].wall
        if phase in laps[-1].wall
    }
    sizes: dict[str, Any] = {"nodes": nodes, "parts": parts, "steps": steps, "repartition": repartition, "halo": halo}
    cpu = {phase: value["cpu_s"] for phase, value in phases.items() if phase != "writing"}
    share = sum(cpu.get(phase, 0.0) for phase in MANAGEMENT) / sum(cpu.values())
    sizes |= {"stopped": stopped, "phases": phases, "share": share}
    return sizes | {"cpu_s": sum(cpu.values()), "wall_s": laps[0].without("writing") / steps}
