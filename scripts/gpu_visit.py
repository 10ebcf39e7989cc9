"""A visit to a lent GPU in stages of some minutes; each result is printed as soon as it is there.

python scripts/gpu_visit.py STAGE ... [--device cuda:0] [--work DIR] [--out DIR] [--seconds S]

At home, before:
  carry SCRIPT STRIPS DIR   fill DIR with what is carried: wheels/, the folder STRIPS in two halves, first/ and second/,
                            and the SCRIPT that makes CIFAR-100 from it
There, in this order (docs/gpu.md):
  setup DIR                 install the wheels of DIR into a folder of --work; versions and flags
  decode DIR                collect a half; if it contains the SCRIPT, run it: SCRIPT --out WORK/data
  probe                     whether a small copy to the device waits for the kernels before it
  smoke                     tests/test_cuda.py
  rates                     milliseconds of a step of ER, DER++ and LVT at full size, eager and as a graph, and of the
                            bare step
  full ROW[,ROW] SECONDS    train rows of scripts/reproduction; the row "first" is derpp500 if rates found a step of
                            DER++ fast enough for the time available, else er500
  pack                      records without checkpoints, and the newest checkpoint between two tasks, in parts

Every item is a process with its own time limit. Its result is one line of JSON, at once on standard output and in
visit.jsonl; what it printed is in visit.log. Exit status: 0 all items succeeded, 1 one did not, 2 wrong arguments.
--device cpu --speed eager --scale mini --steps 3 rehearses all of it.
"""

import argparse
import contextlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

STAGES = {"carry": 3, "setup": 1, "decode": 1, "probe": 0, "smoke": 0, "rates": 0, "full": 2, "pack": 0}
"""Each stage with the number of its arguments."""

LIMITS = {"carry": 120, "setup": 60, "decode": 60, "probe": 40, "smoke": 75, "rates": 60, "pack": 60}
"""Seconds that an item of a stage may take."""

METHODS = ("derpp", "er", "lvt")
SPEEDS = ("graph", "eager")
FIRST = "first"
FIRST_MS = 6.5
"""Milliseconds per step at which the 78,500 steps of derpp500 take 510 seconds."""

GRACE_SECONDS = 20
"""Seconds that a run has to save and stop when its time is over."""

STOPPED = 143
"""Exit status of ``full`` if runs are left."""

Facts = dict[str, Any]


@dataclass(frozen=True)
class Item:
    """A process of a stage.

    Attributes:
        command: its arguments after ``python``.
        limit: seconds after which it is killed.
        read: what it printed -> facts of the result, beside the last JSON object that it printed.
    """

    stage: str
    command: list[str]
    limit: float
    name: str = ""
    read: Callable[[str], Facts] = lambda printed: {}


class Visit:
    """Runs items one after the other and reports each result.

    Args:
        work: folder outside the checkout, for everything that is made on the way.
        out: folder for what is brought home; it gets ``visit.jsonl`` and ``visit.log``.
        device: of everything that is measured and trained.
        seconds: from now; then everything is stopped.
    """

    def __init__(self, work: Path, out: Path, device: str, seconds: float = math.inf) -> None:
        self.work, self.out, self.device = work, out, device
        self.deadline = time.monotonic() + seconds
        self.failed = False
        for folder in (work, out):
            folder.mkdir(parents=True, exist_ok=True)

    def run(self, item: Item) -> None:
        """Run one item; its result is printed and written at once."""
        began = time.monotonic()
        log = self.out / "visit.log"
        with log.open("ab") as file:
            start = file.tell()
            code = _run(item.command, min(item.limit, self.deadline - began), file, self._make_environment())
        printed = log.read_bytes()[start:].decode(errors="replace")
        status = {0: "ok", STOPPED: "stopped", None: "timeout"}.get(code, "failed")
        line: Facts = {"stage": item.stage, "item": item.name, "status": status}
        line["seconds"] = round(time.monotonic() - began, 1)
        if status == "failed":
            line |= {"exit": code, "why": _find_last_line(printed)}
        self.tell(line | item.read(printed) | _find_last_object(printed))

    def tell(self, line: Facts) -> None:
        """Print a result, and store it with those of this call and with those of all calls on this machine."""
        self.failed |= line["status"] not in ("ok", "stopped")
        text = json.dumps(line)
        for folder in (self.work, self.out):
            with (folder / "visit.jsonl").open("a") as file:
                file.write(text + "\n")
        print(text, flush=True)

    def read_results(self) -> list[Facts]:
        """The lines of every call on this machine."""
        path = self.work / "visit.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def _make_environment(self) -> dict[str, str]:
        path = [ROOT, ROOT / "scripts", self.work / "site", os.environ.get("PYTHONPATH", "")]
        ours = {"PYTHONPATH": os.pathsep.join(str(p) for p in path if str(p)), "CL_BENCH_DATA": str(self.work / "data")}
        ours |= {"CL_BENCH_TEST_DEVICE": self.device}
        commit = self.work / "commit"  # the copy there has no .git
        kept = {
            key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"
        }  # seconds an import
        return kept | ours | ({"CL_BENCH_COMMIT": commit.read_text().strip()} if commit.exists() else {})


def _run(arguments: list[str], limit: float, log: Any, environment: dict[str, str]) -> int | None:
    """The exit status of ``python ...``; None if it and its children were killed after ``limit`` seconds."""
    with subprocess.Popen(
        [sys.executable, "-u", *arguments],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        process_group=0,  # not a session: who ends this process from outside must end that one, too
    ) as child:
        try:
            return child.wait(max(0.0, limit))
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)


def _find_last_line(printed: str) -> str:
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def _find_last_object(printed: str) -> Facts:
    """The last JSON object that a process printed as a line of its own."""
    for line in reversed(printed.splitlines()):
        if line.startswith("{"):
            try:
                return json.loads(line)
            except json.JSONDecodeError:
                continue  # cut off
    return {}


# -- stages --------------------------------------------------------------------------------------------------------


def list_items(stage: str, arguments: Sequence[str], visit: Visit, options: argparse.Namespace) -> Iterator[Item]:
    """The processes of a stage; ``options`` are those of the command."""
    work, device = visit.work, visit.device
    limit = LIMITS.get(stage, 0) * (4 if device == "cpu" else 1)  # a rehearsal has more time
    paths = [Path(argument).resolve() for argument in arguments]

    def part(name: str, *its: object) -> list[str]:
        return ["-m", "speed.visit", name, *map(str, its)]

    if stage == "carry":
        yield Item(stage, part("carry", *paths), limit)
    if stage == "setup":
        [folder] = paths
        if (folder / "commit").exists():
            shutil.copy(folder / "commit", work / "commit")
        install = ["-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--upgrade", "--target", work / "site"]
        yield Item(stage, [*map(str, [*install, *folder.glob("*.whl")])], limit, "wheels")
        yield Item(stage, part("versions", device), limit, "versions")
    if stage == "decode":
        yield Item(stage, part("decode", *paths, work / "strips", work / "data"), limit, paths[0].name)
    if stage == "probe":
        yield Item(stage, part("probe", device), limit)
    if stage == "smoke":
        several = ["--numprocesses=4"] if device != "cpu" else []  # an error of CUDA ends its own process only
        tests = ["-m", "pytest", "tests/test_cuda.py", "-vv", "--durations=0", "-p", "no:cacheprovider", *several]
        yield Item(stage, tests, limit, read=read_tests)
    if stage == "rates":
        for speed in SPEEDS:
            for method in METHODS:
                scaled = [f"+scale={options.scale}"] if options.scale else []
                measure = part("rates", method, speed, options.steps, device, *scaled)
                yield Item(stage, measure, limit, f"{method} {speed}")
    if stage == "full":
        rows = [choose_first_row(visit.read_results()) if row == FIRST else row for row in arguments[0].split(",")]
        yield train_rows(rows, float(arguments[1]), work / "reproduction", options)
    if stage == "pack":
        yield Item(stage, part("pack", work / "reproduction", visit.out), limit)


def choose_first_row(results: Sequence[Facts]) -> str:
    """The first row to train, according to the last measured rate of DER++ as a graph."""
    measured = [r["ms"] for r in results if r["item"] == "derpp graph" and r.get("ms") is not None]
    return "derpp500" if measured and measured[-1] <= FIRST_MS else "er500"


def train_rows(rows: Sequence[str], seconds: float, out: Path, options: argparse.Namespace) -> Item:
    """Train rows for ``seconds``; a run that is not finished then saves and stops."""
    command = ["scripts/reproduce.py", *rows, "--seeds", "1", "--minutes", str(seconds / 60), "--out", str(out)]
    command += ["--grace", str(GRACE_SECONDS), *(["--scale", options.scale] if options.scale else []), "--set"]
    command += [f"device={options.device}", f"trainer.speed={options.speed}", "trainer.checkpoint_seconds=600"]
    return Item(
        "full", command, seconds + GRACE_SECONDS + 30, ",".join(rows), lambda printed: {"runs": read_progress(out)}
    )


def read_progress(out: Path) -> list[Facts]:
    """How far each run is: its last event, and its accuracies if it is finished."""
    found = []
    for metrics in sorted(out.glob("records/*/*/*/metrics.jsonl")):
        folder = metrics.parent
        lines = metrics.read_text().splitlines()
        last = json.loads(lines[-1]) if lines else {}
        facts: Facts = {"run": str(folder.relative_to(out / "records"))}
        facts |= {key: last[key] for key in ("task", "epoch", "step", "class_il_average") if key in last}
        if (folder / "summary.json").exists():
            summary = json.loads((folder / "summary.json").read_text())
            facts |= {s: summary[s]["average_accuracy"] for s in ("class_il", "task_il")}
            facts |= {"speed": summary["speed"], "train_seconds": summary["cost"]["train_seconds"]}
        found.append(facts)
    return found


def read_tests(printed: str) -> Facts:
    """How many tests passed, failed and were skipped so far, and which failed, from pytest's verbose lines."""
    ends = re.findall(r"^(?=.*%\])(?=.*?(\S+::\S+)).*\b(PASSED|FAILED|ERROR|SKIPPED)\b", printed, re.MULTILINE)
    counts = Counter(word for _, word in ends)
    bad = [name for name, word in ends if word in ("FAILED", "ERROR")]
    return {word: counts[word.upper()] for word in ("passed", "failed", "error", "skipped")} | {"bad": bad[:20]}


# -- the command ---------------------------------------------------------------------------------------------------


def parse_stages(words: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Stages with their arguments; ValueError says what is wrong."""
    stages, rest = [], list(words)
    while rest:
        stage = rest.pop(0)
        if stage not in STAGES:
            raise ValueError(f"no stage {stage}; there are {', '.join(STAGES)}")
        arguments, rest = rest[: STAGES[stage]], rest[STAGES[stage] :]
        if len(arguments) < STAGES[stage] or set(arguments) & set(STAGES):
            raise ValueError(f"{stage} needs {STAGES[stage]} arguments, got {' '.join(arguments) or 'none'}")
        if stage == "full":
            try:
                float(arguments[1])
            except ValueError:
                raise ValueError(f"full needs ROW[,ROW] SECONDS, got {' '.join(arguments)}") from None
        stages.append((stage, arguments))
    return stages


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line, its ``stages`` with their arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="+", metavar="STAGE", help="stages, each followed by its arguments")
    parser.add_argument("--device", default="cuda:0", help="cpu for a rehearsal (default: cuda:0)")
    parser.add_argument("--work", type=Path, default=Path("/tmp/visit"), metavar="DIR", help="default: /tmp/visit")
    parser.add_argument("--out", type=Path, metavar="DIR", help="for what is brought home (default: WORK/out)")
    parser.add_argument("--seconds", type=float, default=math.inf, metavar="S", help="stop everything after so many")
    parser.add_argument("--speed", default="graph", help="trainer.speed of full (default: graph)")
    parser.add_argument("--scale", choices=["mini"], help="scale of the training, for a rehearsal")
    parser.add_argument(
        "--steps", type=int, default=300, metavar="N", help="number of steps that rates times (default: 300)"
    )
    options = parser.parse_args(arguments)
    try:
        options.stages = parse_stages(options.stages)
    except ValueError as error:
        parser.error(str(error))
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    options = read_options(arguments)
    work = options.work.resolve()
    visit = Visit(work, (options.out or work / "out").resolve(), options.device, options.seconds)
    for stage, its in options.stages:
        try:
            for item in list_items(stage, its, visit, options):
                visit.run(item)
        except OSError as error:
            visit.tell({"stage": stage, "item": "", "status": "failed", "why": f"{type(error).__name__}: {error}"})
    return int(visit.failed)


if __name__ == "__main__":
    sys.exit(main())
