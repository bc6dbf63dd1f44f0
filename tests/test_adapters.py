"""Vector -> PeftModel: injected, checked, swapped, saved, and loaded by peft alone."""

import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from tiny import CONDITION_DIM, filled, florence, florence_layout, generator, llama, llama_layout, llama_lora

from peft_icm import AdapterLayout, save_adapter
from peft_icm.adapters import attach, share_tensors

BASES = {"llama": (llama, llama_layout), "florence": (florence, florence_layout)}


@pytest.fixture(params=BASES)
def family(request):
    build, layout = BASES[request.param]
    torch.manual_seed(0)
    return build(), layout()


@pytest.fixture
def vector():
    torch.manual_seed(1)
    return torch.randn(CONDITION_DIM)


def tensors(model, name="default"):
    return get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_every_key_is_filled_and_the_model_is_peft_s_own(family, vector):
    base, layout = family
    model = generator(layout).generate_adapter(task_vector=vector, base_model=base, generator=seeded(3))
    assert type(model).__module__ == "peft.peft_model"
    expected = generator(layout).generate_state_dict(task_vector=vector, generator=seeded(3))
    found = tensors(model)
    assert set(found) == set(expected)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())


def test_saved_folder_is_loaded_by_peft_alone_with_the_same_logits(tmp_path, vector):
    base = llama()
    base.save_pretrained(tmp_path / "base")
    base = type(base).from_pretrained(tmp_path / "base")
    model = generator().generate_adapter(task_vector=vector, base_model=base)
    save_adapter(model, tmp_path / "adapter")
    tokens = torch.arange(20)[None]
    torch.save(model(tokens).logits, tmp_path / "logits.pt")
    script = f"""
import sys
sys.modules["peft_icm"] = None
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig
config = PeftConfig.from_pretrained({str(tmp_path / "adapter")!r})
assert config.inference_mode and config.base_model_name_or_path == {str(tmp_path / "base")!r}
model = AutoPeftModelForCausalLM.from_pretrained({str(tmp_path / "adapter")!r}).eval()
logits = model(torch.arange(20)[None]).logits
torch.testing.assert_close(logits, torch.load({str(tmp_path / "logits.pt")!r}))
print("same logits")
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert "same logits" in run.stdout, run.stderr


def test_saved_florence_folder_holds_the_adapter_and_nothing_of_the_base(tmp_path, vector):
    model = generator(florence_layout()).generate_adapter(task_vector=vector, base_model=florence())
    save_adapter(model, tmp_path / "adapter")
    layout = AdapterLayout.from_pretrained(tmp_path / "adapter")
    assert layout.fingerprint == florence_layout().fingerprint
    again = PeftModel.from_pretrained(florence(), tmp_path / "adapter")
    assert all(torch.equal(value, tensors(model)[key]) for key, value in tensors(again).items())


class TestBaseModels:
    def test_a_model_is_wrapped_in_place(self, family, vector):
        base, layout = family
        model = generator(layout).generate_adapter(task_vector=vector, base_model=base)
        assert model.get_base_model() is base

    def test_a_folder_is_loaded_with_its_kwargs(self, tmp_path, vector):
        llama().save_pretrained(tmp_path)
        model = generator().generate_adapter(task_vector=vector, base_model=tmp_path, base_model_kwargs={"dtype": torch.bfloat16})
        assert model.get_base_model().dtype == torch.bfloat16
        assert model(torch.arange(4)[None]).logits.isfinite().all()

    def test_no_base_gives_independent_models_on_shared_tensors(self, tmp_path, vector):
        llama().save_pretrained(tmp_path)
        base = type(llama()).from_pretrained(tmp_path)
        config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        icm = generator(AdapterLayout.from_peft_model(get_peft_model(base, config)))
        one = icm.generate_adapter(task_vector=vector)
        before = {key: value.clone() for key, value in tensors(one).items()}
        two = icm.generate_adapter(task_vector=-vector)
        assert one.get_base_model() is not two.get_base_model()
        assert all(torch.equal(tensors(one)[key], before[key]) for key in before)
        assert not all(torch.equal(tensors(two)[key], before[key]) for key in before)
        embedding = one.get_input_embeddings().weight
        assert embedding.data_ptr() == two.get_input_embeddings().weight.data_ptr()

    def test_wrong_base_is_refused_before_anything_is_touched(self, family, vector):
        _, layout = family
        wrong = llama(layers=1)
        names = [name for name, _ in wrong.named_modules()]
        with pytest.raises(ValueError, match="expected shape|are for a"):
            generator(layout).generate_adapter(task_vector=vector, base_model=wrong)
        assert [name for name, _ in wrong.named_modules()] == names

    def test_another_revision_warns(self, vector):
        layout = AdapterLayout.from_dict({**llama_layout().to_dict(), "revision": "abc", "base_model_name_or_path": "org/base"})
        base = llama()
        base.config._commit_hash = "def"
        with pytest.warns(UserWarning, match="made for revision abc"):
            generator(layout).generate_adapter(task_vector=vector, base_model=base)

    def test_kwargs_for_a_model_that_is_loaded_already(self, vector):
        with pytest.raises(ValueError, match="is a model already"):
            generator().generate_adapter(task_vector=vector, base_model=llama(), base_model_kwargs={"dtype": "auto"})

    def test_no_base_known(self, vector):
        with pytest.raises(ValueError, match="names no base model"):
            generator().generate_adapter(task_vector=vector)


class TestSecondAdapter:
    def test_is_added_beside_the_first(self, family, vector):
        base, layout = family
        icm = generator(layout)
        model = icm.generate_adapter(task_vector=vector, base_model=base)
        first = {key: value.clone() for key, value in tensors(model).items()}
        same = icm.generate_adapter(task_vector=-vector, base_model=model, adapter_name="second")
        assert same is model and model.active_adapter == "second"
        assert all(torch.equal(tensors(model)[key], first[key]) for key in first)
        assert sorted(model.peft_config) == ["default", "second"]

    def test_of_the_same_name_is_swapped_in_place(self, family, vector):
        base, layout = family
        icm = generator(layout)
        model = icm.generate_adapter(task_vector=vector, base_model=base)
        places = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
        icm.generate_adapter(task_vector=-vector, base_model=model, generator=seeded(1))
        assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == places
        expected = icm.generate_state_dict(task_vector=-vector, generator=seeded(1))
        assert all(torch.equal(tensors(model)[key], expected[key]) for key in expected)

    def test_a_merged_one_is_unmerged_before_its_values_change(self, vector):
        base = llama()
        weight = base.model.layers[0].self_attn.q_proj.weight.clone()
        icm = generator()
        model = icm.generate_adapter(task_vector=vector, base_model=base)
        model.merge_adapter()
        with pytest.warns(UserWarning, match="Unmerging"):
            icm.generate_adapter(task_vector=-vector, base_model=model)
        torch.testing.assert_close(base.model.layers[0].self_attn.q_proj.base_layer.weight, weight)

    @pytest.mark.parametrize("config", [{"r": 4}, {"r": 2, "lora_alpha": 99}, {"r": 2, "target_modules": ["q_proj", "v_proj", "o_proj"]}])
    def test_of_the_same_name_and_another_layout_is_refused(self, vector, config):
        config = LoraConfig(**{"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **config})
        model = get_peft_model(llama(), config)
        before = {key: value.clone() for key, value in tensors(model).items()}
        with pytest.raises(ValueError, match="another adapter_name"):
            generator().generate_adapter(task_vector=vector, base_model=model)
        assert all(torch.equal(tensors(model)[key], before[key]) for key in before)


def test_trainable_on_request(family, vector):
    base, layout = family
    model = generator(layout).generate_adapter(task_vector=vector, base_model=base, is_trainable=True)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert model.training and len(trainable) == len(layout.keys)
    assert not model.peft_config["default"].inference_mode


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_refused(value):
    layout, base = llama_layout(), llama()
    state_dict = filled(layout)
    state_dict[layout.keys[1]][0, 0] = value
    with pytest.raises(ValueError, match="holds 1 NaN or infinite"):
        attach(base, layout, state_dict)
    assert not any("lora" in name for name, _ in base.named_modules())


def test_shared_tensors_are_not_copied():
    base = llama()
    other = share_tensors(base)
    assert other is not base
    assert all(a is b for a, b in zip(base.parameters(), other.parameters(), strict=True))


def test_inputs_are_exactly_one(vector):
    icm = generator()
    with pytest.raises(ValueError, match="exactly one of text, examples and task_vector, found none"):
        icm.generate_adapter(base_model=llama())
    with pytest.raises(ValueError, match="names no task encoder"):
        icm.generate_adapter("about cats", base_model=llama())


def test_a_named_adapter_is_saved_into_the_folder_itself(tmp_path, vector):
    model = generator().generate_adapter(task_vector=vector, base_model=llama(), adapter_name="sofas", generator=seeded(11))
    save_adapter(model, tmp_path / "sofas", "sofas")
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= {f.name for f in (tmp_path / "sofas").iterdir()}
    card = (tmp_path / "sofas" / "README.md").read_text()
    assert "11" in card and "None" not in card
    with pytest.raises(ValueError, match="No adapter named 'dogs'"):
        save_adapter(model, tmp_path / "sofas", "dogs")


def test_base_with_lora_of_another_kind_still_fits():
    model = llama_lora()
    AdapterLayout.from_peft_model(model).check_base(model.get_base_model())
