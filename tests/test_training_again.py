"""A second `train` into a folder: what it goes on from, and who else works there."""

import subprocess
import sys

import pytest
from filelock import FileLock, Timeout
from test_training import arguments, config, tiny_collection

from peft_icm import ICMGenerator, ICMTrainer
from peft_icm.training.recipe import check_recipe, collection_sha256, training_recipe


class TestResume:
    def recipe(self, tmp_path, collection=None, seed=0, rate=1e-3, **options):
        args = arguments(tmp_path, seed=seed, learning_rate=rate)
        return training_recipe(collection_sha256(collection or tiny_collection()), config(**options), args)

    def test_the_same_run_goes_on_and_another_is_refused(self, tmp_path):
        other = tiny_collection()
        other.snapshots = {task: part + 1 for task, part in other.snapshots.items()}
        moved = tiny_collection()
        moved.task_vectors = {task: -part for task, part in moved.task_vectors.items()}
        check_recipe(tmp_path, self.recipe(tmp_path), resume=False)
        (tmp_path / "checkpoint-3").mkdir()
        check_recipe(tmp_path, self.recipe(tmp_path), resume=True)
        for changed, words in (
            ({"collection": other}, "another collection"),
            ({"collection": moved}, "another collection"),
            ({"seed": 1}, "seed was 0, now 1"),
            ({"rate": 0.5}, "learning_rate was 0.001, now 0.5"),
            ({"latent_size": 3}, "latent_size was"),
        ):
            with pytest.raises(ValueError, match=words):
                check_recipe(tmp_path, self.recipe(tmp_path, **changed), resume=True)
        assert (tmp_path / "checkpoint-3").is_dir()

    def test_an_unreadable_recipe_is_named(self, tmp_path):
        (tmp_path / "checkpoint-3").mkdir()
        with pytest.raises(ValueError, match="recipe.json cannot be read"):
            check_recipe(tmp_path, self.recipe(tmp_path), resume=True)

    def test_a_run_that_is_begun_anew_leaves_no_checkpoint_to_resume(self, tmp_path):
        (tmp_path / "checkpoint-3").mkdir()
        (tmp_path / "checkpoint-4").symlink_to(tmp_path / "checkpoint-3")
        (tmp_path / "checkpoint-notes").write_text("a person's")
        check_recipe(tmp_path, self.recipe(tmp_path, seed=1), resume=False)
        assert [file.name for file in tmp_path.glob("checkpoint-*")] == ["checkpoint-notes"]

    def test_a_longer_run_goes_on(self, tmp_path):
        check_recipe(tmp_path, self.recipe(tmp_path), resume=False)
        (tmp_path / "checkpoint-3").mkdir()
        longer = training_recipe(
            collection_sha256(tiny_collection()),
            config(),
            arguments(tmp_path, seed=0, learning_rate=1e-3, num_train_epochs=99, max_steps=7),
        )
        check_recipe(tmp_path, longer, resume=True)

    @pytest.mark.parametrize("resume", [False, True])
    def test_a_checkpoint_that_leads_elsewhere(self, tmp_path, resume):
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "photo").touch()
        work = tmp_path / "work"
        check_recipe(work, self.recipe(tmp_path), resume=False)
        (work / "checkpoint-3").symlink_to(tmp_path / "mine")
        with pytest.raises(ValueError, match="'checkpoint-3' leads out of"):
            check_recipe(work, self.recipe(tmp_path), resume=resume)
        assert (tmp_path / "mine" / "photo").exists()


HOLD = """
import sys, filelock
with filelock.FileLock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


class TestASecondProcess:
    """In a work folder that another one trains into."""

    @pytest.fixture
    def other(self, tmp_path):
        command = [sys.executable, "-c", HOLD, str(tmp_path / ".lock")]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "held\n"
            yield process

    def test_does_not_begin(self, other, tmp_path):
        (tmp_path / "checkpoint-3").mkdir()
        with pytest.raises(ValueError, match="Another process is training into .*: wait for it, or choose another"):
            check_recipe(tmp_path, {"collection": ""}, resume=False)
        assert (tmp_path / "checkpoint-3").is_dir() and not (tmp_path / "recipe.json").exists()

    def test_does_not_train_and_may_afterwards(self, other, tmp_path):
        trainer = ICMTrainer(config(), arguments(tmp_path, num_train_epochs=1), collection=tiny_collection())
        with pytest.raises(ValueError, match="Another process is training into"):
            trainer.train()
        other.communicate("")
        trainer.train()
        with FileLock(tmp_path / ".lock", timeout=0):
            pass  # it is let go of

    def test_stays_out_from_the_beginning_to_the_end_of_training(self, tmp_path):
        check_recipe(tmp_path, {"collection": ""}, resume=False)
        trainer = ICMTrainer(config(), arguments(tmp_path, num_train_epochs=1), collection=tiny_collection())
        with pytest.raises(Timeout):
            FileLock(tmp_path / ".lock", timeout=0).acquire()
        trainer.train()
        with FileLock(tmp_path / ".lock", timeout=0):
            pass

    def test_of_one_torchrun_group_is_no_other(self, other, tmp_path, monkeypatch):
        monkeypatch.setenv("RANK", "1")
        check_recipe(tmp_path, {"collection": ""}, resume=False)
        assert not (tmp_path / "recipe.json").exists()  # that is the first one's


class TestTheOutput:
    def test_that_is_a_file_is_told_before_anything_is_computed(self, tmp_path, monkeypatch):
        (tmp_path / "file").write_text("mine")
        monkeypatch.setattr(ICMGenerator, "fit", None)  # it would be called
        for begin in (
            lambda folder: ICMTrainer(config(), arguments(folder), collection=tiny_collection()),
            lambda folder: check_recipe(folder, {"collection": ""}, resume=False),
        ):
            with pytest.raises(OSError, match=r"output_dir='.*file' is a file: choose a folder"):
                begin(tmp_path / "file")
