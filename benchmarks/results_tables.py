"""Write the tables of docs/results.md from the JSON of the runs, or check that they are what the JSON says.

    python benchmarks/results_tables.py            # rewrites docs/results.md
    python benchmarks/results_tables.py --check    # exit code 1 where it would change something; CI runs this

A table stands between `<!-- table FILE [| COLUMN ...] -->` and `<!-- end -->`; without columns it has all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.paper.results import markdown  # noqa: E402

PACKAGES = ("torch", "transformers", "peft", "diffusers")
BLOCK = re.compile(r"(<!-- table ([^|>]+?)((?: \| [^|>]+?)*) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(text: str, root: Path) -> str:
    """The text with every table written anew."""

    def table(match: re.Match[str]) -> str:
        document = json.loads((root / match[2]).read_text(encoding="utf-8"))
        columns = [name.strip() for name in match[3].split("|")[1:]] or document["columns"]
        if unknown := [name for name in columns if name not in document["columns"]]:
            raise ValueError(f"{match[2]} has no column {unknown[0]!r}: choose from {', '.join(document['columns'])}.")
        run = document["run"]
        versions = [f"{name} {run['versions'][name]}" for name in PACKAGES if name in run["versions"]]
        seeds = [f"seeds {run['seeds']}"] if "seeds" in run else []
        source = f"`{match[2]}`: " + ", ".join([f"`{run['command']}`", *seeds, run["date"], run["machine"], *versions]) + "."
        return f"{match[1]}{markdown({**document, 'columns': columns})}\n\n{source}\n{match[4]}"

    return BLOCK.sub(table, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing")
    args = parser.parse_args()
    page = ROOT / "docs" / "results.md"
    text = page.read_text(encoding="utf-8")
    filled = fill(text, ROOT)
    if args.check:
        if filled != text:
            sys.exit("docs/results.md: a table is not what the JSON says; run python benchmarks/results_tables.py.")
        print(f"docs/results.md: {len(BLOCK.findall(text))} tables are what the JSON says.")
        return
    temporary = page.with_name(".results.md.part")
    temporary.write_text(filled, encoding="utf-8")
    os.replace(temporary, page)


if __name__ == "__main__":
    main()
