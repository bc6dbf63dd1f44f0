"""How the open world's generator tells sentences about the nouns that it was trained on from others, and other measures beside."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import Tensor

from peft_icm import ICMGenerator
from peft_icm.bundled import bundled_requests
from peft_icm.conditioning.phrasings import phrasings
from peft_icm.figures import plot_bars
from peft_icm.generator.condition_space import ConditionSpace
from peft_icm.generator.reading import Reader
from peft_icm.training.conditions import sentences_of, unheard
from peft_icm.training.reading import indices

HERE = Path(__file__).parent
BUILD_DEMO = HERE.parents[1] / "examples" / "build_demo"
EACH, TRAINED = 12, 24  # held-out phrasings of a noun, of another seed than those of the threshold; phrasings that were trained on
NONSENSE = (
    "zzzqqq", "detect zzzqqq", "detect 1234567890", "asdfghjkl", "detect blorpfen", "find every glimfop", "detect xkcdw", "...", "hello",
    "aaaa", "find the thing", "detect nothing", "qwerty qwerty", "detect flurbles", "Lorem ipsum dolor sit amet", "vrrm vrrm", "detect qqq",
    "where are the wugs?", "the the the", "mark each snorble",
)  # fmt: skip

Measure = Callable[[Tensor], Tensor]


def requests(generator: ICMGenerator, once: bool, seed: int) -> dict[str, tuple[list[str], list[str]]]:
    """By kind sentences, and what each is about: of trained nouns, of others, and of no noun that was trained."""
    chosen, nouns = (json.loads((BUILD_DEMO / name).read_text(encoding="utf-8")) for name in ("open_world.json", "nouns.json"))
    trained = [task["name"] for task in generator.config.tasks or []]
    other = [line for world in load_worlds("once" if once else "choose").values() for line in world["unknown"]]

    def said(names: list[str]) -> tuple[list[str], list[str]]:
        lines = [(line, name) for name in names for line in phrasings(f"detect {spoken(name)}", EACH, seed=seed, held_out=True)]
        return [line for line, _ in lines], [name for _, name in lines]

    named = re.compile("|".join(rf"\b{re.sub('y$', '(y|ies)', re.sub('man$', 'm[ae]n', spoken(name)))}(e?s)?\b" for name in trained))
    foreign = [line for line in other if not named.search(line.lower())]
    return {
        "trained nouns": said(trained),
        "other nouns": said(nouns["unseen"] if once else chosen["choose"]),
        "something else": (foreign, foreign),
        "nonsense": (list(NONSENSE), list(NONSENSE)),
    }


def load_worlds(requests: str) -> dict[str, dict[str, Any]]:
    """The requests of both worlds: those that choose settings are bundled, those that decide, or did, are not."""
    if requests != "choose":
        return json.loads((HERE / f"{requests}.json").read_text(encoding="utf-8"))
    return {world: json.loads(bundled_requests(world).read_text(encoding="utf-8")) for world in ("text", "detection")}


def spoken(noun: str) -> str:
    """`"hot-dog"` -> `"hot dog"`."""
    return noun.replace("-", " ")


def measures(generator: ICMGenerator) -> dict[str, Measure]:
    """What could tell them apart: the reader, that of the other generators fitted on the same sentences, and the nearest task's own."""
    width, tasks = generator.config.text_dim, generator.config.tasks or []
    sentences, seed = [[task["description"]] for task in tasks], (generator.config.training or {})["seed"]
    said = [generator.encoder.read("text", sentences_of(task, TRAINED, seed))[:, :width] for task in sentences]
    held_out, foreign = unheard(sentences, generator.encoder, seed)
    space, reader = ConditionSpace("whitening", width, len(tasks)), Reader(width, len(tasks))
    space.fit(torch.cat(said), indices(said))
    held = torch.cat(held_out)[:, :width]
    reader.fit(space, torch.cat(said), indices(said), held, indices(held_out), foreign[:, :width])
    own = F.normalize(torch.stack([rows[0] for rows in said]), dim=1)
    assert generator.text_reader is not None
    text_reader = generator.text_reader
    return {
        "reader": lambda rows: text_reader(rows)[1],
        "reader of the other generators": lambda rows: reader(space, rows)[1],
        "cosine to the nearest sentence": lambda rows: (F.normalize(rows, dim=1) @ own.T).amax(1),
    }


@torch.no_grad()
def nouns_report(generator: ICMGenerator, once: bool, seed: int, plot: Path) -> dict[str, Any]:
    """AUROC against trained nouns, what is taken for known where 95 % of them are and at the generator's threshold, and who fools it.

    Args:
        generator ([`ICMGenerator`]): With a reader of sentences.
        once (`bool`): The nouns and requests that decide, in the place of those that settings are chosen on.
        seed (`int`): Of the phrasings.
        plot (`Path`): PNG of the shares that are taken for known.

    Returns:
        `dict[str, Any]`
    """
    asked = requests(generator, once, seed)
    width, names = generator.config.text_dim, [task["name"] for task in generator.config.tasks or []]
    rows = {kind: generator.encoder.read("text", lines)[:, :width] for kind, (lines, _) in asked.items()}
    reader = generator.text_reader
    assert reader is not None
    read = {kind: reader(part) for kind, part in rows.items()}
    heard = {kind: [names[index] for index in probabilities.argmax(1).tolist()] for kind, (probabilities, _) in read.items()}
    known = {kind: familiarity >= reader.threshold for kind, (_, familiarity) in read.items()}
    apart: dict[str, Any] = {}
    for name, measure in measures(generator).items():
        scores = {kind: measure(part) for kind, part in rows.items()}
        own = scores.pop("trained nouns")
        bar = own.quantile(0.05)
        apart[name] = {
            kind: {
                "auroc": round(float(roc_auc_score([1] * len(own) + [0] * len(part), torch.cat([own, part]))), 4),
                "known_at_95": round(float((part >= bar).float().mean()), 4),
            }
            for kind, part in scores.items()
        }
    nouns = asked["other nouns"][1]
    fooled: dict[str, Any] = {}
    for noun in dict.fromkeys(nouns):
        found = [heard["other nouns"][index] for index, name in enumerate(nouns) if name == noun and known["other nouns"][index]]
        fooled[noun] = {"known": round(len(found) / nouns.count(noun), 2), "as": Counter(found).most_common(1)[0][0] if found else None}
    shares = {kind: round(float(part.float().mean()), 4) for kind, part in known.items()}
    plot_bars(list(shares), {"taken for known": list(shares.values())}, "share of the requests", plot)
    return {
        "requests": {kind: len(lines) for kind, (lines, _) in asked.items()},
        "threshold": round(float(reader.threshold), 4),
        "taken_for_known": shares,
        "heard_right": round(
            sum(a == b for a, b in zip(heard["trained nouns"], asked["trained nouns"][1], strict=True)) / len(known["trained nouns"]), 4
        ),
        "apart_from_trained_nouns": apart,
        "other_nouns": dict(sorted(fooled.items(), key=lambda item: -item[1]["known"])),
    }
