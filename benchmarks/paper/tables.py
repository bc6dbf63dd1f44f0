"""The paper's Tables 1 to 6, each from a workshop."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft_icm.adapters.fidelity import relative_error
from peft_icm.baselines import CompressedAdapters, MeanOverTasks, stored_bytes

from . import paper
from .methods import BASE, DIFFUSION, ICM, OWN, SOUP, Method, all_methods, compare, gain_share, icm, papers_methods
from .results import Cell, Table
from .scales import TABLE_RANK, Scale
from .workshop import Workshop

SHARE = "share of own gain"
SNAPSHOTS = (
    "ICM-LoRA and COND P-DIFF train on four fifths of the snapshots; soups and Gaussians take all of them. The"
    " LoRA of all tasks is trained for twice the steps of one task's."
)


def table_1(workshop: Workshop, scale: Scale) -> Table:
    """AP50 and AP75 of five classes, r = 2, under every method."""
    methods = all_methods(workshop, TABLE_RANK, scale)
    scores = compare(workshop, workshop.collection(TABLE_RANK), methods)
    rows: dict[str, dict[str, Cell]] = {}
    for method in scores:
        rows[method] = {
            f"{task} AP{level}": [score[f"map_{level}"] for score in scores[method][task]] for task in scores[method] for level in (50, 75)
        }
        rows[method][SHARE] = gain_share(scores, method)
    columns = [f"{task} AP{level}" for task in workshop.family.tasks for level in (50, 75)]
    notes = [
        "In brackets the paper's figures, for Florence-2 and COCO.",
        f"Share of own gain: sum over classes of (AP50 - AP50 of the base), over that of the own LoRAs. Seeds {list(scale.seeds)}.",
        SNAPSHOTS,
    ]
    return Table("table1", f"Detection, LoRA r = {TABLE_RANK}", [*columns, SHARE], rows, paper.TABLE_1, notes)


def table_2(workshop: Workshop, scale: Scale) -> Table:
    """Perplexity and bits per character of five text domains, r = 2, under every method."""
    methods = all_methods(workshop, TABLE_RANK, scale)
    scores = compare(workshop, workshop.collection(TABLE_RANK), methods)
    names = {"ppl": "PPL", "bpc": "BPC"}
    rows: dict[str, dict[str, Cell]] = {}
    for method in scores:
        rows[method] = {
            f"{task} {title}": [one[key] for one in scores[method][task]] for task in scores[method] for key, title in names.items()
        }
        rows[method][SHARE] = gain_share(scores, method)
    columns = [f"{task} {title}" for task in workshop.family.tasks for title in names.values()]
    notes = [
        "Perplexity depends on model and tokenizer: the paper's (Llama-3-8B on the Pile) do not compare, and its BPC, 0.4 to 0.6 at a"
        " perplexity of 6 to 10, looks like nats per character.",
        f"Share of own gain: in nats per token, summed over domains. Seeds {list(scale.seeds)}.",
        SNAPSHOTS,
    ]
    return Table("table2", f"Language modelling, LoRA r = {TABLE_RANK}", [*columns, SHARE], rows, notes=notes)


def table_3(workshops: Sequence[Workshop]) -> Table:
    """Bytes that each method keeps, by family and rank, and the number of tasks from which a generator is the smaller one."""
    columns: list[str] = []
    rows: dict[str, dict[str, Cell]] = {}

    def put(row: str, column: str, value: float) -> None:
        rows.setdefault(row, {})[column] = [value]

    for workshop in workshops:
        for rank in workshop.family.ranks:
            column = f"{workshop.family.name} r = {rank}"
            columns.append(column)
            collection = workshop.collection(rank)
            lora = collection.layout.numel * 4
            generator = stored_bytes(workshop.generator(f"icm-r{rank}", collection, 0))
            vectors = sum(rows.numel() * 4 for rows in collection.task_vectors.values())
            int8, int4 = (stored_bytes(CompressedAdapters(collection, kind)) - vectors for kind in ("int8", "int4"))
            put("training data of all tasks", column, _training_bytes(workshop))
            put("LoRA snapshots, fp32", column, sum(part.numel() * 4 for part in collection.snapshots.values()))
            put("one LoRA for each task, fp32", column, lora * len(collection.tasks))
            put("one LoRA for each task, int8", column, int8)
            put("one LoRA for each task, int4", column, int4)
            put(SOUP, column, stored_bytes(MeanOverTasks(collection)))
            put(DIFFUSION, column, stored_bytes(workshop.diffusion(rank, 0)))
            put(ICM, column, generator)
            put("break-even number of tasks, against fp32 LoRAs", column, math.ceil(generator / lora))
            put("break-even number of tasks, against int4 LoRAs", column, math.ceil(generator * len(collection.tasks) / int4))
    notes = [
        f"Bytes of numbers in fp32, {len(workshops[0].family.tasks)} tasks. The text encoder, {_encoder_bytes(workshops[0]):,} bytes, comes"
        " on top wherever a sentence is read. int4 and int8 with their scales. What stored LoRAs are"
        " looked up by, one task vector each or more, is in no row.",
        "Break-even takes the generator as if it did not grow with the tasks; it has to when they outnumber its components.",
        "The paper compares 283 MB with 2,230 snapshots and with COCO, not with one LoRA for each task: its own published network"
        " breaks even at 147 tasks of 1.9 MB.",
    ]
    return Table("table3", "Storage", columns, rows, notes=notes, digits=0)


def _training_bytes(workshop: Workshop) -> float:
    texts = [len(text.encode()) for task in workshop.tasks for text in getattr(task, "train_texts", [])]
    files = {image.image for task in workshop.tasks for image in getattr(task, "train_images", [])}
    return sum(texts) + sum(Path(file).stat().st_size for file in files)


def _encoder_bytes(workshop: Workshop) -> int:
    encoder: Any = workshop.encoder
    return sum(tensor.numel() * 4 for tensor in encoder.model.state_dict().values())


def table_4(workshops: Sequence[Workshop], scale: Scale) -> Table:
    """Rank by method: AP50 of dog and cat, and the share of the own LoRAs' gain over all tasks of each family."""
    short = {OWN: "own LoRA", SOUP: "Model Soup", DIFFUSION: "COND P-DIFF", ICM: "ICM-LoRA"}
    shares = [f"{SHARE}: {short[name]}" for name in (SOUP, DIFFUSION, ICM)]
    shown = [f"{task} {title}" for task in ("dog", "cat") for title in short.values()]
    rows: dict[str, dict[str, Cell]] = {}
    brackets: dict[str, dict[str, float]] = {}
    for workshop in workshops:
        for rank in workshop.family.ranks:
            collection = workshop.collection(rank)
            scores = compare(workshop, collection, papers_methods(workshop, rank, scale.seeds))
            name = f"{workshop.family.name} r = {rank}"
            row: dict[str, Cell] = {"P": f"{collection.layout.numel:,}"}
            row |= {f"{SHARE}: {short[method]}": gain_share(scores, method) for method in (SOUP, DIFFUSION, ICM)}
            for index, task in enumerate(("dog", "cat")):
                if task in workshop.family.tasks:
                    row |= {f"{task} {title}": [one["map_50"] for one in scores[method][task]] for method, title in short.items()}
                    figures = {f"{task} {short[method]}": values[index] for method, values in paper.TABLE_4.get(rank, {}).items()}
                    brackets.setdefault(name, {}).update(figures)
            rows[name] = row
    notes = [f"Seeds {list(scale.seeds)}. In brackets the paper's figures. Shares as in Tables 1 and 2, over all five tasks."]
    detection = any("dog" in workshop.family.tasks for workshop in workshops)
    return Table("table4", "Rank and number of parameters", ["P", *shares, *(shown if detection else [])], rows, brackets, notes)


def table_5(workshop: Workshop, scale: Scale) -> Table:
    """Number of convolutions by rank, architecture `paper`: AP50 of cat, and the error of the generated adapters; one seed."""
    task, seed = "cat", scale.seeds[0]
    rows: dict[str, dict[str, Cell]] = {}
    brackets: dict[str, dict[str, float]] = {}
    for layers in scale.conv_layers:
        row: dict[str, Cell] = {}
        for position, rank in enumerate((1, 2, 4, 8)):
            if rank not in scale.conv_ranks:
                continue
            collection = workshop.collection(rank)
            generator = workshop.generator(
                f"paper-n{layers}-r{rank}", collection, seed, epochs=scale.conv_epochs, batch_size=8,
                architecture="paper", num_conv_layers=layers, latent_size=64, kl_weight=0.005, learning_rate=1e-3,
            )  # fmt: skip
            scores = compare(workshop, collection, [Method(ICM, lambda _, source=generator: source, (seed,))], [task])  # type: ignore[misc]
            row[f"r = {rank}"] = [scores[ICM][task][0]["map_50"]]
            brackets.setdefault(f"n = {layers}", {})[f"r = {rank}"] = paper.TABLE_5[layers][position]
            made = generator.sample(workshop.condition(task))
            own = collection.final(task)[None]
            row[f"error, r = {rank}"] = [float(relative_error(collection.layout, made, own).squeeze())]
        rows[f"n = {layers}"] = row
    for rank in scale.conv_ranks:
        collection = workshop.collection(rank)
        found = compare(workshop, collection, [Method(BASE, None)], [task])
        rows.setdefault(BASE, {})[f"r = {rank}"] = [found[BASE][task][0]["map_50"]]
        rows.setdefault(OWN, {})[f"r = {rank}"] = [workshop.scorer(collection)(task, collection.final(task))["map_50"]]
    columns = [f"{what}r = {rank}" for what in ("", "error, ") for rank in scale.conv_ranks]
    notes = [
        f"One seed, latent size 64, {scale.conv_epochs} epochs in batches of 8; the paper trains for 2,000, and convolutions are slow.",
        "Error: relative, on dW, to the own LoRA. An adapter with an error of 1 does nothing, and then the AP50 is the original model's.",
        "In brackets the paper's AP50.",
    ]
    return Table("table5", "Convolutions of the paper's architecture (cat, AP50)", columns, rows, brackets, notes)


def table_6(workshop: Workshop, scale: Scale) -> Table:
    """AP50 of adapters generated from pictures, text, or both."""
    collection = workshop.collection(TABLE_RANK)
    kinds = {"pictures": "pictures", "text": "description", "both": "both"}
    source = icm(workshop, TABLE_RANK)
    methods = [Method(name, source, scale.seeds, kind) for name, kind in kinds.items()]
    scores = compare(workshop, collection, methods)
    rows: dict[str, dict[str, Cell]] = {
        name: {task: [one["map_50"] for one in scores[name][task]] for task in workshop.family.tasks} for name in kinds
    }
    notes = ["Pictures: four objects cut out of test images, the next four for each seed. In brackets the paper's figures."]
    return Table("table6", "Text and pictures (AP50)", list(workshop.family.tasks), rows, dict.fromkeys(kinds, paper.TABLE_6), notes)
