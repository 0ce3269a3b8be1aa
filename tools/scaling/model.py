"""Model of the time of a training step on P processes: the computation of a rank and the exchanges it waits for.

A *trip* is one exchange of all with all: a process sends P − 1 messages and waits for as many. It takes

    2 · latency + call + message · (P − 1) + bytes / bandwidth

where call and message are the measured cost of the software, latency and bandwidth those of the network; gloo sends only
after the receiver is ready, so a trip is a round trip. Legend: n own nodes, e edges among them, q cross edges, m halo
nodes, H width, L layers, C virtual nodes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from dist_egnn.distributed import comm

NODE_WORK = 4  # work of a node in units of an edge: docs/plan.md
FORWARD = 0.25  # share of the forward pass in a step: docs/performance.md
EXTRA_NUMBERS = 3  # sent with the gradients


@dataclass(frozen=True)
class Network:
    """latency (one way), call, message: seconds; bandwidth: bytes per second of one process in each direction."""

    latency: float
    bandwidth: float
    call: float = 0.0
    message: float = 0.0

    def trip(self, size: int, sent: float) -> float:
        """Seconds of a trip in which each of ``size`` processes sends or receives at most ``sent`` bytes."""
        return 2 * self.latency + self.call + self.message * (size - 1) + sent / self.bandwidth


@dataclass(frozen=True)
class Model:
    """H, L, C and the number of parameters of a FastEGNN in float32."""

    hidden: int = 64
    layers: int = 4
    virtual: int = 3
    parameters: int = 285_380

    def trips(self, size: int, halo: float = 0) -> list[tuple[str, float]]:
        """Phase and bytes of each trip of a training step.

        halo: rows that a process sends or receives, the larger number. Their trips have the phases "forward" and "backward"
        and overlap with the tiles without halo nodes.
        """

        def total(numbers: int) -> list[tuple[str, float]]:  # as comm._ordered_sum
            if size == 1:
                return []
            if comm.message_rounds(4 * numbers, size) == 1:
                return [("sum", 4.0 * (size - 1) * numbers)]
            return [("sum", 4.0 * (size - 1) * -(-numbers // size))] * 2

        layer = total(3 + 3 * self.virtual + self.hidden * self.virtual)
        trips = layer * 2 * self.layers + total(self.parameters + EXTRA_NUMBERS)
        if halo:
            trips += [("forward", 4 * (self.hidden + 3) * halo)] * self.layers
            trips += [("backward", 4 * (self.hidden + 3) * halo)] * (self.layers - 1)
            trips += [("backward", 4 * self.hidden * halo)]  # the first layer's positions need no gradient
        return trips

    def wait(self, network: Network, size: int, halo: float = 0, inside: float = 0) -> float:
        """Seconds of a step that a process waits for others.

        inside: seconds of a step that tiles without halo nodes take, spread evenly over the layers; they overlap with trips of
        halo nodes.
        """
        free = {"forward": FORWARD * inside / self.layers, "backward": (1 - FORWARD) * inside / self.layers}
        return sum(max(0.0, network.trip(size, sent) - free.get(phase, 0.0)) for phase, sent in self.trips(size, halo))


@dataclass(frozen=True)
class Work:
    """Seconds of a rank's computation: edge · (e + q + 4n) + row · m. No constant term: not for very small parts."""

    edge: float
    row: float

    @classmethod
    def fit(cls, n: np.ndarray, e: np.ndarray, q: np.ndarray, m: np.ndarray, seconds: np.ndarray) -> Work:
        """Non-negative least squares of relative errors over measured ranks."""
        rows = np.stack([e + q + NODE_WORK * n, m], 1) / np.asarray(seconds)[:, None]
        return cls(*nnls(rows, np.ones(len(n)))[0].tolist())

    def seconds(self, n: float, e: float, q: float = 0, m: float = 0) -> float:
        return self.edge * (e + q + NODE_WORK * n) + self.row * m


@dataclass(frozen=True)
class Fluid:
    """An infinite fluid, a cube for each rank: in-edges of a node; halo nodes and cross edges of a cube over n^(2/3)."""

    degree: float
    halo: float
    cross: float

    def step(self, work: Work, network: Network, size: int, n: float, exchange: bool) -> tuple[float, float]:
        """Seconds of a step on ``size`` ranks of n nodes, and the waiting part of it; without overlap of halo trips."""
        surface = n ** (2 / 3) if size > 1 else 0.0
        m, q = self.halo * surface, self.cross * surface
        wait = Model().wait(network, size, m if exchange else 0)
        crossing = (q, m) if exchange else (0.0, 0.0)
        return work.seconds(n, self.degree * n - q, *crossing) + wait, wait
