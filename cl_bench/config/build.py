"""The objects of a run, built from its configuration. Runtime objects are passed in here and are never configured."""

import inspect
import random
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig

from cl_bench.backbones.base import Backbone, SingleHead, check_single_images
from cl_bench.buffers.base import Buffer, Context, OnlineBuffer, PerClassBuffer
from cl_bench.config.schema import (
    Precision,
    import_allowed,
    import_target,
    read_arguments,
    refuse_unread,
    refuse_void,
    select_comparable,
)
from cl_bench.core.errors import ConfigError, require
from cl_bench.core.record import Curve, Matrix, takes_curve
from cl_bench.data.base import is_fixed_by_settings
from cl_bench.engine.checkpoint import Checkpoint, check_weights, load_network
from cl_bench.engine.step import find_obstacle_to_graphs
from cl_bench.engine.trainer import Settings, Trainer
from cl_bench.loggers.base import Logger
from cl_bench.methods.base import Method
from cl_bench.methods.detection import Detector
from cl_bench.scenarios.base import Scenario
from cl_bench.system.memory import is_out_of_memory


@dataclass(frozen=True)
class Parts:
    """The objects that a configuration builds, except the loggers."""

    scenario: Scenario
    method: Method
    buffer: Buffer
    optimizer: Any
    schedule: Any
    settings: Settings
    metrics: Mapping[str, Any]
    generators: dict[str, torch.Generator]
    device: torch.device
    autocast: torch.autocast

    def build_trainer(self, logger: Logger, checkpoint: Checkpoint, stop: Callable[[], bool]) -> Trainer:
        """The training loop over these parts."""
        return Trainer(
            method=self.method,
            scenario=self.scenario,
            settings=self.settings,
            optimizer=self.optimizer,
            schedule=self.schedule,
            generators=self.generators,
            device=self.device,
            autocast=self.autocast,
            logger=logger,
            checkpoint=checkpoint,
            stop=stop,
        )

    def describe(self) -> dict[str, Any]:
        """The entries of ``summary.json`` about the scenario and how it is measured."""
        return {
            "class_order": list(self.scenario.class_order),
            "class_names": list(self.scenario.class_names),
            "data": self.scenario.data,
            "tasks": [self.scenario.list_class_ids(task) for task in self.scenario.tasks],
            "shared_labels": self.scenario.shared_labels,
            "recurring_classes": self.scenario.recurring,
            "follows_seed": self.scenario.follows_seed,
            "evaluate_on": self.settings.evaluate_on,
            "images": self.scenario.storage,
            "measure": self.scenario.measure,
            "test_batches": self.method.test_batches,
        }


def build(config: DictConfig, scenario: Scenario | None = None) -> Parts:
    """All parts of a run, checked and built.

    Args:
        config: the composed configuration.
        scenario: built before by the same configuration, to be used again.

    Raises:
        ConfigError: the first thing that is wrong.
    """
    allow = list(config.allow_packages)
    device = choose_device(config.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # a checkpoint saves the generator of the current device
    generators = seed_everything(config.seed)
    settings, schedule, optimizer, metrics, (make_net, make_buffer, make_method) = _build_cheap_parts(config, allow)
    torch.backends.cudnn.benchmark = settings.cudnn_benchmark

    scenario = scenario or build_scenario(config)
    if scenario.storage is None:
        scenario.to(device, config.images.value)
    if settings.evaluate_on == "val" and not len(scenario.tasks[0].val):
        raise ConfigError(
            "trainer.evaluate_on",
            expected="test, since no validation images are held out",
            got="val",
            fix="Set scenario.val_fraction=0.1 as well.",
        )
    shared: dict[str, Any] = {"num_classes": scenario.num_classes, "image_shape": scenario.image_shape}
    transform = scenario.transform

    def make_network() -> Backbone:
        return make_net(image_mean=transform.mean, image_std=transform.std, **shared).to(device)

    net = make_network()
    if settings.batch_size == 1:
        check_single_images(net, scenario.image_shape, "trainer.batch_size")
    pairs = sum(len(task.classes) + len(task.other_classes) for task in scenario.tasks)
    context = Context(
        transform=transform,
        generator=generators["buffer"],
        device=device,
        pairs=pairs,
        target_shape=scenario.target_shape,
        num_tasks=len(scenario.tasks),
        **shared,
    )
    buffer = make_buffer(context=context)
    _refuse_other_targets(config, allow, scenario, buffer, settings)
    _refuse_unsuitable(config, allow, net, buffer)
    parts = {"net": net, "buffer": buffer, "scenario": scenario, "make_net": make_network, "make_optimizer": optimizer}
    method = make_method(**parts).to(device)
    weights = config.backbone.get("weights")
    require(
        weights is None or not method.draws_weights,
        "backbone.weights",
        expected="null, since this method draws the weights of its network itself",
        got=weights,
        fix="Leave it out.",
    )
    if scenario.shared_labels or scenario.recurring:
        _refuse_disjoint(config, scenario, method, buffer)
    _refuse_graphs(settings, method, device)
    if method.own_loop:
        _refuse_steps(config, settings)
    optimizer([torch.nn.Parameter(torch.zeros(1, device=device))])  # torch checks the values when it builds one
    precision = torch.bfloat16 if config.precision is Precision.bf16 else torch.float32
    autocast = torch.autocast(device.type, dtype=precision, enabled=precision is torch.bfloat16)
    return Parts(
        scenario=scenario,
        method=method,
        buffer=buffer,
        optimizer=optimizer,
        schedule=schedule,
        settings=settings,
        metrics=metrics,
        generators=generators,
        device=device,
        autocast=autocast,
    )


def _build_cheap_parts(config: DictConfig, allow: list[str]) -> tuple[Settings, Any, Any, dict[str, Any], list[Any]]:
    """The parts that are built first, so that a wrong key is reported before the data set is read."""
    settings = build_component(config.trainer, "trainer", allow, KINDS["trainer"])
    schedule = build_component(config.schedule, "schedule", allow, KINDS["schedule"])
    optimizer = prepare_component(config.optimizer, "optimizer", allow, KINDS["optimizer"])
    metrics = {str(name): load_metric(path, f"metrics.{name}", allow) for name, path in config.metrics.items()}
    for name, metric in metrics.items():
        require(
            settings.evaluate_every is not None or not takes_curve(metric),
            f"metrics.{name}",
            expected="a metric of the accuracy matrix, since nothing is measured while learning",
            got="a metric of the curve",
            fix="Add trainer.evaluate_every=100, or choose metrics=standard.",
        )
    makers = [
        prepare_component(config[group], group, allow, KINDS[group]) for group in ("backbone", "buffer", "method")
    ]
    refuse_unread(config)
    return settings, schedule, optimizer, metrics, makers


def build_scenario(config: DictConfig) -> Scenario:
    """The scenario alone; its images are not on the device yet."""
    return build_component(config.scenario, "scenario", list(config.allow_packages), KINDS["scenario"])


def find_measure(config: DictConfig) -> str:
    """:attr:`Scenario.measure` of the scenario that would be built."""
    built = import_target(config.scenario, "scenario", list(config.allow_packages))
    return getattr(built, "measure", Scenario.measure)


def identify_run(
    config: DictConfig, values: dict[str, Any], scenario: Scenario | None = None
) -> tuple[dict[str, Any], Scenario | None]:
    """The settings that make a run comparable with others, and a digest of its images if no setting determines them.

    Args:
        values: the configuration as plain values.
        scenario: built before by the same configuration.

    Returns:
        The settings, with the digest as ``data``; and the scenario, None if it was not needed.
    """
    settings, allow = select_comparable(values), list(config.allow_packages)
    if not _is_fixed_by_settings(values["scenario"], allow):
        if scenario is None:
            choose_device(config.device)
            _build_cheap_parts(config, allow)  # for its checks, before pictures are decoded for minutes
            scenario = build_scenario(config)
        settings["data"] = scenario.data
    return settings, scenario


def _is_fixed_by_settings(node: Any, allow: list[str]) -> bool:
    """Whether the settings of this part of the scenario, and of every part below it, determine the images."""
    path = node.get("_target_") if isinstance(node, dict) else None
    if not isinstance(path, str) or not is_fixed_by_settings(import_allowed(path, "scenario._target_", allow)):
        return False
    below = [part for part in node.values() if isinstance(part, dict) and "_target_" in part]
    return all(_is_fixed_by_settings(part, allow) for part in below)


RUNTIME: dict[str, tuple[str, ...]] = {
    "scenario": ("run_seed",),
    "backbone": ("num_classes", "image_shape", "image_mean", "image_std"),
    "buffer": ("context",),
    "method": ("net", "buffer", "scenario", "make_net", "make_optimizer"),
    "optimizer": ("params",),
}
"""The constructor arguments of each group that are runtime objects."""

CONSTANT = "cl_bench.optim.Constant"
"""The schedule that changes nothing."""

KINDS: dict[str, type] = {
    "scenario": Scenario,
    "backbone": Backbone,
    "buffer": Buffer,
    "method": Method,
    "optimizer": torch.optim.Optimizer,
    "schedule": Callable,  # type: ignore[dict-item]  # (epoch, epochs) -> factor
    "trainer": Settings,
    "logger": Logger,
}
"""The type that each group builds; anything else is refused before it is called."""


def build_component(node: DictConfig, key: str, allow: list[str], kind: type) -> Any:
    """The object of type ``kind`` that ``node`` describes; nested nodes are built first."""
    return prepare_component(node, key, allow, kind)()


def prepare_component(node: DictConfig, key: str, allow: list[str], kind: type) -> Any:
    """A function that builds what ``node`` describes from its runtime objects; the node is checked now."""
    built = import_target(node, key, allow)
    _refuse_other_kinds(built, key, node._target_, kind)
    if inspect.isabstract(built):
        raise ConfigError(
            f"{key}._target_",
            expected="a class that can be built",
            got=f"{node._target_}, which is abstract",
            fix=f"Choose one: {key}=NAME.",
        )
    parameters = inspect.signature(built).parameters
    values = read_arguments(node, key, built, RUNTIME.get("scenario" if kind is Scenario else key, ()))
    refuse_void(node, key, built, values)
    weights = values.pop("weights") if key == "backbone" else None
    if weights is not None:
        check_weights(weights)
    for name, value in values.items():
        if isinstance(node[name], DictConfig) and "_target_" in node[name]:
            values[name] = value = build_component(node[name], f"{key}.{name}", allow, parameters[name].annotation)
        elif (inner := _find_kind_of_values(parameters[name].annotation)) and isinstance(node[name], DictConfig):
            below = {str(part): node[name][part] for part in node[name]}
            values[name] = {part: build_component(n, f"{key}.{name}.{part}", allow, inner) for part, n in below.items()}
        expected_kind = parameters[name].annotation
        ours = inspect.isclass(expected_kind) and expected_kind.__module__.startswith("cl_bench.")
        if ours and not isinstance(value, expected_kind):
            raise ConfigError(
                f"{key}.{name}",
                expected=f"a node that builds {expected_kind.__name__}",
                got=value,
                fix=f"Leave {key}.{name} as it was.",
            )
    root = node._get_root()
    if kind is Scenario and "run_seed" in parameters and isinstance(root, DictConfig):  # also inside another scenario
        values["run_seed"] = root.seed

    def make(*positional: Any, **runtime: Any) -> Any:
        accepted = {name: value for name, value in runtime.items() if name in parameters}
        try:
            made = built(*positional, **values, **accepted)
            if weights is not None:
                load_network(made, weights)
            return made
        except ConfigError as error:
            # A component knows only its own keys. An error of a nested one has its whole key already.
            raise error.under(key) if error.key.split("[")[0].split(".")[0] in values else error from None
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise ConfigError(
                key,
                expected="sizes that fit into this machine's memory",
                got=str(error).splitlines()[0],
                fix=f"Lower the sizes of {key}; dry_run=true prints what a run needs.",
            ) from error

    return make


def _find_kind_of_values(annotation: Any) -> type | None:
    """The class of ours that ``dict[str, class]`` names: such an argument is built from nodes by name; else None."""
    inner = typing.get_args(annotation)[1] if typing.get_origin(annotation) is dict else None
    return inner if inspect.isclass(inner) and inner.__module__.startswith("cl_bench.") else None


def _refuse_other_kinds(built: Callable[..., Any], key: str, path: str, kind: type) -> None:
    """Refuse a class, or a function by the annotation of its result, that is not of the expected ``kind``."""
    made = built if inspect.isclass(built) else typing.get_type_hints(built).get("return")
    if not (inspect.isclass(made) and inspect.isclass(kind) and issubclass(made, kind)):
        raise ConfigError(
            f"{key}._target_",
            expected=f"something that builds {getattr(kind, '__name__', kind)}",
            got=path,
            fix=f"Choose one: {key.split('.')[0]}=NAME.",
        )


def load_metric(path: str, key: str, allow: list[str]) -> Callable[..., float]:
    """The metric at a dotted path: a function annotated to take an accuracy matrix or a curve and return a number."""
    found = import_allowed(path, key, allow)
    hints = {} if inspect.isclass(found) else typing.get_type_hints(found)
    if hints.pop("return", None) is not float or list(hints.values()) not in ([Matrix], [Curve]):
        raise ConfigError(
            key,
            expected="a function annotated (matrix: cl_bench.core.record.Matrix) -> float, or (curve: ...Curve)",
            got=path,
            fix="See cl_bench/metrics.",
        )
    return found


def _refuse_unsuitable(config: DictConfig, allow: list[str], net: Backbone, buffer: Buffer) -> None:
    """Refuse a network or buffer that the annotations of the method's constructor exclude."""
    signature = inspect.signature(import_target(config.method, "method", allow)).parameters
    kind = signature["net"].annotation if "net" in signature else Backbone
    if not isinstance(net, kind):
        suits = "resnet18" if kind is SingleHead else kind.__module__.rpartition(".")[2]
        raise ConfigError(
            "backbone",
            expected=f"a network of kind {kind.__name__}, which method={config.choices.method} needs",
            got=config.choices.backbone,
            fix=f"Use backbone={suits}, or another method.",
        )
    kind = signature["buffer"].annotation if "buffer" in signature else Buffer
    if "buffer" in signature and buffer.capacity == 0 and kind != (Buffer | None):
        raise ConfigError(
            "buffer",
            expected=f"a buffer with a capacity, which method={config.choices.method} replays from",
            got=config.choices.buffer,
            fix="Use buffer=reservoir, or method=finetune to train without a buffer.",
        )
    if not isinstance(buffer, kind):
        fixes = {
            PerClassBuffer: "Use buffer=herding or buffer=fixed_memory, which keep images of every class.",
            OnlineBuffer: "Use buffer=greedy, class_balanced or reservoir, which are filled while a task is learned.",
        }
        raise ConfigError(
            "buffer",
            expected=f"a buffer of kind {kind.__name__}, which method={config.choices.method} needs",
            got=config.choices.buffer,
            fix=fixes.get(kind, f"Use buffer={kind.__module__.rpartition('.')[2]}."),
        )
    if "buffer" not in signature and buffer.capacity > 0:
        raise ConfigError(
            "buffer",
            expected=f"none, since method={config.choices.method} replays nothing",
            got=config.choices.buffer,
            fix="Add buffer=none, or use method=er for plain replay.",
        )


def _refuse_other_targets(
    config: DictConfig, allow: list[str], scenario: Scenario, buffer: Buffer, settings: Settings
) -> None:
    """Refuse a method for classes on a detection scenario, the reverse, and what reads one label per image."""
    detector = issubclass(import_target(config.method, "method", allow), Detector)  # type: ignore[arg-type]
    if detector != bool(scenario.target_shape):
        kind = "detection" if scenario.target_shape else "classification"
        raise ConfigError(
            "method",
            expected=f"one for {kind}, as scenario={config.choices.scenario} is",
            got=config.choices.method,
            fix="Use method=detr_finetune, detr_joint, detr_pseudo_labels or detr_replay with scenario=detr_shapes or "
            "coco, and no other.",
        )
    if not detector:
        return
    by_class = isinstance(buffer, PerClassBuffer) or (isinstance(buffer, OnlineBuffer) and buffer.by_class)
    for key, wrong, expected, got in (
        ("buffer", by_class, "one without classes, since an image shows several", config.choices.buffer),
        ("trainer.linear_probe", settings.linear_probe, "false, since an image has no single class", True),
    ):
        require(
            not wrong, key, expected=expected, got=got, fix="Use buffer=reservoir." if by_class else "Leave it out."
        )


def _refuse_disjoint(config: DictConfig, scenario: Scenario, method: Method, buffer: Buffer) -> None:
    """Refuse a method or buffer that needs new classes in every task, if the tasks share their classes, or some."""
    shared = "with shared labels" if scenario.shared_labels else "that share classes"
    those = "er, derpp, ewc, joint or supsup" if scenario.shared_labels else "er, derpp, ewc or joint"
    if not method.shared_labels or (scenario.recurring and not method.recurring_classes):
        raise ConfigError(
            "method",
            expected=f"one that can learn tasks {shared}, as in scenario={config.choices.scenario}",
            got=config.choices.method,
            fix=f"Use method=finetune, {those}, or a scenario with new classes in each task.",
        )
    if isinstance(buffer, PerClassBuffer):
        raise ConfigError(
            "buffer",
            expected=f"one without a quota per class: the tasks of scenario={config.choices.scenario} share classes",
            got=config.choices.buffer,
            fix="Use buffer=reservoir.",
        )


def _refuse_graphs(settings: Settings, method: Method, device: torch.device) -> None:
    """Refuse ``trainer.speed=graph`` if this method or device cannot use CUDA graphs."""
    why = find_obstacle_to_graphs(method, device)
    if settings.speed == "graph" and why is not None:
        raise ConfigError(
            "trainer.speed",
            expected=f"auto, eager or compile, since {why}",
            got="graph",
            fix="trainer.speed=auto uses a graph where that is possible.",
        )


def _refuse_steps(config: DictConfig, settings: Settings) -> None:
    """Refuse what would change the steps of our loop, if the method has a loop of its own."""
    for key, value, neutral in (
        ("trainer.max_steps", settings.max_steps, None),
        ("trainer.steps_per_batch", settings.steps_per_batch, 1),
        ("trainer.clip_norm", settings.clip_norm, None),
        ("trainer.checkpoint_steps", settings.checkpoint_steps, None),
        ("precision", config.precision.value, Precision.fp32.value),
        ("dry_run", config.dry_run, False),
        ("schedule", config.schedule.get("_target_"), CONSTANT),
    ):
        require(
            value == neutral,
            key,
            expected=f"{'null' if neutral is None else neutral}, since method={config.choices.method} has a training "
            "loop of its own",
            got=value,
            fix="Leave it out.",
        )


def build_loggers(config: DictConfig) -> dict[str, Logger]:
    """The chosen loggers, by name."""
    allow = list(config.allow_packages)
    for name, node in config.logger.items():
        require(
            not isinstance(node, DictConfig) or "_target_" in node,
            f"logger.{name}",
            expected="keys of a logger that is chosen",
            got=f"{name}, which is not",
            fix="Choose with logger=NAME; logger=many chooses all.",
        )
    return {str(name): build_component(node, f"logger.{name}", allow, Logger) for name, node in config.logger.items()}


def choose_device(name: str) -> torch.device:
    """The device of this name; ``auto`` is cuda, else mps, else cpu.

    An accelerator gets its index, so ``cuda`` is ``cuda:0``: torch compares devices by index, and some of its calls
    need one.

    Raises:
        ConfigError: this machine has no such device.
    """
    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    if torch.cuda.is_available():
        available[:0] = ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if name != "auto" and name not in available:
        raise ConfigError(
            "device",
            expected=f"auto, or one that this machine has: {', '.join(available)}",
            got=name,
            fix="device=auto uses the fastest one.",
        )
    device = torch.device(available[0] if name == "auto" else name)
    return device if device.type == "cpu" or device.index is not None else torch.device(device.type, 0)


def seed_everything(seed: int) -> dict[str, torch.Generator]:
    """One CPU generator for each kind of draw; the global generators of torch, numpy and Python are seeded too.

    ``batches`` shuffles the stream, ``augment`` draws its crops and flips, ``buffer`` decides what is stored and drawn.
    They are separate, so that another buffer does not change the stream.
    """
    if not 0 <= seed < 2**32:
        raise ConfigError("seed", expected="a whole number in [0, 2^32)", got=seed, fix="Use a smaller seed.")
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    streams = ("batches", "augment", "buffer")
    return {name: torch.Generator().manual_seed(4 * seed + i + 1) for i, name in enumerate(streams)}
