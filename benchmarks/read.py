"""Which task the bundled generator reads in each unseen phrasing.

    python benchmarks/read.py --output benchmarks/read.json

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
from peft_icm.tasks.language_modeling import load_tasks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("read.json"))
    args = parser.parse_args()
    bundle = bundled_folder("text")
    generator = ICMGenerator.from_pretrained(bundle / "generator")
    collection = AdapterCollection.from_pretrained(bundle / "own")
    own = torch.stack([collection.final(task).float() for task in collection.tasks])
    center = own.mean(0)
    rows = []
    for task in load_tasks(bundle / "tasks"):
        for text in task.unseen_descriptions:
            sample = generator.sample(generator.task_vector(text), generator=torch.Generator().manual_seed(0))[0]
            shares = (own - center) @ (sample - center) / (own - center).square().sum(1)
            read = collection.tasks[int(shares.argmax())]
            projection = {name: round(float(shares[collection.tasks.index(name)]), 2) for name in dict.fromkeys([task.name, read])}
            rows.append({"text": text, "task": task.name, "read_as": read, "projection": projection})
    misread = [row for row in rows if row["task"] != row["read_as"]]
    result = {
        "command": "python benchmarks/read.py",
        "date": datetime.date.today().isoformat(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__},
        "seed": 0,
        "phrasings": len(rows),
        "misread": len(misread),
        "rows": rows,
    }
    args.output.write_text(json.dumps(result, indent=1, ensure_ascii=False), encoding="utf-8")
    for row in misread:
        print(f"{row['task']} is read as {row['read_as']}: {row['text']}")
    print(f"{len(misread)} of {len(rows)} misread")


if __name__ == "__main__":
    main()
