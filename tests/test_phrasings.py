"""Phrasings: the same on every machine, of every length, and never those that are held out."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_icm.conditioning.phrasings import FOREIGN_SUBJECTS, foreign, phrasings, subject_of

CODE = "from peft_icm.conditioning.phrasings import phrasings; print(phrasings('detect sofas', 20))"


def test_the_same_in_another_process():
    found = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == str(phrasings("detect sofas", 20))


def test_another_seed_says_it_otherwise():
    assert phrasings("detect sofas", 20) != phrasings("detect sofas", 20, seed=1)


def test_from_one_word_to_forty():
    lengths = [len(line.split()) for line in phrasings("detect sofas", 1500)]
    assert min(lengths) == 1 and 25 < max(lengths) <= 40


@pytest.mark.parametrize("sentence", ["detect sofas", "model the plays of William Shakespeare", "fix {braces} {} and {0}", "été ☃"])
def test_held_out_frames_are_others_and_longer(sentence):
    trained, held = (phrasings(sentence, 200, held_out=held) for held in (False, True))
    assert not set(trained) & set(held)
    assert sum(len(line.split()) for line in held) / len(held) > sum(len(line.split()) for line in trained) / len(trained)


def test_most_name_the_task():
    lines = phrasings("detect sofas", 200)
    assert sum("sofa" in line.lower() for line in lines) > 160  # the others have a typing error in it


@given(st.text(min_size=1).filter(str.strip))
def test_any_sentence(sentence):
    lines = phrasings(sentence, 5)
    assert lines and len(set(lines)) == len(lines) and all(isinstance(line, str) for line in lines)


@pytest.mark.parametrize(
    ("sentence", "subject"),
    [("detect sofas", "sofas"), ("Summarise legal texts", "legal texts"), ("sofas", "sofas"), ("detect", "detect"), ("a dog", "a dog")],
)
def test_the_subject(sentence, subject):
    assert subject_of(sentence) == subject


@pytest.mark.parametrize("sentence", ["", "  ", None, ["detect sofas"]])
def test_no_sentence(sentence):
    with pytest.raises(ValueError, match="The sentence of a task is"):
        phrasings(sentence)


def test_foreign_requests_are_said_in_both_kinds_of_frames():
    assert not {line for line in foreign() if len(line.split()) > 3} & {line for line in foreign(held_out=True) if len(line.split()) > 12}
    assert len(foreign()) > 3 * len(FOREIGN_SUBJECTS) * 0.9
