"""How long generating takes, as ratios to what it replaces, all taken in one run.

    python benchmarks/generate.py --output benchmarks/generate.json

- add: warm `generate_adapter` under a new name / `PeftModel.load_adapter` of the same adapter from local disk; wanted: at most 1
- swap: `generate_adapter` into a name that is there / the same `load_adapter`; wanted: at most 0.1. Where a sentence is read first, also
  when the same one is asked for again, and without one: the task vector is given
- decode: `decode` of one latent / summing all bytes of the decoder once; wanted: at most 2
- sample: `sample` of 32 / the bare matrix products of the same shapes; wanted: at most 1.2
- many: `attach` as the 10th, 50th and 100th adapter of a model / as the second, medians of five, and `load_adapter` up to the 50th

With one thread seconds are of the processor: other work on the machine makes its caches colder, and no more. With two they are on the wall.
With OMP_NUM_THREADS=1 the others are left out.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import peft
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from peft_icm import AdapterLayout, ICMConfig, ICMGenerator, bundled_generator, save_adapter
from peft_icm.adapters import attach

SMOLLM2 = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
           "vocab_size": 49152}  # fmt: skip


def seconds(
    variants: dict[str, Callable[[], object]], repeats: int, after: Callable[[str], object] = lambda name: None
) -> dict[str, float]:
    """The median of each, the variants taken in turn; `after` undoes what one did, outside the clock."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(repeats + 2):
        for name, run in variants.items():
            start = clock()
            run()
            if turn >= 2:  # the first two warm up
                times[name].append(clock() - start)
            after(name)
    return {name: statistics.median(values) for name, values in times.items()}


def facts(command: str) -> dict:
    """What a result says of its run."""
    return {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__},
        "load": [round(value, 1) for value in os.getloadavg()],
        "seed": 0,
    }


def bundled() -> tuple[ICMGenerator, PeftModel, dict]:
    generator = ICMGenerator.from_pretrained(bundled_generator("text"), dtype=torch.float32)
    return generator, generator.generate_adapter("continue a Shakespeare play"), {"text": "continue a Shakespeare play"}


def smollm2() -> tuple[ICMGenerator, PeftModel, dict]:
    base = LlamaForCausalLM(LlamaConfig(**SMOLLM2))
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    layout = AdapterLayout.from_peft_model(get_peft_model(LlamaForCausalLM(LlamaConfig(**SMOLLM2)), lora))
    tasks = [{"name": str(index), "description": ""} for index in range(18)]
    generator = ICMGenerator(ICMConfig(layout=layout.to_dict(), condition_dim=384, tasks=tasks)).eval()
    return generator, generator.generate_adapter(base_model=base, task_vector=torch.randn(384)), {"task_vector": torch.randn(384)}


def measure(generator: ICMGenerator, model: PeftModel, condition: dict, repeats: int) -> dict[str, float]:
    """All four ratios and the seconds behind them."""
    given = generator.task_vector(**condition)
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(model, folder)

        def undo(name: str) -> None:
            if not name.startswith("swap"):
                model.delete_adapter("other")
                model.set_adapter("default")
            if name != "swap":
                generator._lazy.get("sentences", {}).clear()  # the next one is new to it

        verbs = {
            "load_adapter": lambda: model.load_adapter(folder, "other"),
            "add": lambda: generator.generate_adapter(base_model=model, adapter_name="other", **condition),
            "swap": lambda: generator.generate_adapter(base_model=model, **condition),
            "swap again": lambda: generator.generate_adapter(base_model=model, **condition),
            "swap by task vector": lambda: generator.generate_adapter(base_model=model, task_vector=given),
        }
        times = seconds(verbs, repeats, undo)
    vector = torch.randn(generator.config.condition_dim)
    z = torch.randn(1, generator.config.latent_size)
    network = generator.network
    decoder = [network.basis, network.center, network.scale, *network.condition.parameters(), *network.decoder.parameters()]
    decoder += [tensor for part in (generator.context, generator.statistics) if part for tensor in part.state_dict().values()]
    hidden = generator.config.hidden_size
    shapes = [
        (generator.config.condition_dim, hidden // 2),
        (generator.config.latent_size + hidden // 2, hidden),
        (hidden, hidden),
        (hidden, len(network.scale)),
    ]
    matrices = [torch.randn(shape) for shape in shapes]
    inputs = [torch.randn(32, shape[0]) for shape in shapes]
    coordinates, basis = torch.randn(32, len(network.scale)), network.basis.detach()
    with torch.no_grad():
        times |= seconds(
            {
                "read": lambda: [tensor.sum() for tensor in decoder],
                "decode": lambda: generator.decode(z, vector[None]),
                "products": lambda: [a @ b for a, b in zip([*inputs, coordinates], [*matrices, basis], strict=True)],
                "sample": lambda: generator.sample(vector, 32),
            },
            repeats * 5,
        )
    return {
        "add / load_adapter": times["add"] / times["load_adapter"],
        "swap / load_adapter": times["swap"] / times["load_adapter"],
        "swap again / load_adapter": times["swap again"] / times["load_adapter"],
        "swap by task vector / load_adapter": times["swap by task vector"] / times["load_adapter"],
        "decode / read": times["decode"] / times["read"],
        "sample of 32 / products": times["sample"] / times["products"],
        **{f"{name} (ms)": value * 1e3 for name, value in times.items()},
    }


def many(generator: ICMGenerator, condition: dict) -> dict[str, float]:
    """What the 10th, 50th and 100th adapter of a model takes, over what the second does."""
    state_dict = generator.generate_state_dict(**condition)
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(generator.generate_adapter(**condition), folder)
        for verb, numbers in {"attach": (10, 50, 100), "load_adapter": (10, 50)}.items():
            model, times = generator.generate_adapter(**condition), {}
            for number in tqdm(range(2, max(numbers) + 3), desc=verb):
                start = time.thread_time()
                if verb == "attach":
                    attach(model, generator.layout, state_dict, adapter_name=f"number{number}")
                else:
                    model.load_adapter(folder, f"number{number}")
                times[number] = time.thread_time() - start
            # Around each, since Python's garbage collector takes its time in one of many.
            medians = {number: statistics.median(times[at] for at in range(max(2, number - 2), number + 3)) for number in (2, *numbers)}
            found |= {f"{verb}: {number}th / 2nd": medians[number] / medians[2] for number in numbers}
            found[f"{verb}: 2nd (ms)"] = medians[2] * 1e3
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("generate.json"))
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    torch.manual_seed(0)
    transformers.logging.disable_progress_bar()
    everything = torch.get_num_threads()
    result = facts("python benchmarks/generate.py")
    torch.set_num_threads(1)
    result["many, bundled, 1 thread"] = {key: round(value, 3) for key, value in many(*bundled()[::2]).items()}
    print(json.dumps(result["many, bundled, 1 thread"], indent=1))
    for threads in tqdm(sorted({1, everything}), desc="threads"):
        torch.set_num_threads(threads)
        for name, build in (("bundled", bundled), ("SmolLM2 shape", smollm2)):
            row = {key: round(value, 3) for key, value in measure(*build(), args.repeats).items()}
            result[f"{name}, {threads} thread{'s' * (threads > 1)}"] = row
            print(name, threads, json.dumps(row, indent=1))
    args.output.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
