"""How the bundled generators read requests: sentences that nothing was trained on, and sentences that no task answers.

    python -m benchmarks.reading choose                 # settings are chosen on these
    python -m benchmarks.reading earlier                # those that decided on 2026-11-25 and 26, and choose settings since
    python -m benchmarks.reading once                   # these decide, and are used at the end alone
    python -m benchmarks.reading descriptions           # what caution costs on the tasks' own sentences
    python -m benchmarks.reading once --world text --generator DIR --name text_other
    python -m benchmarks.reading nouns                  # the open world: trained nouns against the 24 that choose settings, and others
    python -m benchmarks.reading nouns-once             # the same against the 40 unseen nouns and the requests of `once`
    python -m benchmarks.reading ablation --build build # text generators of every condition space, and of one sentence a task, on choose

Writes results/SET_NAME.json and .png, of the ablation the JSON alone.
`share` is of the own LoRAs' gain (nats per token, AP50) on held-out data; a request that no task
answers is scored on one task, in turn. "retrieved" is the own LoRA of the task that the same generator heard, under the same threshold.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor

from benchmarks.paper.results import write_json
from benchmarks.reading.ablation import ablation
from benchmarks.reading.nouns import load_worlds, nouns_report
from peft_icm import AdapterCollection, ICMGenerator
from peft_icm.bundled import bundled_folder
from peft_icm.evaluation import DetectionEvaluation, Evaluation
from peft_icm.evaluation.requests import RequestsReport, evaluate_requests
from peft_icm.tasks import load_tasks

HERE = Path(__file__).parent
KINDS: dict[str, type[Any]] = {"text": Evaluation, "detection": DetectionEvaluation}
BATCH = {"text": 8, "detection": 32}
PASSAGES, PICTURES = 5, 15  # of each task that an adapter is scored on; pictures with the class, and as many without


def requests_report(world: str, requests: str, folder: Path, seed: int) -> RequestsReport:
    """What the generator in a folder makes of one set of requests."""
    bundle = bundled_folder(world)
    collection = AdapterCollection.from_pretrained(bundle / "own")
    processor = AutoProcessor.from_pretrained(bundle / "generator" / "base_model")
    own = {task: collection.final(task) for task in collection.tasks}
    tasks: Any = load_tasks(bundle / "tasks")
    for task in tasks:
        if world == "text":
            task.test_texts = task.test_texts[:PASSAGES]
        else:
            shown = [image for image in task.test_images if task.label in image.labels]
            others = [image for image in task.test_images if task.label not in image.labels]
            task.test_images = shown[:PICTURES] + others[:PICTURES]
    asked = {"known": {task.name: task.descriptions for task in tasks}, "unknown": []}
    if requests != "descriptions":
        asked = load_worlds(requests)[world]
    generator = ICMGenerator.from_pretrained(folder)
    options = {"seed": seed, "batch_size": BATCH[world]}
    return evaluate_requests(KINDS[world], generator, processor, tasks, own, asked["known"], asked["unknown"], **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sets = ("choose", "earlier", "once", "descriptions", "nouns", "nouns-once", "ablation")
    parser.add_argument("set", choices=sets, help="which sentences, or the ablation")
    parser.add_argument("--world", nargs="+", choices=tuple(KINDS), default=list(KINDS), help="which bundles")
    parser.add_argument("--generator", help="a generator in the place of the bundled one")
    parser.add_argument("--name", help="of the results; by default that of the world")
    parser.add_argument("--build", type=Path, default=Path("build"), help="build area of the ablation, with collection/ and encoder/")
    parser.add_argument("--seed", type=int, default=0, help="of z; of the phrasings of nouns")
    args = parser.parse_args()
    run = {
        "command": " ".join(["python -m benchmarks.reading", *sys.argv[1:]]),
        "seeds": [args.seed],
        "date": datetime.date.today().isoformat(),
        "machine": f"{torch.get_num_threads()} threads",
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "open_clip_torch")},
    }
    if args.set.startswith("nouns"):
        file = HERE / "results" / f"{args.set.replace('-', '_')}.json"
        open_world = ICMGenerator.from_pretrained(args.generator or bundled_folder("open") / "generator")
        report = nouns_report(open_world, args.set == "nouns-once", args.seed, file.with_suffix(".png"))
        write_json(file, {"run": run, **report})
        print(f"{file}\n{json.dumps(report, indent=1)}", flush=True)
        return
    if args.set == "ablation":
        table = ablation(args.build, lambda folder: requests_report("text", "choose", folder, args.seed))
        file = HERE / "results" / "ablation_text.json"
        write_json(file, {"run": run, **table.to_dict()})
        print(f"{file}\n{table.markdown()}", flush=True)
        return
    for world in args.world:
        report = requests_report(world, args.set, Path(args.generator or bundled_folder(world) / "generator"), args.seed)
        file = HERE / "results" / f"{args.set}_{args.name or world}.json"
        write_json(file, {"run": run, **report.to_dict()})
        report.plot(file.with_suffix(".png"))
        print(f"{file}\n{report.table()}", flush=True)


if __name__ == "__main__":
    main()
