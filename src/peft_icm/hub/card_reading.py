"""What an adapter's card says that it does."""

from __future__ import annotations

import re
from pathlib import Path

import yaml
from huggingface_hub import ModelCard

CARD = "README.md"
MAX_CARD = 20_000  # characters that are looked at
_NO_PROSE = re.compile(r"<!--.*?-->|```.*?```", re.DOTALL)
_HEADING = re.compile(r"^#+ *(.*)$", re.MULTILINE)
_LINE_OF_NO_SENTENCE = re.compile(r"\s*(?:[-*+|>!]|</?\w|\[(?:!\[|<)|\d+\. )")
_LINK = re.compile(r"!?\[([^\]\n]*)\]\([^)\n]*\)")
# What libraries write into the cards of all their models.
_SAYS_NOTHING = re.compile(
    r"more information needed|fine-tuned version of|has been trained using|trained \S+ faster with|generated automatically", re.IGNORECASE
)


def description_of(folder: Path) -> str | None:
    """The sentence in which an adapter's card says what the adapter does.

    A card by peft_icm names it in its metadata. Of any other it is the first sentence under a heading that names a description or summary,
    else of what stands above all sections; what libraries write into every card is none.

    Args:
        folder (`Path`): Of the adapter.

    Returns:
        `str` or `None`: None where there is no card, or it does not say.

    Raises:
        `ValueError`: If the card cannot be read.
    """
    if not (folder / CARD).is_file():
        return None
    try:
        card = ModelCard.load(folder / CARD, ignore_metadata_errors=True)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{folder / CARD} cannot be read ({' '.join(str(error).split())}): give a description yourself.") from error
    own = card.data.get("icm")
    if isinstance(own, dict) and isinstance(own.get("text"), str) and own["text"].strip():
        return own["text"].strip()
    # [what stands above, heading, text, heading, text, ...]
    parts = _HEADING.split(_NO_PROSE.sub("", card.text[:MAX_CARD]))
    sections = list(zip(parts[1::2], parts[2::2], strict=True))
    said = [text for heading, text in sections if re.search("description|summary", heading, re.IGNORECASE)]
    intro = [parts[0], *(text for _, text in sections[:1])]
    return next((sentence for text in [*said, *intro] if (sentence := _first_sentence(text))), None)


def _first_sentence(text: str) -> str | None:
    """Of the first paragraph of words."""
    for paragraph in re.split(r"\n\s*\n", text):
        words = " ".join(line.strip() for line in paragraph.splitlines() if not _LINE_OF_NO_SENTENCE.match(line))
        words = _LINK.sub(r"\1", words).replace("*", "").replace("`", "").strip()
        if words and not _SAYS_NOTHING.search(words):
            return re.split(r"(?<=[.!?])\s", words, maxsplit=1)[0].rstrip(".")
    return None
