"""Decoders that fit: columns at a time, a basis in 8 bits, no copy of an adapter beside it, one more adapter in constant time."""

import copy
import itertools
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_attach import all_of, equal, out, seeded, tensors
from tiny import CONDITION_DIM, filled, florence, florence_layout, generator, llama, llama_layout
from torch.overrides import TorchFunctionMode

from peft_icm import AdapterLayout, ICMConfig, ICMGenerator, save_adapter
from peft_icm.adapters import attach
from peft_icm.adapters.beside import fits_beside
from peft_icm.adapters.tensors import outside_adapters
from peft_icm.generator import folded, linear_decoder

FAMILIES = {"llama": (llama_layout, llama), "florence": (florence_layout, florence)}
VECTOR = torch.linspace(-1, 1, CONDITION_DIM)


def fitted(layout, architecture="principal", **kwargs):
    """A generator with statistics and a centre that are not those of a new one."""
    model = generator(layout, architecture=architecture, context=architecture == "principal", **kwargs)
    torch.manual_seed(3)
    model.fit(torch.randn(12, layout.numel) * torch.rand(layout.numel) + 0.3, torch.randn(12, CONDITION_DIM))
    return model


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def layout(family):
    return FAMILIES[family][0]()


@pytest.fixture
def base(family):
    return lambda: seeded(FAMILIES[family][1])


def quantised(model, folder):
    model.save_pretrained(folder, dtype="int8")
    return ICMGenerator.from_pretrained(folder)


# ---------------------------------------------------------------------- columns at a time
class TestColumns:
    @pytest.mark.parametrize("block", [1, 700, 2**20, "folded"])
    @pytest.mark.parametrize("count", [1, 40])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
    @pytest.mark.parametrize("architecture", ["principal", "direct", "paper"])
    def test_what_is_decoded_in_blocks_is_what_is_decoded_whole(self, layout, architecture, dtype, count, block, tmp_path, monkeypatch):
        model = fitted(layout, architecture)
        if dtype == torch.int8:
            if architecture == "paper":
                pytest.skip("has no basis")
            model = quantised(model, tmp_path)
        else:
            model = model.to(dtype)
        if block != "folded":
            monkeypatch.setattr(folded, "LARGEST", 0)
            monkeypatch.setattr(linear_decoder, "BLOCK", block)
        torch.manual_seed(0)
        z, v = torch.randn(count, model.config.latent_size), torch.randn(count, CONDITION_DIM)
        whole = model.decode(z, v)
        assert whole.requires_grad
        with torch.no_grad():
            found = model.decode(z, v)
        near = 1e-5 if dtype != torch.bfloat16 else 2e-2
        torch.testing.assert_close(found, whole.detach(), rtol=near, atol=near)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_generated_tensors_are_the_sample_of_the_same_seed(self, layout, dtype):
        layout = AdapterLayout.from_dict({**layout.to_dict(), "dtype": dtype})
        model = fitted(layout)
        found = model.generate_state_dict(task_vector=VECTOR, generator=torch.Generator().manual_seed(4))
        expected = model.sample(VECTOR, generator=torch.Generator().manual_seed(4))[0]
        assert equal(found, layout.unflatten(expected))
        assert len(set(map(place, found.values()))) == len(found)
        half = model.generate_state_dict(task_vector=VECTOR, generator=torch.Generator().manual_seed(4), strength=0.5)
        assert all(torch.equal(half[key], tensor * (0.5 if "_B" in key else 1)) for key, tensor in found.items())

    @pytest.mark.parametrize("space", ["none", "lda"])
    @pytest.mark.parametrize("context", [True, False])
    def test_few_products_follow_the_parameters(self, layout, space, context):
        """What is multiplied out is that of the parameters as they are now."""
        torch.manual_seed(3)
        model = generator(layout, condition_space=space, context=context)
        model.fit(torch.randn(12, layout.numel), torch.randn(12, CONDITION_DIM), torch.arange(12) % len(model.config.tasks))
        z, v, found = torch.randn(3, model.config.latent_size), torch.randn(3, CONDITION_DIM), []

        def check():
            whole = model.decode(z, v).detach()
            with torch.no_grad():
                assert (model.decode(z, v) - whole).norm() < 1e-5 * whole.norm()
            assert model._lazy["folded"].holds()
            found.append(whole)

        check()
        network, statistics = model.network, model.statistics
        parts = [network.basis, network.center, network.scale, network.decoder.output.weight, network.decoder.input.weight]
        parts += [network.condition.weight, statistics.mean, statistics.std, statistics.condition_mean, statistics.condition_std]
        parts += [model.space.center, model.space.projection] if model.space else []
        if model.context:
            torch.nn.init.normal_(model.context.output.weight)
            parts += [model.context.latents, model.context.conditions, model.context.value.weight, model.context.query.weight]
        for part in parts:
            with torch.no_grad():
                part.add_(torch.rand_like(part))
            check()
        network.basis = torch.nn.Parameter(torch.randn_like(network.basis))
        check()
        model.half().float()
        check()
        model.load_state_dict({name: tensor * 1.5 for name, tensor in model.state_dict().items()}, assign=True)
        check()
        assert all(not torch.equal(one, two) for one, two in itertools.pairwise(found))
        assert copy.deepcopy(model)._lazy["folded"] is None
        with torch.inference_mode():
            network.center = torch.nn.Parameter(torch.ones(layout.numel), requires_grad=False)
            ones = model.decode(z, v)
            network.center.zero_()
            assert model._lazy["folded"] is None and not torch.equal(model.decode(z, v), ones)

    def test_a_walk_has_every_tensor_once(self, layout, monkeypatch):
        values = filled(layout)
        for group in (1, 100, 2**18):
            monkeypatch.setattr("peft_icm.adapters.tensors.GROUP", group)
            assert torch.equal(torch.cat(list(layout.parts(values))), layout.flatten(values))
        digests = layout.digests(values, ["float32", "bfloat16"])
        assert digests["bfloat16"] != digests["float32"] == layout.sha256(values)


# ---------------------------------------------------------------------- 8 bits
class TestInt8:
    @pytest.mark.parametrize("architecture", ["principal", "direct"])
    def test_saved_loaded_and_saved_again(self, layout, architecture, tmp_path):
        model = fitted(layout, architecture)
        found = quantised(model, tmp_path / "once")
        basis = model.network.basis.detach()
        assert found.network.basis.dtype == torch.int8 and model.network.basis.dtype == torch.float32
        assert (found.network.rows - basis).abs().max() <= basis.abs().amax(1).max() / 250
        for name, tensor in model.state_dict().items():
            assert name == "network.basis" or torch.equal(found.state_dict()[name], tensor), name
        one, two = (each.sample(VECTOR, temperature=0.0)[0] for each in (model, found))
        assert 0 < (one - two).norm() < 0.02 * one.norm()
        found.save_pretrained(tmp_path / "again")
        again = ICMGenerator.from_pretrained(tmp_path / "again")
        assert torch.equal(again.sample(VECTOR, temperature=0.0)[0], two)
        assert quantised(found, tmp_path / "thrice").config.basis_dtype == "int8"

    def test_codes_and_scales_outlive_a_cast(self, layout, tmp_path):
        found = quantised(fitted(layout), tmp_path)
        expected = found.network.rows.clone()
        for dtype in (torch.bfloat16, torch.float32):
            assert torch.equal(found.to(dtype).network.rows.float(), expected)
        loaded = ICMGenerator.from_pretrained(tmp_path, dtype=torch.bfloat16)
        assert loaded.network.basis.dtype == torch.int8 and loaded.network.center.dtype == torch.bfloat16

    def test_a_row_of_zeros(self, tmp_path):
        model = fitted(llama_layout())
        with torch.no_grad():
            model.network.basis[2] = 0
        assert not quantised(model, tmp_path).network.rows[2].any()

    @pytest.mark.parametrize("architecture", ["principal", "direct"])
    def test_it_encodes(self, layout, architecture, tmp_path):
        model = fitted(layout, architecture)
        found = quantised(model, tmp_path)
        parameters, condition = torch.randn(3, layout.numel), torch.randn(3, CONDITION_DIM)
        with torch.no_grad():
            one, two = (each(parameters, condition, noise=torch.zeros(3, 4)) for each in (model, found))
        torch.testing.assert_close(one.latent_mean, two.latent_mean, rtol=0.05, atol=0.05)

    def test_what_takes_gradients_is_not_of_8_bits(self, layout, tmp_path):
        found = quantised(fitted(layout, "direct"), tmp_path)
        for refused in (found.train, lambda: found.fit(torch.randn(3, layout.numel), torch.randn(3, CONDITION_DIM))):
            with pytest.raises(ValueError, match="basis_dtype='int8': the map of 'direct' does not train in 8 bits"):
                refused()

    def test_what_is_estimated_is_never_whole_in_fp32(self, layout, monkeypatch):
        monkeypatch.setattr(linear_decoder, "BLOCK", 1000)
        parameters, condition = torch.randn(3, layout.numel), torch.randn(3, CONDITION_DIM)
        with Largest() as watch:
            model = generator(layout, num_components=24, basis_dtype="int8")
            model.fit(parameters, condition)
            coordinates = model.project(parameters)
        assert watch.numbers <= 24 * layout.numel / 2
        assert model.network.basis.dtype == torch.int8 and coordinates.shape == (3, 3)
        given = {"condition": condition, "noise": torch.zeros(3, 4)}
        with torch.no_grad():
            whole, small = (
                model(**adapters, **given).squared_error for adapters in ({"parameters": parameters}, {"coordinates": coordinates})
            )
        torch.testing.assert_close(small, whole, rtol=0.02, atol=0)

    def test_what_is_none(self, tmp_path):
        with pytest.raises(ValueError, match="basis_dtype='int4' is unknown"):
            ICMConfig(basis_dtype="int4")
        with pytest.raises(ValueError, match="architecture='paper' has no basis"):
            ICMConfig(basis_dtype="int8", architecture="paper")
        with pytest.raises(ValueError, match="architecture='paper' has no basis"):
            generator(architecture="paper").save_pretrained(tmp_path / "g", dtype="int8")
        for verb in (generator().save_pretrained, generator().push_to_hub):
            with pytest.raises(ValueError, match="dtype='int4' is none that a generator is saved in: choose one of float32, bfloat16"):
                verb(str(tmp_path / "g"), dtype="int4")
        assert not (tmp_path / "g").exists()

    def test_files_that_are_of_another_kind(self, tmp_path):
        quantised(fitted(llama_layout()), tmp_path)
        file, config = tmp_path / "model.safetensors", tmp_path / "config.json"
        kept = load_file(file)
        save_file({**kept, "network.basis": kept["network.basis"].float()}, file)
        with pytest.raises(ValueError, match=r"network\.basis is of F32, must be I8"):
            ICMGenerator.from_pretrained(tmp_path)
        del kept["network.row_scale"]
        save_file(kept, file)
        config.write_text(json.dumps({**json.loads(config.read_text()), "basis_dtype": None}))
        with pytest.raises(ValueError, match=r"network\.basis is of I8, must be floating point"):
            ICMGenerator.from_pretrained(tmp_path)

    @pytest.mark.parametrize("dtype", ["bfloat16", torch.float16, "int8"])
    def test_dtype_of_what_is_pushed(self, dtype, tmp_path, hub, token):
        model = fitted(llama_layout())
        name = str(dtype).removeprefix("torch.")
        with pytest.warns(UserWarning, match="goes without its base model"):
            model.push_to_hub(f"me/{name}", dtype=dtype, token=token)
        found = ICMGenerator.from_pretrained(f"me/{name}", token=token)
        assert str(found.network.basis.dtype) == f"torch.{name}" and found.statistics.mean.dtype == torch.float32
        assert found.dtype == (torch.float32 if name == "int8" else getattr(torch, name))
        assert torch.equal(found.statistics.std, model.statistics.std)
        near = {"rtol": 0.05, "atol": 0.05}
        torch.testing.assert_close(found.sample(VECTOR, temperature=0.0), model.sample(VECTOR, temperature=0.0), **near)


# ---------------------------------------------------------------------- memory
def place(tensor):
    return tensor.untyped_storage().data_ptr()


class Largest(TorchFunctionMode):
    """Remembers the most numbers of fp32 that would fit into what an operation of torch made in floating point."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        given = {place(tensor) for tensor in args if isinstance(tensor, torch.Tensor)}
        if isinstance(found, torch.Tensor) and found.dtype.is_floating_point and place(found) not in given:
            self.numbers = max(self.numbers, found.nbytes / 4)
        return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_nothing_of_an_adapter_s_size_is_made_beside_it(dtype, tmp_path, monkeypatch):
    layout = AdapterLayout.from_peft_model(get_peft_model(llama(hidden_size=256), LoraConfig(r=64, target_modules=["q_proj", "v_proj"])))
    monkeypatch.setattr("peft_icm.generator.statistics.PIECE", 256)
    model, base = fitted(layout), llama(hidden_size=256)
    model = quantised(model, tmp_path / "g").bfloat16() if dtype == torch.int8 else model.to(dtype)
    monkeypatch.setattr("peft_icm.adapters.tensors.GROUP", 1000)
    monkeypatch.setattr(folded, "LARGEST", 0)
    monkeypatch.setattr(linear_decoder, "BLOCK", 2000)
    with Largest() as watch:
        adapted = model.generate_adapter(base_model=base, task_vector=VECTOR)
        save_adapter(adapted, tmp_path / "a")
        model.generate_state_dict(task_vector=VECTOR)
    assert layout.numel > 3 * max(layout.sizes) >= 3 * watch.numbers > 0
    assert "peft_icm" in (tmp_path / "a" / "README.md").read_text()


def test_what_is_given_away_is_not_copied(layout, base):
    values = filled(layout)
    model = attach(base(), layout, values, copy=False)
    addresses = {parameter.data_ptr() for parameter in model.parameters()}
    assert all(tensor.data_ptr() in addresses for tensor in values.values())
    kept = attach(base(), layout, values)
    addresses = {parameter.data_ptr() for parameter in kept.parameters()}
    assert not any(tensor.data_ptr() in addresses for tensor in values.values())


def test_a_generated_adapter_is_trainable_though_it_was_made_in_inference_mode(layout, base):
    model = fitted(layout)
    with torch.inference_mode():
        adapted = model.generate_adapter(base_model=base(), task_vector=VECTOR, is_trainable=True)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    assert len(trained) == len(layout.keys) and not any(parameter.is_inference() for parameter in trained)


# ---------------------------------------------------------------------- one more adapter
def by_peft(model, layout, values, name, trainable):
    """What `attach` does, by peft alone."""
    config = layout.lora_config()
    config.inference_mode = not trainable
    config.base_model_name_or_path = model.get_base_model().name_or_path or layout.base_model_name_or_path
    model.add_adapter(name, config)
    with torch.no_grad():
        for key, tensor in values.items():
            module, _, last = key.removesuffix(".weight").rpartition(".")
            found = getattr(model.get_submodule(module), last)[name]
            getattr(found, "weight", found).copy_(tensor)
    model.set_adapter(name, inference_mode=not trainable)
    return model.train(trainable)


class TestBeside:
    @pytest.mark.parametrize("trainable", [False, True])
    @pytest.mark.parametrize("before", [False, True])
    def test_it_leaves_what_peft_leaves(self, base, layout, before, trainable):
        models = [attach(base(), layout, filled(layout), adapter_name="one", is_trainable=before) for _ in range(2)]
        assert fits_beside(models[0], outside_adapters(models[0]), layout.modules)
        for name, seed in (("two", 1), ("three", 2)):
            attach(models[0], layout, filled(layout, seed), adapter_name=name, is_trainable=trainable)
            by_peft(models[1], layout, filled(layout, seed), name, trainable)
        one, two = map(all_of, models)
        for found in (one, two):
            found["parameters"] = [(name, requires_grad) for name, _, requires_grad in found["parameters"]]
        assert one == two
        for name in ("one", "two", "three"):
            assert equal(tensors(models[0], name), tensors(models[1], name))

    def test_of_fewer_modules_it_silences_the_others(self):
        small = AdapterLayout.from_peft_model(get_peft_model(llama(), LoraConfig(r=3, target_modules=["q_proj"], task_type="CAUSAL_LM")))
        layout = llama_layout()
        model = attach(seeded(llama), layout, filled(layout), adapter_name="wide", is_trainable=True)
        expected = out(attach(seeded(llama), small, filled(small)))
        attach(model, small, filled(small), adapter_name="narrow")
        torch.testing.assert_close(out(model), expected)
        assert model.active_adapters == ["narrow"] and not any(parameter.requires_grad for parameter in model.parameters())

    def test_what_another_way_is_needed_for(self):
        wide = AdapterLayout.from_peft_model(get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj", "o_proj", "v_proj"])))
        layout = llama_layout()
        model = attach(seeded(llama), layout, filled(layout))
        assert not fits_beside(model, outside_adapters(model), wide.modules)
        expected = out(attach(seeded(llama), wide, filled(wide)))
        torch.testing.assert_close(out(attach(model, wide, filled(wide), adapter_name="wide")), expected)
        model.merge_adapter()
        assert not fits_beside(model, outside_adapters(model), layout.modules)

    def test_a_failure_half_way_leaves_the_model_as_it_was(self, base, layout):
        model = attach(base(), layout, filled(layout), adapter_name="one", is_trainable=True)
        name = layout.modules[-1]
        weight = model.get_base_model().get_submodule(name).get_base_layer()
        weight.weight = torch.nn.Parameter(weight.weight.to("meta"), requires_grad=False)
        before = all_of(model)
        with pytest.raises(ValueError, match="is on the meta device"):
            attach(model, layout, filled(layout, 1), adapter_name="two", is_trainable=True)
        assert all_of(model) == before

    def test_the_walk_does_not_grow(self, base, layout):
        model = attach(base(), layout, filled(layout), adapter_name="0")
        outside = list(outside_adapters(model))
        for index in range(1, 4):
            attach(model, layout, filled(layout), adapter_name=str(index))
        assert list(outside_adapters(model)) == outside
        bare = base()
        assert list(outside_adapters(bare).items()) == list(bare.named_modules())
