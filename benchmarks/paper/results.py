"""A table of results: values of several seeds in its cells, as JSON and as Markdown."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Cell = Sequence[float] | str


@dataclass
class Table:
    """Rows by columns; every cell holds the values of all seeds, or a word.

    Args:
        name (`str`): Such as `"table1"`; also the name of its files.
        title (`str`): One line.
        columns (`list[str]`): Their names.
        rows (`dict[str, dict[str, Cell]]`): Cells by row and column; an absent one is empty.
        paper (`dict[str, dict[str, float]]`, *optional*): What the paper gives for the same cell.
        notes (`list[str]`, *optional*): Below the table.
        digits (`int`, defaults to 2): Behind the point, in Markdown.

    Example:

    ```python
    >>> table = Table("table1", "AP50", ["dog"], {"LoRA": {"dog": [0.5, 0.7]}}, {"LoRA": {"dog": 0.96}})
    >>> print(table.markdown())
    | | dog |
    |---|---|
    | LoRA | 0.60 ± 0.14 [0.96] |

    ```
    """

    name: str
    title: str
    columns: list[str]
    rows: dict[str, dict[str, Cell]]
    paper: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    digits: int = 2

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: mean, spread (standard deviation of the sample) and values of each cell."""
        cells = {row: {column: self._cell(row, column) for column in cells} for row, cells in self.rows.items()}
        return {"title": self.title, "columns": self.columns, "rows": cells, "notes": self.notes, "digits": self.digits}

    def _cell(self, row: str, column: str) -> dict[str, Any] | str:
        cell = self.rows[row][column]
        if isinstance(cell, str):
            return cell
        values = [round(float(value), 6) for value in cell]
        found: dict[str, Any] = {"mean": round(statistics.fmean(values), 6), "values": values}
        if len(values) > 1:
            found["std"] = round(statistics.stdev(values), 6)
        if column in self.paper.get(row, {}):
            found["paper"] = self.paper[row][column]
        return found

    def markdown(self) -> str:
        """The table in Markdown: mean ± spread, the paper's figure in brackets."""
        return markdown(self.to_dict())


def markdown(table: Mapping[str, Any]) -> str:
    """Markdown of what [`Table.to_dict`] wrote.

    Args:
        table (`Mapping`): `columns`, `rows` and `digits`.

    Returns:
        `str`: Without title and notes.
    """
    digits = table["digits"]

    def cell(value: Any) -> str:
        if value is None or isinstance(value, str):
            return value or ""
        number = (lambda x: f"{round(x):,}") if digits == 0 else (lambda x: f"{x:.{digits}f}")
        spread = f" ± {number(value['std'])}" if value.get("std") else ""
        paper = f" [{value['paper']:g}]" if "paper" in value else ""
        return number(value["mean"]) + spread + paper

    lines = ["| | " + " | ".join(table["columns"]) + " |", "|---" * (len(table["columns"]) + 1) + "|"]
    lines += [
        f"| {name} | " + " | ".join(cell(row.get(column)) for column in table["columns"]) + " |" for name, row in table["rows"].items()
    ]
    return "\n".join(lines)


def write_json(file: Path, document: Any) -> None:
    """Write JSON to a temporary name and rename it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.part")
    temporary.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, file)
