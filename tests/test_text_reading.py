"""Direct generators read sentences: which are of their tasks, and which are not. What else they are given they take as it is."""

import warnings

import pytest
import torch
from task_worlds import text_world, trainer
from test_reading import UNKNOWN, delta
from test_training import arguments, tiny_collection

from peft_icm import ICMConfig, ICMGenerator, ICMTrainer, UnknownTaskError, UnknownTaskWarning
from peft_icm.bundled import bundled_encoder
from peft_icm.cli import main
from peft_icm.conditioning import ClipEncoder, JoinedEncoder, StatisticsEncoder
from peft_icm.conditioning.phrasings import phrasings
from peft_icm.generator.text_reading import TextReader
from peft_icm.hub.cards import generator_card
from peft_icm.training.conditions import HELD_OUT_PHRASINGS, unheard

EXAMPLES = ["Dear Sir, I have the honour to be yours", "Dear Madam, it is with regret that I write"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return text_world(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def encoder(world):
    text = ClipEncoder.from_pretrained(bundled_encoder())
    return JoinedEncoder({"text": text, "examples": StatisticsEncoder.from_pretrained(str(world[0]))})


@pytest.fixture(scope="module")
def generator(world, encoder, tmp_path_factory):
    run = trainer(world, tmp_path_factory.mktemp("run"), encoder=encoder, phrasings=24)
    run.train()
    return run.generator.eval()


def made(generator, *args, **options):
    """How the adapter of a request changes the base."""
    return delta(generator.generate_adapter(*args, generator=torch.Generator().manual_seed(0), **options))


class TestRead:
    def test_its_own_sentences_and_foreign_ones(self, generator):
        for task in generator.config.tasks:
            reading = generator.read(task["description"])
            assert (reading.task, reading.known) == (task["name"], True) and reading.worth > 0.8
        assert not generator.read(UNKNOWN).known and not generator.read("zzzqqq").known

    def test_other_words(self, generator):
        lines = [
            (line, task["name"]) for task in generator.config.tasks for line in phrasings(task["description"], 20, seed=7, held_out=True)
        ]
        readings = [(generator.read(line), name) for line, name in lines]
        assert sum(reading.task == name for reading, name in readings) >= 0.9 * len(lines)
        assert sum(reading.known for reading, _ in readings) >= 0.85 * len(lines)

    def test_the_threshold_is_conformal(self, generator, encoder):
        held_out, foreign = unheard([[task["description"]] for task in generator.config.tasks], encoder, 42)
        reader = generator.text_reader
        assert 0.94 <= (reader(torch.cat(held_out))[1] >= reader.threshold).float().mean() <= 0.97
        assert (reader(foreign)[1] >= reader.threshold).float().mean() < 0.2

    def test_examples_are_not_read(self, generator):
        assert generator.hears and generator.can_read("write sonnets")
        for given in ({"examples": EXAMPLES}, {"text": UNKNOWN, "examples": EXAMPLES}):
            assert not generator.can_read(**given)
            with pytest.raises(ValueError, match="tells sentences apart, .*: pass text= alone"):
                generator.read(**given)

    @pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
    def test_saved_and_loaded(self, generator, tmp_path, dtype):
        generator.save_pretrained(tmp_path)
        loaded = ICMGenerator.from_pretrained(tmp_path, dtype=dtype)
        for line in (UNKNOWN, "write sonnets"):
            assert loaded.read(line) == generator.read(line)
        assert loaded.to(torch.bfloat16).read(UNKNOWN) == generator.read(UNKNOWN)

    def test_the_card_says_it(self, generator, tmp_path):
        generator.save_pretrained(tmp_path)
        card = str(generator_card(generator.config.to_dict(), repo_id="org/icm", folder=tmp_path))
        threshold = generator.config.training["reading"]["familiarity_threshold"]
        assert threshold == pytest.approx(float(generator.text_reader.threshold), abs=1e-4)
        assert f"| threshold of familiarity | {threshold} |" in card and "what else it is given it takes as it is" in card

    def test_the_network_does_not_see_it(self, world, encoder, generator, tmp_path):
        vector = generator.task_vector(UNKNOWN)
        assert torch.equal(generator.normalize_condition(vector[None]), generator.statistics.normalize_condition(vector[None]))
        again = trainer(world, tmp_path, model=generator, encoder=encoder)
        assert again.generator is generator and again.objective.reading == generator.config.training["reading"]


class TestOnUnknown:
    def test_warns_and_says_what_helps(self, generator):
        with pytest.warns(UnknownTaskWarning, match=r"none of this generator's tasks.*Show it examples of it \(examples=\)") as caught:
            generator.generate_adapter(UNKNOWN)
        assert caught[0].filename == __file__

    def test_raise_base_and_shrink(self, generator):
        with pytest.raises(UnknownTaskError, match=r"show it examples of it \(examples=\), or pass on_unknown="):
            generator.generate_adapter(UNKNOWN, on_unknown="raise")
        with pytest.raises(UnknownTaskError):
            generator.generate_adapters(["write sonnets", UNKNOWN], on_unknown="raise")
        assert made(generator, UNKNOWN, on_unknown="base").abs().max() == 0
        with pytest.warns(UnknownTaskWarning):
            plain = made(generator, UNKNOWN)
        assert plain.abs().max() > 0
        assert torch.allclose(made(generator, UNKNOWN, on_unknown="shrink"), generator.read(UNKNOWN).worth * plain, atol=1e-7)

    @pytest.mark.parametrize("given", [{"examples": EXAMPLES}, {"text": UNKNOWN, "examples": EXAMPLES}, {"text": "write sonnets"}])
    def test_what_is_known_or_shown_is_left_alone(self, generator, given):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UnknownTaskWarning)
            plain = made(generator, **given)
        for mode in ("base", "raise"):
            assert torch.equal(made(generator, **given, on_unknown=mode), plain)
        if "examples" in given:
            assert torch.equal(made(generator, **given, on_unknown="shrink"), plain)

    def test_a_known_sentence_is_decoded_from_its_own_vector(self, generator):
        line = "my data is sonnets"
        tensors = generator.layout.flatten(generator.generate_state_dict(line, temperature=0.0))
        assert torch.equal(tensors, generator.sample(generator.task_vector(line), temperature=0.0)[0].to(tensors.dtype))

    def test_the_command_line(self, generator, tmp_path, capsys):
        generator.save_pretrained(tmp_path / "g")
        assert main(["read", str(tmp_path / "g"), "write sonnets", "--top", "1"]) == 0
        shown = capsys.readouterr().out
        assert "heard: sonnets" in shown and "... and 2 more tasks" in shown and "novels" not in shown
        assert main(["generate", str(tmp_path / "g"), "--example", EXAMPLES[0], "-o", str(tmp_path / "a")]) == 0
        said = capsys.readouterr()
        assert "heard" not in said.out and "warning" not in said.err
        assert main(["read", str(tmp_path / "g"), "--example", EXAMPLES[0]]) == 2
        assert "pass text= alone" in capsys.readouterr().err


class TestWithout:
    def test_one_task_cannot_be_told_from_another(self, world, encoder, tmp_path):
        run = trainer(world, tmp_path, tasks=world[1][:1], encoder=encoder, phrasings=4)
        assert run.generator.text_reader is None and run.objective.reading == {}
        assert run.generator.read(UNKNOWN).known and run.generator.read(UNKNOWN).threshold is None

    def test_an_encoder_that_reads_no_text(self, world, tmp_path):
        run = trainer(world, tmp_path)
        assert run.generator.text_reader is None and not run.generator.hears and not run.generator.can_read("write sonnets")

    def test_sentences_alone(self, world, tmp_path):
        run = trainer(world, tmp_path, tasks=world[1][:2], encoder=ClipEncoder.from_pretrained(bundled_encoder()), phrasings=8)
        reading = run.generator.read(UNKNOWN)
        assert not reading.known and run.generator.read("write sonnets").known
        with pytest.warns(UnknownTaskWarning, match=r"may do harm\. on_unknown="):
            run.generator.generate_state_dict(UNKNOWN)

    def test_a_condition_space_needs_a_collection(self, world, tmp_path):
        with pytest.raises(ValueError, match="condition_space='lda' is fitted on a collection of LoRAs: objective='task' has none"):
            trainer(world, tmp_path, model=ICMConfig(condition_space="lda"))
        config = ICMConfig(latent_size=4, hidden_size=16, num_components=4, architecture="direct", context=False)
        assert ICMTrainer(config, arguments(tmp_path), collection=tiny_collection()).generator.text_reader is None

    @pytest.mark.slow
    def test_many_tasks_get_few_phrasings_each(self, encoder):
        few, _ = unheard([["write sonnets"], []], encoder)
        assert [len(part) for part in few] == [HELD_OUT_PHRASINGS, 0]
        many, _ = unheard([[f"write {index}"] for index in range(200)], encoder)
        assert {len(part) for part in many} == {20}

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"text_reader": True}, "text_reader=True is for architecture='direct'"),
            ({"text_reader": True, "architecture": "direct", "condition_space": "lda"}, "text_reader=True is for architecture='direct'"),
            ({"text_reader": "yes"}, "text_reader"),
            ({"encoder": {"dim": 8, "parts": {"text": {"dim": 9}}}, "condition_dim": 8}, "dim=9 must be from 1 to the condition_dim, 8"),
            ({"encoder": {"dim": 8, "parts": {"text": {"dim": True}}}, "condition_dim": 8}, "dim=True must be from 1"),
            ({"encoder": {"dim": 8, "parts": {"text": {"dim": "8"}}}, "condition_dim": 8}, "dim='8' must be from 1"),
        ],
    )
    def test_bad_configs(self, options, message):
        with pytest.raises(ValueError, match=message):
            ICMConfig(**options)

    def test_one_task_has_no_reader(self, generator):
        values = generator.config.to_diff_dict() | {"tasks": generator.config.tasks[:1]}
        with pytest.raises(ValueError, match="text_reader=True tells tasks apart: it needs two or more"):
            ICMConfig(**values)

    def test_one_sentence_a_task(self):
        torch.manual_seed(0)
        rows, reader = torch.eye(8)[:2], TextReader(8, 2)
        held, tasks = rows.repeat(20, 1) + 0.1 * torch.randn(40, 8), torch.arange(2).repeat(20)
        reader.fit(rows, torch.arange(2), held, tasks, torch.randn(30, 8))
        probabilities, familiarity = reader(held)
        assert (probabilities.argmax(1) == tasks).all() and familiarity.isfinite().all()
