"""distegnn export: the package predicts what dist_egnn.load does, where neither dist_egnn nor DGL can be imported."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_predictor import RUNS, settings, write

import dist_egnn
from dist_egnn.commands.export import run_export
from dist_egnn.data import graphs
from dist_egnn.errors import Failure

PAGE = Path(__file__).parents[2] / "docs" / "inference.md"
NO_DROP = [*RUNS["named"], "data.edge_drop=0"]


def inputs(nodes: int = 300) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """x, v, f and a of NO_DROP in float32, and the attributes."""
    rng = np.random.default_rng(1)
    x, v = rng.uniform(size=(nodes, 3)).astype("f4"), rng.normal(size=(nodes, 3)).astype("f4")
    mass, viscosity = rng.uniform(0.5, 2, (2, nodes)).astype("f4")
    f = np.stack([np.linalg.norm(v, axis=1), viscosity / viscosity.max(), mass], 1)
    return {"x": x, "v": v, "f": f, "a": viscosity[:, None]}, {"mass": mass, "viscosity": viscosity}


def call(program: Any, arrays: dict[str, np.ndarray], radius: float = 0.27, **more: Any) -> tuple[Any, Any]:
    src, dst = graphs.radius_edges(arrays["x"], radius)
    tensors = {name: torch.from_numpy(value) for name, value in arrays.items()}
    return program(**tensors, edge_index=torch.from_numpy(np.stack([src, dst])), **more)


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["model.name=EGNN", "model.attention=true", "model.normalize=true", "model.gravity=[0,-9.81,0]"],
        ["model.name=FastRF"],
        ["model.name=FastSchNet"],
    ],
    ids=str,
)
def test_the_package_predicts_what_load_does(small, tmp_path, more):
    run = write(settings(small, tmp_path / "run", *NO_DROP, *more))
    run_export(run, tmp_path / "model.pt2")
    extra = {"dist_egnn.json": ""}
    program = torch.export.load(tmp_path / "model.pt2", extra_files=extra).module()
    assert json.loads(extra["dist_egnn.json"])["node_attributes"] in (["viscosity"], [])
    predict = dist_egnn.load(run)
    for nodes in (300, 40):
        arrays, named = inputs(nodes)
        if not predict.width:
            arrays |= {"f": arrays["f"][:, :0], "a": arrays["a"][:, :0]}
        expected = predict.with_virtual(arrays["x"], arrays["v"], named)
        size = max(1, np.abs(expected[0]).max())
        for value, other in zip(call(program, arrays), expected, strict=True):
            np.testing.assert_allclose(value.detach(), other, rtol=1e-6, atol=1e-6 * size)


SCRIPT = """
import sys
sys.modules["dgl"] = sys.modules["dist_egnn"] = None  # cannot be imported
import numpy as np, torch
loaded = np.load("inputs.npz")
x, v, f, a = (torch.from_numpy(loaded[name]) for name in "xvfa")
{block}
np.savez("outputs.npz", later=later, z=z)
"""


def test_the_page_without_dgl_and_dist_egnn(small, tmp_path):
    run = write(settings(small, tmp_path / "run", *NO_DROP))
    run_export(run, tmp_path / "fluid.pt2")
    arrays, named = inputs()
    np.savez(tmp_path / "inputs.npz", **arrays)
    (block,) = [b for b in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S) if "torch.export" in b]
    (tmp_path / "script.py").write_text(SCRIPT.format(block=block))
    subprocess.run([sys.executable, "script.py"], cwd=tmp_path, check=True)
    later, z = dist_egnn.load(run).with_virtual(arrays["x"], arrays["v"], named)
    outputs = np.load(tmp_path / "outputs.npz")
    np.testing.assert_allclose(outputs["later"], later, rtol=1e-6, atol=1e-6 * np.abs(later).max())
    np.testing.assert_allclose(outputs["z"], z, rtol=1e-6, atol=1e-6 * np.abs(later).max())


@pytest.mark.parametrize(
    ("more", "out", "message"),
    [
        (["data.fixed=mass"], "a.pt2", r"best\.pt: data\.fixed=mass: .*use dist_egnn\.load"),
        (["model.name=Linear"], "a.pt2", r"model\.name=Linear .*: only a Network"),
        (["model.precision=bf16-messages"], "a.pt2", r"model\.precision=bf16-messages: only float32"),
        (["data.features=[]"], "a.pt2", r"data\.features=\[\]: a package cannot hold"),
        ([], "a.onnx", r"--out .*a\.onnx: name a \.pt2 file"),
    ],
)
def test_what_cannot_be_exported_is_refused(small, tmp_path, more, out, message):
    run = write(settings(small, tmp_path / "run", *NO_DROP, *more))
    with pytest.raises(Failure, match=message):
        run_export(run, tmp_path / out)
    assert not (tmp_path / out).exists()
