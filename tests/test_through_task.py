"""Training through the loss of tasks, on tiny models of the real classes."""

import copy
import json
import logging

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from task_worlds import trainer
from test_training import arguments
from tiny import TEXTS, llama
from transformers import AutoModelForCausalLM

from peft_icm import CollectingArguments, ICMConfig, ICMGenerator, ICMTrainer, collect
from peft_icm.adapters.examples import example_losses
from peft_icm.cli import main
from peft_icm.conditioning import HiddenStateEncoder, JoinedEncoder, StatisticsEncoder
from peft_icm.evaluation.memorisation import memorisation_report
from peft_icm.hub.cards import generator_card


@pytest.fixture(params=["language", "detection"])
def world(request):
    return request.getfixturevalue(request.param)


def losses(run):
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


class TestTraining:
    def test_the_loss_falls_and_unseen_tasks_are_scored(self, world, tmp_path):
        run = trainer(world, tmp_path, max_steps=30)
        before = run.evaluate()
        run.train()
        after = run.evaluate()
        assert after["eval_unseen_base_loss"] == pytest.approx(before["eval_unseen_base_loss"])
        assert before["eval_unseen_loss"] == pytest.approx(before["eval_unseen_base_loss"], rel=0.02), "it starts at the base"
        assert after["eval_unseen_loss"] < before["eval_unseen_loss"] - 0.02
        assert after["eval_unseen_gain"] == pytest.approx(after["eval_unseen_shared_loss"] - after["eval_unseen_loss"])
        facts = run.generator.config.training
        assert facts["objective"] == "task" and facts["tasks"] == 3 and len(facts["metrics"]) == 3
        assert run.generator.network.deviations().max() > 0

    @pytest.mark.parametrize("batch", [6, 16, 64])
    def test_tasks_trained_on_are_scored_too(self, language, tmp_path, batch):
        run = trainer(language, tmp_path, per_device_train_batch_size=batch)
        metrics = run.evaluate(run.train_dataset)
        assert metrics["eval_loss"] == pytest.approx(metrics["eval_base_loss"], rel=0.02)
        read = [int(task) for inputs in run.get_eval_dataloader(run.train_dataset) for task in inputs["task"]]
        assert read == [task for task in range(3) for _ in range(16)]

    def test_the_loss_is_that_of_the_base_with_peft(self, world, tmp_path):
        run = trainer(world, tmp_path)
        sample = run.train_dataset[(0, 0, 1)]
        inputs = run.data_collator([sample])
        loss = run.compute_loss(run.model, dict(inputs))
        adapter = run.generator(condition=inputs["condition"], noise=inputs["noise"]).reconstruction[0].detach()
        run.objective.end()
        model = run.generator.generate_adapter(task_vector=sample["condition"], base_model=run.objective.base)
        state = run.generator.layout.unflatten(adapter)
        from peft_icm.adapters import attach

        attach(model, run.generator.layout, state)
        kept = {name: value for name, value in inputs.items() if name not in ("condition", "noise", "task")}
        with torch.no_grad():
            assert float(model(**kept).loss) == pytest.approx(float(loss), rel=1e-5)

    def test_excerpts_that_are_too_long_are_told_of_once(self, language, tmp_path, caplog):
        encoder = StatisticsEncoder.from_pretrained(str(language[0]))
        encoder.max_tokens = 10
        with caplog.at_level(logging.WARNING):
            trainer(language, tmp_path, encoder=encoder)
        assert caplog.text.count("tokens that the statistics encoder reads") == 1

    def test_a_lent_base_computes_what_it_did(self, language, tmp_path):
        base = AutoModelForCausalLM.from_pretrained(language[0])
        ids = torch.arange(12).view(3, 4)
        before = base(input_ids=ids).logits
        _, tasks, lora, data = language
        lent = (base, tasks[:3], lora, data)  # nothing is evaluated, which would end without adapters too
        encoder = StatisticsEncoder.from_pretrained(str(language[0]))
        run = trainer(lent, tmp_path, encoder=encoder, learning_rate=0.1)
        run.train()
        assert torch.equal(base(input_ids=ids).logits, before)

    def test_reconstruction_may_come_first(self, language, tmp_path):
        base, tasks, lora, data = language
        args = CollectingArguments(str(tmp_path / "loras"), num_train_epochs=3, num_snapshots=3, dataset_kwargs=data)
        collection = collect(base, tasks[:3], lora, args)
        encoder = StatisticsEncoder.from_pretrained(str(base))
        for task in tasks[:3]:
            collection.task_vectors[task.name] = encoder.encode([task.train_texts[0][:200], task.train_texts[0][200:]])
        config = ICMConfig(architecture="direct", latent_size=4, hidden_size=16, num_components=8, condition_space="none", context=False)
        first = ICMTrainer(config, arguments(tmp_path / "a", num_train_epochs=20), collection=collection, encoder=encoder)
        first.train()
        assert first.evaluate()["eval_mse"] < 2
        second = trainer(language, tmp_path / "b", model=first.generator, max_steps=20)
        before = second.evaluate()["eval_unseen_loss"]
        second.train()
        assert second.evaluate()["eval_unseen_loss"] < before

    def test_the_memorisation_report_knows_it(self, language, tmp_path):
        base, tasks, lora, data = language
        run = trainer(language, tmp_path / "a", max_steps=20)
        run.train()
        args = CollectingArguments(str(tmp_path / "loras"), num_train_epochs=3, num_snapshots=3, dataset_kwargs=data)
        later = collect(base, tasks[:3], lora, args)
        later.encode(run.generator.encoder, examples={task.name: task.train_texts for task in tasks[:3]})
        report = memorisation_report(run.generator, later, seeds=(0, 1))
        assert len(report["tasks"]) == 3 and report["snapshots"] == 9
        assert report["mean"]["ratio"] > 1  # it has seen none of these LoRAs

    def test_it_goes_on_where_it_was_stopped(self, language, tmp_path):
        whole = trainer(language, tmp_path / "whole")
        whole.train()
        cut = trainer(language, tmp_path / "cut", save_strategy="steps", save_steps=3)
        cut.train()
        resumed = trainer(language, tmp_path / "cut", save_strategy="steps", save_steps=3)
        resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-3"))
        assert losses(resumed)[-3:] == pytest.approx(losses(whole)[-3:], rel=1e-6)
        for one, two in zip(whole.generator.parameters(), resumed.generator.parameters(), strict=True):
            assert torch.allclose(one, two, atol=1e-7)

    def test_accumulated_steps_are_one_batch(self, language, tmp_path):
        one = trainer(language, tmp_path / "one")
        two = trainer(language, tmp_path / "two", per_device_train_batch_size=3, gradient_accumulation_steps=2)
        one.train()
        two.train()
        assert losses(two) == pytest.approx(losses(one), rel=1e-4)

    def test_gradient_checkpointing_and_bf16_pass_through(self, language, tmp_path):
        plain = trainer(language, tmp_path / "a")
        plain.train()
        saving = trainer(language, tmp_path / "b", gradient_checkpointing=True)
        saving.train()
        assert losses(saving) == pytest.approx(losses(plain), rel=1e-5)
        rough = trainer(language, tmp_path / "c", bf16=True)
        rough.train()
        assert losses(rough) == pytest.approx(losses(plain), rel=0.02)

    def test_an_older_generator_is_trained_on(self, language, tmp_path):
        first = trainer(language, tmp_path / "a")
        first.train()
        before = copy.deepcopy(first.generator.state_dict())
        second = trainer(language, tmp_path / "b", model=first.generator)
        second.train()
        assert second.generator is first.generator
        assert not torch.equal(before["network.basis"], second.generator.network.basis)

    def test_a_loss_that_is_not_finite_is_named(self, language, tmp_path):
        run = trainer(language, tmp_path, save_strategy="steps", save_steps=2)
        run.train()
        with torch.no_grad():
            run.generator.network.center.fill_(torch.nan)
        with pytest.raises(ValueError, match=r"not finite at step 1, on an example of task '(sonnets|novels|genesis)': lower the learning"):
            trainer(language, tmp_path / "again", model=run.generator).train()
        assert ICMGenerator.from_pretrained(tmp_path / "checkpoint-6").network.center.isfinite().all()


class TestWrong:
    def test_what_is_missing_is_named(self, language, tmp_path):
        base, tasks, _, data = language
        args = arguments(tmp_path, objective="task", dataset_kwargs=data)
        encoder = StatisticsEncoder.from_pretrained(str(base))
        with pytest.raises(ValueError, match="needs tasks=, base_model= and encoder="):
            ICMTrainer(None, args, tasks=tasks, base_model=base)
        with pytest.raises(ValueError, match="needs lora_config="):
            ICMTrainer(None, args, tasks=tasks, base_model=base, encoder=encoder)
        with pytest.raises(ValueError, match="objective='loss' is unknown: choose one of reconstruction, task"):
            arguments(tmp_path, objective="loss")

    def test_a_base_with_adapters(self, world, tmp_path):
        base, tasks, lora, data = world
        args = arguments(tmp_path, objective="task", dataset_kwargs=data)
        encoder = StatisticsEncoder.from_pretrained(str(base))
        given, model = {"encoder": encoder, "tasks": tasks, "lora_config": lora}, get_peft_model(encoder.model, lora)
        for carrying in (model, model.get_base_model()):
            with pytest.raises(ValueError, match="base_model carries adapters"):
                ICMTrainer(None, args, base_model=carrying, **given)

    def test_examples_of_another_modality(self, language, detection, tmp_path):
        with pytest.raises(ValueError, match=r"Task 'red' has pictures, the base .* reads texts: take another base"):
            trainer(language, tmp_path, tasks=detection[1][:2])
        seen = StatisticsEncoder.from_pretrained(str(detection[0]))
        with pytest.raises(ValueError, match="'sonnets' has nothing that the statistics encoder reads, images"):
            trainer(language, tmp_path, encoder=seen)

    def test_targets_that_are_no_linear_layers(self, detection, tmp_path):
        base, tasks, _, data = detection
        with pytest.raises(ValueError, match="is a Conv2d"):
            trainer((base, tasks, LoraConfig(r=2, target_modules=["conv"]), data), tmp_path)

    def test_examples_without_numbers(self, language, tmp_path):
        from test_collecting import Streaming

        with pytest.raises(ValueError, match=r"task 'endless' returns a stream \(IterableDataset\), .*return a map-style data set"):
            trainer(language, tmp_path, tasks=[*language[1][:2], Streaming("endless", ["write on"], [TEXTS[0]], [])])

    def test_two_tasks_of_one_name(self, language, tmp_path):
        with pytest.raises(ValueError, match="need different names, held-out ones too"):
            trainer(language, tmp_path, tasks=[*language[1][:2], language[1][3]])

    def test_examples_without_labels(self):
        with pytest.raises(ValueError, match="has input_ids and no labels"):
            example_losses(llama(), {"input_ids": torch.zeros(1, 4, dtype=torch.long)})


class TestJoined:
    def test_sentences_and_pictures_stand_side_by_side(self, detection, language, tmp_path):
        seen, read = StatisticsEncoder.from_pretrained(str(detection[0])), HiddenStateEncoder.from_pretrained(str(language[0]))
        encoder = JoinedEncoder({"images": seen, "examples": read})
        assert encoder.accepts == ("examples", "images")
        picture, text = Image.new("RGB", (32, 32), "red"), "a text"
        one, two = encoder.read("images", [picture])[0], encoder.read("examples", [text])[0]
        both = encoder.average(torch.stack([one, two, two]))
        assert torch.allclose(both[: read.dim], read.encode([text])[0], atol=1e-6)
        assert torch.allclose(both[read.dim :], seen.encode([picture])[0], atol=1e-6)
        assert not one[: read.dim].any() and not two[read.dim :].any()
        with pytest.raises(ValueError, match="a statistics encoder does not read text="):
            JoinedEncoder({"text": seen, "examples": read})
        with pytest.raises(ValueError, match="must name two"):
            JoinedEncoder({"images": seen})

    def test_it_travels_with_its_generator(self, detection, tmp_path):
        seen = StatisticsEncoder.from_pretrained(str(detection[0]))
        from peft_icm.bundled import bundled_encoder
        from peft_icm.conditioning import ClipEncoder

        encoder = JoinedEncoder({"text": ClipEncoder.from_pretrained(bundled_encoder()), "images": seen})
        run = trainer(detection, tmp_path / "work", encoder=encoder, phrasings=4)
        run.train()
        run.generator.save_pretrained(tmp_path / "saved")
        loaded = ICMGenerator.from_pretrained(tmp_path / "saved")
        picture = Image.new("RGB", (32, 32), "blue")
        for given in ({"text": "detect blue squares"}, {"images": [picture]}, {"text": "detect blue squares", "images": [picture]}):
            here, there = (generator.sample(generator.task_vector(**given), temperature=0.0) for generator in (run.generator, loaded))
            assert torch.allclose(here, there, atol=1e-6)
        assert (tmp_path / "saved" / "encoder" / "text").is_dir() and (tmp_path / "saved" / "encoder" / "images").is_dir()


class TestCommandLine:
    @pytest.fixture
    def folder(self, language, tmp_path):
        """The text tasks in a folder, as --tasks wants them."""
        entries = []
        for task in language[1]:
            (tmp_path / f"{task.name}.txt").write_text(task.train_texts[0], encoding="utf-8")
            entries.append({"name": task.name, "descriptions": task.descriptions, "train": f"{task.name}.txt", "test": None})
        for name, part in (("train", entries[:3]), ("other", entries[3:])):
            (tmp_path / name).mkdir()
            for entry in part:
                (tmp_path / f"{entry['name']}.txt").rename(tmp_path / name / f"{entry['name']}.txt")
            (tmp_path / name / "tasks.json").write_text(json.dumps({"tasks": part}))
        return tmp_path

    def test_train_and_adapt(self, language, folder, capsys):
        base, out = str(language[0]), str(folder / "generator")
        train = [
            "train",
            "--objective",
            "task",
            "--tasks",
            str(folder / "train"),
            "--eval-tasks",
            str(folder / "other"),
            "--base-model",
            base,
        ]
        train += ["--encoder", f"statistics:{base}", "-o", out, "--max-steps", "10", "--block-size", "32", "--batch-size", "6"]
        train += ["--latent-size", "4", "--hidden-size", "16", "--num-components", "8", "--json"]
        assert main(train) == 0
        figures = json.loads(capsys.readouterr().out)
        assert figures["loss"] < figures["base_loss"] + 0.5 and set(figures) == {"generator", "loss", "shared_loss", "base_loss"}
        assert main([*train, "--resume", "--max-steps", "12"]) == 0
        capsys.readouterr()
        adapt = [
            "adapt",
            out,
            "--tasks",
            str(folder / "other"),
            "-o",
            str(folder / "adapters"),
            "--block-size",
            "32",
            "--steps",
            "4",
            "--json",
        ]
        assert main(adapt) == 0
        made = json.loads(capsys.readouterr().out)["adapters"]
        assert list(made) == ["letters"]
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), made["letters"])
        assert model.peft_config["default"].r == 2
        card = str(generator_card(ICMConfig.from_pretrained(out).to_dict(), repo_id="me/tasks", folder=out))
        assert "without a LoRA of theirs" in card and "examples=[...]" in card and "loss on unseen tasks" in card

    def test_what_is_missing_is_one_line(self, language, folder, capsys):
        for options, reason in (
            (["--objective", "task"], "--objective task needs --tasks, --base-model and --encoder"),
            ([], "COLLECTION is missing: name a folder or a Hub id, or train on tasks with --objective task"),
        ):
            assert main(["train", *options, "-o", str(folder / "x")]) == 2
            assert reason in capsys.readouterr().err

    def test_a_generator_of_another_objective_has_no_prior(self, folder, capsys):
        assert main(["adapt", "bundled:text", "--tasks", str(folder / "other"), "-o", str(folder / "y"), "--block-size", "32"]) == 2
        assert "was not trained with objective='task'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("objective", "message"), [("task", "this is the only one: start several with torchrun"), ("reconstruction", "base of")]
)
def test_a_base_that_cannot_be_shared_out(language, tmp_path, objective, message):
    with pytest.raises(ValueError, match=f"fsdp=True shares .*{message}"):
        trainer(language, tmp_path, objective=objective, fsdp=True)
