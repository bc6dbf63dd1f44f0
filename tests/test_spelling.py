"""Misspelt words of a request are read as the words of the tasks' sentences; all others stay as they are."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from peft_icm import ICMGenerator, bundled_generator
from peft_icm.bundled import bundled_encoder
from peft_icm.conditioning import ClipEncoder
from peft_icm.conditioning.spelling import _one_slip, respell, words_of

WORDS = words_of(["detect umbrellas", "detect horses", "detect bananas", "detect clocks", "detect motorcycles", "find the Pferde"])
LETTERS = st.text("abcdé", min_size=1, max_size=7)


@pytest.fixture(scope="module")
def encoder():
    return ClipEncoder.from_pretrained(bundled_encoder())


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("find umberellas pls", "find umbrellas pls"),
        ("Umbrela!", "umbrella!"),
        ("clokc detection", "clock detection"),
        ("a bannana, two bananaas", "a banana, two bananas"),
        ("MOTORCYLES", "motorcycles"),
        ("pferdde", "pferde"),
    ],
)
def test_slips(encoder, text, read):
    assert respell(text, WORDS, encoder) == read


@pytest.mark.parametrize("text", ["houses and chairs", "hoarse", "the horses' umbrellas", "xyzzy qwertz", "1234", "🐴 ☂"])
def test_words_stay(encoder, text):
    assert respell(text, WORDS, encoder) == text


def test_without_words_everything_stays(encoder):
    assert respell("umberella", [], encoder) == "umberella"


def distance(a: str, b: str) -> int:
    """Optimal string alignment, by the textbook."""
    rows = [[i + j if i * j == 0 else 0 for j in range(len(b) + 1)] for i in range(len(a) + 1)]
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            rows[i][j] = min(rows[i - 1][j] + 1, rows[i][j - 1] + 1, rows[i - 1][j - 1] + (a[i - 1] != b[j - 1]))
            if i > 1 and j > 1 and a[i - 1] == b[j - 2] and a[i - 2] == b[j - 1]:
                rows[i][j] = min(rows[i][j], rows[i - 2][j - 2] + 1)
    return rows[-1][-1]


@given(LETTERS, LETTERS)
@example("ab", "ba")
@example("abc", "ab")
@example("aab", "ab")
def test_one_slip_is_a_distance_of_one(a, b):
    if a != b:
        assert _one_slip(a, b) == (distance(a, b) == 1)


@pytest.mark.parametrize("world", ["text", "detection", "open"])
def test_a_bundled_generator_hears_through_slips(world):
    generator = ICMGenerator.from_pretrained(bundled_generator(world))
    right, wrong = {
        "text": ("continue a shakespeare play", "continue a Shakespere play"),
        "detection": ("detect umbrellas", "detect umbrelas"),
        "open": ("detect umbrella", "detect umbrelas"),
    }[world]
    assert generator.task_vector(wrong).equal(generator.task_vector(right))


def test_a_generator_without_words_reads_what_is_written():
    generator = ICMGenerator.from_pretrained(bundled_generator("detection"))
    generator.config.words = None
    assert generator.task_vector("detect umbrelas").equal(generator.encoder.read("text", ["detect umbrelas"])[0])
