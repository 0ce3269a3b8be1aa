"""Two-layer perceptrons, and their first layer split by input: its products run once per node instead of per edge."""

from __future__ import annotations

from torch import Tensor, nn


def mlp(inputs: int, hidden: int, outputs: int | None = None, *, activate: bool = False) -> nn.Sequential:
    """Linear(inputs→hidden), SiLU, Linear(hidden→outputs or hidden)[, SiLU]; parameters 0.* and 2.*."""
    layers = [nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, outputs or hidden)]
    return nn.Sequential(*layers, nn.SiLU()) if activate else nn.Sequential(*layers)


def coordinate_mlp(hidden: int, inputs: int | None = None, *, outputs: int = 1) -> nn.Sequential:
    """φ_x, φ_xv, φ_z: Linear(inputs or hidden→hidden), SiLU, Linear(→outputs, no bias; Xavier-uniform, gain 0.001)."""
    last = nn.Linear(hidden, outputs, bias=False)
    nn.init.xavier_uniform_(last.weight, gain=0.001)
    return nn.Sequential(nn.Linear(inputs or hidden, hidden), nn.SiLU(), last)


def split_first_layer(phi: nn.Sequential, *widths: int) -> tuple[Tensor, ...]:
    """W_a, W_b, … and bias of φ's first layer, W[a, b, …] + bias = W_a a + W_b b + … + bias."""
    first = phi[0]
    assert isinstance(first, nn.Linear)
    return *first.weight.split(widths, dim=1), first.bias
