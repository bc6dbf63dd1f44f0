"""The demo: one sentence becomes an adapter, then all bundled tasks are scored on held-out text."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from .adapters import save_adapter
from .bundled import bundled_folder
from .collection import AdapterCollection
from .evaluation import evaluate_generator
from .modeling_icm import ICMGenerator
from .tasks.language_modeling import load_tasks

SENTENCE = "continue a Shakespeare play"
SEED = 0


def run_demo(output: str | Path, *, quiet: bool = False) -> dict[str, Any]:
    """Generate an adapter from a sentence, save it, and score every bundled task.

    Args:
        output (`str` or `Path`): Folder for `adapter/`, `demo.json` and `demo.png`.
        quiet (`bool`, defaults to `False`): Print nothing; progress bars stay.

    Returns:
        `dict`: [`Evaluation.to_dict`], and under `adapter` the folder written.
    """
    say = (lambda *_: None) if quiet else print
    bundle, folder = bundled_folder("text"), Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    say(f'ICMGenerator.from_pretrained(bundled_generator("text")).generate_adapter({SENTENCE!r})')
    generator = ICMGenerator.from_pretrained(bundle / "generator")
    model = generator.generate_adapter(SENTENCE, generator=torch.Generator().manual_seed(SEED))
    adapter = save_adapter(model, folder / "adapter").resolve()
    say(f"-> {type(model).__name__}, {generator.layout.numel:,} numbers; an ordinary PEFT folder: {adapter}\n")
    say(f"Now on held-out text of all {len(generator.config.tasks or [])} tasks (this takes about two minutes):")
    own = AdapterCollection.from_pretrained(bundle / "own")
    tokenizer = AutoTokenizer.from_pretrained(model.get_base_model().name_or_path)
    tasks = load_tasks(bundle / "tasks")
    evaluation = evaluate_generator(generator, tokenizer, tasks, {task: own.final(task) for task in own.tasks}, batch_size=4)
    result = {**evaluation.to_dict(), "adapter": str(adapter)}
    evaluation.plot(folder / "demo.png")
    temporary = folder / "demo.json.part"
    temporary.write_text(json.dumps(result, indent=1))
    os.replace(temporary, folder / "demo.json")
    say(evaluation.table())
    say(f"\nown: the LoRA that was trained for the task. Seeds {evaluation.seeds}; {evaluation.seconds:.0f} s.")
    say(f"Also in {folder}/demo.json and demo.png.")
    say(f'Load the adapter without peft_icm: PeftModel.from_pretrained(base, "{adapter}")')
    return result
