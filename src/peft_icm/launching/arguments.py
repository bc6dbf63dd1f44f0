"""Where independent items of work are done."""

from __future__ import annotations

from dataclasses import dataclass

LAUNCHERS = ("local", "ray", "submitit")


@dataclass(kw_only=True)
class LaunchArguments:
    """Where independent tasks are trained or scored.

    Args:
        launcher (`str`, defaults to `"local"`): `"local"`, one after the other in this process; `"ray"`, each as a task of Ray, on a
            cluster or in processes of this machine; `"submitit"`, each as a job of one SLURM array.
        ray_address (`str`, *optional*): `"host:port"` of the cluster's head, or `"auto"`; by default `RAY_ADDRESS`, else Ray is started on
            this machine.
        cpus_per_task (`int`, defaults to 1): Cores of each task, and its threads.
        gpus_per_task (`float`, *optional*): GPUs of each task; with Ray a share too, such as 0.5. By default one with Ray, where the
            cluster has any, and none with SLURM.
        slurm_partition (`str`, *optional*): Partition of the jobs.
        slurm_time (`int`, defaults to 1440): Minutes after which SLURM may end a job.

    Raises:
        `ValueError`: If a number is out of range, the launcher is none of these, or an option is of another launcher.

    Example:

    ```python
    >>> LaunchArguments(launcher="ray", gpus_per_task=0.5).gpus_per_task
    0.5

    ```
    """

    launcher: str = "local"
    ray_address: str | None = None
    cpus_per_task: int = 1
    gpus_per_task: float | None = None
    slurm_partition: str | None = None
    slurm_time: int = 1440

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.launcher not in LAUNCHERS:
            raise ValueError(f"launcher={self.launcher!r} must be one of {', '.join(LAUNCHERS)}.")
        for name, launcher in (("ray_address", "ray"), ("slurm_partition", "submitit")):
            if getattr(self, name) is not None and launcher != self.launcher:
                raise ValueError(f"{name}={getattr(self, name)!r} goes with launcher={launcher!r}, found launcher={self.launcher!r}.")
        if self.cpus_per_task < 1 or self.slurm_time < 1:
            raise ValueError(f"cpus_per_task={self.cpus_per_task} and slurm_time={self.slurm_time} must be at least 1.")
        gpus = self.gpus_per_task or 0
        if gpus < 0 or (gpus % 1 and (gpus > 1 or self.launcher == "submitit")):
            raise ValueError(f"gpus_per_task={gpus} must be a whole number or, with launcher='ray', a share of one.")


HERE = LaunchArguments()
