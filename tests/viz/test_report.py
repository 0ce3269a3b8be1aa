"""The report of a run: what is on the page, what is left out and why, and the page as a browser shows it."""

from __future__ import annotations

import base64
import io
import re
import shutil
from pathlib import Path

import browser
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from tiny_runs import settings

from dist_egnn.commands.evaluate import run_evaluation
from dist_egnn.commands.train import run_training
from dist_egnn.errors import Failure
from dist_egnn.evaluate import rollout
from dist_egnn.viz import html_report
from dist_egnn.viz.html_report import run_report

TITLES = ["The run in numbers", "Errors", "Training", "A sample", "Rollout", "Time of a step by phase", "Made with"]
TITLES += ["Settings"]


@pytest.fixture(scope="module")
def run(small, make_store, tmp_path_factory) -> Path:
    """A run of two epochs with all that a page can show; its config then names a store of 2 parts, of the same samples."""
    folder = tmp_path_factory.mktemp("reported") / "run"
    run_training(settings(small, folder, "train.epochs=2"))
    for split in ("test", "valid"):
        run_evaluation(folder, split)
    # one step beyond the data's end
    rollout.run_rollout(folder, trajectory=3, steps=5, out=folder / "rolled.vtkhdf")
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace(str(small), str(make_store(2))))
    return folder


@pytest.fixture
def copy(run, tmp_path) -> Path:
    return shutil.copytree(run, tmp_path / "copy")


def sections(page: str) -> dict[str, str]:
    return dict(re.findall(r"<section><h2>(.*?)</h2>\n(.*?)\n</section>", page, re.S))


def made(folder: Path, *arguments: Path | None) -> dict[str, str]:
    run_report(folder, *(arguments or (None, None)))  # type: ignore[arg-type]
    return sections((folder / "report.html").read_text())


def pictures(text: str) -> list[Image.Image]:
    return [Image.open(io.BytesIO(base64.b64decode(b))) for b in re.findall(r'png;base64,([^"]+)"', text)]


def test_page_has_every_section(run, capsys):
    found = made(run)
    assert list(found) == TITLES
    assert "left-out" not in "".join(found.values())
    assert [len(pictures(found[title])) for title in TITLES] == [0, 0, 2, 3, 3, 1, 0, 0]
    assert capsys.readouterr().out.splitlines()[0].startswith(f"{run / 'report.html'}: 9 pictures")
    text = "".join(found.values())
    assert all(len(alt) > 10 for alt in re.findall(r'<img [^>]*alt="([^"]*)"', text))
    assert len(re.findall("<img ", text)) == len(re.findall(r'<img [^>]*alt="', text)) == 9
    # numbers are the run's own
    table = pd.read_csv(run / "metrics.csv")
    assert f"{table['valid_mse'].min():.4e} (epoch {table['valid_mse'].idxmin()})" in found["The run in numbers"]
    for row in pd.read_csv(run / "evaluate.csv").itertuples():
        assert f"<td>{row.prediction}</td><td>{row.mse:.4e}</td>" in found["Errors"]
    assert "The data end after step 4 of 5." in found["Rollout"]
    assert (run / "about.yaml").read_text().split("commit: ")[1].split()[0] in found["Made with"]
    assert "hidden: 4  # " in found["Settings"]


def test_sample_is_the_models_own_prediction(run, small, monkeypatch):
    """Whole file or cut store, the pictures get the sample's positions, and the parts that the store has."""
    seen = {}
    for name in ("parts", "displacement"):
        monkeypatch.setattr(html_report.figures, name, lambda *given, name=name: seen.__setitem__(name, given) or b"")
    found = made(run)["A sample"]
    x, y, predicted = seen["displacement"]
    _, part = seen["parts"]
    stored = html_report.Store(html_report.configs.load(run / "config.yaml").data.path)
    number = stored.split("test")[len(stored.split("test")) // 2]
    whole = stored.whole(number)
    np.testing.assert_array_equal(x, whole.ndata["x"].numpy())
    np.testing.assert_array_equal(y, whole.ndata["y"].numpy())
    assert f"MSE {np.square(predicted - y).mean():.3e}" in found
    for p in (0, 1):
        np.testing.assert_array_equal(np.flatnonzero(part == p), np.sort(stored.read(number, p).ndata["gid"].numpy()))


LOST = {
    "metrics.csv": {
        "The run in numbers": "distegnn train",
        "Training": "no metrics.csv",
        "Time of a step by phase": "",
    },
    "evaluate.csv": {"Errors": "made by: distegnn evaluate"},
    "rolled.vtkhdf": {"Rollout": "made by: distegnn rollout"},
    "about.yaml": {"Made with": "older version"},
    "best.pt": {"A sample": "best.pt"},
}


@pytest.mark.parametrize("name", LOST)
def test_what_is_missing_is_one_line(copy, name, capsys):
    (copy / name).unlink()
    found = made(copy)
    said = capsys.readouterr().out
    assert list(found) == TITLES
    for title in TITLES:
        assert ("Left out: " in found[title]) == (title in LOST[name]), title
    for title, hint in LOST[name].items():
        assert hint in found[title]
        assert len(found[title].splitlines()) == 1
        assert f"  left out: {title}: " in said


def test_older_and_damaged_files(copy):
    shown = html_report.Report(copy, html_report.configs.load(copy / "config.yaml"), None)
    table = pd.read_csv(copy / "metrics.csv")
    old = ["epoch", "train_loss", "train_mse", "lr", "step_s", "grad_norm", "valid_mse", "peak_gb"]
    table[old].to_csv(copy / "metrics.csv", index=False)
    assert len(pictures(shown.curves())) == 2
    with pytest.raises(Failure, match="older version"):
        shown.timing()
    table.loc[0, ["data_s", "forward_s", "communication_s", "backward_s"]] = np.nan  # resumed by this version
    table.to_csv(copy / "metrics.csv", index=False)
    assert len(pictures(shown.timing())) == 1
    (copy / "metrics.csv").write_text("")
    (copy / "evaluate.csv").write_bytes(b"\x00" * 20)
    for section, says in ((shown.curves, r"metrics\.csv is damaged"), (shown.errors, r"evaluate\.csv is damaged")):
        with pytest.raises(Failure, match=says):
            section()


def test_a_run_of_one_process_has_no_partition(copy, small):
    config = copy / "config.yaml"
    config.write_text(re.sub(r"path: \S+", f"path: {small}", config.read_text()))
    found = made(copy)["A sample"]
    assert len(pictures(found)) == 2
    assert "No partition to show" in found


def test_mistakes(run, tmp_path):
    for arguments, says in (
        ((tmp_path, None, None), "not a run"),
        ((run, tmp_path / "none.vtkhdf", None), "no such file"),
        ((run, run / "metrics.csv", None), "not a readable HDF5 file"),
        ((run, None, tmp_path / "page.txt"), "must end in .html"),
    ):
        with pytest.raises(Failure, match=says):
            run_report(*arguments)
    assert list(tmp_path.iterdir()) == []


def test_names_are_escaped(copy, tmp_path):
    odd = copy.rename(tmp_path / "<b>&'run'")
    run_report(odd, None, None)
    text = (odd / "report.html").read_text()
    assert "<b>" not in text
    assert "&lt;b&gt;&amp;" in text


@pytest.mark.skipif(browser.PROGRAM is None, reason="no Chromium here: apt-get install chromium")
def test_in_a_browser(run, tmp_path):
    run_report(run, None, tmp_path / "page.html")
    bad = tmp_path / "bad.html"
    bad.write_text(
        '<p style="width:900px">wide</p><img src="http://127.0.0.1:9/a.png"><script>console.error(1)</script>'
    )
    widest = "document.documentElement.scrollWidth"
    with browser.page(tmp_path / "profile") as shown:
        for width in (1200, 390):
            shown.open(tmp_path / "page.html", width)
            sizes = shown.run(
                "Promise.all([...document.images].map(i => i.decode().then(() => [i.naturalWidth, i.naturalHeight])))"
            )
            assert sizes == [[896, 640]] * 9
            assert (shown.requests, shown.said) == ([], [])
            assert shown.run(widest) <= width
            assert shown.run("[...document.querySelectorAll('h2')].map(h => h.textContent)") == TITLES
        places = shown.run(
            "[...document.images].map(i => { const r = i.getBoundingClientRect(); "
            "return [r.x, r.y + window.scrollY, r.width, r.height]; })"
        )
        for place in places:
            pixels = shown.picture(*place).reshape(-1, 3)
            assert 330 < place[2] <= 390
            assert len(np.unique(pixels, axis=0)) > 30, place
            assert 0.01 < (pixels < 200).any(1).mean() < 0.9, place
        # the check sees what is wrong
        shown.open(bad, 390)
        assert shown.requests == ["http://127.0.0.1:9/a.png"]
        assert len(shown.said) >= 1
        assert shown.run(widest) > 390
