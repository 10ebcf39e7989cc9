"""What the stages of a visit to a GPU do (scripts/gpu_visit.py): each a process, its result a JSON object.

What a machine may lack is imported where it is needed.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

WHEELS = ("hydra-core", "omegaconf", "antlr4-python3-runtime")
"""What a machine with PyTorch lacks. They are pure Python, so that wheels made here serve there."""

PART_BYTES = 15 * 2**20
"""Largest size of a part that is brought home; a ResNet18 with its exemplars makes three."""

WARM_UP = 50
"""Steps before the timed ones: by then a buffer of 500 is full, and whatever is captured is captured."""

EXPERIMENTS = {
    "er": "resnet18_er_cifar100_10split",
    "derpp": "resnet18_derpp_cifar100_10split",
    "lvt": "lvt_cifar100_10split",
}

Facts = dict[str, Any]


def carry(script: str, strips: str, into: str) -> Facts:
    """Make a folder of what travels: the wheels with the commit, and the files in ``strips`` in two halves."""
    from cl_bench.runs.run_dir import find_commit

    folder, source = Path(into), Path(strips)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--constraint", str(ROOT / "constraints.txt")]
    subprocess.run([*pip, "--wheel-dir", str(folder / "wheels"), *WHEELS], check=True)
    if known := find_commit():
        (folder / "wheels" / "commit").write_text(known)
    files = sorted(source.iterdir())
    half, size = sum(file.stat().st_size for file in files) / 2, 0
    for name in ("first", "second"):
        (folder / name / source.name).mkdir(parents=True)
    for file in files:
        shutil.copy(file, folder / ("first" if size < half else "second") / source.name)
        size += file.stat().st_size
    shutil.copy(script, folder / "second")
    return {f"{name}_mib": _mib(folder / name) for name in ("wheels", "first", "second")}


def decode(half: str, strips: str, data: str) -> Facts:
    """Add a half to ``strips``. If it contains the script, run the script: it writes ``data`` and checks the files."""
    shutil.copytree(half, strips, dirs_exist_ok=True)
    for script in Path(half).glob("*.py"):
        subprocess.run([sys.executable, Path(strips) / script.name, "--out", data], check=True)
    return {"strips_mib": _mib(Path(strips)), "data_mib": _mib(Path(data))}


def _mib(folder: Path) -> float:
    return round(sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 2**20, 1)


def versions(device: str) -> Facts:
    """Versions, hardware and flags; an error if the command cannot start here."""
    import torch
    import torch._dynamo  # what an optimizer imports: compiled once, here, where the machine's packages are not
    from PIL import features

    import cl_bench.runs.run  # noqa: F401 - everything that a run imports
    from cl_bench.config.build import choose_device
    from cl_bench.runs.run_dir import collect_cuda_facts, find_commit, find_version

    chosen = choose_device(device)
    on_gpu = chosen.type == "cuda"
    packages = ("torch", "torchvision", "numpy", "hydra-core", "omegaconf", "timm", "pillow", "pytest", "nvidia-ml-py")
    return {
        "python": platform.python_version(),
        "versions": {name: find_version(name) for name in packages},
        "commit": find_commit() or os.environ.get("CL_BENCH_COMMIT"),
        "webp": features.check("webp"),
        "device": torch.cuda.get_device_name(chosen) if on_gpu else chosen.type,
        "device_gib": round(torch.cuda.get_device_properties(chosen).total_memory / 2**30, 1) if on_gpu else None,
        "flags": collect_cuda_facts() if on_gpu else None,
    }


def probe(device: str) -> Facts:
    """Milliseconds that the host spends in a small copy to the device behind a queue of kernels, for each kind of copy.

    ``waits`` is whether the copy took at least half as long as the whole queue.
    """
    import torch

    on_gpu = device != "cpu"
    size = 8192 if on_gpu else 256
    matrix = torch.randn(size, size, device=device)
    small = torch.arange(32)
    copies: dict[str, Callable[[], Any]] = {
        "pageable": lambda: small.to(device, copy=True),
        "pageable_non_blocking": lambda: small.to(device, non_blocking=True, copy=True),
    }
    if on_gpu:
        pinned = small.pin_memory()
        copies["pinned_non_blocking"] = lambda: pinned.to(device, non_blocking=True, copy=True)

    def wait() -> None:
        if on_gpu:
            torch.cuda.synchronize(device)

    found: Facts = {}
    for _ in range(2):  # the first time warms up
        for name, copy in copies.items():
            wait()
            began = time.perf_counter()
            for _ in range(5):
                matrix @ matrix
            queued = time.perf_counter()
            copy()
            copied = time.perf_counter()
            wait()
            all_ms, copy_ms = (1e3 * (end - start) for end, start in ((time.perf_counter(), began), (copied, queued)))
            waits = copy_ms > all_ms / 2 if on_gpu else None
            found[name] = {"copy_ms": round(copy_ms, 3), "queue_ms": round(all_ms, 3), "waits": waits}
    return found


def rates(method: str, speed: str, steps: str, device: str, *overrides: str) -> Facts:
    """Milliseconds of a step in the loop, with a full buffer, in the second of two tasks; and of the bare step.

    The bare step computes the same loss terms on one batch that is already on the device, with the same optimizer: no
    draws, no augmentation, no buffer, no log. As a graph its forward and backward pass are captured, like the loop's.
    """
    import torch

    from cl_bench.loggers.base import Logger, Progress
    from cl_bench.methods.base import FunctionalMethod
    from speed.common import BATCH, build_parts, choose_random_pixels, close_task, get_first_phase, open_loop, shorten

    if speed == "graph" and device == "cpu":
        return {"ms": None, "note": "a graph needs a CUDA device"}
    timed, warm_up = int(steps), min(WARM_UP, int(steps))
    images = (timed + warm_up) * BATCH
    base = [f"+experiment={EXPERIMENTS[method]}", *choose_random_pixels(2 * images // 100 + 2), "scenario.num_tasks=2"]
    parts = build_parts(*base, f"device={device}", f"trainer.speed={speed}", *overrides)
    wait = torch.cuda.synchronize if parts.device.type == "cuda" else lambda: None

    class Marks(Logger):
        """When the timed steps begin, are a third and two thirds done, and end."""

        def __init__(self) -> None:
            self.after = [warm_up + timed * third // 3 for third in range(4)]
            self.at: list[float] = []

        def start(self, run: Any) -> None:
            pass

        def log_event(self, number: int, event: Facts) -> None:
            pass

        def finish(self, status: str, summary: Facts | None) -> None:
            pass

        def log_step(self, progress: Progress) -> None:
            if progress.step + 1 in self.after:
                wait()
                self.at.append(time.perf_counter())

    marks = Marks()
    with open_loop(parts, marks) as trainer:
        first, second = parts.scenario.tasks
        close_task(parts, shorten(first, min(images, 2 * parts.buffer.capacity)))  # LVT stores when a task is closed
        second = shorten(second, images)
        phase = get_first_phase(parts, second)
        trainer.run_phase(second, 0, phase, None)
        took = 1e3 * (marks.at[-1] - marks.at[0]) / timed
        data = second.train.take(slice(0, BATCH))
        assert isinstance(parts.method, FunctionalMethod)
        assert isinstance(data.images, torch.Tensor)
        inputs = parts.method.inputs(trainer.make_batch(data.images, data.labels, second))
        facts = trainer.executor.describe()
    peak = torch.cuda.max_memory_allocated() / 2**20 if parts.device.type == "cuda" else None
    result = {
        "ms": round(took, 3),
        "thirds_ms": [round(3e3 * (b - a) / timed, 3) for a, b in zip(marks.at, marks.at[1:])],
        "exemplars": len(parts.buffer),
        "peak_mib": peak and round(peak),
    } | facts
    print(json.dumps(result), flush=True)  # so that it is kept if the rest fails
    bare = make_bare_step(parts, phase, inputs, second.id, captured=speed == "graph")
    for _ in range(min(10, warm_up)):
        bare()
    wait()
    began = time.perf_counter()
    for _ in range(timed):
        bare()
    wait()
    limit = 1e3 * (time.perf_counter() - began) / timed
    return result | {"bare_ms": round(limit, 3), "of_bare": round(limit / took, 3)}


def make_bare_step(parts: Any, phase: Any, inputs: Any, task: int, captured: bool) -> Callable[[], None]:
    """The limit: one step on fixed inputs, its forward and backward pass captured if asked for."""
    import torch

    from cl_bench.engine.step import sum_losses

    method, optimizer = parts.method, parts.optimizer(phase.params)
    method.train()

    def gradients() -> None:
        with parts.autocast:
            losses, _ = method.terms(inputs, task)
        optimizer.zero_grad()
        sum_losses(losses.values()).backward()

    compute = gradients
    if captured:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                gradients()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            gradients()
        compute = graph.replay

    def step() -> None:
        compute()
        optimizer.step()

    return step


def pack(records: str, out: str) -> Facts:
    """Write what is brought home into ``out``, in parts; ``cat`` joins them to tar files.

    ``records.part.N``: everything but checkpoints. ``checkpoint.part.N``: of the runs that are not finished, the newest
    checkpoint between two tasks.
    """
    root, target = Path(records), Path(out)
    rest = [p for p in sorted(root.rglob("*")) if p.is_file() and p.parent.name != "checkpoint" and p.name != ".lock"]
    found: Facts = {"records": write_parts(root, rest, target / "records")}
    unfinished = [p for p in root.rglob("boundary.pt") if not (p.parents[1] / "summary.json").exists()]
    if unfinished:
        newest = max(unfinished, key=lambda path: path.stat().st_mtime)
        found |= {"run": str(newest.parents[1].relative_to(root))}
        found |= {"checkpoint": write_parts(root, [newest], target / "checkpoint")}
    return found


def write_parts(root: Path, files: list[Path], archive: Path) -> list[int]:
    """Pack ``files`` under their names below ``root``, cut into ``archive.part.0``, ...; returns the parts' bytes."""
    whole = archive.with_suffix(".partial")
    with tarfile.open(whole, "w:gz", compresslevel=1) as packed:
        for file in files:
            packed.add(file, file.relative_to(root))
    sizes = list(cut(whole.stat().st_size))
    with whole.open("rb") as stream:
        for number, size in enumerate(sizes):
            archive.with_suffix(f".part.{number}").write_bytes(stream.read(size))
    whole.unlink()
    return sizes


def cut(size: int) -> Iterator[int]:
    """The sizes of equal parts, as few as possible, each at most :data:`PART_BYTES`."""
    parts = max(1, -(-size // PART_BYTES))
    for number in range(parts):
        yield size * (number + 1) // parts - size * number // parts


def main() -> None:
    """Run the part that is named, and print its result as one line."""
    name, *arguments = sys.argv[1:]
    parts = {part.__name__: part for part in (carry, decode, versions, probe, rates, pack)}
    print(json.dumps(parts[name](*arguments)))


if __name__ == "__main__":
    main()
