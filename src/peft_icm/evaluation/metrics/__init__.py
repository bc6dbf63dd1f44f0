"""evaluate metrics: each lies in a folder of its own that `evaluate.load` takes."""

from pathlib import Path


def metric_path(name: str) -> str:
    """The folder of a metric, for `evaluate.load`.

    Args:
        name (`str`): `"perplexity"`, `"bits_per_character"`, `"mean_average_precision"` or `"adapter_fidelity"`.

    Raises:
        `ValueError`: If there is no such metric.

    Example:

    ```python
    >>> import evaluate
    >>> evaluate.load(metric_path("bits_per_character")).name
    'bits_per_character'

    ```
    """
    root = Path(__file__).parent
    if not (root / name / f"{name}.py").is_file():
        names = sorted(file.parent.name for file in root.glob("*/*.py"))
        raise ValueError(f"There is no metric {name!r}: choose one of {', '.join(names)}.")
    return str(root / name)
