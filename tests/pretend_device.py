"""A second device that computes on the CPU and obeys CUDA's rules, so that faults of placement fail without a GPU.

torch's out-of-tree device key is registered in Python: a tensor of ``DEVICE`` wraps one of the CPU with its values. As
on CUDA an operation fails if it mixes devices, except that a number (0-dim, on the CPU) can be an operand of pointwise
operations and indices can be on the CPU; its backward pass runs in a thread of its own, and DGL and NumPy refuse its
tensors. Import this before the first backward pass of the process, which counts the devices.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("pretend")
DEVICE = torch.device("pretend:0")
INDEXED = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index")
transfers: list[tuple[int, ...]] = []  # shapes of the tensors copied between the host and the device


class _OnDevice(torch.Tensor):
    """A tensor on the device; ``host`` holds its values."""

    host: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, host: torch.Tensor) -> _OnDevice:
        layout = {"strides": host.stride(), "storage_offset": host.storage_offset(), "dtype": host.dtype}
        result = torch.Tensor._make_wrapper_subclass(cls, host.size(), device=DEVICE, **layout)
        result.host = host
        return result

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(op, *args, **(kwargs or {}))

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, value: _OnDevice) -> None:  # torch's sets shape and type only
        torch.Tensor.data.__set__(self, value)
        self.host = value.host

    def tolist(self) -> Any:  # torch refuses it for subclasses
        return self.cpu().tolist()


def _check_devices(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise RuntimeError for operands that CUDA would not accept together."""
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    host = [t for t in tensors if not isinstance(t, _OnDevice)]
    generator = kwargs.get("generator")
    if generator is not None and generator.device.type == "cpu" and not op.name().startswith("aten::copy"):
        raise RuntimeError(f"{op}: expected a generator of {DEVICE}, found one of the cpu")
    if not host or len(host) == len(tensors) or op.name() in ("aten::copy_", "aten::_to_copy"):
        return
    numbers = (
        torch.Tag.pointwise in op.tags and all(t.dim() == 0 for t in host) and isinstance(args[0], _OnDevice | None)
    )
    indices = op.name().split(".")[0] in INDEXED and all(isinstance(t, _OnDevice) for t in (args[0], *args[2:3]))
    if not (numbers or indices):
        raise RuntimeError(f"{op}: expected all tensors on one device, found {DEVICE} and the cpu")


def _run(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Run an operation of torch on the host's tensors; results are on the device, unless ``device`` names the CPU."""
    _check_devices(op, args, kwargs)
    given = {}  # results that are operands, as of operations in place

    def host(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        inner = value.host if isinstance(value, _OnDevice) else value
        given[id(inner)] = value
        return inner

    target = kwargs.get("device")
    if target is not None:
        kwargs = {**kwargs, "device": "cpu"}
    to_host = target is not None and target.type == "cpu"
    result = op(*pytree.tree_map(host, args), **pytree.tree_map(host, kwargs))
    if (op.name() == "aten::copy_" and type(args[0]) is not type(args[1])) or (
        to_host and op.name() == "aten::_to_copy"
    ):
        transfers.append(tuple(args[0].shape))

    def wrap(value: Any) -> Any:
        if to_host or not isinstance(value, torch.Tensor):
            return value
        if id(value) not in given:
            return _OnDevice(value)
        assert given[id(value)].shape == value.shape, f"{op} resizes a tensor: list it below"
        return given[id(value)]

    return pytree.tree_map(wrap, result)


_fallback, _factories = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
_fallback.fallback(_run, "PrivateUse1")
for name in ("arange", "arange.start", "arange.start_step", "linspace"):  # torch's own would resize an empty tensor
    of, _, overload = name.partition(".")
    _factories.impl(name, partial(_run, getattr(getattr(torch.ops.aten, of), overload or "default")), "PrivateUse1")
