"""What travels inside the package: small generators with base, held-out data and the tasks' own LoRAs, and the encoder they share."""

from __future__ import annotations

from pathlib import Path

BUNDLES = Path(__file__).parent


def bundled_folder(name: str) -> Path:
    """The folder of a bundle.

    Args:
        name (`str`): `"text"`, `"detection"` or `"open"`.

    Raises:
        `ValueError`: If there is no such bundle.
    """
    folder = BUNDLES / name
    if not (folder / "generator" / "config.json").is_file():
        names = sorted(path.parents[1].name for path in BUNDLES.glob("*/generator/config.json"))
        raise ValueError(f"There is no bundled generator {name!r}: choose one of {', '.join(names)}.")
    return folder


def bundled_generator(name: str) -> str:
    """The folder of a bundled generator, for [`ICMGenerator.from_pretrained`].

    Args:
        name (`str`): `"text"`: text domains for the bundled Llama; `"detection"`: one-class detection for the bundled Florence-2;
            `"open"`: detection of classes without a LoRA, by pictures of them, for the same Florence-2.

    Returns:
        `str`: Path of the folder.

    Raises:
        `ValueError`: If there is no such bundle.

    Example:

    ```python
    >>> from peft_icm import ICMGenerator
    >>> ICMGenerator.from_pretrained(bundled_generator("text")).config.model_type
    'icm'

    ```
    """
    return str(bundled_folder(name) / "generator")


def bundled_requests(name: str) -> Path:
    """Sentences that ask for the tasks of a bundle in other words, and for something else: for `peft-icm evaluate --requests`.

    Nothing was trained on them, but settings of the package were chosen on them.

    Args:
        name (`str`): `"text"` or `"detection"`.

    Example:

    ```python
    >>> bundled_requests("text").name
    'text.json'

    ```
    """
    return BUNDLES / "requests" / f"{name}.json"


def bundled_encoder() -> str:
    """The folder of the encoder that the bundled generators share, for [`ClipEncoder.from_pretrained`].

    Returns:
        `str`: Path of the folder.

    Example:

    ```python
    >>> from peft_icm.conditioning import ClipEncoder
    >>> ClipEncoder.from_pretrained(bundled_encoder()).dim
    384

    ```
    """
    return str(BUNDLES / "encoder")
