"""The report: its arithmetic, what is n/a, and every score on text computed once more by other means."""

import json

import pytest
import torch
from command_line import run
from peft import LoraConfig, get_peft_model
from test_conditioning import clip
from tiny import TEXTS, generator, llama, tokenizer
from transformers import AutoModelForCausalLM

from peft_icm import AdapterLayout
from peft_icm.adapters.attach import attach
from peft_icm.bundled import bundled_folder
from peft_icm.evaluation import Evaluation, evaluate_generator
from peft_icm.evaluation.report import GIBBERISH, share_of
from peft_icm.evaluation.text import Answered, AnswersEvaluation
from peft_icm.tasks.answers import answers
from peft_icm.tasks.language_modeling import NLL, LanguageModelingTask, nll
from peft_icm.tasks.records import Completion, write_examples

SEEDS = (0, 1)


def row(**nats):
    return {name: NLL(value * 100, 100, 300) for name, value in nats.items()}


@pytest.fixture
def evaluation():
    scores = {"a": row(base=4.0, own=3.0, generated=3.5, gibberish=4.5), "b": row(base=3.0, own=2.5, generated=2.5, gibberish=3.0)}
    return Evaluation(scores, [0, 1], 2.0)


@pytest.fixture
def untrained():
    """A task whose own LoRA gains nothing, beside one whose own does harm."""
    scores = {"a": row(base=4.0, own=4.0, generated=4.0, gibberish=5.0), "b": row(base=3.0, own=3.5, generated=2.5, gibberish=3.0)}
    return Evaluation(scores, [0], 2.0)


class TestReport:
    def test_shares_are_of_sums_and_the_worst_is_of_one_task(self, evaluation):
        assert evaluation.share("generated") == pytest.approx({"mean": (0.5 + 0.5) / 1.5, "min": 0.5})
        assert evaluation.share("gibberish") == pytest.approx({"mean": -0.5 / 1.5, "min": -0.5})
        assert evaluation.variants == ["generated", "gibberish"]

    def test_as_json(self, evaluation):
        result = json.loads(json.dumps(evaluation.to_dict()))
        assert result["tasks"][0] == {
            "name": "a",
            **{"base": 4.0, "own": 3.0, "generated": 3.5, "gibberish": 4.5},
            "gain": {"own": 1.0, "generated": 0.5, "gibberish": -0.5},
            "share": {"generated": 0.5, "gibberish": -0.5},
        }
        assert result["share"]["generated"] == {"mean": 0.6667, "min": 0.5} and result["seeds"] == [0, 1] and result["seconds"] == 2.0

    def test_as_a_table(self, evaluation):
        scores, shares = (block.splitlines() for block in evaluation.table().split("\n\n"))
        assert scores[0].split() == ["PPL", "/", "BPC", "base", "own", "generated", "gibberish"]
        assert [line.split()[0] for line in scores[1:]] == ["a", "b", "all"]
        assert scores[1].split()[1:4] == ["54.60", "/", "1.924"]  # exp(4), and 4 nats a token of three characters in bits
        assert shares[0] == "The own LoRA's gain over the base, in nats per token, and the share of it:"
        assert [line.split()[-3:] for line in shares[1:4]] == [
            ["1.000", "0.50", "-0.50"],
            ["0.500", "1.00", "0.00"],
            ["0.750", "0.67", "-0.33"],
        ]
        assert shares[4].split() == ["worst", "task", "0.50", "-0.50"] and len({len(line) for line in [*scores, *shares[1:]]}) == 1

    def test_a_share_of_nothing_is_not_available_and_the_report_is_written(self, untrained, tmp_path):
        assert share_of(0.0, 0.0) is None and share_of(1.0, -1.0) is None
        assert untrained.share("generated") == {"mean": None, "min": None}
        result = json.loads(json.dumps(untrained.to_dict(), allow_nan=False))
        assert [task["share"] for task in result["tasks"]] == [{"generated": None, "gibberish": None}] * 2
        assert untrained.table().count("n/a") == 8
        untrained.plot(tmp_path / "gains.png")
        assert [file.name for file in tmp_path.iterdir()] == ["gains.png"]

    def test_tasks_without_a_share_do_not_enter_the_worst(self, evaluation, untrained):
        scores = {**evaluation.scores, "c": untrained.scores["a"]}
        both = Evaluation(scores, [0], 2.0)
        assert both.share("gibberish") == pytest.approx({"mean": -1.5 / 1.5, "min": -0.5})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    llama(vocab_size=len(tokenizer()), max_position_embeddings=512).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reads(folder):
    """Of random weights, but its adapters are large enough to be seen, and differ from sentence to sentence."""
    wrapped = get_peft_model(plain(folder), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    encoder = clip()
    model = generator(AdapterLayout.from_peft_model(wrapped), encoder=encoder.config)
    model.encoder = encoder
    model.statistics.std.fill_(30.0)
    model.statistics.condition_std.fill_(0.1)
    return model


def plain(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def text_tasks(**changes):
    sonnet = {"name": "sonnet", "descriptions": ["write a sonnet", "rhyme"], "train_texts": [], "test_texts": TEXTS[:2]}
    sonnet["unseen_descriptions"] = ["fourteen lines", "a poem of love", "iambs"]
    novel = {"name": "novel", "descriptions": ["write a novel"], "test_texts": TEXTS[2:], "unseen_descriptions": ["a long story"]}
    return [LanguageModelingTask(**{**sonnet, **changes}), LanguageModelingTask(**{**sonnet, **novel})]


def own_loras(model):
    draw = torch.Generator().manual_seed(3)
    return {name: torch.randn(model.layout.numel, generator=draw) for name in ("sonnet", "novel")}


@torch.no_grad()
def nats_per_token(model, texts):
    """By hand: every text whole, behind <s>."""
    total = count = 0
    for text in texts:
        ids = torch.tensor([[0, *tokenizer()(text, add_special_tokens=False)["input_ids"]]])
        total -= model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]).sum().item()
        count += ids.shape[1] - 1
    return total / count


class TestEvaluate:
    def test_every_score_is_that_of_an_adapter_on_a_base_of_its_own(self, reads, folder):
        seen = []
        own = own_loras(reads)
        report = evaluate_generator(reads, tokenizer(), text_tasks(), own, seeds=SEEDS, progress=False)
        asked = {
            "generated": [("write a sonnet", 0), ("write a sonnet", 1)],
            "unseen_phrasing": [("fourteen lines", 0), ("a poem of love", 1), ("iambs", 0)],
            "wrong_task": [("write a novel", 0), ("write a novel", 1)],
            "gibberish": [(GIBBERISH[0], 0), (GIBBERISH[1], 1)],
        }
        assert report.variants == list(asked) and report.seeds == [0, 1] and list(report.scores) == ["sonnet", "novel"]
        expected = {"base": nats_per_token(plain(folder), TEXTS[:2])}
        expected["own"] = nats_per_token(attach(plain(folder), reads.layout, reads.layout.unflatten(own["sonnet"])), TEXTS[:2])
        for name, each in asked.items():
            for text, seed in each:
                model = reads.generate_adapter(text, plain(folder), generator=torch.Generator().manual_seed(seed))
                seen.append(nats_per_token(model, TEXTS[:2]))
            expected[name] = sum(seen[-len(each) :]) / len(each)
        found = {name: score.nats_per_token for name, score in report.scores["sonnet"].items()}
        assert found == pytest.approx(expected, abs=1e-5)
        assert min(abs(a - b) for a in expected.values() for b in expected.values() if a != b) > 1e-4  # what is told apart
        assert report.scores["novel"]["base"].nats_per_token == pytest.approx(nats_per_token(plain(folder), TEXTS[2:]), abs=1e-4)
        gained = expected["base"] - expected["generated"]
        assert report.gain("sonnet", "generated") == pytest.approx(gained, abs=1e-4)

    def test_an_own_lora_that_does_nothing(self, reads):
        """As one that was not trained: B = 0."""
        nothing = {name: torch.zeros(reads.layout.numel) for name in ("sonnet", "novel")}
        report = evaluate_generator(reads, tokenizer(), text_tasks(), nothing, seeds=(0,), progress=False)
        assert report.gain("sonnet", "own") == 0 and report.share("generated") == {"mean": None, "min": None}
        assert "n/a" in report.table() and json.dumps(report.to_dict(), allow_nan=False)

    @pytest.mark.parametrize("missing", ["test", "own"])
    def test_a_task_that_cannot_be_evaluated_is_named(self, reads, missing):
        changes = {"test_texts": []} if missing == "test" else {}
        own = {} if missing == "own" else own_loras(reads)
        with pytest.raises(ValueError, match="'sonnet' needs test texts and an own LoRA"):
            evaluate_generator(reads, tokenizer(), text_tasks(**changes), own)

    @pytest.mark.parametrize("missing", ["tasks", "seeds"])
    def test_nothing_to_evaluate(self, reads, missing):
        tasks, seeds = ([], (0,)) if missing == "tasks" else (text_tasks(), ())
        with pytest.raises(ValueError, match=f"{missing}=.* must each have one entry at least"):
            evaluate_generator(reads, tokenizer(), tasks, own_loras(reads), seeds=seeds)


METRIC = """
import datasets
import evaluate


class Letters(evaluate.Metric):
    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Value("string")})
        return evaluate.MetricInfo(description="", citation="", features=features)

    def _compute(self, predictions, references):
        return {"letters": sum(map(len, predictions)) / len(predictions), "first": predictions[0]}
"""


class TestAnswers:
    """Prompts and completions: their likelihood, and what the model itself answers."""

    def prompts(self, reads, folder):
        """The second is answered as the base answers it."""
        asked = [Completion("2 + 2 =", " 4"), Completion("a b c", " d"), Completion("e f", " g h i")]
        said = answers(plain(folder), tokenizer(), asked, max_new_tokens=6)
        return [asked[0], Completion(asked[1].prompt, said[1]), asked[2]]

    def test_scores_of_the_base_are_those_by_hand(self, reads, folder, tmp_path):
        (tmp_path / "letters").mkdir()
        (tmp_path / "letters" / "letters.py").write_text(METRIC)
        asked = self.prompts(reads, folder)
        tasks = [LanguageModelingTask(name, [f"write a {name}"], [], asked) for name in ("sonnet", "novel")]
        options = {"seeds": (0,), "metrics": [str(tmp_path / "letters")], "progress": False}
        report = evaluate_generator(reads, tokenizer(), tasks, own_loras(reads), **options)
        found = report.scores["sonnet"]["base"]
        given = answers(plain(folder), tokenizer(), asked)
        assert found.nll.nats == pytest.approx(sum(score.nats for score in nll(plain(folder), tokenizer(), asked)), rel=1e-5)
        same = [one.strip() == record.completion.strip() for one, record in zip(given, asked, strict=True)]
        assert found.metrics == {"exact_match": sum(same) / 3, "letters": pytest.approx(sum(map(len, given)) / 3)}
        as_json = report.to_dict()["tasks"][0]["base"]
        assert as_json == {"nats": pytest.approx(found.nll.nats_per_token, abs=1e-4), **{n: round(v, 4) for n, v in found.metrics.items()}}
        table = report.table()
        assert table.splitlines()[0].split()[:4] == ["PPL", "/", "exact", "match"] and table.splitlines()[-1].startswith("letters ")
        assert json.dumps(report.to_dict(), allow_nan=False)

    def test_an_answer_that_is_right_matches_exactly_up_to_white_space(self, folder):
        base = plain(folder)
        prompt = torch.tensor([[0, *tokenizer()("a b c", add_special_tokens=False)["input_ids"]]])
        said = base.generate(prompt, max_new_tokens=8, do_sample=False)[0, prompt.shape[1] :].tolist()
        end = next(place for place, token in enumerate(said) if token != said[0])
        base.generation_config.eos_token_id = [1, said[end]]  # a base of several, as those that were tuned for chat
        right = Completion("a b c", f" {tokenizer().decode(said[:end])}\n")
        task = LanguageModelingTask("t", ["t"], [], [right, Completion("a b c", " d")])
        assert AnswersEvaluation.score(base, tokenizer(), task, batch_size=4).metrics == {"exact_match": 0.5}

    def test_means_are_over_answers(self):
        scores = [Answered(NLL(8.0, 4, 9), 1, {"exact_match": 1.0}), Answered(NLL(4.0, 4, 9), 3, {"exact_match": 0.0})]
        pooled = AnswersEvaluation.pool(scores)
        assert (pooled.answers, pooled.metrics, pooled.nll) == (4, {"exact_match": 0.25}, NLL(12.0, 8, 18))
        assert AnswersEvaluation.numbers(pooled)["gain"] == -1.5

    def test_on_the_command_line(self, tmp_path, capsys):
        (tmp_path / "letters").mkdir()
        (tmp_path / "letters" / "letters.py").write_text(METRIC)
        write_examples(
            tmp_path / "bible.jsonl", [Completion("In the beginning God", " created"), Completion("And God said,", " Let there")]
        )
        entry = {"name": "bible", "descriptions": "continue a chapter of the Bible", "train": None, "test": "bible.jsonl"}
        (tmp_path / "tasks.json").write_text(json.dumps({"tasks": [entry]}))
        arguments = ["evaluate", "bundled:text", "--tasks", tmp_path, "--collection", bundled_folder("text") / "own", "--seeds", 0]
        assert run(*arguments, "--metric", tmp_path / "letters", "--json") == 0
        (task,) = json.loads(capsys.readouterr().out)["tasks"]
        assert task["generated"].keys() == {"nats", "exact_match", "letters"}
        (tmp_path / "requests.json").write_text('{"known": {"bible": ["the Bible"]}, "unknown": []}')
        assert run(*arguments, "--metric", "rouge", "--requests", tmp_path / "requests.json") == 2
        assert "--metric rouge is of the answers to prompts: it goes with language tasks, and without --requests" in capsys.readouterr().err

    def test_metrics_that_cannot_be(self, reads, folder):
        own = own_loras(reads)
        with pytest.raises(ValueError, match="The metric rouge is of answers to prompts, task 'sonnet' has none among its test texts"):
            evaluate_generator(reads, tokenizer(), text_tasks(), own, metrics=["rouge"])
        tasks = [LanguageModelingTask(name, ["of it"], [], self.prompts(reads, folder)) for name in ("sonnet", "novel")]
        for score in (evaluate_generator, AnswersEvaluation.evaluate):
            with pytest.raises(ValueError, match="metrics must be a list of strings; found {'mine'"):
                score(reads, tokenizer(), tasks, own, metrics={"mine": object()}, progress=False)
        with pytest.raises(ValueError, match="The metric perplexity cannot be computed from answers and references alone"):
            evaluate_generator(reads, tokenizer(), tasks, own, metrics=["perplexity"], progress=False)
