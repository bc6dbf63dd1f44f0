"""What the vLLM plugin does short of vLLM; examples/serving/in_vllm.py runs it in vLLM itself."""

import asyncio
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

from peft_icm import ICMGenerator, UnknownTaskError, bundled_generator
from peft_icm.vllm_plugin import SentenceAdapters, register

BASE = f"{bundled_generator('text')}/base_model"
BIBLE, SHAKESPEARE = "the King James Bible", "continue a Shakespeare play"


def test_the_folder_is_the_adapter_and_stays(tmp_path):
    adapters = SentenceAdapters("bundled:text", tmp_path / "cache")
    folder = adapters.folder(BASE, BIBLE)
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(BASE), folder).eval()
    expected = ICMGenerator.from_pretrained(bundled_generator("text")).generate_adapter(BIBLE, temperature=0.0)
    ids = torch.arange(100, 120)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected(ids).logits, rtol=0, atol=1e-5)
    (weights,) = folder.glob("*.safetensors")
    written = weights.stat().st_mtime_ns
    again = SentenceAdapters("bundled:text", tmp_path / "cache").folder(BASE, BIBLE)  # another process, or after a restart
    assert again == folder and weights.stat().st_mtime_ns == written
    assert adapters.folder(BASE, SHAKESPEARE) != folder
    for file in folder.iterdir():
        file.unlink()
    assert adapters.folder(BASE, BIBLE) == folder  # one that was emptied is filled
    assert sorted(file.name for file in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_what_is_refused_leaves_nothing(tmp_path):
    adapters = SentenceAdapters("bundled:text", tmp_path / "cache")
    with pytest.raises(UnknownTaskError):
        adapters.folder(BASE, "knitting patterns for beginners")
    with pytest.raises(ValueError, match="at most 1000 are read"):
        adapters.folder(BASE, "x" * 1001)
    with pytest.raises(ValueError, match="must be a non-empty sentence"):
        adapters.folder(BASE, " ")
    LlamaConfig(hidden_size=32, num_attention_heads=2, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"lora_A\.weight: expected shape .*, found a base model that needs"):
        adapters.folder(str(tmp_path / "other"), BIBLE)
    with pytest.raises(OSError, match="nowhere"):
        adapters.folder(str(tmp_path / "nowhere"), BIBLE)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text('{"model_type": "llama", "hidden_size": "x"}')
    with pytest.raises(ValueError, match="broken cannot be loaded: .*hidden_size"):
        adapters.folder(str(tmp_path / "broken"), BIBLE)
    assert not (tmp_path / "cache").exists()


def test_an_allow_list_and_a_limit(tmp_path):
    adapters = SentenceAdapters("bundled:text", None, {BIBLE, SHAKESPEARE, f"{BIBLE} "}, limit=1)
    with pytest.raises(ValueError, match="'LaTeX papers' is none of the sentences allowed"):
        adapters.folder(BASE, "LaTeX papers")
    folder = adapters.folder(BASE, BIBLE)
    for further in (SHAKESPEARE, f"{BIBLE} "):  # the second shares the folder, and is another name in vLLM
        with pytest.raises(ValueError, match="1 sentences were answered, which is the limit"):
            adapters.folder(BASE, further)
    with pytest.raises(ValueError, match="There are 1 adapters in .*, which is the limit"):  # another process on the same cache
        SentenceAdapters("bundled:text", adapters.cache, limit=1).folder(BASE, SHAKESPEARE)
    assert adapters.folder(BASE, BIBLE) == folder and folder.is_dir()
    assert adapters.cache.is_dir()
    cache = adapters.cache
    del adapters
    assert not cache.exists()


def test_without_a_generator_it_does_nothing_and_imports_nothing_heavy(monkeypatch):
    monkeypatch.delenv("PEFT_ICM_VLLM_GENERATOR", raising=False)
    assert register() is None
    code = "import sys, peft_icm.vllm_plugin; print([m for m in ('torch', 'transformers', 'peft', 'vllm') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.fixture
def resolver(monkeypatch):
    """Registers the plugin in a stand-in for vLLM's registry."""
    registered = {}
    modules = {name: ModuleType(name) for name in ("vllm", "vllm.lora", "vllm.lora.request", "vllm.lora.resolver")}
    modules["vllm.lora.request"].LoRARequest = SimpleNamespace
    modules["vllm.lora.resolver"].LoRAResolver = object
    modules["vllm.lora.resolver"].LoRAResolverRegistry = SimpleNamespace(register_resolver=registered.__setitem__)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)

    def build(**variables):
        for name, value in {"GENERATOR": "bundled:text", **variables}.items():
            monkeypatch.setenv(f"PEFT_ICM_VLLM_{name}", str(value))
        register()
        return registered["peft_icm"]

    return build


def test_a_name_that_cannot_be_answered_is_none_and_a_line(resolver, caplog):
    ask = resolver().resolve_lora
    found = asyncio.run(ask(BASE, f"icm:{BIBLE}"))
    assert found.lora_name == f"icm:{BIBLE}" and found.lora_int_id > 0 and asyncio.run(ask(BASE, BIBLE)) is None
    assert not caplog.messages
    assert asyncio.run(ask(BASE, f"icm:{BIBLE} \ud800")) is None
    ((logger, _, message),) = caplog.record_tuples
    assert logger.startswith("vllm.") and "half of a character" in message  # those that vLLM's server shows


def test_the_file_of_sentences(resolver, tmp_path):
    (tmp_path / "sentences.txt").write_text(f"{BIBLE}\n{SHAKESPEARE}\n", encoding="utf-8-sig")
    assert asyncio.run(resolver(SENTENCES=tmp_path / "sentences.txt").resolve_lora(BASE, f"icm:{BIBLE}")) is not None
    (tmp_path / "sentences.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"SENTENCES=.*sentences\.txt is not in UTF-8"):
        resolver(SENTENCES=tmp_path / "sentences.txt")
