"""COND P-DIFF on a small real collection: it learns which adapter is whose, repeats itself, saves and loads."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from test_training import tiny_collection

from peft_icm import AdapterCollection
from peft_icm.baselines import stored_bytes
from peft_icm.baselines.cond_p_diff import CondPDiff, CondPDiffConfig
from peft_icm.baselines.cond_p_diff_training import train_cond_p_diff

TINY = {"hidden_size": 32, "latent_size": 16, "block_out_channels": [16, 32], "num_inference_steps": 20}


def train(folder, steps=150, diffusion_steps=150, **kwargs):
    options = {"per_device_train_batch_size": 48, "learning_rate": 6e-3, "use_cpu": True, "disable_tqdm": True, **kwargs}
    return train_cond_p_diff(
        tiny_collection(), output_dir=folder, steps=steps, diffusion_steps=diffusion_steps, config=CondPDiffConfig(**TINY), **options
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cond_p_diff")
    return train(folder), folder


def first_vectors():
    return torch.stack([rows[0] for rows in tiny_collection().task_vectors.values()])


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_each_task_gets_its_own_adapter(trained):
    model, collection = trained[0], tiny_collection()
    own = torch.stack([collection.snapshots[task].mean(0) for task in collection.tasks])
    for seed in range(5):
        samples = model.sample(first_vectors(), generator=seeded(seed))
        cosine = torch.nn.functional.cosine_similarity(samples[:, None], own[None], dim=2)
        others = (cosine - 2 * torch.eye(3)).amax(1)
        assert (cosine.diagonal() > others + 0.3).all()


def test_the_held_out_snapshots_go_through_the_autoencoder(trained):
    model, snapshots = trained[0], tiny_collection().snapshots["task2"]
    with torch.no_grad():
        error = (model.decode(model.encode(snapshots)) - snapshots).norm() / snapshots.norm()
    assert error < 0.5
    assert model.config.training["snapshots"] == 24 and model.config.training["steps"] == [150, 150]


def test_a_seed_gives_the_same_adapter_alone_and_in_a_batch(trained):
    model, conditions = trained[0], first_vectors()
    batch = model.sample(conditions, 2, [seeded(index) for index in range(6)])
    assert batch.shape == (6, model.layout.numel) and batch.dtype == torch.float32
    for index in range(6):
        alone = model.sample(conditions[index // 2], generator=seeded(index))
        torch.testing.assert_close(alone[0], batch[index], rtol=1e-3, atol=1e-3)
    assert (batch[0] - batch[1]).norm() > 1e-3
    still = model.sample(conditions[0], 2, temperature=0.0)
    torch.testing.assert_close(still[0], still[1], rtol=1e-3, atol=1e-3)


def test_saves_and_loads_bit_for_bit(trained):
    model, folder = trained
    assert (folder / "model.safetensors").is_file()
    loaded = CondPDiff.from_pretrained(folder)
    assert not loaded.training and loaded.config.to_dict() == CondPDiff.from_pretrained(folder).config.to_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    sample = {"condition": first_vectors(), "num_samples": 2}
    again = loaded.sample(**sample, generator=seeded(1))
    torch.testing.assert_close(again, model.sample(**sample, generator=seeded(1)), rtol=1e-3, atol=1e-3)
    assert model.nbytes == stored_bytes(model) == sum(tensor.nbytes for tensor in model.state_dict().values())


def test_training_repeats_itself(tmp_path):
    weights = []
    for run in range(2):
        torch.manual_seed(run)
        weights.append(train(tmp_path / str(run), 3, 3, seed=7).state_dict())
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    other = train(tmp_path / "other", 3, 3, seed=8).state_dict()
    assert any(not torch.equal(tensor, other[name]) for name, tensor in weights[0].items())


class TestRefusals:
    def test_no_task_vectors(self, tmp_path):
        collection = tiny_collection()
        without = AdapterCollection(collection.layout, collection.snapshots, {})
        with pytest.raises(ValueError, match=r"no task vectors for 'task0': call collection\.encode"):
            train_cond_p_diff(without, output_dir=tmp_path)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"latent_size": 0}, "latent_size=0 must be at least 1"),
            ({"latent_noise": -0.1}, "latent_noise=-0.1 must not be negative"),
            ({"latent_size": 9}, "latent_size=9 must be a multiple of 2"),
            ({"block_out_channels": [6, 8]}, "must be multiples of 4"),
        ],
    )
    def test_configuration(self, options, message):
        with pytest.raises(StrictDataclassClassValidationError, match=message):
            CondPDiffConfig(**options)

    def test_no_layout(self):
        with pytest.raises(ValueError, match=r"has no layout: pass layout=collection\.layout"):
            CondPDiff(CondPDiffConfig())

    def test_shapes(self, trained):
        with pytest.raises(ValueError, match=r"shape \(n, 8\), found \(9,\)"):
            trained[0].sample(torch.zeros(9))
        with pytest.raises(ValueError, match=r"Expected one torch.Generator or 3, found 1"):
            trained[0].sample(first_vectors(), generator=[seeded(0)])
