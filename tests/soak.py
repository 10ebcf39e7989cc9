"""Kills runs of every method at random moments and demands that they end as if nothing had happened.

    make soak                          # everything: half an hour or so on one core
    python tests/soak.py --kills 12    # what the tests do

Python, torch and this program are loaded once; every run is a fork of that process which calls the command's ``main``
with its arguments, so that a kill and a resumption cost about a second. Some runs are the real command. To hit a
moment, the fork counts the calls of a function that belongs to it and sends itself SIGKILL at the chosen one.
"""

import argparse
import gc
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from helpers import (
    DETECTORS,
    METHODS,
    TINY,
    assert_equal_results,
    command_environment,
    list_logged,
    list_tiny,
    read_points,
    wandb_files,
    wandb_records,
    write_pictures,
)

import cl_bench.engine.evaluate as evaluation
from cl_bench import __main__ as main_module
from cl_bench.backbones import hybrid, navit  # noqa: F401 - timm is loaded before the forks, too
from cl_bench.config.schema import compose_config, find_unread
from cl_bench.core.record import Record
from cl_bench.data import digits  # noqa: F401 - loaded before the forks
from cl_bench.data.pictures import Decoder, list_kinds
from cl_bench.engine.trainer import Trainer
from cl_bench.report import page
from cl_bench.runs import run as run_module
from cl_bench.runs import run_dir as files

MLP = ["backbone=mlp", "backbone.hidden=[32]"]
SLIM = ["backbone=resnet18_slim", "backbone.width=4"]
VIT = ["backbone=vit", "backbone.patch_size=4", "backbone.dim=16", "backbone.depth=1", "backbone.heads=2"]
PLAIN = [MLP, SLIM, VIT]
FAMILY = [
    ["backbone=deepvit", "backbone.patch_size=4", "backbone.dim=12", "backbone.depth=2"],
    [*("backbone=navit", "backbone.patch_size=2", "backbone.dim=16", "backbone.depth=1", "backbone.heads=2"),
     "backbone.token_drop=0.25"],
    [*("backbone=cvt", "backbone.dims=[8,16,16]", "backbone.depths=[1,1,1]", "backbone.heads=[1,2,2]"),
     "backbone.strides=[1,1,2]"],
    ["backbone=cct", "backbone.dim=16", "backbone.depth=2", "backbone.heads=2", "backbone.conv_layers=1"],
    [*("backbone=levit", "backbone.stride=4", "+backbone.options.embed_dim=[32,48,64]"),
     *("+backbone.options.depth=[1,1,1]", "+backbone.options.num_heads=[2,2,2]")],
    ["backbone=timm", "backbone.name=test_vit", "backbone.size=32"],
]  # fmt: skip
"""Small networks of the Vision Transformer family, for pictures of 8 x 8 pixels."""

ONLINE = ("er_ace", "mir", "agem", "ocs", "scr")
ORDINARY = ("finetune", "joint", "er", "derpp", "icarl", "lwf", "ewc", "gdumb", "simplecil", "ranpac")
NETWORKS = {
    **dict.fromkeys((*ORDINARY, "er_ace", "mir", "agem"), PLAIN),
    "supsup": [["backbone=mlp", "backbone.hidden=[64]"], SLIM],
}
"""Networks to choose from, for methods that do not bring their own."""

BUFFERS = {
    "er": ["reservoir", "fixed_memory", "confidence_aware", "herding", "class_balanced", "ring"],
    "derpp": ["reservoir"],
    "icarl": ["herding", "fixed_memory"],
    "lvt": ["confidence_aware", "reservoir", "fixed_memory"],
    "dytox": ["herding", "fixed_memory"],
}
CHECKPOINTS = ("1", "2", "3", "5", "null")
LONGEST = 600.0  # seconds that a run of about one may take on a busy machine before it counts as hanging


@dataclass(frozen=True)
class Case:
    """A configuration whose runs are killed."""

    method: str
    arguments: list[str]

    @classmethod
    def draw(cls, method: str, rng: random.Random, own: Path) -> "Case":
        """Data, network, buffer, precision and how often a checkpoint is written, at random.

        Args:
            own: a folder of pictures, which every third case learns.
        """
        precision = f"precision={rng.choice(['fp32', 'bf16'])}"
        arguments = list_tiny(method)
        if method in DETECTORS:
            return cls(method, [*arguments, precision, f"trainer.checkpoint_steps={rng.choice(CHECKPOINTS)}"])
        if method in NETWORKS:
            networks = FAMILY if method in ORDINARY and rng.random() < 1 / 2 else NETWORKS[method]
            arguments = [a for a in arguments if not a.startswith("backbone")] + rng.choice(networks)
            if networks is FAMILY or method == "ewc":  # its pull diverges on few channels, and such a run stops itself
                arguments.append("trainer.clip_norm=1")
        if method in BUFFERS:
            arguments += [f"buffer={rng.choice(BUFFERS[method])}", "buffer.capacity=20"]
        if method in ONLINE:
            arguments.append(f"trainer.steps_per_batch={rng.choice([1, 2])}")
        if method in ("finetune", *ONLINE[:3]) and rng.random() < 1 / 3:
            arguments.append("scenario.blurry=0.2")
        arguments += [
            precision,
            f"trainer.checkpoint_steps={rng.choice(CHECKPOINTS)}",
            f"trainer.evaluate_every={rng.choice(['1', '4', 'null', 'null'])}",
            "scenario.flip=true",
            "scenario.crop_padding=1",
        ]
        if rng.random() < 1 / 3:
            arguments += ["scenario=folder", f"data_dir={own}", "scenario.source.size=8"]
        unread = find_unread(arguments, compose_config(arguments))
        return cls(method, [a for a in arguments if a not in unread])


# -- moments -------------------------------------------------------------------------------------------------------


class Moments:
    """Counts what happens in a run, by moment, and ends the process with SIGKILL where it is told to.

    Args:
        moment: at which of :data:`NAMES`, None for nowhere.
        number: at which of its calls, from 1.
    """

    NAMES = (
        "while pictures are decoded",
        "before the first step",
        "in mid-epoch",
        "between phases",
        "during evaluation",
        "while a checkpoint is written",
        "after the last task",
    )

    def __init__(self, moment: str | None = None, number: int = 0) -> None:
        self.moment, self.number = moment, number
        self.counts: Counter[str] = Counter()

    def pass_by(self, moment: str) -> None:
        """This is ``moment``."""
        self.counts[moment] += 1
        if moment == self.moment and self.counts[moment] == self.number:
            os.kill(os.getpid(), signal.SIGKILL)

    def arm(self) -> None:
        """Put the counters into this process, which is a fork and ends after its run."""
        self._before(Decoder, "decode", lambda: "while pictures are decoded")
        self._before(
            Trainer, "make_batch", lambda: "in mid-epoch" if self.counts["make_batch"] > 1 else "before the first step"
        )
        self._before(Trainer, "generate_phase_steps", lambda: "between phases")
        self._before(evaluation, "choose_classes", lambda: "during evaluation")
        for owner, name in ((os, "fsync"), (Path, "replace")):
            self._before(owner, name, lambda: "while a checkpoint is written")
        for owner, name in (
            (files, "write_predictions"),
            (Record, "write_csv"),
            (files, "write_json"),
            (run_module, "write_report"),
        ):
            self._before(owner, name, lambda: "after the last task")
        save = torch.save

        def half(state: Any, file: Any) -> None:
            save(state, file)
            whole = file.tell()
            file.truncate(whole // 2)
            file.flush()
            self.pass_by("while a checkpoint is written")
            file.seek(0)
            save(state, file)

        torch.save = half

    def _before(self, owner: Any, name: str, moment: Callable[[], str]) -> None:
        function = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.counts[name] += 1
            self.pass_by(moment())
            return function(*args, **kwargs)

        setattr(owner, name, counted)


# -- runs ----------------------------------------------------------------------------------------------------------


def forked(
    arguments: list[str],
    cwd: Path,
    moments: Moments | None = None,
    seconds: float = LONGEST,
    prepare: Callable[[], None] | None = None,
) -> int:
    """Run the command in a fork of this process; returns its exit status, -9 when it was killed.

    Args:
        moments: where it is to be killed, and what counts its calls: ``counts.json`` in ``cwd``.
        seconds: after so many it is killed from outside.
        prepare: called in the fork before the run.
    """
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.chdir(cwd)
            with open("output.txt", "ab", buffering=0) as output:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
            os.environ.update(command_environment(HYDRA_FULL_ERROR="0"))
            sys.argv = ["cl_bench", *arguments]
            if prepare is not None:
                prepare()
            if moments is not None:
                moments.arm()
            main_module.main()
            status = 0
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            if moments is not None:
                Path("counts.json").write_text(json.dumps(moments.counts))
            os._exit(status)
    deadline = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return -signal.SIGKILL if seconds < LONGEST else 1
        time.sleep(0.002)


def real(arguments: list[str], cwd: Path, seconds: float) -> int:
    """The real command, killed after so many seconds; returns its exit status."""
    with (cwd / "output.txt").open("ab") as output:
        call = [sys.executable, "-m", "cl_bench", *arguments]
        process = subprocess.Popen(call, cwd=cwd, env=command_environment(), stdout=output, stderr=output)
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()


class Soak:
    """Kills so far, and what went wrong."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.rng = folder, random.Random(seed)
        self.kills: Counter[str] = Counter()
        self.methods: Counter[str] = Counter()
        self.settings: Counter[str] = Counter()
        self.failures: list[str] = []
        self.runs = 0

    @property
    def total(self) -> int:
        """Kills in all."""
        return sum(self.kills.values())

    def case(self, case: Case, sequences: int, logger: str = "none", through_command: bool = False) -> None:
        """One straight run, then several that are killed once to three times each."""
        place = self.folder / f"{self.runs:04}-{case.method}"
        place.mkdir(parents=True)
        arguments = [*case.arguments, f"logger={logger}"]
        if logger != "none":
            arguments += ["~logger.console"]
        counts, began = Moments(), time.monotonic()
        if self._run(arguments, place, "straight", counts) != 0:
            self.failures.append(f"{case}: the straight run failed, see {place}")
            return
        took = time.monotonic() - began
        counts.counts.update(json.loads((place / "counts.json").read_text()))
        straight = the_run(place / "straight")
        for sequence in range(sequences):
            name = f"killed{sequence}"
            plan = []
            for attempt in range(self.rng.randint(1, 6)):
                plan += self._kill(arguments, place, name, counts, took / (1 + attempt), through_command)
            status = self._run(arguments, place, name, pictures=self.rng.random() < 0.1)
            try:
                assert status == 0, f"exit status {status}"
                assert_equal_results(straight, the_run(place / name))
                assert (the_run(place / name) / "report.html").exists()
                check_logger(logger, straight, the_run(place / name))
            except Exception as error:
                self.failures.append(f"{case} after {plan}: {error!r:.2000}, see {place / name}")
            else:
                shutil.rmtree(place / name)
        if not any(str(place) in failure for failure in self.failures):
            shutil.rmtree(place)

    def _kill(
        self, arguments: list[str], place: Path, name: str, counts: Moments, took: float, through_command: bool
    ) -> list[str]:
        """One kill; returns what was done, nothing where the run ended before."""
        moment = self.rng.choice([*(name for name in Moments.NAMES if counts.counts[name]), "at any time"])
        last = counts.counts[moment]
        if through_command:
            moment, seconds = "at any time, the real command", self.rng.uniform(5.0, 5.0 + 2 * took)
            status, where = real([*arguments, *places(arguments, name)], place, seconds), f"{seconds:.1f} s"
        elif moment == "at any time":
            seconds = self.rng.uniform(0.0, took)
            status, where = self._run(arguments, place, name, seconds=seconds), f"{seconds:.2f} s"
        else:
            number = self.rng.randint(1, max(1, last // 2 if (place / name).exists() else last))  # less is left then
            status, where = self._run(arguments, place, name, Moments(moment, number)), f"{number} of {last}"
        if status != -signal.SIGKILL:
            if status != 0:
                self.failures.append(f"{arguments}: exit status {status} before {moment} {where}, see {place / name}")
            return []
        self.kills[moment] += 1
        self.methods[next(a for a in arguments if a.startswith("method=")).removeprefix("method=")] += 1
        for prefix in ("precision=", "backbone=", "buffer=", "logger=", "scenario="):
            if chosen := [a for a in arguments if a.startswith(prefix)]:
                self.settings[chosen[-1]] += 1
        return [f"{moment} ({where})"]

    def _run(
        self,
        arguments: list[str],
        place: Path,
        name: str,
        moments: Moments | None = None,
        seconds: float = LONGEST,
        pictures: bool = False,
    ) -> int:
        self.runs += 1
        arguments = [*arguments, *places(arguments, name)]
        return forked(arguments, place, moments, seconds, None if pictures else no_pictures)


def places(arguments: list[str], name: str) -> list[str]:
    """Where a run writes to: results and decoded pictures of its own."""
    cache = [f"scenario.source.cache={name}/decoded"] if "scenario=folder" in arguments else []
    return [f"results_dir={name}", *cache]


def no_pictures() -> None:
    """In a fork: leave the pictures of the report out, which take longer than the whole run."""
    page.write_report = lambda place: (place / "report.html").touch()


def the_run(folder: Path) -> Path:
    """The one run folder below ``folder``."""
    [found] = folder.glob("*/*/seed0")
    return found


def check_logger(logger: str, straight: Path, killed: Path) -> None:
    """TensorBoard has the same points as without kills; W&B's counter of one run grows, each event is there."""
    if logger == "tensorboard":
        assert read_points(killed / "tensorboard") == read_points(straight / "tensorboard")
    if logger == "wandb":
        events = [json.loads(line) for line in (killed / "metrics.jsonl").read_text().splitlines()]
        numbers: set[int] = set()
        for file in wandb_files(killed):
            rows = list_logged(wandb_records(file))
            counter = [row["_step"] for row in rows]
            assert counter == sorted(set(counter)), counter
            numbers |= set(counter)
            told = [row for row in rows if row["_step"] < len(events)]  # after them come the pictures
            assert all(row["step"] == events[row["_step"]]["step"] for row in told), rows
        assert numbers - {len(events)} == {*range(len(events))}, numbers


# -- a fresh folder of pictures ------------------------------------------------------------------------------------


def two_starts(soak: Soak, own: Path, times: int) -> None:
    """Two real commands on one folder of pictures that was never decoded, the second some time after the first."""
    size = "scenario.source.size=256"  # takes as long as the second start comes after the first
    arguments = [*TINY, "scenario=folder", f"data_dir={own}", size, "backbone.hidden=[4]", "logger=none"]
    place = soak.folder / "two"
    place.mkdir()
    if forked([*arguments, *places(arguments, "alone")], place, prepare=no_pictures):
        soak.failures.append(f"two starts: the one alone failed, see {place}")
        return
    for number in range(times):
        cache, delay, started = f"scenario.source.cache=fresh{number}", soak.rng.uniform(0.0, 0.5), []
        with (place / "output.txt").open("ab") as output:
            for name, seconds in (("first", 0.0), ("second", delay)):
                time.sleep(seconds)
                call = [sys.executable, "-m", "cl_bench", *arguments, f"results_dir={name}{number}", cache]
                started.append(
                    subprocess.Popen(call, cwd=place, env=command_environment(), stdout=output, stderr=output)
                )
            statuses = [process.wait() for process in started]
        soak.runs += 2
        try:
            assert statuses == [0, 0], statuses
            for name in ("first", "second"):
                assert_equal_results(the_run(place / "alone"), the_run(place / f"{name}{number}"))
        except Exception as error:
            soak.failures.append(f"two starts, {delay:.2f} s apart: {error!r:.2000}, see {place}")


# -- a sweep in several processes ------------------------------------------------------------------------------------


def sweeps(soak: Soak, times: int) -> None:
    """Sweeps of two jobs at a time, stopped by SIGTERM and SIGKILL to the command alone, whenever; then let through.

    After each no job may be left, and in the end each run is that of a sweep that was left alone.
    """
    place = soak.folder / "sweeps"
    place.mkdir()
    call = [sys.executable, "-m", "cl_bench", "-m", *TINY, "method=er", "buffer=reservoir", "backbone.hidden=[8]"]
    call += ["trainer.epochs=200", "trainer.checkpoint_steps=20", "logger=none", "seed=0,1,2"]
    call += ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    environment = command_environment(TMPDIR=str(place))

    def start(name: str) -> subprocess.Popen[bytes]:
        with (place / "output.txt").open("ab") as output:
            return subprocess.Popen(
                [*call, f"results_dir={name}"], cwd=place, env=environment, stdout=output, stderr=output
            )

    def jobs() -> list[Path]:
        return list(place.glob("cl_bench-*/job.*"))

    began = time.monotonic()
    if start("straight").wait() != 0:
        soak.failures.append(f"sweep: the straight one failed, see {place}")
        return
    took = time.monotonic() - began
    for sequence in range(times):
        name, plan = f"killed{sequence}", []
        for number in soak.rng.choices([signal.SIGTERM, signal.SIGKILL], k=3):
            process, seconds = start(name), soak.rng.uniform(0, took)
            try:
                status = process.wait(seconds)
            except subprocess.TimeoutExpired:
                process.send_signal(number)
                status = process.wait(LONGEST)
            plan.append(f"{number.name} after {seconds:.1f} s: {status}")
            soak.runs += 1
            # before the command has asked for the signal it dies of it, and has no jobs yet
            if status not in (0, 128 + number, -number):
                soak.failures.append(f"sweep: {plan}, see {place}")
            if status in (128 + number, -number):
                soak.kills[f"at any time, a sweep by {number.name}"] += 1
            deadline = time.monotonic() + 60
            while jobs() and time.monotonic() < deadline:
                time.sleep(0.1)
            if jobs():
                soak.failures.append(f"sweep: {plan}: jobs are left, see {place}")
        try:
            assert start(name).wait(LONGEST) == 0
            straight = {run.parent.name: run.parent for run in (place / "straight").glob("*/*/*/summary.json")}
            killed = {run.parent.name: run.parent for run in (place / name).glob("*/*/*/summary.json")}
            assert straight.keys() == killed.keys() == {"seed0", "seed1", "seed2"}
            for seed in straight:
                assert_equal_results(straight[seed], killed[seed])
        except Exception as error:
            soak.failures.append(f"sweep after {plan}: {error!r:.2000}, see {place / name}")


# -- a full disk ---------------------------------------------------------------------------------------------------


def full_disk(soak: Soak, fills: int) -> dict[str, int] | None:
    """A run on a file system with less and less room, then with enough: one message, and the same results.

    Returns:
        How often a run stopped by each exit status; None where no file system can be mounted.
    """
    mount = soak.folder / "small"
    mount.mkdir()
    size = 1_000_000
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", mount], capture_output=True).returncode:
        return None
    place = soak.folder / "full"
    place.mkdir()
    arguments = [*TINY, "backbone.hidden=[4]", "trainer.checkpoint_steps=3", "logger=none"]
    found: Counter[str] = Counter()
    try:
        assert forked([*arguments, "results_dir=straight"], place, prepare=no_pictures) == 0
        need = sum(path.stat().st_size + 4096 for path in (place / "straight").rglob("*") if path.is_file())
        for fill in range(fills):
            room = max(4096, round(need * (fill + 0.5) / fills))
            ballast = mount / "ballast"
            ballast.write_bytes(b"\0" * max(0, size - room))
            output = place / "output.txt"
            output.unlink(missing_ok=True)
            status = forked([*arguments, f"results_dir={mount / 'r'}"], place, prepare=no_pictures)
            said = output.read_text()
            found[str(status)] += 1
            if status and not (said.startswith("cl_bench: ") and said.count("\n") == 1):
                soak.failures.append(f"full disk with {room} bytes: status {status}, {said[-2000:]}")
            ballast.unlink()
            if forked([*arguments, f"results_dir={mount / 'r'}"], place, prepare=no_pictures):
                soak.failures.append(f"full disk with {room} bytes: does not go on, {output.read_text()[-2000:]}")
            else:
                assert_equal_results(the_run(place / "straight"), the_run(mount / "r"))
            shutil.rmtree(mount / "r", ignore_errors=True)
    finally:
        subprocess.run(["umount", mount], check=True)
    return dict(found)


# -- two hundred tasks ---------------------------------------------------------------------------------------------


def many_tasks(soak: Soak, tasks: int) -> dict[str, list[float]]:
    """Memory (MB), open files and milliseconds a step at the first, the middle and the last tenth of a long run."""
    place = soak.folder / "many"
    place.mkdir()
    arguments = [
        "scenario=permuted_digits", f"scenario.num_tasks={tasks}", "scenario.train_per_class=20",
        "scenario.test_per_class=1", "trainer.epochs=2", "device=cpu", "method=er", "buffer=reservoir",
        "buffer.capacity=2000", "backbone=mlp", "backbone.hidden=[32]", "logger=tensorboard", "~logger.console",
    ]  # fmt: skip

    def watch() -> None:
        generate_phase_steps = Trainer.generate_phase_steps
        rows = []

        def measured(self: Trainer, *args: Any) -> Iterator[Any]:
            steps, began = self.steps_done, time.process_time()
            yield from generate_phase_steps(self, *args)
            spent = (time.process_time() - began) / (self.steps_done - steps)
            gc.collect()
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            opened = len(os.listdir("/proc/self/fd"))
            rows.append([pages * os.sysconf("SC_PAGE_SIZE") / 1e6, opened, 1e3 * spent])
            Path("rows.json").write_text(json.dumps(rows))

        Trainer.generate_phase_steps = measured  # type: ignore[method-assign,assignment]

    if forked([*arguments, "results_dir=r"], place, seconds=3600, prepare=watch) != 0:
        soak.failures.append(f"{tasks} tasks: failed, see {place}")
        return {}
    rows = json.loads((place / "rows.json").read_text())
    tenth = max(1, len(rows) // 10)
    parts = {"first": rows[tenth : 2 * tenth], "middle": rows[5 * tenth : 6 * tenth], "last": rows[-tenth:]}
    means = {name: [sum(column) / len(part) for column in zip(*part)] for name, part in parts.items()}
    for column, (what, slack) in enumerate([("memory", 1.05), ("open files", 1.0), ("time of a step", 1.5)]):
        if means["last"][column] > slack * means["first"][column]:
            soak.failures.append(f"{tasks} tasks: {what} grew from {means['first']} to {means['last']}")
    return means


def main() -> int:
    """Run the command; exit status 1 where anything failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=220, help="stop after so many kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--more", action="store_true", help="loggers, the real command, a full disk and 200 tasks, too")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="cl_bench_soak_"))
    soak = Soak(folder, options.seed)
    own = write_pictures(folder / "pictures", classes=[f"class {c}" for c in range(10)], train=10, test=4)
    list_kinds()  # loads PIL's decoders before the forks
    order = soak.rng.sample([*METHODS, *DETECTORS], len(METHODS) + len(DETECTORS))
    extra: dict[str, Any] = {}
    number = 0
    sequences = 3 if options.more else 1
    while soak.total < options.kills and len(soak.failures) < 10:
        soak.case(Case.draw(order[number % len(order)], soak.rng, own), sequences)
        number += 1
        print(f"{soak.total} kills, {len(soak.failures)} failures, {time.monotonic() - began:.0f} s", flush=True)
    if options.more:
        for logger, method in (("tensorboard", "er"), ("tensorboard", "dytox"), ("wandb", "finetune")):
            soak.case(Case.draw(method, soak.rng, own), sequences=3, logger=logger)
        for method in ("lvt", "apd"):
            soak.case(Case.draw(method, soak.rng, own), sequences=2, through_command=True)
        two_starts(soak, own, times=3)
        sweeps(soak, times=3)
        extra["full disk, runs by exit status"] = full_disk(soak, fills=12)
        extra["200 tasks: MB, open files, CPU ms a step"] = many_tasks(soak, 200)
        print(json.dumps(extra), soak.failures, flush=True)
    figures = {
        "kills": soak.total,
        "runs": soak.runs,
        "failures": len(soak.failures),
        "seconds": round(time.monotonic() - began),
        "moments": dict(sorted(soak.kills.items())),
        "methods": dict(sorted(soak.methods.items())),
        "settings": dict(sorted(soak.settings.items())),
        **extra,
    }
    print(json.dumps(figures, indent=2))
    for failure in soak.failures:
        print(f"FAILURE {failure}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    if not soak.failures:
        shutil.rmtree(folder, ignore_errors=True)
    return 1 if soak.failures else 0


if __name__ == "__main__":
    sys.exit(main())
