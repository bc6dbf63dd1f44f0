"""Independent items of work, done here, on a Ray cluster, or in jobs of SLURM."""

from __future__ import annotations

import logging
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from .arguments import LaunchArguments

RETRIES = 3  # of a Ray task whose process or node died

Item = TypeVar("Item")
Result = TypeVar("Result")
Work = Callable[[Iterable[Item]], Iterator[Result]]
Ended = Generator[tuple[str, Any, BaseException | None], None, None]  # an item's name, its result, and what it failed of


def check_launcher(args: LaunchArguments) -> None:
    """Refuse what would be found out after the data was read.

    Args:
        args ([`LaunchArguments`]): Whose launcher is asked for.

    Raises:
        `ValueError`: If its package is not installed, or the address of the Ray cluster has no port.
        `OSError`: If nothing answers at the address of the Ray cluster.
    """
    if args.launcher == "local":
        return
    if not find_spec(args.launcher):
        raise ValueError(f"launcher={args.launcher!r} needs {args.launcher}: pip install \"peft-icm[cluster]\", or take launcher='local'.")
    address = args.launcher == "ray" and (args.ray_address or os.environ.get("RAY_ADDRESS"))
    if not address or address in ("auto", "local"):
        return
    try:
        place = urlsplit(f"//{address.rpartition('://')[2]}")
        host, port = place.hostname, place.port
    except ValueError:
        host = port = None
    if not host or not port:
        raise ValueError(
            f"The address of the Ray cluster, {address!r}, must be host:port, such as head:6379 (what `ray start --head` prints), or auto."
        )
    try:
        socket.create_connection((host, port), timeout=5).close()  # Ray would wait two minutes, and end the process
    except OSError as error:
        raise OSError(f"No Ray cluster answers at {address} ({error}): start one with `ray start --head`, or mend the address.") from error


def launch(
    work: Work[Item, Result],
    names: Sequence[str],
    items: Iterable[Item],
    args: LaunchArguments,
    *,
    folder: Path | None = None,
    kept: str | None = None,
) -> Generator[tuple[str, Result], None, None]:
    """Work on items where `args.launcher` says: here on all of them in one call, elsewhere on each in a call of its own.

    Args:
        work (`Callable`): Takes items and yields a result for each. It goes elsewhere by pickle, once for all items.
        names (`Sequence[str]`): Of the items, all different.
        items (`Iterable`): Each is taken when there is room for it: here when the one before is done.
        args ([`LaunchArguments`]): The launcher. Call [`check_launcher`] first.
        folder (`Path`, *optional*): Where submitit's logs stay; all machines share it. By default they go with the jobs.
        kept (`str`, *optional*): Where results are kept: when an item fails, the others are still worked on. By default they are ended.

    Yields:
        `tuple[str, Any]`: Name and result of an item, as soon as it is done; elsewhere in any order. Closing the generator ends the others.

    Raises:
        `ChildProcessError`: One line, if items failed elsewhere.
        `ValueError`: If the cluster has no room for an item, or SLURM refuses the jobs.

    Example:

    ```python
    >>> from peft_icm.launching.arguments import LaunchArguments
    >>> dict(launch(lambda numbers: (number**2 for number in numbers), ["two", "three"], [2, 3], LaunchArguments()))
    {'two': 4, 'three': 9}

    ```
    """
    if args.launcher == "local":
        for result, name in zip(work(items), names, strict=True):
            yield name, result
        return
    failed: dict[str, BaseException] = {}
    by_name = zip(names, items, strict=True)
    with closing(
        _on_ray(work, by_name, args) if args.launcher == "ray" else _by_submitit(work, by_name, len(names), args, folder)
    ) as ended:
        for name, result, error in ended:
            if error is None:
                yield name, result
                continue
            failed[name] = error
            if kept is None:
                break
    if failed:
        first = next(iter(failed.values()))
        some = ", ".join(map(repr, [*failed][:5])) + (" ..." if len(failed) > 5 else "")
        others = f"the others are finished and kept in {kept}" if kept else "the others were ended"
        raise ChildProcessError(f"{len(failed)} of {len(names)} tasks failed: {some} ({_reason(first)}); {others}.") from first


def _reason(error: BaseException) -> str:
    """What a task died of. A launcher's own errors hold the whole traceback of the other process, whose last line says it."""
    lines = [line.strip() for line in str(getattr(error, "cause", error)).splitlines() if line.strip("- \t")]
    last = "Traceback" in str(error) and not hasattr(error, "cause")
    return (lines[-1] if last else lines[0])[:500] if lines else type(error).__name__


def _on_ray(work: Work[Any, Any], items: Iterator[tuple[str, Any]], args: LaunchArguments) -> Ended:
    """Each item as a task of Ray."""
    import ray

    started = not ray.is_initialized()
    if started:
        _start_ray(args)
    pending: dict[Any, str] = {}
    try:
        gpus = float(min(1, ray.cluster_resources().get("GPU", 0)) if args.gpus_per_task is None else args.gpus_per_task)
        if not any(_has_room(node["Resources"], args.cpus_per_task, gpus) for node in ray.nodes() if node["Alive"]):
            raise ValueError(f"No node of the Ray cluster has {args.cpus_per_task} CPUs and {gpus:g} GPUs, which each task is to get.")
        remote: Any = ray.remote(num_cpus=args.cpus_per_task, num_gpus=gpus, max_retries=RETRIES)(_work_in)
        shared = ray.put(work)
        while True:
            # Items are held from when they are submitted: no more than twice what there are cores for, which lets a cluster grow.
            most = max(1, int(2 * ray.cluster_resources().get("CPU", 0) / args.cpus_per_task))
            for name, item in islice(items, max(0, most - len(pending))):
                pending[remote.remote(os.getcwd(), shared, item)] = name
            if not pending:
                break
            for reference in ray.wait([*pending], timeout=1)[0]:
                name = pending.pop(reference)
                try:
                    yield name, ray.get(reference), None
                except ray.exceptions.RayError as error:
                    yield name, None, error
    finally:
        for reference in pending:
            ray.cancel(reference, force=True)
        if started:
            ray.shutdown()


def _work_in(folder: str, work: Work[Item, Result], item: Item) -> Result:
    """The result of one item, where relative paths mean what they do here."""
    if os.path.isdir(folder):
        os.chdir(folder)
    (result,) = work([item])
    return result


def _start_ray(args: LaunchArguments) -> None:
    import ray
    from joblib import cpu_count

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_task_oom_retries", str(RETRIES))  # by default a task that is out of memory is started again for ever
    before = signal.getsignal(signal.SIGTERM)
    address = args.ray_address or os.environ.get("RAY_ADDRESS") or "local"
    # Ray itself counts the cores of the machine or, in a container, its quota; an affinity, such as a job's of SLURM, it does not see.
    here = {"num_cpus": cpu_count()} if address == "local" else {}
    # What tasks print stays in Ray's logs: stdout is the caller's.
    ray.init(address, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False, **here)
    if callable(before) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)  # Ray puts its own in the place of a program's


def _has_room(resources: Mapping[str, float], cpus: float, gpus: float) -> bool:
    return resources.get("CPU", 0) >= cpus and resources.get("GPU", 0) >= gpus


def _by_submitit(work: Work[Any, Any], items: Iterator[tuple[str, Any]], count: int, args: LaunchArguments, folder: Path | None) -> Ended:
    """Each item as a job of one array; work and items lie in a folder that nobody else reads, and go with it."""
    import submitit
    from huggingface_hub import cached_assets_path
    from joblib import cpu_count

    place = folder or cached_assets_path("peft_icm", namespace="jobs")
    place.mkdir(exist_ok=True)
    # A job that was cancelled may still write into it.
    with tempfile.TemporaryDirectory(dir=place, ignore_cleanup_errors=True) as private:
        shared = Path(private).absolute()
        executor = submitit.AutoExecutor(folder or shared)
        if executor.cluster != "slurm" and count > cpu_count():
            raise ValueError(f"There is no SLURM here, and {count} jobs would start at once on {cpu_count()} cores: take launcher='ray'.")
        executor.update_parameters(
            name="peft-icm",
            timeout_min=args.slurm_time,
            cpus_per_task=args.cpus_per_task,
            gpus_per_node=int(args.gpus_per_task or 0) or None,
            slurm_partition=args.slurm_partition,
        )
        submitit.core.utils.cloudpickle_dump(work, shared / "work.pkl")
        pending: dict[str, Any] = {}
        try:
            jobs = {}
            with executor.batch():
                for number, (name, item) in enumerate(items):
                    submitit.core.utils.cloudpickle_dump(item, shared / f"{number}.pkl")
                    jobs[name] = executor.submit(_read_and_work, shared / "work.pkl", shared / f"{number}.pkl")
            pending = jobs
            while pending:
                for name in [name for name, job in pending.items() if job.done()]:
                    job = pending.pop(name)
                    error = job.exception()
                    yield name, None if error else job.result(), error
                time.sleep(1)
        except submitit.core.utils.FailedJobError as error:
            raise ValueError(f"SLURM refuses the jobs: {' '.join(str(error).split())}") from error
        finally:
            for job in pending.values():
                job.cancel()


def _read_and_work(work: Path, item: Path) -> Any:
    """The result of one item, by work that another process wrote down."""
    import cloudpickle

    (result,) = cloudpickle.loads(work.read_bytes())([cloudpickle.loads(item.read_bytes())])
    return result
