"""`distegnn inspect`: what a trajectories file, a store or a run holds, and a config to start from."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import pandas as pd

from .. import config as configs
from ..data import identity
from ..data.importers import find_importer
from ..data.store import Store, open_store
from ..data.trajectories import SPLITS, Trajectories
from ..errors import Failure
from ..evaluate import inspection
from ..evaluate.inspection import Inspection
from ..planning import suggest
from ..train import run_dir
from ..utils import hdf5
from ..utils.console import print_line, print_table
from ..utils.filesystem import write_atomically
from .import_data import HEADER, table_rows

Table = tuple[str, list[str], list[list[Any]]]  # title, header, rows

DEGREES = (0, 1, 5, 10, 15, 20, 30)  # lower ends of the classes of a histogram of neighbours


def run_inspection(path: Path, out: Path | None, suggestion: Path | None) -> None:
    """Print tables about FILE; out: an HTML page to write, suggestion: a config. Raises Failure for any other FILE."""
    is_run, is_store = (path / run_dir.CONFIG).is_file(), (path / "manifest.yaml").is_file()
    if suggestion and (is_run or is_store):
        raise Failure(f"--suggest: {path} is no trajectories.h5; name the file that it was made from")
    if suggestion and suggestion.exists():
        raise Failure(f"--suggest {suggestion}: exists; choose another name, or delete it")
    if out:
        from ..viz import html_page

        html_page.check_name(out)
    if is_run:
        if out:
            raise Failure(f"--out {out}: {path} is a run, whose page is made by: distegnn report {path} --out {out}")
        _print(run_tables(path))
    elif is_store or path.with_name(path.name + ".partial").is_dir():
        opened = open_store(path)
        _print(tables := store_tables(opened))
        if out:
            from ..viz import inspection_page

            inspection_page.write_store(out, opened, tables)
    else:
        _inspect_file(path, out, suggestion)


def _print(tables: Sequence[Table]) -> None:
    for title, header, rows in tables:
        if header[1:] == [""]:  # names and values
            print_line(title)
            width = max(len(name) for name, _ in rows)
            for name, value in rows:
                print_line(f"  {name.ljust(width)}  {value}", indent=width + 4)
        else:
            print_table(title, header, rows)


def open_trajectories(path: Path) -> Trajectories:
    """The file. Raises Failure that names `distegnn import` for a file of another program."""
    if not path.exists() or _is_ours(path):
        return Trajectories(path)
    try:
        known = find_importer([path], None).NAME
    except Failure as failure:
        what = "no trajectories.h5, store or run, and no file that `distegnn import` recognizes (docs/import.md)"
        raise Failure(f"{path}: {what}") from failure
    remedy = f"convert it: distegnn import {shlex.quote(str(path))} --out mine.h5"
    raise Failure(f"{path}: no trajectories.h5, but of the format {known}; {remedy}")


def _is_ours(path: Path) -> bool:
    """Whether a path is a trajectories file, possibly a damaged one."""
    if not path.is_file() or not h5py.is_hdf5(path):
        return False
    try:
        with hdf5.open_file(path) as file:
            return "trajectories" in file
    except OSError:
        return True


def _inspect_file(path: Path, out: Path | None, suggestion: Path | None) -> None:
    found = inspection.inspect(open_trajectories(path))
    warnings = inspection.warnings(found)
    tables, notes = file_tables(found), file_notes(found)
    _print(tables[:1])
    for line in [*notes, *(f"warning: {line}" for line in warnings)]:
        print_line(line)
    _print(tables[1:])
    if suggestion:
        named = shlex.quote(str(suggestion))
        header = [f"distegnn inspect {shlex.quote(str(path))} --suggest {named}", f"next: distegnn train {named}"]
        text = suggest.to_yaml(suggest.suggest(found), header)
        configs.parse(text, str(suggestion))  # as `distegnn train` will
        write_atomically(suggestion, text.encode())
        print(f"{suggestion}:", text, sep="\n", end="")
    if out:
        from ..viz import inspection_page

        inspection_page.write_file(out, found, tables, [*notes, *warnings])


def file_notes(found: Inspection) -> list[str]:
    """Splits, what was sampled, nodes at rest and gravity, in a line each."""
    file, counts = found.file, list[str]()
    for split in SPLITS:
        frames = [t.frames for t in file if t.split == split]
        counts.append(f"{split} {len(frames):,} ({sum(frames):,} frames)")
    lines = [f"trajectories: {', '.join(counts)}"]
    lines.append(
        f"sampled: {len(found.numbers):,} of {len(file):,} trajectories, {len(found.places):,} of their frames"
    )
    if at_rest := sum(int(fixed.sum()) for fixed in found.fixed):
        lines.append(f"nodes that never move in these frames: {at_rest:,} of {sum(map(len, found.fixed)):,}")
    if shifts := sorted({t.shift for t in file if t.shift and any(t.shift)}):
        lines.append(f"positions are those of the source minus {', '.join(map(str, shifts[:3]))}")
    if g := found.gravity:
        source = f"mean acceleration in {g.places} of {g.of} frames" if g.of else "stored in the file"
        lines.append(f"gravity: {g.vector} ({source})")
    return lines


def file_tables(found: Inspection) -> list[Table]:
    """Trajectories as `distegnn import` prints them, neighbours by radius, errors by horizon."""
    file = found.file
    table = pd.DataFrame(table_rows([str(k) for k in found.numbers], found.summaries), columns=HEADER)
    table.insert(1, "split", [file[k].split for k in found.numbers])
    table = table.drop(columns=["reordered", "crossings"])  # known at the import only
    some = f", {len(table)} of them sampled" * (len(table) < len(file))
    tables: list[Table] = [
        (
            f"{file.path}: {len(file):,} trajector{'y' if len(file) == 1 else 'ies'}{some}",
            list(table),
            table.values.tolist(),
        )
    ]
    classes = list(zip(DEGREES, [*DEGREES[1:], math.inf], strict=True))
    names = [f"{a}+" if b == math.inf else f"{a}-{b - 1}" if b > a + 1 else f"{a}" for a, b in classes]
    rows = []
    for radius, counts in found.degrees:
        shares = [f"{((counts >= a) & (counts < b)).mean():.1%}" for a, b in classes]
        rows.append([f"{radius:.3g}", f"{counts.mean():.1f}", *shares, counts.max()])
    tables.append(("share of the nodes by number of neighbours", ["radius", "mean", *names, "largest"], rows))
    dt, errors, rows = file[found.numbers[0]].dt, found.errors, []
    for n, h in enumerate(found.horizons):
        if math.isfinite(static := errors["static"][n]):
            moved = f"{math.sqrt(3 * static) / found.spacing:.3g}" if found.spacing > 0 else "-"
            rows.append([h, f"{h * dt:.4g}", *(f"{values[n]:.4e}" for values in errors.values()), moved])
    header = ["frames", "time", *errors, "moved/spacing"]
    return [*tables, ("mean squared error of predictions without a model", header, rows)] if rows else tables


def store_tables(store: Store) -> list[Table]:
    """What a store holds: graphs, parts, how it was made, and the identity of its data."""
    q, s, inputs = store.summary(), store.snapshots, store.inputs
    size = sum(file.stat().st_size for file in store.path.rglob("*") if file.is_file())
    about: dict[str, Any] = {"snapshots": ", ".join(f"{split} {len(store.split(split)):,}" for split in SPLITS)}
    about["nodes of a graph"] = f"{s['nodes'].mean():,.0f} (largest {s['nodes'].max():,})"
    about |= {"edges of a graph": f"{s['edges'].mean():,.0f}", "parts": f"{store.parts} by {inputs['method']}"}
    about |= {"machines": store.machines} if store.trainers > 1 else {}
    about |= {
        "edges cut": f"{q['edge_cut']:.1%}",
        "largest/mean": f"{q['balance']:.3f}",
        "halo/nodes": f"{q['halo']:.1%}",
    }
    keys = ("radius", "horizon", "history", "features", "node_attributes", "periodic", "fixed", "walls", "gravity")
    about |= {f"data.{key}": inputs[key] for key in keys if inputs[key] not in (None, 0, "", "none", [])}
    about["made from"] = inputs["source"]
    about["identity of the data"] = identity.digest(store.manifest.get("data")) or "unknown (of an older version)"
    about["files"] = f"{len(store.manifest['files']):,} in {s['shard'].nunique()} shards, {size / 1e6:.1f} MB"
    means = store.parts_table.groupby("part")[["nodes", "edges", "cut_edges", "halo"]].mean()
    rows = [[part, *(f"{n:,.0f}" for n in row)] for part, *row in means.itertuples()]
    header = ["part", "nodes", "edges", "cut", "halo"]
    return [(str(store.path), ["store", ""], [*map(list, about.items())]), ("means over the snapshots", header, rows)]


def run_tables(run: Path) -> list[Table]:
    """What a run is: model, data, epochs, best validation error, errors that `distegnn evaluate` found, files."""
    from ..viz.html_report import Report  # here: it imports torch

    report = Report(run, run_dir.load_config(run), None)
    data = report.config.data
    about: dict[str, Any] = {"folder": run.absolute(), "model": report.config.model.name}
    about["data"] = f"{data.path}{'' if Path(data.path).exists() else ' (missing)'}"
    about |= {f"data.{key}": getattr(data, key) for key in ("radius", "horizon", "history")}
    tables: list[Table] = []
    try:
        table = report.metrics()
        about["epochs"] = f"{len(table)} of {report.config.train.epochs}"
        if len(known := table["valid_mse"].dropna()):
            about["best validation MSE"] = f"{known.min():.4e} (epoch {table.loc[known.idxmin(), 'epoch']:g})"
    except Failure as failure:
        about["epochs"] = failure
    try:
        scores = report.scores()
        rows = [[split, name, f"{mse:.4e}"] for split, errors in scores.items() for name, mse in errors.items()]
        tables.append(("errors of the best checkpoint", ["split", "prediction", "MSE"], rows))
    except Failure as failure:
        about["errors"] = failure
    files = sorted(file for file in run.iterdir() if file.is_file())
    tables.append(("", ["file", "MB"], [[file.name, f"{file.stat().st_size / 1e6:.2f}"] for file in files]))
    return [(str(run), ["run", ""], [*map(list, about.items())]), *tables]
