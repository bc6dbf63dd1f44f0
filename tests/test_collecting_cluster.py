"""Tasks that are trained elsewhere: on nodes of Ray, one of which dies, and in jobs of submitit. The LoRAs are those of one process."""

import os
import signal
import socket
import threading
import time
from importlib.util import find_spec

import pytest
import torch
from joblib import cpu_count
from test_collecting import arguments, lora, same, tasks
from test_collecting_again import own_base
from tiny import TEXTS

from peft_icm import collect
from peft_icm.tasks.language_modeling import LanguageModelingTask

NAMES = ("sonnet", "novel", "genesis")


EPOCHS = {"num_train_epochs": 60}  # so that a node that dies is in one


def needs(package):
    return pytest.mark.skipif(not find_spec(package), reason=f'{package} is not installed: pip install "peft-icm[cluster]"')


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return own_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def one(base, tmp_path_factory):
    """What one process collects."""
    return collect(base, tasks(), lora(), arguments(tmp_path_factory.mktemp("one"), **EPOCHS))


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


@pytest.mark.parametrize("launcher", ["ray", "submitit"])
def test_the_package_of_a_launcher_is_named(base, tmp_path, launcher):
    if find_spec(launcher):
        pytest.skip(f"{launcher} is installed")
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
            with pytest.raises(ValueError, match="No node of the Ray cluster has 1 CPUs and 64 GPUs"):
                collect(
                    base,
                    tasks(NAMES[:1]),
                    lora(),
                    arguments(tmp_path, launcher="ray", ray_address=cluster.address, gpus_per_task=64, **EPOCHS),
                )
            training = []

            def lose_a_node():
                while len(begun := [name for name in NAMES if (tmp_path / name).exists()]) < 2:
                    time.sleep(0.05)
                cluster.remove_node(nodes[0], allow_graceful=False)
                training.extend(name for name in begun if not (tmp_path / name / "done.json").exists())

            killer = threading.Thread(target=lose_a_node, daemon=True)
            killer.start()
            collection = collect(base, tasks(), lora(), arguments(tmp_path, launcher="ray", ray_address=cluster.address, **EPOCHS))
            killer.join()
            elsewhere = arguments("memory://here", launcher="ray", ray_address=cluster.address)
            with pytest.raises(OSError, match="'sonnet' was trained, but not into memory://here here: all machines must share it"):
                collect(base, tasks(NAMES[:1]), lora(), elsewhere)
        finally:
            cluster.shutdown()
        assert len(training) == 2 and same(one, collection)

    def test_a_task_that_dies_again_and_again_is_named_and_the_others_stay(self, base, one, tmp_path):
        with pytest.raises(ChildProcessError, match=r"1 of 3 tasks failed: 'doomed' \(.*\); the others are finished and kept in") as error:
            collect(base, [tasks()[0], dying("doomed"), tasks()[1]], lora(), arguments(tmp_path, launcher="ray", **EPOCHS))
        assert "\n" not in str(error.value)
        times = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")}
        again = collect(base, tasks(NAMES[:2]), lora(), arguments(tmp_path, **EPOCHS))
        assert len(times) == 4 and all(file.stat().st_mtime_ns == before for file, before in times.items())
        assert all(torch.equal(one.snapshots[name], again.snapshots[name]) for name in NAMES[:2])


@needs("submitit")
class TestSubmitit:
    """Its executor for machines without SLURM, which starts a process for each job."""

    @pytest.mark.slow
    @pytest.mark.skipif(cpu_count() < 2, reason="two jobs need two cores")
    def test_an_array_with_a_job_that_dies(self, base, one, tmp_path):
        with pytest.raises(ChildProcessError, match=r"1 of 2 tasks failed: 'doomed' \(.*\); the others are finished and kept in") as error:
            collect(base, [dying("doomed"), *tasks(NAMES[:1])], lora(), arguments(tmp_path, launcher="submitit", **EPOCHS))
        assert "\n" not in str(error.value)
        before = (tmp_path / "sonnet" / "done.json").stat().st_mtime_ns
        again = collect(base, tasks(NAMES[:1]), lora(), arguments(tmp_path, **EPOCHS))
        assert torch.equal(one.snapshots["sonnet"], again.snapshots["sonnet"])
        assert (tmp_path / "sonnet" / "done.json").stat().st_mtime_ns == before

    def test_more_jobs_than_cores_where_nothing_queues_them(self, base, tmp_path):
        many = [LanguageModelingTask(f"task-{number}", ["about it"], [TEXTS[0]], []) for number in range(cpu_count() + 1)]
        with pytest.raises(ValueError, match=r"There is no SLURM here, and \d+ jobs would start at once"):
            collect(base, many, lora(), arguments(tmp_path, launcher="submitit"))

    def test_slurm_that_refuses(self, base, tmp_path, monkeypatch):
        for program in ("srun", "sbatch"):
            (tmp_path / program).write_text("#!/bin/sh\necho 'sbatch: error: invalid partition specified: nowhere' >&2\nexit 1\n")
            (tmp_path / program).chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        with pytest.raises(ValueError, match="SLURM refuses the jobs: .*invalid partition specified: nowhere") as error:
            collect(base, tasks(), lora(), arguments(tmp_path / "work", launcher="submitit", slurm_partition="nowhere"))
        assert "\n" not in str(error.value)
