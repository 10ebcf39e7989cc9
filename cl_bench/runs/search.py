"""A search with Optuna that is kept on disk and goes on after an interruption.

Every trial draws with a sampler of its own seed, so it depends only on the trials before it. A search that was
interrupted therefore ends with the same trials as one that was not.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep, Transformer
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, OmegaConf

from cl_bench.config.build import find_measure
from cl_bench.config.explain import explain_missing
from cl_bench.config.schema import INCOMPARABLE, split_override
from cl_bench.core.errors import ConfigError, require
from cl_bench.report.trials import write_trials
from cl_bench.runs.sweep import JobFailed, check_searched_values, refuse_minimizing, refuse_test_images
from cl_bench.system.atomic import hold_lock

NEUTRAL = {*INCOMPARABLE} - {"experiment", "scale", "seed", "class_order_seed", "data_seed"}
"""Overrides that do not make another study."""


def search(config: DictConfig, settings: dict[str, Any], launcher: Launcher, arguments: list[str]) -> None:
    """Run the trials that are missing, ``n_jobs`` at a time, and draw all trials.

    Args:
        config: of the command, with its ``hydra`` part.
        settings: the keys of ``configs/hydra/sweeper/optuna.yaml``.
        launcher: runs the trials.
        arguments: the overrides as typed; each with several values is searched.

    Raises:
        ConfigError: a wrong setting, a search on test images, or one that is running in another process.
        JobFailed: a trial's configuration is wrong, and so is that of all others.
    """
    refuse_test_images(config.trainer.get("evaluate_on"), "hydra/sweeper=optuna")
    require(not config.dry_run, "dry_run", expected="false in a search", got="true", fix="Try it without the sweeper.")
    _check_settings(settings)
    optuna = _import_optuna()
    space, fixed = read_space(
        optuna, [f"{key}={value}" for key, value in (settings["params"] or {}).items()], arguments
    )
    require(bool(space), "hydra.sweeper", expected="a key to search", got="none", fix="Add 'KEY=interval(LOW,HIGH)'.")
    name = settings["study_name"] or _name_study(config, space, fixed)
    folder = Path(settings["folder"]) / name
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with hold_lock(folder / ".lock"):
            study = _open_study(optuna, settings, name, folder)
            try:
                _run_trials(optuna, study, settings, launcher, space, fixed)
            finally:
                _write_results(study, folder, find_measure(config))
    except BlockingIOError as error:
        raise ConfigError(
            "hydra.sweeper",
            expected="a search that no other process is running",
            got=name,
            fix="Wait for it, or set hydra.sweeper.study_name=NAME.",
        ) from error


def _check_settings(settings: dict[str, Any]) -> None:
    refuse_minimizing(settings["direction"])
    numbers = {"n_trials": 1, "n_jobs": 1, "sampler.seed": 0}  # the least of each
    for key, least in numbers.items():
        value = OmegaConf.select(OmegaConf.create(settings), key)
        require(
            type(value) is int and value >= least,
            f"hydra.sweeper.{key}",
            expected=f"a whole number of {least} or more",
            got=value,
            fix="Correct the value.",
        )


def _import_optuna() -> Any:
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise explain_missing("sweeper", "optuna") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _open_study(optuna: Any, settings: dict[str, Any], name: str, folder: Path) -> Any:
    storage = settings["storage"] or f"sqlite:///{folder / 'study.db'}"
    try:
        return optuna.create_study(
            study_name=name, storage=storage, direction=settings["direction"], load_if_exists=True
        )
    except Exception as error:  # of Optuna, or of the database's own package
        raise ConfigError(
            "hydra.sweeper.storage",
            expected="a database that Optuna can open",
            got=storage,
            fix=f"Leave it out for one in the folder of the search. {_format_error(error)}",
        ) from error


def _format_error(error: Exception) -> str:
    return " ".join(f"({type(error).__name__}: {error})".split())


def _run_trials(
    optuna: Any, study: Any, settings: dict[str, Any], launcher: Launcher, space: dict[str, Any], fixed: list[str]
) -> None:
    make_sampler = choose_sampler(optuna, settings["sampler"])
    states = optuna.trial.TrialState
    interrupted = study.get_trials(states=(states.RUNNING,))
    # others were stopped while they drew, or are of values that are no longer searched
    whole = [trial for trial in interrupted if trial.distributions == space]
    for trial in interrupted:
        if trial not in whole:
            study.tell(trial.number, state=states.FAIL)
    waiting = [(trial.number, trial.params) for trial in whole]
    while True:
        asked = len(study.get_trials(deepcopy=False, states=(states.COMPLETE, states.FAIL))) + len(waiting)
        for _ in range(min(settings["n_jobs"] - len(waiting), settings["n_trials"] - asked)):
            study.sampler = make_sampler(len(study.get_trials(deepcopy=False)))
            trial = _ask(study, space)
            waiting.append((trial.number, trial.params))
        if not waiting:
            return
        batch, waiting = waiting[: settings["n_jobs"]], waiting[settings["n_jobs"] :]
        jobs = [[*fixed, *(f"{key}={_format(value)}" for key, value in params.items())] for _, params in batch]
        for (number, _), job in zip(batch, launcher.launch(jobs, initial_job_idx=batch[0][0])):
            try:
                value = job.return_value
            except JobFailed as error:
                if error.status == 2:  # a wrong configuration; tried again when that is mended
                    raise
                study.tell(number, state=states.FAIL)  # it diverged, say
                continue
            require(
                value is not None,
                "method",
                expected="one that answers without the task, since a search compares Class-IL accuracies",
                got="no Class-IL accuracy",
                fix="Choose another method, or sweep without the sweeper and compare by Task-IL.",
            )
            study.tell(number, value)


def _ask(study: Any, space: dict[str, Any]) -> Any:
    try:
        return study.ask(space)
    except ValueError as error:  # a study cannot change the values of a choice
        raise ConfigError(
            "hydra.sweeper.study_name",
            expected="the name of a search of the same values",
            got=study.study_name,
            fix=f"Choose another name. {_format_error(error)}",
        ) from error


def choose_sampler(optuna: Any, settings: DictConfig) -> Callable[[int], Any]:
    """A function: number of a trial -> the sampler that draws it."""
    kinds = {"tpe": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}
    kind, seed = settings["kind"], settings["seed"]
    require(
        kind in kinds, "hydra.sweeper.sampler.kind", expected=" or ".join(kinds), got=kind, fix="tpe is the default."
    )
    return lambda number: kinds[kind](seed=int(np.random.SeedSequence([seed, number]).generate_state(1)[0]))


def read_space(optuna: Any, *overrides: list[str]) -> tuple[dict[str, Any], list[str]]:
    """The distribution of each searched key, and the other overrides; of two for one key the later one counts."""
    space: dict[str, Any] = {}
    fixed: dict[str, str] = {}
    parser = OverridesParser.create()
    for override in parser.parse_overrides([text for part in overrides for text in part]):
        key = override.get_key_element()
        space.pop(key, None)
        fixed.pop(key, None)
        if override.is_sweep_override():
            check_searched_values(override)
            space[key] = make_distribution(optuna, override)
        else:
            fixed[key] = override.input_line or ""
    return space, list(fixed.values())


def make_distribution(optuna: Any, override: Override) -> Any:
    """The values of an override as Optuna's distribution: a choice, a range or an interval."""
    value, kinds = override.value(), optuna.distributions
    if isinstance(value, IntervalSweep):
        whole = isinstance(value.start, int) and isinstance(value.end, int)
        kind = kinds.IntDistribution if whole else kinds.FloatDistribution
        return kind(value.start, value.end, log="log" in value.tags)
    values: list[Any] = list(override.sweep_iterator(transformer=Transformer.encode))
    if not isinstance(value, RangeSweep) or value.shuffle:
        return kinds.CategoricalDistribution(values)
    kind = kinds.IntDistribution if all(isinstance(number, int) for number in values) else kinds.FloatDistribution
    return kind(min(values), max(values), step=abs(value.step))


def _format(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _name_study(config: DictConfig, space: dict[str, Any], fixed: list[str]) -> str:
    """The experiment, and a hash of what is searched and of the other overrides: the same command, the same study."""
    settings = sorted(text for text in fixed if not {key := split_override(text)[0], key.split(".")[0]} & NEUTRAL)
    sampler = OmegaConf.to_container(config.hydra.sweeper.sampler)
    facts = json.dumps([{key: repr(space[key]) for key in sorted(space)}, settings, sampler], sort_keys=True)
    return f"{config.experiment}-{hashlib.sha256(facts.encode()).hexdigest()[:10]}"


def _write_results(study: Any, folder: Path, measure: str) -> None:
    """``trials.csv`` and ``trials.png``; prints the best trial."""
    trials = [
        {"number": trial.number, "state": trial.state.name.lower(), "value": trial.value, **trial.params}
        for trial in study.get_trials(deepcopy=False)
    ]
    write_trials(trials, folder, measure)
    complete = [trial for trial in trials if trial["value"] is not None]
    if complete:
        best = max(complete, key=lambda trial: trial["value"])
        words = " ".join(f"{key}={_format(best[key])}" for key in best if key not in ("number", "state", "value"))
        print(f"Best of {len(complete)} trials: {best['value']:.2f} with {words}")
    print(f"Trials: {folder / 'trials.csv'}, {folder / 'trials.png'}", flush=True)
