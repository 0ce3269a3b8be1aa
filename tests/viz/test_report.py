"""The report of a run: its sections, what is left out and why, and the page in a browser."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from tiny_runs import settings

from dist_egnn import config
from dist_egnn.commands.evaluate import run_evaluation
from dist_egnn.commands.train import run_training
from dist_egnn.data.store import Store
from dist_egnn.errors import Failure
from dist_egnn.evaluate import rollout, rollout_metrics
from dist_egnn.train import checkpoint
from dist_egnn.train.diagnostics import PHASES
from dist_egnn.viz import html_report, rollout_plots
from dist_egnn.viz.html_report import run_report

TITLES = ["The run in numbers", "Errors", "Training", "A sample", "Rollouts evaluated", "Rollout"]
TITLES += ["Time of a step by phase", "Made with", "Settings"]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def run(small, make_store, tmp_path_factory) -> Path:
    """A run of two epochs that has every section; its config then names a store of 2 parts of the same samples."""
    folder = tmp_path_factory.mktemp("reported") / "run"
    run_training(settings(small, folder, "train.epochs=2"))
    for split in ("test", "valid"):
        run_evaluation(folder, split)
    rollout_metrics.evaluate_rollouts(folder, 3)
    # one step beyond the end of the data
    rollout.run_rollout(folder, trajectory=3, steps=5, out=folder / "rolled.vtkhdf")
    file = folder / "config.yaml"
    file.write_text(file.read_text().replace(str(small), str(make_store(2))))
    return folder


@pytest.fixture
def copy(run, tmp_path) -> Path:
    return shutil.copytree(run, tmp_path / "<b>&'copy'")


def sections(folder: Path) -> dict[str, str]:
    """Write the report; its sections by title."""
    run_report(folder, None, None)
    page = (folder / "report.html").read_text()
    return dict(re.findall(r"<section><h2>(.*?)</h2>\n(.*?)\n</section>", page, re.S))


def pictures(text: str) -> list[Image.Image]:
    return [Image.open(io.BytesIO(base64.b64decode(b))) for b in re.findall(r'png;base64,([^"]+)"', text)]


def test_page_has_every_section(run, capsys):
    content = sections(run)
    assert list(content) == TITLES
    assert [len(pictures(content[title])) for title in TITLES] == [0, 0, 3, 3, 5, 3, 1, 0, 0]
    assert f"{run / 'report.html'}: 15 pictures" in capsys.readouterr().out
    text = "".join(content.values())
    assert "left-out" not in text
    assert len(re.findall(r'<img [^>]*alt="[^"]{11,}"', text)) == 15
    # numbers are the run's own
    table = pd.read_csv(run / "metrics.csv")
    assert f"{table['valid_mse'].min():.4e} (epoch {table['valid_mse'].idxmin() + 1})" in content["The run in numbers"]
    weights = checkpoint.load(run / "best.pt")["model"].values()
    settings = config.load(run / "config.yaml").data
    known = {
        "parameters": f"{sum(value.numel() for value in weights):,}",
        "data": settings.path,
        "edges": "radius 0.27",
    }
    for name, value in {**known, "horizon [frames]": 3}.items():
        assert f"<td>{name}</td><td>{value}</td>" in content["The run in numbers"]
    for row in pd.read_csv(run / "evaluate.csv").itertuples():
        assert f"<td>{row.prediction}</td><td>{row.mse:.4e}</td>" in content["Errors"]
    assert "The data end after step 4 of 5." in content["Rollout"]
    assert (run / "about.yaml").read_text().split("commit: ")[1].split()[0] in content["Made with"]
    assert "hidden: 4  # " in content["Settings"]


def test_sample_is_the_models_own_prediction(run, monkeypatch):
    """Panels get the sample's positions in the order of the whole graph, and the parts of the store."""
    drawn = {}
    monkeypatch.setattr(
        html_report.plots, "panel_png", lambda panel, *args: drawn.update({panel.__name__: args}) or b""
    )
    content = sections(run)["A sample"]
    (x, y, predictions), (_, part) = drawn["displacement"], drawn["parts"]
    (predicted,) = predictions.values()
    store = Store(config.load(run / "config.yaml").data.path)
    number = store.split("test")[len(store.split("test")) // 2]
    fields = store.whole(number).ndata
    assert np.array_equal([x, y], [fields["x"].numpy(), fields["y"].numpy()])
    assert f"MSE {np.square(predicted - y).mean():.3e}" in content
    for p in (0, 1):
        np.testing.assert_array_equal(np.flatnonzero(part == p), np.sort(store.read(number, p).ndata["gid"].numpy()))


MISSING = {
    "metrics.csv": {"The run in numbers": "distegnn train", "Training": "metrics.csv", "Time of a step by phase": ""},
    "evaluate.csv": {"Errors": "distegnn evaluate"},
    "evaluate-rollout.csv": {"Rollouts evaluated": "distegnn evaluate"},
    "rolled.vtkhdf": {"Rollout": "distegnn rollout"},
    "about.yaml": {"Made with": "older version"},
    "best.pt": {"A sample": "best.pt", "Rollouts evaluated": "best.pt"},
}


def test_missing_files_are_one_line_each(copy, capsys, monkeypatch):
    monkeypatch.setattr(html_report.plots, "panel_png", lambda *_: b"")  # six reports, of whose pictures none is read
    for name, hints in MISSING.items():
        (copy / name).rename(copy / "elsewhere")
        content, printed = sections(copy), capsys.readouterr().out
        (copy / "elsewhere").rename(copy / name)
        assert list(content) == TITLES
        assert [title for title in TITLES if "Left out: " in content[title]] == list(hints)
        for title, hint in hints.items():
            assert hint in content[title]
            assert "\n" not in content[title]
            assert f"  left out: {title}: " in printed


def test_a_run_of_one_process_with_new_weights_and_a_rollout_that_stopped(copy, small):
    """There is no partition, errors of other weights are not shown, and names are escaped."""
    with h5py.File(copy / "rolled.vtkhdf", "r+") as file:
        meta = json.loads(file["dist_egnn"].attrs["meta"]) | {"stopped": "step 6: node 1 left"}
        file["dist_egnn"].attrs["meta"] = json.dumps(meta)
    file, best = copy / "config.yaml", checkpoint.load(copy / "best.pt")
    file.write_text(re.sub(r"path: \S+", f"path: {small}", file.read_text()))
    assert "Left out: " not in sections(copy)["Errors"]
    checkpoint.save(copy / "best.pt", {"model": best["model"], "config": best["config"]})
    content = sections(copy)
    assert "Left out: evaluate.csv is of other weights than best.pt" in content["Errors"]
    assert "Left out: evaluate-rollout.csv is of other weights than best.pt" in content["Rollouts evaluated"]
    assert "stopped early, at step 6: node 1 left" in content["Rollout"]
    assert len(pictures(content["A sample"])) == 2
    assert "No partition" in content["A sample"]
    page = (copy / "report.html").read_text()
    assert "&lt;b&gt;&amp;" in page
    assert "<b>" not in page


def test_measures_of_rollouts_are_means_of_complete_steps():
    """The second trajectory stops after step 2, where it explodes: the axis ends at three times the truth."""
    model = pd.DataFrame({0: [1.0, 2, 3, 4], 1: [3.0, 4, 500, np.nan]})
    figure = html_report.plots.pyplot().figure()
    rollout_plots.by_step(figure, {"EGNN": model, "truth": pd.DataFrame({0: [1.0, 2, 3, 4], 1: [3.0, 3, 3, 3]})}, "")
    line, truth = figure.axes[0].lines
    np.testing.assert_array_equal(line.get_xydata(), [[0, 2], [1, 3], [2, 251.5]])
    np.testing.assert_array_equal(truth.get_ydata(), [2, 2.5, 3, 3.5])
    assert figure.axes[0].get_ylim()[1] == 12
    html_report.plots.pyplot().close(figure)


def test_older_and_damaged_files(copy):
    report = html_report.Report(copy, config.load(copy / "config.yaml"), None)
    table = pd.read_csv(copy / "metrics.csv")
    old = ["epoch", "train_loss", "train_mse", "lr", "step_s", "grad_norm", "valid_mse", "peak_gb"]
    table[old].assign(epoch=table["epoch"] - 1).to_csv(copy / "metrics.csv", index=False)  # counted from 0
    assert report.metrics()["epoch"].tolist() == table["epoch"].tolist()
    kept = checkpoint.first_rows(copy / "metrics.csv", len(table) - 1)
    assert [row["epoch"] for row in kept] == list(range(1, len(table)))
    assert len(pictures(report.curves())) == 3
    with pytest.raises(Failure, match="older version"):
        report.timing()
    table.loc[0, list(PHASES)] = np.nan  # resumed by this version
    table.to_csv(copy / "metrics.csv", index=False)
    assert len(pictures(report.timing())) == 1
    (copy / "metrics.csv").write_text("")
    (copy / "evaluate.csv").write_bytes(b"\x00" * 20)
    for section, name in ((report.curves, "metrics"), (report.errors, "evaluate")):
        with pytest.raises(Failure, match=rf"{name}\.csv is damaged"):
            section()


def test_bad_arguments(run, tmp_path):
    for arguments, match in (
        ((tmp_path, None, None), "not a run"),
        ((run, tmp_path / "none.vtkhdf", None), "no such file"),
        ((run, run / "metrics.csv", None), "not a readable HDF5 file"),
        ((run, None, tmp_path / "page.txt"), "must end in .html"),
    ):
        with pytest.raises(Failure, match=match):
            run_report(*arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")
def test_in_a_browser(run, tmp_path):
    """The page requests nothing, logs nothing and fits a telephone; the same checks fail on a bad page."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="pip install -e '.[dev]'")
    run_report(run, None, tmp_path / "page.html")
    bad = '<p style="width:900px">wide</p><img src="http://127.0.0.1:9/a.png"><script>console.error(1)</script>'
    (tmp_path / "bad.html").write_text(bad)
    with sync_api.sync_playwright() as playwright, playwright.chromium.launch(executable_path=CHROMIUM) as browser:
        page = browser.new_page()
        requests, messages = [], []
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))

        def open_page(name: str, width: int) -> int:
            """Leaves in ``requests`` what the page loads from elsewhere; returns the width of its content."""
            requests.clear()
            page.set_viewport_size({"width": width, "height": 800})
            page.goto((tmp_path / name).as_uri())
            requests[:] = [url for url in requests if url != page.url and not url.startswith("data:")]
            return page.evaluate("document.documentElement.scrollWidth")

        for width in (1200, 390):
            assert open_page("page.html", width) <= width
            assert (requests, messages) == ([], [])
            sizes = page.evaluate("[...document.images].map(i => [i.complete, i.naturalWidth, i.naturalHeight])")
            assert sizes == [[True, 896, 640]] * 15
            assert page.locator("h2").all_inner_texts() == TITLES
        for image in page.locator("img").all():
            pixels = np.asarray(Image.open(io.BytesIO(image.screenshot())).convert("RGB")).reshape(-1, 3)
            assert 330 < image.bounding_box()["width"] <= 390
            assert len(np.unique(pixels, axis=0)) > 30
            assert 0.01 < (pixels < 200).any(1).mean() < 0.9
        assert open_page("bad.html", 390) > 390
        assert requests == ["http://127.0.0.1:9/a.png"]
        assert messages
