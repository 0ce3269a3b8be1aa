"""Share of each graph that a process owns: `partition.weights`, one number per process, in any unit."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ..errors import Failure

Weights = tuple[float, ...]
KEY = "partition.weights"


def to_text(weights: Sequence[float] | None) -> str:
    """The weights as the value of a config override, for example [2,1,1]."""
    return "null" if weights is None else "[" + ",".join(f"{w:g}" for w in weights) + "]"


def validate(weights: Sequence[float] | None, processes: int) -> Weights | None:
    """The weights of ``processes`` processes; None if all are equal. Raises Failure unless each has a positive one."""
    if weights is None:
        return None
    if len(weights) != processes:
        raise Failure(f"{KEY}={to_text(weights)}: {len(weights)} weights for {processes} processes; give one for each")
    if not all(0 < w < math.inf for w in weights):
        raise Failure(f"{KEY}={to_text(weights)}: must be positive numbers, one per process")
    return None if len(set(weights)) == 1 else tuple(map(float, weights))


def fractions(weights: Sequence[float] | None, processes: int) -> np.ndarray:
    """Fraction of all nodes that each process owns (P,); the sum is 1."""
    return np.full(processes, 1 / processes) if weights is None else np.divide(weights, sum(weights))


def equivalent(a: Sequence[float] | None, b: Sequence[float] | None) -> bool:
    """Whether two results of `validate` describe the same fractions: [2, 1] and [4, 2] do."""
    if a is None or b is None:
        return a is b
    return len(a) == len(b) and np.allclose(fractions(a, len(a)), fractions(b, len(b)))


def sizes(nodes: int, weights: Sequence[float]) -> np.ndarray:
    """Number of nodes of each process (P,) int64, within a node of its share. Raises Failure if one gets none."""
    share = nodes * fractions(weights, len(weights))
    smallest = int(share.argmin())
    if share[smallest] < 1 - 1e-9:
        reason = f"process {smallest} would get {share[smallest]:.2g} of {nodes} nodes"
        raise Failure(f"{KEY}={to_text(weights)}: {reason}; raise its weight or remove it")
    ends = np.floor(np.cumsum(share) + 0.5 + 1e-9).astype(np.int64)  # round half up: a share of 1 is one node
    ends[-1] = nodes
    return np.diff(ends, prepend=0)
