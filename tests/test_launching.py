"""Scoring on nodes of Ray and in jobs of submitit: what comes out is what one process finds."""

import json
import os

import pytest
import torch
from command_line import run
from joblib import cpu_count
from test_collecting_cluster import needs
from test_conditioning import clip
from test_detection_evaluation import SEEDS, detection_tasks, florence_generator, folder, own_loras  # noqa: F401 - a fixture
from test_evaluation import text_tasks
from test_training import tiny_collection
from tiny import TEXTS, florence_processor, generator, tokenizer

from peft_icm import ICMGenerator
from peft_icm.evaluation import Evaluation, evaluate_detection, memorisation
from peft_icm.evaluation.memorisation import memorisation_report
from peft_icm.launching.arguments import LaunchArguments
from peft_icm.launching.launchers import check_launcher, launch
from peft_icm.tasks.language_modeling import LanguageModelingTask


@pytest.fixture
def one_thread():
    """As many as a task of one core has: sums of other threads have other last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="class")
def two_nodes():
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        ray.init(cluster.address, log_to_driver=False)
        yield
        ray.shutdown()
    finally:
        cluster.shutdown()


def evaluated(capsys, work, trained, *arguments):
    """What `peft-icm evaluate` prints, but for the time that it took."""
    capsys.readouterr()
    assert run("evaluate", trained, "--tasks", work / "tasks", "--collection", work / "collection", "--json", *arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.pop("seconds") > 0
    return found


def leaves(found, place=""):
    """The numbers and texts of a report, each with its place."""
    if isinstance(found, dict | list):
        for key, value in found.items() if isinstance(found, dict) else enumerate(found):
            yield from leaves(value, f"{place}/{key}")
    else:
        yield place, found


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
class TestScores:
    @needs("ray")
    @pytest.mark.usefixtures("two_nodes")
    def test_of_text_and_of_requests_on_ray(self, work, trained, tmp_path, capsys):
        known = {name: [f"{name}, quickly", f"the {name} of a poet"] for name in ("novel", "sonnet")}
        (tmp_path / "asked.json").write_text(json.dumps({"known": known, "unknown": ["lattice simulations", "knitting", "tax law"]}))
        for arguments in (["--seeds", 0, 1], ["--requests", tmp_path / "asked.json"]):
            assert evaluated(capsys, work, trained, *arguments, "--launcher", "ray") == evaluated(capsys, work, trained, *arguments)

    @needs("ray")
    @pytest.mark.usefixtures("two_nodes")
    def test_of_pictures_on_ray(self, folder):  # noqa: F811
        model = florence_generator(folder, clip())
        options = {"seeds": SEEDS, "progress": False}
        one, two = (
            evaluate_detection(model, florence_processor(), detection_tasks(), own_loras(model), launching=launching, **options)
            for launching in (LaunchArguments(), LaunchArguments(launcher="ray"))
        )
        assert list(one.scores) == list(two.scores) and one.scores == two.scores

    @needs("ray")
    @pytest.mark.usefixtures("two_nodes")
    def test_of_weights_alone_on_ray(self, tmp_path, monkeypatch):
        model, collection = generator(), tiny_collection(tasks=5)
        whole = memorisation_report(model, collection, seeds=[0, 1])
        monkeypatch.setattr(memorisation, "_HELD", 2 * (10 + 2) * model.layout.numel)  # three blocks
        collection.save_pretrained(tmp_path / "c")
        opened = type(collection).from_pretrained(tmp_path / "c")
        report = memorisation_report(model, opened, seeds=[0, 1], launching=LaunchArguments(launcher="ray"))
        assert [*leaves(report)] == [(place, pytest.approx(value, abs=2e-6)) for place, value in leaves(whole)]  # six digits are kept

    @needs("ray")
    @pytest.mark.usefixtures("two_nodes")
    def test_a_task_that_cannot_be_scored_is_named_in_one_line(self, work, trained):
        class Unreadable(LanguageModelingTask):
            """Its texts are read where it was made, and nowhere else."""

            here = os.getpid()

            def __getattribute__(self, name):
                if name == "test_texts" and os.getpid() != type(self).here:
                    raise OSError("the disk\nis gone")
                return super().__getattribute__(name)

        tasks = [*text_tasks(), Unreadable("lost", ["about it"], [], [TEXTS[0]])]
        model = ICMGenerator.from_pretrained(trained)
        own = dict.fromkeys(("sonnet", "novel", "lost"), torch.zeros(model.layout.numel))
        with pytest.raises(ChildProcessError, match=r"1 of 3 tasks failed: 'lost' \(.*the disk.*\); the others were ended") as error:
            Evaluation.evaluate(model, tokenizer(), tasks, own, launching=LaunchArguments(launcher="ray"))
        assert "\n" not in str(error.value)

    @needs("submitit")
    @pytest.mark.skipif(cpu_count() < 2, reason="two jobs need two cores")
    def test_of_text_by_submitit(self, work, trained, tmp_path, capsys):
        tasks = json.loads((work / "tasks" / "tasks.json").read_text())["tasks"]
        (tmp_path / "two").mkdir()
        for file in (work / "tasks").glob("*.txt"):
            (tmp_path / "two" / file.name).write_text(file.read_text())
        (tmp_path / "two" / "tasks.json").write_text(json.dumps({"tasks": tasks[:2]}))
        some = ["--tasks", tmp_path / "two", "--seeds", 0]
        assert evaluated(capsys, work, trained, *some, "--launcher", "submitit") == evaluated(capsys, work, trained, *some)


def test_here_items_are_taken_one_after_the_other():
    seen = []

    def items():
        for number in range(3):
            seen.append(number)
            yield number

    squares = launch(lambda numbers: (number**2 for number in numbers), ["a", "b", "c"], items(), LaunchArguments())
    assert next(squares) == ("a", 0) and seen == [0] and dict(squares) == {"b": 1, "c": 4}


@needs("ray")
@pytest.mark.slow
def test_ray_takes_items_when_there_is_room(monkeypatch):
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1")
    seen = []
    names = [str(number) for number in range(6)]
    squares = launch(
        lambda numbers: (n**2 for n in numbers), names, (seen.append(n) or n for n in range(6)), LaunchArguments(launcher="ray")
    )
    found = dict([next(squares)])
    assert seen == [0, 1], "two for each core"
    assert found | dict(squares) == {str(n): n**2 for n in range(6)}


@needs("submitit")
@pytest.mark.slow
def test_submitit_leaves_nothing_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.cached_assets_path", lambda *args, **kwargs: tmp_path)
    squares = launch(lambda numbers: (n**2 for n in numbers), ["a"], [3], LaunchArguments(launcher="submitit"))
    assert next(squares) == ("a", 9)
    (private,) = tmp_path.iterdir()
    assert private.stat().st_mode & 0o77 == 0
    assert not list(squares) and not list(tmp_path.iterdir())


@needs("ray")
@pytest.mark.slow
def test_ray_has_the_cores_that_this_process_may_use(monkeypatch):
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1")  # as a container's quota or an affinity
    with pytest.raises(ValueError, match="No node of the Ray cluster has 2 CPUs and 0 GPUs"):
        dict(launch(iter, ["a"], [1], LaunchArguments(launcher="ray", cpus_per_task=2)))


@needs("ray")
@pytest.mark.parametrize("address", ["head", "head:", "ray://head", ":6379", "head:port"])
def test_an_address_without_a_host_or_a_port(address, monkeypatch):
    with pytest.raises(ValueError, match=f"'{address}', must be host:port, such as head:6379"):
        check_launcher(LaunchArguments(launcher="ray", ray_address=address))
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ValueError, match=f"'{address}', must be host:port"):
        check_launcher(LaunchArguments(launcher="ray"))
