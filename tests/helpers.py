"""What the test files share: configurations, tiny parts and runs, the command, numpy beside torch."""

import dataclasses
import html
import importlib.util
import json
import os
import platform
import re
import resource
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import DictConfig
from PIL import Image

from cl_bench import __main__ as main_module
from cl_bench.backbones.base import Backbone
from cl_bench.buffers.base import Context
from cl_bench.config.build import Parts, build, prepare_component
from cl_bench.config.schema import CONFIGS, compose_config
from cl_bench.core.record import Cost, Matrix, Record
from cl_bench.core.types import Batch
from cl_bench.data.base import ImageSet
from cl_bench.data.transform import Transform
from cl_bench.engine.trainer import Trainer
from cl_bench.loggers.base import Logger
from cl_bench.metrics.accuracy import average_accuracy
from cl_bench.report.folders import scan
from cl_bench.runs import run as run_module
from cl_bench.scenarios.split import Split
from cl_bench.testing import SMALL, compose_read, make_trainer

INSTRUCTION_SETS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR")
"""Environment variables that make torch compute as on another processor; read when it is loaded."""

# Tiny nets gain nothing from a second thread, and two busy processes with two threads each on two cores crawl.
THREADS = int(os.environ.get("CL_BENCH_TEST_THREADS", "1"))

SEED = int(os.environ.get("CL_BENCH_TEST_SEED", "0"))
"""Seed of the tests that learn something, so that their margins can be measured over several."""

ROOT = Path(__file__).parent.parent

DATA = Path(os.environ.get("CL_BENCH_DATA", ROOT / "data"))

DEVICE = os.environ.get("CL_BENCH_TEST_DEVICE", "cpu")
"""Where the small runs of the tests are computed. Much is held bit for bit on the CPU only; what holds on a GPU is in
``test_cuda.py``."""

needs_cifar100 = pytest.mark.skipif(
    not (DATA / "cifar-100-python" / "train").is_file(), reason=f"CIFAR-100 is not in {DATA}"
)

needs_mnist = pytest.mark.skipif(
    not (DATA / "MNIST" / "raw" / "train-images-idx3-ubyte").is_file(), reason=f"MNIST is not in {DATA}"
)

needs_chromium = pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")

WIDTHS = "[narrow, wide].map((view) => view.document.documentElement.scrollWidth)"
"""JavaScript: how wide the page is at both widths of :func:`open_in_chromium`."""

TINY = [*SMALL, f"device={DEVICE}"]
"""Digits in two tasks of 50 training images: a run of some seconds."""

DIGITS_INSTEAD = [
    "scenario.source._target_=cl_bench.data.digits.digits", "~scenario.source.root", "~scenario.source.download"
]  # fmt: skip
"""The bundled digits in place of a data set that may not be here."""

HEAVY = ("avalanche", "matplotlib", "mlflow", "optuna", "pandas", "PIL", "scipy", "sklearn", "tensorboard", "timm")
HEAVY += ("torchvision", "trackio", "wandb")
"""Packages that neither ``--help`` nor a plain run imports, so that both begin in a moment."""

DETECTORS = sorted(path.stem for path in (CONFIGS / "method").glob("detr_*.yaml"))
"""The methods for detection, which are tested in ``test_detection.py``."""

DETECTION = [
    "scenario=detr_shapes", "scenario.source.train_images=24", "scenario.source.test_images=12",
    "scenario.source.size=32", "backbone=detr_shapes", "backbone.channels=[8]", "backbone.dim=16", "backbone.heads=2",
    "backbone.feedforward=16", "backbone.encoder_layers=1", "backbone.num_queries=9", "trainer.epochs=2",
    "trainer.batch_size=4", "optimizer=adamw", "device=cpu",
]  # fmt: skip
"""A network of some thousand parameters on 24 images."""

DETECTION_BUFFERS = {"detr_replay": ["buffer=reservoir", "buffer.capacity=6", "method.balanced_epochs=1"]}
"""What a detector needs beside it."""

METHODS = sorted({path.stem for path in (CONFIGS / "method").glob("*.yaml")} - {"avalanche", *DETECTORS})
"""Every other method with steps of ours; Avalanche's loop is tested in ``test_avalanche.py``."""

FUNCTIONAL = [
    *("agem", "coda_prompt", "derpp", "dualprompt", "dytox", "er", "er_ace", "ewc", "ewc_pp", "finetune", "gdumb"),
    *("icarl", "joint", "l2p", "lvt", "lwf", "memory_vit", "mir", "ocs", "scr"),
    "slca",
]
"""The methods whose step is a function of tensors alone."""

MLP_RESERVOIR = ["backbone=mlp", "backbone.hidden=[32]", "buffer=reservoir", "buffer.capacity=20"]

PROMPTS = [
    "backbone=prompt_vit_digits",
    "backbone.depth=2",
    "optimizer=adam",
    "optimizer.lr=0.01",
    "method.warm_up_epochs=1",
    "method.warm_up_lr=0.002",
]

ALIGNMENT = ["method.alignment_draws=16", "method.alignment_epochs=2"]

SUITS = {
    "den": [
        "backbone=den_mlp",
        "backbone.hidden=[32,16]",
        "method.units=2",
        "method.split_limit=2",
        "method.tau=0",
        "method.sigma=0.001",
        "optimizer=adamw",
        "optimizer.lr=0.01",
    ],
    "apd": [
        "backbone=apd_digits",
        "optimizer=adamw",
        "optimizer.lr=0.005",
        "scenario.val_fraction=0.2",
        "method.consolidate_every=2",
        "method.clusters=1",
    ],
    "finetune": ["backbone=mlp", "backbone.hidden=[32]"],
    "joint": ["backbone=mlp", "backbone.hidden=[32]"],
    "lwf": ["backbone=mlp", "backbone.hidden=[32]"],
    "ewc": ["backbone=mlp", "backbone.hidden=[32]"],
    "ewc_pp": ["backbone=mlp", "backbone.hidden=[32]", "method.every=3", "method.strength=1"],
    "icarl": ["backbone=mlp", "backbone.hidden=[32]", "buffer=herding", "buffer.capacity=20"],
    "frcl": ["backbone=mlp", "backbone.hidden=[32]", "buffer=per_task", "buffer.capacity=20", "optimizer=adam"],
    "gdumb": ["backbone=mlp", "backbone.hidden=[32]", "buffer=greedy", "buffer.capacity=20"],
    "ocs": [
        *("backbone=mlp", "backbone.hidden=[32]", "buffer=ordered", "buffer.capacity=20", "method.tau=1"),
        "method.candidates=40",
    ],
    "lvt": ["backbone=lvt_digits", "buffer.capacity=20"],
    # class means answer: a trunk that knows only the first task's digits favours their head over the second one's
    "memory_vit": [
        "backbone=memory_vit_digits",
        "method.rule=nearest_mean",
        "optimizer=adamw",
        "optimizer.lr=0.01",
        "method.warm_up_epochs=5",
        "method.warm_up_lr=0.002",
    ],
    "scr": [*MLP_RESERVOIR, "method.replay_size=8"],
    "simplecil": ["backbone=mlp", "backbone.hidden=[64]"],
    "ranpac": ["backbone=mlp", "backbone.hidden=[64]", "method.projection=200"],
    "slca": ["backbone=mlp", "backbone.hidden=[32]", "method.trunk_lr=0.03", *ALIGNMENT],
    "l2p": [*PROMPTS, "method.pool=4", "method.length=2", "method.top=2"],
    "dualprompt": [*PROMPTS, "method.general_layers=[0]", "method.expert_layers=[1]", "method.length=2"],
    "coda_prompt": [*PROMPTS, "method.layers=[0,1]", "method.components=3", "method.length=4"],
    "supsup_nns": [
        "backbone=mlp",
        "backbone.hidden=[64]",
        "method.outputs=50",
        "method.max_masks=6",
        "method.floor=2",
        "method.check_every=3",
        "optimizer=adam",
    ],
    "supsup": ["backbone=mlp", "backbone.hidden=[64]", "method.mask=threshold", "method.outputs=50", "optimizer=adam"],
    "dytox": [
        "backbone=dytox_digits",
        "backbone.patch_size=4",
        "backbone.dim=32",
        "backbone.depth=1",
        "buffer.capacity=20",
        "method.finetune_epochs=2",
        "method.finetune_lr=1e-4",
        "optimizer=adamw",
        "optimizer.lr=0.003",
    ],
}
"""The network and buffer that a method needs; any other one is tried on an MLP with a reservoir."""

CLASS_IL = [[95], [80, 90], [70, 75, 92], [72, 66, 78, 88], [60, 58, 64, 70, 91]]

TASK_IL = [[96], [94, 97], [93, 95, 98], [92, 94, 96, 97], [91, 93, 95, 96, 98]]

CLASS_ORDER = [8, 0, 7, 1, 3, 6, 2, 4, 5, 9]

FIVE_TASKS = [CLASS_ORDER[i : i + 2] for i in range(0, 10, 2)]

SPLIT_KEYS = {
    "pretrain_classes": 0, "num_tasks": 2, "classes_per_task": None, "class_order": "natural", "class_order_seed": 0,
    "data_seed": 0, "val_fraction": 0.0, "train_per_class": None, "test_per_class": None, "crop_padding": 0,
    "flip": False, "rand_augment": None, "val_choice": "random", "normalisation": "standard", "blurry": 0.0,
    "blurry_classes": 1.0, "repeat": 0.0, "run_seed": 0,
}  # fmt: skip


def configure(*overrides: str) -> DictConfig:
    """The configuration that the command would run with."""
    return compose_config(overrides)


class Events(Logger):
    """Keeps what it is told."""

    def __init__(self):
        self.events, self.progress = [], []

    def start(self, run):
        pass

    def log_event(self, number, event):
        assert number == len(self.events)
        self.events.append(event)

    def log_step(self, progress):
        self.progress.append(progress)

    def finish(self, status, summary):
        pass


def open_in_chromium(page: Path, folder: Path, script: str = "null") -> tuple[Any, str]:
    """What a JavaScript expression says of a page, and all that the browser reports on its console.

    Args:
        page: opened twice, 390 and 1280 pixels wide: the windows ``narrow`` and ``wide`` of the expression.
        folder: for the browser's files.
        script: the expression; its value must be known to JSON.
    """
    frames = [
        f'<iframe name="{name}" src="{page.as_uri()}" width="{width}" height="900"></iframe>'
        for name, width in (("narrow", 390), ("wide", 1280))
    ]
    tell = f'addEventListener("load", () => {{ document.body.textContent = JSON.stringify({script}); }});'
    opened = folder / "opened.html"
    opened.write_text(f"<!DOCTYPE html><body>{''.join(frames)}<script>{tell}</script></body>")
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--allow-file-access-from-files",
        "--enable-logging=stderr",
    ]
    done = subprocess.run(
        ["chromium", *options, f"--user-data-dir={folder / 'chromium'}", "--dump-dom", opened.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    said = "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
    return json.loads(html.unescape(re.search("<body>(.*)</body>", done.stdout, re.DOTALL)[1])), said


def network_of(*overrides: str, num_classes: int = 100, image_shape: tuple[int, int, int] = (3, 32, 32)) -> Backbone:
    """The network that these overrides choose."""
    shape = {"num_classes": num_classes, "image_shape": image_shape}
    return prepare_component(configure(*overrides).backbone, "backbone", [], Backbone)(**shape)


def command(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """``python -m cl_bench`` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "cl_bench", *arguments],
        cwd=cwd,
        env=command_environment(**environment),
        capture_output=True,
        text=True,
        timeout=300,
    )


def command_environment(**environment: str) -> dict[str, str]:
    """The environment of the command: this checkout, the data of the tests, no W&B key."""
    base = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    return (
        base
        | {
            "PYTHONPATH": str(ROOT),
            "CL_BENCH_DATA": str(DATA),
            "WANDB_MODE": "offline",
            "OMP_NUM_THREADS": str(THREADS),
        }
        | environment
    )


def toy_images(num_classes: int = 4, per_class: int = 6, side: int = 8, channels: int = 1) -> ImageSet:
    """Random images with labels; every image is different."""
    rng = np.random.default_rng(0)

    def make_split() -> tuple[np.ndarray, np.ndarray]:
        labels = np.tile(np.arange(num_classes), per_class)
        images = rng.integers(0, 256, (len(labels), channels, side, side)).astype(np.uint8)
        return images, labels

    train, test = make_split(), make_split()
    names = [f"class {c}" for c in range(num_classes)]
    parents = [c % 2 for c in range(num_classes)]
    return ImageSet(*train, *test, names, parents, [0.5] * channels, [0.25] * channels)


def identity_transform(channels: int = 1) -> Transform:
    """Pixels in [0, 1], not augmented."""
    return Transform(mean=[0.0] * channels, std=[1.0] * channels, crop_padding=0, flip=False)


def buffer_context(num_classes: int = 4, shape: tuple[int, int, int] = (1, 8, 8), seed: int = 0) -> Context:
    """What a buffer is given when it is built."""
    return Context(
        image_shape=shape,
        num_classes=num_classes,
        transform=identity_transform(shape[0]),
        generator=torch.Generator().manual_seed(seed),
        device=torch.device("cpu"),
    )


class TwoTasks:
    """What a method asks of a scenario: two tasks of two classes."""

    num_classes = 4
    image_shape = (1, 8, 8)
    transform = identity_transform()
    tasks = tuple(SimpleNamespace(classes=range(i, i + 2), other_classes=()) for i in (0, 2))


def batch_of(raw: torch.Tensor, y: torch.Tensor, task: int = 0) -> Batch:
    """A stream batch of un-augmented images."""
    return Batch(x=identity_transform(raw.shape[1]).normalise(raw), y=y, raw=raw, task=task)


def describe_machine() -> str:
    """What decides how torch rounds here: a stranger's report of a failed test is of use only with it."""
    name = next((line.split(":")[1] for line in cpuinfo() if line.startswith("model name")), platform.machine())
    asked = [f"{key}={os.environ[key]}" for key in INSTRUCTION_SETS if key in os.environ]
    words = [name.strip(), torch.backends.cpu.get_cpu_capability(), *asked, f"{torch.get_num_threads()} threads"]
    return ", ".join([*words, f"torch {torch.__version__}", f"seed {SEED}"])


def cpuinfo() -> list[str]:
    """The lines of /proc/cpuinfo, none where there is no such file."""
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def load_script(name: str) -> ModuleType:
    """``scripts/NAME.py`` as a module."""
    spec = importlib.util.spec_from_file_location(f"{name}_command", ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look there for their annotations
    spec.loader.exec_module(module)
    return module


def find_run(folder: Path) -> Path:
    (found,), _ = scan(folder)
    return found


WRITE_REPORT = run_module.write_report


def run_in_process(*arguments: str, monkeypatch, cwd: Path, report: bool = False) -> int:
    """The command without a new process; returns its exit status. An empty file stands for a report nobody reads."""
    if not report and run_module.write_report is WRITE_REPORT:
        monkeypatch.setattr(run_module, "write_report", lambda place: (place / "report.html").touch())
    monkeypatch.chdir(cwd)
    monkeypatch.setattr(sys, "argv", ["cl_bench", *arguments])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setenv("CL_BENCH_DATA", str(DATA))
    try:
        main_module.main()
    except SystemExit as stop:
        return stop.code
    return 0


def results_of(run: Path) -> dict[str, object]:
    """Everything a run leaves that may not depend on how often it was interrupted."""
    weights = torch.load(run / "checkpoint" / "last.pt", weights_only=True)["final"]["method"]
    flat = {name: value.numpy() for name, value in weights.items() if isinstance(value, torch.Tensor)}
    predictions = dict(np.load(run / "predictions.npz"))
    texts = {name: (run / name).read_text() for name in ("accuracy_matrix.csv", "metrics.jsonl")}
    texts["curve.csv"] = (run / "curve.csv").read_text() if (run / "curve.csv").exists() else ""
    summary = json.loads((run / "summary.json").read_text())
    return {"weights": flat, "predictions": predictions, "metrics": [summary["class_il"], summary["task_il"]]} | texts


def assert_equal_results(one: Path, other: Path) -> None:
    a, b = results_of(one), results_of(other)
    for key in ("weights", "predictions"):
        assert a[key].keys() == b[key].keys()
        for name in a[key]:
            np.testing.assert_array_equal(a[key][name], b[key][name], err_msg=name)
    for key in ("metrics", "accuracy_matrix.csv", "metrics.jsonl", "curve.csv"):
        assert a[key] == b[key], key


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """A limit of the system on the size of any file that this process writes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def read_points(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0}, purge_orphaned_data=False)
    accumulator.Reload()
    tags = accumulator.Tags()["scalars"]
    return {tag: [(point.step, round(point.value, 5)) for point in accumulator.Scalars(tag)] for tag in tags}


def wandb_records(file: Path) -> list:
    """The records of a .wandb file: seven bytes, then blocks of 32 KiB of (checksum, length, kind) + content."""
    from wandb.proto.wandb_internal_pb2 import Record as WandbRecord

    data, at, content, records = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if (room := 32768 - at % 32768) < 7:
            at += room
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        content += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last piece of one
            records.append(WandbRecord.FromString(content))
            content = b""
    return records


def select_kind(records: list, kind: str) -> list:
    return [getattr(record, kind) for record in records if record.WhichOneof("record_type") == kind]


def list_logged(records: list) -> list[dict]:
    """What was logged, one dictionary for each call."""
    rows = []
    for history in select_kind(records, "history"):
        rows.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in history.item})
    return rows


def wandb_files(folder: Path) -> list[Path]:
    """The .wandb files, oldest first, complete: W&B's service process, which writes them, has ended."""
    import wandb

    wandb.teardown()
    return sorted(folder.glob("wandb/offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime_ns)


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def cross_entropy(z: np.ndarray, y: np.ndarray) -> float:
    return float(-np.log(softmax(z)[np.arange(len(y)), y]).mean())


def array(t: torch.Tensor) -> np.ndarray:
    return t.detach().double().numpy()


def list_tiny(method: str) -> list[str]:
    """The overrides of a run of some seconds that suits the method."""
    if method in DETECTORS:
        return [*DETECTION, *DETECTION_BUFFERS.get(method, []), f"method={method}"]
    return [*TINY, *SUITS.get(method, MLP_RESERVOIR), f"method={method}"]


def parts_of(method: str, *overrides: str) -> Parts:
    return build(compose_read([*list_tiny(method), *overrides]))


def trainer_of(parts: Parts, folder, stop=lambda: False) -> Trainer:
    return make_trainer(parts, folder, stop)


def write_pictures(place, classes=("ant", "bee", "cat"), train=6, test=3, seed=0):
    """A folder of small pictures, each class of a colour of its own; returns the folder."""
    rng = np.random.default_rng(seed)
    for split, count in (("train", train), ("test", test)):
        for number, name in enumerate(classes):
            (place / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 60, (12, 17, 3)).astype(np.uint8)
                pixels[..., number % 3] += 150
                Image.fromarray(pixels).save(place / split / name / f"{i}.png")
    return place


def make_run(
    root: Path,
    *,
    experiment: str = "digits",
    name: str = "er",
    fingerprint: str = "f0",
    seed: int = 0,
    class_il: list | None = CLASS_IL,
    accuracy: float | None = 68.6,
    loss_terms: tuple = ("cross_entropy", "replay"),
    **summary: object,
) -> Path:
    """A finished run of 5 tasks of 2 classes; ``summary`` overrides entries of ``summary.json``."""
    folder = root / experiment.replace("/", "_") / f"{name.replace('/', '_')}-{fingerprint}" / f"seed{seed}"
    folder.mkdir(parents=True)
    unknown = Matrix.empty(5)
    known = unknown if class_il is None else Matrix.from_accuracy(class_il)
    if accuracy is not None:  # the matrix of a run has the accuracy of its summary
        known.correct[-2] += (accuracy - average_accuracy(known)) * known.count / 100
    Record(known, Matrix.from_accuracy(TASK_IL, [50, 51, 52, 53, 54])).write_csv(folder / "accuracy_matrix.csv")
    cost = Cost(100.0, 5.0, 5000, 50.0, None, 1_000_000, 900_000, 1.25, 3 * 2**20, 2**19, None)
    data = {
        "schema": 1,
        "status": "finished",
        "experiment": experiment,
        "name": name,
        "method": "er",
        "backbone": "mlp",
        "scenario": "digits",
        "buffer": "reservoir",
        "seed": seed,
        "class_order_seed": 7,
        "data_seed": 0,
        "class_order": CLASS_ORDER,
        "tasks": FIVE_TASKS,
        "class_names": [f"digit_{i}" for i in range(10)],
        "scale": None,
        "evaluate_on": "test",
        "fingerprint": fingerprint,
        "comparable": {"trainer.epochs": 3, "method.alpha": 0.5},
        "class_il": {"average_accuracy": accuracy, "average_incremental_accuracy": 80.72, "forgetting": 28.25}
        if class_il
        else {"average_accuracy": None, "average_incremental_accuracy": None, "forgetting": None},
        "task_il": {"average_accuracy": 94.6, "forgetting": 2.5, "forward_transfer": None},
        "cost": dataclasses.asdict(cost),
        "published": None,
    }
    (folder / "summary.json").write_text(json.dumps(data | summary))
    label = np.repeat(np.arange(10), 10)
    right = label if class_il else np.full_like(label, -1)
    columns = {"index": np.arange(100), "label": label, "task": label // 2, "confidence": np.ones(100)}
    np.savez(folder / "predictions.npz", class_il=right, task_il=label, **columns)
    events: list[dict] = [{"event": "start", "step": 0}]
    for task in range(5):
        for epoch in range(3):
            losses = dict.fromkeys(loss_terms, 1.0 / (1 + epoch))
            step = 30 * task + 10 * (epoch + 1)
            events.append({"event": "epoch", "step": step, "task": task, "phase": 0, "epoch": epoch, "losses": losses})
        events.append({"event": "task", "step": 30 * (task + 1), "task": task})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (folder / "config.yaml").write_text(f"experiment: {experiment}\n")
    (folder / "env.json").write_text(json.dumps({"python": "3.11", "packages": {"torch": "2.14"}, "commit": None}))
    return folder


def make_split(source=None, **keys) -> Split:
    return Split(source=source or toy_images(), **(SPLIT_KEYS | keys))


def largest_difference(first, second):
    ours, theirs = first.method.state_dict(), second.method.state_dict()
    tensors = [name for name, value in ours.items() if isinstance(value, torch.Tensor)]
    assert len(tensors) > 2
    return max(float((ours[name].double() - theirs[name].double()).abs().max()) for name in tensors)
