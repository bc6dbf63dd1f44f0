"""The stages that build the open world: one generator for every noun that has pictures, trained through the loss of detecting it.

Classes under `seen` of nouns.json are trained on; those under `choose` of open_world.json, out of them, only choose settings. Those under
`unseen` are drawn in tests alone.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from demo_bundle import BUNDLED, TASK_PHRASINGS, bundled_size, task_encoder, task_trainer
from demo_detector import SCENE, STEP
from demo_scenes import COLOUR_STYLES, GLYPH_STYLES, TEST_STYLES, Icon, Icons, photographs, scenes, write_coco
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import AutoProcessor, Florence2ForConditionalGeneration

from peft_icm import ICMConfig, ICMGenerator
from peft_icm.conditioning.spelling import words_of
from peft_icm.generator.text_reading import TextReader
from peft_icm.tasks.annotated_images import AnnotatedImage, crops, load_coco
from peft_icm.tasks.detection import DetectionTask
from peft_icm.training.conditions import sentences_of
from peft_icm.training.reading import fit_text_reader

HERE = Path(__file__).parent
UNSEEN = json.loads((HERE / "nouns.json").read_text(encoding="utf-8"))["unseen"]
SPLIT = json.loads((HERE / "open_world.json").read_text(encoding="utf-8"))
TRAIN_SCENES, TEST_SCENES, CHOOSE_SCENES = 24_000, 2_400, 1_200

LORA = {"r": 4, "lora_alpha": 16, "target_modules": r".*language_model.*\.(q_proj|k_proj|v_proj|fc2)|lm_head"}
DATA = {"location_step": STEP, "negatives": 2 / 3}
STEPS = 3000
PRIOR_NOUNS, PRIOR_FEW, PRIOR_SCENES = SPLIT["choose"][::4], 64, 112  # scenes to learn from, and all
SHOWN, SHOWN_PICTURES, SHOWN_SCENES = (
    ("panda", "rocket", "camel", "trophy"),
    8,
    12,
)  # unseen classes of the demo, named before they were tested
SHARED = {"text": "../../encoder", "images": "../../detection/generator/base_model"}
LICENCES = """# Licences of what is bundled

The generator was trained by `examples/build_demo/build_demo_models.py open-generator`: Apache-2.0. The scenes in `tasks/images/` are
icons of noto, twemoji and openmoji pasted on photographs, as those of `../detection`, under the licences that `../detection/LICENSES.md`
names; where they differ, the stricter one holds (CC BY-SA 4.0).
"""
ANSWER = "object"  # the base has no name for what it is asked to find


def spoken(noun: str) -> str:
    """`"hot-dog"` -> `"hot dog"`."""
    return noun.replace("-", " ")


def draw_open(build: Path) -> None:
    """`open/train.json`, `open/choose.json`, `open/test.json` with their pictures; test sets in styles and on photographs of their own."""
    icons = Icons(build)
    folder = build / "open"
    names = sorted(icons.seen)
    backgrounds = photographs(build, test=False, crops=2000, size=SCENE, seed=12)
    trained = {name: icons.seen[name] for name in names if name not in SPLIT["choose"]}
    found = scenes(trained, backgrounds, TRAIN_SCENES, seed=12)
    write_coco(found, folder / "train", folder / "train.json", sorted(trained), total=TRAIN_SCENES)

    def drawn(nouns: list[str], styles: tuple[str, ...]) -> dict[str, list[Icon]]:
        each = {name: [icons.draw(style, name, name) for style in styles] for name in nouns}
        return {name: [icon for icon in found if icon] for name, found in each.items()}

    held = photographs(build, test=True, crops=800, size=SCENE, seed=13)
    others = drawn([name for name in names if name not in (*SPLIT["choose"], *SPLIT["tested"])], TEST_STYLES)
    for split, nouns, count, seed in (("choose", SPLIT["choose"], CHOOSE_SCENES, 13), ("test", UNSEEN + SPLIT["tested"], TEST_SCENES, 14)):
        chosen = drawn(nouns, TEST_STYLES)
        found = scenes(chosen, held, count, seed=seed, distractors=others, others=0.3, jitter=0.0)
        write_coco(found, folder / split, folder / f"{split}.json", [*chosen, *others], total=count)


def open_tasks(build: Path, nouns: list[str], split: str) -> list[DetectionTask]:
    """One task for each noun, of the scenes of one split as training and test pictures."""
    images = load_coco(build / "open" / f"{split}.json", build / "open" / split)
    return [open_task(noun, images) for noun in nouns]


def open_task(noun: str, images: list[AnnotatedImage]) -> DetectionTask:
    """The task of one noun. It is tested on the scenes that show it and on as many that do not."""
    positive = [image for image in images if noun in image.labels]
    negative = [image for image in images if noun not in image.labels]
    return DetectionTask(noun, [f"detect {spoken(noun)}"], noun, images, positive + negative[: len(positive)], answer=ANSWER)


class Studio:
    """Draws scenes of any noun in the styles that are trained on: what a user has of a class to show or to teach it.

    Args:
        build (`Path`): With icons and photographs.
    """

    def __init__(self, build: Path):
        self.icons = Icons(build)
        self.others = {name: icons for name, icons in self.icons.seen.items() if name not in (*SPLIT["choose"], *SPLIT["tested"])}
        self.backgrounds = photographs(build, test=False, crops=400, size=SCENE, seed=15)

    def of(self, noun: str) -> list[Icon]:
        """The noun in the styles that are trained on."""
        return [icon for style in COLOUR_STYLES + GLYPH_STYLES if (icon := self.icons.draw(style, noun, noun))]

    def draw(self, noun: str, count: int, seed: int) -> list[AnnotatedImage]:
        """`count` scenes, three of five with the noun."""
        own = {noun: self.of(noun)}
        others = {name: icons for name, icons in self.others.items() if name != noun}
        shown = -(-count * 3 // 5)
        found: dict[bool, list[AnnotatedImage]] = {True: [], False: []}
        for scene in scenes(own, self.backgrounds, 10 * count, seed=seed, distractors=others, others=0.5):
            found[noun in scene.labels].append(AnnotatedImage(scene.picture, [list(box) for box in scene.boxes], scene.labels))
            if len(found[True]) >= shown and len(found[False]) >= count - shown:
                break
        return found[True][:shown] + found[False][: count - shown]


class SeenExamples(Dataset[dict[str, Tensor]]):
    """Examples whose pictures the tower has looked at: no LoRA is on it, and what it sees is the same in every step.

    Args:
        rows (`list[int]`): Of the pictures in `tokens`.
        labels (`Tensor`): `[n, T]` answers.
        tokens (`Tensor`): `[N, 65, d]` image tokens of all pictures.
        prompt (`Tensor`): `[t, d]` embeddings of what is asked.
    """

    def __init__(self, rows: list[int], labels: Tensor, tokens: Tensor, prompt: Tensor):
        self.rows, self.labels, self.tokens, self.prompt = rows, labels, tokens, prompt

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        embedded = torch.cat([self.tokens[self.rows[index]].float(), self.prompt])
        return {"inputs_embeds": embedded, "attention_mask": torch.ones(len(embedded), dtype=torch.long), "labels": self.labels[index]}


@dataclass
class SeenTask(DetectionTask):
    """A task whose training pictures were looked at once for all tasks: `seen` is what [`look`] returned."""

    seen: Any = None

    def train_dataset(self, processor: Any, **options: Any) -> Any:
        """As that of [`DetectionTask`], with embeddings in the place of pixels."""
        found, (rows, tokens, prompt) = super().train_dataset(processor, **options), self.seen
        return SeenExamples([rows[_key(image)] for image in found.images], found.labels, tokens, prompt)


def _key(image: AnnotatedImage) -> str | int:
    """The file of a picture, or the picture where there is none."""
    return image.image if isinstance(image.image, str) else id(image.image)


@torch.no_grad()
def look(florence: Any, processor: Any, images: list[AnnotatedImage]) -> tuple[dict[Any, int], Tensor, Tensor]:
    """Row of each picture, image tokens `[N, 65, d]` of all in half precision, embeddings of the prompt `[t, d]`."""
    parts = []
    for start in tqdm(range(0, len(images), 128), desc="looking", mininterval=10):
        pictures = [image.load() for image in images[start : start + 128]]
        pixels = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
        with torch.autocast("cpu", torch.bfloat16):
            parts.append(florence.get_image_features(pixels).pooler_output.half())
    ids = processor(text="<OD>", images=images[0].load(), return_tensors="pt")["input_ids"][0, parts[0].shape[1] :]
    return {_key(image): row for row, image in enumerate(images)}, torch.cat(parts), florence.get_input_embeddings()(ids).clone()


def open_generator(build: Path) -> None:
    """Train through the loss of the tasks; settings were chosen on the nouns under `choose`."""
    trained = json.loads((build / "open" / "train.json").read_text())["categories"]
    florence = Florence2ForConditionalGeneration.from_pretrained(build / "florence", dtype=torch.float32).eval()
    seen = look(
        florence, AutoProcessor.from_pretrained(build / "florence"), load_coco(build / "open" / "train.json", build / "open" / "train")
    )
    tasks = open_tasks(build, [entry["name"] for entry in trained], "train")
    trainer = task_trainer(
        build,
        "open_generator",
        florence,
        task_encoder(build, "florence", "images"),
        LORA,
        [SeenTask(**vars(task), seen=seen) for task in tasks],
        eval_tasks=open_tasks(build, SPLIT["choose"], "choose"),
        max_steps=STEPS,
        per_device_train_batch_size=64,
        per_device_eval_batch_size=64,
        learning_rate=1e-3,
        warmup_steps=0.05,
        dataset_kwargs=DATA,
        eval_steps=500,
    )
    trainer.train()
    trainer.generator.save_pretrained(build / "open_generator")


def open_prior(build: Path) -> None:
    """Fit the weight of the generator as a prior of few examples, on some of the nouns that choose settings."""
    generator = ICMGenerator.from_pretrained(build / "open_generator")
    florence = Florence2ForConditionalGeneration.from_pretrained(build / "florence", dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(build / "florence")
    studio = Studio(build)
    held_out = []
    for noun in PRIOR_NOUNS:
        shown = crops(studio.draw(noun, 16, seed=1000), noun)[:8]
        drawn = studio.draw(noun, PRIOR_SCENES, seed=2000)
        task = SeenTask(**vars(DetectionTask(noun, [f"detect {spoken(noun)}"], noun, drawn, [], answer=ANSWER)))
        task.seen = look(florence, processor, drawn)
        examples = task.train_dataset(processor, location_step=STEP, negatives=10.0)
        order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0)).tolist()
        parts = [[examples[index] for index in part] for part in (order[:PRIOR_FEW], order[PRIOR_FEW:])]
        held_out.append((generator.task_vector(images=shown), *parts))
    print(generator.fit_prior(held_out, florence, progress=True))
    generator.save_pretrained(build / "open_generator")


def open_reader(build: Path) -> None:
    """Give `open_generator/` what tells its nouns from others, where it was trained by an older ICMTrainer, which fitted none."""
    generator = ICMGenerator.from_pretrained(build / "open_generator")
    training: dict[str, Any] = generator.config.training or {}
    sentences = [[task["description"]] for task in generator.config.tasks or []]
    said = [generator.encoder.read("text", sentences_of(task, TASK_PHRASINGS, training["seed"])) for task in sentences]
    generator.text_reader = TextReader(generator.config.text_dim, len(sentences))
    reading = fit_text_reader(generator.text_reader, generator.encoder, sentences, said, training["seed"])
    generator.config.text_reader, generator.config.training = True, {**training, "reading": reading}
    generator.config.words = words_of(sentence for task in sentences for sentence in task)
    generator.save_pretrained(build / "open_generator")
    print(reading)


def write_generator(generator: Path, target: Path) -> None:
    """A generator in bf16, its reader in fp32, on the encoder and the base that lie in the other bundles."""
    ICMGenerator.from_pretrained(generator, dtype=torch.bfloat16).save_pretrained(target)
    shutil.rmtree(target / "encoder")
    config = ICMConfig.from_pretrained(target)
    parts = {
        name: {**part, "checkpoint": name, "folder": SHARED[name]}
        for name, part in config.encoder["parts"].items()  # type: ignore[index]
    }
    config.encoder = {name: value for name, value in (config.encoder or {}).items() if name != "folder"} | {"parts": parts}
    config.layout = {**(config.layout or {}), "base_model_name_or_path": None}
    config.save_pretrained(target)


def open_bundle(build: Path) -> None:
    """Write what the package carries: the generator in bf16 on the detection bundle's base, and scenes of a few unseen classes."""
    target = BUNDLED / "open"
    shutil.rmtree(target, ignore_errors=True)
    (target / "tasks" / "images").mkdir(parents=True)
    write_generator(build / "open_generator", target / "generator")
    document = json.loads((build / "open" / "test.json").read_text())
    numbers = {entry["name"]: entry["id"] for entry in document["categories"]}
    kept: dict[str, set[int]] = {"train": set(), "test": set()}
    for noun in SHOWN:
        found = sorted({entry["image_id"] for entry in document["annotations"] if entry["category_id"] == numbers[noun]})
        kept["train"] |= set(found[:SHOWN_PICTURES]) - kept["test"]
        kept["test"] |= set(found[SHOWN_PICTURES : SHOWN_PICTURES + SHOWN_SCENES]) - kept["train"]
    for split, images in kept.items():
        part = {
            "images": [entry for entry in document["images"] if entry["id"] in images],
            "annotations": [entry for entry in document["annotations"] if entry["image_id"] in images],
            "categories": document["categories"],
        }
        for entry in part["images"]:
            shutil.copy(build / "open" / "test" / entry["file_name"], target / "tasks" / "images")
        (target / "tasks" / f"{split}.json").write_text(json.dumps(part))
    entries = [{"name": noun, "label": noun, "descriptions": [f"detect {spoken(noun)}s"], "answer": ANSWER} for noun in SHOWN]
    splits = {split: {"annotations": f"{split}.json", "images": "images"} for split in kept}
    (target / "tasks" / "tasks.json").write_text(json.dumps({**splits, "tasks": entries}, indent=1) + "\n", encoding="utf-8")
    (target / "LICENSES.md").write_text(LICENCES, encoding="utf-8")
    print(bundled_size())
