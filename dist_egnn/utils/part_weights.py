"""How much of each graph a process owns: `partition.weights`, one number a process, in any unit."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ..errors import Failure

Weights = tuple[float, ...]
KEY = "partition.weights"


def text(weights: Sequence[float] | None) -> str:
    """As an override's value: [2,1,1]."""
    return "null" if weights is None else "[" + ",".join(f"{w:g}" for w in weights) + "]"


def of(weights: Sequence[float] | None, processes: int) -> Weights | None:
    """The weights of so many processes; None where all are equal, which is a partition without weights.

    Raises Failure for another number of them, and for one that is not positive and finite.
    """
    if weights is None:
        return None
    if len(weights) != processes:
        raise Failure(f"{KEY}={text(weights)}: {len(weights)} of them for {processes} processes; give one a process")
    if not all(0 < w < math.inf for w in weights):
        raise Failure(f"{KEY}={text(weights)}: must be positive numbers, one a process")
    return None if len(set(weights)) == 1 else tuple(map(float, weights))


def fractions(weights: Sequence[float] | None, processes: int) -> np.ndarray:
    """What each process owns of all (P,), in sum 1."""
    return np.full(processes, 1 / processes) if weights is None else np.divide(weights, sum(weights))


def same(one: Sequence[float] | None, other: Sequence[float] | None) -> bool:
    """Whether two sets of weights, as `of` gives them, mean the same: [2, 1] is [4, 2]."""
    if one is None or other is None:
        return one is other
    return len(one) == len(other) and np.allclose(fractions(one, len(one)), fractions(other, len(other)))


def sizes(nodes: int, weights: Sequence[float]) -> np.ndarray:
    """The nodes of each process (P,) int64: in all ``nodes``, each within one node of its share.

    Raises Failure where a share is less than one node.
    """
    share = nodes * fractions(weights, len(weights))
    least = int(share.argmin())
    if share[least] < 1 - 1e-9:
        raise Failure(
            f"{KEY}={text(weights)}: process {least} would get {share[least]:.2g} of {nodes} nodes; "
            "raise its weight or leave it out"
        )
    ends = np.floor(np.cumsum(share) + 0.5 + 1e-9).astype(np.int64)  # halves rise, so that a share of 1 is one node
    ends[-1] = nodes
    return np.diff(ends, prepend=0)
