"""The demo: one sentence becomes an adapter; what it changes is shown on held-out text or pictures, row by row."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoProcessor

from ..adapters.attach import attach
from ..adapters.collection import AdapterCollection
from ..adapters.saving import save_adapter
from ..bundled import bundled_folder, bundled_requests
from ..disk import replacing_file
from ..evaluation.detection import DetectionEvaluation, class_precision
from ..evaluation.report import VARIANTS, Report
from ..evaluation.requests import evaluate_requests, load_requests
from ..evaluation.text import Evaluation
from ..figures import plot_detections
from ..generator.modeling_icm import ICMGenerator
from ..tasks import load_tasks
from ..tasks.annotated_images import crops
from ..tasks.detection import detect
from ..tasks.language_modeling import LanguageModelingTask

SENTENCES = {"text": "continue a Shakespeare play", "detection": "detect sofas"}
TEXTS = ("shakespeare", "bible", "latex", "german")  # rows of the short table
CLASSES = ("sofa", "motorbike")
TABLE_1 = ("dog", "bicycle", "cat", "sofa", "motorbike")  # the paper's classes
CHARACTERS = 2000  # of a held-out text that the short table is scored on
OPENING = 200  # characters of a held-out play that are continued
NEW_TOKENS = 60
SHOWN = 3  # pictures on the sheet
UNSEEN_PICTURES = 8  # of a class that no LoRA was trained for
PICTURES = 4  # with the class, and as many without, that the short table is scored on
SEEDS = (0, 1, 2)  # of z; the short table takes the first
BATCH = {"text": 4, "detection": 32}
ASKED, UNKNOWN_ASKED = {"text": 2, "detection": 6}, 18  # bundled requests for each task, and for none of them

Say = Callable[[str], None]


def run_demo(output: str | Path, task: str = "text", *, full: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Generate an adapter from a sentence, save it, and show what it changes.

    Args:
        output (`str` or `Path`): Folder for `adapter/`, `demo.json`, `demo.png`, with `full` `requests.png`; `detections.png`.
        task (`str`, defaults to `"text"`): The bundle: `"text"` (18 domains of text) or `"detection"` (the five classes of the paper).
        full (`bool`, defaults to `False`): Score all tasks, seeds and controls on all held-out data, which takes minutes; by default a few
            tasks, one seed, on the beginning of their held-out data.
        quiet (`bool`, defaults to `False`): Print nothing; progress bars stay.

    Returns:
        `dict`: [`Evaluation.to_dict`] or [`DetectionEvaluation.to_dict`]; under `adapter` the folder written; with `full` under `requests`
        [`RequestsReport.to_dict`]. For text under `opening` the
        beginning of a held-out text and under `continued` how `base` and `generated` go on. For detection under `picture` the drawing of
        what base, own LoRA and generated adapter find, and under `shown` their boxes and AP50 in it; under `unseen` the same of
        classes that no LoRA was trained for.
    """
    say: Say = (lambda _: None) if quiet else partial(print, flush=True)
    bundle, folder, sentence = bundled_folder(task), Path(output), SENTENCES[task]
    say(f'ICMGenerator.from_pretrained(bundled_generator("{task}")).generate_adapter({sentence!r})')
    generator = ICMGenerator.from_pretrained(bundle / "generator")
    model = generator.generate_adapter(sentence, generator=torch.Generator().manual_seed(SEEDS[0]))
    folder.mkdir(parents=True, exist_ok=True)
    adapter = save_adapter(model, folder / "adapter").resolve()
    say(f"-> {type(model).__name__}, {generator.layout.numel:,} numbers; an ordinary PEFT folder: {adapter}\n")
    collection = AdapterCollection.from_pretrained(bundle / "own")
    own = {name: collection.final(name) for name in collection.tasks}
    processor = AutoProcessor.from_pretrained(model.get_base_model().name_or_path)
    tasks: dict[str, Any] = {found.name: found for found in load_tasks(bundle / "tasks")}
    kind: type[Report[Any]]
    if task == "text":
        kind = Evaluation
        more = _continue(model, processor, tasks["shakespeare"].test_texts[0], say)
    else:
        kind = DetectionEvaluation
        more = _find(generator, model, processor, tasks["sofa"], own["sofa"], folder.resolve() / "detections.png", say)
        more["unseen"] = _find_unseen(processor, folder.resolve() / "unseen.png", say)
    chosen, where = (_all_tasks if full else _few_tasks)(task, tasks)
    say(f"\n{where}:\n")
    if not full:
        say(f"{'task':14}{'base':>9}{'own':>9}{'generated':>11}   from")
    variants, seeds = VARIANTS if full and task == "text" else VARIANTS[:1], SEEDS if full else SEEDS[:1]
    options: dict[str, Any] = {"batch_size": BATCH[task], "progress": full, "each": None if full else partial(_say_row, kind, say)}
    evaluation = kind.evaluate(generator, processor, chosen, own, variants=variants, seeds=seeds, **options)
    result = {**evaluation.to_dict(), "adapter": str(adapter), **more}
    evaluation.plot(folder / "demo.png")
    if full:
        say(evaluation.table())
        result["requests"] = _ask(kind, generator, processor, task, chosen, own, folder / "requests.png", say)
    with replacing_file(folder / "demo.json") as file:
        file.write_text(json.dumps(result, indent=1))
    say(f"\nown: the LoRA that was trained for the task. Seeds {evaluation.seeds}; {evaluation.seconds:.0f} s.")
    if not full:
        say("All tasks, seeds and controls, on all held-out data: --full (minutes).")
    say(f"Also in {folder}: {', '.join(sorted(file.name for file in folder.iterdir()))}.")
    say(f'Load the adapter without peft_icm: PeftModel.from_pretrained(base, "{adapter}")')
    return result


def _all_tasks(task: str, tasks: dict[str, Any]) -> tuple[list[Any], str]:
    """Those of `--full`, and what they are."""
    if task == "text":
        return list(tasks.values()), f"Now on held-out text of all {len(tasks)} tasks, with controls (this takes about two minutes)"
    count = len(tasks["sofa"].test_images)
    where = f"Now the paper's five classes, on {count} pictures in styles never trained on (this takes about a minute)"
    return [tasks[name] for name in tasks if name in TABLE_1], where


def _few_tasks(task: str, tasks: dict[str, Any]) -> tuple[list[Any], str]:
    """A few tasks with the beginning of their held-out data, and what that is."""
    if task == "text":
        return [_beginning(tasks[name]) for name in TEXTS], f"Perplexity on the first {CHARACTERS} characters of held-out text"
    return [_beginning(tasks[name]) for name in CLASSES], f"AP50 on {2 * PICTURES} held-out pictures"


def _beginning(task: Any) -> Any:
    """A task with the beginning of its held-out data."""
    if isinstance(task, LanguageModelingTask):
        return replace(task, test_texts=[str(task.test_texts[0])[:CHARACTERS]])
    images = [image for image in task.test_images if task.label in image.labels][:PICTURES]
    return replace(task, test_images=images + [image for image in task.test_images if task.label not in image.labels][:PICTURES])


def _ask(
    kind: type[Report[Any]],
    generator: ICMGenerator,
    processor: Any,
    bundle: str,
    tasks: list[Any],
    own: dict[str, torch.Tensor],
    picture: Path,
    say: Say,
) -> dict[str, Any]:
    """Some of the bundled requests: what each `on_unknown` keeps of the own LoRAs' gain, and what retrieval by the same encoder does."""
    known, unknown = load_requests(bundled_requests(bundle), [task["name"] for task in generator.config.tasks or []])
    some = {task.name: _spread(known[task.name], ASKED[bundle]) for task in tasks}
    few = [_beginning(task) for task in tasks]
    say(
        f"\nNow {ASKED[bundle]} requests for each of them in words that nothing was trained on, and {UNKNOWN_ASKED} for something else,"
        " on the beginning of the held-out data\n(settings were chosen on these; what others gave: python -m benchmarks.reading once):\n"
    )
    seed, batch_size = SEEDS[0], BATCH[bundle]
    asked = evaluate_requests(kind, generator, processor, few, own, some, _spread(unknown, UNKNOWN_ASKED), seed=seed, batch_size=batch_size)
    asked.plot(picture)
    say(asked.table())
    return asked.to_dict()


def _spread(lines: list[str], count: int) -> list[str]:
    """So many of them, from all over the list."""
    return [lines[index * len(lines) // count] for index in range(count)]


def _say_row(kind: type[Report[Any]], say: Say, task: Any, row: dict[str, Any]) -> None:
    base, own, generated = (kind.shown[0].format(**kind.numbers(row[column])) for column in ("base", "own", "generated"))
    say(f"{task.name:14}{base:>9}{own:>9}{generated:>11}   {task.descriptions[0]!r}")


def _continue(model: PeftModel, tokenizer: Any, text: str, say: Say) -> dict[str, Any]:
    """The beginning of a text continued side by side."""
    opening = text[:OPENING].rpartition("\n")[0] + "\n"
    inputs = tokenizer(opening, return_tensors="pt", return_token_type_ids=False)

    def goes_on() -> str:
        with torch.random.fork_rng():
            torch.manual_seed(SEEDS[0])
            tokens = model.generate(
                **inputs, max_new_tokens=NEW_TOKENS, do_sample=True, temperature=0.7, pad_token_id=tokenizer.eos_token_id
            )
        return tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    with model.disable_adapter():
        continued = {"base": goes_on()}
    continued["generated"] = goes_on()
    say(f"A held-out play, continued by both models with one seed:\n{opening}\n")
    columns = [[name, "-" * len(name), *found.splitlines()] for name, found in continued.items()]
    width = max(map(len, columns[0])) + 3
    for left, right in zip_longest(*columns, fillvalue=""):
        say(f"{left:{width}}{right}")
    return {"opening": opening, "continued": continued}


def _find(
    generator: ICMGenerator, model: PeftModel, processor: Any, task: Any, own: torch.Tensor, picture: Path, say: Say
) -> dict[str, Any]:
    """A few pictures with the class, drawn under base, own LoRA and the generated adapter; boxes and AP50 of each."""
    images = [image for image in task.test_images if task.label in image.labels][:SHOWN]
    generated = detect(model, processor, images, progress=False)
    with model.disable_adapter():
        base = detect(model, processor, images, progress=False)
    layout = generator.layout
    attach(model, layout, layout.unflatten(own.to(layout.torch_dtype)))
    columns = {"base": base, "own": detect(model, processor, images, progress=False), "generated": generated}
    shown = {}
    for name, found in columns.items():
        boxes = [[box for box, label in zip(one["boxes"].tolist(), one["labels"], strict=True) if label == task.label] for one in found]
        shown[name] = {"map_50": round(class_precision(found, images, task.label)["map_50"], 4), "boxes": boxes}
    titles = {f"{name}: AP50 {shown[name]['map_50']:.2f}": found for name, found in columns.items()}
    plot_detections(images, titles, picture, label=task.label)
    precisions = ", ".join(f"{name} {found['map_50']:.2f}" for name, found in shown.items())
    say(f"AP50 on the {SHOWN} pictures drawn in {picture}: {precisions}")
    return {"picture": str(picture), "shown": shown}


def _find_unseen(processor: Any, picture: Path, say: Say) -> dict[str, Any]:
    """A class that no LoRA was trained for, found after a look at pictures of it; boxes drawn, AP50 of each bundled class of that kind."""
    bundle = bundled_folder("open")
    generator = ICMGenerator.from_pretrained(bundle / "generator")
    tasks: Any = load_tasks(bundle / "tasks")
    precisions: dict[str, dict[str, float]] = {}
    say(f"\nNow classes that nothing was trained on, each shown in {UNSEEN_PICTURES} pictures of other scenes (AP50 of base, generated):")
    for task in tasks:
        pictures = crops(task.train_images, task.label, UNSEEN_PICTURES)
        model = generator.generate_adapter(images=pictures, generator=torch.Generator().manual_seed(SEEDS[0]))
        found = {"generated": task.named(detect(model, processor, task.test_images, progress=False))}
        with model.disable_adapter():
            found["base"] = task.named(detect(model, processor, task.test_images, progress=False))
        precisions[task.name] = {
            name: round(class_precision(each, task.test_images, task.label)["map_50"], 4) for name, each in found.items()
        }
        say(f"{task.name:14}{precisions[task.name]['base']:>9.2f}{precisions[task.name]['generated']:>9.2f}")
        if task is tasks[0]:
            rows = [index for index, image in enumerate(task.test_images) if task.label in image.labels][:SHOWN]
            titles = {name: [found[name][row] for row in rows] for name in ("base", "generated")}
            plot_detections([task.test_images[row] for row in rows], titles, picture, label=task.label)
    return {"picture": str(picture), "map_50": precisions}
