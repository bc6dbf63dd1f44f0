"""Detection data as people have it - COCO, YOLO, Roboflow's JSON lines, data sets of the Hub - and the folder of tasks that it becomes."""

import json
import shutil
from pathlib import Path

import datasets
import pytest
from command_line import run
from PIL import Image

from peft_icm.data_import import yolo_tasks
from peft_icm.tasks import load_tasks
from peft_icm.tasks.annotated_images import AnnotatedImage
from peft_icm.tasks.splits import divide
from peft_icm.tasks.yolo import load_yolo

SIZE = (80, 40)
BOXES = {"a": [[8, 4, 40, 24]], "b": [[8, 4, 40, 24], [40, 0, 80, 40]], "c": []}  # of each picture: a sofa, then a stop sign
LABELS = ["sofa", "stop_sign"]
YOLO = {"a": "0 0.3 0.35 0.4 0.5\n", "b": "0 0.3 0.35 0.4 0.5\n\n1 0.5 0 1 0 1 1 0.5 1\n"}  # the second as a polygon


def picture(file, size=SIZE, **kwargs):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "green").save(file, **kwargs)
    return file


@pytest.fixture
def yolo(tmp_path):
    """A folder of two splits with the same three scenes each."""
    root = tmp_path / "yolo"
    for split in ("train", "val"):
        for name in BOXES:
            picture(root / "images" / split / f"{name}.jpg")
        (root / "labels" / split).mkdir(parents=True)
        for name, lines in YOLO.items():
            (root / "labels" / split / f"{name}.txt").write_text(lines)
    (root / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [sofa, stop_sign]\n")
    return root


def imported(tmp_path, source, form, *options):
    assert run("tasks", source, "--from", form, "-o", tmp_path / "tasks", *options, "--json") == 0
    return load_tasks(tmp_path / "tasks")


def check(tasks, pictures=None):
    """Two tasks on the scenes of BOXES, in both splits; with `pictures`, their folder."""
    assert [(task.name, task.label) for task in tasks] == [("sofa", "sofa"), ("stop_sign", "stop_sign")]
    for images in (tasks[0].train_images, tasks[0].test_images):
        assert [image.labels for image in images] == [LABELS[: len(boxes)] for boxes in BOXES.values()]
        assert [image.boxes for image in images] == [[pytest.approx(box, abs=0.1) for box in boxes] for boxes in BOXES.values()]
        assert pictures is None or all(str(image.image).startswith(str(pictures)) for image in images)


def refused(tmp_path, capsys, source, form, *options):
    """The one line, and nothing written."""
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    assert run("tasks", source, "--from", form, "-o", tmp_path / "tasks", *options) == 2
    assert sorted(tmp_path.rglob("*")) == before
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("peft-icm: error")]
    return line


class TestYolo:
    def test_boxes_and_polygons_of_a_folder(self, yolo, tmp_path):
        check(imported(tmp_path, yolo, "yolo"), yolo)
        assert sorted(file.name for file in (tmp_path / "tasks").iterdir()) == ["tasks.json", "test.json", "train.json"]

    @pytest.mark.parametrize(
        "text",
        [
            "path: .\ntrain: images/train\nval: images/val\ntest: images/nowhere\nnames: {0: sofa, 1: stop_sign}",
            "path: /kaggle/working\ntrain: [images/train]\nvalid: ../images/val\nnc: 2\nnames:\n- sofa\n- stop_sign",
            "train: train.txt\nval: images/val\nnames: [sofa, stop_sign]",
        ],
    )
    def test_forms_of_the_yaml(self, yolo, tmp_path, text):
        (yolo / "train.txt").write_text(f"./images/train/a.jpg\n{yolo}/images/train/b.jpg\n\nimages/train/c.jpg\n")
        (yolo / "data.yaml").rename(yolo / "mine.yaml")
        (yolo / "mine.yaml").write_text(text)
        check(imported(tmp_path, yolo / "mine.yaml", "yolo"))

    def test_labels_beside_pictures_and_links_to_pictures(self, yolo, tmp_path):
        for name in BOXES:
            (yolo / "images" / "val" / f"{name}.jpg").rename(tmp_path / f"{name}-elsewhere.jpg")
            (yolo / "images" / "val" / f"{name}.jpg").symlink_to(tmp_path / f"{name}-elsewhere.jpg")
        (yolo / "beside").mkdir()
        for file in [*(yolo / "images" / "train").iterdir(), *(yolo / "labels" / "train").iterdir()]:
            file.rename(yolo / "beside" / file.name)
        (yolo / "data.yaml").write_text("train: beside\nval: images/val\nnames: [sofa, stop_sign]\n")
        check(imported(tmp_path, yolo, "yolo"))

    def test_a_turned_photo_has_the_boxes_that_a_viewer_shows(self, yolo, tmp_path):
        exif = Image.Exif()
        exif[0x0112] = 6
        for split in ("train", "val"):
            picture(yolo / "images" / split / "a.jpg", size=SIZE[::-1], exif=exif)
        check(imported(tmp_path, yolo, "yolo"))

    @pytest.mark.parametrize(
        ("line", "reason"),
        [
            ("2 0.5 0.5 0.1 0.1", "the class 2 is none of names, 0 to 1"),
            ("-1 0.5 0.5 0.1 0.1", "the class -1 is none of names, 0 to 1"),
            ("0.5 0.5 0.5 0.1 0.1", "the class 0.5 is none of names"),
            ("nan 0.5 0.5 0.1 0.1", "the class nan is none of names"),
            ("0 40 20 8 8", "must hold shares of the picture's width and height, between 0 and 1, not pixels"),
            ("0 0.5 0.5 nan 0.1", "between 0 and 1"),
            ("0 0.5 0.5 0 0", "is empty or outside its image"),
            ("sofa 0.5 0.5 0.1 0.1", "'sofa 0.5 0.5 0.1 0.1' must be numbers: class x y width height, or class x1 y1"),
            ("0 0.5 0.5 0.1", "has 4 numbers; it must be class x y width height"),
            ("0 0.5 0.5 0.1 0.1 0.9", "has 6 numbers"),
            ("0,0.5,0.5,0.1,0.1", "must be numbers"),
        ],
    )
    def test_a_broken_line_is_named_with_its_number(self, yolo, tmp_path, capsys, line, reason):
        (yolo / "labels" / "val" / "b.txt").write_text(f"0 0.5 0.5 0.1 0.1\n\n{line}\n")
        said = refused(tmp_path, capsys, yolo, "yolo")
        assert f"{yolo}/labels/val/b.txt, line 3: " in said and reason in said

    def test_boxes_over_the_edge_are_clipped_and_links_followed(self, yolo, tmp_path):
        """As ultralytics does; shares are rounded, to above 1 too."""
        (yolo / "labels" / "val" / "b.txt").write_text("0 0.9 0.5 0.4 0.5\n0 0.1 0.1 1.0000001 0.1 0.6 0.9\n")
        (tmp_path / "elsewhere").mkdir()
        shutil.copy(yolo / "images" / "val" / "b.jpg", tmp_path / "elsewhere" / "linked.jpg")
        (yolo / "images" / "val" / "more").symlink_to(tmp_path / "elsewhere")
        found = {Path(image.image).name: image.boxes for image in load_yolo(yolo).test}
        assert [[round(value, 3) for value in box] for box in found["b.jpg"]] == [[56, 10, 80, 30], [8, 4, 80, 36]] and found[
            "linked.jpg"
        ] == []

    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            ("train: images/train", "has no names: list the classes"),
            ("train: images/train\nnames: []", "has no names"),
            ("train: images/train\nnames: sofa", "has no names"),
            ("train: images/train\nnames: [sofa, no]", "found 1: False. Put a word such as no in quotes"),
            ("train: images/train\nnames: {zero: sofa}", "names must be words by whole numbers; found 'zero'"),
            ("train: images/train\nnames: [sofa, sofa]", "names has a class twice"),
            ("train: images/train\nnc: 3\nnames: [sofa, dog]", "nc is 3, but names has 2 classes"),
            ("- train", "must be a mapping with train, val and names; it holds ['train']"),
            ("names: [sofa", "is no YAML file of a data set (while parsing"),
            ("a: !!python/object/apply:os.system [touch pwned]", "could not determine a constructor"),
            ("names: [sofa]", "has the splits (none): it needs train, and one of val"),
            ("val: images/val\ntest: images/val\nnames: [sofa]", "has the splits val, test: it needs train"),
            (
                "train: images/gone\nnames: [sofa]",
                "train must name a folder of pictures or a .txt file that lists them; found 'images/gone'",
            ),
            ("train: labels\nnames: [sofa]", "train names no pictures (.jpg, "),
            ("train: [3]\nnames: [sofa]", "found 3"),
            ("train: gone.txt\nnames: [sofa, dog]", "gone.txt, line 2: images/d.jpg is not there"),
            ("train: images/train\nkpt_shape: [17, 3]\nnames: [sofa]", "is of poses (kpt_shape)"),
        ],
    )
    def test_a_wrong_yaml(self, yolo, tmp_path, capsys, text, reason):
        (yolo / "gone.txt").write_text("images/train/a.jpg\nimages/d.jpg\n")
        (yolo / "data.yaml").write_text(text)
        assert reason in refused(tmp_path, capsys, yolo, "yolo")

    def test_no_yaml_and_no_labels(self, yolo, tmp_path, capsys):
        (yolo / "labels").rename(yolo / "txt")
        assert (
            f"none of its 3 pictures has a file of boxes; that of {yolo}/images/train/a.jpg would be {yolo}/labels/train/a.txt"
            in refused(tmp_path, capsys, yolo, "yolo")
        )
        (yolo / "data.yaml").unlink()
        assert "data.yaml is no YAML file of a data set" in refused(tmp_path, capsys, yolo, "yolo")

    def test_a_broken_picture(self, yolo, tmp_path, capsys):
        file = yolo / "images" / "val" / "c.jpg"
        Image.effect_noise((64, 64), 50).save(file)
        file.write_bytes(file.read_bytes()[:1500])  # its size can be read, its pixels cannot
        assert f"{file} is no picture that can be opened" in refused(tmp_path, capsys, yolo, "yolo")
        file.write_text("a text")
        assert f"{file} is no picture that can be opened" in refused(tmp_path, capsys, yolo, "yolo")


def coco(file, pictures, root, prefix=""):
    """A COCO file of the scenes, and their pictures."""
    images, annotations = [], []
    for number, (name, boxes) in enumerate(BOXES.items()):
        picture(root / pictures / f"{name}.jpg")
        images.append({"id": number, "file_name": f"{prefix}{name}.jpg", "width": SIZE[0], "height": SIZE[1]})
        for category, (x1, y1, x2, y2) in enumerate(boxes):
            bbox = [x1, y1, x2 - x1, y2 - y1]
            annotations.append({"id": len(annotations), "image_id": number, "category_id": category, "bbox": bbox})
    categories = [{"id": number, "name": name} for number, name in enumerate([*LABELS, "bed"])]
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    (root / file).write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))


class TestCoco:
    @pytest.mark.parametrize(
        ("train", "val"),
        [
            (("annotations/instances_train2017.json", "train2017"), ("annotations/instances_val2017.json", "val2017")),
            (("annotations/train.json", "images/train"), ("annotations/val.json", "images/val")),
            (("train/_annotations.coco.json", "train"), ("valid/_annotations.coco.json", "valid")),
            (("train.json", "images"), ("test.json", "images/test", "test/")),
            (("TRAIN.json", "."), ("dev.json", "dev")),
        ],
    )
    def test_layouts(self, tmp_path, train, val):
        coco(*train[:2], tmp_path / "coco", *train[2:])
        coco(*val[:2], tmp_path / "coco", *val[2:])
        for other in ("captions_train2017.json", "image_info_test2017.json"):
            if (tmp_path / "coco" / "annotations" / "instances_train2017.json").exists():
                (tmp_path / "coco" / "annotations" / other).write_text("{}")
        check(imported(tmp_path, tmp_path / "coco", "coco"), tmp_path / "coco")

    def test_a_single_file_is_divided_and_a_class_that_no_picture_has_is_told(self, tmp_path, capsys):
        coco("all.json", ".", tmp_path / "coco")
        (one,) = imported(tmp_path, tmp_path / "coco" / "all.json", "coco")
        assert one.name == "sofa" and [len(one.train_images), len(one.test_images)] == [2, 1]
        assert "left out: stop_sign (1 to train on, 0 to test on), bed (0 to train on, 0 to test on)" in capsys.readouterr().err

    def test_wrong_folders(self, tmp_path, capsys):
        (tmp_path / "coco").mkdir()
        assert "holds none of annotations/instances_*.json" in refused(tmp_path, capsys, tmp_path / "coco", "coco")
        assert "gone.json is no COCO instances file" in refused(tmp_path, capsys, tmp_path / "gone.json", "coco")
        coco("train.json", "train", tmp_path / "coco")
        coco("my_train.json", "train", tmp_path / "coco")
        assert "are both of train: leave one of them" in refused(tmp_path, capsys, tmp_path / "coco", "coco")
        (tmp_path / "coco" / "my_train.json").rename(tmp_path / "coco" / "val.json")
        (tmp_path / "coco" / "train").rename(tmp_path / "coco" / "pictures")
        assert "train.json: its first picture, a.jpg, is in none of" in refused(tmp_path, capsys, tmp_path / "coco", "coco")
        assert "data in 'coco'" not in refused(tmp_path, capsys, tmp_path / "coco" / "train.json", "coco")


def florence(file, **changes):
    """The scenes in Roboflow's lines, and their pictures."""
    bins = {
        name: [[round(value / size * 1000) for value, size in zip(box, 2 * SIZE, strict=True)] for box in boxes]
        for name, boxes in BOXES.items()
    }
    rows = []
    for name, boxes in bins.items():
        picture(file.parent / f"{name}.jpg")
        objects = ["".join([label, *(f"<loc_{min(number, 999)}>" for number in box)]) for label, box in zip(LABELS, boxes, strict=False)]
        rows.append({"image": f"{name}.jpg", "prefix": "<OD>", "suffix": "".join(objects)})
    rows[1] |= changes
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")


class TestRoboflow:
    def test_its_folder(self, tmp_path):
        for split in ("train", "valid"):
            florence(tmp_path / "florence" / split / "annotations.jsonl")
        check(imported(tmp_path, tmp_path / "florence", "roboflow"), tmp_path / "florence")

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"suffix": "dog<loc_1><loc_2><loc_3>"}, "'dog<loc_1><loc_2><loc_3>' is no name with four locations"),
            ({"suffix": "<loc_1><loc_2><loc_3><loc_4>"}, "is no name with four locations"),
            ({"suffix": "dog<loc_1><loc_2><loc_3><loc_1000>"}, "from <loc_0> to <loc_999>"),
            ({"suffix": "<loc0012><loc0013><loc0014><loc0015> dog"}, "is no name with four locations"),
            ({"suffix": "dog<loc_9><loc_2><loc_3><loc_4>"}, "'dog' has swapped corners: 9, 2, 3, 4"),
            ({"prefix": "<CAPTION>"}, "prefix is '<CAPTION>', only <OD> is read"),
            ({"suffix": None}, '"suffix": null'),
            ({"image": "a.jpg"}, "a.jpg has a line before"),
            ({"image": "../a.jpg"}, "leads out of"),
            ({"image": "gone.jpg"}, "gone.jpg is no picture that can be opened"),
        ],
    )
    def test_a_broken_line_is_named_with_its_number(self, tmp_path, capsys, changes, reason):
        florence(tmp_path / "train.jsonl", **changes)
        said = refused(tmp_path, capsys, tmp_path / "train.jsonl", "roboflow")
        assert 'train.jsonl, line 2 must be of the form {"image"' in said and reason in said

    def test_what_is_no_json(self, tmp_path, capsys):
        florence(tmp_path / "train.jsonl")
        (tmp_path / "train.jsonl").write_text((tmp_path / "train.jsonl").read_text()[:-9])
        assert "train.jsonl, line 3 must be of the form" in refused(tmp_path, capsys, tmp_path / "train.jsonl", "roboflow")
        assert "gone.jsonl is no file of JSON lines" in refused(tmp_path, capsys, tmp_path / "gone.jsonl", "roboflow")

    def test_several_boxes_of_one_name(self, tmp_path):
        florence(tmp_path / "train.jsonl", suffix="sofa" + "<loc_100><loc_100><loc_500><loc_600>" * 2)
        (sofa,) = imported(tmp_path, tmp_path / "train.jsonl", "roboflow")
        assert max(len(image.boxes) for image in sofa.train_images + sofa.test_images) == 2


@pytest.fixture
def rows(tmp_path):
    """The scenes as rows of a data set, their pictures as files."""
    files = [str(picture(tmp_path / "pictures" / f"{name}.jpg")) for name in BOXES]
    objects = [
        {"bbox": [[x1, y1, x2 - x1, y2 - y1] for x1, y1, x2, y2 in boxes], "category": list(range(len(boxes)))} for boxes in BOXES.values()
    ]
    return {"image": files, "objects": objects}


def dataset(rows):
    category = datasets.ClassLabel(names=[*LABELS, "bed"])
    objects = {"bbox": datasets.List(datasets.List(datasets.Value("float32"), length=4)), "category": datasets.List(category)}
    return datasets.Dataset.from_dict(rows, datasets.Features({"image": datasets.Image(), "objects": objects}))


def inside(rows):
    return {"image": [{"bytes": Path(file).read_bytes(), "path": None} for file in rows["image"]]}


class TestHub:
    def test_pictures_inside_parquet_are_written_byte_by_byte(self, rows, tmp_path):
        (tmp_path / "data").mkdir()
        for split in ("train", "validation"):
            dataset(rows | inside(rows)).to_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet")
        check(imported(tmp_path, tmp_path / "data", "hub"), tmp_path / "tasks" / "images")
        written = tmp_path / "tasks" / "images" / "test" / "000001"
        assert written.read_bytes() == (tmp_path / "pictures" / "b.jpg").read_bytes()

    def test_texts(self, tmp_path):
        (tmp_path / "sums").mkdir()
        for split, numbers in (("train", range(20)), ("validation", range(20, 25))):
            rows = [{"id": number, "prompt": f"{number} + 1 =", "completion": f" {number + 1}"} for number in numbers]
            datasets.Dataset.from_list(rows).to_parquet(tmp_path / "sums" / f"{split}.parquet")
        (task,) = imported(tmp_path, tmp_path / "sums", "hub")
        assert (task.name, len(task.train_texts), str(task.test_texts[0])) == ("sums", 20, "20 + 1 = 21")

    def test_pictures_that_are_files_stay_where_they_are(self, rows, tmp_path):
        for split in ("train", "test"):
            names = [{"file_name": f"{name}.jpg"} for name in BOXES]
            for name in BOXES:
                picture(tmp_path / "data" / split / f"{name}.jpg")
            objects = [{**one, "category": [LABELS[number] for number in one["category"]]} for one in rows["objects"]]
            lines = [json.dumps({**name, "objects": one}) for name, one in zip(names, objects, strict=True)]
            (tmp_path / "data" / split / "metadata.jsonl").write_text("\n".join(lines))
        check(imported(tmp_path, tmp_path / "data", "hub"), tmp_path / "data")

    def test_pictures_of_other_folders_are_refused(self, rows, tmp_path, capsys):
        (tmp_path / "data").mkdir()
        dataset(rows).to_parquet(tmp_path / "data" / "train.parquet")
        assert f"names the picture {tmp_path}/pictures/a.jpg, which is no file of it" in refused(tmp_path, capsys, tmp_path / "data", "hub")

    def test_what_cannot_be_loaded(self, rows, tmp_path, capsys):
        rows["objects"][1]["bbox"][0][2] = 900
        (tmp_path / "data").mkdir()
        dataset(rows | inside(rows)).to_parquet(tmp_path / "data" / "train.parquet")
        said = refused(tmp_path, capsys, tmp_path / "data", "hub")
        assert f"{tmp_path}/data, train: image 1: the box" in said and "outside its image" in said
        datasets.Dataset.from_dict({"text": ["a"]}).to_parquet(tmp_path / "data" / "train.parquet")
        assert "Task 'data' has one example" in refused(tmp_path, capsys, tmp_path / "data", "hub")
        datasets.Dataset.from_dict({"label": ["a"]}).to_parquet(tmp_path / "data" / "train.parquet")
        said = refused(tmp_path, capsys, tmp_path / "data", "hub")
        assert "data has the columns label: image and objects are needed, or text, or prompt and completion, or messages" in said
        datasets.Dataset.from_dict({"image": ["a"]}).to_parquet(tmp_path / "data" / "train.parquet")
        assert "needs the columns image and objects" in refused(tmp_path, capsys, tmp_path / "data", "hub")
        datasets.Dataset.from_dict({"prompt": ["a", "b"], "completion": ["a", ""]}).to_parquet(tmp_path / "data" / "train.parquet")
        assert f"{tmp_path}/data, train.parquet, row 2: the completion is empty" in refused(tmp_path, capsys, tmp_path / "data", "hub")
        (tmp_path / "data" / "data.py").write_text(f"open({str(tmp_path / 'pwned')!r}, 'w')")
        assert "is no data set that can be loaded (Dataset scripts are no longer supported" in refused(
            tmp_path, capsys, tmp_path / "data", "hub"
        )
        assert "is no data set that can be loaded" in refused(tmp_path, capsys, tmp_path / "gone", "hub")
        assert not (tmp_path / "pwned").exists()


class TestTasks:
    def test_names_and_sentences(self, yolo, tmp_path):
        (yolo / "data.yaml").write_text('train: images/train\nval: images/val\nnames: ["Arm/Chair", "Tür"]\n')
        chair, door = imported(tmp_path, yolo, "yolo")
        assert (chair.name, chair.label, chair.answer) == ("Arm-Chair", "Arm/Chair", None)
        assert chair.descriptions == ["detect arm/chairs", "detect arm/chair"] and len(chair.unseen_descriptions) == 4
        assert (door.name, door.label, door.answer) == ("Tür", "Tür", "object")

    @pytest.mark.parametrize(
        ("noun", "plural"),
        [
            ("sofa", "sofas"), ("traffic_light", "traffic lights"), ("bus", "buses"), ("couch", "couches"), ("berry", "berries"),
            ("toy", "toys"), ("scissors", "scissors"), ("Safety Vest", "safety vests"), ("RBC", "RBCs"),
            ("class 3", "class 3"), ("glass", "glasses"),
        ],
    )  # fmt: skip
    def test_plurals(self, yolo, tmp_path, noun, plural):
        (yolo / "data.yaml").write_text(f"train: images/train\nval: images/val\nnames: [{noun}, thing]\n")
        assert imported(tmp_path, yolo, "yolo")[0].descriptions[0] == f"detect {plural}"

    @pytest.mark.parametrize(
        ("names", "reason"),
        [
            ("[a/b, a:b]", "The classes 'a/b' and 'a:b' would both be the task 'a-b': rename one"),
            ("[Sofa, sofa]", "would both be the task 'sofa'"),
            ("[.., sofa]", "The class's name '..' must be a plain file name"),
        ],
    )
    def test_names_that_no_task_can_have(self, yolo, tmp_path, capsys, names, reason):
        (yolo / "data.yaml").write_text(f"train: images/train\nval: images/val\nnames: {names}\n")
        assert reason in refused(tmp_path, capsys, yolo, "yolo")

    def test_counts_and_warnings_are_printed(self, yolo, tmp_path, capsys):
        (yolo / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [sofa, stop_sign, bed]\n")
        assert run("tasks", yolo, "--from", "yolo", "-o", tmp_path / "tasks") == 0
        said = capsys.readouterr()
        assert said.out.splitlines() == [
            'sofa: 2 pictures to train on, 2 held out; "detect sofas"',
            'stop_sign: 1 pictures to train on, 1 held out; "detect stop signs"',
        ]
        assert "warning: task 'sofa' has few pictures to train on: 2." in said.err
        assert "warning: classes without pictures to train on or to test on are left out: bed (0 to train on, 0 to test on)." in said.err

    def test_own_sentences(self, yolo, tmp_path, capsys):
        sofa, sign = imported(tmp_path, yolo, "yolo", "--description", "sofa=find seats", "--description", "sofa=detect seats")
        assert sofa.descriptions == ["find seats", "detect seats"] and sign.descriptions[0] == "detect stop signs"
        assert run("tasks", yolo, "--from", "yolo", "-o", tmp_path / "other", "--description", "bed=find beds") == 2
        assert "--description names 'bed': the tasks are sofa, stop_sign." in capsys.readouterr().err

    def test_pictures_in_both_splits(self, yolo, tmp_path, capsys):
        (yolo / "data.yaml").write_text("train: [images/train, images/val]\nval: images/val\nnames: [sofa, stop_sign]\n")
        assert "3 pictures are to be trained on and held out, the first is" in refused(tmp_path, capsys, yolo, "yolo")
        (yolo / "data.yaml").write_text("train: [images/train, images/val]\nval: [images/val, images/train]\nnames: [sofa, stop_sign]\n")
        sofa, _ = imported(tmp_path, yolo, "yolo")  # as in coco128: they are divided
        assert (len(sofa.train_images), len(sofa.test_images)) == (4, 2)

    def test_no_class_in_both_splits(self, yolo, tmp_path, capsys):
        for name in YOLO:
            (yolo / "labels" / "val" / f"{name}.txt").unlink()
        (yolo / "labels" / "val" / "c.txt").touch()
        assert "none of its 2 classes has pictures to train on and pictures to test on" in refused(tmp_path, capsys, yolo, "yolo")


DIVIDED = [
    AnnotatedImage(f"{number}.jpg", [[0, 0, 1, 1]] * len(labels), labels)
    for number, labels in enumerate([["a"]] * 10 + [["b"]] * 3 + [["c"]] * 2 + [["a", "d"]] + [[]] * 5)
]


class TestDivide:
    def test_every_class_is_held_out_and_none_loses_its_last_picture(self):
        train, test = divide(DIVIDED, 0.2, 0)
        assert sorted(image.image for image in [*train, *test]) == sorted(image.image for image in DIVIDED)
        counts = {label: [sum(label in image.labels for image in images) for images in (train, test)] for label in "abcd"}
        assert counts == {"a": [9, 2], "b": [2, 1], "c": [1, 1], "d": [1, 0]} and sum(not image.labels for image in test) == 1

    def test_a_seed_is_a_division(self):
        first, again, other = (divide(DIVIDED, 0.3, seed)[1] for seed in (0, 0, 1))
        assert first == again != other

    @pytest.mark.parametrize("share", [0, 1, -0.1, float("nan")])
    def test_a_share_out_of_range(self, share):
        with pytest.raises(ValueError, match="must be between 0 and 1"):
            divide(DIVIDED, share, 0)


def test_it_is_a_function_too(yolo, tmp_path):
    facts = yolo_tasks(yolo, tmp_path)
    assert facts["tasks"][1] == {"name": "stop_sign", "descriptions": ["detect stop signs", "detect stop sign"], "train": 1, "test": 1}
