"""`peft-icm tasks --from jsonl` and `peft-icm gather`: from the files and the LoRAs that people have, as docs/data.md tells."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from command_line import run
from huggingface_hub import HfApi, ModelCard, ModelCardData
from peft import PeftModel
from test_collection import save_lora
from test_house import blocks
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_icm import AdapterCollection, ICMGenerator, bundled_generator, save_adapter
from peft_icm.bundled import bundled_folder
from peft_icm.tasks import load_tasks
from peft_icm.tasks.language_modeling import NLL, nll
from peft_icm.tasks.records import Completion, read_examples


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def rows(count, **more):
    return [{"prompt": f"{number} + 1 =", "completion": f" {number + 1}", **more} for number in range(count)]


class TestTasks:
    def make(self, source, output, *more):
        assert run("tasks", source, "--from", "jsonl", "-o", output, *more) == 0
        return {task.name: task for task in load_tasks(output)}

    def refused(self, capsys, source, output, *more):
        assert run("tasks", source, "--from", "jsonl", "-o", output, *more) == 2
        assert not output.exists() and not list(output.parent.glob(".*"))
        (line,) = capsys.readouterr().err.strip().splitlines()
        return line

    def test_a_file_a_task_split_with_a_seed(self, tmp_path, capsys):
        folder = tmp_path / "mine"
        folder.mkdir()
        write(folder / "add_one.jsonl", rows(30))
        write(folder / "short-texts.jsonl", [{"text": f"text {number}"} for number in range(10)])
        (folder / "notes.txt").write_text("not mine")
        tasks = self.make(folder, tmp_path / "a")
        said = capsys.readouterr()
        assert 'add_one: 24 records to train on, 6 held out; "add one"' in said.out
        assert said.err == "peft-icm: warning: task 'short-texts' has few records to train on: 8.\n"
        one = tasks["add_one"]
        assert len(one.train_texts) == 24 and {*one.train_texts, *one.test_texts} == {Completion(**row) for row in rows(30)}
        assert one.train_texts == sorted(one.train_texts, key=lambda record: int(record.prompt.split()[0]))
        assert tasks["short-texts"].descriptions == ["short texts"] and len(tasks["short-texts"].test_texts) == 2
        again, other = (self.make(folder, tmp_path / name, "--seed", seed) for name, seed in (("b", 0), ("c", 1)))
        assert again["add_one"].test_texts == one.test_texts != other["add_one"].test_texts
        assert len(self.make(folder, tmp_path / "d", "--test-share", 0.5)["add_one"].test_texts) == 15

    def test_what_is_held_out_already_stays_so(self, tmp_path):
        for name, count in (("a", 25), ("b.train", 21), ("v1.5", 4)):
            write(tmp_path / f"{name}.jsonl", rows(count))
        write(tmp_path / "a.test.jsonl", rows(28)[25:])
        (tmp_path / "b.test.csv").write_text("prompt,completion\nwhat,that\n")
        tasks = self.make(tmp_path, tmp_path / "out")
        assert {name: (len(task.train_texts), len(task.test_texts)) for name, task in tasks.items()} == {
            "a": (25, 3), "b": (21, 1), "v1.5": (3, 1)
        }  # fmt: skip

    def test_a_column_of_tasks_and_sentences(self, tmp_path):
        found = [{**row, "task": "plus"} for row in rows(25, description="add one")] + rows(22, task="more")
        found[3]["description"] = "increment"
        write(tmp_path / "all.jsonl", found)
        tasks = self.make(tmp_path / "all.jsonl", tmp_path / "out", "--description", "more=count = up", "--description", "more=go on")
        assert tasks["plus"].descriptions == ["add one", "increment"] and tasks["more"].descriptions == ["count = up", "go on"]

    def test_as_json(self, tmp_path, capsys):
        write(tmp_path / "a.jsonl", rows(20))
        assert run("tasks", tmp_path / "a.jsonl", "--from", "jsonl", "-o", tmp_path / "out", "--json") == 0
        facts = {"name": "a", "descriptions": ["a"], "train": 16, "test": 4}
        expected = {"folder": str(tmp_path / "out"), "unit": "records", "tasks": [facts], "warnings": []}
        assert json.loads(capsys.readouterr().out) == expected

    def test_what_comes_twice_is_in_one_split(self, tmp_path):
        write(tmp_path / "a.jsonl", rows(5) * 4)
        task = self.make(tmp_path / "a.jsonl", tmp_path / "out")["a"]
        assert (len(task.train_texts), len(task.test_texts)) == (16, 4) and not set(task.train_texts) & set(task.test_texts)

    def test_tasks_of_one_sentence_are_told(self, tmp_path, capsys):
        write(tmp_path / "all.jsonl", rows(20, task="a", description="add one") + rows(20, task="b", description="add one"))
        self.make(tmp_path / "all.jsonl", tmp_path / "out")
        assert "warning: several tasks are asked for with 'add one'." in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("files", "more", "message"),
        [
            ({}, (), "is neither a file of examples nor a folder of them: .jsonl, .csv, .parquet"),
            ({"a.jsonl": '{"text": "a"}\n{"text": \n'}, (), "a.jsonl, line 2: no JSON (Expecting value)."),
            ({"a.jsonl": '{"text": "a"}\n{"prompt": "a", "completion": "b"}\n'}, (), "line 2: prompt and completion, where"),
            ({"a.jsonl": '{"prompt": "a", "completion": ""}\n'}, (), "line 1: the completion is empty: leave the record out, or fill it"),
            ({"a.jsonl": '{"text": "a", "label": 1}\n'}, (), "unknown column 'label': allowed are text, or prompt and"),
            ({"a.jsonl": '{"text": "a", "task": 7}\n'}, (), "line 1: the task must be a string; found 7"),
            ({"a.jsonl": '{"text": "a", "task": "../x"}\n'}, (), "a.jsonl: The task name '../x' must be a plain file name"),
            ({"a.jsonl": '{"text": "a"}\n' * 3}, (), "Task 'a' has one example"),
            ({"a.csv": "text\na\nb\n", "a.test.csv": "text\nb\n"}, (), "'a' has 1 examples to train on and held out, the first is 'b'"),
            ({"a.csv": "text\na\nb\n", "A.csv": "text\na\nb\n"}, (), "has tasks whose names differ in capitals alone: A, a"),
            ({"a.jsonl": '{"text": "a"}\n'}, (), "Task 'a' has one example: two at least are needed"),
            ({"a.test.jsonl": '{"text": "a"}\n'}, (), "Task 'a' has examples that are held out and none to train on: give a.jsonl too"),
            ({"a.csv": "text\na\n", "a.jsonl": '{"text": "a"}\n'}, (), "has examples of task 'a' to train, and so has another file"),
            (
                {"a.csv": "text\na\n", "a.test.jsonl": '{"prompt": "a", "completion": "b"}\n'}, (),
                "Task 'a' has one format to train on, and another held out",
            ),
            ({"a.csv": "text\na\nb\n"}, ("--description", "b=of b"), "A description is of 'b', which is no task: the tasks are a"),
            ({"a.csv": "text\na\nb\n"}, ("--description", "of a"), "--description 'of a' must be NAME=SENTENCE"),
            ({"a.csv": "text\na\nb\n"}, ("--test-share", "1"), "--test-share 1.0 must lie between 0 and 1"),
        ],
    )  # fmt: skip
    def test_what_is_wrong_is_one_line_and_nothing_is_written(self, tmp_path, capsys, files, more, message):
        (tmp_path / "in").mkdir()
        for name, content in files.items():
            (tmp_path / "in" / name).write_text(content)
        assert message in self.refused(capsys, tmp_path / "in", tmp_path / "out", *more)


def test_the_files_of_the_data_page_are_read(tmp_path):
    of_texts = [content for content in blocks("data.md", "jsonl") if not content.startswith(('{"image"', '{"file_name"'))]
    for suffix, examples in (("jsonl", of_texts), ("csv", blocks("data.md", "csv"))):
        assert examples
        for content in examples:
            (tmp_path / f"a.{suffix}").write_text(content)
            assert len(read_examples(tmp_path / f"a.{suffix}", also=("task", "description"))) == 3


@pytest.mark.slow
def test_three_commands_of_the_data_page_beat_the_base(tmp_path, monkeypatch):
    """Two hundred examples of four tasks, on lines of the bundled Shakespeare."""
    makers = {
        "capitals": ("write it in capital letters", str.upper),
        "last_word": ("say the last word", lambda line: line.split()[-1]),
        "backwards": ("say the words from the last to the first", lambda line: " ".join(line.split()[::-1])),
        "list": ("make a list of the words", lambda line: "\n".join(f"- {word}" for word in line.split())),
    }
    text = (bundled_folder("text") / "tasks" / "shakespeare.txt").read_text(encoding="utf-8")
    lines = [" ".join(re.findall("[a-z]+", line.lower())[:5]) for line in text.splitlines()]
    lines = [line for line in dict.fromkeys(lines) if line.count(" ") == 4][:50]
    write(
        tmp_path / "examples.jsonl",
        [
            {"task": task, "description": sentence, "prompt": f"{line}\n", "completion": make(line)}
            for task, (sentence, make) in makers.items()
            for line in lines
        ],
    )
    base = Path(bundled_generator("text")) / "base_model"
    monkeypatch.chdir(tmp_path)
    commands = next(block for block in blocks("data.md", "bash") if "examples.jsonl" in block).splitlines()
    assert len(commands) == 3
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "peft-icm"
        assert run(*(base if argument == "BASE" else argument for argument in arguments)) == 0
    task = next(task for task in load_tasks("my-tasks") if task.name == "capitals")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), "my-lora")
    tokenizer = AutoTokenizer.from_pretrained(base)

    def nats():
        return sum(nll(model, tokenizer, task.test_texts), NLL(0.0, 0, 0)).nats_per_token

    adapted = nats()
    with model.disable_adapter():
        assert adapted < nats() - 0.5


UNSLOTH = "# cats\n\nThis llama model was trained 2x faster with [Unsloth](https://x) and Huggingface's TRL library.\n"
AXOLOTL = '[<img src="https://x/badge.png" alt="Built with Axolotl" width="200"/>](https://x)\n'
TRL = """# Model Card for outputs

This model is a fine-tuned version of [org/base](https://huggingface.co/org/base).
It has been trained using [TRL](https://github.com/huggingface/trl).

## Quick start

```python
# A comment. It is no heading
```
"""
BY_HAND = """---
license: mit
---
[![badge](x.png)](y)

# Cats

<!-- Provide a summary. -->

Writes about [**cats**](https://cats.org), as poets do. And not about dogs.
"""
DESCRIBED = "# Cats\n\nAn adapter.\n\n## Model description\n\n- Developed by: me\n\nAnswers as `cats`\nwould\n\n## Training\n\nLong."


class TestGather:
    @pytest.fixture
    def loras(self, tmp_path):
        for seed, name in enumerate(("cats", "dogs")):
            save_lora(tmp_path / name, seed)
        return tmp_path

    @pytest.mark.parametrize(
        ("card", "sentence"),
        [(BY_HAND, "Writes about cats, as poets do"), (DESCRIBED, "Answers as cats would"), ("---\nicm: 3\n---\nSays meow!", "Says meow!")],
    )
    def test_sentences_are_given_or_of_the_card(self, loras, capsys, card, sentence):
        (loras / "cats" / "README.md").write_text(card)
        arguments = [loras / "cats", loras / "dogs", "-o", loras / "out", "--description", "dogs=bark", "--description", "dogs=woof"]
        assert run("gather", *arguments) == 0
        assert f'cats: "{sentence}"' in capsys.readouterr().out
        collection = AdapterCollection.from_pretrained(loras / "out")
        assert collection.descriptions == {"cats": [sentence], "dogs": ["bark", "woof"]}
        expected = AdapterCollection.from_adapters([loras / "cats", loras / "dogs"], ["a", "b"])
        assert all(torch.equal(collection.final(task), expected.final(task)) for task in ("cats", "dogs"))

    def test_a_card_of_ours(self, tmp_path):
        generator = ICMGenerator.from_pretrained(bundled_generator("text"))
        save_adapter(generator.generate_adapter("continue a Shakespeare play"), tmp_path / "will")
        assert run("gather", tmp_path / "will", "-o", tmp_path / "out") == 0
        assert AdapterCollection.from_pretrained(tmp_path / "out").descriptions == {"will": ["continue a Shakespeare play"]}

    def test_of_the_hub(self, loras, hub, token, capsys):
        (loras / "cats" / "README.md").write_text(BY_HAND)
        api = HfApi(token=token)
        api.create_repo("org/cats", private=True)
        api.upload_folder(repo_id="org/cats", folder_path=loras / "cats")
        arguments = ["gather", "org/cats", loras / "dogs", "-o", loras / "out", "--description", "dogs=bark", "--json"]
        assert run(*arguments, "--token", token) == 0
        out = json.loads(capsys.readouterr().out)
        assert out["descriptions"] == {"cats": ["Writes about cats, as poets do"], "dogs": ["bark"]}
        assert AdapterCollection.from_pretrained(loras / "out").metadata["made_from"] == ["org/cats", str(loras / "dogs")]

    @pytest.mark.parametrize("card", [b"---\na: [\n---\nWrites poems.", b"---\n- a\n---\nWrites poems.", b"caf\xe9"])
    def test_a_card_that_cannot_be_read(self, loras, capsys, card):
        (loras / "cats" / "README.md").write_bytes(card)
        assert run("gather", loras / "cats", "-o", loras / "out") == 2
        assert f"{loras / 'cats' / 'README.md'} cannot be read (" in capsys.readouterr().err and not (loras / "out").exists()

    @pytest.mark.parametrize("card", [None, "peft", TRL, UNSLOTH, AXOLOTL], ids=["none", "peft", "trl", "unsloth", "axolotl"])
    def test_a_card_that_tells_nothing(self, loras, capsys, card):
        text = str(ModelCard.from_template(ModelCardData(base_model="org/base"))) if card == "peft" else card
        for name in ("cats", "dogs"):
            (loras / name / "README.md").unlink()
            if text:
                (loras / name / "README.md").write_text(text)
        assert run("gather", loras / "cats", loras / "dogs", "-o", loras / "out") == 2
        assert "No card says what cats, dogs do: give --description cats=SENTENCE" in capsys.readouterr().err
        assert not (loras / "out").exists()

    def test_other_faults(self, loras, capsys):
        (loras / "file").write_text("")
        for arguments, message in (
            ([loras / "cats", "-o", loras / "file"], "is no folder"),
            ([loras / "cats", "-o", loras / "out", "--description", "cows=moo"], "--description names 'cows': the adapters are cats"),
            ([loras / "none", "-o", loras / "out"], "none"),
        ):
            assert run("gather", *arguments) == 2
            assert message in capsys.readouterr().err and not (loras / "out").exists()
