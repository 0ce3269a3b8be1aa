"""Nodes that no model moves, as the key data.fixed names them: walls at rest and, for a simulator, bodies that move as
the data prescribe. They send messages and are no part of loss and errors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from ..errors import Failure
from .trajectories import Trajectories

TOLERANCE = 1e-5  # of the extent: a fixed node may move so far, by rounding


def fixed_nodes(text: str, attribute: Callable[[str], np.ndarray]) -> np.ndarray:
    """The nodes (N,) bool that data.fixed names: those whose attribute NAME is not 0, or with NAME=VALUE is VALUE."""
    name, equals, value = text.partition("=")
    column = attribute(name)
    if column.ndim > 1:
        raise Failure(f"data.fixed={text}: '{name}' has several columns or varies over time; use another attribute")
    return column == float(value) if equals else column != 0


def check_fixed(data: Trajectories, fixed: str, option: str = "data.fixed=") -> None:
    """Raise Failure if a trajectory lacks the attribute of `fixed_nodes`, or no node of the file is fixed."""
    masks = (fixed_nodes(fixed, partial(data.attribute, k)) for k in range(len(data)))
    if fixed and not sum(mask.any() for mask in masks):
        raise Failure(f"{option}{fixed}: {data.path} has no such node; correct the attribute or its value")


def moving_nodes(fixed: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The fixed nodes (N,) bool whose positions x and y (N, 3) differ by more than rounding."""
    return fixed & (np.abs(y - x).max(1) > TOLERANCE * np.ptp(x, 0).max())


def moving_fields(
    fixed: np.ndarray, x: np.ndarray, y: np.ndarray, prescribed: bool, where: str
) -> dict[str, np.ndarray]:
    """The fields moving_id and moving (N,) int64. fixed: (N,); x, y: positions (N, 3) of input and target.

    Raises Failure for fixed nodes that move, unless ``prescribed``, and if all nodes are fixed.
    """
    wrong = moving_nodes(fixed, x, y)
    if wrong.any() and not prescribed:
        raise Failure(f"{where}: node {wrong.argmax()} moves, and data.fixed says it does not; correct the attribute")
    if fixed.all():
        raise Failure(f"{where}: no node moves by data.fixed; correct the attribute")
    moving_id = np.where(fixed, -1, np.cumsum(~fixed) - 1)
    return {"moving_id": moving_id, "moving": np.full(len(fixed), int((~fixed).sum()))}
