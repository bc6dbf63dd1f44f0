"""How time and memory grow with P, the numbers of an adapter, and with the tasks of a collection: curves, not points.

    python -m benchmarks.scale                     # P to 10^8 and 1,000 tasks, each stage in 6 GiB
    python -m benchmarks.scale --quick -o FOLDER   # two small sizes of each
    python -m benchmarks.scale --only fit step     # these stages anew, the others as they stand in the results

Random snapshots in bf16 of real layouts, made from configurations on the meta device. Each stage runs in a process of its own on one
thread. Its time is the least of several turns, each in fresh memory, its peak that of the resident set, files that are mapped among it,
beyond what the process had at first:

- gather: the work folder of `collect` becomes a collection, and is saved, to the disk itself
- fit: the collection is opened, statistics and subspace are estimated, in 8 bits
- step: one step of training, at the default batch of 36 snapshots
- load: `from_pretrained` of a generator in bf16, its hash checked
- decode: `generate_state_dict`
- attach: `generate_adapter`, on a base every weight of which is one zero
- save: `save_adapter`, to the disk itself

The slope of a curve is that of a line through its three largest sizes, both axes logarithmic; above 1.1 it is a defect. What takes more
than 6 GiB or 10 minutes is left out, and said. Files come from the system's cache; the limit beside the curves is what the disk takes to
give a collection or a generator the first time. Writes scale.json, scale.md and scale.png.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

from benchmarks.generate import facts
from benchmarks.paper.results import write_json

from .report import bytes_per_task, defects, draw, markdown, on_a_gpu, slopes
from .stages import GIB, MEMORY, STAGES, Case, apart

QV = ("q_proj", "v_proj")
LINEAR = (*QV, "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LAYOUTS = [  # base, target modules, r: P from 10^4 to 10^8
    ("the bundled text base", QV, 2),
    ("SmolLM2-135M", QV, 2),
    ("Llama-3-8B", QV, 2),
    ("Llama-3-8B", LINEAR, 4),
    ("Llama-3-8B", LINEAR, 16),
    ("Llama-3-8B", LINEAR, 40),
]
TASKS = [10, 30, 100, 300, 1000]
SNAPSHOTS = {"P": 2, "tasks": 5}  # of each task
FEWEST, WIDTH = TASKS[0], LAYOUTS[1]  # tasks of the curves against P, layout of those against tasks
NEEDS = {"fit": "gather", "step": "gather", "load": "make", "decode": "make", "attach": "make", "save": "make"}


def curve(cases: list[Case], along: str, bar: Any, stages: Iterable[str] = STAGES) -> list[dict[str, Any]]:
    """Stages of all sizes, smallest first; one that did not fit is not tried again with more."""
    points: list[dict[str, Any]] = []
    ended: dict[str, str] = {}
    for case in cases:
        point = {"size": case.layout.numel if along == "P" else case.tasks, "case": str(case), "stages": {}}
        point |= {"collection_bytes": case.collection_bytes, "generator_bytes": case.generator_bytes}
        case.folder.mkdir(parents=True)
        for stage in stages:
            bar.set_postfix_str(f"{stage}: {case}")
            bytes_wanted = {"gather": 3 * case.collection_bytes, "make": 2 * case.generator_bytes}.get(stage, 2 * case.layout.num_bytes)
            free = shutil.disk_usage(case.folder).free
            if stage in ended:
                found = {"left_out": f"as before, {ended[stage]}"}
            elif stage in NEEDS and "left_out" in point["stages"][NEEDS[stage]]:
                found = {"left_out": f"{NEEDS[stage]} was left out"}
            elif free < bytes_wanted:
                found = {"left_out": f"needs {bytes_wanted / GIB:.1f} GiB of disk, {free / GIB:.1f} are free"}
            else:
                found = apart(stage, case)
                if "left_out" in found:
                    ended[stage] = found["left_out"]
            point["stages"][stage] = found
            bar.update()
        shutil.rmtree(case.folder)
        points.append(point)
    return points


def read_speed(file: Path, size: int) -> float:
    """Bytes a second of a new file of this size, as the disk and not the system's cache gives it."""
    buffer = bytearray(os.urandom(2**24))
    with open(file, "wb", buffering=0) as new:
        for _ in range(size // len(buffer)):
            new.write(buffer)
        os.fsync(new.fileno())
        os.posix_fadvise(new.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with open(file, "rb", buffering=0) as old:
        start = time.perf_counter()
        while old.readinto(buffer):
            pass
        spent = time.perf_counter() - start
    file.unlink()
    return size / spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    parser.add_argument("--quick", action="store_true", help="two small sizes of each")
    parser.add_argument("--only", nargs="+", choices=list(STAGES), default=list(STAGES), help="measure these stages alone")
    args = parser.parse_args()
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    layouts, tasks = (LAYOUTS[:2], TASKS[:2]) if args.quick else (LAYOUTS, TASKS)
    with tempfile.TemporaryDirectory() as work:
        root = Path(work)
        cases = {
            "P": [Case(*layout, FEWEST, SNAPSHOTS["P"], root / f"P{index}") for index, layout in enumerate(layouts)],
            "tasks": [Case(*(LAYOUTS[0] if args.quick else WIDTH), count, SNAPSHOTS["tasks"], root / f"T{count}") for count in tasks],
        }
        wanted = {*args.only, *(NEEDS[stage] for stage in args.only if stage in NEEDS)}
        stages = [stage for stage in STAGES if stage in wanted]
        with tqdm(total=len(stages) * (len(layouts) + len(tasks))) as bar:
            curves = {along: curve(those, along, bar, stages) for along, those in cases.items()}
        if len(args.only) < len(STAGES):
            return write(again(json.loads((args.output / "scale.json").read_text()), args.only, curves), args.output)
        speed = read_speed(root / "read", 2**26 if args.quick else GIB)
        small = cases["P"][0]
        small.folder.mkdir(exist_ok=True)
        sizes = [case.layout.numel for case in cases["P"] if case.base == "Llama-3-8B"]
        result = facts("python -m benchmarks.scale" + " --quick" * args.quick)
        result |= {"memory_limit": MEMORY, "read_bytes_per_second": speed, "width": cases["tasks"][0].layout.numel, "curves": curves}
        result |= {"bytes_per_task": bytes_per_task(small, sizes), "hours": on_a_gpu()}
    write(result, args.output)


def again(result: dict[str, Any], stages: list[str], curves: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """An older result with some stages of a new one."""
    for along, points in curves.items():
        for old, new in zip(result["curves"][along], points, strict=True):
            old["stages"] |= {stage: new["stages"][stage] for stage in stages}
    now = facts(f"python -m benchmarks.scale --only {' '.join(stages)}")
    return {**result, "again": {**result.get("again", {}), **dict.fromkeys(stages, now)}}


def write(result: dict[str, Any], folder: Path) -> None:
    """The result with its slopes, as JSON, in words and as a picture."""
    result["slopes"] = {along: slopes(points) for along, points in result["curves"].items()}
    result["defects"] = defects(result["slopes"])
    text = markdown(result)
    print(text)
    write_json(folder / "scale.json", result)
    (folder / "scale.md").write_text(text + "\n", encoding="utf-8")
    draw(result, folder / "scale.png")


if __name__ == "__main__":
    main()
