"""ICMTrainer on small real collections: learning, episodes, resume, two processes, logs, card."""

import json
import logging
import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_server import READER
from huggingface_hub.errors import HTTPError
from tiny import florence_layout, generator, llama_layout
from transformers import EarlyStoppingCallback

from peft_icm import AdapterCollection, ICMConfig, ICMGenerator, ICMTrainer, ICMTrainingArguments
from peft_icm.training.episodes import EpisodeDataset, EpisodeSampler, held_out_mask, seeded

LAYOUTS = {"llama": llama_layout, "florence": florence_layout}


def tiny_collection(layout="llama", tasks=3, snapshots=10, dim=8):
    """Tasks as points, snapshots as short noisy walks around them: what a collection looks like."""
    layout = LAYOUTS[layout]()
    draw = torch.Generator().manual_seed(0)
    names = [f"task{index}" for index in range(tasks)]
    walk = torch.randn(2, layout.numel, generator=draw)
    state = {name: torch.randn(layout.numel, generator=draw) + 0.5 * torch.randn(snapshots, 2, generator=draw) @ walk for name in names}
    vectors = {
        name: torch.nn.functional.normalize(torch.randn(dim, generator=draw) + 0.1 * torch.randn(4, dim, generator=draw)) for name in names
    }
    return AdapterCollection(layout, state, {name: [f"about {name}"] for name in names}, vectors)


def arguments(folder, **kwargs):
    options = {
        "num_train_epochs": 30,
        "per_device_train_batch_size": 12,
        "logging_steps": 10,
        "save_strategy": "no",
        "use_cpu": True,
    }
    return ICMTrainingArguments(str(folder), **{**options, **kwargs})


def config(**kwargs):
    return ICMConfig(**{"latent_size": 4, "hidden_size": 32, "num_components": 6, **kwargs})


def weights(trainer):
    return {name: tensor.clone() for name, tensor in trainer.generator.state_dict().items()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("architecture", ["principal", "paper"])
def test_learns_and_says_so(architecture, layout, tmp_path):
    epochs = 150 if architecture == "principal" else 4
    options = {"num_conv_layers": 3} if architecture == "paper" else {}
    args = arguments(tmp_path, num_train_epochs=epochs, logging_steps=2)
    trainer = ICMTrainer(config(architecture=architecture, **options), args, collection=tiny_collection(layout))
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_mse"] < before["eval_mse"] and after["eval_loss"] < before["eval_loss"]
    names = {"eval_kl", "eval_active_units", "eval_variance_explained", "eval_mse", "eval_prior_mse", "eval_zero_mse"}
    assert names <= set(after)
    assert any({"kl", "mse"} <= set(entry) for entry in trainer.state.log_history)
    if architecture == "principal":
        assert after["eval_variance_explained"] > 0.5
        assert after["eval_kl"] > 1 and after["eval_mse"] < after["eval_zero_mse"]


def test_a_generator_has_what_the_collection_says(tmp_path):
    collection = tiny_collection()
    collection.encoder = {"kind": "sentence", "checkpoint": "org/encoder", "dim": 8, "sha256": "1"}
    trainer = ICMTrainer(config(), arguments(tmp_path, num_train_epochs=1), collection=collection)
    model = trainer.generator
    assert model.layout == collection.layout and model.config.encoder == collection.encoder
    assert [task["name"] for task in model.config.tasks] == collection.tasks and model.config.condition_dim == 8
    train = torch.cat([rows[~held_out_mask(10, 0.2)] for rows in collection.snapshots.values()])
    expected = [part.mean() for part in train.split(model.layout.sizes, dim=1)]
    torch.testing.assert_close(model.statistics.mean, torch.stack(expected))


class TestEpisodes:
    @pytest.fixture
    def data(self, tmp_path):
        collection = tiny_collection()
        uneven = [collection.snapshots["task0"], collection.snapshots["task1"][:3], collection.snapshots["task2"]]
        return EpisodeDataset(uneven, list(collection.task_vectors.values()), arguments(tmp_path), 4, 6)

    def test_tasks_are_balanced_and_every_snapshot_is_seen(self, data):
        keys = list(EpisodeSampler(data))
        for start in range(0, len(keys), 3):
            assert {task for _, _, task, _ in keys[start : start + 3]} == {0, 1, 2}
        assert {(task, index) for _, _, task, index in keys} == {(t, i) for t, n in enumerate((10, 3, 10)) for i in range(n)}

    def test_conditions_are_drawn_anew_in_every_epoch(self, data):
        again, other = data[0, 5, 1, 2], data[1, 5, 1, 2]
        assert torch.equal(again["condition"], data[0, 5, 1, 2]["condition"])
        assert torch.equal(again["parameters"], other["parameters"])
        assert not torch.allclose(again["condition"], other["condition"])

    def test_the_own_pair_is_hidden_in_half_of_the_episodes_and_in_whole_ones(self, data):
        hidden = [[int(data[epoch, position, 2, 0]["hidden_tasks"]) for position in range(6)] for epoch in range(200)]
        assert all(len(set(episode)) == 1 for episode in hidden)
        assert 0.35 < sum(episode[0] == 2 for episode in hidden) / 200 < 0.65

    def test_evaluation_is_the_same_every_time_and_hides_nothing(self, data):
        sampler = EpisodeSampler(data, evaluate=True)
        sampler.set_epoch(7)
        keys = list(sampler)
        assert len(keys) == 23 and all(int(data[key]["hidden_tasks"]) == -1 for key in keys)
        assert torch.allclose(data[keys[0]]["condition"].norm(), torch.ones(()))


def test_the_context_can_be_ablated(tmp_path):
    with_context = ICMTrainer(config(), arguments(tmp_path, num_train_epochs=4), collection=tiny_collection())
    without = ICMTrainer(config(context=False), arguments(tmp_path, num_train_epochs=4), collection=tiny_collection())
    with_context.train()
    without.train()
    assert without.generator.context is None
    context = with_context.generator.context
    assert context.output.weight.abs().max() > 0 and context.latents.abs().max() > 0
    vectors = torch.stack([rows.mean(0) for rows in tiny_collection().task_vectors.values()])
    trained = with_context.generator
    torch.testing.assert_close(context.conditions, trained.statistics.normalize_condition(trained.space(vectors)))


def test_resume_is_exact(tmp_path):
    options = {"num_train_epochs": 6, "save_strategy": "steps", "save_steps": 5, "lr_scheduler_type": "cosine"}
    whole = ICMTrainer(config(), arguments(tmp_path / "a", **options), collection=tiny_collection())
    whole.train()
    checkpoints = sorted(Path(tmp_path / "a").glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))
    assert len(checkpoints) >= 2
    resumed = ICMTrainer(config(), arguments(tmp_path / "b", **options), collection=tiny_collection())
    resumed.train(resume_from_checkpoint=str(checkpoints[0]))
    expected = weights(whole)
    for name, tensor in weights(resumed).items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["reconstruction", "task", "sharded"])
def test_two_processes_have_the_loss_of_one(tmp_path, objective):
    results, read = [], []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for processes, batch in ((1, 12), (2, 6)):
        folder = tmp_path / str(processes)
        folder.mkdir()
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), "CUDA_VISIBLE_DEVICES": ""}
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            str(processes),
            "--master_addr",
            "127.0.0.1",
            "--master_port",
            str(port),
        ]
        command += [str(Path(__file__).parent / "ddp_train.py"), str(folder), str(batch), objective]
        run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
        assert run.returncode == 0, run.stderr[-3000:]
        results.append(json.loads((folder / "result.json").read_text()))
        read.append([{tuple(key) for key in json.loads(file.read_text())} for file in sorted(folder.glob("read-*.json"))])
    one, two = results
    assert (one["processes"], two["processes"]) == (1, 2)
    assert two["losses"] == pytest.approx(one["losses"], rel=2e-3, abs=2e-3)
    ((alone,), (first, second)) = read
    assert first | second == alone and not first & second, "each reads its own share"


def test_early_stop(tmp_path):
    options = {
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_mse",
    }
    args = arguments(tmp_path, num_train_epochs=200, learning_rate=0.05, **options)
    trainer = ICMTrainer(config(), args, collection=tiny_collection(), callbacks=[EarlyStoppingCallback(2)])
    trainer.train()
    assert trainer.state.epoch < 100


def test_bf16(tmp_path):
    trainer = ICMTrainer(config(), arguments(tmp_path, bf16=True), collection=tiny_collection())
    before = trainer.evaluate()["eval_mse"]
    trainer.train()
    assert trainer.evaluate()["eval_mse"] < before
    assert all(tensor.dtype == torch.float32 for tensor in trainer.generator.state_dict().values())


def test_a_collapsed_posterior_is_logged(tmp_path, caplog):
    trainer = ICMTrainer(
        config(architecture="paper", num_conv_layers=2, kl_weight=100.0),
        arguments(tmp_path, learning_rate=3e-3),
        collection=tiny_collection(),
    )
    with caplog.at_level(logging.WARNING, logger="peft_icm.training"):
        trainer.train()
    assert "posterior has collapsed" in caplog.text


def test_the_kl_weight_rises(tmp_path):
    trainer = ICMTrainer(config(kl_weight=1.0), arguments(tmp_path, kl_warmup_ratio=0.5), collection=tiny_collection())
    trainer.state.max_steps = 100
    inputs = next(iter(trainer.get_train_dataloader()))
    losses = []
    for step in (0, 25, 50, 100):
        trainer.state.global_step = step
        loss, outputs = trainer.compute_loss(trainer.model.train(), inputs, return_outputs=True)
        losses.append(float(loss - outputs.reconstruction_loss) / float(outputs.kl_loss))
    assert losses == pytest.approx([0, 0.5, 1, 1], abs=1e-3)


def test_pushes_with_our_card(hub, token, tmp_path):
    args = arguments(tmp_path, num_train_epochs=2, hub_model_id="org/trained", hub_token=token)
    trainer = ICMTrainer(config(), args, collection=tiny_collection())
    trainer.train()
    trainer.push_to_hub()
    repo = hub.repos["models", "org/trained"]
    card = repo.files()["README.md"].decode()
    assert "library_name: peft_icm" in card and "Trainer" not in card.replace("ICMTrainer", "")
    assert "variance explained" in card and "| snapshots trained on | 24 |" in card
    assert [message for message in repo.log if message != "initial commit"] == ["End of training"]
    trainer.create_model_card()
    assert "peft_icm" in (tmp_path / "README.md").read_text()


def test_who_may_not_push_learns_so_before_the_training(hub, token, tmp_path):
    options = {"push_to_hub": True, "hub_model_id": "org/trained", "num_train_epochs": 2}
    with pytest.raises(HTTPError, match="org/trained cannot be pushed to, the Hub answered 403"):
        ICMTrainer(config(), arguments(tmp_path, hub_token=READER, **options), collection=tiny_collection())
    with pytest.raises(HTTPError, match="org/trained cannot be pushed to, the Hub answered 403"):  # before it looks at what to train on
        ICMTrainer(config(), arguments(tmp_path, hub_token=READER, **options))
    assert not hub.repos
    hub.requests.clear()
    trainer = ICMTrainer(config(), arguments(tmp_path, hub_token=token, **options), collection=tiny_collection())
    assert hub.repos["models", "org/trained"].log == ["initial commit"] and trainer.hub_model_id == "org/trained"
    assert hub.requests.count(("POST", "/api/repos/create")) == 1
    with pytest.raises(HTTPError, match="org/trained cannot be pushed to, the Hub answered 403"):  # of a repo that is there
        ICMTrainer(config(), arguments(tmp_path, hub_token=READER, **options), collection=tiny_collection())


class TestRefusals:
    def test_no_task_vectors(self):
        collection = tiny_collection()
        collection.task_vectors = {}
        with pytest.raises(ValueError, match=r"no task vectors for 'task0': call collection\.encode"):
            ICMTrainer(collection=collection)

    def test_another_layout(self, tmp_path):
        with pytest.raises(ValueError, match="they must be one"):
            ICMTrainer(generator(florence_layout()), arguments(tmp_path), collection=tiny_collection())

    @pytest.mark.parametrize("options", [{"max_handful": 0}, {"held_out": 1.0}, {"leave_out_rate": -0.1}, {"kl_warmup_ratio": 1.5}])
    def test_arguments(self, options, tmp_path):
        ((name, value),) = options.items()
        with pytest.raises(ValueError, match=f"{name}={value}"):
            arguments(tmp_path, **options)


def test_a_trained_generator_saves_and_loads(tmp_path):
    trainer = ICMTrainer(config(), arguments(tmp_path / "t", num_train_epochs=3), collection=tiny_collection())
    trainer.train()
    trainer.generator.save_pretrained(tmp_path / "g")
    loaded = ICMGenerator.from_pretrained(tmp_path / "g")
    for name, tensor in trainer.generator.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert loaded.config.training["steps"] == trainer.state.global_step


def test_single_snapshots_leave_nothing_to_hold_out(tmp_path, caplog):
    """LoRAs that exist already: one for each task."""
    trainer = ICMTrainer(config(), arguments(tmp_path, eval_strategy="epoch", num_train_epochs=2), collection=tiny_collection(snapshots=1))
    trainer.train()
    assert "nothing is evaluated" in caplog.text
    assert trainer.generator.config.training["held_out_snapshots"] == 0 and trainer.generator.config.training["metrics"] == []


def test_a_disk_that_is_full_for_the_optimizer(tmp_path):
    trainer = ICMTrainer(config(), arguments(tmp_path, save_strategy="steps", save_steps=1), collection=tiny_collection())
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "optimizer.pt").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"The checkpoint of step 1 cannot be written into .*: if its disk is full make room, delete it"):
        trainer.train()


class TestWhatIsNotFinite:
    """Set in place, after the collection was checked."""

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_snapshots(self, tmp_path, value):
        collection = tiny_collection()
        collection.snapshots["task1"][3, 5] = value
        with pytest.raises(ValueError, match="Task 'task1': snapshot 3 holds (nan|inf) in .*q_proj"):
            ICMTrainer(config(), arguments(tmp_path), collection=collection)

    def test_a_loss(self, tmp_path):
        """The generator that is there already stays."""
        trainer = ICMTrainer(config(), arguments(tmp_path, learning_rate=1e30), collection=tiny_collection())
        trainer.generator.save_pretrained(tmp_path / "g")
        before = ICMGenerator.from_pretrained(tmp_path / "g").saved_sha256
        with pytest.raises(ValueError, match=r"The loss is not finite at step \d+: lower the learning rate"):
            trainer.train()
        next(trainer.generator.parameters()).data.fill_(float("nan"))
        with pytest.raises(ValueError, match="holds NaN or infinite values: such a generator is not saved"):
            trainer.generator.save_pretrained(tmp_path / "g")
        assert ICMGenerator.from_pretrained(tmp_path / "g").saved_sha256 == before

    def test_task_vectors(self, tmp_path):
        collection = tiny_collection()
        collection.task_vectors["task2"][0, 0] = float("nan")
        with pytest.raises(ValueError, match="Task 'task2': its task vectors hold NaN"):
            ICMTrainer(config(), arguments(tmp_path), collection=collection)


def test_the_log_of_a_run_is_of_its_own_steps(tmp_path):
    trainer = ICMTrainer(config(), arguments(tmp_path, logging_steps=2, max_steps=3), collection=tiny_collection())
    start, logged = weights(trainer), []
    for _ in range(2):  # three steps, of which the last is in no log
        trainer.generator.load_state_dict(start)
        trainer.optimizer = trainer.lr_scheduler = None
        trainer.train()
        logged.append([entry["mse"] for entry in trainer.state.log_history if "mse" in entry])
    assert logged[0] == logged[1] and len(logged[0]) == 1


def test_the_order_of_0_1_0_works_and_warns(tmp_path):
    collection, settings, args = tiny_collection(), config(), arguments(tmp_path)
    ways = [
        lambda: ICMTrainer(collection, settings, args),
        lambda: ICMTrainer(collection, settings, args=args),
        lambda: ICMTrainer(collection, model=settings, args=args),
        lambda: ICMTrainer(collection, args=args),
    ]
    for way in ways:
        with pytest.warns(FutureWarning, match=r"write ICMTrainer\(model, args, collection=collection\)") as caught:
            trainer = way()
        assert trainer.collection is collection and trainer.args is args
        assert [warning.filename for warning in caught if "write ICMTrainer" in str(warning.message)] == [__file__]
    assert ICMTrainer(config(latent_size=3), args, collection).generator.config.latent_size == 3  # the order of now
    with pytest.raises(TypeError, match="multiple values"):
        ICMTrainer(collection, settings, model=settings)
    with pytest.raises(ValueError, match="needs collection="):
        ICMTrainer(settings, args)


def test_noise_of_one_seed_and_epoch_never_meets_that_of_another():
    seeds = {
        seeded(seed, epoch, what, position).initial_seed()
        for seed in range(4)
        for epoch in range(-1, 8)
        for position in range(40)
        for what in ("sample", "episode")
    }
    assert len(seeds) == 4 * 9 * 40 * 2


@pytest.mark.parametrize("tasks", [1, 2, 5])
def test_rounding_is_no_component(tasks):
    layout = llama_layout()
    draw = torch.Generator().manual_seed(0)
    centers = 100 * torch.randn(tasks, layout.numel, generator=draw)
    model = generator(layout, num_components=9)
    model.fit(centers.repeat_interleave(3, 0), torch.randn(tasks, model.config.condition_dim, generator=draw))
    used = model.network.basis.norm(dim=1) > 0
    assert int(used.sum()) == tasks - 1
    torch.testing.assert_close(model.network.basis[used] @ model.network.basis[used].T, torch.eye(tasks - 1), atol=1e-5, rtol=0)


def test_the_access_token_is_in_no_pickle(tmp_path):
    args = arguments(tmp_path, hub_token="hf_secret")
    assert b"hf_secret" not in pickle.dumps(args) and args.hub_token == "hf_secret"
