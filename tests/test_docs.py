"""The code in README.md and docs/ runs as it stands; what it names on the Hub and in the folder is put there first."""

from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from PIL import Image, ImageDraw
from test_collection import save_lora
from test_conditioning import sentence

ROOT = Path(__file__).parents[1]
PAGES = [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if "```python" in page.read_text(encoding="utf-8")]

# What a page's code writes, and what it pushes; a page with code that is not told of here fails.
LEAVES = {
    "README.md": ["shakespeare-lora/adapter_model.safetensors", "my-generator/model.safetensors"],
    "index.md": ["shakespeare-lora/adapter_model.safetensors"],
    "app.md": [],
    "scale.md": ["small/model.safetensors"],
    "serving.md": ["bible-gguf/adapter_model.gguf"],
}
PUSHES = {
    "README.md": {("models", "me/my-generator")},
    "index.md": set(),
    "app.md": {("spaces", "me/demo")},
    "scale.md": set(),
    "serving.md": set(),
}


@pytest.mark.slow
@pytest.mark.parametrize("hub", ["lfs"], indirect=True)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_of_the_documentation_runs(page, hub, token, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", token)
    sentence(tmp_path / "minilm")
    save_lora(tmp_path / "lora-cats")
    save_lora(tmp_path / "my-loras" / "dogs", 1)
    for repo, folder in (("sentence-transformers/all-MiniLM-L6-v2", "minilm"), ("org/lora-cats", "lora-cats")):
        HfApi(token=token).create_repo(repo)
        HfApi(token=token).upload_folder(repo_id=repo, folder_path=tmp_path / folder)
    put = set(hub.repos)
    for name in ("my-sofa.jpg", "room.jpg", "rocket1.jpg", "rocket2.jpg"):
        picture = Image.new("RGB", (128, 128), "white")
        ImageDraw.Draw(picture).rectangle((30, 50, 90, 100), "brown")
        picture.save(tmp_path / name)
    torch._dynamo.reset()
    names = {"__name__": "__main__"}
    for part in page.read_text(encoding="utf-8").split("```python\n")[1:]:
        exec(compile(part.split("\n```")[0], page.name, "exec"), names)
    for file in LEAVES[page.name]:
        assert (tmp_path / file).is_file()
    assert set(hub.repos) - put == PUSHES[page.name]
