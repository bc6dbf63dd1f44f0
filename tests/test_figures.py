"""Figures: what is drawn is there to be seen, and a figure that could not be written spoils none that was."""

import numpy as np
import pytest
import torch
from matplotlib import pyplot
from matplotlib.figure import Figure
from PIL import Image

from peft_icm.figures import plot_bars, plot_detections, plot_task_vectors, save_figure
from peft_icm.tasks.annotated_images import AnnotatedImage

BLUE = (20, 40, 200)


@pytest.fixture(autouse=True)
def no_figure_stays_open():
    pyplot.close("all")
    yield
    assert not pyplot.get_fignums()


def pixels(file):
    """`[height, width, 3]` of a PNG."""
    with Image.open(file) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGB")).astype(int)


def near(image, colour, tolerance=40):
    return np.abs(image - np.array(colour)).max(-1) <= tolerance


class TestTaskVectors:
    def vectors(self, *counts):
        draw = torch.Generator().manual_seed(0)
        centres = 5 * torch.randn(len(counts), 8, generator=draw)
        return {f"task{index}": centres[index] + torch.randn(n, 8, generator=draw) for index, n in enumerate(counts)}

    def test_a_dot_for_each_row_in_the_colour_of_its_task(self, tmp_path):
        plot_task_vectors(self.vectors(6, 1, 12), tmp_path / "vectors.png", title="words")
        assert [file.name for file in tmp_path.iterdir()] == ["vectors.png"]
        image = pixels(tmp_path / "vectors.png")
        seen = [near(image, [255 * part for part in pyplot.get_cmap("tab20")(index)[:3]], 3).sum() for index in range(3)]
        assert min(seen) > 10 and seen[2] > seen[0] > seen[1]  # the legend has one dot of each

    def test_the_seed_decides(self, tmp_path):
        for name, seed in (("a", 1), ("b", 1)):
            plot_task_vectors(self.vectors(5, 5), tmp_path / name, seed=seed)
        assert (pixels(tmp_path / "a") == pixels(tmp_path / "b")).all()

    def test_four_rows_in_half_precision_are_enough(self, tmp_path):
        plot_task_vectors({name: rows.bfloat16() for name, rows in self.vectors(2, 2).items()}, tmp_path / "four.png")
        assert len(np.unique(pixels(tmp_path / "four.png").reshape(-1, 3), axis=0)) > 2

    def test_three_are_not(self, tmp_path):
        with pytest.raises(ValueError, match="at least four task vectors, found 3"):
            plot_task_vectors(self.vectors(2, 1), tmp_path / "three.png")
        assert not list(tmp_path.iterdir())


class TestBars:
    def test_a_bar_for_each_number_in_the_colour_of_its_kind(self, tmp_path):
        plot_bars(["dog", "cat"], {"base": [1.0, 0.0], "own": [2.0, 2.0], "generated": [1.0, -1.0]}, "gain", tmp_path / "bars.png")
        assert [file.name for file in tmp_path.iterdir()] == ["bars.png"]
        image = pixels(tmp_path / "bars.png")
        height = len(image)
        image = image[height // 6 :]  # without the legend
        base, own, generated = (near(image, colour, 3) for colour in ((31, 119, 180), (255, 127, 14), (44, 160, 44)))
        assert base.sum() * 4 == pytest.approx(own.sum(), rel=0.1) and base.sum() * 2 == pytest.approx(generated.sum(), rel=0.1)
        assert np.flatnonzero(generated.any(1))[-1] > np.flatnonzero(own.any(1))[-1]  # one goes below zero

    def test_a_dollar_is_no_mathematics(self, tmp_path):
        plot_bars(["a$^$", "$x$"], {"$_$": [1.0, 2.0]}, "$\\", tmp_path / "bars.png")
        assert pixels(tmp_path / "bars.png").min() < 50

    def test_powers_beside_a_logarithmic_axis_are_as_matplotlib_writes_them(self, tmp_path):
        theirs, ours = (pyplot.subplots(layout="constrained") for _ in range(2))
        for _, axes in (theirs, ours):
            axes.loglog([1, 1e3, 1e6], [1, 10, 1000])
        theirs[0].savefig(tmp_path / "theirs.png", dpi=130)
        pyplot.close(theirs[0])
        save_figure(ours[0], tmp_path / "ours.png")
        assert np.array_equal(pixels(tmp_path / "ours.png"), pixels(tmp_path / "theirs.png"))


def found(*objects):
    boxes, labels, scores = zip(*objects, strict=True) if objects else ((), (), ())
    return {"boxes": torch.tensor(boxes, dtype=torch.float32).view(-1, 4), "labels": list(labels), "scores": torch.tensor(scores)}


SCENE = AnnotatedImage(Image.new("RGB", (80, 60), BLUE), [[8, 12, 32, 48]], ["couch"])
COUCH, DOG = ([40, 30, 72, 54], "couch", 0.75), ([4, 40, 20, 56], "dog", 0.5)


def columns(file, count):
    """The pictures inside a figure of one row, cut out at their own blue: `[height, width, 3]` each."""
    image = pixels(file)
    parts = []
    for part in np.array_split(image, count, axis=1):
        rows, places = (np.flatnonzero(near(part, BLUE).any(axis)) for axis in (1, 0))
        parts.append(part[rows[0] : rows[-1] + 1, places[0] : places[-1] + 1])
    return parts


def on(picture, box, colour):
    """The share of a box's outline, without its upper left corner where the label stands, that has a colour within two pixels."""
    height, width = picture.shape[:2]
    x1, y1, x2, y2 = (round(value * scale) for value, scale in zip(box, (width / 80, height / 60) * 2, strict=True))
    hits = near(picture, colour)
    points = [(y2, x) for x in range(x1, x2)] + [(y, x2) for y in range(y1, y2)]
    return np.mean([hits[max(y - 2, 0) : y + 3, max(x - 2, 0) : x + 3].any() for y, x in points])


class TestDetections:
    def test_boxes_lie_where_they_were_found(self, tmp_path):
        plot_detections([SCENE], {"base": [found()], "generated": [found(COUCH, DOG)]}, tmp_path / "boxes.png")
        assert [file.name for file in tmp_path.iterdir()] == ["boxes.png"]
        base, generated = columns(tmp_path / "boxes.png", 2)
        assert not near(base, (255, 0, 0)).any()
        assert on(generated, COUCH[0], (255, 0, 0)) > 0.95 and on(generated, DOG[0], (255, 0, 0)) > 0.95
        assert on(generated, [40, 2, 78, 22], (255, 0, 0)) == 0

    def test_the_pictures_own_boxes_are_dashed_and_white_in_every_column(self, tmp_path):
        plot_detections([SCENE], {"base": [found()], "generated": [found(COUCH)]}, tmp_path / "boxes.png")
        for picture in columns(tmp_path / "boxes.png", 2):
            assert on(picture, SCENE.boxes[0], (255, 255, 255)) > 0.3 and on(picture, [36, 2, 78, 22], (255, 255, 255)) == 0

    def test_one_label_alone(self, tmp_path):
        plot_detections([SCENE], {"generated": [found(COUCH, DOG)]}, tmp_path / "dogs.png", label="dog")
        (picture,) = columns(tmp_path / "dogs.png", 1)
        assert on(picture, DOG[0], (255, 0, 0)) > 0.95 and on(picture, COUCH[0], (255, 0, 0)) == 0
        assert on(picture, [20, 12, 32, 30], (255, 255, 255)) < 0.1

    def test_every_picture_has_its_own_row(self, tmp_path):
        lower = AnnotatedImage(Image.new("RGB", (80, 60), (30, 160, 30)))
        plot_detections([SCENE, lower], {"own LoRA": [found(), found(COUCH)]}, tmp_path / "rows.png")
        image = pixels(tmp_path / "rows.png")
        red = np.flatnonzero(near(image, (255, 0, 0)).any(1))
        assert red[0] > np.flatnonzero(near(image, BLUE).any(1))[-1]

    def test_a_column_of_too_few_pictures_is_named(self, tmp_path):
        with pytest.raises(ValueError, match="'own LoRA' has detections of 1 pictures, expected 2"):
            plot_detections([SCENE, SCENE], {"base": [found()] * 2, "own LoRA": [found()]}, tmp_path / "boxes.png")
        assert not list(tmp_path.iterdir())

    def test_a_failure_half_way_leaves_the_figure_that_was_there(self, tmp_path, monkeypatch):
        plot_detections([SCENE], {"base": [found(COUCH)]}, tmp_path / "boxes.png")
        before, whole = (tmp_path / "boxes.png").read_bytes(), Figure.savefig

        def until_the_disk_is_full(figure, file, **options):
            whole(figure, file, **options)
            file.write_bytes(file.read_bytes()[:100])
            raise OSError("No space left on device")

        monkeypatch.setattr(Figure, "savefig", until_the_disk_is_full)
        with pytest.raises(OSError, match="No space left"):
            plot_detections([SCENE], {"base": [found(DOG)]}, tmp_path / "boxes.png")
        assert (tmp_path / "boxes.png").read_bytes() == before
        monkeypatch.undo()
        plot_detections([SCENE], {"base": [found(DOG)]}, tmp_path / "boxes.png")
        assert [file.name for file in tmp_path.iterdir()] == ["boxes.png"] and (tmp_path / "boxes.png").read_bytes() != before
