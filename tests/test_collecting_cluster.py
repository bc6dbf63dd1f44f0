"""Tasks that are trained elsewhere: on nodes of Ray, one of which dies, and in jobs of submitit. The LoRAs are those of one process."""

import os
import signal
import socket
import threading
import time
from importlib.util import find_spec

import pytest
import torch
from peft import LoraConfig
from tiny import TEXTS, llama, tokenizer

from peft_icm import CollectingArguments, collect
from peft_icm.collecting import launchers
from peft_icm.tasks.language_modeling import LanguageModelingTask

NAMES = ("sonnet", "novel", "genesis")


def needs(package):
    return pytest.mark.skipif(not find_spec(package), reason=f'{package} is not installed: pip install "peft-icm[cluster]"')


def lora():
    return LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def tasks(count=3):
    return [LanguageModelingTask(name, [f"about {name}"], [text], []) for name, text in zip(NAMES[:count], TEXTS[:count], strict=True)]


def arguments(folder, **kwargs):
    options = {"num_train_epochs": 3, "num_snapshots": 2, "learning_rate": 1e-2, "dataset_kwargs": {"block_size": 32}}
    return CollectingArguments(str(folder), **{**options, **kwargs})


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    llama(vocab_size=len(tokenizer())).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def one(base, tmp_path_factory):
    """What one process collects."""
    return collect(base, tasks(), lora(), arguments(tmp_path_factory.mktemp("one")))


def same(first, second):
    return first.tasks == second.tasks and all(torch.equal(first.snapshots[task], second.snapshots[task]) for task in first.tasks)


class DyingTask(LanguageModelingTask):
    """Its process is killed, as by a system without memory, wherever it is not the one that the data is read in."""

    def train_dataset(self, *args, **kwargs):
        if os.getpid() != self.reader:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().train_dataset(*args, **kwargs)


def dying(name):
    task = DyingTask(name, [f"about {name}"], [TEXTS[0]], [])
    task.reader = os.getpid()
    return task


def test_the_package_of_a_launcher_is_named(base, tmp_path, monkeypatch):
    monkeypatch.setattr(launchers, "find_spec", lambda name: None)
    for launcher in ("ray", "submitit"):
        with pytest.raises(ValueError, match=rf'launcher=\'{launcher}\' needs {launcher}: pip install "peft-icm\[cluster\]"'):
            collect(base, tasks(), lora(), arguments(tmp_path / "work", launcher=launcher))
    assert not (tmp_path / "work").exists()


@needs("ray")
@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_a_cluster_that_is_not_there(base, tmp_path, scheme):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(OSError, match=rf"No Ray cluster answers at {scheme}127.0.0.1:{port} .*ray start --head") as error:
        collect(base, tasks(), lora(), arguments(tmp_path / "work", launcher="ray", ray_address=f"{scheme}127.0.0.1:{port}"))
    assert "\n" not in str(error.value) and not (tmp_path / "work").exists()


@needs("ray")
@pytest.mark.slow
class TestRay:
    def test_a_node_that_dies(self, base, one, tmp_path):
        """Of two nodes that each train a task one is lost: its task goes to the other, and every LoRA is the one of a single process."""
        from ray.cluster_utils import Cluster

        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        try:
            nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
            lost = []

            def lose_a_node():
                while len([folder for folder in tmp_path.iterdir() if not folder.name.startswith(".") and folder.is_dir()]) < 2:
                    time.sleep(0.05)
                cluster.remove_node(nodes[0], allow_graceful=False)
                lost.extend(name for name in NAMES if not (tmp_path / name / "done.json").exists())

            killer = threading.Thread(target=lose_a_node)
            killer.start()
            collection = collect(base, [*tasks()], lora(), arguments(tmp_path, launcher="ray", ray_address=cluster.address, **{}))
            killer.join()
        finally:
            cluster.shutdown()
        assert lost and same(one, collection)

    def test_a_task_that_dies_again_and_again_is_named_and_the_others_stay(self, base, one, tmp_path):
        with pytest.raises(ChildProcessError, match=r"1 of 3 tasks failed: 'doomed' \(.*\); the others are finished and kept in") as error:
            collect(base, [tasks()[0], dying("doomed"), tasks()[1]], lora(), arguments(tmp_path, launcher="ray"))
        assert "\n" not in str(error.value)
        times = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")}
        again = collect(base, tasks(2), lora(), arguments(tmp_path))
        assert len(times) == 4 and all(file.stat().st_mtime_ns == before for file, before in times.items())
        assert all(torch.equal(one.snapshots[name], again.snapshots[name]) for name in NAMES[:2])

    def test_what_no_node_has(self, base, tmp_path):
        with pytest.raises(ValueError, match="No node of the Ray cluster has 1 CPUs and 64 GPUs"):
            collect(base, tasks(1), lora(), arguments(tmp_path, launcher="ray", gpus_per_task=64))


@needs("submitit")
@pytest.mark.slow
class TestSubmitit:
    """Its executor for machines without SLURM, which starts a process for each job."""

    @pytest.fixture(autouse=True)
    def no_slurm(self, monkeypatch):
        monkeypatch.setattr(launchers.os, "sched_getaffinity", lambda pid: range(4))

    def test_an_array_trains_what_one_process_trains(self, base, one, tmp_path):
        assert same(one, collect(base, tasks(), lora(), arguments(tmp_path, launcher="submitit")))

    def test_a_job_that_dies_is_named_and_the_others_stay(self, base, tmp_path):
        with pytest.raises(ChildProcessError, match=r"1 of 2 tasks failed: 'doomed' \(.*\); the others are finished and kept in") as error:
            collect(base, [dying("doomed"), *tasks(1)], lora(), arguments(tmp_path, launcher="submitit"))
        assert "\n" not in str(error.value) and (tmp_path / "sonnet" / "done.json").is_file()
