"""One run from its configuration to its report."""

import copy
import math
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from torch import Tensor

from cl_bench.config.build import KINDS, Parts, build, component, identity, loggers
from cl_bench.config.explain import refuse_unread_keys
from cl_bench.config.schema import INCOMPARABLE, fingerprint, plain, split_override, typed_overrides
from cl_bench.core.errors import ConfigError, RunError, require
from cl_bench.core.record import SCHEMA, SETTINGS, TITLES
from cl_bench.engine.checkpoint import Checkpoint
from cl_bench.engine.step import StepGenerator
from cl_bench.engine.trainer import run_alone
from cl_bench.loggers.base import Logger, RunInfo
from cl_bench.loggers.group import Loggers
from cl_bench.loggers.jsonl import JsonLines
from cl_bench.loggers.pace import Pace
from cl_bench.runs import run_dir as files
from cl_bench.scenarios.base import Scenario
from cl_bench.system.memory import largest_tensors, peak_bytes, ran_out, reset_peak
from cl_bench.system.signals import Interrupted, breakable, stop_signals

MOST_THREADS = 1024


def run(config: DictConfig) -> float | None:
    """Run, resume or find finished what ``config`` describes; ``trainer.replicas`` seeds of it, from ``seed`` on.

    Returns:
        Class-IL average accuracy in percent on held-out validation images, for a search, the mean over the replicas;
        None where the run was measured on test images, which a search must not see.
    """
    refuse_unread_keys(config, typed_overrides())
    values = plain(config)
    _refuse_false_names(values)
    with threads(config.threads):
        return _run(config, values)


@contextmanager
def threads(number: Any) -> Iterator[None]:
    """Within, torch computes with so many threads of the CPU; ``auto`` leaves their number to it."""
    require(
        number == "auto" or (type(number) is int and 0 < number <= MOST_THREADS),
        "threads",
        expected=f"auto, or 1 to {MOST_THREADS}",
        got=number,
        fix="threads=1 is the least.",
    )
    if number == "auto":
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _run(config: DictConfig, values: dict[str, Any]) -> float | None:
    if values["dry_run"]:
        from cl_bench.runs.dry_run import dry_run

        settings, scenario = identity(config, values)
        parts = build(config, scenario)
        with told_in_our_words(parts):
            dry_run(parts, base_summary(values, settings))
        return None
    replicas = component(config.trainer, "trainer", list(config.allow_packages), KINDS["trainer"]).replicas
    seeds = range(values["seed"], values["seed"] + replicas)
    with stop_signals() as caught:
        try:
            if replicas == 1:
                summaries = [run_alone(_generate_steps(config, caught))]
            else:
                summaries = _side_by_side([_seeded(config, seed) for seed in seeds], caught)
        except Interrupted:
            raise SystemExit(128 + caught[0]) from None
    if caught:  # all is written, but a sweep must not start its next job
        raise SystemExit(128 + caught[0])
    objectives = [objective for summary in summaries if (objective := _objective(summary)) is not None]
    return sum(objectives) / len(objectives) if objectives else None


def _seeded(config: DictConfig, seed: int) -> DictConfig:
    config = copy.deepcopy(config)
    config.seed = seed
    return config


def _side_by_side(configs: list[DictConfig], caught: list[int]) -> list[dict[str, Any]]:
    """The summaries of several seeds, their steps computed as one where that can be."""
    from cl_bench.engine.replicas import find_obstacle, run_together

    with breakable():
        parts = build(configs[0])
    reason, scenario = find_obstacle(parts.method, parts.device), parts.scenario
    del parts  # what it holds of the network; each replica builds its own
    if reason is None:
        return run_together(
            [_generate_steps(config, caught, scenario, terminal=n == 0) for n, config in enumerate(configs)]
        )
    print(f"Replicas run one after the other: {reason}", file=sys.stderr)
    return [run_alone(_generate_steps(config, caught, scenario)) for config in configs]


def _generate_steps(
    config: DictConfig, caught: list[int], scenario: Scenario | None = None, *, terminal: bool = True
) -> StepGenerator[dict[str, Any]]:
    """One run from its configuration to its summary, step by step.

    Args:
        caught: signals to stop that have come in.
        scenario: of a replica before, which is shared.
        terminal: whether its progress may be shown there.
    """
    values = plain(config)
    again = "the same command goes on from here"
    try:
        with breakable():
            settings, scenario = identity(config, values, scenario)
        place = run_folder(values, settings)
        again = f"the same command goes on from here: {place}"
        finished = None if values["overwrite"] else files.read_summary(place)
        if finished:
            print(f"Already finished, nothing to do: {place} (overwrite=true starts afresh)", file=sys.stderr)
            show(place, finished, report=not (place / "report.html").exists())
            return finished
        with breakable():
            parts = build(config, scenario)
        chosen = {name: logger for name, logger in loggers(config).items() if terminal or name != "console"}
        with files.locked(place), files.writing(place):
            if values["overwrite"]:
                _empty(place)
                again = f"the same command without overwrite=true goes on from here: {place}"
            files.write_config(place, values)
            files.write_environment(place, parts.device)
            summary = yield from _train(place, values, parts, chosen, base_summary(values, settings), caught)
        again = f"this run is finished, and the same command writes its report: {place}"
        with breakable():
            show(place, summary, report=True)
    except Interrupted:
        print(f"Stopped; {again}", file=sys.stderr)
        raise
    return summary


def _refuse_false_names(values: dict[str, Any]) -> None:
    """``choices`` is a record of what was chosen; set by hand, a run would go under another method's name."""
    chosen = HydraConfig.get().runtime.choices
    for group, name in values["choices"].items():
        require(
            group in chosen, f"choices.{group}", expected="what was chosen", got="no such group", fix="Leave it out."
        )
        if name != chosen.get(group):
            raise ConfigError(
                f"choices.{group}",
                expected=f"{chosen.get(group)}, the {group} that was chosen",
                got=name,
                fix=f"Choose with {group}={name}.",
            )


def show(place: Path, summary: dict[str, Any], report: bool) -> None:
    """The report of a finished run, if it is to be made, and its table; training needs none of their packages."""
    try:
        if report:
            _write_whole_report(place)
        print_result(place, summary)
    except OSError as error:
        raise RunError(
            f"{place}: the run is finished, but its table could not be written: {error.strerror or error}. "
            "Make room; the same command writes it."
        ) from error
    except ModuleNotFoundError as error:
        print(f"No report: {error.name} is not installed. The same command writes it where it is.", file=sys.stderr)


def _write_whole_report(place: Path) -> None:
    try:
        write_report(place)
    except OSError as error:
        raise RunError(
            f"{place}: the run is finished, but its report could not be written: {error.strerror or error}. "
            "Make room or mend the folder; the same command writes it."
        ) from error
    except ModuleNotFoundError:
        raise
    except Exception as error:  # whatever is wrong with a page, the run is finished and its results are whole
        why = " ".join(f"{type(error).__name__}: {error}".split())
        print(f"No report ({why}). The run is finished: {place}", file=sys.stderr)


def write_report(place: Path) -> None:
    """Plots and page of a finished run; matplotlib is loaded here and not before."""
    from cl_bench.report import page

    page.write_report(place)


def run_folder(values: dict[str, Any], settings: dict[str, Any]) -> Path:
    """``results/<experiment>/<name>-<fingerprint>/seed<seed>``."""
    for key in ("experiment", "name"):
        if not values[key].isprintable() or Path(values[key]).name != values[key] or values[key].startswith("."):
            raise ConfigError(
                key, expected="a plain name, a single folder", got=values[key], fix=f"Set {key}=NAME without slashes."
            )
    if not values["results_dir"]:
        raise ConfigError("results_dir", expected="a folder", got="nothing", fix="results_dir=results is the default.")
    _refuse_unwritable_names(values)
    name = f"{values['name']}-{fingerprint(settings)}"
    return Path(values["results_dir"]) / values["experiment"] / name / f"seed{values['seed']}"


def _refuse_unwritable_names(values: dict[str, Any]) -> None:
    for key in ("results_dir", "experiment", "name"):
        try:
            os.fsencode(values[key])
        except UnicodeEncodeError as error:
            raise ConfigError(
                key,
                expected=f"a name that this locale can write ({error.encoding})",
                got=ascii(values[key]),
                fix="export PYTHONUTF8=1 first.",
            ) from error


def base_summary(values: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """The part of ``summary.json`` that is known before training."""
    scenario = values["scenario"]
    summary = {"schema": SCHEMA, "status": "running", "experiment": values["experiment"], "name": values["name"]}
    summary["label"] = values["label"] or " ".join(_telling_overrides()) or None
    summary |= values["choices"]
    summary |= {"scale": values["scale"], "seed": values["seed"]}
    summary |= {key: scenario.get(key) for key in ("class_order_seed", "data_seed")}
    summary |= {"fingerprint": fingerprint(settings), "comparable": settings}
    return summary | {"published": values["published"] if _as_published(values) else None}


def _as_published(values: dict[str, Any]) -> bool:
    """Whether nothing that matters differs from the experiment's file: else it is held to no published number."""
    if values["scale"] is not None or values["trainer"].get("evaluate_on") != "test":
        return False
    return not _telling_overrides()


def _telling_overrides() -> list[str]:
    """What was typed that makes this run another one than the experiment's file says."""
    neutral = {*INCOMPARABLE, "scale"} - {"class_order_seed", "data_seed"}
    free = ("logger", "metrics", "hydra")
    typed = [(text, split_override(text)[0]) for text in typed_overrides()]
    return [text for text, key in typed if key not in neutral and key.split(".")[0] not in free]


def _train(
    place: Path,
    values: dict[str, Any],
    parts: Parts,
    chosen: dict[str, Logger],
    summary: dict[str, Any],
    caught: list[int],
) -> StepGenerator[dict[str, Any]]:
    logger = Loggers([JsonLines(), Pace(), *chosen.values()])
    scenario = parts.scenario
    status, done = "failed", None
    info = RunInfo(
        folder=place,
        experiment=values["experiment"],
        name=values["name"],
        seed=values["seed"],
        fingerprint=summary["fingerprint"],
        config=values,
        num_tasks=len(scenario.tasks),
    )
    try:
        logger.start(info)
        reset_peak(parts.device)
        trainer = parts.trainer(logger, Checkpoint(place / "checkpoint"), stop=lambda: bool(caught))
        try:
            with told_in_our_words(parts):
                record = yield from trainer.generate_steps()
        except Interrupted:
            status = "interrupted"
            raise
        record.cost.peak_memory_bytes = peak_bytes(parts.device)
        record.cost.buffer_bytes = parts.buffer.nbytes
        record.write_csv(place / "accuracy_matrix.csv")
        assert trainer.answers is not None
        files.write_predictions(place, trainer.answers, scenario)
        summary = summary | parts.facts() | {"status": "finished"}
        for setting in SETTINGS:
            matrix = record.matrix(setting)
            summary[setting] = {name: _number(metric(matrix)) for name, metric in parts.metrics.items()}
        areas = trainer.answers.compute_auroc(scenario.tasks)
        summary["task_il_auroc"] = {"mean": _number(math.fsum(areas) / len(areas)), "tasks": [*map(_number, areas)]}
        summary["cost"] = record.to_json()["cost"]
        summary["speed"] = trainer.executor.describe() | {"replicas": parts.settings.replicas}
        summary |= {"alternatives": trainer.alternatives, "method_facts": parts.method.facts()}
        files.write_json(place / "summary.json", summary)  # from here on the run is finished
        status, done = "finished", summary
    finally:
        logger.finish(status, done)
    return summary


@contextmanager
def told_in_our_words(parts: Parts) -> Iterator[None]:
    """Within, errors of torch that a user can do something about become one message."""
    try:
        yield
    except Exception as error:
        if ran_out(error):
            raise RunError(_memory_message(error, parts)) from error
        if "more than 1 value per channel" in str(error):
            raise _single_value(parts) from error
        raise


def _single_value(parts: Parts) -> ConfigError:
    """What is wrong where BatchNorm was given one value of each channel; what always does is refused before."""
    small = [str(task.id) for task in parts.scenario.tasks if len(task.train) == 1]
    return ConfigError(
        "scenario",
        expected="training batches of two images or more, since BatchNorm cannot normalise a single value",
        got="a batch of one image" + (f" (tasks with one training image: {', '.join(small[:10])})" if small else ""),
        fix="Put more classes into a task or more images into a class, use larger images, or a network without "
        "BatchNorm (backbone=mlp, vit).",
    )


def _memory_message(error: Exception, parts: Parts) -> str:
    """What takes the memory, and three ways out."""
    named: dict[str, Tensor] = {f"method.{name}": tensor for name, tensor in parts.method.named_parameters()}
    named |= {f"method.{name}": tensor for name, tensor in parts.method.named_buffers()}
    named |= {f"buffer.{name}": tensor for name, tensor in parts.buffer.named_buffers()}
    for task in parts.scenario.tasks:
        sets = {"training": task.train.images, "test": task.test.images}
        named |= {f"{of} images of task {task.id}": t for of, t in sets.items() if isinstance(t, Tensor)}
    size = parts.settings.batch_size
    return (
        f"out of memory on {parts.device} ({str(error).splitlines()[0]}). "
        f"The largest tensors: {'; '.join(largest_tensors(named))}. "
        f"Ways out: trainer.batch_size={max(1, size // 2)} (and method.replay_size where there is one); "
        "a narrower backbone or a smaller buffer.capacity; precision=bf16 or another device."
    )


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _objective(summary: dict[str, Any]) -> float | None:
    return summary["class_il"]["average_accuracy"] if summary["evaluate_on"] == "val" else None


def _empty(place: Path) -> None:
    (place / "summary.json").unlink(missing_ok=True)  # first: from here on the run is not finished any more
    shutil.rmtree(place / "checkpoint", ignore_errors=True)
    for path in place.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != ".lock":
            path.unlink()


def print_result(place: Path, summary: dict[str, Any]) -> None:
    """The accuracy table and where the report is, on standard output."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{summary['experiment']}: {summary['name']}, seed {summary['seed']}")
    table.add_column("metric")
    for setting in SETTINGS:
        table.add_column(TITLES[setting], justify="right")
    for metric in summary["class_il"]:
        cells = [summary[setting][metric] for setting in SETTINGS]
        table.add_row(metric.replace("_", " "), *("-" if cell is None else f"{cell:.2f}" for cell in cells))
    console = Console()
    console.print(table)
    console.print(f"report: {place / 'report.html'}", soft_wrap=True, highlight=False)
