"""A run on one page of HTML that needs nothing else: no script, no network, its pictures inside."""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from .. import config as configs
from ..config import Config
from ..data import dataset
from ..data.store import Store
from ..data.trajectories import SPLITS
from ..distributed.comm import Alone
from ..errors import Failure
from ..evaluate import rollout
from ..evaluate.vtkhdf import Rollout
from ..train import checkpoint, resume, trainer
from ..train.diagnostics import PHASES
from ..utils.filesystem import write_whole
from . import figures, plots

STYLE = """
:root { color-scheme: light; }
body { font: 1rem/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 76rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; margin: .3rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; border-bottom: 1px solid #ccc; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem; }
figure { margin: 0; break-inside: avoid; }
img { width: 100%; height: auto; }
figcaption, .left-out { color: #555; font-size: .9rem; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
.wide + .wide { margin-top: 1rem; }
table { border-collapse: collapse; }
th, td { padding: .2rem .8rem .2rem 0; text-align: right; font-variant-numeric: tabular-nums; border-bottom: 1px solid #eee; }
th:first-child, td:first-child { text-align: left; }
pre { font-size: .8rem; white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f6f6; padding: .6rem; }
@media print { .pictures { grid-template-columns: 1fr 1fr; } }
@media print { body { max-width: none; padding: 0; font-size: 10pt; } h2 { break-after: avoid; } pre { background: none; } }
"""
# what a browser may do with the page: show what is in it, and nothing else
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def _text(value: object) -> str:
    return html.escape(str(value))


def _figure(png: bytes, alt: str, caption: str) -> str:
    data = base64.b64encode(png).decode()
    width, height = (round(side * figures.DPI) for side in figures.SIZE)
    return (
        f'<figure><img src="data:image/png;base64,{data}" width="{width}" height="{height}" alt="{_text(alt)}">'
        f"<figcaption>{_text(caption)}</figcaption></figure>"
    )


def _pictures(*shown: str) -> str:
    return f'<div class="pictures">{"".join(shown)}</div>'


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    head = "".join(f"<th>{_text(h)}</th>" for h in header)
    body = "".join(f"<tr>{''.join(f'<td>{_text(c)}</td>' for c in row)}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


@dataclass
class Report:
    """What a page is made of; each method gives a section, or raises Failure with what would make it."""

    run: Path
    config: Config
    rolled: Path | None

    def metrics(self) -> pd.DataFrame:
        """metrics.csv, with a row or more."""
        path = self.run / "metrics.csv"
        if not path.is_file():
            raise Failure("no metrics.csv in the run; `distegnn train` writes it (imported weights have none)")
        try:
            table = pd.read_csv(path)
            if not len(table) or not {"epoch", "train_mse", "valid_mse"} <= set(table):
                raise Failure("metrics.csv has no epoch yet; go on with `distegnn train --resume`")
        except ValueError as error:  # what pandas raises for text that is no table
            raise Failure(f"metrics.csv is damaged ({str(error).splitlines()[0]}); copy it again") from error
        return table

    def scores(self) -> dict[str, pd.DataFrame]:
        """evaluate.csv by split."""
        path = self.run / "evaluate.csv"
        if not path.is_file():
            raise Failure(f"made by: distegnn evaluate {self.run}")
        try:
            table = pd.read_csv(path)
            return {str(name): rows for name, rows in table.groupby("split", sort=False)}
        except (ValueError, KeyError) as error:
            raise Failure(f"evaluate.csv is damaged; make it again: distegnn evaluate {self.run}") from error

    def numbers(self) -> str:
        table = self.metrics()
        known, last = table["valid_mse"].dropna(), table.iloc[-1]  # NaN: a validation split without samples
        best = f"{known.min():.4e} (epoch {int(table.loc[known.idxmin(), 'epoch'])})" if len(known) else "none"
        rows: list[list[object]] = [
            ["model", self.config.model.name],
            ["epochs", len(table)],
            ["best validation MSE", best],
            ["last validation MSE", f"{last['valid_mse']:.4e}"],
            ["last training MSE", f"{last['train_mse']:.4e}"],
        ]
        for name, what, form in (
            ("step_s", "seconds a step, last epoch", "{:.3f}"),
            ("epoch_s", "seconds of training", "{:,.0f}"),
            ("peak_gb", "memory of the largest process [GB]", "{:.2f}"),
        ):
            if name in table:
                value = table[name].sum() if name == "epoch_s" else last[name]
                rows.append([what, form.format(value)])
        return _table(["", ""], rows)

    def errors(self) -> str:
        shown = []
        for split, rows in self.scores().items():
            linear = dict(zip(rows["prediction"], rows["mse"], strict=True)).get("linear", np.nan)
            cells = [
                [name, f"{mse:.4e}", "" if np.isnan(linear) else f"{mse / linear:.3f}"]
                for name, mse in zip(rows["prediction"], rows["mse"], strict=True)
            ]
            shown.append(_table([f"split {split}", "MSE", "of linear"], cells))
        return "".join(shown)

    def curves(self) -> str:
        table = self.metrics()
        lines = {"training": table["train_mse"], "validation": table["valid_mse"]}
        try:
            found = self.scores()["valid"].set_index("prediction")["mse"].to_dict()
        except (Failure, KeyError):
            found = {}
        levels = {f"{name}, validation": found[name] for name in ("static", "linear") if name in found}
        errors = figures.curves(table["epoch"].tolist(), lines, levels, "epoch", "mean squared error")
        hint = "" if levels else f" Static and linear for comparison: distegnn evaluate {self.run} --split valid"
        shown = [
            _figure(
                errors,
                "Curves of training and validation error over the epochs",
                f"Training error is the mean over an epoch while weights change, validation error that after it.{hint}",
            )
        ]
        if "lr" in table and "grad_norm" in table:
            lines = {"gradient norm before clipping": table["grad_norm"], "learning rate": table["lr"]}
            more = figures.curves(table["epoch"].tolist(), lines, {}, "epoch", "norm, rate")
            shown.append(_figure(more, "Curves of gradient norm and learning rate", "Gradient norm and learning rate."))
        return _pictures(*shown)

    def timing(self) -> str:
        table = self.metrics()
        table = table.dropna(subset=[name for name in (*PHASES, "step_s") if name in table])  # of older epochs
        if not {*PHASES, "step_s"} <= set(table) or not len(table):
            raise Failure("recorded by an older version, without seconds by phase; train again to have them")
        seconds = {name: table[name].tolist() for name in PHASES}
        png = figures.timing(table["epoch"].tolist(), seconds, table["step_s"].tolist())
        caption = "Mean seconds of an optimiser step on rank 0. Communication includes waiting for other processes."
        return _pictures(_figure(png, "Bars of the seconds of a step by phase, for each epoch", caption))

    def sample(self) -> str:
        """A test sample: partition, predicted against true."""
        path = self.run / checkpoint.BEST
        state = checkpoint.load(path)
        parts = Store(self.config.data.path).parts if dataset.is_store(self.config.data.path) else 1
        data = dataset.open_dataset(self.config, 0, 1)
        split = next((s for s in ("test", "valid", *SPLITS) if data.splits[s]), "")
        if not split:
            raise Failure(f"{self.config.data.path} has no sample")
        number = data.splits[split][len(data.splits[split]) // 2]
        trajectory, frame = data.frames[number]
        model = trainer.build_model(self.config, data.widths, Alone())
        checkpoint.load_weights(model, state, path)
        model.eval()
        part = None
        if parts > 1:
            store = Store(self.config.data.path)
            graph = store.whole(number)
            part = np.zeros(graph.num_nodes(), np.int64)
            for p in range(parts):
                part[store.read(number, p).ndata["gid"].numpy()] = p
        else:
            graph = data[number]
        with torch.no_grad():
            predicted, z = model(graph)
        x, y, guess = graph.ndata["x"].numpy(), graph.ndata["y"].numpy(), predicted.numpy()
        mse = float(np.square(guess.astype(np.float64) - y).mean())
        what = f"{split} sample: trajectory {trajectory}, frame {frame}, {len(x):,} nodes"
        shown = []
        if part is not None:
            shares = ", ".join(f"{n:,}" for n in np.bincount(part, minlength=parts))
            caption = f"Input of a {what}, coloured by part; nodes in the {parts} parts: {shares}."
            shown.append(_figure(figures.parts(x, part), f"Nodes in space, coloured by {parts} parts", caption))
        caption = f"Predicted against true displacement, each node of a {what}; MSE {mse:.3e}."
        shown.append(_figure(figures.displacement(x, y, guess), "Predicted over true displacement", caption))
        stars = " Stars: virtual nodes where the last layer left them." if z.shape[1] else ""
        cloud = figures.cloud(y, guess, z[0].numpy())
        shown.append(_figure(cloud, "True and predicted positions in space", f"The same sample in space.{stars}"))
        if part is None:
            note = "No partition to show: this run's graphs are whole (partition.parts=P, or a store, cuts them)."
            return _pictures(*shown) + f'<p class="left-out">{note}</p>'
        return _pictures(*shown)

    def rollout(self) -> str:
        """Errors by step, energies, paths of virtual nodes."""
        if self.rolled is None:
            raise Failure(
                f"made by: distegnn rollout {self.run} --trajectory K --steps S --out {self.run / 'rollout.vtkhdf'}"
            )
        table = rollout.errors(self.rolled)
        with Rollout(self.rolled) as file:
            first, count = file[0], len(file)
            ways = [frame.virtual for frame in file if frame.virtual is not None and len(frame.virtual)]
            meta = file.meta
        steps = table["step"].tolist()
        shown, notes = [], []
        known = table["mse"].notna() & (table["step"] > 0)
        if known.any():
            names = {"rollout": "mse", "static": "static_mse", "linear": "linear_mse"}
            lines = {label: table.loc[known, name] for label, name in names.items()}
            png = figures.curves(table.loc[known, "step"].tolist(), lines, {}, "step", "mean squared error")
            caption = (
                "Error of the rollout by step, beside that of the first frame as it is (static) and moved on by its "
                "own velocity (linear)."
            )
            shown.append(_figure(png, "Curves of the rollout's error over the steps", caption))
            if int(known.sum()) < count - 1:
                notes.append(f"The data end after step {int(table.loc[known, 'step'].max())} of {count - 1}.")
        else:
            notes.append(
                "The data have no frame to compare with: start the rollout earlier (--start) for errors by step."
            )
        energy = {"rollout": table["kinetic_energy"], "truth": table["true_kinetic_energy"]}
        png = figures.curves(steps, energy, {}, "step", "kinetic energy")
        shown.append(_figure(png, "Curves of kinetic energy over the steps", "Kinetic energy, mean over each step."))
        if ways:
            png = figures.paths(first.position, np.stack(ways))
            caption = "Where the last layer left each virtual node, step by step."
            shown.append(_figure(png, "Paths of the virtual nodes in space", caption))
        else:
            notes.append("No paths of virtual nodes: the model has none.")
        what = (
            f"{self.rolled.name}: trajectory {meta['trajectory']} from frame {meta['start']} on, {count - 1} steps of "
            f"{meta['horizon']} frames. A film of it: distegnn render {self.rolled}."
        )
        return f"<p>{_text(' '.join([what, *notes]))}</p>" + _pictures(*shown)

    def about(self) -> str:
        path = self.run / "about.yaml"
        if not path.is_file():
            raise Failure("recorded by an older version, without about.yaml; a resume or a new run writes it")
        return f"<pre>{_text(path.read_text().rstrip())}</pre>"

    def settings(self) -> str:
        return f"<pre>{_text(configs.to_yaml(self.config).rstrip())}</pre>"


def newest_rollout(run: Path) -> Path | None:
    found = [path for pattern in ("*.vtkhdf", "*.hdf") for path in run.glob(pattern)]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def page(report: Report) -> tuple[str, int, list[str]]:
    """The page, how many pictures it has, and what is left out, a line each."""
    sections: dict[str, Callable[[], str]] = {
        "The run in numbers": report.numbers,
        "Errors": report.errors,
        "Training": report.curves,
        "A sample": report.sample,
        "Rollout": report.rollout,
        "Time of a step by phase": report.timing,
        "Made with": report.about,
        "Settings": report.settings,
    }
    body, missing = [], []
    for title, make in sections.items():
        try:
            content = make()
        except Failure as failure:
            content = f'<p class="left-out">Left out: {_text(failure)}</p>'
            missing.append(f"{title}: {failure}")
        body.append(f"<section><h2>{_text(title)}</h2>\n{content}\n</section>")
    name = _text(f"{report.config.model.name}: {report.run}")
    head = (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">\n'
        f"<style>{STYLE}</style></head>\n<body><h1>{name}</h1>\n"
    )
    text = head + "\n".join(body) + "\n</body></html>\n"
    return text, text.count("<img "), missing


def run_report(run: Path, rolled: Path | None, out: Path | None) -> None:
    """Write the page of a run. Raises Failure where there is no run, or a rollout that was named cannot be read."""
    resume.check_run(run)
    out = run / "report.html" if out is None else out
    if out.suffix != ".html":
        raise Failure(f"--out {out}: must end in .html")
    if rolled is not None:
        Rollout(rolled).close()
    config = configs.load(run / "config.yaml")
    plots.pyplot()  # says what is missing before any work
    text, count, missing = page(Report(run, config, rolled or newest_rollout(run)))
    write_whole(out, text.encode())
    print(f"{out}: {count} pictures, {len(text) / 1e6:.1f} MB")
    for line in missing:
        print(f"  left out: {line}")
