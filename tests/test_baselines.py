"""Baselines behind the generator's interface: lookups, soups, noise, compression, and the bytes each keeps."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from test_training import tiny_collection
from tiny import filled, generator, llama, llama_layout, llama_lora

from peft_icm import AdapterCollection, AdapterLayout
from peft_icm.adapters.attach import attach
from peft_icm.baselines import (
    CompressedAdapters,
    CoordinateGaussian,
    GreedySoup,
    MeanOverTasks,
    NearestAdapter,
    NoisySnapshot,
    SingleAdapter,
    SnapshotMean,
    stored_bytes,
)

LOOKUP_BYTES = 12 * 8 * 4 + 12 * 4  # 12 task vectors of 8 numbers, and whose they are
ALL = {
    "nearest": NearestAdapter,
    "mean": SnapshotMean,
    "soup": lambda collection: GreedySoup(collection, lambda task, vector: -float(vector.norm())),
    "noisy": NoisySnapshot,
    "gaussian": CoordinateGaussian,
    "tasks": MeanOverTasks,
    "single": lambda collection: SingleAdapter(collection.layout, collection.final("task0")),
    "int8": lambda collection: CompressedAdapters(collection, "int8"),
    "int4": lambda collection: CompressedAdapters(collection, "int4"),
    "svd": lambda collection: CompressedAdapters(collection, "svd"),
}


@pytest.fixture(scope="module")
def collection():
    return tiny_collection()


def first_vectors(collection):
    return torch.stack([collection.task_vectors[task][0] for task in collection.tasks])


def finals(collection):
    return torch.stack([collection.final(task) for task in collection.tasks])


def seeded(seed):
    return torch.Generator().manual_seed(seed)


class TestInterface:
    @pytest.mark.parametrize("name", ALL)
    def test_samples_have_the_generators_shape(self, name, collection):
        source, conditions = ALL[name](collection), first_vectors(collection)
        assert source.layout == collection.layout
        one, many = source.sample(conditions[0]), source.sample(conditions, num_samples=2)
        assert one.shape == (1, collection.layout.numel) and many.shape == (6, collection.layout.numel)
        assert one.dtype == many.dtype == torch.float32
        still = source.sample(conditions, 2, temperature=0.0)
        torch.testing.assert_close(still[0::2], still[1::2])

    @pytest.mark.parametrize("name", ALL)
    def test_a_seed_gives_the_same_adapter_alone_and_in_a_batch(self, name, collection):
        source, conditions = ALL[name](collection), first_vectors(collection)
        batch = source.sample(conditions, generator=[seeded(index) for index in range(3)])
        for index, condition in enumerate(conditions):
            assert torch.equal(source.sample(condition, generator=seeded(index))[0], batch[index])

    @pytest.mark.parametrize("name", ALL)
    def test_refusals(self, name, collection):
        source, condition = ALL[name](collection), first_vectors(collection)[0]
        with pytest.raises(ValueError, match=r"num_samples=0 must be an integer >= 1"):
            source.sample(condition, num_samples=0)
        with pytest.raises(ValueError, match=r"temperature=-1.0 must be a finite number >= 0"):
            source.sample(condition, temperature=-1.0)
        with pytest.raises(ValueError, match="Expected task vectors of shape"):
            source.sample(condition[None, None])

    @pytest.mark.parametrize("name", ["noisy", "gaussian"])
    def test_one_generator_for_each_adapter(self, name, collection):
        with pytest.raises(ValueError, match=r"Expected one torch.Generator or 3, found 2"):
            ALL[name](collection).sample(first_vectors(collection), generator=[seeded(0), seeded(1)])


class TestLookup:
    def test_any_phrasing_finds_its_task(self, collection):
        source = NearestAdapter(collection)
        for task in collection.tasks:
            assert source.lookup(3 * collection.task_vectors[task]) == [task] * 4

    def test_the_highest_cosine_with_one_vector_decides_and_not_the_mean(self):
        vectors = {"a": torch.tensor([[1.0, 0.0], [-1.0, 0.1]]), "b": torch.tensor([[0.0, 50.0]])}
        layout = llama_layout()
        collection = AdapterCollection(layout, {name: torch.zeros(1, layout.numel) for name in vectors}, {}, vectors)
        assert NearestAdapter(collection).lookup(torch.tensor([[-1.0, 0.0], [0.2, 1.0], [1.0, 0.2]])) == ["a", "b", "a"]

    def test_refusals(self, collection):
        with pytest.raises(ValueError, match=r"shape \(n, 8\), found \(9,\)"):
            NearestAdapter(collection).lookup(torch.zeros(9))
        without = AdapterCollection(collection.layout, collection.snapshots, {})
        with pytest.raises(ValueError, match=r"no task vectors for 'task0': call collection\.encode"):
            NearestAdapter(without)


class TestStored:
    def test_nearest_is_the_final_lora_bit_for_bit(self, collection):
        assert torch.equal(NearestAdapter(collection).sample(first_vectors(collection)), finals(collection))

    def test_means(self, collection):
        means = torch.stack([collection.snapshots[task].mean(0) for task in collection.tasks])
        torch.testing.assert_close(SnapshotMean(collection).sample(first_vectors(collection)), means)
        over_tasks = MeanOverTasks(collection).sample(first_vectors(collection)[1])
        torch.testing.assert_close(over_tasks[0], finals(collection).mean(0))

    def test_a_greedy_soup_takes_what_does_not_lower_its_score(self, collection):
        target = collection.snapshots["task1"].mean(0)
        calls = []

        def score(task, vector):
            calls.append(task)
            return -float((vector - target).norm())

        soup = GreedySoup(collection, score)
        assert len(calls) == 3 * (2 * 10 - 1) and set(calls) == set(collection.tasks)
        for index, (task, chosen) in enumerate(soup.ingredients.items()):
            snapshots = collection.snapshots[task]
            scores = [score(task, snapshot) for snapshot in snapshots]
            mixed = soup.sample(first_vectors(collection)[index])[0]
            assert scores[chosen[0]] == max(scores) and score(task, mixed) >= max(scores)
            torch.testing.assert_close(mixed, snapshots[chosen].mean(0))
        assert len(soup.ingredients["task1"]) > 1

    def test_a_soup_whose_score_only_falls_is_the_best_snapshot(self, collection):
        best = {task: index for index, task in enumerate(collection.tasks)}
        soup = GreedySoup(collection, lambda task, vector: float(torch.equal(vector, collection.snapshots[task][best[task]])))
        assert soup.ingredients == {task: [index] for task, index in best.items()}

    def test_noise_has_the_scale_of_each_tensor(self):
        layout = llama_layout()
        final = torch.cat([2.0**index * torch.randn(size, generator=seeded(1)) for index, size in enumerate(layout.sizes)])
        collection = AdapterCollection(layout, {"a": final[None]}, {}, {"a": torch.ones(1, 2)})
        samples = NoisySnapshot(collection, scale=0.5).sample(torch.ones(2), 400, seeded(0))
        noise = (samples - final).split(layout.sizes, dim=1)
        for part, own in zip(noise, final.split(layout.sizes), strict=True):
            torch.testing.assert_close(part.std(), 0.5 * own.std(correction=0), rtol=0.05, atol=0)
        half = NoisySnapshot(collection, scale=0.5).sample(torch.ones(2), 400, seeded(0), temperature=0.5)
        torch.testing.assert_close(half - final, 0.5 * (samples - final), rtol=1e-2, atol=1e-3)
        with pytest.raises(ValueError, match=r"scale=-1.0 must not be negative"):
            NoisySnapshot(collection, scale=-1.0)

    def test_the_gaussian_has_the_moments_of_the_snapshots(self, collection):
        samples = CoordinateGaussian(collection).sample(first_vectors(collection)[2], 3000, seeded(0))
        snapshots = collection.snapshots["task2"]
        spread = snapshots.std(0, correction=0)
        assert ((samples.mean(0) - snapshots.mean(0)).abs() < 0.1 * spread + 1e-6).all()
        torch.testing.assert_close(samples.std(0), spread, rtol=0.1, atol=1e-6)

    def test_a_single_adapter_needs_the_layouts_size(self, collection):
        with pytest.raises(ValueError, match=r"Expected a vector of shape \(224,\), found \(3,\)"):
            SingleAdapter(collection.layout, torch.zeros(3))


class TestCompression:
    @pytest.mark.parametrize(("method", "levels"), [("int8", 127), ("int4", 7)])
    def test_errors_stay_within_half_a_step_of_each_group(self, method, levels, collection):
        found = CompressedAdapters(collection, method).sample(first_vectors(collection))
        own = finals(collection)
        groups = torch.nn.functional.pad(own, (0, 32)).unflatten(1, (-1, 64))
        peaks = groups.abs().amax(2, keepdim=True).expand(-1, -1, 64).flatten(1)[:, :224]
        assert ((found - own).abs() <= peaks * (0.5 / levels + 2**-10)).all()
        assert (found - own).abs().max() > 0

    @pytest.mark.parametrize("method", ["int8", "int4"])
    def test_small_values_and_zeros(self, method):
        layout = llama_layout()
        assert layout.numel % 64  # the last group is padded
        final = 1e-4 * torch.randn(layout.numel)
        final[:200] = 0
        collection = AdapterCollection(layout, {"a": final[None]}, {}, {"a": torch.ones(1, 2)})
        found = CompressedAdapters(collection, method).sample(torch.ones(2))[0]
        assert not found[:128].any()
        assert (found - final).norm() / final.norm() < (0.01 if method == "int8" else 0.15)

    def test_svd_is_the_best_product_of_its_rank(self):
        collection = convolutional_collection(rank=3)
        compressed = CompressedAdapters(collection, "svd", rank=1)
        found = collection.layout.unflatten(compressed.sample(first_vectors(collection)[1])[0])
        own = collection.layout.unflatten(collection.final("task1"))
        for key, a in own.items():
            if ".lora_A" in key:
                partner = key.replace(".lora_A", ".lora_B")
                product = own[partner].flatten(1) @ a.flatten(1)
                rebuilt = found[partner].flatten(1) @ found[key].flatten(1)
                u, s, vt = torch.linalg.svd(product)
                torch.testing.assert_close(rebuilt, s[0] * torch.outer(u[:, 0], vt[0]), rtol=1e-2, atol=1e-2 * float(s[0]))
                assert not found[key][1:].any() and not found[partner][:, 1:].any()

    def test_refusals(self, collection):
        with pytest.raises(ValueError, match=r"method='int2' is unknown: choose one of int8, int4, svd"):
            CompressedAdapters(collection, "int2")
        with pytest.raises(ValueError, match=r"rank=2 must be between 1 and 1"):
            CompressedAdapters(collection, "svd", rank=2)
        with pytest.raises(ValueError, match=r"rank=1 is for method='svd'"):
            CompressedAdapters(collection, "int8", rank=1)
        with pytest.raises(ValueError, match=r"rank 2 or more, .*lora_A.* has rank 1: choose 'int8' or 'int4'"):
            CompressedAdapters(tiny_collection("florence"), "svd")


class TestBytes:
    @pytest.mark.parametrize(
        ("name", "numbers"),
        [("nearest", 3 * 224 * 4), ("mean", 3 * 224 * 4), ("soup", 3 * 224 * 4), ("noisy", 3 * 224 * 4), ("gaussian", 6 * 224 * 4),
         ("int8", 3 * (256 + 4 * 2)), ("int4", 3 * (128 + 4 * 2)), ("svd", 3 * 112 * 2)],
    )  # fmt: skip
    def test_what_is_looked_up_counts_too(self, name, numbers, collection):
        assert collection.layout.numel == 224
        assert stored_bytes(ALL[name](collection)) == ALL[name](collection).nbytes == LOOKUP_BYTES + numbers

    def test_one_adapter_needs_no_lookup(self, collection):
        assert MeanOverTasks(collection).nbytes == ALL["single"](collection).nbytes == collection.layout.num_bytes

    def test_of_a_generator(self):
        model = generator()
        assert stored_bytes(model) == sum(tensor.nbytes for tensor in model.state_dict().values())


def convolutional_collection(rank):
    """A convolution, whose A has a kernel, before a linear module."""
    base = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3), torch.nn.Linear(8, 6))
    layout = AdapterLayout.from_peft_model(get_peft_model(base, LoraConfig(r=rank, target_modules=["0", "1"])))
    assert (rank, 4, 3, 3) in layout.shapes
    draw = seeded(0)
    snapshots = {f"task{index}": torch.randn(2, layout.numel, generator=draw) for index in range(2)}
    vectors = {name: torch.randn(3, 8, generator=draw) for name in snapshots}
    return AdapterCollection(layout, snapshots, {}, vectors)


def test_a_soup_is_what_pefts_cat_makes_of_adapters_that_share_their_a():
    """With one A, the mean of the vectors has the mean dW, and that is what `add_weighted_adapter(combination_type="cat")` gives."""
    base = llama()
    layout = AdapterLayout.from_peft_model(llama_lora())
    parts = [filled(layout, seed) for seed in (0, 1)]
    shared = {key: parts[0][key] if ".lora_A" in key else value for key, value in parts[1].items()}
    snapshots = {"first": layout.flatten(parts[0])[None], "second": layout.flatten(shared)[None]}
    soup = MeanOverTasks(AdapterCollection(layout, snapshots, {}, {name: torch.randn(1, 8) for name in snapshots}))
    model = attach(base, layout, layout.unflatten(soup.sample(torch.zeros(8))[0]), adapter_name="soup")
    for name, state_dict in (("first", parts[0]), ("second", shared)):
        attach(model, layout, state_dict, adapter_name=name)
    model.add_weighted_adapter(["first", "second"], [0.5, 0.5], "cat", combination_type="cat")
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    assert layers
    for layer in layers:
        assert torch.allclose(layer.get_delta_weight("soup"), layer.get_delta_weight("cat"), atol=1e-5)
