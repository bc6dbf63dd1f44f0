"""Florence-2's answers: boxes to text, and tokens back to boxes with the probability of each object."""

import math
import time

import pytest
import torch
from tiny import florence_processor

from peft_icm.tasks.florence_answers import answer_text, parse_answer


class TestWriting:
    def test_left_to_right_then_top_down_in_the_processors_bins(self):
        boxes, labels = [[40, 10, 60, 30], [8, 20, 24, 30], [8, 4, 24, 20.02]], ["dog", "couch", "dog"]
        text = answer_text(boxes, labels, (80, 40), florence_processor())
        assert text == (
            "dog<loc_100><loc_100><loc_300><loc_500>couch<loc_100><loc_500><loc_300><loc_750>dog<loc_500><loc_250><loc_750><loc_750>"
        )
        assert answer_text([], [], (80, 40), florence_processor()) == ""

    @pytest.mark.parametrize(
        ("step", "expected"),
        [(1, (0, 999, 505)), (50, (25, 975, 525)), (5, (2, 997, 507)), (300, (150, 999, 450)), (1000, (500, 500, 500))],
    )
    def test_coarse_bins_are_named_by_their_middle(self, step, expected):
        low, high, middle = expected
        text = answer_text([[0, 0, 100, 50.5]], ["x"], (100, 100), florence_processor(), step)
        assert text == f"x<loc_{low}><loc_{low}><loc_{high}><loc_{middle}>"

    @pytest.mark.parametrize("step", [0, 1001, 2.5])
    def test_a_step_out_of_range_is_refused(self, step):
        with pytest.raises(ValueError, match=f"location_step={step} must be between 1"):
            answer_text([[0, 0, 1, 1]], ["x"], (9, 9), florence_processor(), step)

    @pytest.mark.parametrize("label", ["", "a<b", "caf\u00e9", " cat", "a\nb", "x" * 201, "cat<loc_5>"])
    def test_a_label_that_would_not_be_read_back_is_refused(self, label):
        with pytest.raises(ValueError, match="Florence-2 cannot answer with the label"):
            answer_text([[0, 0, 1, 1]], [label], (9, 9), florence_processor())


def parse(text, log_prob=None):
    """Parse a text as generated, the probabilities of its tokens 1/2, 1/3, 1/4, ... unless told."""
    tokens = florence_processor().tokenizer(text, add_special_tokens=False)["input_ids"]
    log_probs = [-math.log(index + 2) if log_prob is None else log_prob for index in range(len(tokens))]
    return parse_answer(tokens, log_probs, (200, 100), florence_processor())


def mean_probability(*positions):
    """Geometric mean of what `parse` gives the tokens at these positions."""
    return math.exp(-sum(math.log(position + 2) for position in positions) / len(positions))


class TestReading:
    def test_what_was_written_is_read_to_half_a_bin(self):
        boxes = [[10.2, 10.7, 60.1, 80.3], [100, 0, 200, 99.9]]
        found = parse(f"<s>{answer_text(boxes, ['a cat', 'dog'], (200, 100), florence_processor())}</s><pad>")
        assert found["labels"] == ["a cat", "dog"]
        assert torch.allclose(found["boxes"], torch.tensor(boxes), atol=0.1001)

    def test_a_score_is_of_the_objects_own_tokens(self):
        found = parse("<s>cat<loc_1><loc_2><loc_3><loc_4>ox<loc_5><loc_6><loc_7><loc_8></s>")
        assert found["scores"].tolist() == pytest.approx([mean_probability(*range(1, 8)), mean_probability(*range(8, 14))])

    def test_several_boxes_behind_one_label_each_have_its_tokens_and_their_own(self):
        found = parse("ox<loc_1><loc_2><loc_3><loc_4><loc_5><loc_6><loc_7><loc_8>cat<loc_9><loc_9><loc_9><loc_9>")
        assert found["labels"] == ["ox", "ox", "cat"] and found["boxes"][1].tolist() == pytest.approx([1.1, 0.65, 1.5, 0.85])
        expected = [mean_probability(0, 1, *own) for own in (range(2, 6), range(6, 10))]
        assert found["scores"].tolist() == pytest.approx([*expected, mean_probability(*range(10, 17))])

    @pytest.mark.parametrize(
        "broken",
        [
            "dog<loc_1><loc_2><loc_3>",  # three locations
            "dog<loc_9><loc_2><loc_3><loc_4>",  # x2 < x1
            "dog<loc_1><loc_9><loc_3><loc_4>",  # y2 < y1
            "<loc_1><loc_2><loc_3><loc_4>",  # no label
            "<loc_1>",
            "<loc_1><loc_2><loc_3><loc_4><loc_5><loc_6>",
            "<sep><loc_1><loc_2><loc_3><loc_4>",
            "a<<loc_1><loc_2><loc_3><loc_4><loc_5>",
            "dog<loc_9><loc_2><loc_3><loc_4><loc_5>",
        ],
    )
    def test_what_is_malformed_is_dropped_and_the_next_object_is_whole(self, broken):
        count = len(florence_processor().tokenizer(broken)["input_ids"])
        found = parse(f"{broken}ox<loc_1><loc_2><loc_3><loc_4>")
        assert found["labels"] == ["ox"] and found["boxes"].shape == (1, 4)
        assert found["scores"].item() == pytest.approx(mean_probability(*range(count, count + 6)))

    @pytest.mark.parametrize("text", ["", "<s></s>", "a dog", "dog<loc_1>", "</s>cat<loc_1><loc_2><loc_3><loc_4>"])
    def test_nothing_is_found_in_an_answer_without_objects(self, text):
        found = parse(text)
        assert found["boxes"].shape == (0, 4) and found["labels"] == [] and found["scores"].shape == (0,)

    def test_a_huge_answer_takes_no_time(self):
        tokenizer = florence_processor().tokenizer
        (letter,), locations = tokenizer("x", add_special_tokens=False)["input_ids"], tokenizer("<loc_1>" * 3, add_special_tokens=False)
        tokens = [letter] * 300_000 + locations["input_ids"]
        start = time.perf_counter()
        assert parse_answer(tokens, [0.0] * len(tokens), (10, 10), florence_processor())["labels"] == []
        assert time.perf_counter() - start < 20

    def test_padding_of_the_vocabulary_is_no_token(self):
        ox = florence_processor().tokenizer("ox<loc_1><loc_2><loc_3><loc_4>")["input_ids"]
        found = parse_answer([5000, *ox], [-1.0] * 7, (10, 10), florence_processor())
        assert found["labels"] == ["ox"]
