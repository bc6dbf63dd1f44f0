"""Florence-2 detection: one-class tasks, scores that are probabilities."""

import math
import warnings

import PIL.Image
import PIL.ImageDraw
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import FLORENCE_TARGETS, florence, florence_processor, florence_reader
from transformers import AutoProcessor, GenerationConfig

from peft_icm import CollectingArguments, collect
from peft_icm.tasks.annotated_images import AnnotatedImage
from peft_icm.tasks.detection import DetectionExamples, DetectionTask, detect, detection_tasks

COLOURS = {"couch": "red", "dog": "blue"}


def picture(boxes=(), labels=(), size=(80, 40)):
    image = PIL.Image.new("RGB", size, "white")
    for box, label in zip(boxes, labels, strict=True):
        PIL.ImageDraw.Draw(image).rectangle(box, fill=COLOURS[label])
    return image


def annotated(*objects):
    boxes, labels = [list(box) for box, _ in objects], [label for _, label in objects]
    return AnnotatedImage(picture(boxes, labels), boxes, labels)


IMAGES = [
    annotated(((40, 10, 60, 30), "couch"), ((8, 4, 24, 20), "couch"), ((0, 0, 8, 8), "dog")),
    annotated(((10, 10, 30, 30), "dog")),
    annotated(((20, 0, 60, 40), "couch")),
    annotated(),
]


def task(**kwargs):
    return DetectionTask(
        **{"name": "sofa", "descriptions": ["detect sofas"], "label": "couch", "train_images": IMAGES, "test_images": IMAGES} | kwargs
    )


def answers(dataset):
    """The texts that the labels of a data set spell."""
    return [
        florence_processor().tokenizer.decode(row["labels"][row["labels"] != -100]) for row in map(dataset.__getitem__, range(len(dataset)))
    ]


class TestTrainDataset:
    def test_only_the_class_is_answered(self):
        assert answers(task().train_dataset(florence_processor())) == [
            "<s>couch<loc_100><loc_100><loc_300><loc_500>couch<loc_500><loc_250><loc_750><loc_750></s>",
            "<s>couch<loc_250><loc_0><loc_750><loc_999></s>",
        ]
        assert (
            answers(task().train_dataset(florence_processor(), location_step=500))[1] == "<s>couch<loc_250><loc_250><loc_750><loc_750></s>"
        )

    def test_images_without_the_class_have_the_empty_answer(self):
        more = answers(task().train_dataset(florence_processor(), negatives=0.5))
        assert len(more) == 3 and more[2] == "<s></s>"
        assert answers(task().train_dataset(florence_processor(), negatives=0.5)) == more
        assert len(task().train_dataset(florence_processor(), negatives=9.0)) == 4

    def test_items_are_what_the_processor_and_the_collator_take(self):
        lazy, kept = (task().train_dataset(florence_processor(), in_memory=in_memory) for in_memory in (False, True))
        expected = florence_processor()(text="<OD>", images=IMAGES[2].load(), return_tensors="pt")
        for row in (lazy[1], kept[1]):
            assert all(torch.equal(row[name], expected[name][0]) for name in expected)
            assert row["pixel_values"].shape == (3, 32, 32)
        assert lazy[0]["labels"].shape == lazy[1]["labels"].shape

    def test_an_epoch_can_be_some_images_drawn_anew(self):
        some = task().train_dataset(florence_processor(), negatives=1.0, images_per_epoch=3)
        torch.manual_seed(0)
        assert len(some) == 3 and len({text for _ in range(20) for text in answers(some)}) == 3

    def test_a_base_is_trained_on_all_classes_by_the_same_examples(self):
        first = answers(DetectionExamples(IMAGES, florence_processor()))[0]
        assert first.startswith("<s>dog<loc_0>") and first.count("couch") == 2

    @pytest.mark.parametrize(
        ("name", "value"), [("images_per_epoch", 0), ("images_per_epoch", -1), ("negatives", -1), ("negatives", math.nan)]
    )
    def test_numbers_out_of_range_are_named(self, name, value):
        with pytest.raises(ValueError, match=f"{name}={value} must be"):
            task().train_dataset(florence_processor(), **{name: value})
        with pytest.raises(ValueError, match="no images to learn from"):
            DetectionExamples([], florence_processor())

    def test_a_class_with_no_examples_is_refused(self):
        with pytest.raises(ValueError, match="'sofa' is a class with no examples: none of its 4 training images has a 'sofa'"):
            task(label="sofa").train_dataset(florence_processor())


class TestTasks:
    def test_one_for_each_class_with_its_own_label(self):
        sentences = {"sofa": ["detect sofas"], "dog": ["detect dogs"]}
        sofa, dog = detection_tasks(IMAGES, IMAGES, {"sofa": "couch", "dog": "dog"}, sentences, {"dog": ["find each puppy"]})
        assert (sofa.name, sofa.label, sofa.descriptions, sofa.unseen_descriptions) == ("sofa", "couch", ["detect sofas"], [])
        assert dog.unseen_descriptions == ["find each puppy"] and dog.train_images is IMAGES

    @pytest.mark.parametrize("name", ["..", "a/b", "", None, 7, "x" * 300, "a\n"])
    def test_a_name_is_a_file_name(self, name):
        with pytest.raises(ValueError, match="task name .* must be a plain file name"):
            task(name=name)

    def test_classes_without_examples_and_tasks_without_sentences_are_named(self):
        with pytest.raises(ValueError, match=r"sofa: a class with no training examples\. There are examples of couch, dog\."):
            detection_tasks(IMAGES, IMAGES, {"sofa": "sofa"}, {"sofa": ["detect sofas"]})
        with pytest.raises(ValueError, match=r"couch: a class with no test examples\. There are examples of dog\."):
            detection_tasks(IMAGES, IMAGES[1:2], {"sofa": "couch"}, {"sofa": ["detect sofas"]})
        with pytest.raises(ValueError, match="no sentence for sofa"):
            detection_tasks(IMAGES, IMAGES, {"sofa": "couch"}, {})


@pytest.fixture(scope="module")
def spoken():
    """A tiny Florence-2 that has learnt to answer with the three objects of the first image."""
    torch.manual_seed(0)
    model, processor = florence_reader(), florence_processor()
    row = DetectionExamples(IMAGES[:1], processor, location_step=100)[0]
    batch = {name: tensor[None] for name, tensor in row.items()}
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    return model.eval()


class TestDetect:
    def test_what_was_learnt_is_found(self, spoken):
        (found,) = detect(spoken, florence_processor(), IMAGES[:1])
        assert found["labels"] == ["dog", "couch", "couch"]
        assert torch.allclose(found["boxes"], torch.tensor([[0.0, 0, 8, 8], [8, 4, 24, 20], [40, 10, 60, 30]]), atol=8)

    def test_scores_are_the_probabilities_of_a_teacher_forced_forward(self, spoken):
        processor, image = florence_processor(), IMAGES[2]
        (found,) = detect(spoken, processor, [image])
        inputs = processor(text="<OD>", images=image.load(), return_tensors="pt")
        tokens = spoken.generate(**inputs, max_new_tokens=512, do_sample=False)[0]
        with torch.no_grad():
            logits = spoken(**inputs, decoder_input_ids=tokens[None, :-1]).logits[0]
        log_probs = logits.log_softmax(-1)[range(len(tokens) - 1), tokens[1:]].tolist()
        # <s>dog<loc>*4couch<loc>*4couch<loc>*4</s>: counted by hand
        spans = [log_probs[1:8], log_probs[8:17], log_probs[17:26]]
        assert found["scores"].tolist() == pytest.approx([math.exp(sum(span) / len(span)) for span in spans], rel=1e-4)
        assert len(set(found["scores"].tolist())) == 3 and found["scores"].min() > 0 and found["scores"].max() < 1

    def test_batches_change_nothing(self, spoken):
        together, alone = (detect(spoken, florence_processor(), IMAGES, batch_size=size) for size in (3, 1))
        for first, second in zip(together, alone, strict=True):
            assert first["labels"] == second["labels"] and torch.equal(first["boxes"], second["boxes"])
            assert first["scores"].tolist() == pytest.approx(second["scores"].tolist(), rel=1e-4)

    def test_pictures_and_files_are_detected_in_too(self, spoken, tmp_path):
        IMAGES[0].load().save(tmp_path / "a.png")
        (alone,) = detect(spoken, florence_processor(), str(tmp_path / "a.png"))
        found = [*detect(spoken, florence_processor(), [IMAGES[0], IMAGES[0].load()]), alone]
        assert torch.equal(found[0]["boxes"], found[1]["boxes"]) and torch.equal(found[0]["boxes"], found[2]["boxes"])

    def test_a_released_checkpoints_generation_config_changes_nothing(self, spoken):
        (plain,) = detect(spoken, florence_processor(), IMAGES[:1])
        before = spoken.generation_config
        released = {"forced_bos_token_id": 0, "num_beams": 3, "no_repeat_ngram_size": 3, "early_stopping": True}
        spoken.generation_config = GenerationConfig(**{**before.to_dict(), **released})
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                (found,) = detect(spoken, florence_processor(), IMAGES[:1])
        finally:
            spoken.generation_config = before
        assert found["labels"] == plain["labels"] and torch.allclose(found["scores"], plain["scores"])

    def test_with_the_adapter_on_and_off_and_the_mode_as_it_was(self):
        torch.manual_seed(0)
        base = florence_reader().eval()
        (before,) = detect(base, florence_processor(), IMAGES[:1], max_new_tokens=8)
        model = get_peft_model(base, LoraConfig(r=2, target_modules=FLORENCE_TARGETS, task_type=None))
        model.train()
        with model.disable_adapter():
            (off,) = detect(model, florence_processor(), IMAGES[:1], max_new_tokens=8)
        detect(model, florence_processor(), IMAGES[:1], max_new_tokens=8)
        assert model.training and torch.equal(off["boxes"], before["boxes"])

    def test_half_precision(self, spoken):
        model = florence_reader().eval()
        model.load_state_dict(spoken.state_dict())
        (found,) = detect(model.to(torch.bfloat16), florence_processor(), IMAGES[:1])
        assert found["scores"].dtype == found["boxes"].dtype == torch.float32

    @pytest.mark.parametrize("name", ["batch_size", "max_new_tokens"])
    def test_numbers_out_of_range_are_named(self, spoken, name):
        with pytest.raises(ValueError, match=f"{name}=-1 must be a whole number of at least 1"):
            detect(spoken, florence_processor(), IMAGES, **{name: -1})

    def test_a_tokenizer_of_another_model_is_refused(self):
        tokens = len(florence_processor().tokenizer)
        with pytest.raises(ValueError, match=f"tokenizer has {tokens} tokens, the model only 128"):
            detect(florence(), florence_processor(), IMAGES)
        padded = florence(tokens + 38, florence_processor().image_token_id)
        assert len(detect(padded, florence_processor(), IMAGES[:1], max_new_tokens=4)) == 1


def test_tasks_are_collected_and_detected_with(tmp_path):
    torch.manual_seed(0)
    florence_reader().save_pretrained(tmp_path / "base")
    florence_processor().save_pretrained(tmp_path / "base")
    processor = AutoProcessor.from_pretrained(tmp_path / "base")
    assert len(processor.tokenizer) == len(florence_processor().tokenizer) and processor.num_image_tokens == 17

    tasks = detection_tasks(IMAGES, IMAGES, {"sofa": "couch", "dog": "dog"}, {"sofa": ["detect sofas"], "dog": ["detect dogs"]})
    lora = LoraConfig(r=1, target_modules=FLORENCE_TARGETS, task_type=None)
    dataset = {"location_step": 100, "negatives": 1.0, "images_per_epoch": 4, "in_memory": True}
    options = {"num_train_epochs": 3, "num_snapshots": 2, "learning_rate": 1e-2, "dataset_kwargs": dataset}
    collection = collect(str(tmp_path / "base"), tasks, lora, CollectingArguments(str(tmp_path / "loras"), **options))
    assert collection.tasks == ["sofa", "dog"] and all(len(rows) == 2 for rows in collection.snapshots.values())
    assert not torch.equal(collection.snapshots["sofa"], collection.snapshots["dog"])

    model = get_peft_model(florence_reader(), lora)
    assert len(detect(model, processor, tasks[0].test_images, max_new_tokens=8)) == len(IMAGES)
