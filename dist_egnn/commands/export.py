"""`distegnn export`: a model as a torch.export package, which predicts without dist_egnn and DGL."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .. import config as configs
from ..data import graphs
from ..errors import Failure
from ..evaluate.predictor import Predictor, feature_factors
from ..models.network import Network
from ..models.plain import PlainNetwork
from ..train import run_dir
from ..utils.console import print_table
from ..utils.filesystem import sha256, write_atomically

ABOUT = "dist_egnn.json"  # a file in the package
TOLERANCE = 1e-4


def run_export(run: Path, out: Path) -> None:
    """Write the model of a run or checkpoint to a .pt2 file. Raises Failure for one that cannot be exported."""
    if out.suffix != ".pt2":
        raise Failure(f"--out {out}: name a .pt2 file, as torch.export.load expects")
    predictor, weights = Predictor(run), run_dir.weights_file(run)
    data, network = predictor.config.data, predictor.model
    if data.fixed:
        raise Failure(f"{weights}: data.fixed={data.fixed}: a package would move fixed nodes; use dist_egnn.load")
    if not isinstance(network, Network) or type(network).forward is not Network.forward:
        kind = f"model.name={predictor.config.model.name} ({type(network).__name__})"
        raise Failure(f"{weights}: {kind}: only a Network without a forward of its own can be exported")
    if predictor.config.model.precision != "float32":
        raise Failure(f"{weights}: model.precision={predictor.config.model.precision}: only float32 can be exported")
    names, width, scale = predictor.features, predictor.width, predictor.spec.velocity_scale
    if not all(p.numel() for p in network.parameters()):  # torch.export.save fails for these
        raise Failure(f"{weights}: data.features=[]: a package cannot hold weights without columns; use dist_egnn.load")
    factors = torch.from_numpy(feature_factors("features", names, width, scale)) if width else torch.ones(1)
    plain = PlainNetwork(network, scale, factors).eval()
    rows = {"x": "nodes", "v": "nodes", "f": "nodes", "a": "nodes", "edge_index": "edges", "shift": "edges"}
    inputs = _sample(width, predictor.attribute_width, data.periodic)
    dims = {name: torch.export.Dim(name, min=2) for name in ("nodes", "edges")}
    shapes = {name: {int(name == "edge_index"): dims[rows[name]]} for name in inputs}
    with torch.no_grad():
        program = torch.export.export(plain, (), inputs, dynamic_shapes=shapes, strict=True)
    _compare(predictor, program, inputs, weights)
    about = {"features": names, "node_attributes": predictor.node_attributes, "weights": sha256(weights)}
    content = io.BytesIO()
    extra = {ABOUT: json.dumps(about | {"config": configs.to_yaml(predictor.config)})}
    torch.export.save(program, content, extra_files=extra)
    write_atomically(out, content.getvalue())
    listed = {"x": "positions", "v": "velocities", "f": names, "a": predictor.node_attributes}
    listed |= {"edge_index": "sources, destinations", "shift": "lattice vectors"}
    contents = {
        name: value if isinstance(value, str) else ", ".join(value or ["all"]) for name, value in listed.items()
    }
    table = [[name, _shape(name, t), contents[name]] for name, t in inputs.items()]
    print_table(f"{out}: {predictor.config.model.name} of {weights}", ["input", "shape", "content"], table)


def _shape(name: str, t: Tensor) -> str:
    return "(2, E)" if name == "edge_index" else f"({'E' if name == 'shift' else 'N'}, {t.shape[1]})"


def _sample(features: int, node_attributes: int, periodic: bool, nodes: int = 12, edges: int = 40) -> dict[str, Tensor]:
    """Random inputs of a package."""
    draw = torch.Generator().manual_seed(0)
    widths = {"x": 3, "v": 3, "f": features, "a": node_attributes}
    inputs = {name: torch.rand(nodes, width, generator=draw) for name, width in widths.items()}
    inputs["edge_index"] = torch.randint(nodes, (2, edges), generator=draw)
    return inputs | ({"shift": torch.zeros(edges, 3)} if periodic else {})


def _compare(
    predictor: Predictor, program: torch.export.ExportedProgram, inputs: dict[str, Tensor], weights: Path
) -> None:
    """Raise Failure unless the package predicts what the model does."""
    scale = predictor.spec.velocity_scale
    src, dst = inputs["edge_index"].numpy()
    order = np.lexsort((src, dst))
    factors = feature_factors("features", predictor.features, predictor.width, scale)
    fields = {"x": inputs["x"], "v": inputs["v"] * scale, "f": inputs["f"] * factors, "a": inputs["a"]}
    graph = graphs.build_graph(src[order], dst[order], fields, np.full(3, 1e3) if "shift" in inputs else None)
    with torch.no_grad():
        (x, z), (exported_x, exported_z) = predictor.model(graph), program.module()(**inputs)
    for value, exported in ((x, exported_x), (z[0], exported_z)):
        if not torch.allclose(value, exported, TOLERANCE, TOLERANCE):
            raise Failure(
                f"{weights}: the exported model differs from the model by {(value - exported).abs().max():.1e}"
            )
