"""Which task a bundled generator reads in each unseen phrasing, and how much of its task in each description.

    python benchmarks/read.py --output benchmarks/read.json
    python benchmarks/read.py --bundle detection --output benchmarks/read_detection.json

An adapter is generated (seed 0) and projected on the own LoRA of every task, both relative to the mean of all own LoRAs: 1 is that LoRA,
0 nothing of it. A phrasing is misread where another task has the largest projection.
"""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path

import peft
import torch
import transformers

from peft_icm import AdapterCollection, ICMGenerator
from peft_icm.bundled import bundled_folder
from peft_icm.tasks import load_tasks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", choices=("text", "detection"), default="text")
    parser.add_argument("--output", type=Path, default=Path("read.json"))
    args = parser.parse_args()
    bundle = bundled_folder(args.bundle)
    generator = ICMGenerator.from_pretrained(bundle / "generator")
    collection = AdapterCollection.from_pretrained(bundle / "own")
    own = torch.stack([collection.final(task).float() for task in collection.tasks])
    center = own.mean(0)

    def shares_of(text: str) -> torch.Tensor:
        sample = generator.sample(generator.task_vector(text), generator=torch.Generator().manual_seed(0))[0]
        return (own - center) @ (sample - center) / (own - center).square().sum(1)

    rows, described = [], {}
    for task in load_tasks(bundle / "tasks"):
        described[task.name] = round(float(shares_of(task.descriptions[0])[collection.tasks.index(task.name)]), 2)
        for text in task.unseen_descriptions:
            shares = shares_of(text)
            read = collection.tasks[int(shares.argmax())]
            projection = {name: round(float(shares[collection.tasks.index(name)]), 2) for name in dict.fromkeys([task.name, read])}
            rows.append({"text": text, "task": task.name, "read_as": read, "projection": projection})
    misread = [row for row in rows if row["task"] != row["read_as"]]
    result = {
        "command": f"python benchmarks/read.py --bundle {args.bundle}",
        "date": datetime.date.today().isoformat(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__},
        "seed": 0,
        "phrasings": len(rows),
        "misread": len(misread),
        "described": described,
        "rows": rows,
    }
    args.output.write_text(json.dumps(result, indent=1, ensure_ascii=False), encoding="utf-8")
    for row in misread:
        print(f"{row['task']} is read as {row['read_as']}: {row['text']}")
    print("projection of each description's adapter on the task's own LoRA:", described)
    print(f"{len(misread)} of {len(rows)} misread")


if __name__ == "__main__":
    main()
