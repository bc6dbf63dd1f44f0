"""Adapters of Florence-2's remote code are read in the names of transformers' own class."""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tiny import FLORENCE_TARGETS, florence, florence_lora
from torch import nn
from transformers import Florence2Config, Florence2ForConditionalGeneration

from peft_icm import AdapterCollection, AdapterLayout
from peft_icm.adapters.attach import attach
from peft_icm.adapters.layout import PREFIX, map_keys
from peft_icm.tasks.florence2_keys import FLORENCE2_KEY_MAP

# As in microsoft/Florence-2-base and transformers' own conversion of its checkpoint.
PAIRS = {
    "vision_tower.convs.1.proj": "model.vision_tower.convs.1.conv",
    "vision_tower.blocks.0.0.spatial_block.conv1.fn.dw": "model.vision_tower.blocks.0.0.spatial_block.conv1",
    "vision_tower.blocks.0.0.spatial_block.window_attn.fn.qkv": "model.vision_tower.blocks.0.0.spatial_block.window_attn.qkv",
    "vision_tower.blocks.0.0.spatial_block.window_attn.fn.proj": "model.vision_tower.blocks.0.0.spatial_block.window_attn.proj",
    "vision_tower.blocks.2.8.spatial_block.conv2.fn.dw": "model.vision_tower.blocks.2.8.spatial_block.conv2",
    "vision_tower.blocks.2.8.spatial_block.ffn.fn.net.fc1": "model.vision_tower.blocks.2.8.spatial_block.ffn.fc1",
    "vision_tower.blocks.2.8.channel_block.channel_attn.fn.qkv": "model.vision_tower.blocks.2.8.channel_block.channel_attn.qkv",
    "vision_tower.blocks.3.0.channel_block.ffn.fn.net.fc2": "model.vision_tower.blocks.3.0.channel_block.ffn.fc2",
    "image_pos_embed.row_embeddings": "model.multi_modal_projector.image_position_embed.row_embeddings",
    "language_model.model.shared": "model.language_model.shared",
    "language_model.model.encoder.layers.5.self_attn.q_proj": "model.language_model.encoder.layers.5.self_attn.q_proj",
    "language_model.model.decoder.layers.0.encoder_attn.v_proj": "model.language_model.decoder.layers.0.encoder_attn.v_proj",
    "language_model.lm_head": "lm_head",
}
# The way back, for native names only.
TO_OLD = [
    (r"^lm_head", "language_model.lm_head"),
    (r"^model\.language_model", "language_model.model"),
    (r"^model\.vision_tower", "vision_tower"),
    (r"^model\.multi_modal_projector\.image_position_embed", "image_pos_embed"),
    (r"^(vision_tower\.convs\.\d+)\.conv", r"\1.proj"),
    (r"\.(conv[12])(?=\.lora|$)", r".\1.fn.dw"),
    (r"\.(window_attn|channel_attn)\.", r".\1.fn."),
    (r"^(vision_tower.*\.ffn)\.", r"\1.fn.net."),
]


def old(native):
    (name,) = map_keys({native.removeprefix(PREFIX): None}, TO_OLD)
    return (PREFIX if native.startswith(PREFIX) else "") + name


@pytest.fixture
def model():
    model = florence_lora(r=2)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    return model


@pytest.fixture
def folder(model, tmp_path):
    """An adapter as the remote code saved it: its keys, its configuration, and the base's lm_head that peft added by default."""
    model.save_pretrained(tmp_path / "sofas")
    file = tmp_path / "sofas" / "adapter_model.safetensors"
    tensors = {old(key): value for key, value in load_file(file).items()}
    assert f"{PREFIX}language_model.lm_head.base_layer.weight" in tensors
    assert f"{PREFIX}vision_tower.blocks.0.0.spatial_block.ffn.fn.net.fc2.lora_A.weight" in tensors
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((tmp_path / "sofas" / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == sorted(FLORENCE_TARGETS)
    library = "transformers_modules.microsoft.Florence-2-base-ft.modeling_florence2"
    config |= {
        "base_model_name_or_path": "microsoft/Florence-2-base-ft",
        "auto_mapping": {**config["auto_mapping"], "parent_library": library},
    }
    (tmp_path / "sofas" / "adapter_config.json").write_text(json.dumps(config))
    return tmp_path / "sofas"


@pytest.mark.parametrize("name", PAIRS)
def test_a_module_of_the_remote_code_gets_its_native_name(name):
    (key,) = map_keys({f"{PREFIX}{name}.lora_A.weight": None}, FLORENCE2_KEY_MAP)
    assert key == f"{PREFIX}{PAIRS[name]}.lora_A.weight"
    with torch.device("meta"):
        text = {"encoder_layers": 6, "decoder_layers": 6}
        native = Florence2ForConditionalGeneration(Florence2Config(text_config=text))
    assert PAIRS[name] in dict(native.named_modules())


def test_every_module_that_can_carry_a_lora_is_mapped_and_native_keys_stay():
    # The remote code's image_projection is a bare parameter: no LoRA of it exists.
    kinds = nn.Linear | nn.Conv2d | nn.Embedding
    modules = [name for name, module in florence().named_modules() if isinstance(module, kinds) and "image_projection" not in name]
    keys = [f"{PREFIX}{name}.lora_A.weight" for name in modules]
    olds = [old(key) for key in keys]
    assert not set(olds) & set(keys) and len(set(olds)) == len(keys)
    assert list(map_keys(dict.fromkeys(olds), FLORENCE2_KEY_MAP)) == keys
    assert list(map_keys(dict.fromkeys(keys), FLORENCE2_KEY_MAP)) == keys


def test_an_old_adapter_has_the_native_layout_and_every_bit(model, folder):
    native = AdapterLayout.from_peft_model(model)
    layout = AdapterLayout.from_pretrained(folder, key_map=FLORENCE2_KEY_MAP)
    assert layout.fingerprint == native.fingerprint and layout.keys == native.keys
    assert layout.base_model_class == native.base_model_class
    collection = AdapterCollection.from_adapters([folder], ["detect sofas"], gauge=False, key_map=FLORENCE2_KEY_MAP)
    vector = native.flatten(get_peft_model_state_dict(model, save_embedding_layers=False))
    assert torch.equal(collection.final("sofas"), vector)


@pytest.mark.filterwarnings("ignore:.*shares its weight|.*tie_word_embeddings")
def test_an_old_adapter_works_on_the_native_base(model, folder):
    layout = AdapterLayout.from_pretrained(folder, key_map=FLORENCE2_KEY_MAP)
    state_dict = map_keys(load_file(folder / "adapter_model.safetensors"), FLORENCE2_KEY_MAP)
    base = florence()
    base.load_state_dict({name.replace(".base_layer", ""): value for name, value in model.get_base_model().state_dict().items()
                          if "lora_" not in name})  # fmt: skip
    attached = attach(base, layout, state_dict)
    assert isinstance(attached, PeftModel)
    tokens = torch.arange(5, 15)[None]
    inputs = {"input_ids": tokens, "decoder_input_ids": tokens}
    torch.testing.assert_close(attached(**inputs).logits, model.eval()(**inputs).logits)


def test_without_the_map_it_is_refused_by_name(folder):
    with pytest.raises(ValueError, match=r"lm_head\.base_layer\.weight is not a LoRA matrix"):
        AdapterLayout.from_pretrained(folder)
    layout = AdapterLayout.from_pretrained(folder, key_map=FLORENCE2_KEY_MAP[:1])
    with pytest.raises(ValueError, match=r"found no module language_model\.lm_head in the base model"):
        layout.check_base(florence())


@pytest.mark.parametrize(
    "targets", [["net.fc2", "q_proj", "k_proj", "v_proj", "lm_head"], r".*\.fn\.net\.fc2|.*(q|k|v)_proj|lm_head|.*\d\.fc2"]
)
def test_targets_that_only_the_remote_code_has_become_the_native_ones(model, folder, targets):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "target_modules": targets}))
    layout = AdapterLayout.from_pretrained(folder, key_map=FLORENCE2_KEY_MAP)
    layout.check_base(florence())
    assert layout.fingerprint == AdapterLayout.from_peft_model(model).fingerprint
    again = get_peft_model(florence(), layout.lora_config())
    assert AdapterLayout.from_peft_model(again).keys == layout.keys
