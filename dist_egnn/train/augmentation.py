"""Inputs of a simulator's training that are not frames of the data: noise, and the model's own steps (pushforward).

Legend: N nodes of this rank, P velocities of a sample, K of them read by the model.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import dgl
import numpy as np
import torch
from dgl import DGLGraph
from torch import Tensor

from ..config import Config
from ..data import domain, graphs, halo
from ..data.edges import EdgeRule, edges_among, edges_of
from ..distributed.comm import Comm
from ..models.simulator import Simulator

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
State = tuple[Tensor, Tensor]  # x (N, 3), and velocities (N, P, 3), the newest first


def normal_draws(seed: int, ids: np.ndarray, count: int) -> np.ndarray:
    """Standard normal numbers (N, count) that depend on the seed and a row's id only: SplitMix64, Box–Muller."""
    draws = np.arange(2 * count, dtype=np.uint64)
    counter = ids.astype(np.uint64)[:, None] * np.uint64(2 * count) + draws + np.uint64(1)
    bits = _mixed(_mixed(np.full(1, seed, np.uint64) * GOLDEN) + counter * GOLDEN)
    uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    return np.sqrt(-2 * np.log(uniform[:, :count])) * np.cos(2 * np.pi * uniform[:, count:])


def _mixed(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def own_steps(config: Config, epoch: int, generator: torch.Generator) -> int:
    """The number of own steps before the next input: 0 for half of the inputs, else 1 … n at random.

    n rises over the epochs, from 1 at `train.pushforward_start` to `data.pushforward`.
    """
    most, first = config.data.pushforward, config.train.pushforward_start * config.train.epochs
    if not most or epoch < first:
        return 0
    most = min(most, 1 + int(most * (epoch - first) / (config.train.epochs - first)))
    half, drawn = torch.rand(2, generator=generator, device=generator.device).tolist()
    return 1 + int(drawn * most) if half < 0.5 else 0


def augment(config: Config, model: Simulator, graph: DGLGraph, comm: Comm, steps: int, seed: int) -> DGLGraph:
    """The sample after ``steps`` of the model's own steps that end at its frame, or else with noise.

    The target moves with the last position, so that the model learns to undo the change of the velocity only
    (Sanchez-Gonzalez et al. 2020). Collective. seed: of the noise, the same on all ranks.
    """
    x, y = graph.ndata["x"], graph.ndata["y"]
    names = ["v", "past"] if "past" in graph.ndata else ["v"]
    velocities = torch.cat([graph.ndata[name] for name in names], 1).unflatten(1, (-1, 3))
    if steps:
        state = pushed_forward(config, model, graph, comm, (x, velocities), steps)
    elif config.train.noise:
        state = with_noise(config, graph, (x, velocities), seed)
    else:
        return graph
    return rebuilt(config, graph, comm, state, y + (state[0] - x))


def pushed_forward(config: Config, model: Simulator, graph: DGLGraph, comm: Comm, state: State, steps: int) -> State:
    """The state that the model reaches in ``steps`` steps, without gradient, from so many frames before this one."""
    last, given = state
    x, velocities = last - given[:, :steps].sum(1), given[:, steps:]
    for left in reversed(range(steps)):
        with torch.no_grad():
            after = model(rebuilt(config, graph, comm, (x, velocities), x))[0].to(x)
        if "moving_id" in graph.ndata:
            prescribed = last - given[:, :left].sum(1)
            after = torch.where((graph.ndata["moving_id"] >= 0).unsqueeze(1), after, prescribed)
        x, velocities = after, torch.cat([(after - x).unsqueeze(1), velocities], 1)
    return x, velocities


def with_noise(config: Config, graph: DGLGraph, state: State, seed: int) -> State:
    """The state with a random walk in its K newest velocities; the newest one changes by `train.noise` (rms of a component)."""
    (x, velocities), count = state, config.data.history
    ids = graph.ndata["gid"].numpy() if "gid" in graph.ndata else np.arange(len(x))
    number = np.repeat(np.arange(graph.batch_size), graph.batch_num_nodes().numpy())  # of a node's graph in the batch
    drawn = normal_draws(seed, ids + (number.astype(np.int64) << 40), 3 * count)
    walk = torch.from_numpy(drawn).view(-1, count, 3).cumsum(1).flip(1) * (config.train.noise / count**0.5)
    if "moving_id" in graph.ndata:
        walk = walk * (graph.ndata["moving_id"] >= 0).view(-1, 1, 1)
    walk = walk.to(x)
    return x + walk.sum(1), torch.cat([velocities[:, :count] + walk, velocities[:, count:]], 1)


def rebuilt(config: Config, graph: DGLGraph, comm: Comm, state: State, y: Tensor) -> DGLGraph:
    """The sample in another state, with the edges of that state: those within this part, in halo mode all of the graph's."""
    x, velocities = state
    v = {"x": x, "y": y, "v": velocities[:, 0], "past": velocities[:, 1:].flatten(1)}
    around, halos, made = domain.get(graph), halo.get(graph), list[DGLGraph]()
    assert around is not None
    nodes = {name: value for name, value in graph.ndata.items() if name != "centroid"} | v
    rule, before = EdgeRule.of(config.data), dgl.unbatch(graph) if config.data.edges == "given" else []
    ends = [0, *graph.batch_num_nodes().cumsum(0).tolist()]
    for b, (lo, hi) in enumerate(pairwise(ends)):
        side = None if around.sides is None else around.sides[b].numpy()
        rows = {name: value[lo:hi] for name, value in nodes.items()}
        own = halos.parts[b] if halos else None
        if before:
            src, dst = (end.numpy() for end in before[b].edges())
            own = own and replace(own, send_rows=[], edge={})
        else:
            position = domain.advance(rows["x"], rows["v"], around.gravity[b])
            src, dst, own = _new_edges(rule, own, comm, rows, position, side)
        one = domain.attach(graphs.build_graph(src, dst, rows, side), around.of_graph(b))
        made.append(halo.attach(one, halo.Halos([own], [hi - lo])) if own else one)
    return halo.batch(made)


def _new_edges(
    rule: EdgeRule,
    before: halo.Halo | None,
    comm: Comm,
    rows: dict[str, Tensor],
    position: Tensor,
    side: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray, halo.Halo | None]:
    """Edges within this rank's part, by row, and in halo mode its halo; found in the positions of all ranks if necessary."""
    if before is None and (comm.size == 1 or rule.edges != "knn"):
        return *edges_of(position.numpy(), rule, side), None
    ids = rows["gid"]
    whole = torch.zeros(int(rows["total"][0]), 5, dtype=torch.float64)
    numbers = torch.stack([torch.full_like(ids, comm.rank), torch.arange(len(ids))], 1)  # rank and row of each node
    whole[ids] = torch.cat([position.double(), numbers.double()], 1)
    whole = comm.sum(whole)
    if before is None:
        return *edges_among(whole[:, :3].numpy(), ids.numpy(), rule, side), None
    src, dst = edges_of(whole[:, :3].numpy(), rule, side)
    about: dict[str, Any] = {"number": before.number, "where": before.where, "longest": rule.longest, "side": side}
    owner, row = whole[:, 3:].long().t().numpy()
    return halo.extract_part(src, dst, owner, comm.rank, comm.size, row, **about)[1:]
