"""Phrasings: people write one sentence for a task, and ask for it in many.

A phrasing is a frame round the task's own sentence or round its subject ("detect sofas" -> "sofas"), with what people put before and
after a request, in the hands in which they write: quickly, in capitals, by telegram, with typing errors. All frames are put round all
tasks, so that what a generator learns to leave out is the frame and nothing of the task.
"""

from __future__ import annotations

import hashlib
import random
import re

# {} is the subject, {one} its singular where it has one, {task} the task's own sentence.
FRAMES = (
    "{}", "{}", "{one}", "{task}", "{task}",
    "{}, please", "only {}", "just {}", "more {}", "everything about {}", "{} again",
    "detect {}", "find {}", "find every {one}", "locate {}", "where are the {}?", "where is the {one}?", "show me {}", "mark each {one}",
    "draw boxes around {}", "box the {one}", "spot any {one}", "a picture of a {one}", "{one} detector", "{} in the image", "look for {}",
    "count the {} in this picture", "is there a {one} in the photo?", "point at the {one}", "recognise {}", "highlight {} in the photos",
    "write {}", "continue {}", "text like {}", "text from {}", "generate {}", "something that reads like {}", "predict the next word of {}",
    "complete {}", "language modelling on {}", "the domain is {}", "documents: {}", "corpus of {}", "style: {}", "imitate {}",
    "an adapter for {}", "a LoRA for {}", "adapt the model to {}", "fine-tune on {}", "specialise in {}", "task: {}", "use case: {}",
    "we work with {}", "this is about {}", "we need {task}", "it should {task}", "can you {task}?", "how do I {task}?",
    "the model has to deal with {}", "all I care about is {}", "my data is {}", "get better at {}", "prepare the model for {}",
    "the input will be {}", "make it know {}", "a model that understands {}", "what would help with {}?", "{} is what I am after",
    "{}: can this be done?", "it is {} that I want", "for {}, what do you have?", "as for {}, give me the best you have",
)  # fmt: skip
BEFORE = (
    "", "", "", "", "please", "hi,", "hello there,", "hey", "ok so", "could you", "I would like you to help:", "I want this:",
    "we need help:",
    "good morning, a question:", "dear team,", "listen,", "sorry to bother you, but", "for the last time:", "quick question -",
    "for my thesis,", "for a client of ours,", "at work we have this problem:", "our start-up is building a tool, so", "as a hobby,",
    "I am a teacher and", "I have tried everything else;", "after a long meeting we decided on this:", "as discussed yesterday,",
    "the customer says:", "my boss wants it by Friday:", "we are a small team with a lot of old files and",
)  # fmt: skip
AFTER = (
    "", "", "", "", "please", "thanks", "thank you very much in advance", "asap", "now", "and nothing else", "if you can", "!", "...",
    "as well as you can", "no other things", "and make it quick", "or I will use something else", "that is all we need for the moment",
    "because the present model is bad at it", "since that is what our users send us all day long", "for a demonstration next week",
    "and please tell me when it is ready", "it does not have to be perfect, but it should be better than the plain model",
)  # fmt: skip
# Of another form and mostly longer: what is learnt on FRAMES is tried on these.
HELD_OUT_FRAMES = (
    "I was wondering whether anybody here has got something for {}",
    "my grandmother keeps asking me about {}, so I promised her that a computer could learn it",
    "{} - that's it, that's the whole request",
    "would it be too much trouble to set things up so that {} come out right",
    "of all the things in the world it had to be {} that our project depends on, and so here we are",
    "need: {}", "want {} not something else", "you had one job: {}",
    "the folder that I was handed this morning has to do with {} and I have no idea where to begin",
    "imagine a user who opens the app, thinks of {}, and expects it to work without another word",
    "subject: {} / deadline: tomorrow / budget: none", "does the thing know about {} yet?",
    "can anyone recommend the right setting when the topic is {} and nothing but {}?",
    "it's {} we're dealing with, mate", "me again. {}. same as last time",
)  # fmt: skip
# What nobody's adapter answers, unless somebody trained for it: requests of every kind, for the threshold of what is unknown.
FOREIGN_SUBJECTS = (
    "violins", "old coins", "mushrooms", "lighthouses", "goldfish", "traffic cones", "wedding rings", "windmills", "beehives", "tents",
    "barcodes", "tumours in X-ray images", "cracks in concrete", "handwritten digits", "number plates", "coffee stains", "clouds", "drums",
    "hedges", "shopping bags", "solar panels", "icebergs", "swimming pools", "potholes", "graffiti", "helmets", "rowing boats", "caravans",
    "tax returns", "haiku", "railway timetables", "obituaries", "rap lyrics", "wine reviews", "insurance claims", "chess games",
    "cooking recipes", "text messages", "job interviews", "weather forecasts", "astrology", "gardening advice", "dialogues in Klingon",
    "sports results", "court rulings", "Chinese poetry", "FORTRAN subroutines", "assembly code", "spreadsheet formulas", "HTML pages",
    "hotel reviews", "nursery rhymes", "chemical formulas", "stock prices", "dating profiles", "radio plays", "parliamentary debates",
    "medical histories", "cinema programmes", "sheet music", "crossword clues", "aviation reports", "tweets about politics", "hymns",
)  # fmt: skip
FOREIGN_LINES = (
    "what time is it?", "how are you today?", "asdf jkl", "qwertz uiop", "42", "0 0 1 1 0", "???", "tell me a joke", "who are you?",
    "the train to Vienna leaves at nine", "I have lost my umbrella stand and my patience", "buy milk, eggs and soap", "la la la la",
    "why is the sky blue?", "my knee hurts when it rains", "turn off the lights in the kitchen", "xx yy zz", "it depends",
    "nothing in particular", "translate this for me", "the meeting is postponed to Thursday", "hgfd trew mnbv", "sing me a song",
)  # fmt: skip
VERBS = re.compile(
    r"(?:adapt|analy[sz]e|annotate|answer|classify|complete|continue|count|describe|detect|draw|explain|extract|find|generate|get|give"
    r"|highlight|identify|imitate|label|learn|locali[sz]e|locate|make|mark|model|outline|predict|produce|read|recogni[sz]e|search|segment"
    r"|show|spot|summari[sz]e|track|translate|understand|write)\s+",
    re.IGNORECASE,
)
TELEGRAM = re.compile(r"\b(?:the|a|an|is|are|of|to|that|it|and|I|we|you|would|could|please|with|in)\b ?", re.IGNORECASE)


def subject_of(sentence: str) -> str:
    """What a task's sentence is about: the sentence without the verb it begins with.

    Args:
        sentence (`str`): Of a task.

    Returns:
        `str`

    Example:

    ```python
    >>> subject_of("detect sofas"), subject_of("continue a Shakespeare play"), subject_of("sofas")
    ('sofas', 'a Shakespeare play', 'sofas')

    ```
    """
    sentence = sentence.strip()
    verb = VERBS.match(sentence)
    return sentence[verb.end() :] if verb else sentence


def phrasings(sentence: str, count: int = 64, *, seed: int = 0, held_out: bool = False) -> list[str]:
    """Say a task in other words.

    Args:
        sentence (`str`): Of the task, in whatever words.
        count (`int`, defaults to 64): How many phrasings.
        seed (`int`, defaults to 0): Another seed gives others; the same gives the same on every machine.
        held_out (`bool`, defaults to `False`): Draw from the frames that nothing is trained on.

    Returns:
        `list[str]`: Of 1 to some 40 words round the sentence or its subject, without repetitions; fewer than `count` only where the frames
        give no more.

    Raises:
        `ValueError`: If the sentence is empty or no string.

    Example:

    ```python
    >>> len(phrasings("detect sofas", 40))
    40
    >>> set(phrasings("detect sofas", 40)) & set(phrasings("detect sofas", 40, held_out=True))
    set()

    ```
    """
    if not isinstance(sentence, str) or not sentence.strip():
        raise ValueError(f"The sentence of a task is {sentence!r}, it must be a string with words.")
    draw = random.Random(hashlib.sha256(f"{seed} {held_out} {sentence}".encode()).digest())
    found: dict[str, None] = {}
    for _ in range(20 * count):
        if len(found) == count:
            break
        found[_say(sentence.strip(), draw, held_out)] = None
    return list(found)


def foreign(seed: int = 0, *, held_out: bool = False) -> list[str]:
    """Requests that none of a generator's tasks is likely to answer: other things, small talk, letters without meaning.

    Args:
        seed (`int`, defaults to 0): Of the frames.
        held_out (`bool`, defaults to `False`): In the frames that nothing is trained on.

    Returns:
        `list[str]`

    Example:

    ```python
    >>> len(foreign()) > 80
    True

    ```
    """
    said = [line for thing in FOREIGN_SUBJECTS for line in phrasings(thing, 3, seed=seed, held_out=held_out)]
    return [*said, *FOREIGN_LINES]


def _say(sentence: str, draw: random.Random, held_out: bool) -> str:
    subject = subject_of(sentence)
    words = {"one": singular(subject), "task": sentence}
    text = draw.choice(HELD_OUT_FRAMES if held_out else FRAMES).replace("{}", "{subject}").format(subject=subject, **words)
    if not held_out:
        text = " ".join(part for part in (draw.choice(BEFORE), text, draw.choice(AFTER)) if part)
    match draw.choices(("plain", "lower", "upper", "telegram", "typo"), (6, 2, 0.5, 0.75, 1.5))[0]:
        case "lower":
            return text.lower().rstrip(".!?")
        case "upper":
            return text.upper()
        case "telegram":
            return " ".join(TELEGRAM.sub("", text).split()) or text
        case "typo":
            return _mistyped(text, draw)
    return text


def singular(subject: str) -> str:
    """Of a plural such as "sofas" or "slices of pizza"; anything else stays as it is.

    Args:
        subject (`str`): One or two words, in lower case.

    Returns:
        `str`

    Example:

    ```python
    >>> singular("sofas"), singular("puppies"), singular("glass")
    ('sofa', 'puppy', 'glass')

    ```
    """
    head, *rest = re.split(r"(?= of )", subject, maxsplit=1)
    for ending, singular in (
        ("ies", "y"),
        ("sses", "ss"),
        ("shes", "sh"),
        ("ches", "ch"),
        ("xes", "x"),
        ("ouses", "ouse"),
        ("uses", "us"),
        ("s", ""),
    ):
        if head.endswith(ending) and not head.endswith("ss") and len(head.split()) <= 2 and head == head.lower():
            return head.removesuffix(ending) + singular + "".join(rest)
    return subject


def _mistyped(text: str, draw: random.Random) -> str:
    """With two neighbours in one longer word exchanged, or a letter left out or doubled."""
    places = [match.start() for match in re.finditer(r"(?<=[a-z])[a-z](?=[a-z])", text)]
    if not places:
        return text
    at = draw.choice(places)
    return text[:at] + draw.choice((text[at + 1] + text[at] + text[at + 2 :], text[at + 1 :], text[at] + text[at:]))
