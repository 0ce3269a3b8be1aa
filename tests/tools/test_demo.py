"""tools/demo.py: the distances of its table, and which folders it replaces."""

from __future__ import annotations

import demo
import pandas as pd
import pytest

from dist_egnn.errors import Failure


def test_distances():
    assert demo.rms_mm(pd.Series([25e-6 / 3])).tolist() == pytest.approx([5.0])


@pytest.mark.parametrize("left", ["store.partial/part", "store/manifest.yaml"])
def test_output_of_an_earlier_demo_is_replaced(tmp_path, left):
    (tmp_path / "out" / left).parent.mkdir(parents=True)
    (tmp_path / "out" / left).touch()
    demo.check_output(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_folder_is_refused(tmp_path):
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(Failure, match=f"{tmp_path}.*--out"):
        demo.check_output(tmp_path)
    assert (tmp_path / "thesis.txt").exists()
