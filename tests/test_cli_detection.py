"""The command line on annotated pictures: from a tiny Florence-2 and a folder of scenes to adapters, from words and from pictures."""

import contextlib
import json

import pytest
import torch
from command_line import run
from peft import AutoPeftModel, PeftModel
from PIL import Image
from safetensors.torch import load_file
from test_conditioning import clip
from test_detection import annotated
from test_detection_folder import write_folder
from tiny import florence_processor, florence_reader
from transformers import Florence2ForConditionalGeneration

from peft_icm import AdapterCollection, ICMGenerator
from peft_icm.evaluation.detection import VARIANTS, class_precision
from peft_icm.tasks import load_tasks
from peft_icm.tasks.annotated_images import crops
from peft_icm.tasks.detection import detect

TRAIN = [
    annotated(((40, 10, 60, 30), "couch")),
    annotated(((8, 4, 24, 20), "dog"), ((44, 12, 64, 32), "couch")),
    annotated(((10, 6, 26, 22), "dog")),
    annotated(),
]
TEST = [annotated(((42, 10, 62, 30), "couch"), ((6, 6, 22, 22), "dog")), annotated(((36, 8, 56, 28), "couch"))]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Base, tasks and encoder, and what `collect` and `train` make of them; `printed` is their JSON."""
    folder = tmp_path_factory.mktemp("work")
    torch.manual_seed(0)
    florence_reader(max_position_embeddings=96).save_pretrained(folder / "base")
    florence_processor().save_pretrained(folder / "base")
    clip().save_pretrained(folder / "encoder")
    write_folder(folder / "tasks", TRAIN, TEST)
    common = ["--epochs", 5, "--learning-rate", 0.01, "--json"]
    recipe = ["--snapshots", 5, "--rank", 1, "--target-modules", "q_proj", "fc2", "--location-step", 100, "--negatives", 1, *common]
    with open(folder / "printed", "w") as out, contextlib.redirect_stdout(out):
        assert run("collect", folder / "base", "--tasks", folder / "tasks", "-o", folder / "collection", *recipe) == 0
        sizes = ["--latent-size", 4, "--hidden-size", 16, "--batch-size", 4, "--pictures", 2]
        source = ["--tasks", folder / "tasks", "--encoder", f"clip:{folder / 'encoder'}"]
        plain = ("--phrasings", 0, "--condition-space", "none")
        assert run("train", folder / "collection", "-o", folder / "generator", *source, *sizes, *common, *plain) == 0
    return folder


class TestCollect:
    def test_the_recipe_is_what_was_asked_for(self, work):
        collection = AdapterCollection.from_pretrained(work / "collection")
        assert collection.tasks == ["sofa", "dog"] and all(len(rows) == 5 for rows in collection.snapshots.values())
        assert not torch.equal(collection.final("sofa"), collection.final("dog"))
        assert collection.metadata["dataset_kwargs"] == {"location_step": 100, "negatives": 1.0, "images_per_epoch": None}
        assert {module.rpartition(".")[2] for module in collection.layout.modules} == {"q_proj", "fc2"}
        assert collection.descriptions["sofa"] == ["detect sofas", "detect couches"]

    def test_prints_json_alone(self, work):
        collected, trained = map(json.loads, (work / "printed").read_text().splitlines())
        collection = AdapterCollection.from_pretrained(work / "collection")
        assert collected == {
            "finished": True,
            "collection": str(work / "collection"),
            "tasks": ["sofa", "dog"],
            "numel": collection.layout.numel,
        }
        assert set(trained) == {"generator", "variance_explained", "kl"} and trained["generator"] == str(work / "generator")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--location-step", 0], "location_step=0 must be between 1"),
            (["--target-modules", "no_such_module"], "no_such_module"),
        ],
    )
    def test_wrong_values_are_one_line(self, work, tmp_path, capsys, arguments, message):
        assert run("collect", work / "base", "--tasks", work / "tasks", "-o", tmp_path / "out", *arguments) == 2
        assert message in capsys.readouterr().err.strip().splitlines()[-1] and not (tmp_path / "out").exists()

    def test_a_class_without_examples_and_a_list_without_tasks(self, work, tmp_path, capsys):
        tasks = [{"name": "sofa", "label": "sofa", "descriptions": ["detect sofas"]}]
        write_folder(tmp_path / "tasks", TRAIN, TEST, tasks)
        arguments = ["collect", work / "base", "--tasks", tmp_path / "tasks", "-o", tmp_path / "out"]
        assert run(*arguments) == 2
        assert "'sofa' is a class with no examples" in capsys.readouterr().err
        document = json.loads((tmp_path / "tasks" / "tasks.json").read_text())
        (tmp_path / "tasks" / "tasks.json").write_text(json.dumps({**document, "tasks": []}))
        assert run(*arguments) == 2
        assert "lists no tasks" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_train_shows_the_encoder_words_and_objects(work):
    """Two sentences and two pictures for sofas, one sentence and two pictures for dogs: context and statistics are those of all rows."""
    encoder = clip()
    generator = ICMGenerator.from_pretrained(work / "generator")
    assert generator.encoder.config["sha256"] == encoder.config["sha256"]
    rows = torch.cat(
        [encoder.encode(rows) for task in load_tasks(work / "tasks") for rows in (task.descriptions, crops(TRAIN, task.label, 2))]
    )
    assert len(rows) == 7
    torch.testing.assert_close(generator.statistics.condition_mean, rows.mean(0), rtol=1e-4, atol=1e-5)


class TestGenerate:
    def test_words_pictures_and_both(self, work, tmp_path, capsys):
        crops(TEST, "couch")[0].save(tmp_path / "sofa.png")
        crops(TEST, "couch")[1].save(tmp_path / "seat.jpg")
        images = ["--image", tmp_path / "sofa.png", "--image", tmp_path / "seat.jpg"]
        for name, said in (("text", ["detect sofas"]), ("pictures", images), ("both", ["detect sofas", *images])):
            assert run("generate", work / "generator", *said, "-o", tmp_path / name, "--seed", 3, "--json") == 0
            printed = json.loads(capsys.readouterr().out)
            assert printed["adapter"] == str(tmp_path / name) and printed["base_model"] == str(work / "base")
            tensors = load_file(tmp_path / name / "adapter_model.safetensors")
            generator = ICMGenerator.from_pretrained(work / "generator")
            condition = {
                "text": "detect sofas" if name != "pictures" else None,
                "images": [tmp_path / "sofa.png", tmp_path / "seat.jpg"] if name != "text" else None,
            }
            expected = generator.generate_state_dict(**condition, generator=torch.Generator().manual_seed(3))
            assert set(tensors) == set(expected) and all(torch.equal(tensors[key], expected[key]) for key in expected)

    def test_peft_alone_loads_it(self, work, tmp_path):
        """No task type fits a vision-language model: with any, PEFT would look for another class of base."""
        assert run("generate", work / "generator", "detect sofas", "-o", tmp_path / "sofas") == 0
        assert json.loads((tmp_path / "sofas" / "adapter_config.json").read_text())["task_type"] is None
        model = PeftModel.from_pretrained(Florence2ForConditionalGeneration.from_pretrained(work / "base"), tmp_path / "sofas")
        assert type(model) is PeftModel and len(detect(model, florence_processor(), TEST)) == 2
        assert isinstance(AutoPeftModel.from_pretrained(tmp_path / "sofas").get_base_model(), Florence2ForConditionalGeneration)

    def test_what_is_no_picture(self, work, tmp_path, capsys):
        (tmp_path / "note.png").write_text("no picture")
        assert run("generate", work / "generator", "--image", tmp_path / "note.png", "-o", tmp_path / "out") == 2
        assert "note.png is no picture that can be opened" in capsys.readouterr().err and not (tmp_path / "out").exists()


class TestEvaluate:
    def test_a_report_of_average_precision_and_its_plot(self, work, tmp_path, capsys):
        arguments = ["evaluate", work / "generator", "--tasks", work / "tasks", "--collection", work / "collection", "--seeds", 0]
        capsys.readouterr()
        assert run(*arguments, "-o", tmp_path / "report.json", "--json") == 0
        printed = json.loads(capsys.readouterr().out)
        assert printed == json.loads((tmp_path / "report.json").read_text())
        assert sorted(file.name for file in tmp_path.iterdir()) == ["report.json", "report.png"]
        with Image.open(tmp_path / "report.png") as picture:
            assert picture.format == "PNG"
        sofa, dog = printed["tasks"]
        assert set(sofa) == {"name", "base", "own", *VARIANTS, "gain", "share"} and "unseen_phrasing" not in dog and printed["seeds"] == [0]
        assert set(printed["ratio"]) == set(VARIANTS) - {"unseen_phrasing"}
        found = detect(Florence2ForConditionalGeneration.from_pretrained(work / "base"), florence_processor(), TEST)
        assert sofa["base"] == pytest.approx(class_precision(found, TEST, "couch"), abs=1e-4)

    def test_as_a_table(self, work, capsys):
        arguments = ["evaluate", work / "generator", "--tasks", work / "tasks", "--collection", work / "collection", "--seeds", 0]
        assert run(*arguments, "--batch-size", 1) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith("AP50 / AP75") and [line.split()[0] for line in lines[1:4]] == ["sofa", "dog", "all"]

    def test_a_task_without_an_own_lora_is_named(self, work, tmp_path, capsys):
        write_folder(tmp_path / "tasks", TRAIN, TEST, [{"name": "puppy", "label": "dog", "descriptions": ["detect puppies"]}])
        assert run("evaluate", work / "generator", "--tasks", tmp_path / "tasks", "--collection", work / "collection") == 2
        assert "'puppy' needs test images of a 'dog' and an own LoRA" in capsys.readouterr().err


class TestArguments:
    def test_a_demo_of_another_task(self, tmp_path, capsys):
        with pytest.raises(SystemExit) as stop:
            run("demo", "--task", "nonsense", "-o", tmp_path / "demo")
        assert stop.value.code == 2 and "invalid choice: 'nonsense'" in capsys.readouterr().err and not (tmp_path / "demo").exists()

    @pytest.mark.parametrize(
        ("verb", "flags"),
        [
            ("demo", ["--task"]),
            ("collect", ["--location-step", "--negatives", "--target-modules"]),
            ("train", ["--tasks", "--pictures"]),
            ("generate", ["--image"]),
            ("evaluate", ["--tasks", "--collection"]),
            ("push", ["--create-pr"]),
        ],
    )
    def test_help(self, verb, flags, capsys):
        with pytest.raises(SystemExit) as stop:
            run(verb, "--help")
        out = capsys.readouterr().out
        assert stop.value.code == 0 and all(flag in out for flag in [*flags, "--json"])
