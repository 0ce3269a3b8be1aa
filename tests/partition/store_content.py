"""The content of a store, to compare two stores."""

from __future__ import annotations

from pathlib import Path

import dgl
import yaml


def files(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def content(store: Path) -> dict[str, object]:
    """All files; graph.dgl by its tensors, because DGL leaves bytes between them unset, and without its hash."""
    result: dict[str, object] = dict(files(store))
    manifest = yaml.safe_load(result.pop("manifest.yaml"))  # type: ignore[arg-type]
    for name in [n for n in result if n.endswith("graph.dgl")]:
        (graph,), _ = dgl.load_graphs(str(store / name))
        fields = [{name: value.tolist() for name, value in data.items()} for data in (graph.ndata, graph.edata)]
        result[name] = [*fields, *(ends.tolist() for ends in graph.edges(order="eid"))]
        del manifest["files"][name]
    return {**result, "manifest.yaml": manifest}
