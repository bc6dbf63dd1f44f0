"""Exact likelihoods of raw text, and the evaluate metrics on top of them."""

import itertools
import json
import math

import evaluate
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from tiny import TEXTS, llama, llama_lora, tokenizer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    MptConfig,
    MptForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from peft_icm import CollectingArguments, collect
from peft_icm.evaluation.metrics import metric_path
from peft_icm.tasks.language_modeling import DOCUMENT_SEPARATOR, NLL, LanguageModelingTask, context_size, load_tasks, nll, windows

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


@pytest.mark.parametrize("size", [1, 0, -5, 2.5])
def test_a_window_has_a_token_to_read_and_one_to_score(model, size):
    with pytest.raises(ValueError, match=f"window={size} must be a whole number of at least 2"):
        list(itertools.islice(windows(12, size), 100))
    with pytest.raises(ValueError, match=f"max_length={size} must be a whole number of at least 2"):
        nll(model, tokenizer(), ["a text"], max_length=size)


def test_a_window_longer_than_the_model_reads_is_the_models(model):
    text = TEXTS[1][:200]
    assert nll(model, tokenizer(), [text], max_length=10**9)[0].nats == nll(model, tokenizer(), [text])[0].nats


@pytest.mark.parametrize("size", [0, -1])
def test_a_batch_has_a_text(model, size):
    with pytest.raises(ValueError, match=f"batch_size={size} must be a whole number of at least 1"):
        nll(model, tokenizer(), ["a text"], batch_size=size)


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (BloomForCausalLM, BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=VOCABULARY)),
        (MambaForCausalLM, MambaConfig(hidden_size=16, num_hidden_layers=1, state_size=4, vocab_size=VOCABULARY)),
        (MptForCausalLM, MptConfig(d_model=16, n_heads=2, n_layers=1, max_seq_len=32, vocab_size=VOCABULARY)),
        (GPT2LMHeadModel, GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=32, vocab_size=VOCABULARY)),
    ],
    ids=["bloom", "mamba", "mpt", "gpt2"],
)
def test_models_whose_config_names_no_positions(kind, config):
    torch.manual_seed(0)
    model = kind(config).eval()
    (short,) = nll(model, tokenizer(), [TEXTS[0][:20]])
    assert short.nats == pytest.approx(by_hand(model, [0, *tokenizer()(TEXTS[0][:20], add_special_tokens=False)["input_ids"]]), rel=1e-4)
    assert nll(model, tokenizer(), [(TEXTS[0] * 9)[:1500]])[0].tokens == 1500
    assert context_size(config) == (32 if kind in (MptForCausalLM, GPT2LMHeadModel) else None)


def test_what_is_no_causal_language_model_is_refused():
    small = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": VOCABULARY}
    t5 = T5ForConditionalGeneration(T5Config(**small, decoder_start_token_id=0))
    bert = BertForMaskedLM(
        BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=VOCABULARY)
    )
    for model in (t5, bert):
        with pytest.raises(ValueError, match="is no causal language model"):
            nll(model, tokenizer(), ["a text"])


def test_a_tokenizer_of_another_model_is_refused():
    with pytest.raises(ValueError, match="the model only knows 8: take the tokenizer of this model"):
        nll(llama(vocab_size=8), tokenizer(), ["a text"])


def test_a_text_without_tokens_is_named_and_no_tokens_are_no_number(model):
    words = Tokenizer(WordLevel({"<s>": 0, "[UNK]": 1, "hello": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    reader = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", unk_token="[UNK]")
    with pytest.raises(ValueError, match=r"makes no token of ' \\n ': leave it out"):
        nll(model, reader, ["hello", " \n "])
    nothing = NLL(0.0, 0, 0)
    assert all(math.isnan(value) for value in (nothing.nats_per_token, nothing.perplexity, nothing.bits_per_character))
    assert NLL(1e6, 10, 10).perplexity == math.inf


@pytest.mark.parametrize("texts", [[""], "a string", [None], []])
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

    @pytest.mark.parametrize("name", ["perplexity", "bits_per_character"])
    def test_one_text_is_a_list_of_one_and_what_is_no_text_is_refused(self, model, name):
        options = {"model": model, "tokenizer": tokenizer()}
        one = evaluate.load(metric_path(name)).compute(predictions="hello", **options)
        assert one[name] == pytest.approx(getattr(nll(model, tokenizer(), ["hello"])[0], name))
        for wrong in ([], [""], 3, [None], {"a": 1}):
            with pytest.raises(ValueError, match=r"list of (non-empty )?strings"):
                evaluate.load(metric_path(name)).compute(predictions=wrong, **options)

    def test_fidelity_of_no_adapters_is_refused(self):
        with pytest.raises(ValueError, match="name no adapters"):
            evaluate.load(metric_path("adapter_fidelity")).compute(predictions=[], references=[])

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
        for block_size in (1, 0, -4, None, 2.5):
            with pytest.raises(ValueError, match=f"block_size={block_size} must be a whole number of at least 2"):
                task.train_dataset(tokenizer(), block_size=block_size)
        for count in (0, -1):
            with pytest.raises(ValueError, match=f"blocks_per_epoch={count} must be a whole number of at least 1"):
                task.train_dataset(tokenizer(), block_size=16, blocks_per_epoch=count)

    @pytest.mark.parametrize("name", ["..", "a/b", "a\\b", "", ".", None, 7, "x" * 300, "a\0"])
    def test_a_name_is_a_file_name(self, name):
        with pytest.raises(ValueError, match="task name .* must be a plain file name"):
            LanguageModelingTask(name, ["about t"], TEXTS, [])

    def test_one_string_is_a_list_of_one(self):
        task = LanguageModelingTask("t", "write poems", "a poem", "another", "rhyme")
        assert (task.descriptions, task.train_texts, task.test_texts, task.unseen_descriptions) == (
            ["write poems"], ["a poem"], ["another"], ["rhyme"]
        )  # fmt: skip

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"name": None}, "The task name 'None' must be"),
            ({"name": "../x"}, r"The task name '\.\./x' must be"),
            ({"descriptions": None}, "descriptions of task 'a' must be a list of strings; found None"),
            ({"descriptions": []}, "descriptions of task 'a' is empty: give one sentence at least that asks for it"),
            ({"descriptions": 3}, "descriptions of task 'a' must be a list of strings; found 3"),
            ({"descriptions": {"a": 1}}, "descriptions of task 'a' must be a list of strings"),
            ({"descriptions": [3]}, "descriptions of task 'a' must be a list of non-empty strings; found 3"),
            ({"descriptions": [""]}, "descriptions of task 'a' must be a list of non-empty strings; found ''"),
            ({"descriptions": "\ud800"}, "descriptions of task 'a' must be a list of non-empty strings"),
            ({"unseen_descriptions": None}, "unseen_descriptions of task 'a' must be a list of strings; found None"),
            ({"train": 3}, "train must be the name of a file or folder; found 3"),
            ({"train": ["a.txt"]}, "train must be the name of a file or folder"),
            ({"test": "../outside.txt"}, "test must name something inside"),
            ({"test": "a\0"}, "test must name something inside"),
            ({"test": "latin.txt"}, r"test names latin\.txt, which is no text in UTF-8"),
        ],
    )
    def test_wrong_fields_are_named_with_file_and_task(self, tmp_path, change, message):
        folder = tmp_path / "tasks"
        folder.mkdir()
        (tmp_path / "outside.txt").write_text("secret")
        (folder / "a.txt").write_text("one")
        (folder / "latin.txt").write_bytes("ä".encode("latin-1"))
        good = {"name": "b", "descriptions": "of b", "train": str(folder / "a.txt"), "test": "a.txt"}
        entry = {"name": "a", "descriptions": ["of a"], "train": "a.txt", "test": None, **change}
        (folder / "tasks.json").write_text(json.dumps({"tasks": [good, entry]}))
        with pytest.raises(ValueError, match=rf"tasks\.json: tasks\[1\]: {message}") as raised:
            load_tasks(folder)
        assert "\n" not in str(raised.value)
        for entry in (good, {"name": "c"}):
            (folder / "tasks.json").write_text(json.dumps({"tasks": [good, entry]}))
            with pytest.raises(ValueError, match=r"tasks\.json: tasks\[1\](: a second task is named 'b'| has no 'descriptions')"):
                load_tasks(folder)

    def test_blank_documents_are_left_out(self, tmp_path):
        (tmp_path / "a.txt").write_text(f"one{DOCUMENT_SEPARATOR} \n{DOCUMENT_SEPARATOR}two{DOCUMENT_SEPARATOR}")
        (tmp_path / "tasks.json").write_text('\ufeff{"tasks": [{"name": "a", "descriptions": "of a", "train": "a.txt"}]}')
        assert load_tasks(tmp_path)[0].train_texts == ["one", "two"]

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


def test_a_block_longer_than_the_base_reads_is_refused(tmp_path):
    GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, n_positions=32, vocab_size=VOCABULARY)).save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    args = CollectingArguments(str(tmp_path / "loras"), num_train_epochs=1, num_snapshots=1, dataset_kwargs={"block_size": 33})
    task = LanguageModelingTask("t", "about t", TEXTS, [])
    with pytest.raises(ValueError, match="block_size=33 is more than the 32 tokens that .*base reads at once"):
        collect(str(tmp_path / "base"), [task], LoraConfig(target_modules=["c_attn"], task_type="CAUSAL_LM"), args)
