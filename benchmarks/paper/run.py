"""`python -m benchmarks.paper`: the paper's tables and figures, baselines, ablations and the memorisation report, at one of three sizes."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import peft
import torch
import transformers

from peft_icm import __version__
from peft_icm.evaluation.memorisation import plot_memorisation

from . import tables
from .ablations import ablations
from .behaviour import memorisation
from .drawings import draw_bars, draw_ranks, figure_2, figure_4, figure_5
from .methods import DIFFUSION, ICM
from .results import Table, write_json
from .scales import SCALES, Family, Scale
from .workshop import Workshop

FORMAT = 1  # of a results folder
SCRIPT = Path(__file__).parents[2] / "examples" / "reproduction_data.py"


def parts(scale: Scale) -> list[str]:
    """Names of what a scale can produce, in the order in which it is made."""
    text, detection = scale.family("text"), scale.family("detection")
    found = [*(["table1"] if detection else []), *(["table2"] if text else []), "table3", "table4"]
    if detection:
        found += ["table5", "table6"]
    return [*found, "figure2", *(["figure4", "figure5"] if detection else []), "ablations", "memorisation"]


def needs(scale: Scale, part: str) -> list[str]:
    """Names of the families that a part is made from."""
    names = [family.name for family in scale.families]
    if part in ("table3", "table4", "memorisation"):
        return names
    if part == "table2":
        return ["text"]
    return ["detection"] if "detection" in names else names


def reproduce(
    scale: str,
    work: str | Path,
    output: str | Path,
    *,
    only: Sequence[str] | None = None,
    ranks: Sequence[int] | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Make the tables and figures of one scale; what a killed run has finished is not made again.

    Args:
        scale (`str`): `"demo"`, `"small"` or `"paper"`.
        work (`str` or `Path`): Holds the data in `data/`, and keeps LoRAs, models and scores.
        output (`str` or `Path`): Results go to a folder of the scale's name in it: JSON, Markdown and PNG.
        only (`Sequence[str]`, *optional*): Such as `["table1", "figure4"]`; by default all of [`parts`].
        ranks (`Sequence[int]`, *optional*): Of Tables 3 and 4; by default the scale's.
        quiet (`bool`, defaults to `False`): Print no tables; progress bars stay.

    Returns:
        `dict`: What the JSON files hold, by part.

    Raises:
        `ValueError`: If a part is unknown, the results folder is another version's, or data are missing.
    """
    if scale not in SCALES:
        raise ValueError(f"scale={scale!r} is unknown: choose from {', '.join(SCALES)}.")
    chosen = SCALES[scale].with_ranks(tuple(ranks)) if ranks else SCALES[scale]
    wanted = list(only or parts(chosen))
    if unknown := [name for name in wanted if name not in parts(chosen)]:
        raise ValueError(f"{unknown[0]!r} is no part of --scale {scale}: choose from {', '.join(parts(chosen))}.")
    work, folder = Path(work), Path(output) / scale
    _check_version(folder, scale)
    needed = [family for family in chosen.families if any(family.name in needs(chosen, name) for name in wanted)]
    fetch(chosen.name, needed, work / "data")
    maker = _Maker(chosen, [Workshop(family, work / "data", work / scale) for family in needed], folder)
    results: dict[str, Any] = {}
    for name in wanted:
        start = time.perf_counter()
        try:
            results[name], text = maker.make(name)
        finally:
            spent = _spent(work / scale / "seconds.json", name, time.perf_counter() - start)
        write_json(folder / f"{name}.json", {**results[name], "run": _facts(chosen, name, ranks, spent)})
        _write_text(folder / f"{name}.md", text)
        if not quiet:
            print(f"\n{text}\n({folder / name}.json, {spent:.0f} s)", flush=True)
    return results


class _Maker:
    """Makes one part: its JSON, its Markdown and its pictures."""

    def __init__(self, scale: Scale, workshops: Sequence[Workshop], folder: Path):
        self.scale, self.workshops, self.folder = scale, list(workshops), folder
        self.by_name = {workshop.family.name: workshop for workshop in workshops}
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def main(self) -> Workshop:
        """Detection, where there is one: the paper's own choice for its figures and ablations."""
        return self.by_name.get("detection") or self.workshops[0]

    def make(self, name: str) -> tuple[dict[str, Any], str]:
        """What the JSON of a part holds, and its Markdown."""
        if name.startswith("figure"):
            return self._figure(name)
        if name == "memorisation":
            return self._memorisation()
        makers: dict[str, Callable[[], Table]] = {
            "table1": lambda: tables.table_1(self.by_name["detection"], self.scale),
            "table2": lambda: tables.table_2(self.by_name["text"], self.scale),
            "table3": lambda: tables.table_3(self.workshops),
            "table4": lambda: tables.table_4(self.workshops, self.scale),
            "table5": lambda: tables.table_5(self.by_name["detection"], self.scale),
            "table6": lambda: tables.table_6(self.by_name["detection"], self.scale),
            "ablations": lambda: ablations(self.main, self.scale),
        }
        table = makers[name]()
        picture = self.folder / f"{name}.png"
        if tables.SHARE in table.columns:
            draw_bars(table, tables.SHARE, picture)
        elif name == "table4":
            draw_ranks(table, picture)
        notes = "\n".join(f"- {note}" for note in table.notes)
        return table.to_dict(), f"### {table.title}\n\n{table.markdown()}\n\n{notes}\n"

    def _figure(self, name: str) -> tuple[dict[str, Any], str]:
        titles = {
            "figure2": "Task vectors in the plane (t-SNE)",
            "figure4": "Detections by method",
            "figure5": "Detecting cats, by rank and method",
        }
        if name == "figure2":
            figure_2(self.main, self.folder)
        elif name == "figure4":
            figure_4(self.by_name["detection"], self.scale, self.folder)
        else:
            figure_5(self.by_name["detection"], self.scale, self.folder)
        return {"title": titles[name], "file": f"{name}.png"}, f"### {titles[name]}\n\n![{titles[name]}]({name}.png)\n"

    def _memorisation(self) -> tuple[dict[str, Any], str]:
        found = {workshop.family.name: memorisation(workshop, self.scale) for workshop in self.workshops}
        for family, report in found.items():
            plot_memorisation(report["weights"][ICM], self.folder / f"memorisation_{family}.png")
        return found, "\n".join(memorisation_text(family, report) for family, report in found.items())


def memorisation_text(family: str, report: dict[str, Any]) -> str:
    """The memorisation report of one family in Markdown."""
    lines = [f"### Memorisation: {family}", "", f"| mean over tasks, on dW | {ICM} | {DIFFUSION} |", "|---|---|---|"]
    means = [report["weights"][name]["mean"] for name in (ICM, DIFFUSION)]
    lines += [f"| {key.replace('_', ' ')} | " + " | ".join(_number(mean.get(key)) for mean in means) + " |" for key in means[0]]
    names = list(next(iter(report["overlap"].values())))
    lines += ["", "| wrong predictions | accuracy | overlap with the own LoRA's |", "|---|---|---|"]
    for name in names:
        rows = [row[name] for row in report["overlap"].values()]
        lines.append(
            f"| {name} | " + " | ".join(f"{sum(row[key] for row in rows) / len(rows):.3f}" for key in ("accuracy", "overlap")) + " |"
        )
    lines += ["", "| task left out | own LoRA's gain | ICM-LoRA | retrieval | retrieved |", "|---|---|---|---|---|"]
    for task, row in report["left_out"].items():
        lines.append(f"| {task} | {row['own']:.3f} | {row[ICM]:.3f} | {row['retrieval']:.3f} | {row['retrieved']} |")
    return "\n".join(lines) + "\n"


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.3f}"


def fetch(scale: str, families: Sequence[Family], data: Path) -> None:
    """Fetch the data of families with the opt-in script of the checkout, where they are not there yet.

    Args:
        scale (`str`): Those of `"paper"` cannot be fetched.
        families (`Sequence[Family]`): Name data and bases.
        data (`Path`): Where to.

    Raises:
        `ValueError`: If they are missing and can't be fetched here.
    """
    wanted = [family.name for family in families if not (data / family.name / "tasks.json").is_file()]
    folders = [family.base.removeprefix("data:") for family in families if family.base.startswith("data:")]
    wanted += [name for name in folders if not (data / name / "config.json").is_file()]
    if not wanted:
        return
    command = [sys.executable, str(SCRIPT), *wanted, "--data", str(data)]
    if scale == "paper":
        raise ValueError(f"{data / wanted[0]} has no tasks.json: put the paper's data there (COCO, Pile subsets; see the README) first.")
    if not SCRIPT.is_file():
        raise ValueError(
            f"{data} lacks {', '.join(wanted)}: run examples/reproduction_data.py of a checkout of peft_icm with --data {data}."
        )
    print(f"Fetching {', '.join(wanted)}: {shlex.join(command)}", file=sys.stderr, flush=True)
    if subprocess.run(command, stdout=sys.stderr).returncode:
        raise ValueError(f"The data could not be fetched; what is missing is said above. Run again: {shlex.join(command)}")


def _check_version(folder: Path, scale: str) -> None:
    """Refuse a results folder that another format of results lies in."""
    file = folder / "run.json"
    if file.is_file():
        found = json.loads(file.read_text(encoding="utf-8"))
        if found.get("format") != FORMAT:
            raise ValueError(
                f"{folder} holds results of format {found.get('format')} (peft_icm {found.get('peft_icm')}), this peft_icm writes {FORMAT}:"
                " choose another --output, or move it away."
            )
    write_json(file, {"format": FORMAT, "peft_icm": __version__, "scale": scale})


def _spent(file: Path, name: str, seconds: float) -> float:
    """Seconds spent on a part, over all starts: what is kept now took its time then, in this part or in one before it."""
    known = json.loads(file.read_text()) if file.is_file() else {}
    known[name] = round(known.get(name, 0.0) + seconds, 1)
    write_json(file, known)
    return known[name]


def _facts(scale: Scale, part: str, ranks: Sequence[int] | None, seconds: float) -> dict[str, Any]:
    chosen = f" --ranks {' '.join(map(str, ranks))}" if ranks else ""
    return {
        "command": f"python -m benchmarks.paper --scale {scale.name} --only {part}{chosen}",
        "seeds": list(scale.seeds[:1] if part in ("table5", "memorisation", "figure4", "figure5") else scale.seeds),
        "seconds": seconds,
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {_device()}, {torch.get_num_threads()} threads",
        "versions": {
            "peft_icm": __version__,
            "python": platform.python_version(),
            **{module.__name__: module.__version__ for module in (torch, transformers, peft, diffusers)},
        },
        "settings": json.loads(json.dumps([dataclasses.asdict(family) for family in scale.families])),
    }


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"


def _write_text(file: Path, text: str) -> None:
    temporary = file.with_name(f".{file.name}.part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, file)
