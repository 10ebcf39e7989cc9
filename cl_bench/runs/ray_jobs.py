"""The jobs of a sweep on Ray: on this machine, or on a cluster whose machines share the results folder.

If a machine is lost, Ray starts its jobs again on another one. A job goes on from its last checkpoint, as after any
kill.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, configure_log, run_job, setup_globals
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from cl_bench.config.explain import explain_missing
from cl_bench.core.errors import ConfigError, require
from cl_bench.runs.sweep import JobFailed

if TYPE_CHECKING:
    from hydra_plugins.cl_bench import RayLauncher

POLL_SECONDS = 0.5
OBJECT_STORE_BYTES = 80 * 2**20  # what jobs return is small; Ray itself would reserve 30 % of the RAM


def launch(launcher: "RayLauncher", jobs: list[list[str]], first: int) -> list[JobReturn]:
    """Run jobs on Ray.

    Args:
        jobs: the overrides of each.
        first: the number of the first one.

    Returns:
        What each job returned; of a job that failed or was lost, an error that is raised when it is asked for.
    """
    setup_globals()
    config, settings = launcher.config, launcher.settings
    configure_log(config.hydra.hydra_logging, config.hydra.verbose)
    with start_ray(settings) as ray:
        threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, int(settings["cpus_per_task"])))
        remote = ray.remote(_run_job).options(
            num_cpus=settings["cpus_per_task"],
            num_gpus=settings["gpus_per_task"],
            max_retries=settings["retries"],
            runtime_env={"env_vars": {"OMP_NUM_THREADS": threads}},
        )
        numbers = {}
        for number, overrides in enumerate(jobs, start=first):
            job = launcher.hydra_context.config_loader.load_sweep_config(config, overrides)
            with open_dict(job):
                job.hydra.job.id, job.hydra.job.num = f"ray_{number}", number
            task = remote.remote(
                launcher.hydra_context, job, launcher.task_function, Singleton.get_state(), os.getcwd()
            )
            numbers[task] = number
        returned: dict[int, JobReturn] = {}
        waiting = list(numbers)
        while waiting:  # not one long wait: Python handles signals between two calls
            done, waiting = ray.wait(waiting, num_returns=1, timeout=POLL_SECONDS)
            for task in done:
                returned[numbers[task]] = _receive(ray, task, numbers[task])
    return [returned[number] for number in sorted(returned)]


def _receive(ray: Any, task: Any, number: int) -> JobReturn:
    try:
        return ray.get(task)
    except ray.exceptions.RayError as error:  # of Ray itself: errors of the job are in what it returns
        reason = " ".join(str(error).split())
        failure = JobFailed(f"job {number}: lost on Ray ({type(error).__name__}: {reason})", 1)
        print(f"cl_bench: {failure.message}", file=sys.stderr)
        failed = JobReturn(status=JobStatus.FAILED)
        failed.return_value = failure
        return failed


def _run_job(
    context: HydraContext, config: DictConfig, task: TaskFunction, singletons: dict[Any, Any], folder: str
) -> JobReturn:
    """A job, in one of Ray's processes, on any machine."""
    os.chdir(folder)  # relative paths are those of the command
    setup_globals()
    Singleton.set_state(singletons)
    HydraConfig.instance().set_config(config)
    return run_job(
        hydra_context=context,
        task_function=task,
        config=config,
        job_dir_key="hydra.sweep.dir",
        job_subdir_key="hydra.sweep.subdir",
    )


@contextmanager
def start_ray(settings: dict[str, Any]) -> Iterator[Any]:
    """Inside, this process belongs to a Ray cluster: the one at ``address``, or one of its own on this machine.

    Raises:
        ConfigError: Ray is not installed, the cluster does not answer, or this machine has too little for a run.
    """
    os.environ["RAY_DEDUP_LOGS"] = str(int(settings["deduplicate_logs"]))  # read when Ray is imported
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ModuleNotFoundError as error:
        raise explain_missing("launcher", "ray") from error
    own = {} if settings["address"] else {"num_cpus": settings["cpus"], "num_gpus": settings["gpus"]}
    if not settings["address"]:
        own |= {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=settings["address"] or "local", **own)
    except (ConnectionError, ValueError) as error:
        raise ConfigError(
            "hydra.launcher.address",
            expected="a Ray cluster that answers, or null for one of its own",
            got=settings["address"],
            fix=f"Start it with ray start --head. ({' '.join(str(error).split())})",
        ) from error
    signal.signal(signal.SIGTERM, before)  # Ray has set its own, which would not wait for checkpoints
    try:
        if not settings["address"]:
            refuse_unmet_needs(settings, ray.cluster_resources())
        yield ray
    finally:
        ray.shutdown()


def refuse_unmet_needs(settings: dict[str, Any], resources: dict[str, float]) -> None:
    """Refuse a run that needs more CPUs or GPUs than there are: Ray would wait for another machine for ever.

    Args:
        settings: the keys of ``configs/hydra/launcher/ray.yaml``.
        resources: what this machine has, by Ray's names.
    """
    for key, name in (("cpus_per_task", "CPU"), ("gpus_per_task", "GPU")):
        there = resources.get(name, 0)
        require(
            settings[key] <= there,
            f"hydra.launcher.{key}",
            expected=f"at most the {there:g} {name}s that Ray has here",
            got=settings[key],
            fix="Take fewer, or hydra.launcher.address=HOST:PORT of a cluster that has them.",
        )
