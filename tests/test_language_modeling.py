"""Exact likelihoods of raw text, and the evaluate metrics on top of them."""

import math

import evaluate
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import TEXTS, llama, llama_lora, tokenizer

from peft_icm.evaluation.metrics import metric_path
from peft_icm.tasks.language_modeling import DOCUMENT_SEPARATOR, LanguageModelingTask, load_tasks, nll, windows

VOCABULARY = len(tokenizer())


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return llama(vocab_size=VOCABULARY, max_position_embeddings=64).eval()


def by_hand(model, ids):
    """Nats of ids[1:] in one plain forward pass."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1].double()
    return -logits.log_softmax(-1)[range(len(ids) - 1), ids[1:]].sum().item()


@given(length=st.integers(1, 300), size=st.integers(2, 64))
@settings(deadline=None)
def test_windows_score_every_position_once_with_half_a_window_of_context(length, size):
    scored = []
    for start, end, first in windows(length, size):
        assert end - start <= size and first > start
        assert first - start >= size // 2 or start == 0
        scored += range(first, end)
    assert scored == list(range(1, length))


def test_a_text_that_fits_is_scored_as_by_hand(model):
    text = TEXTS[0][:40]
    (result,) = nll(model, tokenizer(), [text])
    ids = [0, *tokenizer()(text, add_special_tokens=False)["input_ids"]]
    assert result.nats == pytest.approx(by_hand(model, ids), rel=1e-5)
    assert result.tokens == len(ids) - 1 and result.characters == 40
    assert result.perplexity == pytest.approx(math.exp(result.nats / result.tokens))
    assert result.bits_per_character == pytest.approx(result.nats / math.log(2) / 40)


def test_a_long_text_is_exact_over_window_boundaries(model):
    text = TEXTS[1][:200]
    ids = [0, *tokenizer()(text, add_special_tokens=False)["input_ids"]]
    expected = sum(
        by_hand(model, ids[start:end]) - (by_hand(model, ids[start:first]) if first > start + 1 else 0.0)
        for start, end, first in windows(len(ids), 32)
    )
    (result,) = nll(model, tokenizer(), [text], max_length=32, batch_size=3)
    assert result.tokens == len(ids) - 1
    assert result.nats == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_and_padding_change_nothing(model, side):
    reader = tokenizer()
    reader.padding_side = side
    texts = [text[: 30 + 25 * index] for index, text in enumerate(TEXTS)]
    alone = [nll(model, reader, [text])[0].nats for text in texts]
    together = [score.nats for score in nll(model, reader, texts, batch_size=8)]
    assert together == pytest.approx(alone, rel=1e-5)


def test_characters_are_unicode_characters(model):
    (result,) = nll(model, tokenizer(), ["äöü"])
    assert (result.characters, result.tokens) == (3, 6)


def test_mode_is_restored(model):
    model.train()
    nll(model, tokenizer(), ["a"])
    assert model.training
    model.eval()


@pytest.mark.parametrize("texts", [[""], "a string", [None]])
def test_refuses_what_is_no_text(model, texts):
    with pytest.raises(ValueError, match="non-empty strings"):
        nll(model, tokenizer(), texts)


class TestMetrics:
    def test_through_evaluate(self, model):
        for name in ("perplexity", "bits_per_character"):
            metric = evaluate.load(metric_path(name))
            result = metric.compute(predictions=TEXTS[:2], model=model, tokenizer=tokenizer(), batch_size=2)
            scores = nll(model, tokenizer(), TEXTS[:2])
            total = scores[0] + scores[1]
            assert result[name] == pytest.approx(getattr(total, name), rel=1e-6)
            (each,) = (value for key, value in result.items() if key != name)
            assert each == pytest.approx([getattr(score, name) for score in scores], rel=1e-5)

    def test_with_and_without_an_adapter(self):
        torch.manual_seed(0)
        model = llama_lora(vocab_size=VOCABULARY)
        metric = evaluate.load(metric_path("perplexity"))

        def perplexity():
            return metric.compute(predictions=TEXTS[:1], model=model, tokenizer=tokenizer())["perplexity"]

        before = perplexity()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
        assert perplexity() != pytest.approx(before)
        with model.disable_adapter():
            assert perplexity() == pytest.approx(before)

    def test_unknown(self):
        with pytest.raises(ValueError, match="choose one of adapter_fidelity, bits_per_character, mean_average_precision, perplexity"):
            metric_path("bleu")


class TestTasks:
    def test_train_data_is_packed(self):
        task = LanguageModelingTask("t", ["about t"], TEXTS, [])
        blocks = task.train_dataset(tokenizer(), block_size=16)
        ids = torch.cat([blocks[index]["input_ids"] for index in range(len(blocks))]).tolist()
        expected = [token for text in TEXTS for token in [0, *tokenizer()(text, add_special_tokens=False)["input_ids"], 1]]
        assert ids == expected[: len(ids)] and len(expected) - len(ids) < 16
        few = task.train_dataset(tokenizer(), block_size=16, blocks_per_epoch=3)
        torch.manual_seed(0)
        drawn = [few[index]["labels"] for _ in range(60) for index in range(len(few))]
        assert len(few) == 3 and len({tuple(row.tolist()) for row in drawn}) > len(blocks) * 0.9
        with pytest.raises(ValueError, match="less than one block of 100000"):
            task.train_dataset(tokenizer(), block_size=100_000)

    def test_folder(self, tmp_path):
        (tmp_path / "a.txt").write_text(f"one{DOCUMENT_SEPARATOR}two\nlines")
        (tmp_path / "tasks.json").write_text('{"tasks": [{"name": "a", "descriptions": ["of a"], "train": "a.txt", "test": null}]}')
        (task,) = load_tasks(tmp_path)
        assert task.train_texts == ["one", "two\nlines"] and task.test_texts == [] and task.unseen_descriptions == []
        (tmp_path / "a.txt").unlink()
        with pytest.raises(ValueError, match=r"names a\.txt, which is not there"):
            load_tasks(tmp_path)
        (tmp_path / "tasks.json").write_text("{")
        with pytest.raises(ValueError, match=r"needs a tasks\.json"):
            load_tasks(tmp_path)
