"""Figures as PNG: task vectors in the plane (the paper's Figure 2) and detections side by side (its Figure 4)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .tasks.annotated_images import AnnotatedImage


def plot_task_vectors(task_vectors: Mapping[str, Tensor], file: str | os.PathLike[str], *, title: str = "", seed: int = 0) -> None:
    """Draw the task vectors of several tasks in the plane of a t-SNE, a colour for each task (Figure 2).

    Args:
        task_vectors (`Mapping[str, Tensor]`): `[M, d]` for each task, one row for each sentence, picture or example; at least four rows in
            all.
        file (`str` or `Path`): The PNG.
        title (`str`, *optional*): Above the picture.
        seed (`int`, defaults to 0): Of the t-SNE.

    Raises:
        `ValueError`: If there are fewer than four rows.
    """
    from matplotlib import pyplot
    from sklearn.manifold import TSNE

    rows = torch.cat(list(task_vectors.values())).float()
    if len(rows) < 4:
        raise ValueError(f"A t-SNE needs at least four task vectors, found {len(rows)}.")
    places = TSNE(perplexity=min(30, (len(rows) - 1) / 3), init="pca", random_state=seed).fit_transform(rows.numpy())
    figure, axes = pyplot.subplots(figsize=(7, 6), layout="constrained")
    colours = pyplot.get_cmap("tab20")
    parts = torch.from_numpy(places).split([len(vectors) for vectors in task_vectors.values()])
    for index, (task, part) in enumerate(zip(task_vectors, parts, strict=True)):
        axes.scatter(part[:, 0], part[:, 1], s=12, color=colours(index % 20), label=task)
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, fontsize="medium")
    figure.legend(loc="outside right upper", frameon=False)
    save_figure(figure, file)


def plot_detections(
    images: Sequence[AnnotatedImage],
    found: Mapping[str, Sequence[Mapping[str, Any]]],
    file: str | os.PathLike[str],
    *,
    label: str | None = None,
    rows: Sequence[str] | None = None,
) -> None:
    """Draw what several models find in the same pictures, side by side (Figure 4).

    Args:
        images (`Sequence[AnnotatedImage]`): One row for each; their own boxes are drawn dashed and white.
        found (`Mapping[str, Sequence[Mapping]]`): One column for each model, with what [`detect`] returned for `images`.
        file (`str` or `Path`): The PNG.
        label (`str`, *optional*): Draw only boxes of this label, the pictures' own and those that were found.
        rows (`Sequence[str]`, *optional*): What is written beside each row.

    Raises:
        `ValueError`: If a column has not one entry for each picture.
    """
    from matplotlib import pyplot
    from matplotlib.patches import Rectangle

    for name, column in found.items():
        if len(column) != len(images):
            raise ValueError(f"{name!r} has detections of {len(column)} pictures, expected {len(images)}.")
    shape = (len(images), len(found))
    figure, grid = pyplot.subplots(*shape, figsize=(2.6 * shape[1], 2.75 * shape[0]), squeeze=False, layout="constrained")
    titles = rows or [""] * len(images)
    columns = zip(images, grid, zip(*found.values(), strict=True), titles, strict=True)
    for image_row, (image, row, detections, title) in enumerate(columns):
        picture = image.load()
        row[0].set_ylabel(title)
        for axes, name, detected in zip(row, found, detections, strict=True):
            axes.imshow(picture)
            axes.set(xticks=[], yticks=[])
            if image_row == 0:
                axes.set_title(name)
            own = zip(image.boxes, image.labels, [None] * len(image.boxes), strict=True)
            scored = zip(detected["boxes"], detected["labels"], detected["scores"], strict=True)
            for box, what, score in [*own, *scored]:
                if label not in (None, what):
                    continue
                x1, y1, x2, y2 = (float(value) for value in box)
                color, line = ("white", ":") if score is None else ("red", "-")
                axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, linewidth=1.6, color=color, linestyle=line))
                if score is not None:
                    axes.text(x1, y1, f"{what} {float(score):.2f}", fontsize=7, color="white", backgroundcolor="red", va="bottom")
    save_figure(figure, file)


def plot_bars(names: Sequence[str], bars: Mapping[str, Sequence[float]], label: str, file: str | os.PathLike[str]) -> None:
    """Draw bars of several kinds side by side for each name.

    Args:
        names (`Sequence[str]`): Below the groups of bars.
        bars (`Mapping[str, Sequence[float]]`): By kind, one number for each name.
        label (`str`): Of the numbers.
        file (`str` or `Path`): The PNG.
    """
    from matplotlib import pyplot

    width = 1 / (len(bars) + 1)
    figure, axes = pyplot.subplots(figsize=(max(5, 0.55 * len(names) + 2), 4.5), layout="constrained")
    for index, (kind, numbers) in enumerate(bars.items()):
        axes.bar([place + (index - (len(bars) - 1) / 2) * width for place in range(len(names))], numbers, width, label=kind)
    axes.set_xticks(range(len(names)), names, rotation=40, ha="right")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_ylabel(label)
    figure.legend(loc="outside upper center", ncols=1 if len(names) < 8 else len(bars), frameon=False)
    save_figure(figure, file)


def save_figure(figure: Figure, file: str | os.PathLike[str]) -> None:
    """Write a figure as PNG to a temporary name, rename it, and close it. Its texts are no mathematics, `$` is a dollar, but for the powers
    beside logarithmic axes."""
    from matplotlib import pyplot
    from matplotlib.text import Text

    temporary = Path(f"{file}.part")
    try:
        logarithmic = [axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) if axis.get_scale() == "log"]
        powers = {label for axis in logarithmic for label in axis.get_ticklabels(which="both")}
        for text in figure.findobj(Text):
            text.set_parse_math(text in powers)
        figure.savefig(temporary, dpi=130, format="png")
    finally:
        pyplot.close(figure)
    os.replace(temporary, file)
