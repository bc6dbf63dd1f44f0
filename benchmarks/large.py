"""Adapters of 4 x 10^7 and 10^8 numbers on the shapes of Llama-3-8B: seconds, and peak memory over the adapter's own size.

    python benchmarks/large.py --output benchmarks/large.json
    python benchmarks/large.py --gain --output benchmarks/int8.json  # what 8 bits cost the bundled text generator in gain

Random weights of the real shapes: the base takes no memory; the generator has 9 components and a basis in 8 bits or bf16, and is saved and
loaded. Each row is a process of its own. Memory is the highest resident set (VmHWM), mapped files included, above what generator and base
take once they are loaded: the basis is not in it, and stands beside it. Seconds are of the CPU and on the wall, the less of two where
repeated.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

LLAMA3_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
             "vocab_size": 128256}  # fmt: skip
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
COMPONENTS, REPEATS = 9, 2


def memory(field: str) -> int:
    """Bytes of a field of /proc/self/status: VmRSS now, VmHWM at the most since [`forget`]."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(field))) * 1024


def forget() -> int:
    """Begin to look for the highest resident set; returns the present one."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def clock(run: Callable[[], Any]) -> tuple[float, float, Any]:
    """Seconds of the CPU, which say the same on a machine that is busy with other work, seconds on the wall, and what was returned."""
    wall, processor = time.perf_counter(), time.process_time()
    found = run()
    return time.process_time() - processor, time.perf_counter() - wall, found


def base_and_layout(rank: int):
    """A Llama-3-8B whose weights are one zero each, seen in their shape, and the layout of its LoRA on all linear layers."""
    import torch
    from peft import LoraConfig, get_peft_model
    from torch import nn
    from transformers import LlamaConfig, LlamaForCausalLM

    from peft_icm import AdapterLayout

    with torch.device("meta"):
        base = LlamaForCausalLM(LlamaConfig(**LLAMA3_8B)).to(torch.bfloat16)
        lora = LoraConfig(r=rank, target_modules=LINEARS, task_type="CAUSAL_LM")
        layout = AdapterLayout.from_peft_model(get_peft_model(LlamaForCausalLM(LlamaConfig(**LLAMA3_8B)), lora))
    for module in base.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            weight = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
            setattr(module, name, nn.Parameter(weight, requires_grad=False))
    return base, layout


def save_generator(folder: Path, layout, dtype: str) -> None:
    """A generator of random weights, a tensor at a time: training it is no part of this."""
    import torch
    from safetensors.torch import save_file

    from peft_icm import ICMConfig, ICMGenerator

    tasks = [{"name": str(index), "description": ""} for index in range(18)]
    kind = {"basis_dtype": "int8"} if dtype == "int8" else {}
    config = ICMConfig(layout=layout.to_dict(), condition_dim=384, tasks=tasks, num_components=COMPONENTS, dtype="bfloat16", **kind)
    with torch.device("meta"):
        expected = ICMGenerator(config).state_dict()
    found = {}
    for name, tensor in expected.items():
        if tensor.dtype == torch.int8:
            found[name] = torch.randint(-127, 128, tensor.shape, dtype=torch.int8)
        elif name == "network.row_scale":
            found[name] = torch.full(tensor.shape, 1e-6)
        elif name.startswith("statistics."):
            found[name] = torch.full(tensor.shape, 1e-2)
        else:
            found[name] = torch.empty(tensor.shape, dtype=torch.bfloat16).normal_(0, 1e-4 if name == "network.basis" else 0.1)
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)


def measure(rank: int, dtype: str) -> dict:
    """Load, generate, attach and save, in this process."""
    import torch

    from peft_icm import ICMGenerator, save_adapter

    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    base, layout = base_and_layout(rank)
    size = layout.num_bytes
    with tempfile.TemporaryDirectory() as temporary:
        subprocess.run([sys.executable, __file__, "--save", temporary, str(rank), dtype], check=True)
        before = forget()
        load = clock(lambda: ICMGenerator.from_pretrained(temporary))
        generator = load[2]
        loading = memory("VmHWM") - before
        stored = sum(tensor.nbytes for tensor in generator.state_dict().values())
        for tensor in generator.state_dict().values():
            tensor.aminmax()  # reads it from the mapped file
    vector = torch.randn(384)
    before = forget()
    first = clock(lambda: generator.generate_adapter(base_model=base, task_vector=vector))
    attached = memory("VmHWM") - before
    model = first[2]
    with tempfile.TemporaryDirectory() as temporary:
        save = clock(lambda: save_adapter(model, temporary))
        saved = memory("VmHWM") - before
        on_disk = Path(temporary, "adapter_model.safetensors").stat().st_size
    read = min(clock(generator.network.basis.aminmax)[:2] for _ in range(REPEATS))
    decode = min(clock(lambda: generator.generate_state_dict(task_vector=vector))[:2] for _ in range(REPEATS))
    swap = min(clock(lambda: generator.generate_adapter(base_model=model, task_vector=vector))[:2] for _ in range(REPEATS))
    add = clock(lambda: generator.generate_adapter(base_model=model, task_vector=vector, adapter_name="second"))
    return {
        "rank": rank,
        "P": layout.numel,
        "basis": dtype,
        "adapter (GB)": size / 1e9,
        "generator (GB)": stored / 1e9,
        "file / adapter": on_disk / size,
        "peak of loading / generator": loading / stored,
        "peak of generate and attach / adapter": attached / size,
        "peak of generate, attach and save / adapter": saved / size,
        "load (s)": load[:2],
        "read the basis (s)": read,
        "generate_state_dict (s)": decode,
        "generate_adapter on a bare base (s)": first[:2],
        "generate_adapter in the place of another (s)": swap,
        "generate_adapter beside another (s)": add[:2],
        "save_adapter (s)": save[:2],
    }


def gain() -> dict:
    """Share of the own LoRAs' gain that the bundled text generator has as it is, and with a basis of 8 bits: seed 0, the first
    2,000 characters of each task's held-out text."""
    from transformers import AutoTokenizer

    from peft_icm import AdapterCollection, ICMGenerator, bundled_generator
    from peft_icm.bundled import bundled_folder
    from peft_icm.evaluation.text import Evaluation
    from peft_icm.tasks import load_tasks

    own = AdapterCollection.from_pretrained(bundled_folder("text") / "own")
    tasks = [dataclasses.replace(task, test_texts=[task.test_texts[0][:2000]]) for task in load_tasks(bundled_folder("text") / "tasks")]
    lora = {task.name: own.final(task.name) for task in tasks}
    found: dict = {}
    with tempfile.TemporaryDirectory() as temporary:
        one = ICMGenerator.from_pretrained(bundled_generator("text"))
        one.save_pretrained(temporary, dtype="int8", with_base_model=True)
        for generator in (one, ICMGenerator.from_pretrained(temporary)):
            tokenizer = AutoTokenizer.from_pretrained(generator.load_base().name_or_path)
            report = Evaluation.evaluate(generator, tokenizer, tasks, lora, variants=["generated"], seeds=[0])
            total = sum(report.gain(task.name, "generated") for task in tasks)
            size = sum(tensor.nbytes for tensor in generator.state_dict().values())
            dtype = str(generator.network.basis.dtype).removeprefix("torch.")
            found[dtype] = {"share of gain": report.share("generated"), "gain": total, "bytes": size, "tasks": len(tasks)}
    before, after = (row["gain"] for row in found.values())
    return {**found, "loss of gain": 1 - after / before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("large.json"))
    parser.add_argument("--ranks", type=int, nargs="*", default=[16, 40])
    parser.add_argument("--gain", action="store_true", help="measure that alone")
    parser.add_argument("--row", nargs=2, metavar=("RANK", "DTYPE"), help=argparse.SUPPRESS)
    parser.add_argument("--save", nargs=3, metavar=("FOLDER", "RANK", "DTYPE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.save:
        save_generator(Path(args.save[0]), base_and_layout(int(args.save[1]))[1], args.save[2])
        return
    if args.row:
        print(json.dumps(measure(int(args.row[0]), args.row[1])))
        return
    import peft
    import torch
    import transformers

    result: dict = {
        "command": "python benchmarks/large.py",
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "load": [round(os.getloadavg()[0], 1)],
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__},
        "seed": 0,
        "rows": [],
    }
    if args.gain:
        result |= {"command": "python benchmarks/large.py --gain", "rows": [gain()]}
        print(json.dumps(result["rows"], indent=1))
        args.output.write_text(json.dumps(result, indent=1))
        return
    for rank in args.ranks:
        for dtype in ("int8", "bfloat16"):
            done = subprocess.run([sys.executable, __file__, "--row", str(rank), dtype], check=True, capture_output=True, text=True)
            result["load"].append(round(os.getloadavg()[0], 1))
            row = json.loads(done.stdout, parse_float=lambda digits: round(float(digits), 3))
            result["rows"].append(row)
            print(json.dumps(row, indent=1))
            args.output.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
