"""The house: data flows down the floor plan, the public names are one screen, and importing the package costs nothing."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import peft_icm

SOURCE = Path(peft_icm.__file__).parent
# From the ground up; a room imports only from floors below its own, or from itself.
FLOORS = [
    {"disk", "pictures", "figures", "bundled", "unknown", "launching"},
    {"remote"},
    {"hub"},
    {"tasks", "conditioning"},
    {"adapters", "data_import"},
    {"collecting", "generator"},
    {"training"},
    {"baselines"},
    {"evaluation"},
    {"demo", "app", "metrics", "cli_options"},
    {"cli_verbs"},
    {"cli_tasks", "cli_data", "vllm_plugin"},
    {"cli"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def imported_rooms(file):
    """The rooms of peft_icm that a source file imports, in functions too; what only type checkers read is left out."""
    package = ["peft_icm", *file.relative_to(SOURCE).with_suffix("").parts]
    package = package[:-1]
    tree = ast.parse(file.read_text(encoding="utf-8"))
    unread = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node not in unread:
            base = package[: len(package) - node.level + 1] if node.level else []
            path = [*base, *(node.module.split(".") if node.module else [])]
            if path[:1] == ["peft_icm"]:
                yield from [path[1]] if len(path) > 1 else [alias.name for alias in node.names if alias.name in FLOOR]


@pytest.mark.parametrize("file", sorted(SOURCE.rglob("*.py")), ids=lambda file: str(file.relative_to(SOURCE)))
def test_nothing_imports_upwards(file):
    room = file.relative_to(SOURCE).with_suffix("").parts[0]
    if room == "__init__":
        return  # its imports are for type checkers, and by name
    for other in imported_rooms(file):
        assert other == room or FLOOR[other] < FLOOR[room], f"{room} imports {other}"


def test_every_public_name_is_there():
    for name in peft_icm.__all__:
        assert getattr(peft_icm, name) is not None
    assert set(peft_icm.__all__) <= set(dir(peft_icm))
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = peft_icm.nonsense


def in_a_fresh_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_importing_the_package_imports_nothing_heavy():
    heavy = ["torch", "transformers", "peft", "open_clip", "datasets", "diffusers", "matplotlib"]
    assert in_a_fresh_python(f"import sys, peft_icm, peft_icm.cli; print([m for m in {heavy} if m in sys.modules])") == "[]"


@pytest.mark.parametrize(
    "code",
    [
        "import transformers, peft_icm; print(transformers.AutoConfig.for_model('icm').model_type)",
        "import peft_icm, transformers; peft_icm.ICMConfig; print(transformers.AutoConfig.for_model('icm').model_type)",
    ],
)
def test_the_auto_classes_know_the_model_type(code):
    assert in_a_fresh_python(code) == "icm"


def blocks(page, language):
    parts = (Path(__file__).parents[1] / "docs" / page).read_text(encoding="utf-8").split(f"```{language}\n")[1:]
    return [part.split("\n```")[0] for part in parts]


def test_the_examples_of_the_data_page_load(tmp_path):
    from PIL import Image

    from peft_icm.tasks import load_tasks

    text, detection, coco = blocks("data.md", "json")
    for split in ("train", "test"):
        (tmp_path / f"sonnets.{split}.txt").write_text("Shall I compare thee\n\0\nto a summer's day?")
        (tmp_path / split).mkdir()
        Image.new("RGB", (640, 480)).save(tmp_path / split / "room.jpg")
        (tmp_path / f"{split}.json").write_text(coco)
    (tmp_path / "tasks.json").write_text(text)
    (sonnets,) = load_tasks(tmp_path)
    assert len(sonnets.train_texts) == 2 and sonnets.unseen_descriptions == ["fourteen lines of verse"]
    (tmp_path / "tasks.json").write_text(json.dumps(json.loads(detection)))
    (sofas,) = load_tasks(tmp_path)
    assert sofas.test_images[0].boxes == [[10.0, 20.0, 210.0, 170.0]]
