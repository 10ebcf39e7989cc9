"""Avalanche's classification benchmarks (Lomonaco et al. 2021; avalanche-lib 0.6) as tasks of ours.

An experience is a task. Its images, labels and classes are those of Avalanche's own streams; they are read once, into
8 bits per channel. Normalisation, crops and flips are those of the benchmark, computed by us batch by batch.
"""

import inspect
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor

from cl_bench.core.avalanche import import_from_avalanche
from cl_bench.core.errors import ConfigError, require, void
from cl_bench.core.types import Data, Task
from cl_bench.data.base import ImageSet
from cl_bench.scenarios.base import Scenario
from cl_bench.scenarios.selection import (
    Positions,
    ValChoice,
    build_transform,
    check_seeds,
    choose_images,
    declare_void_choices,
)

EXAMPLE = "avalanche.benchmarks.classic.SplitMNIST"

EIGHT_BITS = 1e-3
"""How far 255 times a pixel may be from a whole number; fp32 rounds to less."""


class Images(NamedTuple):
    """A stream: images (N, C, H, W) uint8, labels (N,) int64, and the experience (N,) int64 of each image."""

    images: np.ndarray
    labels: np.ndarray
    experience: np.ndarray


class Pipeline(NamedTuple):
    """What the benchmark's transforms come to.

    Attributes:
        read: reads an image, without randomness and normalisation; None for nothing.
        mean, std: of the normalisation, one value per channel or one for all.
        crop_padding, flip: as in :class:`~cl_bench.data.transform.Transform`.
    """

    read: Callable[[Any], Any] | None
    mean: list[float]
    std: list[float]
    crop_padding: int
    flip: bool


@void(
    "class_order_seed",
    when=lambda v: (
        isinstance(v["arguments"], dict)
        and (bool({"seed", "fixed_class_order"} & set(v["arguments"])) or v["arguments"].get("shuffle") is False)
    ),
    why="scenario.arguments says the order",
)
@declare_void_choices
class AvalancheBenchmark(Scenario):
    """The experiences of a benchmark as tasks.

    The classes of the experiences must be disjoint, or the same in all (then the tasks share their labels).
    ``Data.index`` counts the images of the train stream, and those of the test stream.

    Args:
        benchmark: dotted path of a function of ``avalanche.benchmarks.classic``, or of one of the generators of
            ``avalanche.benchmarks`` whose arguments are plain values.
        arguments: its arguments, plain values.
        root: its ``dataset_root``, if it has one and ``arguments`` does not give it.
        class_order_seed: seeds the draws of a benchmark whose ``arguments`` has no ``seed``.
        data_seed, val_fraction, val_choice, train_per_class, test_per_class: as in
            :class:`~cl_bench.scenarios.split.Split`, for the classes of each task.
    """

    def __init__(
        self,
        *,
        benchmark: str | None,
        arguments: dict[str, Any],
        root: str,
        class_order_seed: int,
        data_seed: int,
        val_fraction: float,
        val_choice: ValChoice,
        train_per_class: int | None,
        test_per_class: int | None,
    ) -> None:
        check_seeds(class_order_seed=class_order_seed, data_seed=data_seed)
        made, pipeline = build_benchmark(benchmark, arguments, root, class_order_seed)
        train, test = read_streams(made)
        per_task = _list_classes(made, train)
        self.shared_labels = len(per_task) > 1 and len(set(map(frozenset, per_task))) == 1
        self.class_order = per_task[0] if self.shared_labels else [c for own in per_task for c in own]
        names = _find_class_names(made, max(self.class_order) + 1)
        self.class_names = names
        self.image_shape = tuple(train.images.shape[1:])

        position = np.full(max(self.class_order) + 1, -1)
        position[self.class_order] = np.arange(len(self.class_order))
        # one class for each task and label, so that images are chosen in each task separately
        pairs = [self._number_pairs(stream, position) for stream in (train, test)]
        of_pairs = [names[c] for own in per_task for c in own]
        channels = self.image_shape[0]
        source = ImageSet(
            *(train.images, pairs[0], test.images, pairs[1]),
            class_names=of_pairs,
            superclass=None,
            mean=_spread(pipeline.mean, channels),
            std=_spread(pipeline.std, channels),
        )
        self.transform = build_transform(
            source,
            crop_padding=pipeline.crop_padding,
            flip=pipeline.flip,
            rand_augment=None,
            normalisation="standard",
        )
        chosen = choose_images(
            source,
            data_seed=data_seed,
            val_fraction=val_fraction,
            val_choice=val_choice,
            train_per_class=train_per_class,
            test_per_class=test_per_class,
        )
        self._cut(train, test, position, [len(own) for own in per_task], *chosen)

    def _number_pairs(self, stream: Images, position: np.ndarray) -> np.ndarray:
        """(N,) the number of each image's pair of task and label, in the order of learning.

        Args:
            position: class id -> position in the class order, -1 for none.
        """
        found = np.where(stream.labels < len(position), position[np.minimum(stream.labels, len(position) - 1)], -1)
        if (found < 0).any():
            label = int(stream.labels[found < 0][0])
            _refuse(f"a test image of class {label}, which no training image has")
        return found + len(self.class_order) * stream.experience if self.shared_labels else found

    def _cut(
        self,
        train: Images,
        test: Images,
        position: np.ndarray,
        sizes: list[int],
        chosen: Positions,
        held: Positions,
        tested: Positions,
    ) -> None:
        """Set :attr:`tasks`; :attr:`pretrain` is empty."""

        def gather(stream: Images, own: Positions) -> Data:
            which = np.sort(np.concatenate([np.empty(0, dtype=np.int64), *own]))
            labels = torch.from_numpy(position[stream.labels[which]])
            return Data(torch.from_numpy(stream.images[which]), labels, torch.from_numpy(which))

        self.pretrain, self.pretrain_order = gather(train, []), []
        self.tasks = []
        ends = np.cumsum(sizes).tolist()
        for number, (start, end) in enumerate(zip([0, *ends], ends)):
            self.tasks.append(
                Task(
                    id=number,
                    classes=range(sizes[0]) if self.shared_labels else range(start, end),
                    train=gather(train, chosen[start:end]),
                    val=gather(train, held[start:end]),
                    test=gather(test, tested[start:end]),
                )
            )


# -- the benchmark -----------------------------------------------------------------------------------------------------


def build_benchmark(path: Any, arguments: Any, root: str, seed: int) -> tuple[Any, Pipeline]:
    """The benchmark at a dotted path, which reads images in 8 bits, and what its own transforms would do.

    Raises:
        ConfigError: it may not be named, or its arguments are wrong.
    """
    require(
        isinstance(arguments, dict),
        "arguments",
        expected="arguments by name",
        got=arguments,
        fix="For example '+scenario.arguments.n_experiences=5'.",
    )
    function = import_from_avalanche(path, "benchmark", "scenario", EXAMPLE)
    if not inspect.isfunction(function) or not (
        function.__module__.startswith("avalanche.benchmarks.classic.") or function.__name__.endswith("_benchmark")
    ):
        _refuse(path)
    parameters = inspect.signature(function).parameters
    given = dict(arguments)
    if "dataset_root" in parameters:
        given.setdefault("dataset_root", root)
    own = {
        group: given.get(f"{group}_transform", parameters[f"{group}_transform"].default)
        for group in ("train", "eval")
        if f"{group}_transform" in parameters
    }
    for group, transform in own.items():
        require(
            f"{group}_transform" not in given or transform is None,
            f"arguments.{group}_transform",
            expected="null, or nothing: a transform is no plain value",
            got=transform,
            fix="Leave it out for the benchmark's own.",
        )
    pipeline = _read_transforms(own.get("train"), own.get("eval"))
    given |= {f"{group}_transform": pipeline.read for group in own}
    try:
        with _seed_everything(seed):
            return function(**given), pipeline
    except Exception as error:  # of Avalanche, torchvision or a download, whatever is wrong with the arguments
        why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ConfigError(
            "arguments",
            expected=f"arguments with which {path} can be built: {', '.join(parameters)}",
            got=f"{arguments} ({why})",
            fix="Correct them; files are looked for in scenario.root.",
        ) from error


@contextmanager
def _seed_everything(seed: int) -> Iterator[None]:
    """Inside, the global generators are those of ``seed``; after it they are as before."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


def _read_transforms(train: Any, evaluate: Any) -> Pipeline:
    """What the transforms of the train and the eval group of a benchmark come to.

    Raises:
        ConfigError: they have a random part that we do not compute.
    """
    from torchvision import transforms as tv

    mean, std, crop_padding, flip = [0.0], [1.0], 0, False
    reading = []
    for part in _flatten(evaluate):
        if isinstance(part, tv.Normalize):
            mean, std = ([float(v) for v in values] for values in (part.mean, part.std))
        else:
            reading.append(part)
    for part in _flatten(train):
        if isinstance(part, tv.RandomHorizontalFlip) and part.p == 0.5:
            flip = True
        elif isinstance(part, tv.RandomCrop) and isinstance(part.padding, int) and part.padding_mode == "constant":
            crop_padding = part.padding
        elif not any(repr(part) == repr(other) for other in _flatten(evaluate)):
            raise ConfigError(
                "benchmark",
                expected="one whose training images get random crops with padding, flips, and what test images get",
                got=f"the training transform {part!r}",
                fix="Add '+scenario.arguments.train_transform=null' for none.",
            )
    return Pipeline(tv.Compose(reading) if reading else None, mean, std, crop_padding, flip)


def _flatten(transform: Any) -> list[Any]:
    if transform is None:
        return []
    inner = getattr(transform, "transforms", None)
    return [transform] if inner is None else [part for one in inner for part in _flatten(one)]


# -- its streams -------------------------------------------------------------------------------------------------------


def read_streams(benchmark: Any) -> tuple[Images, Images]:
    """All images of the train and the test stream of an Avalanche benchmark, in their order.

    Raises:
        ConfigError: it is no classification benchmark of images in 8 bits.
    """
    found = []
    for name in ("train_stream", "test_stream"):
        stream = getattr(benchmark, name, None)
        if stream is None:
            _refuse(f"one without {name}")
        found.append(_read_stream(stream))
    if found[0].images.shape[1:] != found[1].images.shape[1:]:
        _refuse("training and test images of different sizes")
    return found[0], found[1]


def _read_stream(stream: Sequence[Any]) -> Images:
    images: list[np.ndarray] = []
    labels: list[int] = []
    numbers: list[int] = []
    for number, experience in enumerate(stream):
        data = getattr(experience, "dataset", None)
        targets = getattr(data, "targets", None)
        if data is None or targets is None:
            _refuse("experiences without labels")
        for i, target in enumerate(targets):
            if not isinstance(target, (int, np.integer)) and not (isinstance(target, Tensor) and target.ndim == 0):
                _refuse(f"labels of type {type(target).__name__}, which are no class ids")
            images.append(_to_bytes(data[i][0]))
            labels.append(int(target))
            numbers.append(number)
    if not images:
        _refuse("no images")
    if len({image.shape for image in images}) > 1:
        _refuse("images of different sizes")
    return Images(np.stack(images), np.array(labels, dtype=np.int64), np.array(numbers, dtype=np.int64))


def _to_bytes(image: Any) -> np.ndarray:
    """(C, H, W) uint8 of a PIL image or a tensor."""
    if not isinstance(image, Tensor):
        pixels = np.asarray(image)
        if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3):
            _refuse(f"{type(image).__name__} in place of images in 8 bits")
        return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))
    if image.ndim != 3:
        _refuse(f"inputs of the shape {tuple(image.shape)} in place of images (channels, height, width)")
    if image.dtype == torch.uint8:
        return image.numpy()
    scaled = image.double() * 255
    whole = scaled.round()
    if float((scaled - whole).abs().max()) > EIGHT_BITS or whole.min() < 0 or whole.max() > 255:
        _refuse("images that are not 8 bits per channel, as numbers in [0, 1]")
    return whole.to(torch.uint8).numpy()


def _list_classes(benchmark: Any, train: Images) -> list[list[int]]:
    """The class ids of each task: in the benchmark's order where it has one, else ascending.

    Raises:
        ConfigError: some tasks share some of their classes, but not all.
    """
    count = int(train.experience.max()) + 1
    found = [sorted(set(train.labels[train.experience == t].tolist())) for t in range(count)]
    pooled = [c for own in found for c in own]
    if len(set(pooled)) == len(pooled):
        order = {c: i for i, c in enumerate(getattr(benchmark, "classes_order", []))}
        return [sorted(own, key=lambda c: order.get(c, c)) for own in found]
    if any(own != found[0] for own in found):
        _refuse("experiences that share some of their classes")
    tests = len(benchmark.test_stream)
    if tests != count:
        _refuse(f"{count} experiences with the same classes, and {tests} test sets")
    return found


def _find_class_names(benchmark: Any, count: int) -> list[str]:
    """The names of the classes, if all data sets below the benchmark say the same; else the class ids as text."""
    from avalanche.benchmarks.utils.dataset_traversal_utils import leaf_datasets

    remapped = getattr(benchmark, "classes_order_original_ids", None) != getattr(benchmark, "classes_order", None)
    found = set()
    for name in ("train_stream", "test_stream"):
        for experience in getattr(benchmark, name):
            found |= {tuple(map(str, getattr(leaf, "classes", ()))) for leaf in leaf_datasets(experience.dataset)}
    names = list(found.pop()) if len(found) == 1 and not remapped else []
    return names if len(names) == count else [str(c) for c in range(count)]


def _spread(values: list[float], channels: int) -> list[float]:
    """One value per channel."""
    return values * channels if len(values) == 1 else values


def _refuse(got: Any) -> NoReturn:
    raise ConfigError(
        "benchmark",
        expected="a classification benchmark of images, whose experiences have disjoint classes or all the same ones",
        got=got,
        fix=f"For example {EXAMPLE}.",
    )
