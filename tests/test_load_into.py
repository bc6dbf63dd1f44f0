"""An adapter in a plain transformers model, without a file: what attach does, and new values without a new graph."""

import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from tiny import CONDITION_DIM, filled, florence, florence_layout, generator, llama, llama_layout, llama_lora

from peft_icm import AdapterLayout, ICMGenerator, UnknownTaskError, bundled_generator
from peft_icm.adapters import attach
from peft_icm.adapters.load_into import load_into

TOKENS = torch.arange(5, 25)[None]
ONE, OTHER = torch.ones(CONDITION_DIM), -torch.ones(CONDITION_DIM)
PICTURE = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)


def seeded(build, *args, **kwargs):
    torch.manual_seed(0)
    return build(*args, **kwargs).eval()


def given(model):
    """What a forward of it takes: Florence-2 has 17 tokens for a picture of 32 pixels, and words after them."""
    if model.config.model_type == "llama":
        return {"input_ids": TOKENS}
    ids = torch.cat([torch.full((1, 17), model.config.image_token_id), TOKENS], 1)
    return {"input_ids": ids, "pixel_values": PICTURE, "decoder_input_ids": TOKENS[:, :5]}


@torch.no_grad()
def out(model, plain=None):
    return model(**given(plain or model)).logits


def values(model, name="default"):
    return {key: value.clone() for key, value in model.state_dict().items() if f".{name}." in key}


both = pytest.mark.parametrize(
    ("build", "layout"),
    [(llama, llama_layout()), (lambda: florence(image_token_id=127), florence_layout())],
    ids=["llama", "florence"],
)


@both
def test_the_same_function_as_an_attached_one(build, layout):
    icm = generator(layout)
    plain, seed = seeded(build), lambda: torch.Generator().manual_seed(7)
    kind, base = type(plain), out(plain)
    icm.load_into(plain, task_vector=ONE, generator=seed(), strength=2.0)
    peft_model = icm.generate_adapter(None, seeded(build), task_vector=ONE, generator=seed(), strength=2.0)
    assert type(plain) is kind and not plain.training
    torch.testing.assert_close(out(plain), peft_model(**given(plain)).logits, rtol=0, atol=0)
    assert not torch.allclose(out(plain), base)


@pytest.fixture
def graphs():
    """The graphs that `torch.compile(model, backend=graphs.backend)` makes."""

    class Graphs(list):
        def backend(self, graph, inputs):
            self.append(graph)
            return graph.forward

    torch._dynamo.reset()
    return Graphs()


@both
@pytest.mark.slow
def test_new_values_need_no_new_graph(build, layout, graphs):
    icm, model = generator(layout), seeded(build)
    icm.load_into(model, task_vector=ONE, temperature=0.0)
    compiled = torch.compile(model, backend=graphs.backend)
    first, before, count = out(compiled, model), {name: id(parameter) for name, parameter in model.named_parameters()}, len(graphs)
    assert count
    for vector in (OTHER, ONE):
        icm.load_into(model, task_vector=vector, temperature=0.0)
        assert torch.equal(out(compiled, model), first) == (vector is ONE)
    assert len(graphs) == count
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before


@pytest.mark.slow
def test_a_model_compiled_in_place_needs_one_for_an_injection_alone(graphs):
    icm, model = generator(), seeded(llama)
    icm.load_into(model, task_vector=ONE)
    model.compile(backend=graphs.backend)
    first, count = out(model), len(graphs)
    icm.load_into(model, task_vector=OTHER)
    assert not torch.equal(out(model), first) and len(graphs) == count > 0
    icm.load_into(model, task_vector=ONE, adapter_name="other")
    assert not torch.equal(out(model), first) and len(graphs) > count


@pytest.mark.slow
def test_a_swap_on_a_compiled_peft_model_needs_no_new_graph_either(graphs):
    icm = generator()
    model = icm.generate_adapter(None, seeded(llama), task_vector=ONE)
    compiled = torch.compile(model, backend=graphs.backend)
    first, count = out(compiled, model.get_base_model()), len(graphs)
    icm.generate_adapter(None, model, task_vector=OTHER)
    assert not torch.equal(out(compiled, model.get_base_model()), first) and len(graphs) == count > 0


@both
@pytest.mark.parametrize("put", [load_into, attach], ids=["load_into", "attach"])
def test_a_first_load_under_inference_mode_can_be_swapped_outside(build, layout, put):
    model = seeded(build)
    with torch.inference_mode():
        model = put(model, layout, filled(layout)) or model
    put(model, layout, filled(layout, 1))
    want = seeded(build)
    want = put(want, layout, filled(layout, 1)) or want
    found, expected = values(model), values(want)
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)


@both
def test_a_swap_ends_training_as_the_first_load_does(build, layout):
    model = seeded(build)
    load_into(model, layout, filled(layout))
    model.train()
    load_into(model, layout, filled(layout, 1))
    assert not any(module.training for module in model.modules())


@both
def test_nothing_is_called_newly_initialized(build, layout, caplog):
    model, logger = seeded(build), logging.getLogger("transformers.integrations.peft")
    logger.addHandler(caplog.handler)  # transformers' loggers propagate in some places only
    caplog.set_level(logging.WARNING, logger.name)  # the command line makes them say less
    try:
        for name in ("a", "b"):
            load_into(model, layout, filled(layout), adapter_name=name)
        assert not caplog.records
        logger.warning("of something else")
        assert caplog.records
    finally:
        logger.removeHandler(caplog.handler)


def test_names_side_by_side():
    layout, model = llama_layout(), seeded(llama)
    load_into(model, layout, filled(layout, 0), adapter_name="cats")
    first = out(model)
    load_into(model, layout, filled(layout, 1), adapter_name="layers")  # a name that stands in every key of the model
    second = out(model)
    load_into(model, layout, filled(layout, 0), adapter_name="cats")  # active again, with the values that it has
    assert torch.equal(out(model), first) and not torch.equal(first, second)
    load_into(model, layout, filled(layout, 0), adapter_name="layers")
    assert torch.equal(out(model), first)


def test_what_does_nothing_because_it_was_asked_to():
    model = seeded(llama)
    base, icm = out(model), generator()
    icm.load_into(model, task_vector=ONE, strength=0.0)
    assert torch.equal(out(model), base)
    icm.load_into(model, task_vector=ONE)
    assert not torch.equal(out(model), base)


def test_unknown_requests_of_a_bundled_generator():
    icm = ICMGenerator.from_pretrained(bundled_generator("text"))
    model = icm.load_base()
    base = out(model)
    with pytest.raises(UnknownTaskError):
        icm.load_into(model, "knitting patterns for beginners", on_unknown="raise")
    assert not hasattr(model, "peft_config")
    icm.load_into(model, "knitting patterns for beginners", on_unknown="base")
    assert torch.equal(out(model), base)
    icm.load_into(model, "the King James Bible", on_unknown="raise")
    assert not torch.equal(out(model), base)


# ---------------------------------------------------------------------- what would do nothing, or half of it
def test_keys_that_do_not_land_are_an_error():
    class Deaf(type(llama())):
        """Takes the keys and keeps its own values, as load_adapter does where a model's renaming of weights misses them."""

        def load_adapter(self, adapter_state_dict, **kwargs):
            return super().load_adapter(adapter_state_dict={f"x.{key}": value for key, value in adapter_state_dict.items()}, **kwargs)

    model, layout = Deaf(llama().config).eval(), llama_layout()
    layout = AdapterLayout.from_dict({**layout.to_dict(), "base_model_class": None})
    base = out(model)
    with pytest.raises(ValueError, match=r"q_proj\.lora_A\.weight: load_adapter left other values"):
        load_into(model, layout, filled(layout))
    assert torch.equal(out(model), base) and not hasattr(model, "peft_config")
    assert not any(isinstance(module, LoraLayer) for module in model.modules())


def times(factor, layout, matrix):
    """Values of which float16 has not those of one matrix."""
    return {key: tensor * factor if f"lora_{matrix}" in key else tensor for key, tensor in filled(layout).items()}


@both
@pytest.mark.parametrize("loaded", [False, True], ids=["first", "again"])
@pytest.mark.parametrize(("factor", "matrix"), [(1e-9, "B"), (1e-9, "A"), (1e9, "B")], ids=["no B", "no A", "infinite"])
def test_a_dtype_that_empties_or_breaks_the_adapter(build, layout, loaded, factor, matrix):
    model = seeded(build).half()
    if loaded:
        load_into(model, layout, filled(layout))
    before = values(model)
    with pytest.raises(ValueError, match="In float16, the dtype of the model's adapter"):
        load_into(model, layout, times(factor, layout, matrix))
    assert values(model).keys() == before.keys() and all(torch.equal(value, before[key]) for key, value in values(model).items())


def test_a_swap_on_a_peft_model_that_empties_the_adapter():
    layout = llama_layout()
    model = attach(seeded(llama), layout, filled(layout)).half()
    for matrix in "AB":
        with pytest.raises(ValueError, match="every B A of the adapter is zero"):
            attach(model, layout, times(1e-9, layout, matrix))


@pytest.mark.parametrize("name", ["default", "another"])
def test_disabled_adapters_are_an_error(name):
    layout = llama_layout()
    model = seeded(llama)
    load_into(model, layout, filled(layout))
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.enable_adapters(False)
    with pytest.raises(ValueError, match=r"q_proj: the adapters of this model are disabled.* enable_adapters\(True\) on each of its Lora"):
        load_into(model, layout, filled(layout, 1), adapter_name=name)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.enable_adapters(True)
    load_into(model, layout, filled(layout, 1), adapter_name=name)
    attached = attach(seeded(llama), layout, filled(layout))
    with attached.disable_adapter(), pytest.raises(ValueError, match=r"q_proj: the adapters of this model are disabled"):
        attach(attached, layout, filled(layout, 1), adapter_name=name)


def test_a_merged_adapter_is_taken_out_first():
    layout, model = llama_layout(), seeded(llama)
    load_into(model, layout, filled(layout, 1))
    expected = out(model)
    load_into(model, layout, filled(layout))
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.merge()
    with pytest.warns(UserWarning, match="Unmerging"):
        load_into(model, layout, filled(layout, 1))
    torch.testing.assert_close(out(model), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: llama(layers=3), r"more LoRA targets than the layout's 4"),
        (lambda: llama(hidden_size=32), r"expected shape \(2, 16\), found a base model that needs \(2, 32\)"),
        (florence, "are for a LlamaForCausalLM, found a Florence2ForConditionalGeneration"),
        (llama_lora, "is a PeftModelForCausalLM, must be a PreTrainedModel"),
        (lambda: torch.compile(llama(), backend="eager"), "is a OptimizedModule, must be a PreTrainedModel"),
    ],
)
def test_models_that_do_not_fit(model, message):
    layout = llama_layout()
    with pytest.raises(ValueError, match=message):
        load_into(model(), layout, filled(layout))


@pytest.mark.parametrize("put", [load_into, attach], ids=["load_into", "attach"])
def test_a_name_that_another_layout_has(put):
    layout, model = llama_layout(), seeded(llama)
    other = AdapterLayout.from_peft_model(get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")))
    model = put(model, layout, filled(layout)) or model
    with pytest.raises(ValueError, match="(another LoRA configuration|expected shape).* another adapter_name or load the base anew"):
        put(model, other, filled(other))
    put(model, other, filled(other), adapter_name="other")
    put(seeded(llama), other, filled(other))


def test_a_base_that_load_into_filled_is_no_base_for_attach():
    layout, model = llama_layout(), seeded(llama)
    load_into(model, layout, filled(layout))
    with pytest.raises(ValueError, match=r"carries adapters.*: unload\(\) the PeftModel, or load the base anew\."):
        attach(model, layout, filled(layout))


@both
@pytest.mark.parametrize("put", [load_into, attach], ids=["load_into", "attach"])
def test_a_name_of_a_target(build, layout, put):
    model = seeded(build)
    for target in {module.rpartition(".")[2] for module in layout.modules}:
        with pytest.raises(ValueError, match=f"adapter_name='{target}' is the name of a module that carries the adapter: choose another"):
            put(model, layout, filled(layout), adapter_name=target)
    assert not any(isinstance(module, LoraLayer) for module in model.modules())
