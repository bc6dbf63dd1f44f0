"""A misspelt word of a request, read as the word of the tasks' sentences that was meant."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from .base import TaskEncoder
from .phrasings import singular

WORD = re.compile(r"[^\W\d_]+")
SHORTEST = 5  # letters; a slip in a shorter word makes another one too easily
ENDINGS = ("", "s", "es", "d", "ed", "ing", "er", "ly")


def words_of(sentences: Iterable[str]) -> list[str]:
    """The words that a misspelt one may stand for: those of the tasks' sentences, and the singular of a plural.

    Args:
        sentences (`Iterable[str]`): Of all tasks.

    Returns:
        `list[str]`: In lower case, of five letters or more, each once.

    Example:

    ```python
    >>> words_of(["detect sofas", "detect red umbrellas"])
    ['detect', 'sofas', 'umbrellas', 'umbrella']

    ```
    """
    said = [word for sentence in sentences for word in WORD.findall(sentence.lower())]
    return list(dict.fromkeys(form for word in said for form in (word, singular(word)) if len(form) >= SHORTEST))


def respell(text: str, words: Collection[str], encoder: TaskEncoder) -> str:
    """Read misspelt words as they were meant: an encoder makes of `umberella` anything but an umbrella.

    A word is misspelt if it is none of `words`, the encoder's tokenizer has to put it together from pieces, even without its ending, and
    one slip - a letter too many, too few or wrong, or two exchanged - leads from one of `words` with the same first letter to it, or to
    its singular.

    Args:
        text (`str`): Of a request.
        words (`Collection[str]`): See [`words_of`].
        encoder (`TaskEncoder`): That reads it.

    Returns:
        `str`: The text as it was where nothing is misspelt.

    Example:

    ```python
    >>> from peft_icm.bundled import bundled_encoder
    >>> from peft_icm.conditioning import ClipEncoder
    >>> respell("Find my umberella!", words_of(["detect umbrellas"]), ClipEncoder.from_pretrained(bundled_encoder()))
    'Find my umbrella!'

    ```
    """

    def meant(match: re.Match[str]) -> str:
        word = match[0].lower()
        forms = (word, singular(word))
        if len(word) < SHORTEST or any(form in words for form in forms):
            return match[0]
        near = next((other for other in words for form in forms if other[0] == form[0] and _one_slip(form, other)), None)
        return match[0] if near is None or _in_one_piece(word, encoder) else near

    return WORD.sub(meant, text)


def _in_one_piece(word: str, encoder: TaskEncoder) -> bool:
    forms = [word.removesuffix(ending) for ending in ENDINGS if word.endswith(ending) and word != ending]
    return min(encoder.count_tokens(forms)) <= encoder.count_tokens(["a"])[0]


def _one_slip(word: str, other: str) -> bool:
    """Whether the Damerau-Levenshtein distance of two different words is one."""
    start = next((at for at, pair in enumerate(zip(word, other, strict=False)) if pair[0] != pair[1]), min(len(word), len(other)))
    left, right = word[start:], other[start:]
    exchanged = left[:2] == right[:2][::-1] and left[2:] == right[2:]
    return left[1:] == right[1:] or left[1:] == right or left == right[1:] or exchanged
