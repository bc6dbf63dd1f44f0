"""The paper's language-modelling setting in full (section 4.2): Llama-3-8B, LoRA r = 2 on q and v, five subsets of the Pile.

    python examples/llama3_pile.py --base-model meta-llama/Meta-Llama-3-8B --tasks pile --output pile-icm --dtype bfloat16
    python examples/llama3_pile.py --demo      # the same code at demo size, offline, on a CPU

`--tasks` is a folder with tasks.json, which names for each subset its sentences and its train and test files (documents separated by
a line with a NUL character): ArXiv, Books, GitHub, StackExchange, Wikipedia.
"""

import argparse
import json
from pathlib import Path

from peft import LoraConfig
from transformers import AutoTokenizer

from peft_icm import CollectingArguments, ICMConfig, ICMGenerator, ICMTrainer, ICMTrainingArguments, collect, evaluate_generator
from peft_icm.bundled import bundled_encoder, bundled_folder
from peft_icm.conditioning import ClipEncoder
from peft_icm.tasks.language_modeling import LanguageModelingTask, load_tasks

FIVE = ("wikipedia", "austen", "latex", "rust", "bible")


def demo_tasks() -> list[LanguageModelingTask]:
    """Five bundled domains; most of their held-out passages, which the base has never seen, are trained on here."""
    tasks = [task for task in load_tasks(bundled_folder("text") / "tasks") if task.name in FIVE]
    for task in tasks:
        task.train_texts, task.test_texts = task.test_texts[:-1], task.test_texts[-1:]
    return tasks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", action="store_true", help="bundled Llama, bundled text, a few epochs")
    parser.add_argument("--base-model", default="meta-llama/Meta-Llama-3-8B")
    parser.add_argument("--tasks", help="folder with tasks.json")
    parser.add_argument("--output", type=Path, default=Path("llama3-pile"))
    parser.add_argument("--dtype", default="float32", help="dtype of the frozen base")
    parser.add_argument("--launcher", choices=["local", "ray", "submitit"], default="local", help="where LoRAs are trained")
    args = parser.parse_args()
    if not args.demo and not args.tasks:
        parser.error("--tasks is required without --demo")

    bundle = bundled_folder("text")
    base = str(bundle / "generator" / "base_model") if args.demo else args.base_model
    tasks = demo_tasks() if args.demo else load_tasks(args.tasks)
    epochs, snapshots, block = (12, 4, 64) if args.demo else (150, 50, 1024)
    encoder = ClipEncoder.from_pretrained(bundled_encoder()) if args.demo else ClipEncoder.from_pretrained("ViT-L-14", pretrained="openai")

    recipe = CollectingArguments(
        str(args.output / "collecting"),
        num_train_epochs=epochs,
        num_snapshots=snapshots,
        learning_rate=1e-2 if args.demo else 1e-4,
        dtype=args.dtype,
        dataset_kwargs={"block_size": block},
        launcher=args.launcher,
    )
    collection = collect(base, tasks, LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"), recipe)
    if collection is None:
        return print("Other processes are still training tasks.")
    print(f"P = {collection.layout.numel:,}")
    collection.encode(encoder)
    config = ICMConfig(architecture="paper", latent_size=256, num_conv_layers=12)
    training = ICMTrainingArguments(
        str(args.output / "training"), num_train_epochs=10 if args.demo else 1000, save_strategy="no", logging_steps=10
    )
    trainer = ICMTrainer(config, training, collection=collection, encoder=encoder)
    trainer.train()
    trainer.generator.save_pretrained(args.output / "generator")
    generator = ICMGenerator.from_pretrained(args.output / "generator")
    own = {task: collection.final(task) for task in collection.tasks}
    report = evaluate_generator(generator, AutoTokenizer.from_pretrained(base), tasks, own)
    print(report.table())
    (args.output / "report.json").write_text(json.dumps(report.to_dict(), indent=1))
    report.plot(args.output / "report.png")


if __name__ == "__main__":
    main()
