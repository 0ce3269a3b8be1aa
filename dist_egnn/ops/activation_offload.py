"""What autograd keeps of a forward pass for the backward pass, on disk instead of in memory: the same numbers, read back."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ..errors import Failure
from ..utils.filesystem import describe_os_error

LEAST = 1 << 20  # bytes of a tensor below which a file is not worth it


def _bytes(tensor: Tensor) -> memoryview:
    whole: Any = tensor.view(torch.uint8).numpy()
    return memoryview(whole).cast("B")


class _Filed:
    """A tensor in a file without a name, which is gone when nobody asks for it any more, or the process dies."""

    def __init__(self, tensor: Tensor, folder: Path) -> None:
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, tensor.device
        self.file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        rest = _bytes(tensor.detach().cpu().contiguous())
        while rest:  # one call writes 2 GB at most
            rest = rest[self.file.write(rest) :]

    def read(self) -> Tensor:
        tensor = torch.empty(self.shape, dtype=self.dtype)
        rest = _bytes(tensor)
        self.file.seek(0)
        while rest:
            rest = rest[self.file.readinto(rest) :]
        return tensor.to(self.device)


def check(folder: str, key: str) -> None:
    """Raise Failure for a name that is no folder's, before any work. key: how it was given, "train.kept="."""
    if folder and not Path(folder).is_dir():
        raise Failure(f"{key}{folder}: no such folder; make it, or leave this out to keep all in memory")


@contextlib.contextmanager
def on_disk(folder: str, besides: Iterable[Tensor] = ()) -> Iterator[None]:
    """Have what a forward pass within keeps for its backward pass, tensors of 1 MB and more, lie in files in ``folder``.

    Empty: in memory. besides: tensors that stay in memory whatever happens, as a graph's fields do. The backward pass may run
    after the block. Raises Failure where the folder cannot be written.
    """
    if not folder:
        yield
        return
    place = Path(folder)
    held = {tensor.untyped_storage().data_ptr() for tensor in besides}
    filed: dict[tuple[Any, ...], _Filed] = {}  # a node's velocity is every layer's: one file for all

    def pack(tensor: Tensor) -> Tensor | _Filed:
        if not tensor.is_floating_point() or tensor.nbytes < LEAST or tensor.untyped_storage().data_ptr() in held:
            return tensor
        # a weak reference, so that another tensor later at the same address is not taken for this one
        key = (
            StorageWeakRef(tensor.untyped_storage()),
            tensor.storage_offset(),
            tensor.shape,
            tensor.stride(),
            tensor._version,
        )
        if key not in filed:
            try:
                filed[key] = _Filed(tensor, place)
            except OSError as error:
                raise Failure(
                    f"{describe_os_error(error, place / 'kept')}; choose another folder, or keep in memory"
                ) from error
        return filed[key]

    def unpack(found: Tensor | _Filed) -> Tensor:
        return found.read() if isinstance(found, _Filed) else found

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
