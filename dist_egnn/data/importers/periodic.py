"""Frames of a periodic source in one orthorhombic box that stays the same, with unwrapped positions.

A triclinic box, or one that is small against the radius, is repeated: the nodes of the orthorhombic supercell have the
neighbours that the nodes of the source have among all images. Legend: A (3, 3) cell vectors as rows, M A those of the
supercell with M (3, 3) of integers, S = |det M| copies.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import numpy as np

from ...errors import Failure
from ..checks import edge_pairs

EQUAL = 1e-5  # of a cell's largest number, by which equal cells and angles of 90° may deviate
REACH, COPIES = 3, 8  # largest coefficient of M, and largest S, of a triclinic box
HALF = 0.5 + 1e-6


class PeriodicFrames:
    """Takes the frames of a series one after the other."""

    def __init__(self, axes: tuple[bool, ...], repeat: tuple[int, int, int], rescale: bool) -> None:
        """axes: which are periodic; all, unless the box is orthorhombic."""
        self.axes, self.repeat, self.rescale = np.array(axes), repeat, rescale
        if (np.array(repeat)[~self.axes] > 1).any():
            raise Failure(f"--repeat {repeat}: the box is not periodic along every axis that is repeated")
        self.previous: np.ndarray | None = None  # (N, 3), as in the source
        self.turns = np.zeros(3)  # (N, 3), sides between a node's position in the source and its unwrapped one
        self.largest_turn = 0.0  # of a node between two frames, in sides
        self.largest_change = 0.0  # of the box, as a share of its size

    def __call__(
        self, position: np.ndarray, velocity: np.ndarray | None, box: np.ndarray, unwrapped: bool, where: str
    ) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
        """Unwrapped positions and velocities (S N, 3), and the box (2, 3) of the supercell.

        box: (2, 3) or (4, 3), see `Frame`; unwrapped: whether the source has done it. Raises Failure for a box that changes,
        unless rescale, and for nodes that move by more than half a side.
        """
        corner, cell = box[0], (box[1:] if len(box) == 4 else np.diag(box[1] - box[0]))
        if len(box) == 4 and not self.axes.all():
            text = "the box is triclinic and periodic in some directions only, which is not supported"
            raise Failure(f"{where}: {text}; --no-periodic omits the box")
        if self.previous is None:
            self._set_cell(corner, cell, where)
        corner = np.where(self.axes, corner, self.corner)  # walls may move
        cell = np.where(self.axes[:, None], cell, self.cell)
        change = float(np.abs(cell - self.cell).max() / np.abs(self.cell).max())
        if change > EQUAL:
            if not self.rescale:
                text = (
                    f"the periodic box changes by {change:.2%}, which is not supported; --rescale scales each frame to"
                )
                raise Failure(f"{where}: {text} the box of the first one, --no-periodic omits the box")
            self.largest_change = max(self.largest_change, change)
            factor = np.linalg.inv(cell) @ self.cell
            position = self.corner + (position - corner) @ factor
            velocity = None if velocity is None else velocity @ factor
        if self.previous is not None:
            moved = ((position - self.previous) @ np.linalg.inv(self.cell))[:, self.axes]
            if not unwrapped:
                crossed = np.rint(moved)
                self.turns = self.turns + np.zeros_like(position)
                self.turns[:, self.axes] += crossed
                moved -= crossed
            if (largest := float(np.abs(moved).max())) > HALF:
                node = int(np.abs(moved).max(1).argmax())
                text = f"node {node} moves by {largest:.2f} sides of the periodic box in one frame"
                raise Failure(f"{where}: {text}; at most half a side is supported: keep more frames, or --no-periodic")
            self.largest_turn = max(self.largest_turn, largest)
        self.previous = position
        self.position = position - self.turns @ self.cell
        whole = (self.position + self.offsets[:, None] @ self.cell).reshape(-1, 3)
        velocity = None if velocity is None else np.tile(velocity, (len(self.offsets), 1))
        return whole, velocity, np.stack([self.corner, self.corner + np.diag(self.multiple @ self.cell)])

    def _set_cell(self, corner: np.ndarray, cell: np.ndarray, where: str) -> None:
        if not np.isfinite(cell).all() or np.linalg.det(cell) <= 0:
            raise Failure(f"{where}: the box {cell.tolist()} is no box; correct it with --box")
        self.corner, self.multiple = corner, supercell(cell, where) * np.array(self.repeat)[:, None]
        self.cell = np.linalg.solve(self.multiple, np.diag(np.diag(self.multiple @ cell)))  # angles of exactly 90°
        reach = np.abs(self.multiple).sum(0).max() + 1
        around = np.array(list(itertools.product(range(-reach, reach + 1), repeat=3)))
        share = around @ np.linalg.inv(self.multiple)
        inside = around[((share > -1e-9) & (share < 1 - 1e-9)).all(1)]
        self.offsets = inside[
            np.argsort(np.abs(inside).sum(1), kind="stable")
        ]  # (S, 3) lattice vectors, the source's first

    def repeated(self, make: Callable[[], np.ndarray], where: str) -> Callable[[], np.ndarray]:
        """Makes the edges (S E, 2) of the supercell from those of the source (E, 2), to the nearest images in this frame."""
        return make if len(self.offsets) == 1 else functools.partial(self._repeat_edges, make, self.position, where)

    def _repeat_edges(self, make: Callable[[], np.ndarray], position: np.ndarray, where: str) -> np.ndarray:
        (i, j), n = make().T, len(position)
        image = np.rint((position[i] - position[j]) @ np.linalg.inv(self.cell)) * self.axes
        copies = []
        for copy, offset in enumerate(self.offsets):
            place = (offset + image)[:, None] - self.offsets  # (E, S, 3): a multiple of the supercell for one copy
            share = place @ np.linalg.inv(self.multiple)
            copies.append(np.stack([i + n * copy, j + n * (np.abs(share - np.rint(share)).max(2) < 1e-6).argmax(1)], 1))
        return edge_pairs(np.concatenate(copies), where, n * len(self.offsets))

    def notes(self) -> list[str]:
        """What was changed, in words."""
        result = []
        if (copies := round(len(self.offsets) / np.prod(self.repeat))) > 1:
            result.append(f"the box is triclinic: it is repeated {copies} times in an orthorhombic one")
        if self.largest_change:
            result.append(f"the box changes by up to {self.largest_change:.2%}: each frame is scaled to the first box")
        return result


def supercell(cell: np.ndarray, where: str) -> np.ndarray:
    """The smallest M (3, 3) for which the rows of M A are vectors along x, y and z. Raises Failure if S exceeds COPIES."""
    around = np.array(list(itertools.product(range(-REACH, REACH + 1), repeat=3)))
    vectors, rows = around @ cell, []
    for axis in range(3):
        across = np.abs(np.delete(vectors, axis, 1)).max(1)
        along = np.where(across <= EQUAL * np.abs(cell).max(), vectors[:, axis], 0)
        rows.append(around[np.where(along > 0, along, np.inf).argmin()] if (along > 0).any() else np.zeros(3, int))
    multiple = np.array(rows)
    if not 0 < round(np.linalg.det(multiple)) <= COPIES:
        text = f"the box is triclinic and no orthorhombic one consists of up to {COPIES} copies of it"
        raise Failure(f"{where}: {text}, which is not supported; --no-periodic omits the box")
    return multiple
