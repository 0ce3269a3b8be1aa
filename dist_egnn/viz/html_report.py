"""`distegnn report`: a run on one self-contained HTML page, without scripts or external resources."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from ..config import Config, to_yaml
from ..data import dataset, identity
from ..data.edges import EdgeRule
from ..data.store import Store, open_store
from ..data.trajectories import SPLITS
from ..distributed.comm import SingleProcess
from ..errors import Failure
from ..evaluate import rollout_metrics, step_errors
from ..evaluate.vtkhdf import Rollout
from ..train import checkpoint, losses, run_dir, trainer
from ..train.diagnostics import PHASES
from ..utils.filesystem import sha256
from . import html_page, plots, rollout_plots


def node_parts(store: Store, snapshot: int) -> np.ndarray:
    """The part of each node of a snapshot (N,)."""
    gid = [store.read(snapshot, p).ndata["gid"].numpy() for p in range(store.parts)]
    return np.repeat(np.arange(store.parts), [*map(len, gid)])[np.concatenate(gid).argsort()]


@dataclass
class Report:
    """The sections of a page. Each method returns the HTML of one, or raises Failure with the command that provides its data."""

    run: Path
    config: Config
    rollout_file: Path | None

    def read(self, name: str, columns: set[str], remedy: str) -> pd.DataFrame:
        """A CSV file of the run."""
        if not (self.run / name).is_file():
            raise Failure(f"no {name} in the run; {remedy}")
        try:
            table = pd.read_csv(self.run / name)
        except ValueError as error:  # raised by pandas for text that is no table
            raise Failure(f"{name} is damaged ({str(error).splitlines()[0]}); {remedy}") from error
        if not len(table) or not columns <= set(table):
            raise Failure(f"{name} is damaged or empty; {remedy}")
        return table

    def metrics(self) -> pd.DataFrame:
        remedy = "written by: distegnn train, or train --resume (imported weights have none)"
        table = self.read("metrics.csv", {"epoch", "train_mse", "valid_mse"}, remedy)
        return table.assign(epoch=table["epoch"] + int(table["epoch"].min() == 0))  # older versions counted from 0

    def scores(self) -> dict[str, dict[str, float]]:
        """evaluate.csv: split → prediction → MSE, where it belongs to the present best.pt. Raises Failure if none does."""
        table = self.read("evaluate.csv", {"split", "prediction", "mse"}, f"written by: distegnn evaluate {self.run}")
        if (best := self.run / run_dir.BEST).is_file():
            table = table[table.get("weights", table["split"]) == sha256(best)]
            if not len(table):
                raise Failure(f"evaluate.csv is of other weights than best.pt; run: distegnn evaluate {self.run}")
            if "data" in table:  # without those of --data
                trained = identity.digest(checkpoint.load(best).get("data"))
                table = table[table["data"].fillna("") == trained]
        by_split = table.groupby("split", sort=False)[["prediction", "mse"]]
        return {str(split): dict(rows.values) for split, rows in by_split}

    def parameters(self) -> str:
        """The number of the best checkpoint's parameters, or why it cannot be read."""
        try:
            weights = checkpoint.load(self.run / run_dir.BEST)["model"]
        except Failure as failure:
            return str(failure)
        return f"{sum(value.numel() for value in weights.values()):,}"

    def numbers(self) -> str:
        table = self.metrics()
        chosen = "valid_rollout_mse" if "valid_rollout_mse" in table else "valid_mse"
        known, last = table[chosen].dropna(), table.iloc[-1]  # NaN: a validation split without samples
        best = f"{known.min():.4e} (epoch {int(table.loc[known.idxmin(), 'epoch'])})" if len(known) else "none"
        data, parts = self.config.data, self.config.partition.parts
        rows: list[tuple[str, object]] = [("model", self.config.model.name), ("parameters", self.parameters())]
        rows += [("data", data.path), ("parts", parts or "those of the store"), ("edges", EdgeRule.of(data))]
        of = " of rollouts" if chosen == "valid_rollout_mse" else ""
        rows += [("horizon [frames]", data.horizon), ("epochs", len(table)), (f"best validation MSE{of}", best)]
        loss = "last training loss (MSE + MMD without its constant term, so it can be negative)"
        for name, column, values, form in (
            ("last validation MSE", "valid_mse", last, ".4e"),
            ("last training MSE", "train_mse", last, ".4e"),
            (loss, "train_loss", last, ".4e"),
            ("seconds per step, last epoch", "step_s", last, ".3f"),
            ("seconds of training", "epoch_s", table.sum(), ",.0f"),
            ("memory of the largest process [GB]", "peak_gb", last, ".2f"),
        ):
            if column in table:  # older versions wrote fewer
                shown = table[column].dropna().iloc[-1:] if values is last else [values[column]]
                rows += [(name, format(value, form)) for value in shown]
        return html_page.table(["", ""], rows)

    def errors(self) -> str:
        tables = []
        for split, scores in self.scores().items():
            linear = scores.get("linear", 0)
            rows = [[name, f"{mse:.4e}", f"{mse / linear:.3f}" if linear > 0 else ""] for name, mse in scores.items()]
            tables.append(html_page.table([f"split {split}", "MSE", "relative to linear"], rows))
        return "".join(tables)

    def curves(self) -> str:
        table, scores = self.metrics(), dict[str, float]()
        with suppress(Failure):
            scores = self.scores().get("valid", {})
        levels = {f"{name}, validation": scores[name] for name in ("static", "linear") if name in scores}
        caption = "Training and validation error by epoch. Training error is the mean while weights change."
        caption += "" if levels else f" To add static and linear: distegnn evaluate {self.run} --split valid"
        epochs, lines = table["epoch"], {"training": table["train_mse"], "validation": table["valid_mse"]}
        shown = [html_page.figure(caption, plots.curves, epochs, lines, levels, "epoch", "mean squared error")]
        if "lr" in table and "grad_norm" in table:
            for column, name in (("grad_norm", "gradient norm before clipping"), ("lr", "learning rate")):
                caption = f"{name.capitalize()} by epoch."
                shown.append(html_page.figure(caption, plots.curves, epochs, {name: table[column]}, {}, "epoch", name))
        return html_page.pictures(*shown)

    def timing(self) -> str:
        columns = ["epoch", *PHASES, "step_s"]
        table = self.metrics().reindex(columns=columns).dropna()  # without epochs of an older version
        if not len(table):
            raise Failure("recorded by an older version, without seconds by phase; train again to have them")
        seconds = {name.removesuffix("_s"): table[name] for name in PHASES}
        caption = "Mean seconds of a step on rank 0 by phase. Data: waiting for samples; communication: with waiting."
        return html_page.pictures(html_page.figure(caption, plots.timing, table["epoch"], seconds, table["step_s"]))

    def sample(self) -> str:
        """A test sample: its partition, and the prediction of the best checkpoint."""
        path, data = self.run / run_dir.BEST, dataset.open_dataset(self.config, 0, 1)
        trained = checkpoint.load(path).get("data")
        checkpoint.compare_data(
            trained, trained and identity.of_data(self.config.data.path), self.config.data, self.run
        )
        split = next((s for s in ("test", "valid", *SPLITS) if data.splits[s]), "")
        if not split:
            raise Failure(f"{self.config.data.path} has no sample")
        number = data.splits[split][len(data.splits[split]) // 2]
        trajectory, frame = data.frames[number]
        model = trainer.build_model(self.config, data.widths, SingleProcess())
        checkpoint.load_weights(model, checkpoint.load(path), path)
        model.eval()
        store = open_store(self.config.data.path) if dataset.is_store(self.config.data.path) else None
        graph = store.whole(number) if store and store.parts > 1 else data[number]
        with torch.no_grad():
            predicted, z = model(graph)
        x, y, guess = graph.ndata["x"].numpy(), graph.ndata["y"].numpy(), predicted.numpy()
        mse = np.square(guess.astype(np.float64) - y)[losses.moving_nodes(graph)].mean()
        what = f"A {split} sample: trajectory {trajectory}, frame {frame}, {len(x):,} nodes"
        caption = f"Predicted over true displacement of each node. {what}; MSE {mse:.3e}."
        shown = [html_page.figure(caption, plots.displacement, x, y, {self.config.model.name: guess})]
        caption = "True and predicted positions." + " Stars: virtual nodes after the last layer." * bool(z.shape[1])
        shown.append(html_page.figure(caption, plots.positions, y, guess, z[0].numpy()))
        if not (store and store.parts > 1):
            note = "No partition: the graphs are whole (partition.parts=P or a store divides them)."
            return f'{html_page.pictures(*shown)}<p class="left-out">{note}</p>'
        part = node_parts(store, number)
        sizes = ", ".join(f"{n:,}" for n in np.bincount(part, minlength=store.parts))
        caption = f"Nodes of the input, coloured by part. {what}; in the {store.parts} parts: {sizes}."
        return html_page.pictures(html_page.figure(caption, plots.parts, x, part), *shown)

    def rollout(self) -> str:
        """Errors by step, energies, paths of virtual nodes."""
        path = self.rollout_file
        if path is None:
            out = self.run / "rollout.vtkhdf"
            raise Failure(f"written by: distegnn rollout {self.run} --trajectory K --steps S --out {out}")
        table = step_errors.error_table(path)
        with Rollout(path) as file:
            start, steps, meta = file[0].position, len(file) - 1, file.meta
            virtual = [frame.virtual for frame in file if frame.virtual is not None and len(frame.virtual)]
        text = f"{path.name}: trajectory {meta['trajectory']} from frame {meta['start']} on, {steps} steps of "
        text += f"{meta['horizon']} frames. To render a video: distegnn render {path}."
        if meta.get("stopped"):
            text += f" The rollout stopped early, at {meta['stopped']}."
        shown = []
        known = table[table["mse"].notna() & (table["step"] > 0)]
        if len(known):
            lines = {"rollout": known["mse"], "static": known["static_mse"]}
            lines["constant velocity"] = known["linear_mse"]
            caption = "Error of the rollout by step. Static: the first frame; constant velocity: x + t·v of that frame."
            shown.append(
                html_page.figure(caption, plots.curves, known["step"], lines, {}, "step", "mean squared error")
            )
            if len(known) < steps:
                text += f" The data end after step {int(known['step'].max())} of {steps}."
        else:
            text += " The data have no frame to compare with: errors by step need an earlier start (--start)."
        lines = {"rollout": table["kinetic_energy"], "truth": table["true_kinetic_energy"]}
        caption = "Kinetic energy by step, each a mean over the step."
        shown.append(html_page.figure(caption, plots.curves, table["step"], lines, {}, "step", "kinetic energy"))
        if virtual:
            caption = "Paths of the virtual nodes after the last layer."
            shown.append(html_page.figure(caption, plots.virtual_node_paths, start, np.stack(virtual)))
        else:
            text += " No paths of virtual nodes: the model has none."
        return f"<p>{escape(text)}</p>" + html_page.pictures(*shown)

    def rollouts(self) -> str:
        """Measures of evaluated rollouts by step: evaluate-rollout.csv, where it belongs to the present best.pt."""
        command = f"distegnn evaluate {self.run} --rollout STEPS"
        table = self.read(rollout_metrics.FILE, {*rollout_metrics.COLUMNS, "weights", "data"}, f"written by: {command}")
        about, best = table.iloc[0], self.run / run_dir.BEST
        if not best.is_file() or about["weights"] != sha256(best):
            raise Failure(f"{rollout_metrics.FILE} is of other weights than best.pt; run: {command}")
        numbers, trained = table["trajectory"].unique(), identity.digest(checkpoint.load(best).get("data"))
        text = f"Trajector{'ies' if len(numbers) > 1 else 'y'} {', '.join(map(str, numbers))} of {about['path']}"
        text += ", which are not the data of the training" if trained and about["data"] != trained else ""
        text += f"; {table['step'].max()} steps from frame {about['frame']:g} on."
        reached = table.dropna(subset="mse").groupby("trajectory")["step"].max()
        text += "".join(
            f" Trajectory {k} stopped after step {n}." for k, n in reached.items() if n < table["step"].max()
        )
        if table["outside"].notna().any() and not table[["outside", "true_outside"]].any(axis=None):
            text += " No node leaves the box."
        if len(numbers) > 1:
            text += " Lines are means over trajectories, bands reach from the smallest to the largest value."
        drawn = rollout_plots.panels(table, self.config.model.name).items()
        shown = [html_page.figure(caption, rollout_plots.by_step, *given) for caption, given in drawn]
        return f"<p>{escape(text)}</p>" + html_page.pictures(*shown)

    def about(self) -> str:
        path = self.run / "about.yaml"
        if not path.is_file():
            raise Failure("recorded by an older version, without about.yaml; a resume or a new run writes it")
        return f"<pre>{escape(path.read_text(encoding='utf-8').rstrip())}</pre>"


def run_report(run: Path, rollout_file: Path | None, out: Path | None) -> None:
    """Write the page of a run. Raises Failure if ``run`` is not a run or ``rollout_file`` cannot be read."""
    run_dir.check_is_run(run)
    out = run / "report.html" if out is None else out
    html_page.check_name(out)
    if rollout_file is not None:
        Rollout(rollout_file).close()
    plots.pyplot()  # fails now rather than in every section
    rollouts = sorted([*run.glob("*.vtkhdf"), *run.glob("*.hdf")], key=lambda path: path.stat().st_mtime)
    rollout_file = rollout_file or (rollouts[-1] if rollouts else None)
    report = Report(run, run_dir.load_config(run), rollout_file)
    sections: dict[str, Callable[[], str]] = {
        "The run in numbers": report.numbers,
        "Errors": report.errors,
        "Training": report.curves,
        "A sample": report.sample,
        "Rollouts evaluated": report.rollouts,
        "Rollout": report.rollout,
        "Time of a step by phase": report.timing,
        "Made with": report.about,
        "Settings": lambda: f"<pre>{escape(to_yaml(report.config).rstrip())}</pre>",
    }
    body, missing = "", []
    for title, section in sections.items():
        try:
            content = section()
        except Failure as failure:
            content = f'<p class="left-out">Left out: {escape(str(failure))}</p>'
            missing.append(f"  left out: {title}: {failure}")
        body += f"<section><h2>{title}</h2>\n{content}\n</section>\n"
    html_page.write(out, f"{report.config.model.name}: {run}", body, missing)
