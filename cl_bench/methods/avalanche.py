"""A supervised strategy of Avalanche (Lomonaco et al. 2021; avalanche-lib 0.6), with plugins, on our tasks.

The training loop, loss, replay and optimizer steps are Avalanche's. Ours are the images with their augmentation, the
network, the optimizer's settings, the evaluation after each task, and the run folder (docs/avalanche.md).

A strategy keeps part of its state in objects that no checkpoint of ours can hold (decision 30). So every task draws
from generators that only ``seed`` and the task determine, and a run that goes on learns its earlier tasks again first.
It stops if the weights are then not those of the checkpoint, bit by bit.
"""

import copy
import importlib.metadata
import inspect
import random
import sys
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_bench.backbones.base import Backbone, SingleHead
from cl_bench.core.avalanche import import_from_avalanche, silence
from cl_bench.core.errors import ConfigError, RunError, require, require_positive
from cl_bench.core.types import Batch, Data, LoopReport, Losses, Phase, Task
from cl_bench.methods.base import Method
from cl_bench.scenarios.base import Scenario
from cl_bench.system.memory import is_out_of_memory

EXAMPLES = {
    "strategy": "avalanche.training.supervised.Naive",
    "plugin": "avalanche.training.plugins.ReplayPlugin",
    "part": "avalanche.training.storage_policy.ClassBalancedBuffer",
}

OURS = ("model", "optimizer", "train_mb_size", "train_epochs", "eval_mb_size", "device", "plugins", "evaluator")
"""Arguments of a strategy that come from the rest of the configuration."""


class Avalanche(Method):
    """Trains with a strategy of Avalanche.

    Args:
        make_optimizer: parameters -> the configured optimizer.
        strategy: dotted path of a class of ``avalanche.training.supervised``.
        arguments: its own arguments. A value ``{class: PATH, ...}`` is an object: a loss or a storage policy.
        plugins: a list of ``{class: PATH, ...}``, classes of ``avalanche.training.plugins``.
        epochs: passes over each task.
        batch_size: images of the stream per step.
    """

    own_loop = True
    tasks_learned: Tensor

    def __init__(
        self,
        *,
        net: Backbone,
        scenario: Scenario,
        make_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
        strategy: str,
        arguments: dict[str, Any],
        plugins: list[Any],
        epochs: int,
        batch_size: int,
    ) -> None:
        super().__init__()
        require_positive(fix="See configs/trainer/default.yaml.", epochs=epochs, batch_size=batch_size)
        for key, value, kind, words in (
            ("arguments", arguments, dict, "by name"),
            ("plugins", plugins, list, "a list"),
        ):
            require(isinstance(value, kind), key, expected=words, got=value, fix="See docs/avalanche.md.")
        self.net, self.make_optimizer, self.num_classes = net, make_optimizer, scenario.num_classes
        self.strategy_name, self.arguments, self.plugins = strategy, arguments, plugins
        self.epochs, self.batch_size = epochs, batch_size
        self.register_buffer("tasks_learned", torch.tensor(0))
        self._seed, self._generator = torch.initial_seed(), torch.Generator()
        self._first_weights = copy.deepcopy(net.state_dict())
        self._report: LoopReport | None = None  # None while earlier tasks are learned again
        self._scenario = scenario
        self._learned_here = 0
        self._build_strategy()
        self.register_load_state_dict_pre_hook(_take_shapes)
        self.register_load_state_dict_post_hook(_fill_class_means)

    @cached_property
    def _experiences(self) -> Any:
        return make_experiences(self._scenario, self._generator)

    def _build_strategy(self) -> None:
        """Set :attr:`strategy`, a new one, and :attr:`model`, the network that it trains.

        Raises:
            ConfigError: it cannot be built.
        """
        with silence():
            from avalanche.core import BasePlugin
            from avalanche.training.plugins import EvaluationPlugin
            from avalanche.training.templates import SupervisedTemplate

            evaluator = EvaluationPlugin()  # ours measures
        found = _import_class(self.strategy_name, "strategy", "strategy", SupervisedTemplate)
        extra = [_build_object(node, f"plugins[{i}]", "plugin", BasePlugin) for i, node in enumerate(self.plugins)]
        given: dict[str, Any] = {
            "model": self.net,
            "optimizer": self.make_optimizer(list(self.net.parameters())),
            "criterion": nn.CrossEntropyLoss(),
            "train_mb_size": self.batch_size,
            "train_epochs": self.epochs,
            "eval_mb_size": self.batch_size,
            "device": next(self.net.parameters()).device,
            "plugins": [_make_reporter(self), *extra],
            "evaluator": evaluator,
        }
        names = set(inspect.signature(found).parameters)
        if "feature_extractor" in names and "classifier" in names:  # iCaRL
            require(
                isinstance(self.net, SingleHead),
                "strategy",
                expected="one that takes the network as a whole, since this network has no single head",
                got=self.strategy_name,
                fix="Use backbone=resnet18 or mlp.",
            )
            given |= {"feature_extractor": Features(self.net), "classifier": self.net.get_submodule("head")}
        given = {name: value for name, value in given.items() if name in names}
        for name, value in self.arguments.items():
            require(
                name not in OURS,
                f"arguments.{name}",
                expected="an argument of the strategy's own",
                got=value,
                fix="Use the keys backbone, optimizer, trainer.epochs, trainer.batch_size, device and method.plugins.",
            )
            given[name] = _build_nested(value, f"arguments.{name}")
        self.strategy = _call(found, given, "arguments")
        self.model = self.strategy.model
        self._learned_here = 0

    def learn(self, task: Task) -> Iterator[Phase]:
        """One phase, with the loop of Avalanche; before it, in a new process, the earlier tasks once more."""
        if self._learned_here != task.id:
            self._catch_up(task.id)
        yield Phase(task.train, self.observe, self.model.parameters(), epochs=self.epochs, loop=self._train_next)

    def _catch_up(self, tasks: int) -> None:
        """Learn the first ``tasks`` tasks again, with a new strategy.

        Raises:
            RunError: the weights are then not those that the method has.
        """
        print(
            f"cl_bench: Avalanche's state cannot be saved, so tasks 1 to {tasks} are learned again first, "
            "with the same result",
            file=sys.stderr,
            flush=True,
        )
        expected = {name: tensor.clone() for name, tensor in self.state_dict().items()}
        self.net.load_state_dict(self._first_weights)
        self._build_strategy()
        for _ in range(tasks):
            self._train_next(None)
        self.tasks_learned.fill_(tasks)
        now = self.state_dict()
        wrong = [name for name in expected if name not in now or not torch.equal(now[name], expected[name])]
        if wrong:
            raise RunError(
                f"Learned again, tasks 1 to {tasks} gave other weights ({wrong[0]}): another machine, number of "
                "threads or version rounds differently. overwrite=true starts the run again."
            )
        self.eval()

    def _train_next(self, report: LoopReport | None) -> None:
        """Let the strategy learn its next task; its draws depend on the seed and the task only."""
        number = self._learned_here
        state = np.random.SeedSequence([self._seed, number]).generate_state(4)
        torch.manual_seed(int(state[0]))
        np.random.seed(state[1])
        random.seed(int(state[2]))
        self._generator.manual_seed(int(state[3]))
        self._report = report
        try:
            with silence():
                self.strategy.train(self._experiences[number], eval_streams=[], pin_memory=False)
        except Exception as error:
            if is_out_of_memory(error) or isinstance(error, (RunError, FloatingPointError)):
                raise
            raise RunError(
                f"{self.strategy_name} failed in task {number + 1}: {type(error).__name__}: {error}. "
                "It may need another network, or plugins that fit."
            ) from error
        finally:
            self._report = None
        self.model = self.strategy.model
        self._learned_here += 1
        self.tasks_learned.fill_(self._learned_here)

    def report_step(self) -> None:
        """Called by the strategy after each of its steps."""
        if self._report is not None:
            self._report.step({"loss": self.strategy.loss.detach()}, len(self.strategy.mb_y))

    def report_epoch(self) -> None:
        """Called by the strategy after each of its epochs."""
        if self._report is not None:
            self._report.end_epoch(self.strategy.optimizer.param_groups[0]["lr"])

    def observe(self, batch: Batch) -> Losses:
        """Not used: the loss is the strategy's."""
        raise RunError("method=avalanche has no step of ours")

    def predict(self, x: Tensor, task_id: Tensor | None) -> Tensor:
        """(B, C, H, W) -> (B, K), the answer of the strategy's model, -inf for a class that it has no output for."""
        scores = self.model(x) if self.tasks_learned else self.net(x)
        return F.pad(scores, (0, self.num_classes - scores.shape[1]), value=-torch.inf)

    def facts(self) -> dict[str, Any]:
        """The strategy, its plugins and Avalanche's version."""
        return {
            "strategy": self.strategy_name,
            "plugins": [plugin["class"] for plugin in self.plugins],
            "avalanche": importlib.metadata.version("avalanche-lib"),
        }


class Features(nn.Module):
    """(B, C, H, W) -> (B, D): the features of a network, as a module."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        """The input of the network's head."""
        return self.net.features(x)  # type: ignore[operator]


# -- what Avalanche is given -------------------------------------------------------------------------------------------


class TrainingImages(torch.utils.data.Dataset):
    """(image (C, H, W) uint8 on the CPU, label) of the training images of all tasks, one after the other."""

    def __init__(self, parts: list[Data]) -> None:
        self.parts = parts
        self.targets = torch.cat([part.labels for part in parts]).tolist()
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        task = int(np.searchsorted(self._ends, i, side="right"))
        row = i - int(self._ends[task]) + len(self.parts[task])
        return self.parts[task].images[row : row + 1][0].cpu(), self.targets[i]


def make_experiences(scenario: Scenario, generator: torch.Generator) -> Any:
    """The tasks of a scenario as the train stream of an Avalanche benchmark.

    Args:
        scenario: with classes of its own in each task.
        generator: draws the augmentation.
    """
    with silence():
        from avalanche.benchmarks import nc_benchmark

    images = TrainingImages([task.train for task in scenario.tasks])
    transform = copy.deepcopy(scenario.transform).to(torch.device("cpu"))
    return nc_benchmark(
        images,
        images,  # a test stream is asked for; ours measures
        n_experiences=len(scenario.tasks),
        task_labels=False,
        shuffle=False,
        fixed_class_order=list(range(scenario.num_classes)),
        per_exp_classes={task.id: len(task.classes) for task in scenario.tasks},
        train_transform=lambda image: transform.augment(image[None], generator)[0],  # Avalanche reads one at a time
        eval_transform=lambda image: transform.normalise(image[None])[0],
    ).train_stream


def _make_reporter(method: Avalanche) -> Any:
    from avalanche.training.plugins import SupervisedPlugin

    class Reporter(SupervisedPlugin):
        """Tells the method of each step and epoch."""

        def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
            method.report_step()

        def after_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
            method.report_epoch()

    return Reporter()


def _build_nested(value: Any, key: str) -> Any:
    """A plain value, or the object that ``{class: PATH, ...}`` describes, also inside lists."""
    if isinstance(value, list):
        return [_build_nested(item, f"{key}[{i}]") for i, item in enumerate(value)]
    return _build_object(value, key, "part", object) if isinstance(value, dict) and "class" in value else value


def _build_object(node: Any, key: str, kind: str, base: type) -> Any:
    require(
        isinstance(node, dict) and "class" in node,
        key,
        expected=f"{{class: PATH, ...}} with the arguments of the class, e.g. {{class: {EXAMPLES[kind]}}}",
        got=node,
        fix="Write it like this.",
    )
    found = _import_class(node["class"], f"{key}.class", kind, base)
    arguments = {name: _build_nested(value, f"{key}.{name}") for name, value in node.items() if name != "class"}
    return _call(found, arguments, key)


def _import_class(path: Any, key: str, kind: str, base: type) -> type:
    found = import_from_avalanche(path, key, kind, EXAMPLES[kind])
    if not (inspect.isclass(found) and issubclass(found, base)):
        raise ConfigError(
            key, expected=f"a class that is a {base.__name__}", got=path, fix=f"For example {EXAMPLES[kind]}."
        )
    return found


def _call(found: type, arguments: dict[str, Any], key: str) -> Any:
    try:
        with silence():
            return found(**arguments)
    except Exception as error:  # whatever Avalanche raises for arguments that it cannot use
        names = [name for name in inspect.signature(found).parameters if name not in OURS]
        raise ConfigError(
            key,
            expected=f"arguments of {found.__name__}: {', '.join(names)}",
            got=" ".join(f"{type(error).__name__}: {error}".split())[:300],
            fix="Correct them.",
        ) from error


# -- its state ---------------------------------------------------------------------------------------------------------


def _take_shapes(method: Any, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Give the model's buffers the shapes of those that are loaded: a classifier of class means has none at first."""
    for key, value in state.items():
        path, _, name = key.removeprefix(prefix).rpartition(".")
        buffers = method.get_submodule(path)._buffers if key.startswith(f"{prefix}model.") else {}
        if name in buffers and (buffers[name] is None or buffers[name].shape != value.shape):
            buffers[name] = torch.empty_like(value, device=method.tasks_learned.device)


def _fill_class_means(method: Any, _: Any) -> None:
    """Avalanche's classifier of class means keeps them a second time, outside its state."""
    for module in method.model.modules():
        if hasattr(module, "class_means_dict") and module.class_means is not None:
            module.replace_class_means_dict(dict(enumerate(module.class_means.clone())))
