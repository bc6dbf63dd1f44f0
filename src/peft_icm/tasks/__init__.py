"""Tasks: what a base model is adapted to. They know nothing of generators."""

from __future__ import annotations

import re
from pathlib import Path

from .detection import DetectionTask, load_detection_tasks
from .language_modeling import LanguageModelingTask
from .language_modeling import load_tasks as load_language_modeling_tasks


def load_tasks(folder: str | Path) -> list[LanguageModelingTask] | list[DetectionTask]:
    """Read the tasks of a folder: detection where its `tasks.json` names annotated images, language modelling where it names texts.

    Args:
        folder (`str` or `Path`): See [`load_detection_tasks`] and [`language_modeling.load_tasks`].

    Returns:
        `list[LanguageModelingTask]` or `list[DetectionTask]`

    Raises:
        `ValueError`: If the folder holds neither, or its list of tasks is empty.
    """
    file = Path(folder) / "tasks.json"
    is_detection = file.is_file() and re.search(r'"annotations"\s*:', file.read_text(encoding="utf-8"))
    tasks = load_detection_tasks(folder) if is_detection else load_language_modeling_tasks(folder)
    if not tasks:
        raise ValueError(f"{file} lists no tasks.")
    return tasks
