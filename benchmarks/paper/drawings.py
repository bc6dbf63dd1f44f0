"""The paper's Figures 2, 4 and 5, and a picture of each table that is better seen than read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from peft_icm.figures import plot_detections, plot_task_vectors, save_figure
from peft_icm.tasks.annotated_images import AnnotatedImage

from .ablations import states
from .methods import BASE, DIFFUSION, ICM, OWN, SOUP, papers_methods
from .results import Table
from .scales import TABLE_RANK, Scale
from .workshop import Workshop

TITLES = {BASE: "original model", OWN: "original LoRA", SOUP: "Model Soup", DIFFUSION: "COND P-DIFF", ICM: "ICM-LoRA"}


def figure_2(workshop: Workshop, folder: Path) -> None:
    """Task vectors of the task encoder (`figure2.png`), and last hidden states of the unadapted base (`figure2_states.png`)."""
    collection = workshop.collection(TABLE_RANK)
    vectors = {task: torch.cat([rows[:20], rows[-20:]]) for task, rows in collection.task_vectors.items()}
    plot_task_vectors(vectors, folder / "figure2.png", title=f"{workshop.family.name}: task vectors")
    seen, unseen = states(workshop, collection, tuned=False)
    both = {task: torch.cat([seen[task], unseen[task]]) for task in seen}
    plot_task_vectors(both, folder / "figure2_states.png", title=f"{workshop.family.name}: last states of the unadapted base")


def figure_4(workshop: Workshop, scale: Scale, folder: Path) -> None:
    """A picture of each class under the paper's five methods, r = 2."""
    collection = workshop.collection(TABLE_RANK)
    scorer = workshop.scorer(collection)
    methods = papers_methods(workshop, TABLE_RANK, scale.seeds[:1])
    images: list[AnnotatedImage] = []
    columns: dict[str, list[dict[str, Any]]] = {TITLES[method.name]: [] for method in methods}
    for task in workshop.family.tasks:
        image = _shown(scorer.splits[task]["test"], workshop.task(task).label)
        images.append(image)
        for method in methods:
            columns[TITLES[method.name]] += scorer.find(task, method.adapter(workshop, collection, task, scale.seeds[0]), [image])
    plot_detections(images, columns, folder / "figure4.png")


def figure_5(workshop: Workshop, scale: Scale, folder: Path) -> None:
    """One picture of a cat: a row for each rank, a column for each method."""
    task = "cat"
    columns: dict[str, list[dict[str, Any]]] = {TITLES[name]: [] for name in (OWN, SOUP, DIFFUSION, ICM)}
    images = []
    for rank in workshop.family.ranks:
        collection = workshop.collection(rank)
        scorer = workshop.scorer(collection)
        images.append(_shown(scorer.splits[task]["test"], workshop.task(task).label))
        for method in papers_methods(workshop, rank, scale.seeds[:1]):
            if method.name != BASE:
                found = scorer.find(task, method.adapter(workshop, collection, task, scale.seeds[0]), images[-1:])
                columns[TITLES[method.name]] += found
    plot_detections(images, columns, folder / "figure5.png", rows=[f"r = {rank}" for rank in workshop.family.ranks])


def _shown(images: Any, label: str) -> AnnotatedImage:
    """The first picture with one object of the class and others beside it; the class's own box alone."""
    image = next((one for one in images if one.labels.count(label) == 1 and len(one.labels) > 2), images[0])
    return AnnotatedImage(image.image, [box for box, name in zip(image.boxes, image.labels, strict=True) if name == label], [label])


def draw_bars(table: Table, column: str, file: Path) -> None:
    """One column of a table, a bar for each row with its spread."""
    from matplotlib import pyplot

    rows = {name: cells[column] for name, cells in table.rows.items() if not isinstance(cells[column], str)}
    figure, axes = pyplot.subplots(figsize=(8, 0.34 * len(rows) + 1.2), layout="constrained")
    for place, cell in enumerate(rows.values()):
        values = torch.tensor([float(value) for value in cell])
        spread = float(values.std()) if len(values) > 1 else 0.0
        axes.barh(place, float(values.mean()), xerr=spread, color="tab:blue" if list(rows)[place].startswith(ICM) else "lightgrey")
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlim(left=max(-1.5, axes.get_xlim()[0]))
    axes.set(xlabel=column, title=table.title)
    save_figure(figure, file)


def draw_ranks(table: Table, file: Path) -> None:
    """Table 4: the share of the own LoRAs' gain by rank, a line for each method, a panel for each family."""
    from matplotlib import pyplot

    shares = [column for column in table.columns if ":" in column]
    families = list(dict.fromkeys(name.split(" r = ")[0] for name in table.rows))
    figure, grid = pyplot.subplots(1, len(families), figsize=(4.5 * len(families), 3.6), squeeze=False, layout="constrained")
    for axes, family in zip(grid[0], families, strict=True):
        rows = {int(name.split(" r = ")[1]): cells for name, cells in table.rows.items() if name.startswith(f"{family} ")}
        for column in shares:
            found = {str(rank): row[column] for rank, row in rows.items() if not isinstance(row[column], str)}
            cells = [torch.tensor([float(value) for value in cell]) for cell in found.values()]
            spread = [float(cell.std()) if len(cell) > 1 else 0.0 for cell in cells]
            means = [float(cell.mean()) for cell in cells]
            axes.errorbar(list(found), means, yerr=spread, marker="o", capsize=3, label=column.split(": ")[1])
        axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
        axes.set(title=family, xlabel="rank r", ylabel="share of the own LoRAs' gain")
    grid[0, 0].legend(frameon=False)
    save_figure(figure, file)
