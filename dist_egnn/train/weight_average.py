"""`train.ema`: the exponential moving average of the weights, w̄ ← d w̄ + (1 − d) w after each step of the optimiser."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from torch.nn import Module
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightAverage:
    """The average w̄ of a model's weights w, which begins at the model's present weights. decay 0: w itself.

    d = min(decay, (1 + k) / (10 + k)) in step k, so that the average of a short training forgets the first weights.
    """

    def __init__(self, model: Module, decay: float) -> None:
        self.model, self.decay = model, decay
        self.values = [p.detach().clone() for p in model.parameters()] if decay else []

    def update(self, step: int) -> None:
        """Include the weights after step ``step``, which counts from 1 over the whole training."""
        if self.decay:
            decay = min(self.decay, (1 + step) / (10 + step))
            get_ema_multi_avg_fn(decay)(self.values, [p.detach() for p in self.model.parameters()], step)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the average as its weights inside the block."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for k, (parameter, value) in enumerate(zip(self.model.parameters(), self.values, strict=False)):
            self.values[k], parameter.data = parameter.data, value

    def unaveraged(self) -> dict[str, Tensor]:
        """The model's own weights by name, while the average is applied; {} without one."""
        names = [name for name, _ in self.model.named_parameters()]
        return dict(zip(names, self.values, strict=False))

    def restore(self, own: dict[str, Tensor]) -> None:
        """Continue from a model that has loaded the average, with its own weights as `unaveraged` returned them."""
        for value, (name, parameter) in zip(self.values, self.model.named_parameters(), strict=False):
            value.copy_(parameter.detach())
            parameter.data.copy_(own[name])
