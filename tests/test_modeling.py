"""ICMGenerator as a PreTrainedModel and a CVAE: shapes, masking, sampling, saving."""

import pytest
import torch
from tiny import CONDITION_DIM, florence_layout, generator, llama_layout
from transformers import AutoConfig, AutoModel

from peft_icm import ICMConfig, ICMGenerator
from peft_icm.generator.networks import PaperNetwork, PrincipalNetwork

ARCHITECTURES = ["principal", "paper"]
LAYOUTS = {"llama": llama_layout, "florence": florence_layout}


def batch(model, size=3, seed=0):
    torch.manual_seed(seed)
    return torch.randn(size, model.layout.numel), torch.randn(size, CONDITION_DIM)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_forward_scores_what_it_reconstructs(architecture, layout):
    model = generator(LAYOUTS[layout](), architecture=architecture)
    parameters, condition = batch(model)
    output = model(parameters, condition)
    assert output.reconstruction.shape == parameters.shape
    error = (model.statistics.normalize(output.reconstruction) - model.statistics.normalize(parameters)).square().mean(1)
    torch.testing.assert_close(output.squared_error, error, rtol=1e-4, atol=1e-5)
    mean, logvar = output.latent_mean, output.latent_logvar
    posterior = torch.distributions.Normal(mean, (logvar / 2).exp())
    kl = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum(1).mean()
    torch.testing.assert_close(output.kl_loss, kl)
    torch.testing.assert_close(output.loss, output.reconstruction_loss + 0.005 * kl)
    output.loss.backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without


def test_the_published_loss_is_the_squared_error_plus_a_small_kl():
    model = generator(architecture="paper")
    output = model(*batch(model))
    torch.testing.assert_close(output.loss, output.squared_error.mean() + 0.005 * output.kl_loss)


def test_padding_of_the_convolutions_never_enters_the_loss():
    model = generator(architecture="paper")
    parameters, condition = batch(model)
    size = model.layout.numel
    assert model.network.padded > size + CONDITION_DIM

    def losses(*places):
        """The losses when the network puts other numbers in these places of its output."""

        def change(module, inputs, output):
            assert output.shape[-1] == model.network.padded
            for place in places:
                output[..., place] += 3.0
            return output

        hook = model.network.output.register_forward_hook(change)
        torch.manual_seed(0)  # of z
        with torch.no_grad():
            output = model(parameters, condition)
        hook.remove()
        return [output.loss.item(), output.reconstruction_loss.item(), *output.squared_error.tolist()]

    assert losses(slice(size, None)) == losses() == losses(-1)
    assert all(changed != loss for place in (0, size - 1) for changed, loss in zip(losses(place), losses(), strict=True))


@pytest.mark.parametrize("layers", [10, 11, 12, 13, 20])
def test_the_depth_of_table_5(layers):
    network = generator(architecture="paper", num_conv_layers=layers).network
    assert isinstance(network, PaperNetwork)
    strides = [module[0].stride[0] for module in network.encoder]
    assert strides == [2] * min(layers, 12) + [1] * max(0, layers - 12)
    assert len(network.decoder) == layers


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_batch_norm(architecture):
    kinds = {type(module).__name__ for module in generator(architecture=architecture).modules()}
    assert not {kind for kind in kinds if "BatchNorm" in kind}


@pytest.mark.parametrize("condition_dim", [384, 512, 768])
def test_size_limits_of_the_default(condition_dim):
    def numbers(architecture, numel):
        keys, shapes = [f"base_model.model.m.lora_{matrix}.weight" for matrix in "AB"], [[1, numel - 1], [1, 1]]
        layout = {"keys": keys, "shapes": shapes, "dtype": "float32", "peft_config": {"peft_type": "LORA", "r": 1}}
        tasks = [{"name": str(i), "description": ""} for i in range(12)]
        config = ICMConfig(architecture=architecture, layout=layout, condition_dim=condition_dim, tasks=tasks)
        with torch.device("meta"):
            return sum(t.numel() for t in ICMGenerator(config).state_dict().values())

    assert numbers("principal", 10_240) <= numbers("paper", 10_240)
    assert numbers("principal", 482_482) <= 12 * 482_482


def test_principal_subspace_is_exact_for_what_spans_it():
    torch.manual_seed(0)
    model = generator(num_components=5)
    directions = torch.randn(5, model.layout.numel)
    snapshots = torch.randn(40, 5) @ directions + 3
    model.fit(snapshots, torch.randn(40, CONDITION_DIM))
    network = model.network
    assert isinstance(network, PrincipalNetwork)
    torch.testing.assert_close(network.basis @ network.basis.T, torch.eye(5), rtol=1e-4, atol=1e-4)
    x = model.statistics.normalize(snapshots)
    coordinates = (x - network.center) @ network.basis.T / network.scale
    torch.testing.assert_close(coordinates.std(0, correction=0), torch.ones(5), rtol=1e-3, atol=1e-3)
    back = torch.addmm(network.center, coordinates * network.scale, network.basis)
    torch.testing.assert_close(back, x, rtol=1e-3, atol=1e-3)


class TestStatistics:
    def test_pooled_per_tensor_with_zero_variance_guarded(self):
        model = generator()
        first = model.layout.sizes[0]
        parameters = torch.randn(20, model.layout.numel) * 5 + 2
        parameters[:, :first] = 7.0
        model.fit(parameters, torch.randn(20, CONDITION_DIM))
        normalized = model.statistics.normalize(parameters)
        assert model.statistics.std[0] == 1 and torch.all(normalized[:, :first] == 0)
        rest = normalized[:, first:].split(model.layout.sizes[1:], dim=1)
        assert all(abs(part.mean()) < 1e-4 and abs(part.std() - 1) < 1e-2 for part in rest)
        torch.testing.assert_close(model.statistics.denormalize(normalized), parameters)

    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_stay_in_fp32_when_loaded_in_bf16(self, architecture, tmp_path):
        model = generator(architecture=architecture)
        model.fit(torch.randn(20, model.layout.numel) + 0.123456789, torch.randn(20, CONDITION_DIM))
        model.save_pretrained(tmp_path)
        loaded = ICMGenerator.from_pretrained(tmp_path, dtype=torch.bfloat16)
        assert loaded.dtype == torch.bfloat16
        for name, buffer in model.statistics.named_buffers():
            assert torch.equal(loaded.statistics.get_buffer(name), buffer), name
        assert loaded.to(torch.float16).statistics.mean.dtype == torch.float32
        assert torch.equal(loaded.statistics.mean, model.statistics.mean)
        assert loaded.sample(torch.randn(CONDITION_DIM)).dtype == torch.float32


class TestContext:
    def test_a_hidden_pair_changes_nothing_it_says(self):
        model = generator()
        torch.nn.init.normal_(model.context.output.weight)
        torch.nn.init.normal_(model.context.conditions)
        torch.nn.init.normal_(model.context.latents)
        v = torch.randn(1, CONDITION_DIM)
        before = model.context(v, torch.tensor([1]))
        assert not torch.allclose(before, model.context(v))
        model.context.latents[1] += 10
        torch.testing.assert_close(model.context(v, torch.tensor([1])), before)
        assert not torch.allclose(model.context(v, torch.tensor([0])), before)

    def test_can_be_switched_off(self):
        model = generator(context=False)
        assert model.context is None
        assert model.sample(torch.randn(CONDITION_DIM)).shape == (1, model.layout.numel)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
class TestSampling:
    def test_same_seed_same_adapter_alone_or_in_a_batch(self, architecture):
        model = generator(architecture=architecture)
        conditions = torch.randn(4, CONDITION_DIM)
        together = model.sample(conditions, generator=[torch.Generator().manual_seed(i) for i in range(4)])
        for index in range(4):
            alone = model.sample(conditions[index], generator=torch.Generator().manual_seed(index))
            torch.testing.assert_close(alone[0], together[index], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(together[0], model.sample(conditions[0], generator=torch.Generator().manual_seed(9))[0])

    def test_samples_of_one_condition_differ_and_temperature_zero_does_not(self, architecture):
        model = generator(architecture=architecture)
        condition = torch.randn(CONDITION_DIM)
        drawn = model.sample(condition, num_samples=3)
        assert drawn.shape == (3, model.layout.numel) and not torch.allclose(drawn[0], drawn[1])
        cold = model.sample(condition, num_samples=2, temperature=0.0)
        torch.testing.assert_close(cold[0], cold[1])

    def test_refuses_what_does_not_fit(self, architecture):
        model = generator(architecture=architecture)
        with pytest.raises(ValueError, match=r"shape \(n, 8\), found \(3,\)"):
            model.sample(torch.randn(3))
        with pytest.raises(ValueError, match=r"one torch\.Generator or 2, found 1"):
            model.sample(torch.randn(2, CONDITION_DIM), generator=[torch.Generator()])
        with pytest.raises(ValueError, match="temperature=-1"):
            model.sample(torch.randn(CONDITION_DIM), temperature=-1)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_save_and_load_through_the_auto_classes(architecture, tmp_path):
    model = generator(architecture=architecture)
    model.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    assert isinstance(AutoConfig.from_pretrained(tmp_path), ICMConfig)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert isinstance(loaded, ICMGenerator) and not loaded.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert loaded.layout == model.layout


def test_truncated_weights_are_refused(tmp_path):
    generator().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="model.safetensors"):
        ICMGenerator.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "transformer"}, "architecture='transformer' is unknown: choose one of principal, direct, paper"),
        ({"latent_size": 0}, "latent_size=0 must be at least 1"),
        ({"kl_weight": -1.0}, "kl_weight=-1.0 must not be negative"),
    ],
)
def test_config_says_what_is_allowed(options, message):
    with pytest.raises(ValueError, match=message):
        ICMConfig(**options)


def test_config_without_layout():
    with pytest.raises(ValueError, match="no layout"):
        ICMGenerator(ICMConfig())
