"""Language modelling as a task: real text in, or prompts and completions, or conversations."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from ..disk import safe_name
from .fields import at_least, check_sentences, make_tasks, path_from_json, read_tasks_json
from .likelihood import NLL, context_size, nll, windows, wrong_tokens
from .records import SUFFIXES, Record, read_examples, records
from .token_blocks import TokenBlocks, encoded, packed, padded

__all__ = ["NLL", "LanguageModelingTask", "TokenBlocks", "context_size", "load_tasks", "nll", "windows", "wrong_tokens"]

DOCUMENT_SEPARATOR = "\n\x00\n"


@dataclass
class LanguageModelingTask:
    """A text domain.

    Args:
        name (`str`): Short name, a valid file name.
        descriptions (`list[str]`): Sentences that ask for it; the first is the canonical one. Here as below one string is a list of one.
        train_texts (`list[Record]`): What is trained on: documents (`str`), or [`Completion`]s, or [`Conversation`]s.
        test_texts (`list[Record]`): Held-out ones.
        unseen_descriptions (`list[str]`): Sentences that ask for it and that no generator is trained on; for evaluation.

    Raises:
        `ValueError`: If the name is no file name ([`safe_name`]), or something else is no list of strings or of records of one kind,
            or a description is blank, or there is none.

    Example:

    ```python
    >>> task = LanguageModelingTask("poems", ["write poems"], ["Roses are red."], ["Violets are blue."])
    >>> task.descriptions[0]
    'write poems'

    ```
    """

    name: str
    descriptions: list[str]
    train_texts: list[Record]
    test_texts: list[Record]
    unseen_descriptions: list[str] = field(default_factory=list)
    holds: ClassVar[str] = "texts"  # which the base must read

    def __post_init__(self) -> None:
        safe_name(self.name, "task")
        check_sentences(self)
        for name in ("train_texts", "test_texts"):
            setattr(self, name, records(getattr(self, name), f"{name} of task {self.name!r}"))

    def train_dataset(
        self, tokenizer: Any, block_size: int = 256, blocks_per_epoch: int | None = None, packing: bool | None = None
    ) -> TokenBlocks:
        """The training records as tokens, each between BOS and EOS where the tokenizer has them.

        Of a completion or a conversation what is to be said is the target, the rest is read.

        Args:
            tokenizer (`PreTrainedTokenizerBase`): Of the base model.
            block_size (`int`, defaults to 256): Tokens in a row, at least two. Of packed records the short tail is dropped; a longer one
                that stands alone loses the beginning of its prompt and, where that is not enough, its end.
            blocks_per_epoch (`int`, *optional*): Rows in an epoch, drawn anew from all of them in each; by default each row once.
            packing (`bool`, *optional*): Whether records follow each other in rows of `block_size`; by default documents do, and
                completions and conversations stand alone.

        Returns:
            [`TokenBlocks`]

        Raises:
            `ValueError`: If the records do not fill one block, a number is too small, or the tokenizer
                has no chat template for conversations.
        """
        at_least(2, block_size=block_size)  # a token is predicted from those before it
        rows = [encoded(tokenizer, record) for record in self.train_texts]
        together = all(isinstance(record, str) for record in self.train_texts) if packing is None else packing
        blocks = (packed if together else padded)(rows, block_size, blocks_per_epoch)
        if not len(blocks.blocks):
            count = sum(len(ids) for ids, _ in rows)
            advice = "give it more to train on, or take a smaller block_size"
            raise ValueError(f"Task {self.name!r} has {count} training tokens, less than one block of {block_size}: {advice}.")
        return blocks


def load_tasks(folder: str | Path) -> list[LanguageModelingTask]:
    r"""Read the tasks of a folder.

    `tasks.json` holds `{"tasks": [{"name", "descriptions", "unseen_descriptions", "train", "test"}]}`, where train and test name a file
    (or null): of examples, `.jsonl`, `.csv` or `.parquet` ([`read_examples`]), or else a text whose documents are separated by a line with
    a NUL character. Blank documents are left out, and so may `unseen_descriptions` be. Names of files are relative to the folder and stay
    inside it, or absolute.

    Args:
        folder (`str` or `Path`): The folder.

    Returns:
        `list[LanguageModelingTask]`

    Raises:
        `ValueError`: If there is no readable `tasks.json`, it names a file that is not there, is no UTF-8 or lies outside, a field is of
            another type, or a file of examples is not as it should be; the message names file, task and field.
    """
    document = read_tasks_json(folder, '{"tasks": [{"name", "descriptions", "train", "test"}]}')

    def read(entry: dict[str, Any], split: str) -> list[Record]:
        name = entry.get(split)
        if name is None:
            return []
        file = path_from_json(folder, name, split)
        if not file.is_file():
            raise ValueError(f"{split} names {name}, which is not there.")
        if file.suffix.lower() in SUFFIXES:
            return [record for record, _ in read_examples(file)]
        try:
            texts = file.read_text(encoding="utf-8").split(DOCUMENT_SEPARATOR)
        except UnicodeDecodeError as error:
            raise ValueError(f"{split} names {name}, which is no text in UTF-8 ({error}).") from error
        return [text for text in texts if text.strip()]

    def make(entry: dict[str, Any]) -> LanguageModelingTask:
        unseen = entry.get("unseen_descriptions", [])
        return LanguageModelingTask(entry["name"], entry["descriptions"], read(entry, "train"), read(entry, "test"), unseen)

    return make_tasks(folder, document["tasks"], make)
