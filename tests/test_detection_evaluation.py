"""A generator on detection tasks: the arithmetic of the report, and every score of it computed once more by other means."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from test_conditioning import clip, sentence
from test_detection import annotated
from tiny import florence_processor, florence_reader, generator
from transformers import Florence2ForConditionalGeneration

from peft_icm import AdapterLayout
from peft_icm.adapters.attach import attach
from peft_icm.evaluation.detection import (
    METRICS,
    DetectionEvaluation,
    class_precision,
    cross_detection,
    evaluate_detection,
)
from peft_icm.evaluation.report import GIBBERISH, VARIANTS, conditions
from peft_icm.tasks.annotated_images import AnnotatedImage, crops
from peft_icm.tasks.detection import DetectionExamples, DetectionTask, detect

SHIFTS = [(0, 0), (3, 2), (6, 0), (0, 5), (8, 6), (2, -3)]
SCENES = [annotated(((2 + x, 6 + y, 22 + x, 24 + y), "dog"), ((40 + x, 8 + y, 70 + x, 32 + y), "couch")) for x, y in SHIFTS]
SEEDS = (0, 1)
LAST_BITS = 0.05  # of a half-trained model: where two tokens are almost as likely, the last bits of a sum decide which box is written


def precision(value):
    return {"map": value / 2, "map_50": value, "map_75": value / 4}


def row(**values):
    return {name: precision(value) for name, value in values.items()}


@pytest.fixture
def evaluation():
    scores = {
        "sofa": row(base=0.1, own=0.8, generated=0.6, unseen_phrasing=0.2, wrong_task=0.0),
        "dog": row(base=0.2, own=0.4, generated=0.4, unseen_phrasing=0.1),
        "cat": row(base=0.0, own=0.0, generated=0.2, unseen_phrasing=0.0, wrong_task=0.3),
    }
    return DetectionEvaluation(scores, [0, 1], 2.04)


class TestReport:
    def test_means_are_over_tasks_and_ratios_over_those_whose_own_lora_finds_anything(self, evaluation):
        assert evaluation.mean("generated") == pytest.approx(0.4) and evaluation.mean("base", "map_75") == pytest.approx(0.025)
        assert evaluation.ratio("generated") == pytest.approx({"mean": 1.2 / 1.2, "min": 0.6 / 0.8})
        assert evaluation.ratio("unseen_phrasing", "map") == pytest.approx({"mean": 0.3 / 1.2, "min": 0.25})

    def test_own_loras_that_find_nothing_are_no_division_by_zero(self):
        nothing = DetectionEvaluation({"cat": row(base=0.0, own=0.0, generated=0.0)}, [0], 1.0)
        assert nothing.ratio("generated") == nothing.share("generated") == {"mean": None, "min": None}
        assert "n/a" in nothing.table() and json.dumps(nothing.to_dict(), allow_nan=False)

    def test_a_variant_that_one_task_lacks_is_left_out(self, evaluation):
        assert evaluation.variants == ["generated", "unseen_phrasing"]

    def test_as_json(self, evaluation):
        result = json.loads(json.dumps(evaluation.to_dict()))
        assert result["tasks"][1] == {
            "name": "dog",
            **row(base=0.2, own=0.4, generated=0.4, unseen_phrasing=0.1),
            "gain": {"own": 0.2, "generated": 0.2, "unseen_phrasing": -0.1},
            "share": {"generated": 1.0, "unseen_phrasing": -0.5},
        }
        assert result["tasks"][2]["share"]["generated"] is None  # nothing was gained that could be shared
        assert result["share"]["generated"] == {"mean": round(0.9 / 0.9, 4), "min": round(0.5 / 0.7, 4)}
        assert set(result["mean"]) == {"base", "own", "generated", "unseen_phrasing"} and set(result["mean"]["own"]) == set(METRICS)
        assert set(result["ratio"]) == {"generated", "unseen_phrasing"} and result["ratio"]["generated"]["map_50"] == {
            "mean": 1.0,
            "min": 0.75,
        }
        assert result["seeds"] == [0, 1] and result["seconds"] == 2.0

    def test_as_table(self, evaluation):
        scores, shares = (block.splitlines() for block in evaluation.table().split("\n\n"))
        lines = [*scores, *shares[1:]]
        assert lines[0].split() == ["AP50", "/", "AP75", "base", "own", "generated", "unseen_phrasing"]
        assert len({len(line) for line in lines}) == 1
        assert lines[1].split() == ["sofa", "0.10", "/", "0.03", "0.80", "/", "0.20", "0.60", "/", "0.15", "0.20", "/", "0.05"]
        assert scores[-1].split()[:5] == ["all", "tasks", "0.10", "/", "0.03"]
        assert [line.split()[-2:] for line in shares[1:4]] == [["0.71", "0.14"], ["1.00", "-0.50"], ["n/a", "n/a"]]
        assert shares[-2].split() == ["all", "tasks", "0.300", "1.00", "0.00"] and shares[-1].split() == ["worst", "task", "0.71", "-0.50"]

    def test_as_one_picture(self, evaluation, tmp_path):
        evaluation.plot(tmp_path / "precision.png")
        assert [file.name for file in tmp_path.iterdir()] == ["precision.png"]
        with Image.open(tmp_path / "precision.png") as picture:
            assert picture.format == "PNG" and len(picture.convert("RGB").getcolors(10**6)) > 3  # a colour for each of three columns


class TestClassPrecision:
    def found(self, *objects):
        boxes, labels, scores = zip(*objects, strict=True) if objects else ((), (), ())
        return {"boxes": torch.tensor(boxes, dtype=torch.float32).view(-1, 4), "labels": list(labels), "scores": torch.tensor(scores)}

    def test_only_the_class_counts(self):
        scene = annotated(((0, 0, 20, 20), "dog"), ((40, 0, 60, 20), "couch"))
        found = self.found(([0, 0, 20, 20], "dog", 0.9), ([40, 0, 60, 20], "dog", 0.5))
        assert class_precision([found], [scene], "dog") == pytest.approx({"map": 1.0, "map_50": 1.0, "map_75": 1.0})
        assert class_precision([found], [scene], "couch") == {"map": 0.0, "map_50": 0.0, "map_75": 0.0}

    def test_a_box_that_is_somewhat_off_counts_at_low_thresholds_alone(self):
        found = self.found(([0, 0, 20, 12], "dog", 0.9))  # 240 of 400 pixels: an IoU of 0.6
        assert class_precision([found], [annotated(((0, 0, 20, 20), "dog"))], "dog") == pytest.approx(
            {"map": 0.3, "map_50": 1.0, "map_75": 0.0}  # right at 0.50, 0.55 and 0.60 of the ten thresholds
        )

    def test_a_surer_box_in_a_picture_without_the_class_costs(self):
        scenes = [annotated(((0, 0, 20, 20), "dog")), annotated()]
        found = [self.found(([0, 0, 20, 20], "dog", 0.5)), self.found(([0, 0, 20, 20], "dog", 0.9))]
        assert class_precision(found, scenes, "dog")["map_50"] == pytest.approx(0.5)
        found[1] = self.found()
        assert class_precision(found, scenes, "dog")["map_50"] == pytest.approx(1.0)


def plain(folder):
    return Florence2ForConditionalGeneration.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Florence-2 that has half learnt where dogs and couches are: every small push moves its boxes."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    model, processor = florence_reader(max_position_embeddings=96), florence_processor()
    rows = [*DetectionExamples(SCENES, processor, location_step=50)]
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def florence_generator(folder, encoder, spread=3.0):
    """Of random weights, but its adapters are large enough to be seen, and differ from sentence to sentence."""
    lora = LoraConfig(r=1, target_modules=["q_proj", "v_proj", "fc2"], task_type=None)
    model = generator(AdapterLayout.from_peft_model(get_peft_model(plain(folder), lora)), encoder=encoder.config)
    model.encoder = encoder
    model.statistics.std.mul_(spread)
    model.statistics.condition_std.fill_(0.1)
    return model


@pytest.fixture(scope="module")
def reads_both(folder):
    return florence_generator(folder, clip())


def detection_tasks(**kwargs):
    sofa = {"name": "sofa", "descriptions": ["detect sofas", "detect couches"], "label": "couch", "train_images": [], "test_images": SCENES}
    sofa["unseen_descriptions"] = ["where can I sit?", "find each settee", "mark the seats"]
    dog = {"name": "dog", "descriptions": ["detect dogs"], "label": "dog", "unseen_descriptions": ["who barks?"]}
    return [DetectionTask(**{**sofa, **kwargs}), DetectionTask(**{**sofa, **dog})]


def own_loras(model):
    return {
        name: 0.1 * torch.randn(model.layout.numel, generator=torch.Generator().manual_seed(seed))
        for seed, name in enumerate(("sofa", "dog"))
    }


@pytest.fixture(scope="module")
def report(reads_both):
    return evaluate_detection(reads_both, florence_processor(), detection_tasks(), own_loras(reads_both), seeds=SEEDS, progress=False)


class TestEvaluate:
    def test_every_variant_is_scored_for_every_task_and_they_differ(self, report):
        assert report.variants == list(VARIANTS) and list(report.scores) == ["sofa", "dog"] and report.seeds == [0, 1]
        assert all(set(row) == {"base", "own", *VARIANTS} for row in report.scores.values())
        assert len({tuple(scores.values()) for scores in report.scores["sofa"].values()}) > 4
        assert report.seconds > 0

    def test_the_base_is_scored_without_any_adapter(self, report, folder):
        found = detect(plain(folder), florence_processor(), SCENES, batch_size=32)
        for task in detection_tasks():
            expected = class_precision(found, SCENES, task.label)
            assert report.scores[task.name]["base"] == pytest.approx(expected, abs=LAST_BITS) and expected["map_50"] > 0.1

    def test_the_own_lora_is_the_one_of_the_task(self, report, folder, reads_both):
        layout = reads_both.layout
        for task in detection_tasks():
            model = attach(plain(folder), layout, layout.unflatten(own_loras(reads_both)[task.name]))
            expected = class_precision(detect(model, florence_processor(), SCENES, batch_size=32), SCENES, task.label)
            assert report.scores[task.name]["own"] == pytest.approx(expected, abs=LAST_BITS)

    def test_variants_are_means_over_adapters_of_what_they_say(self, report, folder, reads_both):
        sofas = crops(SCENES, "couch")
        asked = {
            "generated": [({"text": "detect sofas"}, 0), ({"text": "detect sofas"}, 1)],
            "pictures": [({"images": sofas[:4]}, 0), ({"images": sofas[4:]}, 1)],  # six couches: the second handful is of two
            "text_and_pictures": [({"text": "detect sofas", "images": part}, seed) for seed, part in enumerate((sofas[:4], sofas[4:]))],
            "unseen_phrasing": [({"text": "where can I sit?"}, 0), ({"text": "find each settee"}, 1), ({"text": "mark the seats"}, 0)],
            "wrong_task": [({"text": "detect dogs"}, 0), ({"text": "detect dogs"}, 1)],
            "gibberish": [({"text": GIBBERISH[0]}, 0), ({"text": GIBBERISH[1]}, 1)],
        }
        assert list(asked) == list(VARIANTS)
        for name, each in asked.items():
            rows = []
            for condition, seed in each:
                model = reads_both.generate_adapter(**condition, base_model=plain(folder), generator=torch.Generator().manual_seed(seed))
                rows.append(class_precision(detect(model, florence_processor(), SCENES, batch_size=32), SCENES, "couch"))
            expected = {metric: sum(row[metric] for row in rows) / len(rows) for metric in METRICS}
            assert report.scores["sofa"][name] == pytest.approx(expected, abs=LAST_BITS), name

    def test_each_seed_sees_the_next_four_pictures(self):
        (sofa, dog) = detection_tasks()
        found = conditions(sofa, dog, list("abcdef"), (7, 8, 9))
        assert found["pictures"] == [({"images": ["a", "b", "c", "d"]}, 7), ({"images": ["e", "f"]}, 8)]
        assert found["text_and_pictures"] == [({"text": "detect sofas", **condition}, seed) for condition, seed in found["pictures"]]

    def test_what_the_encoder_or_the_task_has_nothing_for_is_left_out(self, folder, tmp_path):
        reads_text = florence_generator(folder, sentence(tmp_path))
        (alone, _) = detection_tasks(unseen_descriptions=[])
        report = evaluate_detection(reads_text, florence_processor(), [alone], own_loras(reads_text), seeds=(0,), progress=False)
        assert report.variants == ["generated", "gibberish"]
        assert set(report.scores["sofa"]) == {"base", "own", "generated", "gibberish"}

    def test_only_the_variants_asked_for(self, reads_both):
        asked = {"variants": ("wrong_task", "pictures"), "seeds": (3,), "batch_size": 2, "progress": False}
        report = evaluate_detection(reads_both, florence_processor(), detection_tasks(), own_loras(reads_both), **asked)
        assert report.variants == ["pictures", "wrong_task"] and report.seeds == [3]

    @pytest.mark.parametrize("missing", ["images", "class", "own"])
    def test_a_task_that_cannot_be_evaluated_is_named(self, reads_both, missing):
        changes = {"images": {"test_images": []}, "class": {"test_images": [annotated(((0, 0, 9, 9), "dog"))]}}
        own = own_loras(reads_both)
        if missing == "own":
            del own["sofa"]
        with pytest.raises(ValueError, match="'sofa' needs test images of a 'couch' and an own LoRA"):
            evaluate_detection(reads_both, florence_processor(), detection_tasks(**changes.get(missing, {})), own)


class TestCrossDetection:
    def test_labels_are_not_looked_at(self, folder):
        """Two boxes in one picture: of whichever class, the one is right, and the other is a mistake that costs if it is the surer one."""
        zero = florence_generator(folder, clip(), spread=0.0)
        (found,) = detect(plain(folder), florence_processor(), SCENES[:1])
        assert found["labels"] == ["dog", "couch"]
        renamed = [AnnotatedImage(SCENES[0].image, found["boxes"].tolist(), ["zebra", "yak"])]
        assert class_precision([found], renamed, "zebra")["map_50"] == 0
        tasks = [DetectionTask(f"find {label}s", [f"detect {label}s"], label, [], renamed) for label in ("zebra", "yak")]
        matrix = cross_detection(zero, florence_processor(), tasks, renamed, progress=False)
        dog, couch = found["scores"].tolist()
        expected = {"find zebras": 1.0 if dog > couch else 0.5, "find yaks": 1.0 if couch > dog else 0.5}
        assert dog != couch and list(matrix) == ["find zebras", "find yaks"]
        assert all(columns == pytest.approx(expected) for columns in matrix.values())

    def test_rows_are_adapters_and_columns_are_classes(self, reads_both, folder):
        matrix = cross_detection(reads_both, florence_processor(), detection_tasks(), SCENES, seed=4, progress=False)
        assert {name: list(columns) for name, columns in matrix.items()} == {"sofa": ["sofa", "dog"], "dog": ["sofa", "dog"]}
        for name, text in (("sofa", "detect sofas"), ("dog", "detect dogs")):
            model = reads_both.generate_adapter(text, plain(folder), generator=torch.Generator().manual_seed(4))
            found = detect(model, florence_processor(), SCENES, batch_size=32)
            for column, label in (("sofa", "couch"), ("dog", "dog")):
                alike = [{**one, "labels": [label] * len(one["labels"])} for one in found]
                assert matrix[name][column] == pytest.approx(class_precision(alike, SCENES, label)["map_50"], abs=LAST_BITS)
        assert matrix["sofa"] != matrix["dog"] and matrix["sofa"]["sofa"] != matrix["sofa"]["dog"]
