"""Tasks: what a base model is adapted to. They know nothing of generators."""

from __future__ import annotations

from pathlib import Path

from .detection import DetectionTask, load_detection_tasks
from .fields import read_tasks_json
from .language_modeling import LanguageModelingTask
from .language_modeling import load_tasks as load_language_modeling_tasks


def load_tasks(folder: str | Path) -> list[LanguageModelingTask] | list[DetectionTask]:
    """Read the tasks of a folder: detection where its `tasks.json` has splits of annotated images, `train` and `test`, else
    language modelling.

    Args:
        folder (`str` or `Path`): See [`load_detection_tasks`] and [`language_modeling.load_tasks`].

    Returns:
        `list[LanguageModelingTask]` or `list[DetectionTask]`

    Raises:
        `ValueError`: If the folder holds neither, or its list of tasks is empty.
    """
    document = read_tasks_json(folder, '{"tasks": [{"name", "descriptions", ...}]}')
    is_detection = not document.keys().isdisjoint(("train", "test"))  # of texts each task names its own
    tasks = load_detection_tasks(folder) if is_detection else load_language_modeling_tasks(folder)
    if not tasks:
        raise ValueError(f"{Path(folder) / 'tasks.json'} lists no tasks.")
    return tasks
