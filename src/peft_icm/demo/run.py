"""The demo: one sentence becomes an adapter; what it changes is shown on held-out text or pictures, row by row."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoProcessor

from ..adapters.attach import attach
from ..adapters.collection import AdapterCollection
from ..adapters.saving import save_adapter
from ..bundled import bundled_folder
from ..disk import replacing_file
from ..generator.modeling_icm import ICMGenerator
from ..tasks import load_tasks

SENTENCES = {"text": "continue a Shakespeare play", "detection": "detect sofas"}
TEXTS = ("shakespeare", "bible", "latex", "german")  # rows of the short table
CLASSES = ("sofa", "motorbike")
TABLE_1 = ("dog", "bicycle", "cat", "sofa", "motorbike")  # the paper's classes
CHARACTERS = 2000  # of a held-out text that the short table is scored on
OPENING = 200  # characters of a held-out play that are continued
NEW_TOKENS = 60
SHOWN = 3  # pictures on the sheet
PICTURES = 4  # with the class, and as many without, that the short table is scored on
SEED = 0

Say = Callable[[str], None]


def run_demo(output: str | Path, task: str = "text", *, full: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Generate an adapter from a sentence, save it, and show what it changes.

    Args:
        output (`str` or `Path`): Folder for `adapter/`, `demo.json` and `demo.png`, and for detection `detections.png`.
        task (`str`, defaults to `"text"`): The bundle: `"text"` (18 domains of text) or `"detection"` (the five classes of the paper).
        full (`bool`, defaults to `False`): Score all tasks, seeds and controls on all held-out data, which takes minutes; by default a few
            tasks, one seed, on the beginning of their held-out data.
        quiet (`bool`, defaults to `False`): Print nothing; progress bars stay.

    Returns:
        `dict`: [`Evaluation.to_dict`] or [`DetectionEvaluation.to_dict`]; under `adapter` the folder written. For text under `opening` the
        beginning of a held-out text and under `continued` how `base` and `generated` go on. For detection under `picture` the drawing of
        what base, own LoRA and generated adapter find, and under `shown` their boxes and AP50 in it.
    """
    say: Say = (lambda _: None) if quiet else partial(print, flush=True)
    bundle, folder, sentence = bundled_folder(task), Path(output), SENTENCES[task]
    say(f'ICMGenerator.from_pretrained(bundled_generator("{task}")).generate_adapter({sentence!r})')
    generator = ICMGenerator.from_pretrained(bundle / "generator")
    model = generator.generate_adapter(sentence, generator=torch.Generator().manual_seed(SEED))
    folder.mkdir(parents=True, exist_ok=True)
    adapter = save_adapter(model, folder / "adapter").resolve()
    say(f"-> {type(model).__name__}, {generator.layout.numel:,} numbers; an ordinary PEFT folder: {adapter}\n")
    collection = AdapterCollection.from_pretrained(bundle / "own")
    own = {name: collection.final(name) for name in collection.tasks}
    processor = AutoProcessor.from_pretrained(model.get_base_model().name_or_path)
    show = _show_text if task == "text" else _show_detection
    evaluation, more = show(
        generator, model, processor, {found.name: found for found in load_tasks(bundle / "tasks")}, own, folder, full, say
    )
    result = {**evaluation.to_dict(), "adapter": str(adapter), **more}
    evaluation.plot(folder / "demo.png")
    with replacing_file(folder / "demo.json") as file:
        file.write_text(json.dumps(result, indent=1))
    if full:
        say(evaluation.table())
    say(f"\nown: the LoRA that was trained for the task. Seeds {evaluation.seeds}; {evaluation.seconds:.0f} s.")
    if not full:
        say("All tasks, seeds and controls, on all held-out data: --full (minutes).")
    say(f"Also in {folder}: {', '.join(sorted(file.name for file in folder.iterdir()))}.")
    say(f'Load the adapter without peft_icm: PeftModel.from_pretrained(base, "{adapter}")')
    return result


def _show_text(
    generator: ICMGenerator,
    model: PeftModel,
    tokenizer: Any,
    tasks: dict[str, Any],
    own: dict[str, torch.Tensor],
    folder: Path,
    full: bool,
    say: Say,
) -> tuple[Any, dict[str, Any]]:
    """A text continued side by side, then perplexities."""
    from ..evaluation.text import Evaluation, evaluate_generator
    from ..tasks.language_modeling import nll

    opening = tasks["shakespeare"].test_texts[0][:OPENING].rpartition("\n")[0] + "\n"
    inputs = tokenizer(opening, return_tensors="pt", return_token_type_ids=False)

    def goes_on() -> str:
        with torch.random.fork_rng():
            torch.manual_seed(SEED)
            tokens = model.generate(
                **inputs, max_new_tokens=NEW_TOKENS, do_sample=True, temperature=0.7, pad_token_id=tokenizer.eos_token_id
            )
        return tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    with model.disable_adapter():
        continued = {"base": goes_on()}
    continued["generated"] = goes_on()
    say(f"A held-out play, continued by both models with one seed:\n{opening}\n")
    width = max(len(line) for line in ["base", *continued["base"].splitlines()]) + 3
    for left, right in _beside(
        ["base", "----", *continued["base"].splitlines()], ["generated", "---------", *continued["generated"].splitlines()]
    ):
        say(f"{left:{width}}{right}")
    more = {"opening": opening, "continued": continued}
    if full:
        say(f"\nNow on held-out text of all {len(tasks)} tasks, with controls (this takes about two minutes):")
        return evaluate_generator(generator, tokenizer, list(tasks.values()), own, batch_size=4), more

    say(f"\nPerplexity on the first {CHARACTERS} characters of held-out text:\n\n{'task':14}{'base':>9}{'own':>9}{'generated':>11}   from")
    start, scores, layout = time.perf_counter(), {}, generator.layout
    for name in TEXTS:
        texts = [tasks[name].test_texts[0][:CHARACTERS]]
        score = lambda texts=texts: nll(model, tokenizer, texts, batch_size=4, progress=False)[0]  # noqa: E731
        with model.disable_adapter():
            row = {"base": score()}
        attach(model, layout, layout.unflatten(own[name].to(layout.torch_dtype)))
        row["own"] = score()
        generator.generate_adapter(tasks[name].descriptions[0], model, generator=torch.Generator().manual_seed(SEED))
        row["generated"] = score()
        scores[name] = row
        base, trained, made = (row[column].perplexity for column in ("base", "own", "generated"))
        say(f"{name:14}{base:9.2f}{trained:9.2f}{made:11.2f}   {tasks[name].descriptions[0]!r}")
    return Evaluation(scores, [SEED], time.perf_counter() - start), more


def _beside(left: list[str], right: list[str]) -> list[tuple[str, str]]:
    longest = max(len(left), len(right))
    return list(zip(left + [""] * (longest - len(left)), right + [""] * (longest - len(right)), strict=True))


def _show_detection(
    generator: ICMGenerator,
    model: PeftModel,
    processor: Any,
    tasks: dict[str, Any],
    own: dict[str, torch.Tensor],
    folder: Path,
    full: bool,
    say: Say,
) -> tuple[Any, dict[str, Any]]:
    """Boxes drawn side by side, then AP50."""
    from ..evaluation.detection import DetectionEvaluation, class_precision, evaluate_detection
    from ..tasks.detection import detect

    picture = folder.resolve() / "detections.png"
    shown = _draw(generator, model, processor, tasks["sofa"], own["sofa"], picture)
    more = {"picture": str(picture), "shown": shown}
    precisions = ", ".join(f"{name} {found['map_50']:.2f}" for name, found in shown.items())
    say(f"AP50 on the {SHOWN} pictures drawn in {picture}: {precisions}")
    if full:
        count = len(tasks["sofa"].test_images)
        say(f"\nNow the paper's five classes, on {count} pictures in styles never trained on (this takes about a minute):")
        some = [tasks[name] for name in tasks if name in TABLE_1]
        return evaluate_detection(generator, processor, some, own, variants=("generated",)), more

    say(f"\nAP50 on {2 * PICTURES} held-out pictures:\n\n{'class':14}{'base':>9}{'own':>9}{'generated':>11}   from")
    start, scores, layout = time.perf_counter(), {}, generator.layout
    for name in CLASSES:
        task = tasks[name]
        images = [image for image in task.test_images if task.label in image.labels][:PICTURES]
        images += [image for image in task.test_images if task.label not in image.labels][:PICTURES]
        score = lambda task=task, images=images: class_precision(  # noqa: E731
            detect(model, processor, images, prompt=task.prompt, progress=False), images, task.label
        )
        with model.disable_adapter():
            row = {"base": score()}
        attach(model, layout, layout.unflatten(own[name].to(layout.torch_dtype)))
        row["own"] = score()
        generator.generate_adapter(task.descriptions[0], model, generator=torch.Generator().manual_seed(SEED))
        row["generated"] = score()
        scores[name] = row
        base, trained, made = (row[column]["map_50"] for column in ("base", "own", "generated"))
        say(f"{name:14}{base:9.2f}{trained:9.2f}{made:11.2f}   {task.descriptions[0]!r}")
    return DetectionEvaluation(scores, [SEED], time.perf_counter() - start), more


def _draw(
    generator: ICMGenerator, model: PeftModel, processor: Any, task: Any, own: torch.Tensor, picture: Path
) -> dict[str, dict[str, Any]]:
    """Draw a few pictures with the class under base, own LoRA and the generated adapter; returns boxes and AP50 of each."""
    from ..evaluation.detection import class_precision
    from ..evaluation.figures import plot_detections
    from ..tasks.detection import detect

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
    return shown
