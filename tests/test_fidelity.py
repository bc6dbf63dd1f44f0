"""Distances on dW without dW: against the dense update of peft itself, under changes of gauge, and as an evaluate metric."""

import evaluate
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import FLORENCE_TARGETS, filled, florence, llama, llama_layout, llama_lora
from torch import nn

from peft_icm import AdapterLayout
from peft_icm.adapters import fidelity
from peft_icm.adapters.attach import attach
from peft_icm.adapters.fidelity import compare_adapters, cosine, distances, inner_products, norms, relative_error
from peft_icm.evaluation.metrics import metric_path

TARGETS = ["q_proj", "v_proj"]
PATTERNS = {"rank_pattern": {"v_proj": 3}, "alpha_pattern": {r"layers\.0\.self_attn\.q_proj": 20}}
MODELS = {
    "linear": (llama, LoraConfig(r=2, target_modules=TARGETS, lora_alpha=5)),
    "patterns": (llama, LoraConfig(r=2, target_modules=TARGETS, **PATTERNS)),
    "rslora": (llama, LoraConfig(r=4, target_modules=TARGETS, use_rslora=True, rank_pattern={"v_proj": 2})),
    "embedding": (llama, LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"])),
    "convolution": (florence, LoraConfig(r=2, target_modules=FLORENCE_TARGETS)),
    "kernel": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv1d(3, 4, 5)), LoraConfig(r=2, target_modules=["0", "1"])),
}


def stack(layout, count, seed=0):
    return torch.stack([layout.flatten(filled(layout, seed + index)) for index in range(count)])


def dense(model, layout, vectors):
    """`[n, D]`: the update of all modules, as peft merges it."""
    rows = []
    for vector in vectors:
        attach(model, layout, layout.unflatten(vector))
        modules = [module for module in model.modules() if hasattr(module, "get_delta_weight")]
        rows.append(torch.cat([module.get_delta_weight("default").detach().double().flatten() for module in modules]))
    return torch.stack(rows)


@pytest.mark.parametrize("kind", MODELS)
def test_is_that_of_the_dense_update(kind, monkeypatch):
    build, config = MODELS[kind]
    model = get_peft_model(build(), config)
    layout = AdapterLayout.from_peft_model(model)
    first, second = stack(layout, 5), stack(layout, 3, seed=9)
    a, b = dense(model, layout, first), dense(model, layout, second)
    for block in (fidelity._BLOCK, 30):  # all rows at once, and a few at a time
        monkeypatch.setattr(fidelity, "_BLOCK", block)
        torch.testing.assert_close(inner_products(layout, first, second), a @ b.T, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(norms(layout, first), a.norm(dim=1), rtol=1e-5, atol=0)
    torch.testing.assert_close(distances(layout, first, second), torch.cdist(a, b), rtol=1e-5, atol=0)
    torch.testing.assert_close(relative_error(layout, first, second), torch.cdist(a, b) / b.norm(dim=1), rtol=1e-5, atol=0)
    expected = torch.nn.functional.cosine_similarity(a[:, None], b, dim=-1)
    torch.testing.assert_close(cosine(layout, first, second), expected, rtol=1e-5, atol=1e-6)


def test_a_grouped_convolution():
    """peft merges none, but runs them: what its B of groups does to an impulse of its A is the update."""
    with pytest.warns(UserWarning, match="groups > 1"):
        model = get_peft_model(nn.Sequential(nn.Conv2d(4, 6, 3, groups=2, bias=False)), LoraConfig(r=4, target_modules=["0"], lora_alpha=8))
    layout = AdapterLayout.from_peft_model(model)
    vectors, rows = stack(layout, 3), []
    layer = model.base_model.model[0]
    for vector in vectors:
        for key, tensor in layout.unflatten(vector).items():
            getattr(layer, "lora_A" if "lora_A" in key else "lora_B").default.weight.data = tensor
        a, b = layer.lora_A.default, layer.lora_B.default
        impulses = torch.eye(a.weight[0].numel()).reshape(-1, *a.weight.shape[1:])
        rows.append(2 * b(nn.functional.conv2d(impulses, a.weight)).flatten().double())
    expected = torch.stack(rows).detach()
    torch.testing.assert_close(inner_products(layout, vectors, vectors), expected @ expected.T, rtol=1e-5, atol=1e-3)


@given(seed=st.integers(0, 10**6), scale=st.floats(0.01, 100))
@settings(deadline=None, max_examples=30)
def test_a_change_of_gauge_is_none(seed, scale):
    layout = llama_layout()
    adapter = {key: tensor.double() for key, tensor in filled(layout, seed).items()}
    other = dict(adapter)
    for key in [key for key in adapter if "lora_A" in key]:
        mix = scale * (2 * torch.eye(2) + torch.rand(2, 2)).double()  # diagonally dominant: invertible
        partner = key.replace("lora_A", "lora_B")
        other[key], other[partner] = mix @ adapter[key], adapter[partner] @ torch.linalg.inv(mix)
    one, two = (torch.cat([tensors[key].flatten() for key in layout.keys])[None] for tensors in (adapter, other))
    assert relative_error(layout, two, one).item() < 1e-6
    assert cosine(layout, two, one).item() == pytest.approx(1)
    assert relative_error(layout, two.float(), one.float()).item() < 1e-5


def test_what_the_numbers_say():
    layout = llama_layout()
    one = stack(layout, 1)
    b = torch.cat([torch.full((size,), ".lora_B" in key) for key, size in zip(layout.keys, layout.sizes, strict=True)])
    scaled = torch.cat([torch.where(b, factor * one, one) for factor in (1, 0, -1, 1.5)])
    assert relative_error(layout, scaled, one).flatten().tolist() == pytest.approx([0, 1, 2, 0.5], abs=1e-6)
    assert cosine(layout, scaled, one).flatten().tolist() == pytest.approx([1, 0, -1, 1])
    nothing = torch.zeros_like(one)
    assert relative_error(layout, torch.cat([one, nothing]), nothing).flatten().tolist() == [float("inf"), 0]


def test_bf16_is_read_as_it_is():
    layout = AdapterLayout.from_peft_model(llama_lora(dtype=torch.bfloat16))
    vectors = stack(layout, 3)
    assert vectors.dtype == torch.bfloat16
    torch.testing.assert_close(inner_products(layout, vectors, vectors), inner_products(layout, vectors.double(), vectors.double()))


@pytest.mark.parametrize("shape", [(100,), (2, 7)])
def test_refuses_another_shape(shape):
    layout = llama_layout()
    for call in (inner_products, distances, relative_error, cosine):
        with pytest.raises(ValueError, match=rf"shape \(n, {layout.numel}\), found \({', '.join(map(str, shape))}"):
            call(layout, torch.zeros(shape), torch.zeros(1, layout.numel))


class TestFolders:
    @pytest.fixture
    def folders(self, tmp_path):
        """Two adapters, the first once more in another gauge, and one of another rank."""
        for name, seed, r in (("a", 0, 2), ("b", 1, 2), ("wide", 0, 3)):
            model = llama_lora(r=r)
            layout = AdapterLayout.from_peft_model(model)
            attach(model, layout, filled(layout, seed)).save_pretrained(tmp_path / name)
        tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
        (tmp_path / "a_mixed").mkdir()
        mixed = {key: tensor * (4 if "lora_A" in key else 0.25) for key, tensor in tensors.items()}
        save_file(mixed, tmp_path / "a_mixed" / "adapter_model.safetensors", metadata={"format": "pt"})
        (tmp_path / "a_mixed" / "adapter_config.json").write_bytes((tmp_path / "a" / "adapter_config.json").read_bytes())
        return tmp_path

    def test_through_evaluate(self, folders):
        metric = evaluate.load(metric_path("adapter_fidelity"))
        pairs = [("a", "a"), ("a_mixed", "a"), ("b", "a")]
        names = {"predictions": [str(folders / name) for name, _ in pairs], "references": [str(folders / name) for _, name in pairs]}
        result = metric.compute(**names)
        assert set(result) == {"relative_error", "cosine", "relative_errors", "cosines"}
        layout = AdapterLayout.from_pretrained(folders / "a")
        vectors = [layout.flatten(load_file(folders / name / "adapter_model.safetensors"))[None] for name in "ab"]
        expected = relative_error(layout, vectors[1], vectors[0]).item(), cosine(layout, vectors[1], vectors[0]).item()
        assert result["relative_errors"] == pytest.approx([0, 0, expected[0]], abs=1e-6) and expected[0] > 0.5
        assert result["cosines"] == pytest.approx([1, 1, expected[1]], abs=1e-6)
        assert result["relative_error"] == pytest.approx(expected[0] / 3, abs=1e-6)
        assert result["cosine"] == pytest.approx((2 + expected[1]) / 3)

    def test_another_layout_is_named(self, folders):
        with pytest.raises(ValueError, match=r"wide has another layout than .*a: .*expected shape \(2, 16\), found \(3, 16\)"):
            compare_adapters(folders / "wide", folders / "a")

    def test_what_is_no_adapter(self, folders):
        (folders / "empty").mkdir()
        with pytest.raises(ValueError, match="holds no adapter_model"):
            compare_adapters(folders / "empty", folders / "a")
