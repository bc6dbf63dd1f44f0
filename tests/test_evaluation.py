"""Shares of the own LoRA's gain: the arithmetic, and what is refused."""

import pytest
import torch
from tiny import TEXTS, generator, tokenizer

from peft_icm.evaluation.text import Evaluation, evaluate_generator
from peft_icm.tasks.language_modeling import NLL, LanguageModelingTask


def row(base, own, generated, gibberish):
    names = {"base": base, "own": own, "generated": generated, "gibberish": gibberish}
    return {name: NLL(value * 100, 100, 300) for name, value in names.items()}


@pytest.fixture
def evaluation():
    return Evaluation({"a": row(4.0, 3.0, 3.5, 4.5), "b": row(3.0, 2.5, 2.5, 3.0)}, [0, 1], 2.0)


def test_shares_are_of_sums_and_the_worst_is_of_one_task(evaluation):
    assert evaluation.share("generated") == pytest.approx({"mean": (0.5 + 0.5) / 1.5, "min": 0.5})
    assert evaluation.share("gibberish") == pytest.approx({"mean": -0.5 / 1.5, "min": -0.5})
    assert evaluation.variants == ["generated", "gibberish"]


def test_as_json_table_and_plot(evaluation, tmp_path):
    result = evaluation.to_dict()
    assert result["tasks"][0] == {"name": "a", "base": 4.0, "own": 3.0, "generated": 3.5, "gibberish": 4.5}
    assert result["share"]["generated"] == {"mean": 0.6667, "min": 0.5} and result["seeds"] == [0, 1]
    lines = evaluation.table().splitlines()
    assert len(lines) == 5 and lines[-1].split()[-2:] == ["0.67", "-0.33"]
    evaluation.plot(tmp_path / "gains.png")
    assert [file.name for file in tmp_path.iterdir()] == ["gains.png"]


@pytest.mark.parametrize("missing", ["test", "description", "own"])
def test_a_task_that_cannot_be_evaluated_is_named(missing):
    model = generator()
    task = LanguageModelingTask("sonnet", [] if missing == "description" else ["x"], [], [] if missing == "test" else TEXTS)
    own = {} if missing == "own" else {"sonnet": torch.zeros(model.layout.numel)}
    with pytest.raises(ValueError, match="'sonnet' needs test texts, a description and an own LoRA"):
        evaluate_generator(model, tokenizer(), [task], own)
