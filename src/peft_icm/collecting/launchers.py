"""Where tasks are trained: here, on a Ray cluster, or in jobs of SLURM. Each is a map over independent tasks."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import cached_assets_path
from peft import LoraConfig
from tqdm.auto import tqdm

from ..remote import is_url
from .arguments import CollectingArguments, Task
from .folder import JOBS
from .work import work

RETRIES = 3  # of a Ray task whose process or node died
PATIENCE = 120.0  # seconds in which a file system notices that a node died that held a lock


Ended = Generator[tuple[str, BaseException | None], None, None]  # a task's name, and what it failed of


def check_launcher(args: CollectingArguments) -> None:
    """Refuse what would be found out after the data was read.

    Args:
        args ([`CollectingArguments`]): Whose launcher is asked for.

    Raises:
        `ValueError`: If its package is not installed.
        `OSError`: If nothing answers at the address of the Ray cluster.
    """
    if args.launcher == "local":
        return
    if not find_spec(args.launcher):
        raise ValueError(f"launcher={args.launcher!r} needs {args.launcher}: pip install \"peft-icm[cluster]\", or take launcher='local'.")
    address = args.launcher == "ray" and (args.ray_address or os.environ.get("RAY_ADDRESS"))
    if address and ":" in address:  # Ray would wait two minutes, and end the process
        try:
            place = urlsplit(f"//{address.rpartition('://')[2]}")
            socket.create_connection((place.hostname or "", place.port or 0), timeout=5).close()
        except (OSError, ValueError) as error:
            raise OSError(
                f"No Ray cluster answers at {address} ({error}): start one with `ray start --head`, or mend the address."
            ) from error


def launch(base_model: str, tasks: Sequence[Task], lora_config: LoraConfig, args: CollectingArguments, data: Mapping[str, str]) -> None:
    """[`work`] where `args.launcher` says, one task in each call unless it is here.

    Args:
        base_model (`str`): Hub id or folder of the base.
        tasks (`Sequence[Task]`): Not finished yet.
        lora_config (`LoraConfig`): The LoRA of every task.
        args ([`CollectingArguments`]): The recipe and the launcher.
        data (`Mapping[str, str]`): Hash of each task's data, by its name.

    Raises:
        `ChildProcessError`: One line, if tasks failed elsewhere: after the others were trained.
        `ValueError`: If the cluster has no room for a task, or SLURM refuses the jobs.
    """
    if args.launcher == "local" or not tasks:
        return work(base_model, tasks, lora_config, args, data)
    calls = {task.name: (base_model, [task], lora_config, args, {task.name: data[task.name]}, PATIENCE) for task in tasks}
    failed: dict[str, BaseException] = {}
    with closing((_on_ray if args.launcher == "ray" else _by_submitit)(calls, args)) as ended:
        for name, error in tqdm(ended, total=len(tasks), desc="collecting", unit="task"):
            if error is not None:
                failed[name] = error
    if failed:
        first = next(iter(failed.values()))
        some = ", ".join(map(repr, [*failed][:5])) + (" ..." if len(failed) > 5 else "")
        raise ChildProcessError(
            f"{len(failed)} of {len(tasks)} tasks failed: {some} ({_reason(first)}); the others are finished and kept in {args.output_dir}."
        ) from first


def _reason(error: BaseException) -> str:
    """What a task died of. A launcher's own errors hold the whole traceback of the other process, whose last line says it."""
    lines = [line.strip() for line in str(getattr(error, "cause", error)).splitlines() if line.strip("- \t")]
    last = "Traceback" in str(error) and not hasattr(error, "cause")
    return (lines[-1] if last else lines[0])[:500] if lines else type(error).__name__


def _on_ray(calls: Mapping[str, tuple[Any, ...]], args: CollectingArguments) -> Ended:
    """Each call as a task of Ray; of each that has ended its name, and what it failed of."""
    import ray

    started = not ray.is_initialized()
    if started:
        _start_ray(args)
    pending: list[Any] = []
    try:
        gpus = float(min(1, ray.cluster_resources().get("GPU", 0)) if args.gpus_per_task is None else args.gpus_per_task)
        if not any(_has_room(node["Resources"], args.cpus_per_task, gpus) for node in ray.nodes() if node["Alive"]):
            raise ValueError(f"No node of the Ray cluster has {args.cpus_per_task} CPUs and {gpus:g} GPUs, which each task is to get.")
        remote = ray.remote(num_cpus=args.cpus_per_task, num_gpus=gpus, max_retries=RETRIES)(_work_in)
        names = {remote.remote(os.getcwd(), *call): name for name, call in calls.items()}
        pending = list(names)
        while pending:
            ended, pending = ray.wait(pending, timeout=1)
            for reference in ended:
                error: BaseException | None = None
                try:
                    ray.get(reference)
                except ray.exceptions.RayError as found:
                    error = found
                yield names[reference], error
    finally:
        for reference in pending:
            ray.cancel(reference, force=True)
        if started:
            ray.shutdown()


def _work_in(folder: str, *call: Any) -> None:
    """[`work`] where relative paths mean what they do here."""
    if os.path.isdir(folder):
        os.chdir(folder)
    work(*call)


def _start_ray(args: CollectingArguments) -> None:
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_task_oom_retries", str(RETRIES))  # by default a task that is out of memory is started again for ever
    before = signal.getsignal(signal.SIGTERM)
    # What tasks print stays in Ray's logs: stdout is the caller's.
    ray.init(args.ray_address, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    if callable(before) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)  # Ray puts its own in the place of a program's


def _has_room(resources: Mapping[str, float], cpus: float, gpus: float) -> bool:
    return resources.get("CPU", 0) >= cpus and resources.get("GPU", 0) >= gpus


def _by_submitit(calls: Mapping[str, tuple[Any, ...]], args: CollectingArguments) -> Ended:
    """Each call as a job of one array; of each that has ended its name, and what it failed of."""
    import submitit

    jobs_folder = cached_assets_path("peft_icm", namespace="jobs") if is_url(args.output_dir) else Path(args.output_dir) / JOBS
    executor = submitit.AutoExecutor(jobs_folder)
    cores = os.cpu_count() or 1
    if executor.cluster != "slurm" and len(calls) > cores:
        raise ValueError(f"There is no SLURM here, and {len(calls)} jobs would start at once on {cores} cores: take launcher='ray'.")
    executor.update_parameters(
        name="peft-icm",
        timeout_min=args.slurm_time,
        cpus_per_task=args.cpus_per_task,
        gpus_per_node=int(args.gpus_per_task or 0) or None,
        slurm_partition=args.slurm_partition,
    )
    pending: dict[str, Any] = {}
    try:
        try:
            with executor.batch():
                jobs = {name: executor.submit(work, *call) for name, call in calls.items()}
        except submitit.core.utils.FailedJobError as error:
            raise ValueError(f"SLURM refuses the jobs: {' '.join(str(error).split())}") from error
        pending = jobs
        while pending:
            for name in [name for name, job in pending.items() if job.done()]:
                yield name, pending.pop(name).exception()
            time.sleep(1)
    finally:
        for job in pending.values():
            job.cancel()
