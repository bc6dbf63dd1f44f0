"""Vector -> PeftModel: injected, checked, swapped, saved, and loaded by peft alone."""

import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from tiny import CONDITION_DIM, FLORENCE_TARGETS, filled, florence, florence_layout, generator, llama, llama_layout, llama_lora
from transformers import AutoConfig

from peft_icm import AdapterLayout, save_adapter
from peft_icm.adapters.attach import attach
from peft_icm.adapters.base import share_tensors, untie

IMAGE_TOKEN = 9  # inside the tiny vocabulary


def seeing_florence():
    base = florence()
    base.config.image_token_id = IMAGE_TOKEN
    return base


BASES = {"llama": (llama, llama_layout), "florence": (seeing_florence, florence_layout)}


@pytest.fixture(params=BASES)
def family(request):
    build, layout = BASES[request.param]
    torch.manual_seed(0)
    return build(), layout()


@pytest.fixture
def saved_family(family, tmp_path):
    """The same with a base that lies in a folder, as a generator's own base does."""
    base, layout = family
    base.save_pretrained(tmp_path / "base")
    return type(base).from_pretrained(tmp_path / "base"), layout


def inputs_for(base):
    """Tokens, and a picture before them where the base looks at pictures."""
    tokens = torch.arange(10, 30)[None]
    if not hasattr(base.config, "vision_config"):
        return {"input_ids": tokens}
    torch.manual_seed(5)
    patches = torch.full((1, 17), IMAGE_TOKEN)  # a grid of 4 x 4, and its mean
    return {"input_ids": torch.cat([patches, tokens], 1), "decoder_input_ids": tokens, "pixel_values": torch.randn(1, 3, 32, 32)}


def logits(model):
    with torch.no_grad():
        return model(**inputs_for(model.get_base_model() if isinstance(model, PeftModel) else model)).logits


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


def test_saved_folder_is_loaded_by_peft_alone_with_the_same_logits(saved_family, tmp_path, vector):
    base, layout = saved_family
    model = generator(layout).generate_adapter(task_vector=vector, base_model=base)
    save_adapter(model, tmp_path / "adapter")
    torch.save([inputs_for(base), logits(model)], tmp_path / "seen.pt")
    auto = "AutoPeftModelForCausalLM" if layout.peft_config.get("task_type") == "CAUSAL_LM" else "AutoPeftModel"
    script = f"""
import sys
sys.modules["peft_icm"] = None
import torch
from peft import {auto}, PeftConfig
config = PeftConfig.from_pretrained({str(tmp_path / "adapter")!r})
assert config.inference_mode and config.base_model_name_or_path == {str(tmp_path / "base")!r}
model = {auto}.from_pretrained({str(tmp_path / "adapter")!r}).eval()
inputs, logits = torch.load({str(tmp_path / "seen.pt")!r})
torch.testing.assert_close(model(**inputs).logits, logits)
print("same logits")
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert "same logits" in run.stdout, run.stderr


def test_saved_folder_holds_the_adapter_and_nothing_of_the_base(family, tmp_path, vector):
    base, layout = family
    model = generator(layout).generate_adapter(task_vector=vector, base_model=share_tensors(base))
    save_adapter(model, tmp_path / "adapter")
    assert AdapterLayout.from_pretrained(tmp_path / "adapter").fingerprint == layout.fingerprint
    again = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert all(torch.equal(value, tensors(model)[key]) for key, value in tensors(again).items())


def test_saved_folder_is_loaded_by_load_adapter_of_transformers_and_of_peft(family, tmp_path, vector):
    base, layout = family
    icm = generator(layout)
    model = icm.generate_adapter(task_vector=vector, base_model=share_tensors(base))
    save_adapter(model, tmp_path / "adapter")
    expected = logits(model)
    other = icm.generate_adapter(task_vector=-vector, base_model=share_tensors(base))
    other.load_adapter(tmp_path / "adapter", adapter_name="second")
    other.set_adapter("second")
    torch.testing.assert_close(logits(other.eval()), expected)
    before = logits(base.eval())
    base.load_adapter(str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(base.eval()), expected)
    assert not torch.allclose(before, expected, atol=1e-3)


class TestBaseModels:
    def test_a_model_is_wrapped_in_place(self, family, vector):
        base, layout = family
        model = generator(layout).generate_adapter(task_vector=vector, base_model=base)
        assert model.get_base_model() is base

    def test_a_folder_is_loaded_with_its_kwargs(self, saved_family, tmp_path, vector):
        _, layout = saved_family
        folder, kwargs = tmp_path / "base", {"dtype": torch.bfloat16}
        model = generator(layout).generate_adapter(task_vector=vector, base_model=folder, base_model_kwargs=kwargs)
        assert model.get_base_model().dtype == torch.bfloat16
        assert logits(model).isfinite().all()

    def test_no_base_gives_independent_models_on_shared_tensors(self, saved_family, vector):
        base, layout = saved_family
        icm = generator(AdapterLayout.from_peft_model(get_peft_model(base, layout.lora_config())))
        one = icm.generate_adapter(task_vector=vector)
        before = {key: value.clone() for key, value in tensors(one).items()}
        two = icm.generate_adapter(task_vector=-vector)
        assert one.get_base_model() is not two.get_base_model()
        assert all(torch.equal(tensors(one)[key], before[key]) for key in before)
        assert not all(torch.equal(tensors(two)[key], before[key]) for key in before)
        assert len({model.get_input_embeddings().weight.data_ptr() for model in (one, two, icm.load_base())}) == 1

    def test_wrong_base_is_refused_before_anything_is_touched(self, family, vector):
        _, layout = family
        wrong = llama(layers=1)
        names = [name for name, _ in wrong.named_modules()]
        with pytest.raises(ValueError, match="expected shape|are for a"):
            generator(layout).generate_adapter(task_vector=vector, base_model=wrong)
        assert [name for name, _ in wrong.named_modules()] == names

    def test_another_revision_warns(self, family, vector):
        base, layout = family
        layout = AdapterLayout.from_dict({**layout.to_dict(), "revision": "abc", "base_model_name_or_path": "org/base"})
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

    @pytest.mark.parametrize("merge", [False, True])
    def test_the_inside_of_a_peft_model_is_no_base(self, family, vector, merge):
        base, layout = family
        model = generator(layout).generate_adapter(task_vector=vector, base_model=base)
        if merge:
            model.merge_adapter()
        before = logits(model)
        with pytest.raises(ValueError, match="base_model carries adapters" + " that are merged into it" * merge):
            attach(model.get_base_model(), layout, filled(layout))
        assert torch.equal(logits(model), before)
        attach(model.unload(), layout, filled(layout))  # without them it is one again

    def test_a_merged_one_is_unmerged_before_its_values_change(self, family, vector):
        base, layout = family
        weights = {name: base.get_submodule(name).weight.clone() for name in layout.modules}
        icm = generator(layout)
        model = icm.generate_adapter(task_vector=vector, base_model=base)
        model.merge_adapter()
        with pytest.warns(UserWarning, match="Unmerging"):
            icm.generate_adapter(task_vector=-vector, base_model=model)
        for name, weight in weights.items():
            torch.testing.assert_close(base.get_submodule(name).base_layer.weight, weight)

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
def test_a_value_that_is_not_finite_is_refused(family, value):
    base, layout = family
    state_dict = filled(layout)
    state_dict[layout.keys[1]][0, 0] = value
    with pytest.raises(ValueError, match="holds 1 NaN or infinite"):
        attach(base, layout, state_dict)
    assert not any("lora" in name for name, _ in base.named_modules())


def test_shared_tensors_are_not_copied_until_a_merge_or_the_base_is_given_away(family, vector):
    base, layout = family
    expected = {name: parameter.clone() for name, parameter in base.named_parameters()}
    places = [parameter.data_ptr() for parameter in base.parameters()]
    icm = generator(layout)
    ways = {
        "merge_and_unload": lambda model: model.merge_and_unload(),
        "merge_adapter": lambda model: model.merge_adapter(),
        "merge of a second adapter": lambda model: icm.generate_adapter(
            task_vector=vector, base_model=model, adapter_name="b"
        ).merge_adapter(),
        "unload, then a merge of another": lambda model: get_peft_model(model.unload(), layout.lora_config()).merge_and_unload(),
    }
    for what, way in ways.items():
        other = share_tensors(base)
        assert [parameter.data_ptr() for parameter in other.parameters()] == places, what
        model = icm.generate_adapter(task_vector=vector, base_model=other)
        way(untie(model) if layout.base_model_class.startswith("Florence") else model)
        assert not set(places) & {parameter.data_ptr() for parameter in other.parameters()}, what
        assert all(torch.equal(parameter, expected[name]) for name, parameter in base.named_parameters()), what


@pytest.mark.parametrize("prepare", [lambda model: model, untie], ids=["as it is", "untied"])
def test_a_merge_leaves_the_generator_s_own_base_and_other_models_as_they_were(saved_family, tmp_path, vector, prepare):
    _, layout = saved_family
    icm = generator(AdapterLayout.from_dict({**layout.to_dict(), "base_model_name_or_path": str(tmp_path / "base")}))
    other = icm.generate_adapter(task_vector=vector, generator=seeded(1))
    expected = logits(other)
    merged = prepare(icm.generate_adapter(task_vector=vector, generator=seeded(1))).merge_and_unload()
    assert not torch.equal(logits(merged), logits(icm.load_base()))
    assert torch.equal(logits(other), expected)
    assert torch.equal(logits(icm.generate_adapter(task_vector=vector, generator=seeded(1))), expected)


class TestTiedHead:
    """A LoRA on an output embedding whose weight is the input embedding too."""

    @pytest.fixture(params=["llama", "florence"])
    def tied(self, request):
        torch.manual_seed(0)
        if request.param == "florence":
            base, config = seeing_florence(), LoraConfig(r=2, target_modules=FLORENCE_TARGETS, task_type=None)
        else:
            base = llama(tie_word_embeddings=True)
            config = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
        assert base.get_output_embeddings().weight is base.get_input_embeddings().weight
        return base.eval(), AdapterLayout.from_peft_model(get_peft_model(share_tensors(base), config))

    def test_attaching_says_once_that_it_must_be_untied_before_a_merge(self, tied, recwarn):
        base, layout = tied
        model = attach(base, layout, filled(layout))
        attach(model, layout, filled(layout, 1))
        attach(model, layout, filled(layout, 2), adapter_name="second")
        assert sum("call peft_icm.adapters.untie(model) before merge_and_unload" in str(w.message) for w in recwarn) == 1

    def test_of_an_untied_base_no_warning_is_given(self, tied, recwarn):
        base, layout = tied
        attach(untie(base), layout, filled(layout))
        assert not [w for w in recwarn if "shares its weight" in str(w.message) or "tied" in str(w.message)]

    @pytest.mark.parametrize("when", ["before attaching", "after attaching"])
    def test_untied_it_merges_right_and_survives_saving(self, tied, when, tmp_path):
        base, layout = tied
        state_dict = {key: value / 4 for key, value in filled(layout).items()}
        expected = logits(attach(share_tensors(base), layout, state_dict))
        model = attach(untie(base), layout, state_dict) if when == "before attaching" else untie(attach(base, layout, state_dict))
        torch.testing.assert_close(logits(model), expected)
        merged = model.merge_and_unload()
        assert type(merged) is type(base)
        torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
        merged.save_pretrained(tmp_path)
        assert not AutoConfig.from_pretrained(tmp_path).tie_word_embeddings
        loaded = type(base).from_pretrained(tmp_path)
        torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-4)
        loaded.tie_weights()
        torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-4)

    def test_merged_in_place_and_taken_out_again(self, tied):
        base, layout = tied
        plain = logits(base)
        model = untie(attach(base, layout, {key: value / 4 for key, value in filled(layout).items()}))
        expected = logits(model)
        model.merge_adapter()
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
        model.unmerge_adapter()
        torch.testing.assert_close(logits(model.unload()), plain, rtol=1e-4, atol=1e-4)

    def test_models_on_the_same_tensors_stay_as_they_are(self, tied):
        base, layout = tied
        one, two = (attach(share_tensors(base), layout, filled(layout, seed)) for seed in (1, 2))
        plain, expected = logits(base), logits(two)
        untie(one).merge_and_unload()
        assert torch.equal(logits(base), plain) and torch.equal(logits(two), expected)
        for other in (base, two.get_base_model()):
            head = other.get_output_embeddings()
            assert getattr(head, "base_layer", head).weight is other.get_input_embeddings().weight
            assert other.config.tie_word_embeddings


@pytest.mark.parametrize("text", [None, "about cats"])
def test_without_an_encoder_only_a_task_vector_is_taken(family, text):
    base, layout = family
    with pytest.raises(ValueError, match="names no task encoder"):
        generator(layout).generate_adapter(text, base_model=base)


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


@pytest.mark.parametrize("name", ["train", "keys", "type", "half", "a.b", "", "../up", "a/b"])
def test_a_name_that_peft_cannot_keep_is_refused(name):
    base, layout = llama(), llama_layout()
    with pytest.raises(ValueError, match="name"):
        attach(base, layout, filled(layout), adapter_name=name)
    assert not any("lora" in module for module, _ in base.named_modules())


def test_an_adapter_of_transformers_load_adapter_is_not_replaced(tmp_path):
    layout = llama_layout()
    save_adapter(attach(llama(), layout, filled(layout)), tmp_path)
    base = llama()
    base.load_adapter(str(tmp_path))
    before = logits(base)
    with pytest.raises(ValueError, match="load_adapter"):
        attach(base, layout, filled(layout, 1))
    assert torch.equal(logits(base), before)
