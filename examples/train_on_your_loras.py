"""Train a generator on LoRAs that exist already: folders or Hub ids of one layout, one sentence (or several, joined by |) for each.

    python examples/train_on_your_loras.py --adapters loras/sofas loras/dogs --descriptions "detect sofas|find couches" "detect dogs"

Without arguments it takes the own LoRAs of the bundled tasks, written as PEFT folders first.
"""

import argparse
import tempfile
from pathlib import Path

from peft_icm import AdapterCollection, ICMGenerator, ICMTrainer, ICMTrainingArguments, bundled_generator, save_adapter
from peft_icm.adapters.attach import attach
from peft_icm.bundled import bundled_folder


def bundled_loras(folder: Path) -> tuple[list[Path], list[str]]:
    """The own LoRAs of the bundled tasks as PEFT folders, and their descriptions."""
    own = AdapterCollection.from_pretrained(bundled_folder("text") / "own")
    base = ICMGenerator.from_pretrained(bundled_generator("text")).load_base()
    for task in own.tasks:
        base = attach(base, own.layout, own.layout.unflatten(own.final(task).to(own.layout.torch_dtype)))
        save_adapter(base, folder / task)
    return [folder / task for task in own.tasks], [own.descriptions[task][0] for task in own.tasks]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", nargs="+", help="folders or Hub ids of PEFT LoRAs")
    parser.add_argument("--descriptions", nargs="+", help="what each is for")
    parser.add_argument("--output", default="my-generator", help="folder of the generator (default: my-generator)")
    parser.add_argument("--epochs", type=int, default=300, help="epochs (default: 300)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        adapters, texts = (args.adapters, args.descriptions) if args.adapters else bundled_loras(Path(scratch))
        collection = AdapterCollection.from_adapters(adapters, [text.split("|") for text in texts or []])
    encoder = ICMGenerator.from_pretrained(bundled_generator("text")).encoder
    collection.encode(encoder)
    training = ICMTrainingArguments(f"{args.output}.work", num_train_epochs=args.epochs, save_strategy="no", logging_steps=100)
    trainer = ICMTrainer(collection=collection, args=training, encoder=encoder)
    trainer.train()
    trainer.generator.save_pretrained(args.output, with_base_model=True)
    generator = ICMGenerator.from_pretrained(args.output)
    state_dict = generator.generate_state_dict(texts[0].split("|")[0], temperature=0.0)
    wanted = collection.final(collection.tasks[0])
    cosine = (generator.layout.flatten(state_dict) @ wanted) / (generator.layout.flatten(state_dict).norm() * wanted.norm())
    print(f"{args.output}: cosine of the generated adapter with the LoRA it was trained on: {cosine:.3f}")


if __name__ == "__main__":
    main()
