"""The layer of a tensor field network (Thomas et al. 2018) of degrees 0 and 1, on e3nn (extra ``tfn``).

Legend: E edges, n nodes of a tile, H width (features of degree 0), m channels (of degree 1), A edge attributes.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from torch import fx, nn

from ..errors import Failure
from ..ops.message_passing import Fields
from .base import Layer, direction, displacement
from .mlp import coordinate_mlp, mlp


@contextmanager
def _e3nn() -> Iterator[Any]:
    """The library e3nn, set to build its modules from plain torch operations.

    By default it compiles them with TorchScript, which torch has deprecated. Raises Failure if the library is missing.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # e3nn uses deprecated functions of torch
        try:
            import e3nn
            import e3nn.math  # noqa: F401
            import e3nn.o3  # noqa: F401
        except ImportError as error:
            raise Failure(f"model.name=TFN or FastTFN: {error}; run .venv/bin/pip install -e '.[tfn]'") from error
        mode = e3nn.get_optimization_defaults()["jit_mode"]
        e3nn.set_optimization_defaults(jit_mode="eager")
        try:
            yield e3nn
        finally:
            e3nn.set_optimization_defaults(jit_mode=mode)


def _simplify(module: nn.Module) -> nn.Module:
    """A module of e3nn without dead code (unused outer products) and without its constants in checkpoints."""
    for part in module.modules():
        for name, value in list(part.named_buffers(recurse=False)):
            part.register_buffer(name, value, persistent=False)
        if isinstance(part, fx.GraphModule):
            part.graph.eliminate_dead_code()
            part.recompile()
    return module


class TFNLayer(Layer):
    """The messages of a tensor field network: features times spherical harmonics, channel by channel.

    A node has scalars h (n, H) (irreps 0e) and vectors t (n, m·3) (1o: polar vectors), initially m copies of v. Lengths
    are in units of the cutoff, r = (x_i − x_j) / cutoff.

        [a b t̂]_j = Linear(h_j, t_j)                             H and m scalars, m vectors
        w_ij = φ_w([basis(‖r‖), e_ij])                           H + 3m weights
        c_ij = [a_j b_j t̂_j] ⊗_w Y(r)                            H + m scalars, 2m vectors
             = [w a_j, w t̂_j·r, w √3 b_j r, w t̂_j]               one w for each channel
        m_i, τ_i = Linear(mean_j c_ij),  τ'_i = Linear(mean_j c_ij, t_i)
        dx_i = cutoff · φ_x(m_i)·τ_i,  t_i' = t_i + φ_t(m_i) τ'_i

    Y are the spherical harmonics of degrees 0 and 1 as the polynomials 1 and √3 r, whose gradient is finite at r = 0;
    ``normalize`` uses r / ‖r‖ (length detached). basis: Gaussians evenly between 0 and the cutoff, zero far beyond it.

    Deviations from the paper: the tensor product has one weight per channel (H + 3m = 112 at H = 64, m = 16) instead of
    (H + m)² (6,400), with linear maps on nodes before and after it; no cross product, which would be a pseudovector
    (1e); the update of positions. An edge costs (basis + A + H + 3m)·H multiply-adds in φ_w, H + 10m in the product.
    """

    options: ClassVar = ("normalize", "basis", "cutoff", "channels")
    state: ClassVar = ("t",)

    def build(
        self,
        hidden: int,
        edge_attributes: int,
        *,
        normalize: bool = False,
        basis: int = 20,  # Gaussians
        cutoff: float = 10.0,  # a length
        channels: int = 16,  # m
    ) -> None:
        m = self.channels = channels
        self.normalize, self.cutoff = normalize, cutoff
        with _e3nn() as e3nn:
            o3 = e3nn.o3
            self.basis = partial(
                e3nn.math.soft_one_hot_linspace, start=0, end=1, number=basis, basis="gaussian", cutoff=True
            )
            self.harmonics = o3.SphericalHarmonics("0e + 1o", normalize=False, normalization="component")
            sent = f"{hidden}x0e + {m}x0e + {m}x1o"
            self.before = _simplify(o3.Linear(f"{hidden}x0e + {m}x1o", sent))
            message = f"{hidden}x0e + {m}x0e + {m}x1o + {m}x1o"
            paths = [(0, 0, 0), (2, 1, 1), (1, 1, 2), (2, 0, 3)]  # indices of irreps: sent, Y, message
            by_channel = [(*path, "uvu", True) for path in paths]
            self.product = _simplify(
                o3.TensorProduct(sent, "0e + 1o", message, by_channel, internal_weights=False, shared_weights=False)
            )
            mean_and_t = f"{hidden + m}x0e + {2 * m}x1o + {m}x1o"
            maps = [(0, 0), (1, 1), (1, 2), (2, 2)]  # indices of irreps: input, output
            self.after = _simplify(o3.Linear(mean_and_t, f"{hidden}x0e + {m}x1o + {m}x1o", instructions=maps))
        self.phi_w = mlp(basis + edge_attributes, hidden, hidden + 3 * m)
        self.phi_x = coordinate_mlp(hidden, outputs=m)
        self.phi_t = mlp(hidden, hidden, m)

    def initial_state(self, node: Fields) -> Fields:
        """t (n, m·3): the vectors v / cutoff in turn, one in every channel."""
        return {"t": (node["v"] / self.cutoff).repeat(1, -(-self.channels // self.vectors))[:, : 3 * self.channels]}

    def send(self, src: Fields) -> Fields:
        """x (n_src, 3), and a, b, t̂ in one row q (n_src, H + 4m)."""
        return {"x": src["x"], "q": self.before(torch.cat([src["h"], src["t"]], 1))}

    def message(self, edges: Any) -> Fields:
        """Message UDF: c (E, H + 7m)."""
        r = displacement(edges) / self.cutoff
        distance = torch.linalg.vector_norm(r, dim=1, keepdim=True)  # its gradient at zero is zero, not NaN
        inputs = self.basis(distance.squeeze(1))
        if "e" in edges.data:
            inputs = torch.cat([inputs, edges.data["e"]], 1)
        if self.normalize:
            r = direction(r, distance)
        return {"c": self.product(edges.src["q"], self.harmonics(r), self.phi_w(inputs))}

    def aggregate(self, data: Fields) -> Fields:
        """dx (n, 3), m (n, H) and t' (n, m·3)."""
        vectors = 3 * self.channels
        mixed = self.after(torch.cat([data["c"], data["t"]], 1))
        m, tau, tau_t = mixed.tensor_split([mixed.shape[1] - 2 * vectors, mixed.shape[1] - vectors], dim=1)
        dx = self._scaled(self.phi_x(m), tau).sum(1) * self.cutoff
        if "h" not in self.outputs:
            return {"dx": dx}
        return {"dx": dx, "m": m, "t": data["t"] + self._scaled(self.phi_t(m), tau_t).flatten(1)}

    def _scaled(self, scale: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
        """Vectors (n, m·3) times their scales (n, m): (n, m, 3)."""
        return scale.unsqueeze(2) * vectors.view(len(vectors), self.channels, 3)
