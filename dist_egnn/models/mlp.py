"""Two-layer perceptrons, and their first layer taken apart so that products belong on nodes instead of edges."""

from __future__ import annotations

from torch import Tensor, nn


def mlp(inputs: int, hidden: int, outputs: int | None = None, *, activate: bool = False) -> nn.Sequential:
    """Linear(inputs→hidden), SiLU, Linear(hidden→outputs or hidden)[, SiLU]: keys 0 and 2 hold the weights."""
    layers = [nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, outputs or hidden)]
    return nn.Sequential(*layers, nn.SiLU()) if activate else nn.Sequential(*layers)


def coordinate_mlp(hidden: int, inputs: int | None = None, *, outputs: int = 1) -> nn.Sequential:
    """φ_x, φ_xv, φ_z: Linear(inputs or hidden→hidden), SiLU, Linear(→outputs, no bias) whose last weight starts
    Xavier-uniform with gain 0.001."""
    last = nn.Linear(hidden, outputs, bias=False)
    nn.init.xavier_uniform_(last.weight, gain=0.001)
    return nn.Sequential(nn.Linear(inputs or hidden, hidden), nn.SiLU(), last)


def first_blocks(phi: nn.Sequential, *widths: int) -> tuple[Tensor, ...]:
    """φ's first layer taken apart, W[a, b] + bias = W_a a + W_b b + bias: the blocks of columns, then the bias."""
    first = phi[0]
    assert isinstance(first, nn.Linear)
    return *first.weight.split(widths, dim=1), first.bias


def after_first(phi: nn.Sequential, first: Tensor) -> Tensor:
    """The rest of φ, given its first layer's value."""
    for k in range(1, len(phi)):
        first = phi[k](first)
    return first
