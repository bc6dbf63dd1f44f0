"""docs/serving.md: its Python runs, from top to bottom."""

import os

import pytest
import torch
from test_house import blocks


@pytest.mark.slow
def test_the_examples_of_the_serving_page_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch._dynamo.reset()
    names = {}
    for block in blocks("serving.md", "python"):
        exec(block, names)
    assert os.listdir("bible-gguf") == ["adapter_model.gguf"]
