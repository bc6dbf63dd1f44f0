"""Give the bundled CLIP its image tower: trained with open_clip on captioned icons, against its own text tower, which is locked.

    python examples/build_demo/train_image_tower.py --build build

Locked-image tuning the other way round (LiT, Zhai et al. 2022): the text tower keeps every bit, so that generators that read sentences
through it go on as they were. Each picture is one icon on a photograph: one of COCO's classes or any other noun under `seen` of
nouns.json. The loss is the cross-entropy over the captions of all of them and the cosine to its own. Reads the encoder that
`build_text_encoder.py` left and the icon sets and photographs that the stage `detection-scenes` of `build_demo_models.py` fetched;
three styles are held out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from demo_scenes import CLASSES, COLOUR_STYLES, GLYPH_STYLES, TEST_STYLES, Icon, Icons, compose, photographs
from open_clip.transform import PreprocessCfg
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from peft_icm.conditioning import ClipEncoder

SIZE = 64
# A small residual network; a ViT of twice the size had learnt nothing after 500 steps.
VISION = {"image_size": SIZE, "timm_model_name": "test_resnet", "timm_model_pretrained": False, "timm_pool": "avg", "timm_proj": "linear"}
CAPTIONS = ("a {}", "{}", "a picture of a {}", "detect the {}", "find every {}")
TEMPERATURE = 0.05


def draw_pictures(icons: dict[str, list[Icon]], backgrounds: Sequence, count: int, seed: int, jitter: float) -> tuple[Tensor, Tensor]:
    """`[N, 64, 64, 3]` pictures of one icon each, and the index of what it shows; half of them show one of the classes."""
    draw, names = np.random.default_rng(seed), list(icons)
    pictures, labels = np.zeros((count, SIZE, SIZE, 3), np.uint8), np.zeros(count, np.int64)
    for index in tqdm(range(count), desc="pictures", mininterval=10):
        label = int(draw.integers(len(CLASSES) if draw.random() < 0.5 else len(names)))
        pool = icons[names[label]]
        background = backgrounds[int(draw.integers(len(backgrounds)))]
        scene = compose(background, [pool[int(draw.integers(len(pool)))]], draw, jitter, sides=(0.45, 0.95))
        pictures[index], labels[index] = np.asarray(scene.picture), label
    return torch.from_numpy(pictures), torch.from_numpy(labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=Path("build"), help="build area with icons/ and photographs/")
    parser.add_argument("--pictures", type=int, default=50_000, help="training pictures")
    parser.add_argument("--steps", type=int, default=3_000, help="steps of 128 pictures")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    folder = args.build / "encoder"
    text = ClipEncoder.from_pretrained(str(folder))
    phrasings = json.loads((Path(__file__).parent / "detection_phrasings.json").read_text())["classes"]
    synonyms = {entry["label"]: [singular for singular, _ in entry["names"]] for entry in phrasings.values()}

    sets = Icons(args.build)
    named = {icon for icons in CLASSES.values() for icon in icons}
    others = {name: icons for name, icons in sets.seen.items() if name not in named}
    icons = sets.of_classes(list(CLASSES), COLOUR_STYLES + GLYPH_STYLES) | others
    spoken = {name: synonyms.get(name, [name.replace("-", " ")]) for name in icons}
    captions = torch.stack([text.encode([line.format(word) for word in words for line in CAPTIONS]).mean(0) for words in spoken.values()])
    captions = F.normalize(captions, dim=1)
    pictures, labels = draw_pictures(icons, photographs(args.build, test=False, crops=2000, size=SIZE), args.pictures, 0, 1.0)
    held_icons = sets.of_classes(list(CLASSES), TEST_STYLES)
    held, held_labels = draw_pictures(held_icons, photographs(args.build, test=True, crops=300, size=SIZE), 600, 1, 0.0)

    model_cfg = {**text.model_cfg, "vision_cfg": VISION}
    # The tower alone: a text tower that is locked needs no second copy.
    clip = open_clip.CLIP(embed_dim=text.dim, vision_cfg=VISION, text_cfg={"layers": 1, "width": 64, "vocab_size": 64})
    preprocess = PreprocessCfg(size=SIZE, interpolation="bicubic", resize_mode="squash")
    mean, std = (torch.tensor(values) for values in (preprocess.mean, preprocess.std))
    parameters = list(clip.visual.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=args.steps, pct_start=0.1)

    def embed(batch: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.normalize(clip.encode_image(((batch.float() / 255 - mean) / std).permute(0, 3, 1, 2)).float(), dim=1)

    order = torch.empty(0, dtype=torch.long)
    for step in tqdm(range(args.steps), desc="image tower", mininterval=20):
        if len(order) < 128:
            order = torch.randperm(len(pictures))
        rows, order = order[:128], order[128:]
        with torch.enable_grad():
            seen = embed(pictures[rows])
            loss = F.cross_entropy(seen @ captions.T / TEMPERATURE, labels[rows])
            loss = loss + 2 * (1 - (seen * captions[labels[rows]]).sum(1).mean())
            optimizer.zero_grad()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 250 == 249 or step == args.steps - 1:
            clip.eval()
            unseen = embed(held)
            clip.train()
            right = ((unseen @ captions[: len(CLASSES)].T).argmax(1) == held_labels).float().mean()
            cosine = (unseen * captions[held_labels]).sum(1).mean()
            print(f"step {step + 1}: loss {loss:.3f}; unseen styles: right {right:.3f} of {len(CLASSES)}, cosine {cosine:.3f}", flush=True)
    old = load_file(folder / "open_clip_model.safetensors")
    weights = {name: value for name, value in old.items() if not name.startswith("visual.")}
    weights |= {name: value.to(torch.bfloat16).contiguous() for name, value in clip.state_dict().items() if name.startswith("visual.")}
    save_file(weights, folder / "open_clip_model.safetensors")
    preprocess_cfg = {name: getattr(preprocess, name) for name in ("size", "mode", "mean", "std", "interpolation", "resize_mode")}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}, indent=1))
    print("written to", folder)


if __name__ == "__main__":
    main()
