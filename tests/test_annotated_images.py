"""Annotated pictures: files as photos and scanners make them, data as the Hub and COCO have it, and what is wrong with them."""

import json
import math
import pickle
import subprocess
import sys

import datasets
import numpy as np
import PIL.Image
import PIL.ImageStat
import pytest
from test_detection import IMAGES, picture, task

from peft_icm.tasks.annotated_images import AnnotatedImage, crops, from_dataset, load_coco


@pytest.fixture
def coco(tmp_path):
    """(document, save): a COCO file of two images, one of them in a sub-folder."""
    (tmp_path / "val").mkdir()
    picture().save(tmp_path / "a.jpg")
    picture(size=(30, 20)).save(tmp_path / "val" / "b.png")
    document = {
        "info": {"year": 2017},
        "images": [
            {"id": 7, "file_name": "a.jpg", "width": 80, "height": 40},
            {"id": 9, "file_name": "val/b.png", "width": 30, "height": 20},
        ],
        "categories": [{"id": 63, "name": "couch", "supercategory": "furniture"}, {"id": 18, "name": "dog"}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 63, "bbox": [10, 5.5, 20, 10], "iscrowd": 0, "area": 150, "segmentation": []},
            {"id": 2, "image_id": 7, "category_id": 18, "bbox": [0, 0, 5, 5], "iscrowd": 1, "area": 20},
            {"id": 3, "image_id": 7, "category_id": 18, "bbox": [70, 30, 10, 10], "iscrowd": 0, "area": 80},
        ],
    }

    def save():
        (tmp_path / "instances.json").write_text(json.dumps(document))
        return tmp_path / "instances.json", tmp_path

    return document, save


class TestAnnotatedImage:
    def test_a_file_and_a_picture_load_as_rgb(self, tmp_path):
        PIL.Image.new("L", (30, 20), 7).save(tmp_path / "grey.png")
        for image in (str(tmp_path / "grey.png"), PIL.Image.open(tmp_path / "grey.png")):
            annotated_image = AnnotatedImage(image)
            assert annotated_image.size == (30, 20) and annotated_image.load().getpixel((0, 0)) == (7, 7, 7)

    @pytest.mark.parametrize("ending", ["png", "jpg"])
    def test_what_is_no_picture_is_named(self, tmp_path, ending):
        file = tmp_path / f"broken.{ending}"
        PIL.Image.effect_noise((64, 64), 50).save(file)
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        with pytest.raises(ValueError, match=rf"broken\.{ending} is no picture"):
            AnnotatedImage(str(file)).load()
        file.write_text("a text")
        with pytest.raises(ValueError, match=rf"broken\.{ending} is no picture"):
            _ = AnnotatedImage(str(file)).size

    def test_a_photo_is_as_viewers_show_it_and_of_sixteen_bits_it_is_not_clipped(self, tmp_path):
        exif = PIL.Image.Exif()
        exif[0x0112] = 6
        PIL.Image.new("RGB", (30, 20)).save(tmp_path / "turned.jpg", exif=exif)
        turned = AnnotatedImage(str(tmp_path / "turned.jpg"))
        assert turned.size == turned.load().size == (20, 30)
        PIL.Image.fromarray(np.linspace(0, 2**16 - 1, 900).reshape(30, 30).astype(np.uint16)).save(tmp_path / "deep.png")
        assert 100 < sum(PIL.ImageStat.Stat(AnnotatedImage(str(tmp_path / "deep.png")).load()).mean) / 3 < 155

    @pytest.mark.parametrize(
        ("boxes", "labels", "message"),
        [
            ([[0, 0, 4, 4]] * 3, "cat", "has 3 boxes and 1 labels"),
            ([0, 0, 4, 4], ["cat"], "boxes must be lists of four numbers"),
            ([[0, 0, 4]], ["cat"], "boxes must be lists of four numbers"),
            ([[4, 0, 0, 4]], ["cat"], "boxes must be lists of four numbers"),
            ([[0, 0, 4, math.nan]], ["cat"], "boxes must be lists of four numbers"),
            (None, ["cat"], "boxes must be lists of four numbers"),
            ([[0, 0, 4, 4]], [3], "labels must be a list of non-empty strings; found 3"),
        ],
    )
    def test_boxes_and_labels_that_do_not_fit_are_refused(self, boxes, labels, message):
        with pytest.raises(ValueError, match=rf"a\.png:? {message}"):
            AnnotatedImage("a.png", boxes, labels)
        assert AnnotatedImage("a.png", [[0, 0, 4, 4]], "cat").labels == ["cat"]
        for image in (None, 3):
            with pytest.raises(ValueError, match=f"image={image} must be a PIL image or the path"):
                AnnotatedImage(image)

    def test_tasks_can_be_sent_to_workers(self):
        again = pickle.loads(pickle.dumps(task()))
        assert again.train_images[0].boxes == IMAGES[0].boxes and again.train_images[0].load().tobytes() == IMAGES[0].load().tobytes()


class TestCoco:
    def test_a_picture_has_one_entry(self, coco):
        document, save = coco
        document["images"].append({**document["images"][0], "id": 99})
        with pytest.raises(ValueError, match="two images with the file_name '.*': give each picture one entry"):
            load_coco(*save())

    def test_boxes_are_xyxy_and_crowds_are_left_out(self, coco):
        first, second = load_coco(*coco[1]())
        assert first.boxes == [[10, 5.5, 30, 15.5], [70, 30, 80, 40]] and first.labels == ["couch", "dog"]
        assert second.boxes == [] and second.load().size == (30, 20)

    @pytest.mark.parametrize(
        ("bbox", "expected"),
        [
            ([-0.5, 0, 20, 40.9], [0, 0, 19.5, 40]),
            ([70.03, 3, 10.4, 5], [70.03, 3, 80, 8]),
            ([9.98, 18.56, 15.52, 0.0], [9.98, 18.56, 25.5, 18.56]),
        ],
    )
    def test_rounding_as_in_real_coco_is_clipped(self, coco, bbox, expected):
        document, save = coco
        document["annotations"][0]["bbox"] = bbox
        assert load_coco(*save())[0].boxes[0] == pytest.approx(expected)

    @pytest.mark.parametrize(
        "bbox", [[10, 5, 0, 0], [10, 5, -3, 5], [70, 30, 12, 5], [-2, 0, 10, 10], [200, 5, 10, 10], [math.nan, 0, 5, 5]]
    )
    def test_a_box_that_is_empty_or_outside_is_named_with_its_image(self, coco, bbox):
        document, save = coco
        document["annotations"][0]["bbox"] = bbox
        with pytest.raises(ValueError, match=r"\.json: a\.jpg: the box \[.*is empty or outside its image of 80 x 40 pixels"):
            load_coco(*save())

    @pytest.mark.parametrize("content", [None, "{", "[]", '{"images": []}', '{"images": [], "categories": [], "annotations": [{"id": 1}]}'])
    def test_what_is_no_coco_file_is_named(self, tmp_path, content):
        if content is not None:
            (tmp_path / "captions.json").write_text(content)
        with pytest.raises(ValueError, match=r"captions\.json is no COCO instances file"):
            load_coco(tmp_path / "captions.json", tmp_path)

    def test_missing_images_are_counted(self, coco):
        document, save = coco
        document["images"].append({"id": 10, "file_name": "c.jpg", "width": 1, "height": 1})
        annotations, folder = save()
        (folder / "a.jpg").unlink()
        with pytest.raises(ValueError, match=r"2 of the 3 images of .*instances\.json are not in .*, the first is a\.jpg"):
            load_coco(annotations, folder)

    @pytest.mark.parametrize("key", ["images", "annotations", "categories"])
    def test_files_joined_without_new_ids_are_refused(self, coco, key):
        document, save = coco
        document[key][1]["id"] = document[key][0]["id"]
        with pytest.raises(ValueError, match=rf"instances\.json .*two of its {key} have the id"):
            load_coco(*save())

    @pytest.mark.parametrize(
        ("key", "change"),
        [
            ("images", {"id": None}),
            ("images", {"id": [7]}),
            ("images", {"id": True}),
            ("images", {"file_name": None}),
            ("images", {"width": None}),
            ("images", {"width": "80"}),
            ("images", {"height": math.inf}),
            ("categories", {"name": None}),
            ("categories", {"name": 7}),
            ("categories", {"name": " "}),
            ("annotations", {"id": [1]}),
            ("annotations", {"image_id": {}}),
            ("annotations", {"category_id": [63]}),
            ("annotations", {"bbox": None}),
            ("annotations", {"bbox": []}),
            ("annotations", {"bbox": [1, 2, 3, 4, 5]}),
            ("annotations", {"bbox": ["1", "2", "3", "4"]}),
            ("annotations", {"bbox": [True, 2, 3, 4]}),
            ("annotations", {"bbox": {"x": 1}}),
            ("annotations", {"bbox": [10**400, 1.5, 3, 4]}),
            ("annotations", {"iscrowd": "0"}),
            ("annotations", {"iscrowd": 2}),
        ],
    )
    def test_a_value_of_another_type_is_named_with_its_place(self, coco, key, change):
        document, save = coco
        document[key][0].update(change)
        (field,) = change
        with pytest.raises(
            ValueError, match=rf"instances\.json is no COCO instances file: {field} of {key}\[0\] must be .*; found"
        ) as raised:
            load_coco(*save())
        assert "\n" not in str(raised.value)

    def test_a_number_as_a_string_is_another_id(self, coco):
        document, save = coco
        document["annotations"][0]["image_id"] = "7"
        with pytest.raises(ValueError, match="an annotation of image_id '7', which the file does not define"):
            load_coco(*save())

    @pytest.mark.parametrize("name", ["../a.jpg", "/etc/hostname", ".", "val/../../a.jpg", "a\0.jpg"])
    def test_pictures_outside_the_folder_are_not_read(self, coco, name):
        document, save = coco
        document["images"][0]["file_name"] = name
        annotations, folder = save()
        picture().save(folder.parent / "a.jpg")
        with pytest.raises(ValueError, match=r"instances\.json: each file_name must be that of a file inside"):
            load_coco(annotations, folder)

    def test_a_size_that_is_not_the_files_is_refused(self, coco):
        document, save = coco
        document["images"][0].update(width=160, height=80)
        with pytest.raises(ValueError, match=r"instances\.json: a\.jpg is said to have 160 x 80 pixels, but is shown with 80 x 40"):
            load_coco(*save())

    def test_boxes_are_of_the_picture_as_it_is_shown(self, coco):
        document, save = coco
        annotations, folder = save()
        exif = PIL.Image.Exif()
        exif[0x0112] = 8
        picture([(0, 0, 5, 40)], ["dog"]).save(folder / "a.jpg", exif=exif)
        with pytest.raises(ValueError, match="said to have 80 x 40 pixels, but is shown with 40 x 80.*EXIF"):
            load_coco(annotations, folder)
        document["images"][0].update(width=40, height=80)
        document["annotations"] = [{"image_id": 7, "category_id": 18, "bbox": [0, 75, 40, 5]}]
        (dog,) = crops(load_coco(*save()), "dog", margin=0)
        assert dog.size == (40, 5) and dog.getpixel((20, 2))[2] > 200 > dog.getpixel((20, 2))[0]

    def test_a_bomb_is_refused_in_one_line(self, coco, monkeypatch):
        monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 100)
        with pytest.raises(ValueError, match=r"a\.jpg is too large a picture"):
            load_coco(*coco[1]())

    @pytest.mark.parametrize("key", ["image_id", "category_id"])
    def test_unknown_ids_are_named(self, coco, key):
        document, save = coco
        document["annotations"][2][key] = 1000
        with pytest.raises(ValueError, match=f"an annotation of {key} 1000, which the file does not define"):
            load_coco(*save())


class TestHubDataset:
    def dataset(self, category, values):
        features = {
            "image": datasets.Image(),
            "objects": {
                "bbox": datasets.Sequence(datasets.Sequence(datasets.Value("float32"), length=4)),
                "category": datasets.Sequence(category),
            },
        }
        rows = {"image": [picture(), picture()], "objects": [{"bbox": [[10, 5, 20, 10]], "category": values}, {"bbox": [], "category": []}]}
        return datasets.Dataset.from_dict(rows, features=datasets.Features(features))

    @pytest.mark.parametrize(
        ("category", "value"),
        [(datasets.ClassLabel(names=["dog", "couch"]), 1), (datasets.Value("string"), "couch")],
        ids=["ClassLabel", "string"],
    )
    def test_the_usual_columns(self, category, value):
        first, second = from_dataset(self.dataset(category, [value]))
        assert first.boxes == [[10, 5, 30, 15]] and first.labels == ["couch"] and first.load().size == (80, 40)
        assert second.boxes == [] and second.labels == []

    @pytest.mark.parametrize(
        ("bbox", "category", "message"),
        [
            (None, None, "image 0 must be a picture with lists of bbox"),
            ([None], [1], "image 0 must be a picture with lists of bbox"),
            ([[1, 2, 3]], [1], "image 0 must be a picture with lists of bbox"),
            ([[1, 2, 3, 4]], [], "image 0 has 1 boxes and 0 categories"),
            ([[1, 2, 3, 4]], [None], r"image 0 has the categories \[None\]"),
            ([[1, 2, 3, 4]], [-1], r"image 0 has the categories \[-1\]"),
            ([[1, 2, -3, 4]], [1], "image 0: the box .* is empty or outside"),
        ],
    )
    def test_rows_without_values_are_named(self, bbox, category, message):
        objects = {
            "bbox": datasets.Sequence(datasets.Sequence(datasets.Value("float32"))),
            "category": datasets.Sequence(datasets.ClassLabel(names=["dog", "couch"])),
        }
        rows = {"image": [picture()], "objects": [{"bbox": bbox, "category": category}]}
        features = datasets.Features({"image": datasets.Image(), "objects": objects})
        with pytest.raises(ValueError, match=message):
            from_dataset(datasets.Dataset.from_dict(rows, features=features))

    def test_sizes_and_ids_that_the_rows_name_are_checked(self):
        plain = self.dataset(datasets.Value("string"), ["couch"])
        sized = plain.add_column("width", [80, 80]).add_column("height", [40, 40]).add_column("image_id", [1, 2])
        assert [image.labels for image in from_dataset(sized)] == [["couch"], []]
        with pytest.raises(ValueError, match="image 0 is said to have 40 x 80 pixels"):
            from_dataset(sized.rename_columns({"width": "height", "height": "width"}))
        with pytest.raises(ValueError, match="image 1: a second row has the image_id 7"):
            from_dataset(plain.add_column("image_id", [7, 7]))

    def test_other_columns_and_numbers_without_names_are_refused(self):
        unnamed = self.dataset(datasets.Value("int64"), [1])
        splits = datasets.DatasetDict({"train": unnamed})
        for wrong in (unnamed, unnamed.remove_columns("objects"), unnamed.rename_column("image", "img"), splits):
            with pytest.raises(ValueError, match="needs the columns image and objects"):
                from_dataset(wrong)


def test_what_few_need_is_imported_where_it_is_used():
    code = (
        "import sys, peft_icm.tasks, peft_icm.tasks.average_precision;"
        "print({'datasets', 'pycocotools', 'sklearn', 'matplotlib'} & sys.modules.keys())"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "set()"
