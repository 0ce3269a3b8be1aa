"""A step of a simulation by a backbone: its inputs from past velocities, walls and gravity, and the next positions.

Legend: N nodes, E edges, W walls, B graphs, H width, K past velocities, R radius of the edges, F features.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import Any

import torch
from dgl import DGLGraph
from torch import Tensor, nn

from ..data import domain, graphs, halo
from ..data.domain import Domain
from ..distributed.comm import Comm
from ..errors import Failure
from .mlp import mlp
from .network import Network, read_field

WALL_VECTORS = 4  # learned vectors along the normals of near walls
USUAL_DEGREE = 12.0  # sums over neighbours are divided by it
FASTEST = 2.0  # times the usual largest displacement of the training split: no node moves farther in a step


class Simulator(nn.Module):
    """x_{t+1} = base + σ f, with f from a backbone whose x^L − x^0 is σ f.

        v_k = x_{t−k} − x_{t−k−1},  x* = x + v_0 + g,  v̂ = v / σ_v,  û_ij = r*_ij / |r*_ij|,  r*_ij = x*_i − x*_j

    predicts: position: base x, σ = R; velocity: base x, σ = σ_v; acceleration: base x*, σ = σ_a, the root mean square of
    x_{t+1} − x* in the training split. Edges join nodes closer than R at x*, with weights w_ij = 1 − |r*_ij| / R; other edges
    (data.edges) have w_ij = 1, and R is only a unit of length. The backbone works at x* / R with

    - *vectors* v̂_k, ĝ, Σ_j w_ij v̂_ij,0 / USUAL_DEGREE, and WALL_VECTORS sums over near walls of ψ(wall) n_w;
    - *node features* MLP(f, |v̂_k|, v̂_k·v̂_l, v̂_0·ĝ, neighbours / USUAL_DEGREE) + Σ_w MLP(wall), with the inputs
      (d*_w / R clipped to −1 … 1, d_w / R to −1 … 2, v̂_k·n_w) of a wall at distance d_w of x and d*_w < R of x*;
    - *edge attributes* |r*| / R, |r| / R, v̂_ij,k·û, |v̂_ij,k|, v̂_i0·û, v̂_j0·û.

    Sums over neighbours are divided by USUAL_DEGREE: unlike means, they show the density. Outside training a displacement longer
    than `limit` is shortened to it: a node faster than any of the training would otherwise accelerate itself. The recipe
    follows learned simulators (Sanchez-Gonzalez et al. 2020) and continuous convolutions for fluids (Ummenhofer et al. 2020).

    backbone: a Network's class; options: its own. statistics: σ_v, σ_a and the usual largest ‖y − x‖ of the training split, None if
    the checkpoint to be loaded has them.
    """

    def __init__(
        self,
        backbone: type[Network],
        features: int,
        node_attributes: int,
        *,
        history: int,
        walls: bool,
        predicts: str,
        radius: float,
        by_radius: bool = True,
        statistics: tuple[float, float, float] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.history, self.walls, self.predicts, self.radius, self.by_radius = (
            history,
            walls,
            predicts,
            radius,
            by_radius,
        )
        hidden = options.get("hidden", 64)
        if "cutoff" in options:
            options["cutoff"] /= radius
        invariants = features + history + history * (history - 1) // 2 + 2
        self.embedding = mlp(invariants, hidden) if backbone.layer.features else None
        wall_outputs = (hidden if backbone.layer.features else 0) + WALL_VECTORS
        self.wall = mlp(2 + history, hidden, wall_outputs) if walls else None
        self.features, vectors = features, history + 2 + (WALL_VECTORS if walls else 0)
        attributes = 4 + 2 * history
        self.backbone = backbone(hidden, node_attributes, attributes, vectors=vectors, **options)
        with torch.no_grad():  # f starts small
            for name, parameter in self.backbone.named_parameters():
                if ".phi_v.2." in name:
                    parameter.mul_(0.1)
        values = statistics or (float("nan"),) * 3
        self.register_buffer("statistics", torch.tensor(values, dtype=torch.float64))
        self.statistics: Tensor

    @property
    def comm(self) -> Comm:
        """The processes that share a graph."""
        return self.backbone.comm

    @comm.setter
    def comm(self, comm: Comm) -> None:
        self.backbone.comm = comm

    @property
    def unit(self) -> float:
        """σ, the unit of f, a length."""
        v, a, _ = self.statistics.tolist()
        return {"position": self.radius, "velocity": v, "acceleration": a}[self.predicts]

    @property
    def limit(self) -> float:
        """The longest displacement of a step, a length."""
        return FASTEST * self.statistics[2].item()

    def prepare(self, graph: DGLGraph) -> DGLGraph:
        """The graph, with its tiles cached on it for ``forward``."""
        return self.backbone.prepare(graph)

    def forward(self, graph: DGLGraph) -> tuple[Tensor, Tensor]:
        """Positions of the next step (N, 3) and of the virtual nodes (B, C, 3), in the unit of x.

        Reads x, v, past, f and a; edges must be those at x*. Raises Failure for a graph without what it reads.
        """
        around = domain.get(graph)
        if around is None or (self.walls and not around.points.shape[1]):
            raise Failure("graph: has no gravity and walls; read it with data.history and data.walls as trained")
        like = next(self.parameters())
        x = read_field(graph.ndata, "x", 3).to(like)
        velocities = self._velocities(graph).to(like)
        graph_of = torch.repeat_interleave(graph.batch_num_nodes().to(x.device))
        gravity = around.gravity.to(like)[graph_of]
        advanced = domain.advance(x, velocities[:, 0], gravity)
        scaled = velocities / self.statistics[0].to(like)
        direction = gravity / torch.linalg.vector_norm(gravity, dim=1, keepdim=True).clamp(min=1e-30)

        own = self.backbone.prepare(graph).local_var()
        edges, degree, relative = self._edges(own, torch.cat([x, advanced, scaled.flatten(1)], 1))
        vectors = [scaled, direction.unsqueeze(1), relative.unsqueeze(1)]
        speed = torch.linalg.vector_norm(scaled, dim=2)
        pairs = [(scaled[:, k] * scaled[:, m]).sum(1, keepdim=True) for k, m in combinations(range(self.history), 2)]
        along = (scaled[:, 0] * direction).sum(1, keepdim=True)
        inputs = [read_field(graph.ndata, "f", self.features).to(like), speed, *pairs, along, degree]
        f = x.new_zeros(len(x), 0) if self.embedding is None else self.embedding(torch.cat(inputs, 1))
        if self.walls:
            node, features, normals = self._near_walls(around, graph_of, x, advanced, scaled)
            f = f.index_add(0, node, features)
            vectors.append(x.new_zeros(len(x), WALL_VECTORS, 3).index_add(0, node, normals))
        own.ndata.pop("centroid", None)  # that of x, not of x*
        start = advanced / self.radius
        nodes = {"x": start, "v": torch.cat(vectors, 1).flatten(1), "f": f, "degree": degree}
        for layer in self.backbone.layers:
            layer.unit = self.unit / self.radius  # type: ignore[assignment]
        moved, z = self.backbone(own, nodes, edges)
        base = advanced if self.predicts == "acceleration" else x
        after = base + self.radius * (moved - start)
        if not self.training:  # a shortened prediction would have no gradient along its length
            limit, length = self.limit, torch.linalg.vector_norm(after - x, dim=1, keepdim=True)
            after = torch.where(length > limit, x + (after - x) * (limit / length.clamp(min=limit)), after)
        return after, z * self.radius

    def _velocities(self, graph: DGLGraph) -> Tensor:
        """v_k (N, K, 3), the newest first."""
        v = read_field(graph.ndata, "v", 3)
        if self.history == 1:
            return v.unsqueeze(1)
        past = graph.ndata.get("past")
        if past is None or past.shape[1] < 3 * (self.history - 1):
            raise Failure(f"graph: field 'past' has fewer than the {self.history - 1} velocities that the model reads")
        return torch.cat([v, past[:, : 3 * (self.history - 1)]], 1).view(len(v), self.history, 3)

    def _edges(self, graph: DGLGraph, fields: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """The backbone's edge fields e and, in a periodic box, shift, those of cross edges last.

        Also |N(i)| / USUAL_DEGREE (N, 1) and Σ_j w_ij v̂_ij,0 / USUAL_DEGREE (N, 3). fields: (N, 6 + 3K), x, x*, v̂_k.
        """
        n, halos, around = len(fields), halo.get(graph), domain.get(graph)
        src, dst = (ends.to(fields.device).long() for ends in graph.edges())
        rows = fields
        if halos:
            halos.link(fields[:, 3:6].cpu(), self.comm)
            received = halos.exchange(torch.arange(n, device=fields.device), self.comm).refresh({"fields": fields})
            rows = torch.cat([fields, received["fields"]])
            src, dst = torch.cat([src, halos.src.to(src) + n]), torch.cat([dst, halos.dst.to(dst)])
        sides = None if around is None or around.sides is None else around.sides.to(fields.device)
        graph_of = torch.repeat_interleave(graph.batch_num_nodes().to(fields.device))
        values: dict[str, list[Tensor]] = {}
        sums = fields.new_zeros(n, 4)
        for chunk in _chunks(len(src)):
            difference = rows[dst[chunk]] - rows[src[chunk]]
            if sides is not None:
                side = sides[graph_of[dst[chunk]]]
                shift = ((difference[:, 3:6].double() / side).round() * side).to(fields)
                difference[:, :6] -= shift.repeat(1, 2)
                values.setdefault("shift", []).append(shift / self.radius)
            e, weighted = self._edge_attributes(difference, rows[dst[chunk], 6:9], rows[src[chunk], 6:9])
            values.setdefault("e", []).append(e)
            sums = sums.index_add(0, dst[chunk], weighted)
        degree, relative = (sums / USUAL_DEGREE).split([1, 3], dim=1)
        return {name: torch.cat(parts) for name, parts in values.items()}, degree, relative

    def _edge_attributes(self, difference: Tensor, v_i: Tensor, v_j: Tensor) -> tuple[Tensor, Tensor]:
        """The attributes e (E, A), and (1, w_ij v̂_ij,0) (E, 4). difference: r, r*, v̂_ij,k; v_i, v_j: v̂_i0, v̂_j0."""
        length = torch.linalg.vector_norm(difference[:, :6].view(-1, 2, 3), dim=2) / self.radius  # |r|, |r*|
        unit = difference[:, 3:6] / (length[:, 1:] * self.radius + 1e-4 * self.radius)
        relative = difference[:, 6:].view(len(difference), self.history, 3)
        along = (relative * unit.unsqueeze(1)).sum(2)
        ends = [(v * unit).sum(1, keepdim=True) for v in (v_i, v_j)]
        e = torch.cat([length, along, torch.linalg.vector_norm(relative, dim=2), *ends], 1)
        weighted = (1 - length[:, 1:]) * relative[:, 0] if self.by_radius else relative[:, 0]
        return e, torch.cat([torch.ones_like(length[:, :1]), weighted], 1)

    def _near_walls(
        self, around: Domain, graph_of: Tensor, x: Tensor, advanced: Tensor, scaled: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Pairs of a node and a wall nearer than R at x*: the node (P,), features (P, H or 0), vectors (P, WALL_VECTORS, 3)."""
        assert self.wall is not None
        points, normals = around.points.to(x), around.normals.to(x)

        def distance(position: Tensor) -> Tensor:  # (N, W), in units of R
            offset = (points * normals).sum(2)[graph_of]
            return ((position.unsqueeze(1) * normals[graph_of]).sum(2) - offset) / self.radius

        ahead = distance(advanced)
        node, wall = (ahead < 1).nonzero(as_tuple=True)
        normal = normals[graph_of[node], wall]  # (P, 3)
        now = distance(x)[node, wall]
        inputs = [ahead[node, wall].clamp(-1, 1).unsqueeze(1), now.clamp(-1, 2).unsqueeze(1)]
        inputs.append((scaled[node] * normal.unsqueeze(1)).sum(2))
        outputs = self.wall(torch.cat(inputs, 1))
        features, coefficients = outputs.tensor_split([outputs.shape[1] - WALL_VECTORS], 1)
        return node, features, coefficients.unsqueeze(2) * normal.unsqueeze(1)


def _chunks(count: int) -> Iterator[slice]:
    return (slice(lo, lo + graphs.CHUNK_EDGES) for lo in range(0, max(count, 1), graphs.CHUNK_EDGES))
