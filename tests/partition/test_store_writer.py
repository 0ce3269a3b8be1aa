"""A store is written, read, loaded by DGL, resumed and refused; `verify_store` finds errors in a damaged one."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import dgl
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from dgl.data.utils import load_tensors, save_tensors
from dist_egnn.partition import store_writer
from dist_egnn.partition.snapshot import Inputs
from dist_egnn.partition.verify import verify_store
from store_content import content, files
from torch import Tensor

from dist_egnn.config import Data
from dist_egnn.data.samples import read_sample
from dist_egnn.data.store import Store
from dist_egnn.data.store_inputs import DEFAULT_INPUTS, check_settings
from dist_egnn.data.trajectories import Trajectories, Writer
from dist_egnn.errors import Failure
from dist_egnn.utils.filesystem import lock_output

FIELDS = ("x", "v", "f", "a", "y", "gid")
SHARD = "shard-00000"
MakeStore = Callable[..., Path]


def silent(*_: object) -> None:
    """A progress callback without effect."""


def edge_list(src: Tensor, dst: Tensor, n: int) -> Tensor:
    """Edges as sorted numbers that can be compared."""
    return (src * n + dst).sort().values


@pytest.fixture
def copy(make_store: MakeStore, tmp_path: Path) -> Path:
    """A store in 2 parts and 2 shards, to be damaged."""
    return Path(shutil.copytree(make_store(2), tmp_path / "store"))


LAYOUTS = [
    (1, "metis", 0, {}),
    (2, "metis", 1500, {}),
    (5, "random", 300, {}),  # one snapshot in each shard
    (5, "bisection", 0, {"edge_drop": 0.3, "frames": 1}),
    (3, "kmeans", 1500, {"radius": float("inf"), "frames": 1}),
    (2, "metis", 1500, {"trainers": 2}),
    (2, "kmeans", 0, {"trainers": 3, "frames": 2}),
    (2, "bisection", 700, {"trainers": 2, "weights": [3, 1, 2, 2], "frames": 1}),
    (3, "morton", 700, {"edge_drop": 1.0, "features": [], "node_attributes": [], "first_frame": 8}),
]


@pytest.mark.parametrize(("parts", "method", "shard_nodes", "settings"), LAYOUTS)
def test_round_trip(make_store, make_inputs, small, parts, method, shard_nodes, settings):
    """The parts of a snapshot are the partitioned sample of its frame; `whole` joins them again; all files verify."""
    store = Store(make_store(parts, method, shard_nodes, **settings))
    inputs = make_inputs(parts, method, shard_nodes, **settings)
    data = Trajectories(small)
    selected = store_writer.list_snapshots(data, inputs)
    assert (store.machines, store.trainers) == (parts, settings.get("trainers", 1))
    parts = store.parts
    assert len(store.snapshots) == len(selected) == 4 * len({s.frame for s in selected if s.trajectory == 0})
    for k, snapshot in enumerate(selected):
        full = read_sample(data, snapshot, inputs.sample)
        n, (src, dst) = full.num_nodes(), full.edges()
        graphs = [store.read(k, p) for p in range(parts)]
        gid = torch.cat([g.ndata["gid"] for g in graphs])
        assert sorted(gid.tolist()) == list(range(n))
        part = torch.empty(n, dtype=torch.int64)
        for p, graph in enumerate(graphs):
            assert graph.num_nodes() > 0
            part[graph.ndata["gid"]] = p
            for name in FIELDS:
                assert torch.equal(graph.ndata[name], full.ndata[name][graph.ndata["gid"]]), name
            assert (graph.ndata["total"] == n).all()
            centroid = full.ndata["x"].double().mean(0).expand(graph.num_nodes(), 3)
            torch.testing.assert_close(graph.ndata["centroid"], centroid, rtol=1e-12, atol=1e-12)
            ends = graph.ndata["x"][torch.stack(graph.edges())]
            length = torch.linalg.vector_norm(ends[0] - ends[1], dim=1)
            assert torch.equal(graph.edata["e"], length[:, None].expand(-1, 2))
        cut = part[src] != part[dst]
        local = edge_list(src[~cut], dst[~cut], n)
        joined = torch.cat([g.ndata["gid"][torch.stack(g.edges())] for g in graphs], 1)
        assert torch.equal(edge_list(*joined, n), local)
        whole = store.whole(k)
        for name in FIELDS:
            assert torch.equal(whole.ndata[name], full.ndata[name]), name
        assert torch.equal(edge_list(*whole.edges(), n), local)
        row, table = store.snapshots.loc[k], store.parts_table[store.parts_table["snapshot"] == k]
        assert (row["split"], row["trajectory"], row["frame"]) == (snapshot.split, snapshot.trajectory, snapshot.frame)
        assert (row["target_frame"], row["nodes"], row["edges"]) == (snapshot.frame + inputs.horizon, n, len(src))
        assert table["cut_edges"].sum() == int(cut.sum())
        assert table["halo"].sum() == len(set(zip(part[dst[cut]].tolist(), src[cut].tolist(), strict=True)))
        assert table["edges"].sum() == len(src)
        assert table["nodes"].tolist() == torch.bincount(part, minlength=parts).tolist()
    calls: list[tuple[int, int]] = []
    counted = verify_store(store, lambda *call: calls.append(call))
    assert counted["snapshots"] == len(store.snapshots)
    assert (counted["nodes"], counted["edges"]) == tuple(store.snapshots[["nodes", "edges"]].sum())
    assert calls == [(k + 1, len(store.snapshots)) for k in range(len(store.snapshots))]


def test_parts_are_divided_among_their_trainers(make_store):
    """A part holds the same nodes with one or two trainers; each trainer's nodes of a snapshot are contiguous."""
    one, two = Store(make_store(2)), Store(make_store(2, trainers=2))
    for k in range(len(one.snapshots)):
        for machine in range(2):
            a, b = (two.read(k, 2 * machine + t).ndata["gid"].tolist() for t in range(2))
            assert sorted(a + b) == sorted(one.read(k, machine).ndata["gid"].tolist())
            assert min(len(a), len(b)) > 0.4 * len(a + b)
        rows = [store.parts_table[store.parts_table["snapshot"] == k].reset_index() for store in (one, two)]
        pairs = rows[1].groupby(rows[1]["part"] // 2)[["nodes", "edges"]].sum()
        assert (pairs.to_numpy() == rows[0][["nodes", "edges"]].to_numpy()).all()
        assert rows[0]["cut_edges"].sum() < rows[1]["cut_edges"].sum() < 0.5 * rows[1]["edges"].sum()
    for machine in range(2):
        fields = load_tensors(str(two.path / SHARD / f"part{machine}" / "node_feat.dgl"))
        trainer, snapshot = fields["_N/trainer_id"], fields["_N/snapshot"]
        assert set(trainer.tolist()) == {2 * machine, 2 * machine + 1}
        assert torch.equal(snapshot * 4 + trainer, (snapshot * 4 + trainer).sort().values)
    assert "_N/trainer_id" not in load_tensors(str(one.path / SHARD / "part0" / "node_feat.dgl"))


def test_an_old_store_without_newer_inputs(copy, make_inputs, small):
    """It is read, and the same command finds it complete and does not touch it."""
    manifest = yaml.safe_load((copy / "manifest.yaml").read_text())
    for name in DEFAULT_INPUTS:
        del manifest["inputs"][name]
    (copy / "manifest.yaml").write_text(yaml.safe_dump(manifest))
    assert (Store(copy).machines, Store(copy).parts, Store(copy).inputs["weights"]) == (2, 2, None)
    before = {f: f.stat().st_mtime_ns for f in copy.rglob("*")}
    assert store_writer.write_store(Trajectories(small), copy, make_inputs(2, velocity="forward"), silent) is False
    assert {f: f.stat().st_mtime_ns for f in copy.rglob("*")} == before
    assert not copy.with_name("store.partial").exists()


def test_splits_and_summary(make_store):
    store = Store(make_store(2))
    assert [store.split(name) for name in ("train", "valid", "test")] == [[*range(6)], [6, 7, 8], [9, 10, 11]]
    table, summary = store.parts_table, store.summary()
    rows = [table[table["snapshot"] == k] for k in range(12)]
    assert summary["edge_cut"] == pytest.approx(np.mean([r["cut_edges"].sum() / r["edges"].sum() for r in rows]))
    assert summary["balance"] == pytest.approx(np.mean([r["nodes"].max() / r["nodes"].mean() for r in rows]))
    assert summary["halo"] == pytest.approx(np.mean([r["halo"].sum() / r["nodes"].sum() for r in rows]))
    assert 0 < summary["edge_cut"] < 0.3


@pytest.mark.parametrize("parts", [1, 2, 5])
@pytest.mark.parametrize("shard_nodes", [0, 300, 1500])
def test_dgl_loads_it(make_store, make_inputs, small, monkeypatch, parts, shard_nodes):
    """DGL's own checks pass; its partition book and global ids give the edges of every snapshot."""
    monkeypatch.setenv("DGL_DIST_DEBUG", "1")
    path, data = make_store(parts, "metis", shard_nodes), Trajectories(small)
    inputs = make_inputs(parts, "metis", shard_nodes)
    selected, seen = store_writer.list_snapshots(data, inputs), []
    shards = sorted(path.glob("shard-*"))
    assert len(shards) == {0: 1, 300: 12, 1500: 2}[shard_nodes]
    for shard in shards:
        node: dict[int, tuple[int, int]] = {}  # global id → snapshot, node of it
        edges: list[tuple[int, int]] = []
        for p in range(parts):
            graph, feats, edge_feats, book, name, *_ = dgl.distributed.load_partition(str(shard / "dist_egnn.json"), p)
            assert (name, book.num_partitions(), edge_feats) == ("dist_egnn", parts, {})
            ids, inner = graph.ndata[dgl.NID], graph.ndata["inner_node"].bool()
            owner = book.nid2partid(ids)
            assert (owner[inner] == p).all()
            assert (owner[~inner] != p).all()
            assert ids[inner].tolist() == book.partid2nids(p).tolist()
            assert graph.edata[dgl.EID].tolist() == book.partid2eids(p).tolist()
            rows = zip(feats["_N/snapshot"].tolist(), feats["_N/gid"].tolist(), strict=True)
            node.update(zip(ids[inner].tolist(), rows, strict=True))
            src, dst = graph.edges()
            assert inner[dst].all()
            edges += zip(ids[src].tolist(), ids[dst].tolist(), strict=True)
        assert sorted(node) == list(range(len(node)))
        for k in sorted({snapshot for snapshot, _ in node.values()}):
            full = read_sample(data, selected[k], inputs.sample)
            assert sorted(gid for snapshot, gid in node.values() if snapshot == k) == list(range(full.num_nodes()))
            pairs = [(node[i][1], node[j]) for i, j in edges if node[i][0] == k]
            assert {to[0] for _, to in pairs} == {k}
            expected = zip(*(t.tolist() for t in full.edges()), strict=True)
            assert sorted((i, to[1]) for i, to in pairs) == sorted(expected)
            seen.append(k)
    assert seen == list(range(12))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


FILES = [f"{SHARD}/part1/{name}.dgl" for name in ("graph", "node_feat", "edge_feat")]
FILES += [f"{SHARD}/dist_egnn.json", "snapshots.csv", "parts.csv"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [flip, Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-1])])
def test_damaged_file_is_named(copy, name, damage):
    damage(copy / name)
    message = "missing" if damage is Path.unlink else "sha256"
    for read in (lambda s: s.read(0, 1), lambda s: s.whole(0), lambda s: verify_store(s, silent)):
        with pytest.raises(Failure, match=message) as caught:
            read(Store(copy))
        assert str(caught.value).startswith(f"{copy / name}: ")
    if "part1" in name:
        assert Store(copy).read(0, 0).num_nodes() > 0  # the other part is complete


def test_truncated_manifest(copy):
    manifest = copy / "manifest.yaml"
    content = manifest.read_bytes()
    lines = [k + 1 for k, byte in enumerate(content) if byte == 10][:-1]
    for length in [*lines, *range(0, len(content) - 1, 97), len(content) - 2]:
        manifest.write_bytes(content[:length])
        with pytest.raises(Failure) as caught:
            Store(copy).read(0, 0)
        assert str(copy) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, r"dist_egnn\.store version 2, "),
        ({"format": "other"}, "other version 1"),
        ({"inputs": None}, "damaged"),
        ({"files": None}, "damaged"),
        *((content, "damaged") for content in (b"\xff\xfe\x00", b"a: [", b"", b"- 1", b"text")),
    ],
)
def test_invalid_manifest(copy, change, message):
    manifest = copy / "manifest.yaml"
    if isinstance(change, dict):
        change = yaml.safe_dump(yaml.safe_load(manifest.read_text()) | change).encode()
    manifest.write_bytes(change)
    with pytest.raises(Failure, match=message) as caught:
        Store(copy)
    assert str(manifest) in str(caught.value)


@pytest.mark.parametrize("name", ["nowhere", ""])
def test_no_store(tmp_path, name):
    with pytest.raises(Failure, match="not a store"):
        Store(tmp_path / name)


def rehash(store: Path, name: str) -> None:
    """Update the hash of a changed file in the manifest."""
    manifest = yaml.safe_load((store / "manifest.yaml").read_text())
    manifest["files"][name] = hashlib.sha256((store / name).read_bytes()).hexdigest()
    (store / "manifest.yaml").write_text(yaml.safe_dump(manifest))


def change_field(store: Path, field: str, index: int | list[int], value: object) -> None:
    """Set a node field of part 1 at these nodes of snapshot 2; a value of None removes the field."""
    name = f"{SHARD}/part1/node_feat.dgl"
    fields = load_tensors(str(store / name))
    rows = (fields["_N/snapshot"] == 2).nonzero()[:, 0]
    if value is None:
        del fields[f"_N/{field}"]
    else:
        fields[f"_N/{field}"][rows[index]] = torch.tensor(value, dtype=fields[f"_N/{field}"].dtype)
    save_tensors(str(store / name), fields)
    rehash(store, name)


def change_graph(store: Path, ends: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] | None) -> None:
    """Redirect the first edge within snapshot 2 in part 1; ``ends`` takes source, destination and these edges.

    None: give an inner node the global id of another part's node.
    """
    name = f"{SHARD}/part1/graph.dgl"
    (graph,), _ = dgl.load_graphs(str(store / name))
    owner = load_tensors(str(store / SHARD / "part1" / "node_feat.dgl"))["_N/snapshot"]
    src, dst = (t.clone() for t in graph.edges(order="eid"))
    if ends is None:
        graph.ndata[dgl.NID][0] = 0
    else:
        own = ((owner[dst] == 2) & (src < len(owner))).nonzero()[:, 0]
        src[own[0]], dst[own[0]] = ends(src, dst, own)
    changed = dgl.graph((src, dst), num_nodes=graph.num_nodes())
    changed.ndata.update(graph.ndata)
    changed.edata.update(graph.edata)
    dgl.save_graphs(str(store / name), [changed], formats=["coo"])
    rehash(store, name)


@pytest.mark.parametrize(("field", "value"), [*((field, None) for field in (*FIELDS, "snapshot")), ("v", float("nan"))])
def test_missing_or_nan_field_is_named(copy, field, value):
    change_field(copy, field, 3, value)
    with pytest.raises(Failure, match=f"'{field}'"):
        verify_store(Store(copy), silent)
    if field != "snapshot":  # verify_store alone reads it
        with pytest.raises(Failure, match=f"node field '{field}' is"):
            Store(copy).read(2, 1)
    if value is not None:
        assert Store(copy).read(1, 1).num_nodes() > 0


@pytest.mark.parametrize(
    ("trainers", "change", "message"),
    [
        (1, ("x", 3, 0.5), "snapshot 2: its edges are not those of its positions"),
        (1, ("gid", [3, 4], 7), "snapshot 2: its 200 nodes are not each in exactly one part"),
        (1, ("gid", 3, 10**6), "snapshot 2: its 200 nodes are not each in exactly one part"),
        (1, ("snapshot", -1, 3), r"snapshot 2: part 1 does not hold .* parts\.csv;"),
        (2, ("trainer_id", -1, 2), r"snapshot 2: part 2 does not hold .* parts\.csv;"),
        (2, ("trainer_id", [0, -1], [3, 2]), r"snapshot 2: part 2 does not hold .* parts\.csv;"),
        (1, lambda src, dst, own: (dst[own[-1]], dst[own[0]]), "snapshot 2: its edges are not those of its positions"),
        (1, lambda src, dst, own: (src[own[1]], dst[own[1]]), "snapshot 2: its edges are not those of its positions"),
        (1, lambda src, dst, own: (dst[0], dst[own[0]]), "snapshot 2: an edge joins two snapshots"),
        (1, None, "part 1 fails DGL"),
    ],
)
def test_verify_finds_wrong_content(make_store, tmp_path, trainers, change, message):
    path = Path(shutil.copytree(make_store(2, trainers=trainers), tmp_path / "store"))
    change_field(path, *change) if isinstance(change, tuple) else change_graph(path, change)
    with pytest.raises(Failure, match=message) as caught:
        verify_store(Store(path), silent)
    assert str(caught.value).startswith(str(path))


def test_verify_finds_a_missing_row_and_an_extra_file(copy):
    """The tables lack a snapshot that the parts hold; the manifest lacks a file."""
    for name, rows in (("snapshots.csv", 11), ("parts.csv", 22)):
        pd.read_csv(copy / name).head(rows).to_csv(copy / name, index=False)
        rehash(copy, name)
    with pytest.raises(Failure, match="holds snapshot 11"):
        verify_store(Store(copy), silent)
    (copy / SHARD / "notes.txt").write_text("mine")
    with pytest.raises(Failure, match=r"notes\.txt: not in the manifest"):
        verify_store(Store(copy), silent)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"parts": 201}, "trajectory 0 has 200 nodes, fewer than 201 parts"),
        ({"parts": 41, "trainers": 5}, "trajectory 0 has 200 nodes, fewer than 41 parts of 5 trainers"),
        ({"parts": 40, "trainers": 5, "method": "kmeans"}, r"part \d+ of 40 has [1-4] nodes, .* --trainers"),
        ({"parts": 2, "trainers": 0}, "trainers=0: must be at least 1"),
        ({"parts": 2, "shard_nodes": -1}, "shard_nodes=-1, seed=0: must be at least 0"),
    ],
)
def test_fewer_nodes_than_processes(small, make_inputs, tmp_path, arguments, message):
    with pytest.raises(Failure, match=message):
        store_writer.write_store(Trajectories(small), tmp_path / "store", make_inputs(**arguments), silent)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("seed", [-1, 1 << 32])
def test_seeds_that_the_methods_do_not_take(small, seed):
    with pytest.raises(Failure, match=f"seed={seed}: must be at least 0, and the seed below"):
        store_writer.build_inputs(Trajectories(small), parts=2, method="kmeans", method_seed=seed, settings=Data())


@pytest.mark.parametrize("parts", [1, 6])
def test_as_many_parts_as_nodes(tmp_path, parts):
    with Writer(tmp_path / "few.h5", {}) as out:
        for n in (parts, 6):
            out.add(np.random.default_rng(n).normal(size=(5, n, 3)), split="train", dt=1, source="test")
    data, settings = (
        Trajectories(tmp_path / "few.h5"),
        Data(horizon=1, features=["speed"]),
    )  # frames 1 … 3 of 5 are inputs
    inputs = store_writer.build_inputs(data, parts=parts, method="metis", settings=settings, shard_nodes=0)
    store_writer.write_store(data, tmp_path / "store", inputs, silent)
    store = Store(tmp_path / "store")
    verify_store(store, silent)
    assert (store.whole(0).num_nodes(), store.whole(0).num_edges()) == (parts, 0)
    assert store.whole(5).num_edges() == (30 if parts == 1 else 0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("radius", 0.3), ("horizon", 4), ("features", ["mass"]), ("node_attributes", []), ("edge_drop", 0.1)],
        *[("periodic", True), ("frames", 4), ("first_frame", 1), ("last_frame", 5), ("frame_seed", 1)],
    ],
)
def test_config_that_disagrees(make_store, make_inputs, name, value):
    store, inputs = Store(make_store(2)), make_inputs(2).plain()
    agreeing = {key: inputs[key] for key in Data.__dataclass_fields__ if key != "path"}
    check_settings(store.inputs, str(store.path), Data(**agreeing))
    check_settings(store.inputs, str(store.path), Data(**{**agreeing, "features": None}))
    with pytest.raises(Failure, match=rf"data\.{name}=") as caught:
        check_settings(store.inputs, str(store.path), Data(**{**agreeing, name: value}))
    assert str(store.path) in str(caught.value)
    assert str(inputs[name]) in str(caught.value)


def write_and_kill(data: Trajectories, out: Path, inputs: Inputs, calls: int) -> None:
    """Write a store and end the run after this many calls of its progress callback."""

    def progress(done: int, total: int) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt

    left = iter(range(calls))
    with pytest.raises(KeyboardInterrupt):
        store_writer.write_store(data, out, inputs, progress)


@pytest.mark.parametrize("calls", [0, 1, 6, 7, 13])  # 12 snapshots and 2 shards: 14 calls
def test_resumed_equals_uninterrupted(make_store, make_inputs, small, tmp_path, monkeypatch, calls):
    """The resumed run does not write the parts of finished snapshots again."""
    out, data, inputs = tmp_path / "store", Trajectories(small), make_inputs(2)
    write_and_kill(data, out, inputs, calls)
    assert not out.exists()
    partial = tmp_path / "store.partial"
    for path in (out, partial):
        with pytest.raises(
            Failure, match=r"store\.partial: an unfinished partition.*`distegnn partition .* --out .*store --parts"
        ):
            Store(path)
    # add what a kill in the middle of a write leaves
    done, spooled = {0: (1, 1), 1: (2, 2), 6: (6, 0), 7: (7, 1), 13: (12, 0)}[calls]
    assert len(list((partial / "spool").glob("*.json"))) == spooled
    if done < 12:
        (partial / "shard-00001" / "part0").mkdir(parents=True)
        for half in (f"spool/{done:06d}-0.npz", "shard-00001/part0/graph.dgl", "shard-00001/stray"):
            (partial / half).write_bytes(b"half")
    progress: list[int] = []
    written: list[int] = []
    write_parts = store_writer.snapshot.write_parts
    monkeypatch.setattr(
        store_writer.snapshot, "write_parts", lambda *given: written.append(given[2]) or write_parts(*given)
    )
    assert store_writer.write_store(data, out, inputs, lambda done, total: progress.append(done)) is True
    assert written == list(range(done, 12))
    assert progress == sorted(progress)
    assert progress[-1] == 12
    assert list(tmp_path.iterdir()) == [out]
    assert content(out) == content(make_store(2))
    verify_store(Store(out), silent)


def test_two_writers_of_one_store(make_inputs, small, tmp_path):
    with lock_output(tmp_path / "store"), pytest.raises(Failure, match="store: another process is writing it"):
        store_writer.write_store(Trajectories(small), tmp_path / "store", make_inputs(2), silent)
    assert store_writer.write_store(Trajectories(small), tmp_path / "store", make_inputs(2), silent)


def test_a_damaged_store_is_not_called_complete(copy, make_inputs, small):
    """It can be removed and made again."""
    assert not store_writer.write_store(Trajectories(small), copy, make_inputs(2), silent)
    part = copy / SHARD / "part1" / "graph.dgl"
    part.write_bytes(part.read_bytes()[:-1])
    for damaged in (part, copy / "parts.csv"):
        damaged.write_bytes(damaged.read_bytes()[:-1])
        with pytest.raises(Failure, match=rf"{damaged}: .*rm -r {copy}"):
            store_writer.write_store(Trajectories(small), copy, make_inputs(2), silent)
    shutil.rmtree(copy)
    assert store_writer.write_store(Trajectories(small), copy, make_inputs(2), silent)


def test_a_damaged_store_is_made_again_by_the_commands_of_its_message(copy, small, make_store, distegnn):
    """A shell runs them beside the trajectories file, whose folder the store does not know."""
    settings = {"horizon": 2, "features": ("speed",), "periodic": False, "weights": (2, 1), "edge_drop": 0.25}
    shutil.rmtree(copy)
    shutil.copytree(before := make_store(2, "random", 0, **settings), copy)
    (copy / "parts.csv").unlink()
    with pytest.raises(Failure, match=r"parts\.csv: missing") as caught:
        Store(copy)
    commands = re.findall("`(.*?)`", str(caught.value))
    environment = os.environ | {"PATH": f"{distegnn.parent}:{os.environ['PATH']}"}
    for command in commands:
        subprocess.run(command, shell=True, check=True, cwd=small.parent, env=environment, timeout=600)
    assert len(commands) == 2
    assert content(copy) == content(before)


FOREIGN = [{"parts": 3}, {"trainers": 2}, {"method": "random"}, {"radius": 0.2}, {"frames": 2}]
FOREIGN += ["", "a: [", "{", "[]", "text", "inputs: {parts: 3}\n"]


@pytest.mark.parametrize(
    ("name", "other"), [*itertools.product(("store", "store.partial"), FOREIGN), ("store", "a file")]
)
def test_other_content_is_not_touched(small, make_store, make_inputs, tmp_path, name, other):
    """A store or unfinished store of other settings, or a folder with this text in the file that names settings."""
    out, data, folder = tmp_path / "store", Trajectories(small), tmp_path / name
    settings = other if isinstance(other, dict) else {}
    if other == "a file":
        folder.write_text("mine")
    elif not settings:
        folder.mkdir()
        (folder / "thesis.tex").write_text("years of work")
        if other:
            (folder / ("manifest.yaml" if folder == out else "inputs.json")).write_text(other)
    elif folder == out:
        shutil.copytree(make_store(2), out)
    else:
        write_and_kill(data, out, make_inputs(2), 3)
    before = files(tmp_path)
    message = "exists and is not a store of these settings" if folder == out else "left by an unfinished run"
    with pytest.raises(Failure, match=f"{name}: {message}"):
        store_writer.write_store(data, out, make_inputs(**{"parts": 2, **settings}), silent)
    assert files(tmp_path) == before


def test_killed_before_the_last_rename(make_store, make_inputs, small, tmp_path):
    """Another folder appears at --out while the store is written; the next run finishes the store."""
    out, data, inputs = tmp_path / "store", Trajectories(small), make_inputs(2)

    def intrude(done: int, total: int) -> None:
        out.mkdir(exist_ok=True)
        (out / "thesis.tex").write_text("years of work")

    with pytest.raises(Failure, match="store: Directory not empty"):
        store_writer.write_store(data, out, inputs, intrude)
    assert files(out) == {"thesis.tex": b"years of work"}
    shutil.rmtree(out)
    store_writer.write_store(data, out, inputs, silent)
    assert content(out) == content(make_store(2))
    assert list(tmp_path.iterdir()) == [out]
