"""The command line as tests call it, and a folder for it to work on."""

import json

import torch
from tiny import TEXTS, llama, tokenizer

from peft_icm.cli import main

SENTENCE = "continue a Shakespeare play"


def run(*arguments):
    return main([str(argument) for argument in arguments])


def make_work(folder):
    """A folder with a tiny base, tasks of real text, and what `collect` makes of them."""
    torch.manual_seed(0)
    llama(vocab_size=len(tokenizer()), max_position_embeddings=128).save_pretrained(folder / "base")
    tokenizer().save_pretrained(folder / "base")
    (folder / "tasks").mkdir()
    entries = []
    for name, text in zip(("sonnet", "novel", "genesis"), TEXTS, strict=True):
        (folder / "tasks" / f"{name}.train.txt").write_text(text)
        (folder / "tasks" / f"{name}.test.txt").write_text(text[::-1][:90])
        entry = {
            "name": name,
            "descriptions": [f"write a {name}", f"{name}, please"],
            "unseen_descriptions": [f"something like a {name}"],
        }
        entries.append({**entry, "train": f"{name}.train.txt", "test": f"{name}.test.txt"})
    (folder / "tasks" / "tasks.json").write_text(json.dumps({"tasks": entries}))
    arguments = ["collect", folder / "base", "--tasks", folder / "tasks", "-o", folder / "collection", "--epochs", 6, "--snapshots", 5,
                 "--block-size", 32, "--learning-rate", 0.01, "--json"]  # fmt: skip
    assert run(*arguments) == 0
    return folder
