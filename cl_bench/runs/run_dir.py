"""The files of a run folder, and the lock that keeps other processes out of it."""

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from cl_bench.config.schema import PACKAGE
from cl_bench.core.errors import ConfigError, RunError
from cl_bench.core.record import FAILURE
from cl_bench.engine.detection import Detections
from cl_bench.engine.evaluate import Evaluation
from cl_bench.scenarios.base import Scenario
from cl_bench.system.atomic import hold_lock, write_text


def write_json(path: Path, value: Any) -> None:
    """Write a whole JSON file or nothing."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_summary(folder: Path) -> Any:
    """The content of ``summary.json``; None if the run has not finished, :class:`ConfigError` if it is damaged."""
    path = folder / "summary.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ConfigError(
            str(path),
            expected="a JSON object",
            got=f"text that breaks off or is damaged ({error})",
            fix="Run the experiment again with overwrite=true, or leave this folder out.",
        ) from error
    except OSError as error:
        raise _explain_unusable(folder, error) from error


def _explain_unusable(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(
        "results_dir",
        expected="a folder that can be written to",
        got=f"{folder} ({error.strerror})",
        fix="Set results_dir=PATH to another folder, fix its permissions, or make room.",
    )


@contextmanager
def lock_run_dir(folder: Path) -> Iterator[None]:
    """Create the folder and hold its lock; a second process is refused."""
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(hold_lock(folder / ".lock"))
        except BlockingIOError:
            raise ConfigError(
                "results_dir",
                expected="a run folder that no other process is writing to",
                got=str(folder),
                fix="Wait for the other process, or change the seed or a setting to get another folder.",
            ) from None
        except OSError as error:
            raise _explain_unusable(folder, error) from error
        yield


@contextmanager
def explain_write_errors(folder: Path) -> Iterator[None]:
    """Turn an error of writing into one message; files are whole or absent, so nothing finished is lost."""
    try:
        yield
    except OSError as error:
        if not folder.exists():
            raise RunError(
                f"{folder}: the folder was removed while the run wrote to it. The same command starts the run again."
            ) from error
        where = f" ({error.filename})" if error.filename else ""
        raise RunError(
            f"{folder}: stopped, a file could not be written: {error.strerror or error}{where}. "
            "What is finished is kept. Make room or fix the folder; the same command goes on from the last checkpoint."
        ) from error


@contextmanager
def note_failure(folder: Path) -> Iterator[None]:
    """Inside, an error is also written into ``failure.txt``, which lasts until the run goes on."""
    (folder / FAILURE).unlink(missing_ok=True)
    try:
        yield
    except Exception as error:
        known = isinstance(error, ConfigError | RunError)
        with suppress(OSError):  # a full disk, a removed folder
            write_text(folder / FAILURE, f"{error}\n" if known else f"{type(error).__name__}: {error}\n")
        raise


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """``config.yaml``: the whole resolved configuration."""
    write_text(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True))


def write_environment(folder: Path, device: torch.device) -> None:
    """``env.json``: versions, commit, and facts about device and host.

    The only environment variable in it is CL_BENCH_COMMIT: the commit if there is no checkout, e.g. on a lent machine.
    """
    packages = ("cl-bench", "torch", "torchvision", "numpy", "hydra-core", "omegaconf", "timm", "scikit-learn")
    facts = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cuda": collect_cuda_facts() if device.type == "cuda" else None,
        "versions": {name: find_version(name) for name in packages},
        "commit": find_commit() or os.environ.get("CL_BENCH_COMMIT"),
    }
    write_json(folder / "env.json", facts)


def collect_cuda_facts() -> dict[str, Any]:
    """Versions of CUDA's libraries, and the settings that decide how they round; by default those of torch.

    With ``convolutions`` tf32, torch's default, convolutions keep ten bits of each factor even in ``precision=fp32``.
    """
    return {
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "convolutions": "tf32" if torch.backends.cudnn.allow_tf32 else "fp32",
        "matrix_products": torch.get_float32_matmul_precision(),
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "cudnn_deterministic": torch.backends.cudnn.deterministic,
    }


def find_version(package: str) -> str | None:
    """The installed version of a package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def find_commit() -> str | None:
    """The checkout's commit, with ``+changes`` if files differ from it; None if git does not track this package.

    If the package is installed into another project, e.g. in its ``.venv``, it is inside that project's repository,
    whose commit says nothing about this code.
    """

    # without GIT_DIR and similar variables, which a hook of another repository sets
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(PACKAGE), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def write_predictions(folder: Path, answers: Evaluation | Detections, scenario: Scenario) -> None:
    """``predictions.npz``: one entry per test image, in the data set's own order, with its own class ids."""
    original = np.append(np.array(scenario.class_order), -1)  # position -1 (not answered) -> -1
    columns = _list_boxes(answers, original) if isinstance(answers, Detections) else _list_answers(answers, original)
    partial = folder / "predictions.partial.npz"
    np.savez_compressed(partial, **columns)  # type: ignore[arg-type]  # a name could be allow_pickle
    partial.replace(folder / "predictions.npz")


def _list_boxes(answers: Detections, original: np.ndarray) -> dict[str, np.ndarray]:
    """Objects and boxes of each image, and the first images themselves, for the report."""
    labels = answers.labels.numpy().copy()
    labels[..., 0] = original[labels[..., 0].astype(int)]
    return {
        "index": answers.index.numpy(),
        "label": labels,
        "class_il": original[answers.classes.numpy()],
        "confidence": answers.confidence.numpy(),
        "boxes": answers.boxes.numpy(),
        "examples": answers.examples.numpy(),
    }


def _list_answers(answers: Evaluation, original: np.ndarray) -> dict[str, np.ndarray]:
    order = np.argsort(answers.index.numpy(), kind="stable")
    return {
        "index": answers.index.numpy()[order],
        "label": original[answers.label.numpy()[order]],
        "task": answers.task.numpy()[order],
        "class_il": original[answers.class_il.numpy()[order]],
        "task_il": original[answers.task_il.numpy()[order]],
        "confidence": answers.confidence.numpy()[order],
    }
