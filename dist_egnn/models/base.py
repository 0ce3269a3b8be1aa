"""What the layers of every backbone share: the update of real nodes, and their talk with the virtual nodes.

A backbone (egnn.py, rf.py, …) adds what an edge says; docs/extend.md shows a whole one. Legend: E edges, n nodes of a tile,
H width, A edge attributes, K node attributes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..ops.message_passing import Fields, difference
from .mlp import mlp
from .virtual_nodes import VirtualNodes


def displacement(edges: Any) -> Tensor:
    """x_i − x_j of each edge j→i (E, 3), to the nearest image where the edges carry a ``shift`` (a periodic box)."""
    r = difference(edges, "x")
    return r if "shift" not in edges.data else r - edges.data["shift"]


def direction(r: Tensor, length: Tensor) -> Tensor:
    """r (E, 3) over its length (E, 1), which the option ``normalize`` asks for: the divisor has no gradient, and is never zero."""
    return r / (length.detach() + 1e-8)


class Layer(nn.Module):
    """One layer; right-hand sides are the layer's inputs throughout, means over no neighbour are zero.

        x_i' = x_i + mean_j dx_ij [+ mean_c (x_i − z_c) φ_xv(m_ic)] + φ_v(o_i) v_i [+ φ_g(o_i) g]
        h_i' = h_i + φ_h([h_i, mean_j m_ij, [mean_c m_ic,] a_i])

    The brackets with c are the virtual nodes' (virtual.py), that with g a constant vector's, such as gravity. o_i are h_i, or
    ‖v_i‖ for a backbone without features h.

    A backbone is a subclass with ``build``, its networks, and ``message``, which returns dx (E, 3) and m (E, H) (the latter only if
    "h" in ``outputs``), or anything else whose mean ``gather`` turns into them. ``send`` and ``receive`` are what its edges read of
    their ends. All are pure functions of rows, and products that depend on one end alone belong there, once a node instead of once
    an edge.
    """

    options: ClassVar[tuple[str, ...]] = ()  # keys of the config's model section that ``build`` takes
    features: ClassVar[bool] = True  # whether nodes have features h
    state: ClassVar[tuple[str, ...]] = ()  # further node fields that ``gather`` updates
    build: Callable[..., None]  # build(hidden, edge_attributes, **options) makes the networks of the methods below

    def __init__(
        self,
        hidden: int,
        edge_attributes: int,
        node_attributes: int,
        *,
        virtual_nodes: int = 0,
        gravity: Sequence[float] | None = None,
        last: bool = False,
        attention: bool = False,
        low: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        # nobody asks for the last h: its layer leaves φ_h and the mean message out, and keeps the weights
        kept = (*(("h",) if self.features else ()), *self.state)
        self.source_fields: tuple[str, ...] = (*kept, "x")
        self.outputs: tuple[str, ...] = ("x",) if last else (*kept, "x")
        self.virtual = VirtualNodes(hidden, virtual_nodes, attention, low, self.features) if virtual_nodes else None
        self.sums: tuple[str, ...] = self.virtual.sums if self.virtual else ()
        wanted = {"attention": attention, "low": low, **options}
        self.build(hidden, edge_attributes, **{k: v for k, v in wanted.items() if k in self.options})
        seen = hidden if self.features else 1
        self.phi_v = mlp(seen, hidden, 1)
        if self.features:
            self.phi_h = mlp((3 if self.virtual else 2) * hidden + node_attributes, hidden)
        self.phi_g = mlp(seen, hidden, 1) if gravity else None
        # float64, rounded where it is used: a model in float64 then has the vector that was given
        self.register_buffer("g", torch.tensor(gravity or (0.0, 0.0, 0.0), dtype=torch.float64), persistent=False)

    def begin(self, node: Fields) -> Fields:
        """The first values of the fields in ``state``, given x, v and h; asked of the first layer alone."""
        return {}

    def send(self, src: Fields) -> Fields:
        """What a source (n_src, …) carries to its edges."""
        return {"x": src["x"]}

    def receive(self, dst: Fields) -> Fields:
        """What a destination (n, …) brings to its edges."""
        return {"x": dst["x"]}

    def message(self, edges: Any) -> Fields:
        """Message UDF: dx (E, 3), m (E, H)."""
        raise NotImplementedError

    def gather(self, data: Fields) -> Fields:
        """What the means of its messages are to a node: dx (n, 3), m (n, H), and the new values of the fields in ``state``.

        data: the node's fields and the means. m and the state only if "h" in ``outputs``.
        """
        return data

    def update(self, nodes: Any) -> Fields:
        """Node UDF: x', h', and what the virtual nodes collect."""
        data = nodes.data
        h, x, v = data.get("h"), data["x"], data["v"]
        seen = h if self.features else torch.linalg.vector_norm(v, dim=1, keepdim=True)
        heard = self.gather(data)
        moved = x + heard["dx"] + self.phi_v(seen) * v
        collected: Fields = {}
        said = [h, heard["m"]] if "h" in self.outputs else []
        if self.virtual is not None:
            dx, m_virtual, collected = self.virtual(h, x, data["z"], data["u"])
            moved = moved + dx
            said.append(m_virtual)
        if self.phi_g is not None:
            moved = moved + self.phi_g(seen) * self.g.to(moved)
        if self.virtual is not None:
            collected["sum_x"] = moved
        out = {"x": moved, **collected}
        if "h" in self.outputs:
            attributes = [data["a"]] if "a" in data else []
            out["h"] = h + self.phi_h(torch.cat([*said, *attributes], 1))
            out |= {name: heard[name] for name in self.state}
        return out
