"""Prompts and completions, and conversations: as files hold them, as they are learnt, scored and answered."""

import json

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tiny import TEXTS, llama, tokenizer

from peft_icm import CollectingArguments, collect
from peft_icm.adapters.examples import collate, example_losses
from peft_icm.tasks.answers import answers
from peft_icm.tasks.language_modeling import LanguageModelingTask, load_tasks, nll
from peft_icm.tasks.likelihood import windows
from peft_icm.tasks.records import Completion, Conversation, read_examples, write_examples
from peft_icm.training.conditions import excerpts

COMPLETIONS = [Completion("2 + 2 =", " 4"), Completion("The capital of Peru is", " Lima."), Completion("a b c d", " e f g h i j")]
TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
CONVERSATIONS = [
    Conversation(TALK),
    Conversation([{"role": "system", "content": "be brief"}, *TALK, {"role": "user", "content": "and?"}, TALK[1]]),
]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
VOCABULARY = len(tokenizer())


def reader(template=TEMPLATE):
    found = tokenizer().__class__(tokenizer_object=tokenizer().backend_tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    found.chat_template, found.name_or_path = template, "org/base"
    return found


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return llama(vocab_size=VOCABULARY, max_position_embeddings=64).eval()


def ids(text):
    return tokenizer()(text, add_special_tokens=False)["input_ids"]


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


class TestFiles:
    @pytest.mark.parametrize(
        ("records", "suffix"),
        [(records, suffix) for records in (TEXTS, COMPLETIONS, CONVERSATIONS) for suffix in (".jsonl", ".parquet")]
        + [(TEXTS, ".csv"), (COMPLETIONS, ".csv")],
    )
    def test_there_and_back(self, tmp_path, records, suffix):
        rows = [{"text": one} if isinstance(one, str) else vars(one) for one in records]
        write = {".jsonl": "to_json", ".parquet": "to_parquet", ".csv": "to_csv"}[suffix]
        getattr(Dataset.from_list(rows), write)(tmp_path / f"a{suffix}")
        assert [record for record, _ in read_examples(tmp_path / f"a{suffix}")] == records
        write_examples(tmp_path / "b.jsonl", records)
        assert [record for record, _ in read_examples(tmp_path / "b.jsonl")] == records

    def test_what_excel_writes(self, tmp_path):
        (tmp_path / "a.csv").write_bytes('\ufeffprompt,completion\r\n"a, ""b""\r\nc",ä\r\n'.encode())
        assert read_examples(tmp_path / "a.csv") == [(Completion('a, "b"\r\nc', "ä"), {})]

    def test_blank_lines_and_columns_without_a_value_are_nothing(self, tmp_path):
        (tmp_path / "a.jsonl").write_text("\n" + lines({"text": "one", "prompt": None}) + " \n" + lines({"text": "two"}))
        assert [record for record, _ in read_examples(tmp_path / "a.jsonl")] == ["one", "two"]

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (lines({"text": "a"}) + '\n{"text": "b"\n', "line 3: no JSON"),
            (lines({"text": "a"}) + '["text"]\n', "line 2: must be a JSON object"),
            ('{"text": ' + "[" * 100_000, "line 1: no JSON"),
            (
                lines({"text": "a"}, {"prompt": "b", "completion": "c"}),
                "line 2: prompt and completion, where the lines before have text: one format a file",
            ),
            (lines({"prompt": "b", "completion": "c"}, {"messages": TALK}), "line 2: messages, where the lines before have prompt"),
            (lines({"prompt": "b", "completion": "c"}, {"prompt": "b", "completion": " \n"}), "line 2: the completion is empty"),
            (lines({"prompt": "", "completion": "c"}), "line 1: the prompt is empty"),
            (lines({"text": " "}), "line 1: the text is empty"),
            (lines({"text": 3}), "line 1: the text must be a string; found 3"),
            ('{"text": "\\ud800"}\n', "line 1: the text must be a list of non-empty strings"),
            (lines({"prompt": "a"}), "line 1: found prompt: a record has text, or prompt and completion, or messages"),
            (lines({}), "line 1: found nothing: a record has text"),
            (
                lines({"instruction": "a", "output": "b"}),
                "line 1: unknown column 'instruction': allowed are text, or prompt and completion, or messages",
            ),
            (lines({"messages": "hi"}), "line 1: messages must be a list of objects with role and content"),
            (lines({"messages": [{"role": "user"}]}), "line 1: messages must be a list of objects with role and content"),
            (lines({"messages": [TALK[0]]}), "line 1: messages must have one of role 'assistant'"),
            (lines({"messages": TALK[1:]}), "line 1: messages must have one of role 'assistant', which is learnt, and another before it"),
            (lines({"messages": [TALK[0], {"role": "assistant", "content": ""}]}), "line 1: the content of a message of role 'assistant'"),
            ("\n", "holds no example"),
        ],
    )  # fmt: skip
    def test_what_is_wrong_is_named_with_file_and_line(self, tmp_path, content, message):
        (tmp_path / "a.jsonl").write_text(content)
        with pytest.raises(ValueError) as raised:
            read_examples(tmp_path / "a.jsonl")
        assert f"{tmp_path / 'a.jsonl'}" in str(raised.value) and message in str(raised.value) and len(str(raised.value)) < 400

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("a.csv", b"prompt,completion\na,b\nc,d,e\n", "line 3: more fields than the 2 of the first line"),
            ("a.csv", b"prompt,completion\na,b\nc\n", "line 3: found prompt: a record has"),
            ("a.csv", b"prompt,completion,completion\na,b,c\n", "line 1: the column 'completion' comes twice"),
            ("a.csv", b'text\n"a\n', "no CSV"),
            ("a.jsonl", "ä".encode("latin-1"), "is no text in UTF-8"),
            ("a.parquet", b"PAR1", "is no Parquet file that can be read"),
        ],
    )
    def test_broken_files(self, tmp_path, name, content, message):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError) as raised:
            read_examples(tmp_path / name)
        assert str(tmp_path / name) in str(raised.value) and message in str(raised.value)

    def test_what_parquet_fills_in_is_nothing(self, tmp_path):
        talk = [{**message, "name": None} for message in TALK]
        Dataset.from_list([{"messages": talk}]).to_parquet(tmp_path / "a.parquet")
        assert read_examples(tmp_path / "a.parquet")[0][0] == Conversation(TALK)

    def test_tasks_name_them(self, tmp_path):
        write_examples(tmp_path / "a.jsonl", COMPLETIONS)
        entry = {"name": "a", "descriptions": "of a", "train": "a.jsonl"}
        (tmp_path / "tasks.json").write_text(json.dumps({"tasks": [entry]}))
        (task,) = load_tasks(tmp_path)
        assert (task.train_texts, task.test_texts) == (COMPLETIONS, [])
        (tmp_path / "a.jsonl").write_text(lines({"text": "a"}) + "{")
        with pytest.raises(ValueError, match=r"tasks\.json: tasks\[0\]: .*a\.jsonl, line 2: no JSON"):
            load_tasks(tmp_path)


class TestLearnt:
    def task(self, records):
        return LanguageModelingTask("t", ["about t"], records, records)

    def test_a_completion_alone_is_the_target(self):
        rows = self.task(COMPLETIONS).train_dataset(tokenizer())
        assert len(rows) == 3
        for row, record in zip(rows, COMPLETIONS, strict=True):
            prompt, said = [0, *ids(record.prompt)], [*ids(record.completion), 1]
            assert row["input_ids"].tolist() == prompt + said
            assert row["labels"].tolist() == [-100] * len(prompt) + said

    def test_every_turn_of_the_assistant_is_a_target(self):
        (_, row) = self.task(CONVERSATIONS).train_dataset(reader())
        assert row["input_ids"].tolist() == ids("<system>be brief\n<user>hi\n<assistant>hello</s>\n<user>and?\n<assistant>hello</s>\n")
        said = [token for token in row["labels"].tolist() if token != -100]
        assert said == 2 * ids("hello</s>\n")

    def test_packed_completions_are_cut_like_texts_and_a_block_without_a_target_is_left_out(self):
        rows = self.task(COMPLETIONS * 4).train_dataset(tokenizer(), block_size=8, packing=True)
        alone = self.task(COMPLETIONS * 4).train_dataset(tokenizer())
        whole = [torch.cat([row[name] for row in alone]) for name in ("input_ids", "labels")]
        pairs = zip(*(part[: len(part) // 8 * 8].view(-1, 8).tolist() for part in whole), strict=True)
        expected = [(own, labels) for own, labels in pairs if set(labels[1:]) != {-100}]
        assert [(row["input_ids"].tolist(), row["labels"].tolist()) for row in rows] == expected
        assert len(expected) < len(whole[0]) // 8

    def test_texts_may_stand_alone(self):
        rows = self.task(TEXTS).train_dataset(tokenizer(), block_size=50, packing=False)
        assert [row["input_ids"].tolist() for row in rows] == [[0, *ids(text)][:50] for text in TEXTS]
        assert all(torch.equal(row["input_ids"], row["labels"]) for row in rows)

    @pytest.mark.parametrize("size", [2, 5, 9, 12])
    def test_a_long_row_loses_its_prompts_beginning_first(self, size):
        (row,) = self.task([Completion("abcdefgh", "123")]).train_dataset(tokenizer(), block_size=size)
        whole = [0, *ids("abcdefgh"), *ids("123"), 1]
        assert row["input_ids"].tolist() == (whole[-size:] if size >= 5 else whole[8 : 8 + size])
        assert (row["labels"][1:] != -100).any()

    def test_another_split_of_prompt_and_completion_is_other_data(self):
        one, other = (self.task([Completion(a, b)]).train_dataset(tokenizer()) for a, b in (("ab", "cd"), ("abc", "d")))
        assert torch.equal(one[0]["input_ids"], other[0]["input_ids"]) and one.fingerprint() != other.fingerprint()

    def test_padding_changes_nothing(self, model):
        rows = self.task(COMPLETIONS).train_dataset(tokenizer())
        nats, tokens = example_losses(model, collate(list(rows)))
        masked = collate([{**row, "attention_mask": torch.ones_like(row["input_ids"])} for row in rows])
        alone = torch.cat([example_losses(model, collate([row]))[0] for row in rows])
        torch.testing.assert_close(nats, alone, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(nats, example_losses(model, masked)[0], rtol=1e-4, atol=1e-4)
        assert tokens.tolist() == [len(ids(record.completion)) + 1 for record in COMPLETIONS]
        torch.testing.assert_close(
            alone, torch.tensor([score.nats for score in nll(model, tokenizer(), COMPLETIONS)]), rtol=1e-4, atol=1e-4
        )

    def test_one_kind_a_task(self):
        for records in ([*COMPLETIONS, "a text"], [*COMPLETIONS, *CONVERSATIONS], [COMPLETIONS[0], 3]):
            with pytest.raises(ValueError, match="train_texts of task 't' must be of one kind; found"):
                self.task(records)
        assert self.task(COMPLETIONS[0]).train_texts == COMPLETIONS[:1]

    def test_encoders_read_prompt_and_completion(self):
        assert excerpts(COMPLETIONS, 8) == [str(record) for record in COMPLETIONS]
        assert excerpts(CONVERSATIONS, 1) == ["user: hi\nassistant: hello"]

    def test_a_lora_is_collected_of_them(self, model, tmp_path):
        model.save_pretrained(tmp_path / "base")
        tokenizer().save_pretrained(tmp_path / "base")
        args = CollectingArguments(str(tmp_path / "work"), num_train_epochs=30, num_snapshots=1, learning_rate=0.02)
        lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        collection = collect(str(tmp_path / "base"), [self.task(COMPLETIONS)], lora, args)
        start = sum(score.nats for score in nll(model, tokenizer(), COMPLETIONS)) / sum(
            s.tokens for s in nll(model, tokenizer(), COMPLETIONS)
        )
        assert collection.metadata["train_loss"]["t"] < start


class TestChatTemplate:
    def refused(self, template, record=CONVERSATIONS[1]):
        with pytest.raises(ValueError) as raised:
            LanguageModelingTask("t", ["t"], [record], []).train_dataset(reader(template))
        return str(raised.value)

    def test_none(self):
        said = self.refused(None)
        assert "The tokenizer of org/base has no chat template" in said and "give prompt and completion in the place of messages" in said

    def test_one_that_refuses(self):
        said = self.refused("{{ raise_exception('roles must alternate') }}")
        assert "org/base has a chat template that refuses the messages (roles must alternate)" in said

    def test_one_that_writes_a_turn_otherwise_later(self):
        said = self.refused("{{ messages|length }}" + TEMPLATE)
        assert "writes a turn otherwise once another follows" in said


class TestScored:
    def by_hand(self, model, record):
        prompt, said = [0, *ids(record.prompt)], [*ids(record.completion), 1]
        with torch.no_grad():
            logs = model(torch.tensor([prompt + said])).logits[0].double().log_softmax(-1)
        return -sum(logs[len(prompt) - 1 + place, token].item() for place, token in enumerate(said))

    def test_completions_given_their_prompts(self, model):
        scores = nll(model, tokenizer(), COMPLETIONS)
        assert [score.nats for score in scores] == pytest.approx([self.by_hand(model, record) for record in COMPLETIONS], rel=1e-5)
        assert [score.tokens for score in scores] == [len(ids(record.completion)) + 1 for record in COMPLETIONS]
        assert [score.characters for score in scores] == [len(record.completion) for record in COMPLETIONS]

    def test_over_windows_every_target_once(self, model):
        record = Completion(TEXTS[0][:90], TEXTS[1][:70])
        (score,) = nll(model, tokenizer(), [record], max_length=16)
        assert score.tokens == 71
        whole = [0, *ids(str(record)), 1]
        expected = 0.0
        for start, end, first in windows(len(whole), 16):
            with torch.no_grad():
                logs = model(torch.tensor([whole[start:end]])).logits[0].double().log_softmax(-1)
            expected -= sum(logs[at - start - 1, whole[at]].item() for at in range(max(first, 91), end))
        assert score.nats == pytest.approx(expected, rel=1e-5)

    def test_turns_of_the_assistant(self, model):
        scores = nll(model, reader(), CONVERSATIONS)
        assert [score.tokens for score in scores] == [len(ids("hello</s>\n")), 2 * len(ids("hello</s>\n"))]
        assert [score.characters for score in scores] == [5, 10]


class TestAnswered:
    def greedy(self, model, prompt, count):
        row = list(prompt)
        for _ in range(count):
            with torch.no_grad():
                token = int(model(torch.tensor([row])).logits[0, -1].argmax())
            if token == 1:
                break
            row.append(token)
        return tokenizer().decode(row[len(prompt) :], skip_special_tokens=True)

    @pytest.mark.parametrize("size", [1, 3])
    def test_as_by_hand_in_batches_and_in_order(self, model, size):
        found = answers(model, tokenizer(), COMPLETIONS, max_new_tokens=7, batch_size=size)
        assert found == [self.greedy(model, [0, *ids(record.prompt)], 7) for record in COMPLETIONS]

    def test_by_default_as_long_as_the_longest_that_is_known(self, model):
        longest = len(ids(COMPLETIONS[2].completion)) + 1
        assert answers(model, tokenizer(), COMPLETIONS)[0] == self.greedy(model, [0, *ids(COMPLETIONS[0].prompt)], longest)

    def test_the_last_turn_of_a_conversation(self, model):
        prompt = ids("<system>be brief\n<user>hi\n<assistant>hello</s>\n<user>and?\n<assistant>")
        model_of_more = llama(vocab_size=VOCABULARY, max_position_embeddings=256).eval()
        assert answers(model_of_more, reader(), [CONVERSATIONS[1]], max_new_tokens=3) == [self.greedy(model_of_more, prompt, 3)]

    def test_one_long_answer_leaves_the_other_prompts_whole(self, model):
        found = answers(model, tokenizer(), [*COMPLETIONS, Completion("a", TEXTS[0][:300])], batch_size=2)
        assert found[0].startswith(self.greedy(model, [0, *ids(COMPLETIONS[0].prompt)], 3))

    def test_a_prompt_longer_than_the_model_reads_loses_its_beginning(self, model):
        prompt = TEXTS[0][:200]
        (found,) = answers(model, tokenizer(), [Completion(prompt, "x")], max_new_tokens=4)
        assert found == self.greedy(model, ids(prompt)[-60:], 4)

    def test_numbers(self, model):
        with pytest.raises(ValueError, match="max_new_tokens=0 must be a whole number of at least 1"):
            answers(model, tokenizer(), COMPLETIONS, max_new_tokens=0)
