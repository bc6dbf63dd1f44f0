"""mkdocs: an API page for each room of the package, and Hugging Face's way of writing types and names read as it is meant."""

import ast
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

SOURCE = Path(__file__).parents[1] / "src"
TYPES = re.compile(r"<code>([^<\n]*`[^<\n]*)</code>")  # (`str`, *optional*)
NAME = re.compile(r"\[<code>~?(\w+)([\w.]*)</code>\]")  # [`~ICMGenerator.sample`]
HOMES: dict[str, str] = {}  # of every public class and function, its module


def on_files(files: Files, config: Any, **_: Any) -> None:
    """Every module of every room; a page that mkdocs.yml's nav lacks fails the strict build."""
    for room in sorted(SOURCE.glob("peft_icm/*/__init__.py")):
        page = f"# {room.parent.name.capitalize()}\n"
        for file in [room, *sorted({*room.parent.glob("*.py"), *room.parent.glob("*/__init__.py")} - {room})]:
            module = ".".join(file.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")
            nodes = ast.parse(file.read_text(encoding="utf-8")).body
            names = [node.name for node in nodes if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_")]
            HOMES.update(dict.fromkeys(names, module))
            page += f"\n::: {module}\n    options:\n      members: {names}\n"
        files.append(File.generated(config, f"api/{room.parent.name}.md", content=page))


def on_page_content(html: str, **_: Any) -> str:
    """Types lose their backticks, and names in brackets become links where this package has them."""
    html = TYPES.sub(lambda match: re.sub(r"`([^`]+)`", r"<code>\1</code>", match[1]), html)
    return NAME.sub(lambda match: _link(match[1], match[2]), html)


def _link(name: str, rest: str) -> str:
    return f'<autoref identifier="{HOMES.get(name, "")}.{name}{rest}" optional><code>{name}{rest}</code></autoref>'
