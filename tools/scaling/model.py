"""How long a training step takes on P processes: a rank's own work, and the trips of bytes that it waits for.

A *trip* is one exchange of all with all: a process sends P − 1 messages and waits for as many. It takes

    2 · latency + call + message · (P − 1) + bytes / bandwidth

where call and message are the software's share, measured, latency and bandwidth the network's: gloo sends nothing before
the receiver has said that it is ready, so a trip is a round trip. Legend: n own nodes, e edges among them, q cross edges,
m halo nodes; H, L, C as everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from dist_egnn.distributed import comm

NODE = 4  # a node is as much work as so many edges: docs/plan.md
FORWARD = 0.25  # of a step's work: docs/performance.md
TOLD = 3  # numbers that travel with the gradients


@dataclass(frozen=True)
class Network:
    """latency, one way, call, message: seconds; bandwidth: bytes a second of one process, each way."""

    latency: float
    bandwidth: float
    call: float = 0.0
    message: float = 0.0

    def trip(self, size: int, sent: float) -> float:
        """Seconds of a trip on which each of ``size`` processes sends (or takes, if that is more) so many bytes."""
        return 2 * self.latency + self.call + self.message * (size - 1) + sent / self.bandwidth


@dataclass(frozen=True)
class Model:
    """H, L, C, and the numbers of all parameters of a FastEGNN in float32."""

    hidden: int = 64
    layers: int = 4
    virtual: int = 3
    parameters: int = 285_380

    def trips(self, size: int, halo: float = 0) -> list[tuple[str, float]]:
        """Phase and bytes of each trip of a training step. halo: rows that a process sends, or takes if these are more; these trips
        have the phases "forward" and "backward", in which tiles without halo nodes are computed meanwhile."""

        def total(numbers: int) -> list[tuple[str, float]]:  # as comm._ordered_sum
            if size == 1:
                return []
            once = comm.message_rounds(4 * numbers, size) == 1
            return (
                [("sum", 4.0 * (size - 1) * numbers)] if once else [("sum", 4.0 * (size - 1) * -(-numbers // size))] * 2
            )

        of_layer = total(3 + 3 * self.virtual + self.hidden * self.virtual)
        found = of_layer * 2 * self.layers + total(self.parameters + TOLD)
        if halo:
            found += [("forward", 4 * (self.hidden + 3) * halo)] * self.layers
            found += [("backward", 4 * (self.hidden + 3) * halo)] * (self.layers - 1)
            found += [("backward", 4 * self.hidden * halo)]  # the first layer's positions need no gradient
        return found

    def wait(self, network: Network, size: int, halo: float = 0, inside: float = 0) -> float:
        """Seconds of a step that a process waits for others. inside: seconds of a step that tiles without halo nodes take,
        spread evenly over the layers; rows of halo nodes travel meanwhile."""
        free = {"forward": FORWARD * inside / self.layers, "backward": (1 - FORWARD) * inside / self.layers}
        return sum(max(0.0, network.trip(size, sent) - free.get(phase, 0.0)) for phase, sent in self.trips(size, halo))


@dataclass(frozen=True)
class Work:
    """Seconds of a rank's own step: edge · (e + q + 4n) + row · m; nothing fixed, so not for the smallest parts."""

    edge: float
    row: float

    @classmethod
    def fit(cls, n: np.ndarray, e: np.ndarray, q: np.ndarray, m: np.ndarray, seconds: np.ndarray) -> Work:
        """Least relative squares over measured ranks; neither is negative."""
        rows = np.stack([e + q + NODE * n, m], 1) / np.asarray(seconds)[:, None]
        return cls(*nnls(rows, np.ones(len(n)))[0].tolist())

    def seconds(self, n: float, e: float, q: float = 0, m: float = 0) -> float:
        return self.edge * (e + q + NODE * n) + self.row * m


@dataclass(frozen=True)
class Fluid:
    """An endless fluid in cubes, each a rank's: in-edges of a node; halo nodes and cross edges of a cube, over n^(2/3)."""

    degree: float
    halo: float
    cross: float

    def step(self, work: Work, network: Network, size: int, n: float, exchange: bool) -> tuple[float, float]:
        """Seconds of a step on ``size`` ranks of n nodes, and those of it that are waiting; no halo's way is taken to be hidden."""
        surface = n ** (2 / 3) if size > 1 else 0.0
        m, q = self.halo * surface, self.cross * surface
        wait = Model().wait(network, size, m if exchange else 0)
        kept = (q, m) if exchange else (0.0, 0.0)
        return work.seconds(n, self.degree * n - q, *kept) + wait, wait
