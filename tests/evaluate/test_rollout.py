"""Rollouts against closed forms and plain loops; the file as VTK reads it; what ends early."""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from dist_egnn.partition import assign
from small_data import EDGES, random_pairs

from dist_egnn import cli, config
from dist_egnn.data import graphs
from dist_egnn.data.edges import EdgeRule, edges_of
from dist_egnn.data.trajectories import Trajectories, Writer
from dist_egnn.distributed import comm, spawn
from dist_egnn.errors import Failure
from dist_egnn.evaluate import metrics, rollout, sinkhorn, step_errors
from dist_egnn.evaluate.boundary_conditions import BOUNDS, BoundaryConditions
from dist_egnn.evaluate.repartition import Repartitioner, relabel
from dist_egnn.evaluate.vtkhdf import Frame, Rollout, RolloutWriter, finish, partial_path
from dist_egnn.train import checkpoint, trainer
from dist_egnn.utils import filesystem, memory

ROOT = Path(__file__).parents[2]
HORIZON, STEPS, DT = 3, 5, 0.5
BOX = np.array([[-1.0, -1, -1], [2.0, 2, 2]])
UNIT = np.array([[0.0, 0, 0], [1.0, 1, 1]])  # full of nodes
DATA = ["data.velocity_scale=1", f"data.horizon={HORIZON}", "data.radius=0.35", "data.features=[mass/max,speed/max]"]
MODEL = ["data.node_attributes=[mass]", "model.hidden=16", "model.layers=2"]
CommandLine = Callable[..., tuple[int, str, str]]


def write(
    path: Path, *, velocity: bool = True, box: np.ndarray | None = BOX, periodic: bool = False, shift: Any = None
) -> Path:
    """Three trajectories of 60 nodes, 12 frames, that fall: x = x0 + u t + g t² / 2."""
    draw = np.random.default_rng(5)
    start, u = draw.uniform(size=(60, 3)), 0.05 * draw.normal(size=(60, 3))
    t, g = DT * np.arange(12)[:, None, None], np.array([0.0, -0.02, 0.0])
    attributes = {"mass": draw.uniform(1, 2, 60), "kind": np.arange(60.0) % 3}
    v = np.broadcast_to(u, (12, 60, 3)) + g * t if velocity else None
    with Writer(path, {}) as out:
        for split in ("train", "valid", "test"):
            options: dict[str, Any] = {"velocity": v, "attributes": attributes, "box": box, "periodic": periodic}
            position = start + u * t + g * t**2 / 2
            out.add(position, split=split, dt=DT, source="test", edges=random_pairs(60, 0), shift=shift, **options)
    return path


def make_run(folder: Path, *overrides: str, data: Path | None = None, t: float | None = None, **given: Any) -> Path:
    """A run as `distegnn train` leaves it, untrained, on data written with the options ``given``.

    t: of a Linear model, x + t v.
    """
    data = write(folder.parent / "a.h5", **given) if data is None else data
    overrides = (*overrides, "model.name=Linear") if t is not None else overrides
    settings = config.load(None, [f"data.path={data}", f"run.dir={folder}", *DATA, *MODEL, *overrides])
    model = trainer.build_model(settings, (2, 1), comm.SingleProcess())
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():  # these start near zero, which would hide errors upstream
        if name.endswith(("phi_x.2.weight", "phi_xv.2.weight", "phi_z.2.weight")):
            parameter.data = 0.02 * torch.randn(parameter.shape, generator=generator)
    if t is not None:
        model.t.data.fill_(t)  # type: ignore[union-attr, operator]
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config.to_yaml(settings))
    checkpoint.save(folder / "best.pt", checkpoint.weights_only(model, settings))
    return folder


def roll_out(run: Path, out: Path, parts: int | None = None, double: bool = False, **options: Any) -> list[Frame]:
    job = rollout.prepare(run, trajectory=0, out=out, parts=parts, **{"steps": STEPS, **options})
    job, processes = replace(job, double=double), job.config.partition.parts
    assert [stopped for stopped, _ in spawn.run_ranks(rollout.roll_out, processes, job)] == [""] * processes
    assert finish(out) == job.steps + 1
    with Rollout(out) as frames:
        return list(frames)


@pytest.mark.parametrize("kind", ["stored", "backward", "forward", "scaled"])
def test_linear_dynamics_in_closed_form(tmp_path: Path, kind: str) -> None:
    """x_{k+1} = x_k + t v_k and v_{k+1} = (x_{k+1} − x_k) / τ, so v_k = (t/τ)^k v_0 and x_k = x_0 + t v_0 Σ_{i<k}
    (t/τ)^i."""
    tau = HORIZON if kind == "forward" else HORIZON * DT  # forward differences are per frame, others per time
    ratio, scale, difference = 0.8, 5 if kind == "scaled" else 1, kind if "ward" in kind else "backward"
    t, given = 0.8 * tau, [f"data.velocity={difference}", f"data.velocity_scale={scale}"]
    run = make_run(tmp_path / "run", *given, t=t / scale, velocity="ward" not in kind)
    frames = roll_out(run, tmp_path / "out.vtkhdf", double=True, start=1)
    file = Trajectories(tmp_path / "a.h5")
    x0, v0 = file.position(0, 1).astype(float), file.velocity(0, 1, difference).astype(float)
    for k, frame in enumerate(frames):
        np.testing.assert_allclose(frame.position, x0 + t * v0 * (1 - ratio**k) / (1 - ratio), atol=1e-7)
        np.testing.assert_allclose(frame.velocity, v0 * ratio**k, atol=1e-7)
        assert (frame.step, frame.frame, frame.time) == (k, 1 + 3 * k, DT * (1 + 3 * k))
        if 1 + 3 * k < 12:
            np.testing.assert_allclose(frame.error, frame.position - file.position(0, 1 + 3 * k), atol=1e-7)
    assert [frame.error is None for frame in frames] == [False] * 4 + [True] * 2


def test_positions_that_were_shifted(tmp_path: Path) -> None:
    """The file of a rollout has the source's coordinates, to more digits than float32 has."""
    run, shift = make_run(tmp_path / "run"), np.array([5e6, -1e6, 0])
    frames = roll_out(run, tmp_path / "a.vtkhdf")
    data = write(tmp_path / "b.h5", shift=shift)
    for frame, moved in zip(frames, roll_out(run, tmp_path / "b.vtkhdf", data=data), strict=True):
        np.testing.assert_allclose(moved.position - shift, frame.position, atol=1e-8)
        np.testing.assert_allclose(moved.velocity, frame.velocity, atol=1e-7)
        if frame.error is not None and moved.error is not None:
            np.testing.assert_allclose(moved.error, frame.error, atol=1e-7)
        if frame.virtual is not None and moved.virtual is not None:
            np.testing.assert_allclose(moved.virtual - shift, frame.virtual, atol=1e-8)
    with Rollout(tmp_path / "b.vtkhdf") as rolled:
        np.testing.assert_array_equal(rolled.box, BOX + shift)
    table, moved_table = (rollout.error_table(tmp_path / f"{name}.vtkhdf") for name in "ab")
    np.testing.assert_allclose(moved_table["mse"], table["mse"], rtol=1e-6)


def plain_loop(run: Path, data: Path, parts: int, repartition: int, method: str) -> list[np.ndarray]:
    """The positions by one process and the torch engine on the cut graph: the whole one without edges that cross a cut."""
    settings = config.load(run / "config.yaml", ["model.engine=torch"])
    model = trainer.build_model(settings, (2, 1), comm.SingleProcess()).double()
    checkpoint.load_weights(model, checkpoint.load(run / "best.pt"), run / "best.pt")
    file = Trajectories(data)
    x, v = file.position(0, 0).astype(float), file.velocity(0, 0).astype(float)
    mass, positions = file.attribute(0, "mass").astype(float), [x]
    for step in range(STEPS):
        rule = EdgeRule.of(settings.data)
        side = file.sides(0, rule.longest) if settings.data.periodic else None
        edges = edges_of(x, rule, side, file.edges(0))
        if step % repartition == 0:
            part = assign.assign(method, x if side is None else graphs.wrap(x, side), *edges, parts)
        src, dst = (end[part[edges[0]] == part[edges[1]]] for end in edges)
        speed = np.linalg.norm(v, axis=1)
        fields = {"x": x, "v": v, "f": np.stack([mass / mass.max(), speed / speed.max()], 1), "a": mass[:, None]}
        with torch.no_grad():
            y = model(graphs.build_graph(src, dst, fields, side))[0].numpy()
        x, v = y, (y - x) / (HORIZON * DT)
        positions.append(x)
    return positions


CASES = [(1, 1, 0.0, "metis", False), (2, 1, 0.3, "metis", False), (3, 2, 0.0, "metis", False)]
CASES += [(2, 2, 0.0, "bisection exchange", True), (1, 1, 0.3, "metis", True), (2, 2, 0.3, "bisection", True)]
CASES += [(3, 2, 0.3, "bisection exchange", True)]
CASES += [(2, 1, 0.0, "bisection knn", False), (3, 2, 0.3, "metis knn exchange", True)]
CASES += [(2, 2, 0.3, "metis given", True), (2, 1, 0.0, "bisection given exchange", False)]


@pytest.mark.parametrize(("parts", "repartition", "drop", "method", "periodic"), CASES)
def test_processes_equal_one_on_the_same_cut_graphs(
    tmp_path: Path, parts: int, repartition: int, drop: float, method: str, periodic: bool
) -> None:
    method, *more = method.split()
    keys = [f"data.edge_drop={drop}", f"partition.method={method}", f"data.periodic={periodic}"]
    keys += [f"data.{key}={value}" for name in EDGES if name in more for key, value in EDGES[name].items()]
    halo = "exchange" in more
    keys += ["partition.halo=exchange"] * halo
    run = make_run(tmp_path / "run", *keys, periodic=periodic, box=UNIT if periodic else BOX)
    frames = roll_out(run, tmp_path / "out.vtkhdf", parts=parts, double=True, repartition=repartition)
    expected = plain_loop(run, tmp_path / "a.h5", 1 if halo else parts, repartition, method)
    for frame, x in zip(frames, expected, strict=True):
        np.testing.assert_allclose(frame.position, x, rtol=0, atol=1e-11)
    assert 0.01 < np.abs(expected[-1] - expected[0]).max() < 10  # the nodes move
    assert {len(np.unique(frame.part)) for frame in frames} == {parts}
    if parts > 1:
        # owners change, and only with a new partition; frame k + 1 was computed with the partition of step k
        changed = [(a.part != b.part).any() for a, b in itertools.pairwise(frames[1:])]
        assert any(changed)
        assert not any(changed[k - 1] for k in range(1, STEPS) if k % repartition)


def test_cut_and_periodic_edges_matter(tmp_path: Path) -> None:
    """Negative controls of the comparison above."""
    data = write(tmp_path / "a.h5", periodic=True, box=UNIT)
    runs = [make_run(tmp_path / f"{periodic}", f"data.periodic={periodic}", data=data) for periodic in (True, False)]
    periodic, cut, whole = (
        plain_loop(run, data, parts, 1, "metis")[-1] for run, parts in zip([*runs, runs[1]], (1, 2, 1), strict=True)
    )
    assert np.abs(periodic - whole).max() > 1e-4
    assert np.abs(cut - whole).max() > 1e-4


def test_part_sizes_follow_the_weights(tmp_path: Path) -> None:
    """A number of processes other than in training has equal parts."""
    keys = ["partition.parts=3", "partition.weights=[1,3,2]", "partition.method=bisection"]
    run = make_run(tmp_path / "run", *keys, t=HORIZON * DT)
    frames = roll_out(run, tmp_path / "out.vtkhdf")
    assert [np.bincount(frame.part).tolist() for frame in frames] == [[10, 30, 20]] * (STEPS + 1)
    assert any((a.part != b.part).any() for a, b in itertools.pairwise(frames))
    section = rollout.prepare(run, trajectory=0, steps=1, out=tmp_path / "o.vtkhdf", parts=2).config.partition
    assert (section.weights, section.parts) == (None, 2)


def _local_graph(group: comm.Comm, x: np.ndarray) -> tuple[np.ndarray, ...]:
    spec = SimpleNamespace(rule=EdgeRule(radius=1.5, edge_drop=0.37))
    job = SimpleNamespace(repartition=1, config=config.load(None, ["partition.method=bisection"]), spec=spec)
    return Repartitioner(group, job, len(x)).local_graph(x, 0)[:3]  # type: ignore[arg-type]


def test_edges_of_equal_length_are_dropped_alike(tmp_path: Path) -> None:
    """Most edges of a lattice tie: the order of edges decides, on parts as on the whole graph."""
    lattice = np.stack(np.meshgrid(*[np.arange(4.0)] * 3), -1).reshape(-1, 3)
    src, dst = graphs.drop_longest(lattice, *graphs.radius_edges(lattice, 1.5), 0.37)
    for own, local_src, local_dst in spawn.run_ranks(_local_graph, 2, lattice):
        assert len(own) == 32
        inside = np.isin(src, own) & np.isin(dst, own)
        np.testing.assert_array_equal(own[local_src], src[inside])
        np.testing.assert_array_equal(own[local_dst], dst[inside])


def test_parts_keep_their_numbers() -> None:
    before, shifted = np.repeat([0, 1, 2], 10), np.repeat([2, 0, 1], 10)
    shifted[9] = 0
    np.testing.assert_array_equal(relabel(shifted, before, 3), np.r_[[0] * 9, [1] * 11, [2] * 10])
    weighted = relabel(shifted, before, 3, [1.0, 2.0, 2.0])  # only 1 and 2 may be exchanged
    np.testing.assert_array_equal(weighted, np.r_[[1] * 9, [0] * 11, [2] * 10])


def test_walls_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = make_run(tmp_path / "run", t=1.0, box=UNIT)
    x = np.tile([0.9, 0.5, 0.5], (60, 1))
    predicted = x.copy()
    predicted[:4, 0] = 1.3, -0.2, 2.4, 0.7
    positions = {"none": [1.3, -0.2, 2.4, 0.7], "clamp": [1, 0, 1, 0.7], "reflect": [0.7, 0.2, 0.4, 0.7]}
    moves = {"none": [0.4, -1.1, 1.5, -0.2], "clamp": [0.1, -0.9, 0.1, -0.2], "reflect": [-0.4, 1.1, 1.5, -0.2]}
    moving = [0, 2, 3]  # node 1 is of kind 1 and fixed
    for bounds in BOUNDS:
        job = rollout.prepare(run, trajectory=0, steps=1, out=tmp_path / "o.vtkhdf", bounds=bounds, fixed="kind=1")
        after, v = BoundaryConditions(Trajectories(tmp_path / "a.h5"), job).apply(x, predicted, 1)
        np.testing.assert_allclose(after[moving, 0], np.array(positions[bounds])[moving], atol=1e-12)
        np.testing.assert_allclose(v[moving, 0] * HORIZON * DT, np.array(moves[bounds])[moving], atol=1e-12)
        np.testing.assert_array_equal(after[1::3], x[1::3])
        assert (v[1::3] == 0).all()
        assert "node 1 moves in the data" in capsys.readouterr().err


def test_offsets_of_every_step(tmp_path: Path) -> None:
    """As vtkHDFReader assembles an UnstructuredGrid of one part from the group Steps."""
    frames = roll_out(make_run(tmp_path / "run"), tmp_path / "out.vtkhdf", parts=2)
    with h5py.File(tmp_path / "out.vtkhdf") as file:
        root, steps, data = file["VTKHDF"], file["VTKHDF/Steps"], file["VTKHDF/PointData"]
        kind = root.attrs.get_id("Type").get_type()
        assert (kind.is_variable_str(), kind.get_cset()) == (False, h5py.h5t.CSET_ASCII)
        assert (root.attrs["Type"], root.attrs["Version"].tolist()) == (b"UnstructuredGrid", [2, 0])
        assert steps.attrs["NSteps"] == len(steps["Values"]) == STEPS + 1  # VTK copies all of Values
        assert root["Types"].dtype == np.uint8
        assert set(data) == {"velocity", "error", "part", "mass", "kind"}
        sizes = ("NumberOfPoints", "NumberOfCells", "NumberOfConnectivityIds")
        offsets = ("PartOffsets", "PointOffsets", "CellOffsets", "ConnectivityIdOffsets")
        for k, frame in enumerate(frames):
            part, point, cell, link = (int(np.ravel(steps[name][k])[0]) for name in offsets)
            assert int(steps["NumberOfParts"][k]) == 1
            assert [int(root[name][part]) for name in sizes] == [60, 60, 60]
            np.testing.assert_array_equal(root["Points"][point : point + 60], frame.position)
            np.testing.assert_array_equal(root["Types"][cell : cell + 60], 1)
            np.testing.assert_array_equal(root["Connectivity"][link : link + 60], np.arange(60))
            np.testing.assert_array_equal(root["Offsets"][cell + part : cell + part + 61], np.arange(61))
            row = {name: int(steps["PointDataOffsets"][name][k]) for name in data}
            assert all(len(data[name][row[name] : row[name] + 60]) == 60 for name in data)
            np.testing.assert_array_equal(data["velocity"][row["velocity"] :][:60], frame.velocity)
            assert row["mass"] == 0
            assert (None if frame.virtual is None else frame.virtual.shape) == ((3, 3) if k else None)


def test_errors_by_their_definitions(tmp_path: Path) -> None:
    frames = roll_out(make_run(tmp_path / "run"), tmp_path / "out.vtkhdf")
    table = step_errors.error_table(tmp_path / "out.vtkhdf").set_index("step")
    file = Trajectories(tmp_path / "a.h5")
    mass, x0, v0 = file.attribute(0, "mass")[:, None], file.position(0, 0), file.velocity(0, 0)
    for k in range(4):
        y, x = file.position(0, 3 * k).astype(float), frames[k].position
        v = (y - file.position(0, 3 * k - 3)) / 1.5 if k else v0
        expected = {
            "mse": ((x - y) ** 2).mean(),
            "mae": np.abs(x - y).mean(),
            "static_mse": ((x0 - y) ** 2).mean(),
            "linear_mse": ((x0 + v0 * 1.5 * k - y) ** 2).mean(),
            "kinetic_energy": (mass * frames[k].velocity ** 2).sum() / 2,
            "true_kinetic_energy": (mass * v**2).sum() / 2,
        }
        assert table.loc[k, list(expected)].to_dict() == pytest.approx(expected, rel=1e-4, abs=1e-9)
    assert table.loc[4:, ["mse", "mae", "static_mse", "rmsd", "true_kinetic_energy"]].isna().all(None)
    assert table.loc[:, ["kinetic_energy", "radius_of_gyration", "time"]].notna().all(None)


@pytest.fixture
def distegnn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    """distegnn(arguments): the command line in tmp_path, in this process; returns exit code, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["distegnn", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        return code, *capsys.readouterr()

    return run


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


@pytest.mark.parametrize(
    ("parts", "t", "periodic", "message"),
    [
        (1, 30.0, False, r"node \d+ is .* --bounds"),
        (2, 30.0, False, r"node \d+ is .* --bounds"),
        (1, 30.0, True, "node .* moves by .*, over 10 times the box.*"),
        (1, np.nan, False, "60 positions are NaN or infinite.*"),
    ],
)
def test_a_rollout_that_diverges_is_stopped(
    tmp_path: Path, distegnn: CommandLine, parts: int, t: float, periodic: bool, message: str
) -> None:
    """x_k − x_0 grows by a factor of 20 a step."""
    make_run(tmp_path / "run", f"data.periodic={periodic}", t=t, periodic=periodic, box=UNIT if periodic else BOX)
    arguments = ("--trajectory", 0, "--steps", 50, "--parts", parts, "--out", "out.vtkhdf", "--limit", 0)
    code, out, err = distegnn("rollout", "run", *arguments)
    match = re.search(rf"error: out\.vtkhdf: stopped at step (\d+): {message}\n", err)
    assert (code, bool(match)) == (2, True), err
    with Rollout(tmp_path / "out.vtkhdf") as frames:
        assert len(frames) == len(pd.read_csv(tmp_path / "out.csv")) == int(match[1])  # type: ignore[index]
        assert [frame.step for frame in frames] == list(range(len(frames)))
        assert (len(frames) == 1) == bool(np.isnan(t))
        assert all(np.abs(frame.position - 0.5).max() <= 30 for frame in frames)
        steps = frames.file["VTKHDF/Steps"]
        assert steps.attrs["NSteps"] == len(steps["Values"]) == len(frames)
        assert len(frames.file["VTKHDF/Points"]) == 60 * len(frames)
        assert f"{len(frames)} of 51 frames" in out
    assert names(tmp_path) == ["a.h5", "out.csv", "out.vtkhdf", "run"]


@pytest.mark.parametrize(("limit", "frames"), [(0, 6), (30, 4), (10, 3)])
def test_a_rollout_that_implodes(tmp_path: Path, capsys: pytest.CaptureFixture[str], limit: float, frames: int) -> None:
    """Nodes fly to one point, x_k = (1 − 0.24 k) x_0: from 3.8 neighbours on over 13 to all 299 others after 4 steps."""
    x = np.random.default_rng(0).uniform(-0.5, 0.5, (300, 3))
    with Writer(tmp_path / "b.h5", {}) as out:
        moved, v = np.stack([x, x - 0.001 * x]), np.stack([-0.24 * x] * 2)
        options: dict[str, Any] = {"attributes": {"mass": np.ones(300)}, "velocity": v}
        out.add(moved, split="test", dt=1.0, source="test", **options)
    run = make_run(tmp_path / "run", "data.radius=0.16", "data.horizon=1", data=tmp_path / "b.h5", t=1.0)
    arguments: dict[str, Any] = {"trajectory": 0, "steps": 5, "out": tmp_path / "out.vtkhdf", "limit": limit}
    if limit:
        with pytest.raises(Failure, match=r"step \d: neighbours of a node .* --limit .*; train longer$"):
            rollout.run_rollout(run, **arguments)
    else:
        rollout.run_rollout(run, **arguments)
    assert re.findall(r"warning: step (\d): (\w+)", capsys.readouterr().err)[0] == ("2", "neighbours")
    with Rollout(tmp_path / "out.vtkhdf") as file:
        assert (len(file), "neighbours" in file.meta.get("stopped", "")) == (frames, limit > 0)


def test_an_interrupted_rollout_keeps_its_frames(
    tmp_path: Path, distegnn: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = RolloutWriter.add

    def add(self: RolloutWriter, *frame: Any) -> None:
        if self.count == 3 and not self.path.name.startswith("out.vtkhdf.short"):
            raise KeyboardInterrupt
        plain(self, *frame)

    monkeypatch.setattr(RolloutWriter, "add", add)
    make_run(tmp_path / "run", t=1.0)
    partial_path(tmp_path / "out.vtkhdf").write_text("of a rollout that was killed")
    result = distegnn("rollout", "run", "--trajectory", 0, "--steps", 9, "--out", "out.vtkhdf")
    assert result == (130, "out.vtkhdf: 3 of 10 frames\n", "interrupted\n")
    assert [frame.step for frame in Rollout(tmp_path / "out.vtkhdf")] == [0, 1, 2]
    assert names(tmp_path) == ["a.h5", "out.vtkhdf", "run"]


def _roll_out_and_die(group: comm.Comm, job: rollout.RolloutJob) -> str:
    plain = Repartitioner.local_graph

    def local_graph(self: Repartitioner, x: np.ndarray, step: int) -> Any:
        if step == 2 and group.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(self, x, step)

    Repartitioner.local_graph = local_graph  # type: ignore[method-assign]
    return rollout.roll_out(group, job)


def test_a_killed_process_leaves_the_frames_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, out = make_run(tmp_path / "run"), tmp_path / "out.vtkhdf"
    monkeypatch.setattr(rollout, "roll_out", _roll_out_and_die)
    with pytest.raises(Failure, match="process 1 of 2 died"):
        rollout.run_rollout(run, parts=2, trajectory=0, steps=5, out=out)
    assert [frame.step for frame in Rollout(out)] == [0, 1, 2]
    assert not partial_path(out).exists()


KILLED = """
import sys, numpy as np
from pathlib import Path
from dist_egnn.evaluate.vtkhdf import RolloutWriter
n, x = 5000, np.zeros((5000, 3), np.float32)
meta = {"start": 0, "horizon": 1, "dt": 1.0, "true_frames": 10**6}
out = RolloutWriter(Path(sys.argv[1]), (100_000, n, 2), meta, {}, None, np.dtype(np.float32))
k = 0
while True:
    out.add(x + k, x - k, np.full(n, k), x + k, np.full((2, 3), k))
    k += 1
    if k == 5: print("going", flush=True)
"""


@pytest.mark.parametrize("delay", [0.0, 0.013, 0.05, 0.11])
def test_a_killed_writer_leaves_its_complete_frames(tmp_path: Path, delay: float) -> None:
    out = tmp_path / "out.vtkhdf"
    with subprocess.Popen([sys.executable, "-c", KILLED, str(out)], stdout=subprocess.PIPE) as writer:
        try:
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"going\n"
            time.sleep(delay)
        finally:
            writer.kill()
    with pytest.raises(Failure, match=r"no such file; .*out\.vtkhdf\.partial"):
        Rollout(out)
    with Rollout(partial_path(out)) as frames:
        count = len(frames)
        assert count >= 5
        for k in (0, 1, count // 2, count - 1):
            frame = frames[k]
            arrays = (frame.position, -frame.velocity, frame.part, frame.error, frame.virtual if k else None)
            assert all((array == k).all() for array in arrays if array is not None)
    assert finish(out) == count
    with Rollout(out) as frames:
        assert len(frames) == count
        assert (frames[count - 1].position == count - 1).all()
    assert out.stat().st_size < 5000 * 40 * count + 10**6


def test_from_the_command_line(tmp_path: Path, distegnn: CommandLine) -> None:
    """With relative paths, on a run that was trained on a store."""
    file = Trajectories(write(tmp_path / "a.h5"))
    code, _, err = distegnn("partition", "a.h5", "--radius", 0.35, f"data.horizon={HORIZON}", "--out", "store")
    assert code == 0, err
    make_run(tmp_path / "run", data=tmp_path / "store")
    arguments = ["--trajectory", 2, "--steps", 4, "--bounds", "reflect", "--fixed", "kind=2", "--out", "new/out.vtkhdf"]
    code, _, err = distegnn("rollout", "run", *arguments)
    assert re.fullmatch(r"error: run: .*store, .* file a\.h5; .* --data\n", err)
    assert code == 2
    code, out, err = distegnn("rollout", "run", *arguments, "--data", "a.h5")
    assert code == 0, err
    lines = out.splitlines()
    title = r"new/out\.vtkhdf: 5 frames, \S+ steps/s \(\S+ particles/s\); the whole table is new/out\.csv"
    assert re.fullmatch(title, lines[0])
    assert [line.split()[0] for line in lines[3:]] == ["1", "2", "3", "4"]
    fixed, start = file.attribute(2, "kind") == 2, file.position(2, 0)
    with Rollout(tmp_path / "new" / "out.vtkhdf") as frames:
        assert [frames.meta[key] for key in ("trajectory", "fixed", "repartition")] == [2, "kind=2", 1]
        np.testing.assert_array_equal(frames.box, BOX)
        np.testing.assert_array_equal(frames.attributes["mass"], file.attribute(2, "mass"))
        assert {len(np.unique(frame.part)) for frame in frames} == {2}  # as many processes as the store has parts
        np.testing.assert_array_equal(frames[4].position[fixed], start[fixed])
        assert (frames[4].position[~fixed] != start[~fixed]).any()
    assert names(tmp_path / "new") == ["out.csv", "out.vtkhdf"]


def test_wrong_options_are_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, periodic = make_run(tmp_path / "run", t=1.0, velocity=False, box=None), write(tmp_path / "p.h5", periodic=True)
    (tmp_path / "there.vtkhdf").touch()
    valid: dict[str, Any] = {"trajectory": 0, "steps": 2, "out": tmp_path / "o.vtkhdf"}
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"trajectory": 3}, r"--trajectory 3: .*a\.h5 has trajectories 0 to 2"),
        ({"start": 0}, r"--start 0: .* frames 1 to 11"),
        ({"steps": 0}, r"--steps 0"),
        ({"steps": 10**11}, r"o\.vtkhdf: disk full: needs"),
        ({"steps": 10**11, "out": tmp_path / "new" / "o.vtkhdf"}, r"o\.vtkhdf: disk full: needs"),
        ({"repartition": 0}, r"--repartition 0"),
        ({"bounds": "bounce"}, r"--bounds bounce: use one of none, reflect, clamp"),
        ({"bounds": "clamp"}, r"--bounds clamp: .* has no box"),
        ({"bounds": "clamp", "data": periodic}, r"--bounds clamp: .* periodic box"),
        ({"fixed": "kind=b"}, r"--fixed kind=b: write NAME, or NAME=VALUE"),
        ({"fixed": "kind=7"}, r"--fixed kind=7: "),
        ({"fixed": "sort=1"}, r"no node attribute 'sort'"),
        ({"out": tmp_path / "o.h5"}, r"must end in \.vtkhdf"),
        ({"out": tmp_path / "there.vtkhdf"}, r"there\.vtkhdf: exists"),
        ({"data": tmp_path / "b.h5"}, r"b\.h5: no such file"),
        ({"parts": 0}, r"parts=0"),
        ({"parts": 61}, r"parts=61: .* 60 nodes"),
    ]
    for options, message in wrong:
        with pytest.raises(Failure, match=message):
            rollout.prepare(run, **{**valid, **options})
    with pytest.raises(Failure, match="not a run"):
        rollout.prepare(tmp_path, **valid)
    uneven = ["partition.parts=2", "partition.weights=[1,1000]", "partition.method=bisection"]
    with pytest.raises(Failure, match=r"partition\.weights=\[1,1000\]"):
        rollout.prepare(make_run(tmp_path / "uneven", *uneven, data=tmp_path / "a.h5"), **valid)
    assert rollout.prepare(run, **valid, start=10).start == 10
    monkeypatch.setattr(memory, "available_memory", lambda *_: 0.1e9)
    with pytest.raises(Failure, match=r"a\.h5: a step .* 0\.1 GB are free; raise --parts"):
        rollout.run_rollout(run, **valid)
    assert names(tmp_path) == ["a.h5", "p.h5", "run", "there.vtkhdf", "uneven"]


def test_a_file_without_a_frame_is_removed(tmp_path: Path) -> None:
    """Whatever its writer had written when it was interrupted; the reason is not hidden by another error."""
    out = tmp_path / "o.vtkhdf"
    meta = {"start": 0, "horizon": 1, "dt": 1.0, "true_frames": 1, "velocity": "stored"}
    for groups in ([], ["VTKHDF/Steps"], ["VTKHDF"], ["VTKHDF", "dist_egnn"]):
        RolloutWriter(out, (2, 4, 0), meta, {}, None, np.dtype(np.float32)).close()
        with h5py.File(partial_path(out), "a") as file:
            for name in groups:
                del file[name]
        assert finish(out) == 0
        assert names(tmp_path) == []


def test_two_rollouts_to_one_file(tmp_path: Path) -> None:
    """The second is refused and harms nothing; the lock file of a killed one has no effect."""
    run, out = make_run(tmp_path / "run"), tmp_path / "new" / "out.vtkhdf"
    with filesystem.lock_output(out, "busy"):
        partial_path(out).write_text("of the first")
        with pytest.raises(Failure, match=r"out\.vtkhdf: another rollout is writing it; .* --out"):
            rollout.run_rollout(run, trajectory=0, steps=1, out=out)
        assert partial_path(out).read_text() == "of the first"
    out.with_name("out.vtkhdf.lock").touch()
    rollout.run_rollout(run, trajectory=0, steps=1, out=out)
    assert names(out.parent) == ["out.csv", "out.vtkhdf"]


def test_damaged_rollouts_are_refused(tmp_path: Path) -> None:
    path, meta = tmp_path / "a.vtkhdf", {"start": 0, "horizon": 1, "dt": 1.0, "true_frames": 1}
    with pytest.raises(Failure, match="attribute 'part'"):
        RolloutWriter(path, (1, 2, 0), meta, {"part": np.zeros(2)}, None, np.dtype(np.float32))
    with h5py.File(partial_path(path), "r+") as file:
        del file["VTKHDF/NumberOfPoints"]
    (tmp_path / "text").write_bytes(b"text")
    h5py.File(tmp_path / "foreign", "w").close()
    for damaged in (partial_path(path), tmp_path / "text", tmp_path / "foreign"):
        with pytest.raises(Failure, match=rf"{damaged.name}: damaged .*`distegnn rollout`"):
            Rollout(damaged)


@pytest.mark.parametrize("parts", [1, 2])
def test_vtk_reads_every_step(tmp_path: Path, parts: int) -> None:
    """With vtkHDFReader, as in ParaView: times, points, cells, every array."""
    vtk = pytest.importorskip("vtkmodules.vtkIOHDF", reason="vtk is not installed (pip install vtk)")
    from vtkmodules.util.numpy_support import vtk_to_numpy
    from vtkmodules.vtkCommonExecutionModel import vtkStreamingDemandDrivenPipeline as Pipeline

    path = tmp_path / "out.vtkhdf"
    frames = roll_out(make_run(tmp_path / "run"), path, parts=parts, start=3)  # the data end before the rollout
    reader = vtk.vtkHDFReader()
    assert reader.CanReadFile(str(path))
    reader.SetFileName(str(path))
    reader.UpdateInformation()
    info = reader.GetOutputInformation(0)
    times = [info.Get(Pipeline.TIME_STEPS(), k) for k in range(info.Length(Pipeline.TIME_STEPS()))]
    assert times == [frame.time for frame in frames]
    assert [frame.error is None for frame in frames] == [False] * 3 + [True] * 3
    attributes = Rollout(path).attributes
    for k, frame in enumerate(frames):
        reader.SetStep(k)
        reader.Update()
        grid = reader.GetOutputDataObject(0)
        assert grid.GetClassName() == "vtkUnstructuredGrid"
        assert {grid.GetCellType(i) for i in range(grid.GetNumberOfCells())} == {1}  # vertices
        assert grid.GetNumberOfCells() == grid.GetNumberOfPoints() == 60
        np.testing.assert_array_equal(vtk_to_numpy(grid.GetPoints().GetData()), frame.position)
        data = grid.GetPointData()
        arrays = {data.GetArrayName(a): vtk_to_numpy(data.GetArray(a)) for a in range(data.GetNumberOfArrays())}
        expected = {"velocity": frame.velocity, "part": frame.part, **attributes}
        expected["error"] = np.full((60, 3), np.nan) if frame.error is None else frame.error
        assert arrays.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(arrays[name], value, err_msg=name)
    assert set(np.unique(frames[-1].part)) == set(range(parts))


def run_code_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, pyvista: bool) -> list[Frame]:
    """Execute the Python blocks of docs/rollout.md with or without pyvista, on a rollout of the name used there."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "rollout.md").read_text(), re.S)
    frames = roll_out(make_run(tmp_path / "run"), tmp_path / "runs" / "rollout.vtkhdf")
    monkeypatch.chdir(tmp_path)
    code = "\n".join(block for block in blocks if ("import pyvista" in block) == pyvista)
    exec(code.replace("(0, 10, 20, 30, 40)", "range(4)"), {})  # the steps here that have a true frame
    return frames


def test_the_code_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    frames = run_code_of_the_page(tmp_path, monkeypatch, pyvista=False)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == STEPS + 1 + 4  # frames 0, 3, 6 and 9 have a true one
    mass = Trajectories(tmp_path / "a.h5").attribute(0, "mass")
    for frame, (step, *numbers) in zip(frames, lines[STEPS + 1 :], strict=False):
        x, y = frame.position, frame.position - frame.error
        expected = [sinkhorn.divergence(x, y, blur=0.05), *(metrics.density(p, mass, 0.1).max() for p in (x, y))]
        assert int(step) == frame.step
        assert [float(number) for number in numbers] == pytest.approx(expected, rel=1e-3)
    assert float(lines[-1][1]) > 0


def test_the_pictures_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyvista", reason="pyvista is not installed (pip install pyvista)")
    run_code_of_the_page(tmp_path, monkeypatch, pyvista=True)
    pictures = [picture.read_bytes() for picture in (tmp_path / "runs").glob("step-*.png")]
    assert len(pictures) == len({*pictures}) == STEPS + 1
    assert min(map(len, pictures)) > 5000  # not empty
