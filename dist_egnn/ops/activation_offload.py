"""Offload the tensors that autograd saves for the backward pass to files; gradients keep their bits."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ..errors import Failure
from ..utils.filesystem import describe_os_error

MIN_BYTES = 1 << 20  # smaller tensors stay in memory


def _bytes(tensor: Tensor) -> memoryview:
    array: Any = tensor.view(torch.uint8).numpy()
    return memoryview(array).cast("B")


class _TensorFile:
    """A tensor in an unnamed file, which the system removes with the last reference to it or with the process."""

    def __init__(self, tensor: Tensor, folder: Path) -> None:
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, tensor.device
        self.file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        rest = _bytes(tensor.detach().cpu().contiguous())
        while rest:  # one call writes at most 2 GB
            rest = rest[self.file.write(rest) :]

    def __getitem__(self, rows: slice) -> Tensor:
        first, last, _ = rows.indices(self.shape[0])
        tensor = torch.empty((last - first, *self.shape[1:]), dtype=self.dtype)
        rest, offset = _bytes(tensor), first * self.shape[1:].numel() * self.dtype.itemsize
        while rest:  # threads share the file: they give the offset
            count = os.preadv(self.file.fileno(), [rest], offset)
            rest, offset = rest[count:], offset + count
        return tensor.to(self.device)


_pack: ContextVar[Callable[[Tensor], Tensor | _TensorFile]] = ContextVar("_pack", default=lambda tensor: tensor)


def write_rows(fields: dict[str, Tensor]) -> dict[str, Any]:
    """Write the fields (N, …) that `offload_to_disk` offloads; returns their files, of which ``file[slice]`` reads rows."""
    return {name: file for name, t in fields.items() if not isinstance(file := _pack.get()(t), Tensor)}


def check_folder(folder: str, key: str) -> None:
    """Raise Failure for a folder that does not exist; "" is valid. key: as the user wrote it, such as "train.kept="."""
    if folder and not Path(folder).is_dir():
        raise Failure(f"{key}{folder}: no such folder; create it, or leave the option out to use memory")


@contextlib.contextmanager
def offload_to_disk(folder: str, keep_in_memory: Iterable[Tensor] = ()) -> Iterator[None]:
    """Write saved tensors of at least 1 MB of the forward pass in this context to files in ``folder``.

    The backward pass reads them back; it may run after the context. An empty ``folder`` offloads nothing.
    keep_in_memory: tensors that always stay in memory, such as fields of a graph. Raises Failure for a folder that is
    not writable.
    """
    if not folder:
        yield
        return
    resident = {tensor.untyped_storage().data_ptr() for tensor in keep_in_memory}
    files: dict[tuple[Any, ...], _TensorFile] = {}  # every layer saves the velocities: one file serves all

    def pack(tensor: Tensor) -> Tensor | _TensorFile:
        storage = tensor.untyped_storage()
        if not tensor.is_floating_point() or tensor.nbytes < MIN_BYTES or storage.data_ptr() in resident:
            return tensor
        # a weak reference tells the storage from a later one at the same address
        key = (StorageWeakRef(storage), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor._version)
        if key not in files:
            try:
                files[key] = _TensorFile(tensor, Path(folder))
            except OSError as error:
                where = describe_os_error(error, Path(folder) / "activations")
                raise Failure(f"{where}; choose another folder, or keep activations in memory") from error
        return files[key]

    def unpack(saved: Tensor | _TensorFile) -> Tensor:
        return saved[:] if isinstance(saved, _TensorFile) else saved

    token = _pack.set(pack)
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        _pack.reset(token)
