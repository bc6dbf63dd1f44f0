"""What a generator hears: the condition space, the threshold, and what becomes of a request that no task answers."""

import logging
import warnings

import pytest
import torch
from test_training import arguments, config, tiny_collection
from tiny import florence, florence_layout, generator, llama, llama_layout

from peft_icm import AdapterCollection, ICMConfig, ICMGenerator, ICMTrainer, UnknownTaskError, UnknownTaskWarning, save_adapter
from peft_icm.bundled import bundled_encoder
from peft_icm.conditioning import ClipEncoder
from peft_icm.conditioning.phrasings import phrasings
from peft_icm.generator.condition_space import SPACES, ConditionSpace, projected_dim
from peft_icm.generator.reading import HARM, SURE, Reader, Reading
from peft_icm.training.conditions import training_conditions

TASKS = {"horses": "detect horses", "sonnets": "write sonnets", "contracts": "summarise legal contracts", "pizzas": "find pizzas"}
LAYOUTS = {"llama": (llama_layout, llama), "florence": (florence_layout, florence)}


@pytest.fixture(scope="module")
def encoder():
    return ClipEncoder.from_pretrained(bundled_encoder())


def collection_of(layout, tasks):
    draw = torch.Generator().manual_seed(0)
    snapshots = {name: torch.randn(6, layout.numel, generator=draw) + 3 * torch.randn(layout.numel, generator=draw) for name in tasks}
    return AdapterCollection(layout, snapshots, {name: [line] for name, line in tasks.items()})


@pytest.fixture(scope="module", params=LAYOUTS)
def trained(request, encoder, tmp_path_factory):
    """A generator that was trained on one sentence a task, and its base."""
    layout, base = LAYOUTS[request.param]
    collection = collection_of(layout(), TASKS)
    collection.encode(encoder)
    trainer = ICMTrainer(config(), arguments(tmp_path_factory.mktemp("run"), num_train_epochs=20), collection=collection, encoder=encoder)
    trainer.train()
    torch.manual_seed(0)
    return trainer.generator.eval(), base


UNKNOWN = "quantum chromodynamics lattice simulations on supercomputers"


def delta(model):
    state = {name: tensor for name, tensor in model.state_dict().items() if ".lora_" in name}
    pairs = [(state[name], state[name.replace("lora_B", "lora_A")]) for name in state if "lora_B" in name]
    return torch.cat([(b.flatten(1) @ a.flatten(1)).flatten() for b, a in pairs if b.ndim == 2])


class TestSpace:
    def rows(self, dim=12):
        torch.manual_seed(0)
        tasks = torch.arange(3).repeat_interleave(40)
        stretched = torch.randn(120, dim) * torch.linspace(0.1, 5, dim)
        return stretched + 2 * torch.randn(3, dim)[tasks], tasks

    @pytest.mark.parametrize("kind", SPACES[1:])
    def test_width(self, kind):
        rows, tasks = self.rows()
        space = ConditionSpace(kind, 12, 3)
        space.fit(rows, tasks)
        assert space(rows).shape == (120, projected_dim(kind, 12, 3)) and space(rows).isfinite().all()

    def test_colour_undoes_whitening(self):
        rows, tasks = self.rows()
        space = ConditionSpace("lda", 12, 3)
        space.fit(rows, tasks)
        assert torch.allclose(space.colour(space.whiten(rows)) + space.center, rows, atol=1e-4)

    def test_wording_is_round_after_whitening(self):
        rows, tasks = self.rows()
        space = ConditionSpace("whitening", 12, 3)
        space.fit(rows, tasks)
        white = torch.cat([part - part.mean(0) for part in space(rows).split(40)])
        before = torch.cat([part - part.mean(0) for part in rows.split(40)])
        spread = torch.linalg.eigvalsh(white.T @ white), torch.linalg.eigvalsh(before.T @ before)
        assert spread[0].max() / spread[0].min() < spread[1].max() / spread[1].min() / 5  # shrunk, so not quite

    def test_lda_shows_what_tells_tasks_apart(self):
        torch.manual_seed(0)
        tasks = torch.arange(3).repeat_interleave(60)
        where = torch.eye(3, 12)
        rows = where[tasks] + torch.randn(180, 12) * torch.tensor([0.5] * 3 + [4.0] * 9)
        space = ConditionSpace("lda", 12, 3)
        space.fit(rows, tasks)

        def fisher(points):
            means = torch.stack([part.mean(0) for part in points.split(60)])
            return (means - means.mean(0)).square().sum() / (points - means[tasks]).square().sum()

        assert fisher(space(rows)) > 3 * fisher(rows)

    def test_more_numbers_than_directions_are_kept(self):
        torch.manual_seed(0)
        rows, tasks = torch.randn(60, 300), torch.arange(2).repeat_interleave(30)
        space = ConditionSpace("lda", 300, 2)
        space.fit(rows, tasks)
        assert space.directions.shape == (128, 300) and space.whiten(rows).isfinite().all()

    def test_one_row_a_task(self):
        space = ConditionSpace("lda", 8, 3)
        space.fit(torch.eye(8)[:3], torch.arange(3))
        assert space(torch.eye(8)).isfinite().all()


class TestRead:
    def test_its_own_sentences(self, trained):
        for name, line in TASKS.items():
            reading = trained[0].read(line)
            assert (reading.task, reading.known, reading.description) == (name, True, line)
            assert sum(reading.tasks.values()) == pytest.approx(1, abs=1e-4) and reading.worth > 0.9

    def test_other_words(self, trained):
        lines = {name: phrasings(line, 12, seed=7, held_out=True) for name, line in TASKS.items()}
        heard = [(trained[0].read(line).task, name) for name, some in lines.items() for line in some]
        assert sum(found == name for found, name in heard) >= 0.9 * len(heard)

    def test_what_it_does_not_know(self, trained):
        reading = trained[0].read(UNKNOWN)
        assert not reading.known and reading.familiarity < reading.threshold and reading.worth < 0.5

    def test_the_threshold_is_conformal(self, trained, encoder):
        collection = collection_of(trained[0].layout, TASKS)
        collection.encode(encoder)
        held = torch.cat(training_conditions(collection, encoder, 64, 42).held_out)
        generator = trained[0]
        _, familiarity = generator.reader(generator.space, held)
        assert 0.94 <= (familiarity >= generator.reader.threshold).float().mean() <= 0.97

    def test_saved_and_loaded(self, trained, tmp_path):
        trained[0].save_pretrained(tmp_path)
        loaded = ICMGenerator.from_pretrained(tmp_path)
        assert loaded.read(UNKNOWN) == trained[0].read(UNKNOWN)
        half = ICMGenerator.from_pretrained(tmp_path, dtype=torch.bfloat16)
        assert half.reader.centers.dtype == half.space.projection.dtype == torch.float32
        assert half.read(UNKNOWN) == trained[0].read(UNKNOWN)

    def test_the_card_says_it(self, trained, tmp_path):
        from peft_icm.hub.cards import generator_card

        trained[0].save_pretrained(tmp_path)
        card = str(generator_card(trained[0].config.to_dict(), repo_id="org/icm", folder=tmp_path))
        assert "| threshold of familiarity | " + str(trained[0].config.training["reading"]["familiarity_threshold"]) in card

    def test_worth_weighs_gain_against_harm(self):
        def worth(p):
            return Reading({"a": 1.0, "b": 0.0}, p, 0.5, "a").worth

        for p in (0.05, 0.3, 0.8, 0.99):
            grid = torch.linspace(0, 1, 2001)
            best = (p * grid * (2 - grid) - (1 - p) * HARM * grid.square()).argmax()
            assert worth(p) == pytest.approx(float(grid[best]), abs=1e-3)
        assert (worth(0.0), worth(1.0)) == (0, 1)


class TestOnUnknown:
    def made(self, trained, text=UNKNOWN, **options):
        torch.manual_seed(0)
        return trained[0].generate_adapter(text, trained[1](), generator=torch.Generator().manual_seed(0), **options)

    def quiet(self, *args, **options):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnknownTaskWarning)
            return self.made(*args, **options)

    def test_warns_by_default_and_names_what_was_heard(self, trained):
        heard = trained[0].read(UNKNOWN)
        with pytest.warns(UnknownTaskWarning, match=f"the nearest is {heard.task} .*{heard.confidence:.2f}") as caught:
            self.made(trained)
        assert caught[0].filename == __file__

    def test_known_requests_are_left_alone(self, trained):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UnknownTaskWarning)
            plain = delta(self.made(trained, "detect horses"))
        for mode in ("base", "raise"):
            assert torch.equal(delta(self.made(trained, "detect horses", on_unknown=mode)), plain)

    def test_raise(self, trained):
        with pytest.raises(UnknownTaskError, match="is none of this generator's tasks"):
            self.made(trained, on_unknown="raise")

    def test_base_does_nothing(self, trained):
        assert delta(self.quiet(trained)).abs().max() > 0
        assert delta(self.made(trained, on_unknown="base")).abs().max() == 0

    def test_shrink_is_worth(self, trained):
        worth = trained[0].read(UNKNOWN).worth
        assert torch.allclose(delta(self.made(trained, on_unknown="shrink")), worth * delta(self.quiet(trained)), atol=1e-6)

    def test_strength_scales_what_the_adapter_changes(self, trained):
        plain = delta(self.made(trained, "detect horses"))
        assert torch.allclose(delta(self.made(trained, "detect horses", strength=0.5)), 0.5 * plain, atol=1e-6)
        assert delta(self.made(trained, "detect horses", strength=0.0)).abs().max() == 0

    def test_the_card_tells_the_strength(self, trained, tmp_path):
        halved = (save_adapter(self.made(trained, "detect horses", strength=0.5), tmp_path / "a") / "README.md").read_text()
        plain = (save_adapter(self.made(trained, "detect horses"), tmp_path / "b") / "README.md").read_text()
        assert "| strength, the factor on what it changes | 0.5 |" in halved and "strength" not in plain

    def test_many_at_once(self, trained):
        with pytest.raises(UnknownTaskError):
            trained[0].generate_adapters(["detect horses", UNKNOWN], trained[1](), on_unknown="raise")
        model = trained[0].generate_adapters(["detect horses", UNKNOWN], trained[1](), on_unknown="base")
        state = {name: tensor for name, tensor in model.state_dict().items() if "lora_B" in name}
        assert all(not tensor.any() for name, tensor in state.items() if "quantum" in name)
        assert any(tensor.any() for name, tensor in state.items() if "detect_horses" in name)

    def test_a_task_vector_is_taken_as_it_is(self, trained):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UnknownTaskWarning)
            vector = -trained[0].reader.means[0]
            assert not trained[0].read(task_vector=vector).known
            tensors = trained[0].generate_state_dict(task_vector=vector, on_unknown="raise", temperature=0.0)
        assert torch.equal(
            trained[0].layout.flatten(tensors), trained[0].sample(vector, temperature=0.0)[0].to(trained[0].layout.torch_dtype)
        )

    def test_sure_requests_lose_their_wording(self, trained):
        generator = trained[0]
        means = generator.space.center + generator.space.colour(generator.reader.centers)
        said = {line: index for index, task in enumerate(TASKS.values()) for line in (task, *phrasings(task, 4, seed=7, held_out=True))}
        readings = {line: generator.read(line) for line in said}
        sure = [line for line, reading in readings.items() if reading.tasks[reading.task] >= SURE]
        assert len(sure) >= len(TASKS)
        settled = generator.reader.settle(generator.space, torch.stack([generator.task_vector(line) for line in sure]))
        assert torch.allclose(settled, means[[said[line] for line in sure]], atol=1e-5)
        generated = generator.layout.flatten(generator.generate_state_dict(sure[0], temperature=0.0))
        assert torch.allclose(generated, generator.sample(settled[0], temperature=0.0)[0].to(generated.dtype), atol=1e-4)

    def test_doubtful_requests_stay_as_they_are(self, trained):
        generator = trained[0]
        between = generator.space.center + generator.space.colour(generator.reader.centers[:2].mean(0))[None]  # two tasks are as probable
        assert torch.equal(generator.reader.settle(generator.space, between), between)
        reader, vector = Reader(between.shape[1], len(TASKS)), generator.task_vector(UNKNOWN)[None]
        assert torch.equal(reader.settle(generator.space, vector), vector)  # without a threshold

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"on_unknown": "guess"}, "on_unknown='guess' is unknown: choose one of warn, shrink, base, raise"),
            ({"strength": -1.0}, "strength=-1.0 must be a finite number >= 0"),
            ({"strength": float("nan")}, "strength=nan must be"),
            ({"strength": float("inf")}, "strength=inf must be"),
            ({"strength": "half"}, "strength='half' must be"),
        ],
    )
    def test_bad_options(self, trained, options, message):
        with pytest.raises(ValueError, match=message):
            self.made(trained, **options)
        with pytest.raises(ValueError, match=message):
            trained[0].generate_adapters(["detect horses"], trained[1](), **options)


class TestWithout:
    """Generators without a threshold say so, once."""

    def test_saved_by_0_1_0(self, caplog):
        old = ICMGenerator.from_pretrained("tests/data/generator-0.1.0")
        with caplog.at_level(logging.WARNING):
            readings = [old.read(task_vector=torch.randn(old.config.condition_dim)) for _ in range(2)]
        assert caplog.text.count("has no threshold") == 1
        assert all(reading.known and reading.threshold is None and reading.worth == 1 for reading in readings)

    def test_one_task(self, tmp_path, caplog):
        with caplog.at_level(logging.WARNING):
            trainer = ICMTrainer(config(), arguments(tmp_path), collection=tiny_collection(tasks=1))
        assert "no threshold is fitted" in caplog.text
        assert trainer.generator.config.condition_space == "none" and trainer.generator.reader is None

    def test_the_paper_has_no_projection(self, tmp_path):
        trainer = ICMTrainer(config(architecture="paper", num_conv_layers=2), arguments(tmp_path), collection=tiny_collection())
        assert trainer.generator.config.condition_space == "none"

    def test_no_tasks(self):
        with pytest.raises(ValueError, match="names no tasks"):
            ICMGenerator(ICMConfig(layout=llama_layout().to_dict(), condition_dim=8)).read(task_vector=torch.zeros(8))

    def test_the_same_sentences(self, tmp_path):
        collection = tiny_collection()
        collection.task_vectors = dict.fromkeys(collection.tasks, torch.ones(1, 8))
        with pytest.raises(ValueError, match="task vectors of all 3 tasks are the same"):
            ICMTrainer(config(), arguments(tmp_path), collection=collection)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"condition_space": "pca"}, "condition_space='pca' is unknown: choose one of none, whitening, lda, head"),
            ({"condition_space": "lda", "layout": llama_layout().to_dict()}, "tells tasks apart: it needs two or more"),
        ],
    )
    def test_bad_configs(self, options, message):
        with pytest.raises(ValueError, match=message):
            ICMConfig(**options)

    @pytest.mark.parametrize("space", SPACES)
    def test_every_space_trains(self, space, tmp_path):
        trainer = ICMTrainer(config(condition_space=space), arguments(tmp_path, num_train_epochs=2), collection=tiny_collection())
        trainer.train()
        trainer.generator.save_pretrained(tmp_path / "saved")
        loaded = ICMGenerator.from_pretrained(tmp_path / "saved")
        assert loaded.sample(torch.randn(8)).isfinite().all()

    @pytest.mark.slow
    def test_phrasings_can_be_switched_off(self, encoder):
        collection = collection_of(llama_layout(), TASKS)
        collection.encode(encoder)
        assert [len(rows) for rows in training_conditions(collection, encoder, 0).rows] == [1] * 4
        assert all(len(rows) >= 32 for rows in training_conditions(collection, encoder, 32).rows)

    def test_nothing_is_held_out_where_no_threshold_is_fitted(self, encoder):
        collection = collection_of(llama_layout(), TASKS)
        collection.encode(encoder)
        found = training_conditions(collection, encoder, 32, threshold=False)
        assert not len(found.foreign) and not any(len(part) for part in found.held_out)

    def test_what_the_threshold_is_fitted_on_is_not_trained_on(self):
        collection = tiny_collection()
        draw = torch.Generator().manual_seed(1)
        collection.task_vectors = {task: torch.randn(23, 8, generator=draw) for task in collection.tasks}
        found = training_conditions(collection, None, 64)
        for task, rows, held in zip(collection.tasks, found.rows, found.held_out, strict=True):
            assert (len(rows), len(held)) == (19, 4)
            assert sorted(torch.cat([rows, held])[:, 0].tolist()) == sorted(collection.task_vectors[task][:, 0].tolist())

    def test_too_few_to_tell_anything_unknown(self):
        torch.manual_seed(0)
        tasks, space, reader = torch.arange(2).repeat_interleave(6), ConditionSpace("lda", 8, 2), Reader(8, 2)
        rows = torch.randn(2, 8)[tasks] + 0.1 * torch.randn(12, 8)
        space.fit(rows, tasks)
        reader.fit(space, rows, tasks, rows[::2], tasks[::2], rows[:0])
        assert reader.threshold == 0  # the conformal quantile of six values at 5 % is minus infinity

    def test_random_weights_read_nothing_wrongly(self):
        with pytest.raises(ValueError, match="needs tasks="):
            generator(condition_space="lda").fit(torch.randn(3, llama_layout().numel), torch.randn(3, 8))
