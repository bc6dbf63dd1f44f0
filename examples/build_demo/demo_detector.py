"""A small Florence-2 of the real class, trained on demo scenes in three stages: tower, answers, both together.

The seq2seq loss alone stands still for thousands of steps before such a model learns to point. What gets it over that: a first stage
in which the encoder's image tokens name the object under them and its box, through the very embeddings of the location tokens that
the decoder answers with. Those start as smooth functions of the place, so that a neighbouring bin is a small error.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from demo_scenes import CLASSES, COLOUR_STYLES, GLYPH_STYLES, TAUGHT, Icons, photographs, scenes
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import (
    CLIPImageProcessor,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Florence2Processor,
    PreTrainedTokenizerFast,
)

SIZE = 64  # pixels that the model sees
SCENE = 128  # pixels of a scene
GRID = 8  # image tokens a side
STEP = 20  # a location is one of 50 bins of 1.28 pixels
WIDTH = 128
OTHERS = 0.45  # share of objects that the base learns to see and never to name: adapters do
COCO = """person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign, parking meter, bench,
bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard,
sports ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl,
banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv,
laptop, mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear,
hair drier, toothbrush""".replace("\n", " ").split(", ")
PAIRED = ("od", "ocr", "cap", "ncap", "dcap", "grounding", "seg", "region_cap", "region_to_desciption", "proposal", "poly")
TAGS = [tag for name in PAIRED for tag in (f"<{name}>", f"</{name}>")] + ["<sep>", "<and>"]  # spelt as Florence-2 spells them
PARSING = {
    "pure_text": {},
    "description_with_bboxes": {},
    "phrase_grounding": {"banned_grounding_tokens": []},
    "bboxes": {},
    "description_with_bboxes_or_polygons": {},
}


def processor() -> Florence2Processor:
    """Florence-2's processor: its prompts, its tags and 1,000 locations, over a byte-level BPE of COCO's words."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    prompts = "Locate the objects with category name in the image. What is the region ? Locate the region proposals in the image."
    corpus = [prompts] * 4 + [text for name in COCO for text in (name, f"Locate {name} in the image.")] * 4
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=720, special_tokens=special, initial_alphabet=alphabet))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        model_max_length=96,
        clean_up_tokenization_spaces=False,
    )
    locations = [f"<loc_{index}>" for index in range(1000)]
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in [*TAGS, *locations]], special_tokens=True)
    pictures = CLIPImageProcessor(size={"height": SIZE, "width": SIZE}, do_center_crop=False)
    pictures.image_seq_length = GRID * GRID + 1
    return Florence2Processor(pictures, tokenizer, post_processor_config=PARSING)


def model(found: Florence2Processor) -> Florence2ForConditionalGeneration:
    """A Florence-2 of 2 M parameters with fresh weights; location embeddings are random Fourier features of the place."""
    tokenizer = found.tokenizer
    torch.manual_seed(0)
    vision = {
        "embed_dim": (64, WIDTH), "depths": (1, 2), "num_heads": (2, 4), "num_groups": (2, 4), "patch_size": (7, 3),
        "patch_stride": (4, 2), "patch_padding": (3, 1), "patch_prenorm": (False, True), "window_size": GRID, "drop_path_rate": 0.0,
        "projection_dim": WIDTH,
    }  # fmt: skip
    text = {
        "d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
        "encoder_ffn_dim": 3 * WIDTH, "decoder_ffn_dim": 3 * WIDTH, "vocab_size": len(tokenizer), "max_position_embeddings": 160,
        "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "decoder_start_token_id": tokenizer.eos_token_id,
        "forced_eos_token_id": None, "forced_bos_token_id": None,
    }  # fmt: skip
    config = Florence2Config(vision_config=vision, text_config=text, image_token_id=tokenizer.image_token_id)
    built = Florence2ForConditionalGeneration(config)
    generation = built.generation_config
    generation.bos_token_id, generation.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    generation.pad_token_id, generation.decoder_start_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    generation.forced_bos_token_id = generation.forced_eos_token_id = None
    place = torch.arange(1000)[:, None] / 1000
    waves = torch.cos(2 * math.pi * (torch.randn(WIDTH) * 3 * place + torch.rand(WIDTH)))
    with torch.no_grad():
        built.get_input_embeddings().weight.normal_(std=0.06)
        built.get_input_embeddings().weight[locations(found, torch.arange(1000))] = 0.08 * waves
    return built


def locations(found: Florence2Processor, bins: Tensor) -> Tensor:
    """Token ids of location bins; the 1,000 tokens stand in order."""
    return bins + found.tokenizer.convert_tokens_to_ids("<loc_0>")


# ---------------------------------------------------------------------- data
def draw_scenes(build: Path, count: int, seed: int = 0) -> None:
    """`scenes.npz`: pictures `[N, 64, 64, 3]`, boxes `[N, 4, 4]` in scene pixels (-1 where none), labels `[N, 4]`."""
    icons = Icons(build)
    taught = icons.of_classes(TAUGHT, COLOUR_STYLES + GLYPH_STYLES)
    own = {icon for names in CLASSES.values() for icon in names}
    others = {name: found for name, found in icons.seen.items() if name not in own}
    names = [*TAUGHT, *others]
    backgrounds = photographs(build, test=False, crops=3000, size=SCENE)
    pictures = np.zeros((count, SIZE, SIZE, 3), np.uint8)
    boxes, labels = np.full((count, 4, 4), -1, np.int16), np.full((count, 4), -1, np.int16)
    found = scenes(taught, backgrounds, count, seed=seed, distractors=others, others=OTHERS)
    for index, scene in enumerate(tqdm(found, total=count, desc="scenes", mininterval=10)):
        pictures[index] = np.asarray(scene.picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC))
        for place, (box, label) in enumerate(zip(scene.boxes, scene.labels, strict=True)):
            boxes[index, place], labels[index, place] = box, names.index(label)
    np.savez(build / "scenes.npz", pictures=pictures, boxes=boxes, labels=labels, names=np.array(names))


class Scenes:
    """Batches of the drawn scenes.

    Args:
        build (`Path`): With `scenes.npz`.
        found (`Florence2Processor`): Tokens, mean and standard deviation.
    """

    def __init__(self, build: Path, found: Florence2Processor):
        data = np.load(build / "scenes.npz")
        self.pictures = torch.from_numpy(data["pictures"])
        self.boxes, self.labels = torch.from_numpy(data["boxes"]).float(), torch.from_numpy(data["labels"]).long()
        self.names = [str(name) for name in data["names"]]
        self.found = found
        self.mean, self.std = (torch.tensor(values) for values in (found.image_processor.image_mean, found.image_processor.image_std))
        bins = (self.boxes / SCENE * 1000 / STEP).floor().clamp(0, 1000 // STEP - 1)
        self.bins = (bins * STEP + STEP // 2).long()
        self.order = torch.where(self.labels >= 0, self.bins[..., 0] * 1000 + self.bins[..., 1], 10**9).argsort(1)
        tokenizer = found.tokenizer
        self.name_ids = [tokenizer(name, add_special_tokens=False)["input_ids"] for name in self.names]
        self.prompts = {
            task: tokenizer("<s>" + prompt + "</s>", add_special_tokens=False)["input_ids"]
            for task, prompt in found.task_prompts_without_inputs.items()
        }

    def pixels(self, rows: Tensor) -> Tensor:
        """`[B, 3, 64, 64]`, normalised."""
        return ((self.pictures[rows].float() / 255 - self.mean) / self.std).permute(0, 3, 1, 2)

    def under_tokens(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Of the object under each image token: label `[B, 64]` (-1 for none) and location bins `[B, 64, 4]`."""
        centre = (torch.arange(GRID) + 0.5) * SCENE / GRID
        x, y = centre.repeat(GRID), centre.repeat_interleave(GRID)
        label, bins = torch.full((len(rows), GRID * GRID), -1), torch.zeros(len(rows), GRID * GRID, 4, dtype=torch.long)
        for place in range(4):  # what was pasted later lies on top
            box = self.boxes[rows, place]
            inside = (x > box[:, :1]) & (x < box[:, 2:3]) & (y > box[:, 1:2]) & (y < box[:, 3:])
            label = torch.where(inside, self.labels[rows, place, None], label)
            bins = torch.where(inside[..., None], self.bins[rows, place, None], bins)
        return label, bins

    def episode(self, row: int, draw: np.random.Generator) -> tuple[list[int], list[int]]:
        """Prompt and answer of one of four tasks: all taught objects, all regions, one class, the class of a region."""
        tokenizer, taught = self.found.tokenizer, len(TAUGHT)
        objects = [(int(self.labels[row, place]), self.bins[row, place].tolist()) for place in self.order[row].tolist()]
        objects = [(label, box) for label, box in objects if label >= 0]
        start = tokenizer.convert_tokens_to_ids("<loc_0>")

        def answer(found: Sequence[tuple[int, list[int]]], named: bool = True) -> list[int]:
            return [token for label, box in found for token in [*(self.name_ids[label] if named else []), *(start + bin for bin in box)]]

        named = [(label, box) for label, box in objects if label < taught]
        choice = draw.random()
        if choice < 0.6 or not named:
            return self.prompts["<OD>"], answer(named)
        if choice < 0.7:
            return self.prompts["<REGION_PROPOSAL>"], answer(objects, named=False)
        label, box = named[int(draw.integers(len(named)))]
        if choice < 0.95:
            if draw.random() < 0.25:
                label = int(draw.integers(taught))
            prompt = self.found.task_prompts_with_input["<OPEN_VOCABULARY_DETECTION>"].format(input=self.names[label])
            return self._tokens(prompt), answer([entry for entry in named if entry[0] == label])
        region = "".join(f"<loc_{bin}>" for bin in box)
        return self._tokens(self.found.task_prompts_with_input["<REGION_TO_CATEGORY>"].format(input=region)), self.name_ids[label]

    def _tokens(self, prompt: str) -> list[int]:
        return self.found.tokenizer("<s>" + prompt + "</s>", add_special_tokens=False)["input_ids"]

    def batch(self, rows: Tensor, draw: np.random.Generator) -> dict[str, Tensor]:
        """Model inputs with labels."""
        pairs = [self.episode(row, draw) for row in rows.tolist()]
        tokenizer = self.found.tokenizer
        image = [tokenizer.image_token_id] * (GRID * GRID + 1)
        prompts = [torch.tensor(image + prompt) for prompt, _ in pairs]
        answers = [torch.tensor([tokenizer.bos_token_id, *answer, tokenizer.eos_token_id]) for _, answer in pairs]  # BART's form
        ids = nn.utils.rnn.pad_sequence(prompts, True, tokenizer.pad_token_id)
        labels = nn.utils.rnn.pad_sequence(answers, True, -100)
        return {"input_ids": ids, "attention_mask": (ids != tokenizer.pad_token_id).long(), "labels": labels}


# ---------------------------------------------------------------------- training
class Heads(nn.Module):
    """What the encoder's image tokens say in training: the object under them and its four locations; not part of the model."""

    def __init__(self, classes: int):
        super().__init__()
        self.name = nn.Linear(WIDTH, classes + 1)
        self.box = nn.Linear(WIDTH, 4 * WIDTH)

    def loss(self, tokens: Tensor, label: Tensor, bins: Tensor, embeddings: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Cross-entropy of names and of locations; embeddings are those of the location tokens `[50, WIDTH]`."""
        names = self.name(tokens)
        target = label + 1
        weight = torch.where(target > 0, 1.0, 0.25)
        name_loss = (F.cross_entropy(names.flatten(0, 1), target.flatten(), reduction="none") * weight.flatten()).sum() / weight.sum()
        objects = label >= 0
        scores = self.box(tokens[objects]).view(-1, 4, WIDTH) @ embeddings.T
        wanted = (bins[objects] - STEP // 2) // STEP
        box_loss = smooth_nll(scores.log_softmax(-1), wanted, 1, 0, scores.shape[-1] - 1).mean()
        right = (names[objects].argmax(-1) == target[objects]).float().mean()
        off = (scores.argmax(-1) - wanted).abs().float().mean() * STEP / 1000 * SIZE
        return name_loss + 0.5 * box_loss, {"named": right.item(), "off": off.item(), "name": name_loss.item(), "box": box_loss.item()}


def smooth_nll(logs: Tensor, target: Tensor, step: int, low: int, high: int) -> Tensor:
    """0.7 of the negative log-likelihood of a bin and 0.15 of each neighbour's."""
    near = [logs.gather(-1, (target + shift).clamp(low, high)[..., None])[..., 0] for shift in (-step, step)]
    return -(0.7 * logs.gather(-1, target[..., None])[..., 0] + 0.15 * near[0] + 0.15 * near[1])


class Stage:
    """One stage of training: optimiser, schedule, log, and the weights at the end of each five hundred steps.

    Args:
        build (`Path`): Where `florence/` and `heads.pt` go.
        florence (`Florence2ForConditionalGeneration`): The model.
        heads (`Heads`): Of the dense loss.
        found (`Florence2Processor`): Saved beside the model.
        steps (`int`): Steps of the stage.
        rate (`float`): Peak learning rate.
    """

    def __init__(self, build: Path, florence: Any, heads: Heads, found: Florence2Processor, steps: int, rate: float):
        self.build, self.florence, self.heads, self.found, self.steps = build, florence, heads, found, steps
        self.parameters = [p for p in [*florence.parameters(), *heads.parameters()] if p.requires_grad]
        plain = [p for p in self.parameters if p.ndim < 2]
        groups = [{"params": [p for p in self.parameters if p.ndim >= 2]}, {"params": plain, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=0.03, betas=(0.9, 0.98))
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._factor)
        self.start, self.history = time.time(), []

    def _factor(self, step: int) -> float:
        return min(1.0, (step + 1) / 200) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / self.steps)))

    def step(self, loss: Tensor, figures: dict[str, float]) -> None:
        """Descend, and log the mean of every fifty steps."""
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.scheduler.step()
        self.history.append(figures)
        done = len(self.history)
        if done % 50 == 0:
            means = {key: round(float(np.mean([row[key] for row in self.history[-50:]])), 3) for key in figures}
            print(json.dumps({"step": done, "seconds": round(time.time() - self.start), **means}), flush=True)
        if done % 500 == 0 or done == self.steps:
            save(self.florence, self.found, self.build / "florence")
            torch.save(self.heads.state_dict(), self.build / "heads.pt")


def _rows(count: int, steps: int, batch: int) -> Iterator[Tensor]:
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < batch:
            order = torch.randperm(count)
        yield order[:batch]
        order = order[batch:]


def train_tower(build: Path, steps: int = 2200, batch: int = 64, rate: float = 2e-3) -> None:
    """First stage: tower and encoder alone, on the dense loss."""
    torch.manual_seed(0)
    found = processor()
    florence = model(found).train()
    data = Scenes(build, found)
    heads = Heads(len(data.names))
    print(f"{sum(p.numel() for p in florence.parameters()):,} parameters, {len(data.pictures):,} scenes")
    stage = Stage(build, florence, heads, found, steps, rate)
    coarse = locations(found, torch.arange(STEP // 2, 1000, STEP))
    prompt = torch.tensor(data.prompts["<OD>"])
    for rows in _rows(len(data.pictures), steps, batch):
        embeddings = florence.get_input_embeddings().weight
        with torch.autocast("cpu", torch.bfloat16):
            image = florence.get_image_features(data.pixels(rows)).pooler_output
            words = torch.cat([image, embeddings[prompt].expand(batch, -1, -1).to(image.dtype)], 1)
            tokens = florence.model.language_model.encoder(inputs_embeds=words)[0]
        stage.step(*heads.loss(tokens[:, 1 : GRID * GRID + 1].float(), *data.under_tokens(rows), embeddings[coarse]))


@torch.no_grad()
def _see(florence: Any, data: Scenes, batch: int = 256) -> Tensor:
    """What the tower sees in every scene: `[N, C, 8, 8]` in half precision."""
    count = len(data.pictures)
    parts = []
    for start in tqdm(range(0, count, batch), desc="tower", mininterval=10):
        with torch.autocast("cpu", torch.bfloat16):
            parts.append(florence.model.vision_tower(data.pixels(torch.arange(start, min(start + batch, count)))).last_hidden_state.half())
    return torch.cat(parts)


def train_answers(build: Path, steps: int = 3000) -> None:
    """Second stage: what the frozen tower sees is computed once; projector, encoder and decoder learn to answer."""
    _answer(build, steps, rate=1.5e-3, seed=1, frozen=True)


def train_together(build: Path, steps: int = 1800) -> None:
    """Third stage: everything, from the pictures."""
    _answer(build, steps, rate=5e-4, seed=2, frozen=False)


def _answer(build: Path, steps: int, *, rate: float, seed: int, frozen: bool, batch: int = 64) -> None:
    torch.manual_seed(seed)
    draw = np.random.default_rng(seed)
    found = processor()
    florence = Florence2ForConditionalGeneration.from_pretrained(build / "florence", dtype=torch.float32)
    data = Scenes(build, found)
    heads = Heads(len(data.names))
    heads.load_state_dict(torch.load(build / "heads.pt", weights_only=True))
    seen = _see(florence, data) if frozen else None
    florence.train().model.vision_tower.requires_grad_(not frozen)
    stage = Stage(build, florence, heads, found, steps, rate)
    coarse = locations(found, torch.arange(STEP // 2, 1000, STEP))
    low, high = int(coarse[0]), int(coarse[-1])
    for rows in _rows(len(data.pictures), steps, batch):
        embeddings = florence.get_input_embeddings().weight
        inputs = data.batch(rows, draw)
        labels = inputs["labels"]
        shifted = F.pad(labels[:, :-1], (1, 0), value=found.tokenizer.eos_token_id)
        shifted = shifted.masked_fill(shifted == -100, found.tokenizer.pad_token_id)
        with torch.autocast("cpu", torch.bfloat16):
            view = florence.model.vision_tower(data.pixels(rows)).last_hidden_state if seen is None else seen[rows].float()
            image = florence.model.multi_modal_projector(view)
            words = torch.cat([image, embeddings[inputs["input_ids"][:, image.shape[1] :]].to(image.dtype)], 1)
            mask = inputs["attention_mask"]
            tokens = florence.model.language_model.encoder(inputs_embeds=words, attention_mask=mask)[0]
            decoder = florence.model.language_model.decoder
            states = decoder(input_ids=shifted, encoder_hidden_states=tokens, encoder_attention_mask=mask)[0]
            logits = florence.lm_head(states)
        logs = logits.float().log_softmax(-1)
        target = labels.clamp(min=0)
        plain = -logs.gather(-1, target[..., None])[..., 0]
        kept, place = labels != -100, (target >= low) & (target <= high)
        each = torch.where(place, smooth_nll(logs, target.clamp(low, high), STEP, low, high), plain)
        dense, figures = heads.loss(tokens[:, 1 : GRID * GRID + 1].float(), *data.under_tokens(rows), embeddings[coarse])
        loss = each[kept].mean()
        figures = {"seq": loss.item(), "words": plain[kept & ~place].mean().item(), "places": plain[kept & place].mean().item(), **figures}
        stage.step(loss + 0.2 * dense, figures)


def save(florence: Any, found: Florence2Processor, folder: Path) -> None:
    """Weights in bf16, and the processor."""
    tied = ("lm_head.weight", "embed_tokens.weight")  # all are language_model.shared
    weights = {name: value.to(torch.bfloat16) for name, value in florence.state_dict().items() if not name.endswith(tied)}
    florence.config.dtype = torch.bfloat16
    florence.save_pretrained(folder, state_dict=weights)
    florence.config.dtype = torch.float32
    found.save_pretrained(folder)
