"""Adapting to a few examples under the generator as the prior, on tiny models of the real classes."""

import copy

import pytest
import torch
from peft import get_peft_model_state_dict
from task_worlds import trainer
from tiny import florence_processor, tokenizer

from peft_icm import ICMGenerator, save_adapter
from peft_icm.adapters.examples import collate, example_losses
from peft_icm.generator.prior_fit import Run, fit_runs
from peft_icm.tasks.language_modeling import LanguageModelingTask


@pytest.fixture(scope="module")
def trained(language, detection, tmp_path_factory):
    """A generator of each world, saved and loaded, with its world."""
    found = {}
    for name, world in (("language", language), ("detection", detection)):
        folder = tmp_path_factory.mktemp(name)
        run = trainer(world, folder / "work", max_steps=20)
        run.train()
        run.generator.save_pretrained(folder / "saved")
        found[name] = ICMGenerator.from_pretrained(folder / "saved"), world
    return found


@pytest.mark.parametrize("name", ["language", "detection"])
class TestAdapting:
    def examples(self, world):
        _, tasks, _, data = world
        processor = tokenizer() if isinstance(tasks[3], LanguageModelingTask) else florence_processor()
        return tasks[3].train_dataset(processor, **data)

    def given(self, world):
        _, tasks, _, _ = world
        task = tasks[3]
        return {"examples": task.train_texts} if isinstance(task, LanguageModelingTask) else {"images": [task.train_images[3].load()]}

    def test_without_examples_it_is_what_is_generated(self, trained, name):
        generator, world = trained[name]
        adapted = generator.adapt(seed=3, **self.given(world))
        generated = generator.generate_adapter(generator=torch.Generator().manual_seed(3), **self.given(world))
        for one, two in zip(*(get_peft_model_state_dict(model).values() for model in (adapted, generated)), strict=True):
            assert torch.equal(one, two)

    def test_it_learns_from_examples_and_is_never_worse_than_its_start(self, trained, name):
        generator, world = trained[name]
        examples = self.examples(world)
        rows = [examples[index] for index in range(len(examples))]
        inputs = collate(rows)

        def loss(model):
            with torch.no_grad():
                nats, tokens = example_losses(model, inputs)
            return float(nats.sum() / tokens.sum())

        start = loss(generator.adapt(**self.given(world)))
        model = generator.adapt(labelled=rows, steps=24, **self.given(world))
        assert type(model).__name__.startswith("PeftModel")
        assert loss(model) < start

    def test_its_card_says_that_it_has_learnt(self, trained, name, tmp_path):
        generator, world = trained[name]
        rows = [self.examples(world)[index] for index in range(2)]
        save_adapter(generator.adapt(labelled=rows, steps=2, **self.given(world)), tmp_path)
        card = (tmp_path / "README.md").read_text()
        assert "then fitted to labelled examples" in card and "| fitted to | 2 labelled examples |" in card
        assert "not trained" not in card and "- generated\n" not in card

    def test_a_loss_that_is_not_finite(self, trained, name):
        generator, world = trained[name]
        rows = [self.examples(world)[index] for index in range(2)]
        given = self.given(world)
        base = generator.load_base()
        broken = copy.deepcopy(base)
        with torch.no_grad():
            broken.lm_head.weight[0].fill_(torch.nan)
        with pytest.raises(ValueError, match="The loss of a labelled example is not finite"):
            generator.adapt(labelled=rows, base_model=broken, **given)

    def test_a_heavy_prior_stays_at_the_start(self, trained, name):
        generator, world = trained[name]
        rows = [self.examples(world)[index] for index in range(3)]
        start = generator.sample(generator.task_vector(**self.given(world)), temperature=0.0)[0].detach()
        far, near = (
            fit_runs(
                generator, generator.load_base(), start, rows, [Run([0, 1], [2], weight)],
                steps=24, learning_rate=3e-3, seed=0, progress=False,
            )[1][-1]
            for weight in (0.0, 1e4)
        )  # fmt: skip
        assert 0 < (near - start).norm() < 0.5 * (far - start).norm()

    def test_the_prior_is_fitted_on_tasks_left_out(self, trained, name, tmp_path):
        generator, world = trained[name]
        rows = [self.examples(world)[index] for index in range(3)]
        vector = generator.task_vector(**self.given(world))
        before = float(generator.network.prior_strength)
        try:
            gains = generator.fit_prior([(vector, rows[:2], rows[2:])], counts=(2,), strengths=(1.0, 1e4), steps=4)
            assert gains[1e4] != gains[1.0]
            assert float(generator.network.prior_strength) == max(gains, key=gains.get)
            generator.save_pretrained(tmp_path)
            assert float(ICMGenerator.from_pretrained(tmp_path).network.prior_strength) == float(generator.network.prior_strength)
        finally:
            generator.network.prior_strength.fill_(before)
        with pytest.raises(ValueError, match="A task has 3 examples and 3 others: 4 and 1 are needed"):
            generator.fit_prior([(vector, rows, rows)], counts=(2, 4))

    def test_wrong_input(self, trained, name):
        generator, world = trained[name]
        rows, given = [self.examples(world)[0]], self.given(world)
        with pytest.raises(ValueError, match="labelled= has 1 examples: two at least"):
            generator.adapt(labelled=rows, **given)
        other = {"input_ids": torch.tensor([1, 2]), "labels": torch.tensor([1, 2])} | (
            {} if name == "detection" else {"pixel_values": torch.ones(3, 8, 8)}
        )
        with pytest.raises(ValueError, match=r"labelled\[0\] has input_ids, labels.*: make it with its own processor"):
            generator.adapt(labelled=[other, other], **given)
        with pytest.raises(ValueError, match=r"prior_weight=-1 must not be negative"):
            generator.adapt(labelled=rows * 2, prior_weight=-1, **given)
        model = generator.generate_adapter(**given)
        for base in (model, model.get_base_model()):
            with pytest.raises(ValueError, match="base_model carries adapters, of peft"):
                generator.adapt(labelled=rows * 2, base_model=base, **given)
        model.merge_adapter()
        for base in (model, model.get_base_model()):
            with pytest.raises(ValueError, match="base_model carries adapters that are merged into it"):
                generator.adapt(labelled=rows * 2, base_model=base, **given)
