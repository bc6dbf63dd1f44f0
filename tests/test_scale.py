"""benchmarks/scale: what it measures is what it says, and the quick run writes all of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks.scale import stages
from benchmarks.scale.__main__ import LAYOUTS, SNAPSHOTS, again, curve
from benchmarks.scale.report import bytes_per_task, defects, draw, lines, markdown, slope, slopes

ROOT = Path(__file__).parents[1]


class Bar:
    """As much of a progress bar as is used."""

    def update(self):
        pass

    def set_postfix_str(self, text):
        pass


@pytest.fixture
def case(tmp_path):
    return stages.Case(*LAYOUTS[0], 10, SNAPSHOTS["P"], tmp_path / "case")


def hold(case):
    """A stage of 200 MiB."""
    yield lambda: torch.ones(200 * 2**20, dtype=torch.uint8)


def hold_too_much(case):
    """One of more than there may be."""
    yield lambda: torch.ones(2 * stages.MEMORY, dtype=torch.uint8)


def test_layouts_go_from_ten_thousand_to_a_hundred_million(tmp_path):
    first, third, last = (stages.Case(*LAYOUTS[index], 10, 2, tmp_path).layout for index in (0, 2, -1))
    assert (first.numel, third.numel, last.numel) == (10_240, 851_968, 104_857_600)
    assert {layout.dtype for layout in (first, third, last)} == {"bfloat16"}


def test_a_base_of_real_shapes_that_weighs_nothing(case):
    model = stages.Case(*LAYOUTS[2], 10, 2, case.folder).model()
    weights = list(model.parameters())
    assert sum(weight.numel() for weight in weights) == 8_030_261_248
    assert sum(weight.untyped_storage().nbytes() for weight in weights) == 2 * len(weights)


def test_the_peak_is_that_of_the_stage_and_what_does_not_fit_is_said(case, monkeypatch):
    monkeypatch.setattr(stages, "STAGES", {"hold": hold, "too much": hold_too_much})
    found = stages.apart("hold", case)
    assert 200 * 2**20 <= found["peak"] < 260 * 2**20 and found["seconds"] > 0
    assert stages.apart("too much", case) == {"left_out": "more than 6 GiB"}


def test_slopes_and_defects():
    sizes = [1, 10, 100, 1000, 10_000]
    assert slope(sizes, [5, 5, 1, 10, 100]) == 1.0  # of the last three
    assert slope(sizes[:3], [1, 100, 10_000]) == 2.0 and slope(sizes[:2], [1, 100]) is None
    found = {"P": {"fit": {"seconds": 1.11, "peak": 1.1}, "step": {"seconds": None, "peak": 0.0}}}
    assert defects(found) == ["fit: time grows with P to the power 1.11"]


def test_bytes_by_formula_are_those_of_files(tmp_path):
    small, large = (stages.Case(*layout, 10, 2, tmp_path / str(index)) for index, layout in enumerate(LAYOUTS[:2]))
    for one in (small, large):
        one.folder.mkdir()
    told = bytes_per_task(small, [large.layout.numel])[3:]
    written = bytes_per_task(large, [])
    for by_formula, by_file in zip(told, written, strict=True):
        assert (by_formula["from"], by_file["from"]) == ("formula", "files")
        for kind in ("generator", "fp32", "bf16", "int8", "int4"):
            assert by_formula[kind] == pytest.approx(by_file[kind], rel=0.05), kind
    assert written[2]["generator"] < written[2]["int4"]


def test_stages_anew_leave_the_others_as_they_stand():
    def points(**seconds):
        return {"P": [{"stages": {stage: {"seconds": value} for stage, value in seconds.items()}}]}

    old = {"date": "2026-11-26", "command": "all", "curves": points(gather=1.0, fit=2.0, step=3.0)}
    new = again(old, ["fit", "step"], points(gather=4.0, fit=5.0, step=6.0))
    assert new["curves"] == points(gather=1.0, fit=5.0, step=6.0)
    assert new["command"] == "all" and {facts["command"] for facts in new["again"].values()} == {
        "python -m benchmarks.scale --only fit step"
    }


@pytest.mark.slow
def test_a_stage_that_did_not_fit_is_not_tried_with_more(tmp_path, monkeypatch):
    cases = [stages.Case(*LAYOUTS[0], tasks, 2, tmp_path / str(tasks)) for tasks in (10, 12)]
    monkeypatch.setitem(stages.STAGES, "fit", hold_too_much)
    points = curve(cases, "tasks", Bar())
    assert points[0]["stages"]["fit"] == {"left_out": "more than 6 GiB"}
    assert points[1]["stages"]["fit"] == {"left_out": "as before, more than 6 GiB"}
    assert lines(points, "save", "seconds")[0] == [10, 12] and lines(points, "fit", "peak") == ([], [])
    result = {"curves": {"P": points, "tasks": points}, "read_bytes_per_second": 1e9, "width": 10_240, "bytes_per_task": [], "hours": {}}
    result |= {"slopes": {along: slopes(points) for along in result["curves"]}, "defects": []}
    assert "Left out: fit at 10 (more than 6 GiB); fit at 12 (as before, more than 6 GiB)." in markdown(result)
    draw(result, tmp_path / "scale.png")
    with Image.open(tmp_path / "scale.png") as picture:
        assert picture.format == "PNG" and picture.width > 1000
    assert not any(case.folder.exists() for case in cases), "nothing stays on disk"


@pytest.mark.slow
def test_quick(tmp_path):
    command = [sys.executable, "-m", "benchmarks.scale", "--quick", "-o", str(tmp_path)]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True, timeout=600)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["scale.json", "scale.md", "scale.png"]
    result = json.loads((tmp_path / "scale.json").read_text())
    assert {"command", "date", "machine", "versions", "seed"} <= result.keys()
    for points in result["curves"].values():
        assert len(points) == 2
        for point in points:
            assert list(point["stages"]) == ["gather", "fit", "step", "make", "load", "decode", "attach", "save"]
            assert all(found["seconds"] > 0 and found["peak"] > 0 for found in point["stages"].values()), point
    assert result["hours"]["the default generator"] < result["hours"]["the paper's generator"]
