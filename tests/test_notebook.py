"""The notebook runs as it stands, offline."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "examples" / "peft_icm.ipynb"


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # what is shown is what runs here
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(part["text"] for cell in notebook.cells for part in cell.get("outputs", ()) if part.output_type == "stream")
    adapted, base = (next(line for line in printed.splitlines() if line.startswith(name)) for name in ("adapted:", "base:"))
    assert adapted.removeprefix("adapted:").strip() != base.removeprefix("base:").strip()
    assert "'verses from the Bible': bible" in printed and "known: False" in printed
    assert "found at [[" in printed and "adapter_model.safetensors" in printed
