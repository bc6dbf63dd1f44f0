"""The stage that fetches a world of language: 647 related texts in 78 natural languages, 18 programming languages and some 40 formats.

A task is a kind of text in a language (messages of GNOME in Danish, man pages in Polish), a library's source in a programming language,
or a data format. `language_world.json` lists languages, kinds of text and sources with pinned packages and their licences;
`language_split.json` says which tasks are trained, which settings are chosen on, and which are kept for the end: it was written before
anything was trained. Held-out families are those of natural languages, kinds of text and programming languages of which no task is trained.
"""

from __future__ import annotations

import gettext
import json
import os
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from demo_domains import _files, _html, _man, _read
from demo_text import SEPARATOR, _clean, download, write_json

TRAIN_CHARACTERS = 200_000
TEST_CHARACTERS = 20_000
TEST_PASSAGE = 2_000
DOCUMENT_CHARACTERS = 10_000
LEAST_TRAIN_BYTES, LEAST_TEST_BYTES = 30_000, 6_000
CHUNK = 60  # messages in a document


def _chunks(lines: list[str]) -> Iterator[str]:
    """Documents of some sixty lines, which are in a random order: catalogues are sorted by their English originals."""
    lines = [line for line in dict.fromkeys(lines) if not re.search(r"(?i)copyright|licen[cs]e|warranty", line)]
    random.Random(0).shuffle(lines)
    yield from ("\n".join(lines[i : i + CHUNK]) for i in range(0, len(lines), CHUNK))


def messages(root: Path, packages: list[str], code: str) -> Iterator[str]:
    """The translated messages of gettext catalogues, one a line, without those left in English."""
    for package in packages:
        for path in _files(root / package, f"**/{code}/LC_MESSAGES/*.mo"):
            try:
                with path.open("rb") as file:
                    catalogue: dict[Any, str] = gettext.GNUTranslations(file)._catalog  # type: ignore[attr-defined]
            except (UnicodeDecodeError, OSError):  # a few catalogues are damaged
                continue
            lines = []
            for original, text in catalogue.items():
                original = original[0] if isinstance(original, tuple) else original
                if original and len(text) > 12 and text != original.rpartition("\x04")[2]:
                    lines.append(re.sub(r"\s*\n\s*", " ", text).strip())
            yield from _chunks(lines)


def mallard(root: Path, packages: list[str], code: str) -> Iterator[str]:
    for path in _files(root, f"{packages[0]}/usr/share/help/{code}/**/*.page"):
        yield re.sub(r"<(?:info|credit|include)\b.*?</(?:info|credit|include)>", "", _read(path), flags=re.DOTALL)


def html_pages(root: Path, packages: list[str], code: str) -> Iterator[str]:
    for path in _files(root, f"{packages[0]}/usr/share/doc/{packages[0]}/{code}/*.html", without="index|apb|apc|gpl"):
        yield _html(path)


def manuals(root: Path, packages: list[str], code: str) -> Iterator[str]:
    for path in _files(root, f"manpages-{code.lower().replace('_', '-')}*/usr/share/man/{code}/man*/*.gz"):
        text = _man(path)
        english = len(re.findall(r"\b(?:the|of|and|is|this)\b", text))
        if english * 60 < len(text):  # some pages are English for the greater part
            yield text


def annotations(root: Path, packages: list[str], code: str) -> Iterator[str]:
    file = root / f"cldr-annotations-full/package/annotations/{code.replace('_', '-')}/annotations.json"
    if file.is_file():
        entries = json.loads(file.read_text(encoding="utf-8"))["annotations"]["annotations"].items()
        yield from _chunks([json.dumps({sign: entry}, ensure_ascii=False) for sign, entry in entries])


KINDS: dict[str, Callable[[Path, list[str], str], Iterator[str]]] = {
    "messages": messages,
    "mallard": mallard,
    "html": html_pages,
    "man": manuals,
    "annotations": annotations,
}


def world() -> dict[str, Any]:
    """What `language_world.json` holds."""
    return json.loads((Path(__file__).parent / "language_world.json").read_text(encoding="utf-8"))


def split() -> dict[str, Any]:
    """What `language_split.json` holds: names of tasks under `train`, and under `choose` and `unseen` by what is new about them."""
    return json.loads((Path(__file__).parent / "language_split.json").read_text(encoding="utf-8"))


def _tasks(root: Path, known: dict[str, Any]) -> Iterator[tuple[dict[str, Any], Callable[[], Iterator[str]]]]:
    """Every task that there may be: what is written of it, and what yields its documents."""
    for genre, kind in known["genres"].items():
        for code, language in known["languages"].items():
            packages = [package.format(code=code.lower().replace("_", "-")) for package in kind["packages"]]
            entry = {
                "name": f"{genre}_{code.replace('@', '_')}",
                "descriptions": [text.format(language=language["name"], branch=language["branch"]) for text in kind["descriptions"]],
                "family": language["family"],
                "kind": genre,
                "language": code,
                "packages": packages,
                "licence": kind["licence"],
            }
            yield entry, lambda kind=kind, packages=packages, code=code: KINDS[kind["kind"]](root, packages, code)
    for name, source in known["sources"].items():
        language, topic = source["language"], source["topic"]
        sentences = (
            [f"{language} source code for {topic}", f"a {language} library: {topic}", f"program text in {language} about {topic}"]
            if language
            else [topic, f"files with {topic}", f"text in a format of its own: {topic}"]
        )
        family = name.split("_")[0]
        entry = {"name": name, "descriptions": sentences, "family": family, "kind": "code", "language": language or topic}

        def documents(source: dict[str, Any] = source) -> Iterator[str]:
            for package in source["packages"]:
                for path in _files(root / package, source["files"], without=r"/(?:icons|fonts)/|\.min\."):
                    yield _read(path)

        yield {**entry, "packages": source["packages"], "licence": source["licence"]}, documents


def split_documents(documents: list[str]) -> tuple[list[str], list[str]]:
    """Train and test: each document is in one of them, and no longer paragraph in both."""
    random.Random(0).shuffle(documents)
    seen: set[str] = set()
    train: list[str] = []
    test: list[str] = []
    total = min(sum(map(len, documents)), TRAIN_CHARACTERS)
    for document in documents:  # test first: what it holds is then a duplicate and never trained on
        document = _clean(document, seen)
        if len(document) < 300:
            continue
        if sum(map(len, test)) < min(TEST_CHARACTERS, total / 5):
            start = document.find("\n", max(0, len(document) - TEST_PASSAGE) // 2) + 1  # the middle: no preamble, no imports
            test.append(document[start : start + TEST_PASSAGE].rsplit("\n", 1)[0].strip("\n"))
        elif (room := TRAIN_CHARACTERS - sum(map(len, train))) > 0:
            train.append(document[: min(DOCUMENT_CHARACTERS, room)])
        else:
            break
    return train, [text for text in test if text.strip()]


def fetch(build: Path) -> None:
    """Write `language/tasks.json` with train and held-out test files of every task, and `language/sources.json`."""
    archives, unpacked, text = build / "packages", build / "unpacked", build / "language"
    text.mkdir(parents=True, exist_ok=True)
    known = world()
    for package, version in known["versions"].items():
        download(f"{package}=={version}", archives, unpacked)
    tasks, sources = [], []
    for entry, documents in _tasks(unpacked, known):
        train, test = split_documents(list(documents()))
        sizes = [len("".join(part).encode()) for part in (train, test)]
        if sizes[0] < LEAST_TRAIN_BYTES or sizes[1] < LEAST_TEST_BYTES or len(test) < 3:
            continue
        files = {}
        for name, parts in (("train", train), ("test", test)):
            files[name] = f"{entry['name']}.{name}.txt"
            temporary = text / f".{files[name]}.part"
            temporary.write_text(SEPARATOR.join(parts), encoding="utf-8", newline="\n")
            os.replace(temporary, text / files[name])
        tasks.append({"name": entry["name"], "descriptions": entry["descriptions"], **files})
        sources.append({**entry, "train_bytes": sizes[0], "test_bytes": sizes[1], "train_documents": len(train)})
    known_split = split()
    named = {*known_split["train"], *(name for part in ("choose", "unseen") for names in known_split[part].values() for name in names)}
    if missing := sorted(named - {task["name"] for task in tasks}):
        raise RuntimeError(f"language_split.json names tasks that these packages do not hold: {', '.join(missing[:10])}.")
    write_json({"tasks": tasks}, text / "tasks.json")
    write_json(sources, text / "sources.json")
    print(f"{len(tasks)} tasks, {sum(source['train_bytes'] for source in sources):,} bytes to train on")
