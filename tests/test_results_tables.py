"""The tables of docs/results.md are written from the JSON of the runs, and CI sees where they are not."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("results_tables", ROOT / "benchmarks" / "results_tables.py")
results_tables = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(results_tables)


@pytest.fixture
def root(tmp_path):
    versions = dict.fromkeys(("torch", "transformers", "peft", "diffusers"), "1.0")
    run = {"command": "peft-icm reproduce", "seeds": [0], "date": "2026-11-24", "machine": "m", "versions": versions, "seconds": 700}
    rows = {"ICM-LoRA": {"dog": {"mean": 0.7, "values": [0.7]}, "cat": {"mean": 0.5, "values": [0.5]}}}
    (tmp_path / "table1.json").write_text(json.dumps({"columns": ["dog", "cat"], "rows": rows, "digits": 2, "run": run}))
    return tmp_path


def test_a_stale_table_is_written_anew_and_then_stays(root):
    text = "before\n<!-- table table1.json | cat -->\n| old |\n<!-- end -->\nafter\n"
    filled = results_tables.fill(text, root)
    assert "| | cat |\n|---|---|\n| ICM-LoRA | 0.50 |" in filled and "old" not in filled
    assert filled.startswith("before\n") and filled.endswith("<!-- end -->\nafter\n")
    assert results_tables.fill(filled, root) == filled


def test_the_source_of_a_table_says_what_the_run_had(root):
    block = "<!-- table table1.json -->\n<!-- end -->"
    assert "`table1.json`: `peft-icm reproduce`, seeds [0], 2026-11-24, m, torch 1.0, transformers 1.0, peft 1.0, diffusers 1.0.\n" in (
        results_tables.fill(block, root)
    )
    document = json.loads((root / "table1.json").read_text())
    del document["run"]["seeds"], document["run"]["versions"]["diffusers"]
    (root / "table1.json").write_text(json.dumps(document))
    assert "`table1.json`: `peft-icm reproduce`, 2026-11-24, m, torch 1.0, transformers 1.0, peft 1.0.\n" in results_tables.fill(
        block, root
    )


def test_a_column_that_is_not_there(root):
    with pytest.raises(ValueError, match="table1.json has no column 'cow': choose from dog, cat"):
        results_tables.fill("<!-- table table1.json | cow -->\n<!-- end -->", root)


def test_the_page_itself():
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert results_tables.fill(text, ROOT) == text
