"""The base class of all layers: the update of real nodes and their exchange with the virtual nodes.

A backbone (egnn.py, rf.py, …) adds the messages; docs/extend.md shows a complete one. Legend: E edges, n nodes of a
tile, H width, A edge attributes, K node attributes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..ops.linear import mlp as apply_mlp
from ..ops.message_passing import Fields, difference
from .mlp import mlp
from .virtual_nodes import VirtualNodes


def displacement(edges: Any) -> Tensor:
    """x_i − x_j of each edge j→i (E, 3), to the nearest image if the edges have a field ``shift`` (periodic box)."""
    r = difference(edges, "x")
    return r if "shift" not in edges.data else r - edges.data["shift"]


def direction(r: Tensor, length: Tensor) -> Tensor:
    """r (E, 3) / (length (E, 1) + 1e-8), for the option ``normalize``; the divisor is detached."""
    return r / (length.detach() + 1e-8)


class Layer(nn.Module):
    """One layer. Right-hand sides use the layer's inputs; a mean over no neighbour is zero.

        x_i' = x_i + mean_j dx_ij [+ mean_c (x_i − z_c) φ_xv(m_ic)] + Σ_k φ_vk(o_i) v_ik [+ φ_g(o_i) g]
        h_i' = h_i + φ_h([h_i, mean_j m_ij, [mean_c m_ic,] a_i])

    The terms in c are those of virtual nodes (virtual_nodes.py); v_ik are the node's vector inputs, of which samples have
    one, the velocity; g is a constant vector such as gravity. o_i is h_i, or ‖v_ik‖ in a backbone without features h.

    A simulator (simulator.py) sets ``unit``, by which x_i' − x_i is multiplied, and gives nodes a field ``degree``, by
    which means over j are multiplied.

    A backbone is a subclass with ``build``, which makes its networks, and ``message``, which returns dx (E, 3) and m
    (E, H), or fields whose means ``aggregate`` turns into them. ``send`` and ``receive`` compute once per node what
    ``message`` reads of the source and the destination. All methods are pure functions of rows.
    """

    options: ClassVar[tuple[str, ...]] = ()  # keys of the config's model section that ``build`` takes
    features: ClassVar[bool] = True  # whether nodes have features h
    residual: ClassVar[bool] = True  # whether h_i' has the summand h_i
    state: ClassVar[tuple[str, ...]] = ()  # further node fields that ``aggregate`` updates
    build: Callable[..., None]  # build(hidden, edge_attributes, **options)
    g: Tensor  # (3,), a constant vector such as gravity
    unit: float = 1.0  # of x' − x, in the unit of x

    def __init__(
        self,
        hidden: int,
        edge_attributes: int,
        node_attributes: int,
        *,
        virtual_nodes: int = 0,
        vectors: int = 1,
        gravity: Sequence[float] | None = None,
        last: bool = False,
        attention: bool = False,
        tanh: bool = False,
        concatenate: bool = False,
        bf16: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        invariants = (*(("h",) if self.features else ()), *self.state)
        self.source_fields: tuple[str, ...] = (*invariants, "x")
        # no output depends on the last h: the last layer skips φ_h and the mean message, but keeps the weights
        self.outputs: tuple[str, ...] = ("x",) if last else self.source_fields
        self.virtual = None
        if virtual_nodes:
            self.virtual = VirtualNodes(hidden, virtual_nodes, attention, tanh, concatenate, bf16, self.features)
        self.sums: tuple[str, ...] = self.virtual.sums if self.virtual else ()
        options |= {"attention": attention, "tanh": tanh, "bf16": bf16}
        self.build(hidden, edge_attributes, **{k: v for k, v in options.items() if k in self.options})
        self.vectors = vectors
        width = hidden if self.features else vectors
        self.phi_v = mlp(width, hidden, vectors)
        if self.features:
            self.phi_h = mlp(2 * hidden + (self.virtual.width if self.virtual else 0) + node_attributes, hidden)
        self.phi_g = mlp(width, hidden, 1) if gravity else None
        # float64, rounded where it is used: a model in float64 has the exact vector
        self.register_buffer("g", torch.tensor(gravity or (0.0, 0.0, 0.0), dtype=torch.float64), persistent=False)

    def native_obstacle(self) -> str:
        """Why the native engine cannot run this layer's messages; "" if it can."""
        return f"{type(self).__name__} has no native kernel"

    def initial_state(self, node: Fields) -> Fields:
        """The initial values of the fields in ``state``, given x, v and h; called on the first layer."""
        return {}

    def send(self, src: Fields) -> Fields:
        """The fields of sources (n_src, …) that ``message`` reads."""
        return {"x": src["x"]}

    def receive(self, dst: Fields) -> Fields:
        """The fields of destinations (n, …) that ``message`` reads."""
        return {"x": dst["x"]}

    def message(self, edges: Any) -> Fields:
        """Message UDF: dx (E, 3), and m (E, H) if "h" is in ``outputs``."""
        raise NotImplementedError

    def aggregate(self, data: Fields) -> Fields:
        """dx (n, 3), and if "h" is in ``outputs`` m (n, H) and the new values of the fields in ``state``.

        data: the node's fields and the means of its messages.
        """
        return data

    def update(self, nodes: Any) -> Fields:
        """Node UDF: x', h', the fields in ``state``, and the sums over nodes (b, …) for the virtual nodes' update."""
        data = nodes.data
        h, x, v = data.get("h"), data["x"], data["v"].view(len(data["x"]), self.vectors, 3)
        invariant = h if self.features else torch.linalg.vector_norm(v, dim=2)
        mean = self.aggregate(data)
        if "degree" in data:
            mean = mean | {name: mean[name] * data["degree"] for name in ("dx", "m") if name in mean}
        x_new = x + mean["dx"] + (apply_mlp(self.phi_v, invariant).unsqueeze(2) * v).sum(1)
        sums: Fields = {}
        h_inputs = [h, mean["m"]] if "h" in self.outputs else []
        if self.virtual is not None:
            # linear in all but m_virtual; a subclass may not be
            gradients_only = nodes.gradients_only and type(self).update is Layer.update
            dx, m_virtual, sums = self.virtual(h, x, nodes, gradients_only)
            x_new = x_new + dx
            h_inputs.append(m_virtual)
        if self.phi_g is not None:
            x_new = x_new + apply_mlp(self.phi_g, invariant) * self.g.to(x_new)
        if self.unit != 1:
            x_new = torch.lerp(x, x_new, self.unit)
        if self.virtual is not None:
            sums["sum_x"] = nodes.sum(x_new)
        out = {"x": x_new, **sums}
        if "h" in self.outputs:
            attributes = [data["a"]] if "a" in data else []
            change = apply_mlp(self.phi_h, [*h_inputs, *attributes])
            out["h"] = h + change if self.residual else change
            out |= {name: mean[name] for name in self.state}
        return out
