"""Folders of tasks: which kind they are, what a detection folder needs, and the objects cut out of its pictures."""

import json

import pytest
from PIL import Image
from test_detection import annotated

from peft_icm.tasks import load_tasks
from peft_icm.tasks.annotated_images import AnnotatedImage, crops
from peft_icm.tasks.detection import DetectionTask, load_detection_tasks
from peft_icm.tasks.language_modeling import LanguageModelingTask

CATEGORIES = {"couch": 63, "dog": 18}


def write_split(folder, name, scenes):
    """Annotated images as a COCO file and a folder of PNG; returns the entry of `tasks.json`."""
    (folder / name).mkdir(parents=True)
    images, annotations = [], []
    for index, scene in enumerate(scenes):
        scene.load().save(folder / name / f"{index}.png")
        width, height = scene.size
        images.append({"id": index, "file_name": f"{index}.png", "width": width, "height": height})
        for (x1, y1, x2, y2), label in zip(scene.boxes, scene.labels, strict=True):
            number = len(annotations) + 1
            objects = {"id": number, "image_id": index, "category_id": CATEGORIES[label], "bbox": [x1, y1, x2 - x1, y2 - y1]}
            annotations.append({**objects, "iscrowd": 0, "area": (x2 - x1) * (y2 - y1)})
    categories = [{"id": number, "name": label} for label, number in CATEGORIES.items()]
    (folder / f"{name}.json").write_text(json.dumps({"images": images, "categories": categories, "annotations": annotations}))
    return {"annotations": f"{name}.json", "images": name}


TASKS = [
    {"name": "sofa", "label": "couch", "descriptions": ["detect sofas", "detect couches"], "unseen_descriptions": ["where can I sit?"]},
    {"name": "dog", "label": "dog", "descriptions": ["detect dogs"]},
]


def write_folder(folder, train, test, tasks=TASKS):
    splits = {name: write_split(folder, name, scenes) for name, scenes in (("train", train), ("test", test))}
    (folder / "tasks.json").write_text(json.dumps({**splits, "tasks": tasks}))
    return folder


TRAIN = [annotated(((40, 10, 60, 30), "couch"), ((0, 0, 8, 8), "dog")), annotated(((8, 4, 24, 20), "dog"))]
TEST = [annotated(((20, 0, 60, 40), "couch"))]


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "tasks", TRAIN, TEST)


@pytest.fixture
def document(folder):
    """(tasks.json, save)."""
    content = json.loads((folder / "tasks.json").read_text())
    return content, lambda: (folder / "tasks.json").write_text(json.dumps(content))


class TestWhichKind:
    def test_annotated_pictures_are_detection(self, folder):
        assert all(isinstance(task, DetectionTask) for task in load_tasks(folder))
        assert [task.name for task in load_tasks(str(folder))] == ["sofa", "dog"]

    def test_one_split_is_enough(self, folder, document):
        document[0]["train"] = None
        document[1]()
        assert isinstance(load_tasks(folder)[0], DetectionTask)

    def test_texts_are_language_modelling_whatever_they_are_about(self, tmp_path):
        (tmp_path / "a.txt").write_text("a text")
        entry = {"name": "annotations", "descriptions": ["write annotations", "annotations"], "train": "a.txt", "test": None}
        (tmp_path / "tasks.json").write_text(json.dumps({"tasks": [entry]}))
        (task,) = load_tasks(tmp_path)
        assert isinstance(task, LanguageModelingTask) and (task.name, task.train_texts) == ("annotations", ["a text"])

    def test_neither_and_nothing(self, folder, document):
        document[0]["tasks"].clear()
        document[1]()
        with pytest.raises(ValueError, match=r"tasks\.json lists no tasks"):
            load_tasks(folder)
        for wrong in ("[]", '{"tasks": 3}', '{"tasks": ["a"]}', "{", '{"annotations": 3}', "[" * 100_000):
            (folder / "tasks.json").write_text(wrong)
            with pytest.raises(ValueError, match=r"needs a tasks\.json of the form"):
                load_tasks(folder)
        (folder / "tasks.json").unlink()
        with pytest.raises(ValueError, match=r"needs a tasks\.json of the form"):
            load_tasks(folder)


class TestDetectionFolder:
    def test_tasks_share_the_pictures_and_keep_their_own_words(self, folder, monkeypatch):
        monkeypatch.chdir(folder.parent)
        sofa, dog = load_detection_tasks("tasks")  # files are looked for in the folder, not in the working directory
        assert (sofa.name, sofa.label, sofa.prompt) == ("sofa", "couch", "<OD>")
        assert sofa.descriptions == ["detect sofas", "detect couches"] and sofa.unseen_descriptions == ["where can I sit?"]
        assert (dog.name, dog.label, dog.descriptions, dog.unseen_descriptions) == ("dog", "dog", ["detect dogs"], [])
        for task in (sofa, dog):
            for read, written in ((task.train_images, TRAIN), (task.test_images, TEST)):
                assert [(one.boxes, one.labels, one.load().tobytes()) for one in read] == [
                    (one.boxes, one.labels, one.load().tobytes()) for one in written
                ]

    @pytest.mark.parametrize("split", ["train", "test"])
    def test_a_split_may_be_null(self, folder, document, split):
        document[0][split] = None
        document[1]()
        task = load_detection_tasks(folder)[0]
        assert (len(task.train_images), len(task.test_images)) == ((0, 1) if split == "train" else (2, 0))

    def test_no_file(self, tmp_path):
        with pytest.raises(ValueError, match=r'needs a tasks\.json of the form \{"train": .*FileNotFoundError'):
            load_detection_tasks(tmp_path)

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (lambda content: content.pop("test"), r"tasks needs a tasks\.json of the form .*test is 'missing'"),
            (lambda content: content.pop("tasks"), r"tasks needs a tasks\.json of the form .*tasks is None"),
            (lambda content: content["tasks"].append("cat"), r"tasks needs a tasks\.json of the form .*tasks is \["),
            (lambda content: content["train"].pop("images"), r"tasks needs a tasks\.json of the form .*train is \{'annotations"),
            (lambda content: content.update(train="train.json"), r"tasks needs a tasks\.json of the form .*train is 'train\.json'"),
            (lambda content: content["train"].update(annotations=3), r"tasks\.json: annotations of train must be the name of a file"),
            (lambda content: content["train"].update(images="../x"), r"tasks\.json: images of train must name something inside"),
            (lambda content: content["tasks"][1].pop("label"), r"tasks\.json: tasks\[1\] has no 'label'"),
            (lambda content: content["tasks"][1].update(label=None), r"tasks\.json: tasks\[1\]: label of task 'dog' must be .*None"),
            (lambda content: content["tasks"][1].update(label=["dog"]), r"tasks\[1\]: label of task 'dog' must be a non-empty string"),
            (lambda content: content["tasks"][1].update(name=7), r"tasks\.json: tasks\[1\]: The task name '7' must be"),
            (lambda content: content["tasks"][1].update(name="../.."), r"tasks\.json: tasks\[1\]: The task name '\.\./\.\.' must be"),
            (lambda content: content["tasks"][1].update(name="sofa"), r"tasks\[1\]: a second task is named 'sofa'"),
            (lambda content: content["tasks"][1].update(descriptions=None), r"tasks\[1\]: descriptions of task 'dog' must be a list"),
            (lambda content: content["tasks"][1].update(descriptions=["a", 3]), r"descriptions of task 'dog' must be a list .*found 3"),
            (lambda content: content["tasks"][1].update(descriptions={"a": 1}), r"descriptions of task 'dog' must be a list"),
            (lambda content: content["tasks"][1].update(unseen_descriptions=[" "]), r"unseen_descriptions of task 'dog' must be a list"),
        ],
    )
    def test_a_malformed_file_is_named_with_what_is_wrong(self, folder, document, change, reason):
        change(document[0])
        document[1]()
        with pytest.raises(ValueError, match=reason) as raised:
            load_tasks(folder) if "train" in document[0] and "test" in document[0] else load_detection_tasks(folder)
        assert "\n" not in str(raised.value)

    def test_one_sentence_is_a_list_of_one(self, folder, document):
        document[0]["tasks"][1].update(descriptions="detect dogs", unseen_descriptions="find each puppy")
        document[1]()
        dog = load_tasks(folder)[1]
        assert (dog.descriptions, dog.unseen_descriptions) == (["detect dogs"], ["find each puppy"])

    def test_pictures_may_lie_beside_the_file_or_anywhere_by_an_absolute_path(self, folder, document):
        content, save = document
        content["train"].update(annotations=str(folder / "train.json"), images=str(folder / "train"))
        content["test"] = {"annotations": "beside.json", "images": "."}
        (folder / "test" / "0.png").rename(folder / "0.png")
        (folder / "test.json").rename(folder / "beside.json")
        save()
        assert [(len(task.train_images), len(task.test_images)) for task in load_tasks(folder)] == [(2, 1), (2, 1)]

    def test_a_cut_short_file(self, folder):
        content = (folder / "tasks.json").read_text()
        (folder / "tasks.json").write_text(content[: len(content) // 2])
        with pytest.raises(ValueError, match=r"needs a tasks\.json of the form .*JSONDecodeError"):
            load_tasks(folder)

    def test_annotations_that_are_not_there(self, folder):
        (folder / "test.json").unlink()
        with pytest.raises(ValueError, match=r"test\.json is no COCO instances file.*FileNotFoundError"):
            load_detection_tasks(folder)

    def test_pictures_that_are_not_there(self, folder):
        (folder / "train" / "1.png").unlink()
        with pytest.raises(ValueError, match=r"1 of the 2 images of .*train\.json are not in .*train, the first is 1\.png"):
            load_detection_tasks(folder)


class TestCrops:
    def test_a_margin_of_the_longer_side_clipped_at_the_border(self):
        scene = annotated(((40, 10, 60, 20), "couch"), ((0, 0, 10, 30), "couch"), ((76, 36, 80, 40), "couch"))
        inside, corner, opposite = crops([scene], "couch", margin=0.2)
        full = scene.load()
        for crop, place in ((inside, (36, 6, 64, 24)), (corner, (0, 0, 16, 36)), (opposite, (75, 35, 80, 40))):
            assert crop.size == (place[2] - place[0], place[3] - place[1]) and crop.tobytes() == full.crop(place).tobytes()
        assert [crop.size for crop in crops([scene], "couch", margin=0)] == [(20, 10), (10, 30), (4, 4)]
        assert [crop.size for crop in crops([scene], "couch")] == [(26, 16), (14, 34), (5, 5)]

    def test_objects_of_one_class_in_the_order_of_the_pictures(self):
        scenes = [*TRAIN, annotated(), *TEST]
        assert [crop.size for crop in crops(scenes, "couch", margin=0)] == [(20, 20), (40, 40)]
        assert [crop.size for crop in crops(scenes, "dog", margin=0)] == [(8, 8), (16, 16)]
        assert crops(scenes, "zebra") == []

    @pytest.mark.parametrize(("count", "expected"), [(0, 0), (1, 1), (2, 2), (9, 2), (None, 2)])
    def test_so_many_at_the_most_and_no_picture_opened_beyond(self, tmp_path, count, expected):
        unreadable = [AnnotatedImage(str(tmp_path / "gone.png"), [[0, 0, 4, 4]], ["dog"])] if count in (0, 1, 2) else []
        assert len(crops([*TRAIN, *unreadable], "dog", count)) == expected

    def test_a_box_without_height_is_a_pixel_high(self):
        assert crops([AnnotatedImage(Image.new("RGB", (80, 40)), [[10, 40, 25, 40]], ["dog"])], "dog", margin=0)[0].size == (15, 1)

    def test_a_grey_picture_is_cut_in_rgb(self):
        (crop,) = crops([AnnotatedImage(Image.new("L", (30, 30), 7), [[0, 0, 4, 4]], ["dog"])], "dog")
        assert crop.mode == "RGB" and crop.getpixel((0, 0)) == (7, 7, 7)
