"""A Space: the page, this package, and the generator or where it is found."""

from __future__ import annotations

import shutil
from importlib.metadata import requires
from pathlib import Path

from huggingface_hub import SpaceCard, SpaceCardData
from jinja2 import Template

from ..bundled import BUNDLES
from .cards import cards_folder

GENERATOR_FOLDER = "generator"
GRADIO = "6.31.0"  # the least that pyproject.toml wants
PYTHON = "3.12"
_PACKAGE = Path(__file__).parents[1]


def write_space(folder: Path, name: str | None, revision: str | None = None, subfolder: str = "") -> None:
    """Write what a Space runs: `app.py`, `requirements.txt`, and the source of this package, which is on no registry yet.

    Args:
        folder (`Path`): Where to.
        name (`str`, *optional*): Hub id of the generator; by default it is in `generator/` of the Space.
        revision (`str`, *optional*): Its commit.
        subfolder (`str`, defaults to `""`): Where in its repo.
    """
    template = Template((cards_folder() / "space" / "app.py.jinja").read_text(encoding="utf-8"), keep_trailing_newline=True)
    where = {"name": repr(name or GENERATOR_FOLDER), "revision": repr(revision), "subfolder": repr(subfolder)}
    (folder / "app.py").write_text(template.render(where), encoding="utf-8")
    wanted = [line for line in requires("peft-icm") or () if "extra ==" not in line]
    (folder / "requirements.txt").write_text("\n".join(wanted) + "\n", encoding="utf-8")
    own = folder / _PACKAGE.name
    for file in sorted(_PACKAGE.rglob("*.py")):
        (own / file.relative_to(_PACKAGE)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, own / file.relative_to(_PACKAGE))
    shutil.copytree(BUNDLES / "detection" / "tasks", own / "bundled" / "detection" / "tasks")  # to be looked at
    shutil.copytree(cards_folder(), own / "hub_cards")


def space_card(repo_id: str, name: str | None) -> SpaceCard:
    """The README.md of a Space, whose front matter tells the Hub how to run it.

    Args:
        repo_id (`str`): `"org/name"`.
        name (`str`, *optional*): Hub id of the generator; by default it is in the Space.

    Returns:
        `huggingface_hub.SpaceCard`

    Example:

    ```python
    >>> space_card("me/demo", "me/icm").data.sdk
    'gradio'

    ```
    """
    title = repo_id.split("/")[-1]
    data = SpaceCardData(
        title=title, sdk="gradio", sdk_version=GRADIO, python_version=PYTHON, app_file="app.py", models=[name] if name else None
    )  # fmt: skip
    return SpaceCard.from_template(data, template_path=str(cards_folder() / "space" / "README.md"), title=title, generator=name)
