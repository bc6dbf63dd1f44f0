"""What is made of the curves: slopes, defects, tables, a picture."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.paper.dry_run import LLAMA, DryRunSettings, dry_run
from peft_icm import ICMGenerator
from peft_icm.baselines.compression import quantize
from peft_icm.figures import save_figure

from .stages import GIB, STAGES, Case

SHOWN = [name for name in STAGES if name != "make"]
DEFECT = 1.1
SHARED = (10, 100, 1000)  # tasks whose bytes are told
COMPONENTS = 9  # of a default generator with P of 10^5 and more
LORA_BYTES = {"fp32": 4, "bf16": 2, "int8": 1 + 2 / 64, "int4": 0.5 + 2 / 64}  # a number, with a scale in fp16 for each 64


def slope(sizes: list[float], values: list[float]) -> float | None:
    """Of a line through the last three points, both axes logarithmic; None where there are fewer."""
    if len(sizes) < 3:
        return None
    x, y = (torch.tensor(part[-3:], dtype=torch.float64).log() for part in (sizes, values))
    return round(float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()), 2) + 0.0


def lines(points: list[dict[str, Any]], stage: str, field: str) -> tuple[list[float], list[float]]:
    """Sizes and values of a stage, where it was measured."""
    found = [(point["size"], point["stages"][stage][field]) for point in points if field in point["stages"][stage]]
    return [size for size, _ in found], [value for _, value in found]


def slopes(points: list[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    return {stage: {field: slope(*lines(points, stage, field)) for field in ("seconds", "peak")} for stage in SHOWN}


def defects(found: dict[str, Any]) -> list[str]:
    """Every stage that grows faster than its data."""
    what = {"seconds": "time", "peak": "memory"}
    return [
        f"{stage}: {what[field]} grows with {along} to the power {value}"
        for along, stages in found.items()
        for stage, fields in stages.items()
        for field, value in fields.items()
        if value is not None and value > DEFECT
    ]


def file_bytes(case: Case) -> dict[str, Any]:
    """Bytes of what is written for a layout: a LoRA in each precision, and generators of 9 components for so many tasks."""
    vector, written = torch.randn(case.layout.numel), {}
    adapters = {"fp32": case.layout.unflatten(vector), "bf16": case.layout.unflatten(vector)}
    adapters["fp32"] = {key: tensor.float() for key, tensor in adapters["fp32"].items()}
    for method in ("int8", "int4"):
        adapters[method] = dict(zip(("codes", "scales"), quantize(vector[None], method), strict=True))
    for name, tensors in adapters.items():
        save_file(tensors, case.folder / f"{name}.safetensors")
        written[name] = (case.folder / f"{name}.safetensors").stat().st_size
    written["generators"] = {}
    for tasks in SHARED:
        config = dataclasses.replace(case, tasks=tasks).config
        config.num_components = COMPONENTS
        ICMGenerator(config).to(torch.bfloat16).save_pretrained(case.folder / "generator")
        written["generators"][str(tasks)] = sum(file.stat().st_size for file in (case.folder / "generator").iterdir())
    return written


def bytes_per_task(small: Case, sizes: list[int]) -> list[dict[str, Any]]:
    """From the files of a small layout, and by formula for larger ones: what is beside the numbers of A and B stays as it is. A generator
    in bf16 has them ten times, in 9 components and the centre.
    """
    written, numel = file_bytes(small), small.layout.numel
    rows = []
    for size, tasks in itertools.product([numel, *sizes], SHARED):
        more = size - numel
        generator = written["generators"][str(tasks)] + (COMPONENTS + 1) * 2 * more
        row = {"P": size, "tasks": tasks, "generator": generator / tasks}
        row |= {name: written[name] + more * each for name, each in LORA_BYTES.items()}
        rows.append({**row, "from": "files" if size == numel else "formula"})
    return rows


def on_a_gpu() -> dict[str, Any]:
    """Hours of Table 2, five tasks of Llama-3-8B, on one A800: what the paper says, and the dry run's estimate."""
    found = dry_run(DryRunSettings(ranks=(2,), conv_layers=(12,)))
    hours = {part["architecture"]: part["hours"] for part in found["generators"] if part["base"] == LLAMA}
    return {
        "what the paper says of each of its experiments": 3.0,
        "five LoRAs": next(part["hours"] for part in found["loras"] if part["base"] == LLAMA),
        "the paper's generator": hours["paper"],
        "the default generator": hours["principal"],
    }


def shown(steep: float | None) -> str:
    return "-" if steep is None else f"{steep:.2f}"


def cell(found: dict[str, Any]) -> str:
    return f"{found['seconds']:.3g} s, {found['peak'] / 2**20:,.0f} MiB" if "seconds" in found else "-"


def markdown(result: dict[str, Any]) -> str:
    """The result in words and tables."""
    parts = []
    for along, points in result["curves"].items():
        parts += [f"| {along} | " + " | ".join(SHOWN) + " |", "|---" * (len(SHOWN) + 1) + "|"]
        parts += [f"| {point['size']:,} | " + " | ".join(cell(point["stages"][stage]) for stage in SHOWN) + " |" for point in points]
        told = [result["slopes"][along][stage] for stage in SHOWN]
        parts += ["| slopes of time, memory | " + " | ".join(f"{shown(one['seconds'])}, {shown(one['peak'])}" for one in told) + " |"]
        left = [f"{stage} at {point['size']:,} ({why})" for stage in STAGES for point in points
                if (why := point["stages"][stage].get("left_out"))]  # fmt: skip
        largest = {stage: f"{max(sizes):,}" for stage in SHOWN if (sizes := lines(points, stage, "seconds")[0])}
        parts += ["", f"Sizes of {along}: {'; '.join(point['case'] for point in points)}.", ""]
        parts += ["Left out: " + ("; ".join(left) or "nothing") + ".", ""]
        parts += ["Largest measured: " + ", ".join(f"{stage} {size}" for stage, size in largest.items()) + ".", ""]
    parts += [f"Defects, slopes above {DEFECT}: " + ("; ".join(result["defects"]) or "none") + ".", ""]
    parts += [f"The disk gives {result['read_bytes_per_second'] / 1e6:,.0f} MB a second the first time.", ""]
    kinds = ["generator", "fp32", "bf16", "int8", "int4"]
    parts += ["| bytes a task | tasks | " + " | ".join(kinds) + " | from |", "|---" * (len(kinds) + 3) + "|"]
    for row in result["bytes_per_task"]:
        parts.append(
            f"| P = {row['P']:,} | {row['tasks']:,} | " + " | ".join(f"{row[kind]:,.0f}" for kind in kinds) + f" | {row['from']} |"
        )
    for stage, facts in result.get("again", {}).items():
        parts += [
            "",
            f"{stage} is of {facts['date']}, by `{facts['command']}`; the others are of {result['date']}, by `{result['command']}`.",
        ]
    hours = ", ".join(f"{name} {value:.2f}" for name, value in result["hours"].items())
    return "\n".join([*parts, "", f"Hours on one A800 for Table 2, Llama-3-8B, by the dry run: {hours}."])


def draw(result: dict[str, Any], file: Path) -> None:
    """Time above, memory below; against P on the left, against tasks on the right."""
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(2, 2, figsize=(12, 9), layout="constrained", sharex="col")
    for column, (along, points) in enumerate(result["curves"].items()):
        for row, (field, unit, what) in enumerate((("seconds", 1.0, "seconds"), ("peak", GIB, "GiB of memory"))):
            axes = grid[row][column]
            for stage in SHOWN:
                sizes, values = lines(points, stage, field)
                if sizes:
                    steep = result["slopes"][along][stage][field]
                    axes.plot(sizes, [value / unit for value in values], marker="o", markersize=4, label=f"{stage}  {shown(steep)}")
            for kind, style in (("collection", "--"), ("generator", ":")):
                unit, label = (result["read_bytes_per_second"], f"{kind}, read once") if row == 0 else (GIB, f"{kind}, its size")
                limit = [point[f"{kind}_bytes"] / unit for point in points]
                axes.plot([point["size"] for point in points], limit, style, color="grey", label=label)
            axes.set(xscale="log", yscale="log", ylabel=what)
            axes.grid(alpha=0.3)
            axes.legend(frameon=False, fontsize=8, title="stage, slope", loc="center left", bbox_to_anchor=(1, 0.5))
        grid[1][column].set_xlabel("P, numbers of an adapter" if along == "P" else f"tasks, at P = {result['width']:,}")
    save_figure(figure, file)
