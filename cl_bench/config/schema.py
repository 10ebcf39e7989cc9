"""The typed top level of a configuration, and the check of every component against its constructor.

A component's keys and types are those of its constructor, so no schema is written twice.
"""

import dataclasses
import difflib
import functools
import hashlib
import importlib
import inspect
import json
import math
import os
import re
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Literal

from hydra import compose, initialize_config_dir
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from cl_bench.config.packages import find_beside, find_installed
from cl_bench.core.errors import ConfigError, find_config_error

PACKAGE = Path(__file__).parent.parent
CONFIGS = PACKAGE / "configs" if (PACKAGE / "configs").is_dir() else PACKAGE.parent / "configs"
"""The configuration folder: inside the package when installed from a wheel, beside it in a checkout."""

ALLOWED_PACKAGES = ("cl_bench", "torch.optim")
"""Packages whose own classes and functions a ``_target_`` may name (decision 15). ``allow_packages`` adds more, and so
does a package that the user has installed or whose folder he has typed (decision 29)."""

VARIABLES = "CL_BENCH_"
"""A configuration may read only environment variables with this prefix."""

INCOMPARABLE = (
    "seed", "experiment", "name", "scale", "device", "images", "results_dir", "data_dir", "overwrite", "dry_run",
    "published", "allow_packages", "choices", "logger", "metrics", "class_order_seed", "data_seed", "label", "threads",
    "report",
    "scenario.source.root", "scenario.root", "scenario.source.cache", "scenario.source.download",
    "trainer.checkpoint_seconds", "trainer.checkpoint_steps", "trainer.speed", "trainer.replicas",
    "trainer.cudnn_benchmark", "trainer.keep_tasks",
)  # fmt: skip
"""Keys in which two runs of one row may differ: they change no result, or, like ``seed``, a row averages over them.
The two scenario seeds count under the keys where they are used, ``scenario.class_order_seed`` and
``scenario.data_seed``."""


_BY_NAME = re.compile(r"\.sources\.[^.]+\.")
"""In ``scenario.source.sources.NAME.root``, what such a key has beside ``scenario.source.root``."""

OLD_PATHS = {"cl_bench.engine.trainer.Settings": "cl_bench.trainer.Settings"}
"""New path -> old path of each component that has moved. A fingerprint uses the old path, and a ``_target_`` may still
name it. So older runs stay in their row, are found as finished, and can be audited. If you move a component, add it."""

LATER_KEYS = {
    "method.finetune_steps": None,
    "method.batch_size": "${trainer.batch_size}",
    "method.mean_over": "seen",
    "method.loss": "joint",
    "method.loss_classes": "all",
    "method.replay_current_task": True,
    "method.rehearsal": "all",
    "method.rehearsal_size": 32,
    "method.review": False,
    "trainer.cudnn_benchmark": False,
    "trainer.keep_tasks": False,
    "trainer.max_steps": None,
    "trainer.steps_per_batch": 1,
    "trainer.evaluate_after": "each_task",
    "trainer.evaluate_every": None,
    "trainer.evaluate_sample": 100,
    "trainer.alternatives": True,
    "trainer.linear_probe": False,
    "backbone.weights": None,
    "scenario.val_choice": "random",
    "scenario.normalisation": "standard",
    "scenario.disjoint.val_choice": "random",
    "scenario.disjoint.normalisation": "standard",
    "scenario.source.test_fraction": 0.0,
    "scenario.source.split_seed": 0,
    "scenario.blurry": 0.0,
    "scenario.blurry_classes": 1.0,
    "scenario.repeat": 0.0,
    "scenario.disjoint.blurry": 0.0,
    "scenario.disjoint.blurry_classes": 1.0,
    "scenario.disjoint.repeat": 0.0,
    "backbone.head": "linear",
    "backbone.reads": None,
    "backbone.variant": "standard",
    "backbone.norm": "none",
    "backbone.init": "default",
    "logger.wandb.notes": None,
    "logger.wandb.job_type": None,
}
"""Keys that were added after runs had been recorded, with the value that keeps the old behaviour. A fingerprint leaves
out a key with this value, and a ``config.yaml`` without the key gets it. So older runs stay in their row and can be
read."""

LATER_KEYS_OF = {"cl_bench.scenarios.detection.Detection": {"scenario.val_fraction": 0.0}}
"""The same by ``_target_``, for keys that other variants of the group had from the start."""

FILES = ("backbone.checkpoint", "backbone.weights")
"""Keys that name a file. What makes two runs comparable is its content, not its name."""

STEP_KEYS = (
    "optimizer", "schedule", "trainer.epochs", "trainer.batch_size", "trainer.max_steps", "trainer.steps_per_batch",
    "trainer.clip_norm", "trainer.checkpoint_seconds", "trainer.checkpoint_steps",
)  # fmt: skip
"""Keys and groups that only a training step reads, or a checkpoint between steps."""

GROUP_KEYS: dict[str, dict[str, Any]] = {"backbone": {"weights": str | None}}
"""Keys that every variant of a group has beside its constructor's, with their types; build.py uses them itself."""


class Precision(Enum):
    """Number format of forward and backward passes; weights are always fp32."""

    fp32 = "fp32"
    bf16 = "bf16"


class Images(Enum):
    """Where the images are kept: on the training device, or on the host, which sends them batch by batch."""

    auto = "auto"
    device = "device"
    host = "host"


@dataclass
class Run:
    """All top-level keys of a configuration; :func:`read_arguments` checks the keys of each group."""

    experiment: str = MISSING
    name: str = MISSING
    label: str | None = None
    scale: str | None = None
    seed: int = MISSING
    class_order_seed: int = MISSING
    data_seed: int = MISSING
    device: str = MISSING
    threads: Any = "auto"
    report: bool = True
    precision: Precision = MISSING
    images: Images = MISSING
    results_dir: str = MISSING
    data_dir: str = MISSING
    overwrite: bool = MISSING
    dry_run: bool = MISSING
    published: dict[str, Any] | None = None
    allow_packages: list[str] = field(default_factory=list)
    choices: dict[str, str] = field(default_factory=dict)
    scenario: dict[str, Any] = field(default_factory=dict)
    method: dict[str, Any] = field(default_factory=dict)
    backbone: dict[str, Any] = field(default_factory=lambda: {"weights": None})
    buffer: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    schedule: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, str] = field(default_factory=dict)
    logger: dict[str, Any] = field(default_factory=dict)


ConfigStore.instance().store("run", Run)


def _choose_by_scale(options: dict[str, Any], *, _root_: DictConfig) -> Any:
    chosen = options.get(_root_.scale, options["full"])
    # OmegaConf's own types: --cfg job --resolve could not replace the expression by a plain list
    return OmegaConf.create(chosen) if isinstance(chosen, (dict, list)) else chosen


# In a YAML file ${by_scale:{full:64,mini:20}} is 64, or 20 with +scale=mini: each part states its own small size.
OmegaConf.register_new_resolver("by_scale", _choose_by_scale, replace=True)


class InstalledPackages(SearchPathPlugin):
    """Lets Hydra find the files of installed packages, after our own: they add choices and replace none.

    Launchers and sweepers of the same name as one of our files give way to it. Hydra would merge both, and warn.
    """

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Called by Hydra for every command, after its plugins have registered what they offer."""
        offered = ConfigStore.instance().repo.get("hydra", {})
        for file in CONFIGS.glob("hydra/*/*.yaml"):
            offered.get(file.parent.name, {}).pop(file.name, None)
        for name, folder in find_installed().items():
            search_path.append(provider=name, path=f"file://{folder}")


Plugins.instance().register(InstalledPackages)


def compose_config(overrides: Sequence[str], config_dir: str | Path | None = None) -> DictConfig:
    """The configuration that the command would use for these overrides; for any other program.

    Args:
        overrides: as they would be typed.
        config_dir: a folder with YAML files of one's own, as ``--config-dir``.
    """
    GlobalHydra.instance().clear()
    search = [f"hydra.searchpath=[file://{Path(config_dir).resolve()}]"] if config_dir is not None else []
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
        config = compose("config", overrides=[*search, *overrides], return_hydra_config=True)
    HydraConfig.instance().set_config(config)
    with open_dict(config):
        del config.hydra
    if config_dir is not None:
        allow_package_of(config, config_dir)
    return config


def allow_package_of(config: DictConfig, config_dir: str | Path) -> None:
    """Allow the package whose folder of configuration files the user has typed, if it is the folder of a package."""
    package = find_beside(config_dir)
    if package is not None and package not in config.allow_packages:
        config.allow_packages = [*config.allow_packages, package]


def allow_typed_package(config: DictConfig) -> None:
    """The same for ``--config-dir`` of the command that this job belongs to. A file cannot set it."""
    for source in HydraConfig.get().runtime.config_sources:
        if source.provider == "command-line" and source.schema == "file":
            allow_package_of(config, source.path)


def list_typed_overrides() -> list[str]:
    """The overrides of this job as they were typed; Hydra's list itself would resolve their interpolations."""
    typed = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
    assert isinstance(typed, list)
    return [str(text) for text in typed]


def split_override(text: str) -> tuple[str, str]:
    """Key and value of an override as typed, without the ``+`` or ``~`` before the key."""
    key, _, value = text.partition("=")
    return key.lstrip("+~"), value


def _read_variable(name: str, *default: str | None) -> str | None:
    if not name.startswith(VARIABLES):  # config.yaml, reports and logs would show the value (decision 15)
        raise ConfigError(
            "oc.env",
            expected=f"an environment variable whose name begins with {VARIABLES}",
            got=name,
            fix=f"Write the value itself, or export {VARIABLES}{name} if it is no secret.",
        )
    if name in os.environ:
        return os.environ[name]
    if not default:
        raise ConfigError(
            "oc.env", expected=f"the environment variable {name}", got="nothing", fix=f"export {name}=VALUE first."
        )
    return default[0]


OmegaConf.register_new_resolver("oc.env", _read_variable, replace=True)


def import_target(node: DictConfig, key: str, allow_packages: list[str]) -> Callable[..., Any]:
    """The class or function that ``node._target_`` names; its package must be allowed, else nothing is imported."""
    path = node.get("_target_") if isinstance(node, DictConfig) else None
    if not isinstance(path, str):
        raise ConfigError(
            f"{key}._target_",
            expected="the dotted path of a class or function",
            got=path,
            fix=f"Choose one: {key}=NAME.",
        )
    return import_allowed(path, f"{key}._target_", allow_packages)


def import_allowed(path: str, key: str, allow_packages: list[str]) -> Callable[..., Any]:
    """The class or function at a dotted path. An allowed package must define it; what it only imports is refused."""
    allowed = (*ALLOWED_PACKAGES, *allow_packages)
    if not _is_inside(path, allowed):
        allowed = (*allowed, *find_installed())
    if not _is_inside(path, allowed):
        raise ConfigError(
            key,
            expected=f"something in one of the packages {', '.join(allowed)}",
            got=path,
            fix=f"If you trust it, add 'allow_packages=[{path.split('.')[0]}]'.",
        )
    now = {old: new for new, old in OLD_PATHS.items()}.get(path, path)
    module, _, name = now.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, ValueError, AttributeError) as error:
        raise ConfigError(
            key, expected="the dotted path of a class or function", got=path, fix=f"It cannot be loaded: {error}."
        ) from error
    if not (inspect.isclass(found) or inspect.isfunction(found)):
        raise ConfigError(key, expected="a class or function", got=path, fix="Name the class, not its module.")
    if not _is_inside(found.__module__, allowed):
        raise ConfigError(
            key,
            expected=f"something that one of the packages {', '.join(allowed)} defines itself",
            got=f"{path}, which is defined in {found.__module__}",
            fix="Name another class, or write one of your own.",
        )
    return found


def _is_inside(path: str, packages: Iterable[str]) -> bool:
    return any(path == package or path.startswith(f"{package}.") for package in packages)


def read_arguments(
    node: DictConfig, key: str, built: Callable[..., Any], runtime: typing.Collection[str]
) -> dict[str, Any]:
    """The configured arguments of ``built``, checked against its signature, and the keys of its group.

    Args:
        node: the component's configuration.
        key: its key, for messages.
        built: the class or function that it names.
        runtime: names of arguments that are passed when it is built and may not be configured.

    Raises:
        ConfigError: an unknown or missing key, or a value of another type.
    """
    parameters = {
        name: parameter
        for name, parameter in inspect.signature(built).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY or (parameter.default is not parameter.empty and name != "self")
    }
    of_group = GROUP_KEYS.get(key, {})
    configurable = {name for name in parameters if name not in runtime} | set(of_group)
    hints = typing.get_type_hints(built.__init__ if inspect.isclass(built) else built) | of_group
    later_keys = LATER_KEYS | LATER_KEYS_OF.get(str(node.get("_target_")), {})
    with open_dict(node):
        for later in sorted(configurable - set(map(str, node))):
            if f"{key}.{later}" in later_keys:
                node[later] = later_keys[f"{key}.{later}"]
    values: dict[str, Any] = {}
    for name in node:
        name = str(name)
        if name == "_target_":
            continue
        if name not in configurable:
            close = difflib.get_close_matches(name, configurable, n=1)
            raise ConfigError(
                f"{key}.{name}",
                expected=f"one of the keys {', '.join(sorted(configurable)) or '(none)'}",
                got=f"the unknown key {name}",
                fix=f"Did you mean {key}.{close[0]}?" if close else "Remove it.",
            )
        values[name] = convert(_resolve(node, name, f"{key}.{name}"), hints.get(name, Any), f"{key}.{name}")
    for name in sorted(configurable - set(values)):
        if parameters[name].default is inspect.Parameter.empty:
            raise ConfigError(f"{key}.{name}", expected="a value", got="nothing", fix=f"Set {key}.{name}=VALUE.")
    return values


def find_unread(overrides: Iterable[str], config: DictConfig) -> list[str]:
    """The overrides that only a step reads (:data:`STEP_KEYS`), if the method of ``config`` takes none.

    A key that another key refers to is not among them.
    """
    method = import_target(config.method, "method", list(config.allow_packages))
    if not getattr(method, "gradient_free", False):
        return []
    text = OmegaConf.to_yaml(config)
    keys = ((override, split_override(override)[0]) for override in overrides)
    return [o for o, key in keys if _is_inside(key, STEP_KEYS) and f"${{{key}}}" not in text]


def refuse_unread(config: DictConfig) -> None:
    """Refuse what was typed of steps if the method takes none. A value in a file may have no effect."""
    name = OmegaConf.select(config, "choices.method")
    if not HydraConfig.initialized() or HydraConfig.get().runtime.choices.get("method") != name:
        return  # the configuration of a finished run: nothing of it was typed in this process
    for override in find_unread(list_typed_overrides(), config):
        key, value = split_override(override)
        expected = f"no value, since method={name} takes no training step"
        raise ConfigError(key, expected=expected, got=value, fix="Leave it out.")


def refuse_void(node: DictConfig, key: str, built: Callable[..., Any], values: dict[str, Any]) -> None:
    """Refuse a key that was typed on the command line but has no effect with the other ``values`` of ``built``.

    A value in a file may have no effect: it may be a default or belong to an experiment. A key that another key refers
    to is not refused either.
    """
    raw, config = OmegaConf.to_container(node, resolve=False), node._get_root()
    assert isinstance(raw, dict)
    given = set()
    if HydraConfig.initialized():
        given = {split_override(text)[0] for text in list_typed_overrides()}
    for argument, when, why in vars(built).get("void", ()):
        whole = f"{key}.{argument}"
        names = {whole, str(raw.get(argument)).strip("${}")} & given
        if names and when(values | {"config": config}) and f"${{{whole}}}" not in OmegaConf.to_yaml(config):
            name = min(names)
            raise ConfigError(name, expected=f"no value, since {why}", got=values[argument], fix="Leave it out.")


def convert(value: Any, hint: Any, key: str) -> Any:
    """``value`` converted by OmegaConf to the annotation ``hint``; stricter than OmegaConf about numbers."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(key, expected="a finite number", got=value, fix="Correct the value.")
    if any(isinstance(number, int) and abs(number) >= 2**63 for number in _list_numbers(value)):
        raise ConfigError(key, expected="whole numbers of 64 bits", got=value, fix="Correct the value.")
    if hint is bool and not isinstance(value, bool):
        raise ConfigError(key, expected="true or false", got=value, fix="Choose one of them.")
    if typing.get_origin(hint) is Literal:
        options = typing.get_args(hint)
        if value not in options:
            raise ConfigError(
                key, expected=f"one of {', '.join(map(str, options))}", got=value, fix="Choose one of them."
            )
        return value
    hint = _find_omegaconf_type(hint)
    try:
        config = OmegaConf.merge(_make_holder(hint), {"value": value})
        return OmegaConf.to_container(config)["value"]  # type: ignore[index, call-overload]
    except OmegaConfBaseException as error:
        name = getattr(hint, "__name__", str(hint)) if typing.get_origin(hint) is None else str(hint)
        raise ConfigError(
            key, expected=f"a value of type {name.replace('typing.', '')}", got=value, fix="Correct the value."
        ) from error


@functools.cache  # each run asks for some fifty, of few types
def _make_holder(hint: Any) -> Any:
    """A configuration whose ``value`` has this type."""
    return OmegaConf.structured(dataclasses.make_dataclass("Holder", [("value", hint, field(default=MISSING))]))


def _list_numbers(value: Any) -> list[Any]:
    return [number for item in value for number in _list_numbers(item)] if isinstance(value, list) else [value]


def _find_omegaconf_type(hint: Any) -> Any:
    """The part of an annotation that OmegaConf can check; Any if there is none."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        members = typing.get_args(hint)
        known = [m for m in map(_find_omegaconf_type, members) if m not in (Any, type(None))]
        if len(known) != 1:
            return Any
        return known[0] | None if type(None) in members else known[0]
    if hint in (int, float, str, bool) or hint in (list[int], list[float], list[str]):
        return hint
    return type(None) if hint is type(None) else Any


def _resolve(node: DictConfig, name: str, key: str) -> Any:
    """One value as plain Python, with its interpolations resolved."""
    try:
        value = node[name]
    except OmegaConfBaseException as error:
        if ours := find_config_error(error):  # raised by a resolver
            raise ConfigError(key, expected=ours.expected, got=ours.got, fix=ours.fix) from error
        reason = str(error).splitlines()[0]
        raise ConfigError(key, expected="a value", got=reason, fix=f"Set {key}=VALUE.") from error
    return OmegaConf.to_container(value, resolve=True) if isinstance(value, (DictConfig, ListConfig)) else value


def to_plain_dict(config: DictConfig) -> dict[str, Any]:
    """The whole resolved configuration as plain values, as ``config.yaml`` records it."""
    for name in (f.name for f in dataclasses.fields(Run)):
        if name not in config:
            raise ConfigError(name, expected="a value", got="nothing", fix=f"Do not remove {name}, or set it.")
    resolved = OmegaConf.to_container(config, resolve=True, enum_to_str=True, throw_on_missing=True)
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


def select_comparable(config: dict[str, Any]) -> dict[str, Any]:
    """The settings that two comparable runs share: flat keys and values, without :data:`INCOMPARABLE`.

    If the settings do not say what the images are, :func:`cl_bench.config.build.identify_run` adds a digest of them.
    """
    flat: dict[str, Any] = {}

    def visit(prefix: str, value: Any) -> None:
        if _BY_NAME.sub(".", prefix) in INCOMPARABLE:
            return
        if prefix in FILES and isinstance(value, str):
            value = _hash_content(value)
        if isinstance(value, dict):
            for key, inner in value.items():
                visit(f"{prefix}.{key}" if prefix else str(key), inner)
        else:
            flat[prefix] = value

    visit("", config)
    for key, value in (LATER_KEYS | LATER_KEYS_OF.get(str(flat.get("scenario._target_")), {})).items():
        as_before = flat.get(value[2:-1]) if isinstance(value, str) and value.startswith("${") else value
        if key in flat and flat[key] == as_before:
            del flat[key]
    return {key: OLD_PATHS.get(value, value) if isinstance(value, str) else value for key, value in flat.items()}


def _hash_content(file: str) -> str:
    """The hash of a file's content. A file that cannot be read gives its name: it is refused when it is needed."""
    try:
        with open(file, "rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()
    except (OSError, ValueError):
        return file


def compute_fingerprint(settings: dict[str, Any]) -> str:
    """The fingerprint of comparable settings: ten hexadecimal digits of their hash."""
    canonical = json.dumps(settings, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:10]
