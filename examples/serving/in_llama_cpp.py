"""Adapters in llama.cpp itself: logits against transformers and peft, and our GGUF files against those of llama.cpp's own converter.

    pip install "peft-icm[gguf]" llama-cpp-python sentencepiece   # builds llama.cpp
    python examples/serving/in_llama_cpp.py SOURCE                   # vendor/llama.cpp of llama-cpp-python's sdist, or a clone of llama.cpp

Everything is converted to float32 and offline. The tokenizer of the bundled base is none that llama.cpp knows by its hash: it is written as
GPT-2's, which changes no logits, as tokens go in by their numbers.
"""

import argparse
import subprocess
import sys
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from peft_icm import ICMGenerator, bundled_generator, save_adapter

BASE = Path(bundled_generator("text")) / "base_model"
TOKENS = list(range(100, 164))
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONVERT = """
import runpy, sys
sys.path.insert(0, sys.argv[1])
sys.argv = sys.argv[2:]
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def convert(source: Path, script: str, *arguments: object) -> None:
    command = [sys.executable, "-c", CONVERT, str(source), str(source / script), *map(str, arguments)]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        raise SystemExit(finished.stderr[-2000:])


def with_lora(base: torch.nn.Module, **config: object) -> PeftModel:
    """A LoRA of random values on a base."""
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **config)).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def difference(model: PeftModel, base: Path, adapter: Path | None) -> tuple[float, float]:
    """The largest difference of the logits of llama.cpp and peft, and what the adapter makes of those of the base."""
    file = str(adapter / "adapter_model.gguf") if adapter else None
    options = {"n_ctx": 128, "n_threads": 1, "logits_all": True, "verbose": False, "type_k": 0, "type_v": 0}  # a float32 cache
    llama = llama_cpp.Llama(str(base), lora_path=file, **options)
    llama.eval(TOKENS)
    found = torch.from_numpy(np.array(llama.scores[: len(TOKENS)]))
    with torch.no_grad():
        expected = model(torch.tensor([TOKENS])).logits[0]
        with model.disable_adapter():
            unadapted = model(torch.tensor([TOKENS])).logits[0]
    return float((found - (expected if adapter else unadapted)).abs().max()), float((expected - unadapted).abs().max())


def compare_logits(source: Path, folder: Path) -> None:
    generator = ICMGenerator.from_pretrained(bundled_generator("text"))
    untied = LlamaForCausalLM(LlamaConfig.from_pretrained(BASE, tie_word_embeddings=False, num_key_value_heads=2))
    untied.save_pretrained(folder / "untied")
    AutoTokenizer.from_pretrained(BASE).save_pretrained(folder / "untied")
    by_module = {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"v_proj": 3}}
    models = {
        "generated": (BASE, generator.generate_adapter("the King James Bible", temperature=0.0)),
        "seven linears": (BASE, with_lora(LlamaForCausalLM.from_pretrained(BASE), r=4, target_modules=LINEARS)),
        "rsLoRA, ranks and alphas by module": (
            BASE,
            with_lora(LlamaForCausalLM.from_pretrained(BASE), r=4, target_modules=LINEARS, use_rslora=True, **by_module),
        ),
        "untied head and embedding, grouped heads": (
            folder / "untied",
            with_lora(untied, r=4, target_modules=[*LINEARS, "lm_head", "embed_tokens"]),
        ),
    }
    print(f"{'largest difference of logits':44}{'base':>9}{'adapted':>9}{'the adapter moves them by':>27}")
    for name, (base, model) in models.items():
        converted = folder / f"{base.name}.gguf"
        if not converted.is_file():
            convert(source, "convert_hf_to_gguf.py", base, "--outfile", converted, "--outtype", "f32")
        adapter = save_adapter(model, folder / name, format="gguf")
        (without, _), (with_it, moved) = difference(model, converted, None), difference(model, converted, adapter)
        print(f"{name:44}{without:9.1e}{with_it:9.1e}{moved:27.2f}")


def compare_files(source: Path, folder: Path) -> None:
    """Of plain LoRAs: llama.cpp's converter does not read use_rslora, rank_pattern and alpha_pattern."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    kinds = {
        LlamaForCausalLM: LlamaConfig,
        MistralForCausalLM: MistralConfig,
        Qwen2ForCausalLM: Qwen2Config,
        Qwen3ForCausalLM: Qwen3Config,
    }
    for kind, config in kinds.items():
        name = kind.__name__
        base = kind(config(**sizes, vocab_size=128, head_dim=16))
        base.save_pretrained(folder / name)
        model = with_lora(base, r=4, lora_alpha=7, target_modules=LINEARS)
        ours = save_adapter(model, save_adapter(model, folder / f"{name}-lora"), format="gguf") / "adapter_model.gguf"
        convert(source, "convert_lora_to_gguf.py", ours.parent, "--base", folder / name, "--outfile", ours.parent / "theirs.gguf")
        one, other = (gguf.GGUFReader(file) for file in (ours, ours.parent / "theirs.gguf"))
        tensors = [{tensor.name: tensor.data for tensor in reader.tensors} for reader in (one, other)]
        same = tensors[0].keys() == tensors[1].keys() and all(np.array_equal(tensors[0][key], tensors[1][key]) for key in tensors[0])
        keys = ("general.architecture", "general.type", "adapter.type", "adapter.lora.alpha")
        fields = all(one.fields[key].contents() == other.fields[key].contents() for key in keys)
        print(f"{name}: {len(tensors[0])} tensors and {len(keys)} fields {'equal' if same and fields else 'DIFFER from'} llama.cpp's own")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="llama.cpp's source, with its converters")
    source = parser.parse_args().source.resolve()
    torch.manual_seed(0)
    names = ("llama-cpp-python", "gguf", "transformers", "peft", "torch")
    print(f"{date.today()}, " + ", ".join(f"{name} {version(name)}" for name in names))
    with tempfile.TemporaryDirectory() as temporary:
        compare_logits(source, Path(temporary))
        compare_files(source, Path(temporary))


if __name__ == "__main__":
    main()
