"""Run published settings, in slices if needed, and compare the results with the published numbers.

cl_bench reproduce NAME ... [--seeds N] [--scale mini] [--minutes M] [--jobs N] [--set KEY=VALUE ...] [--list]

NAME is a row of scripts/reproduction/*.yaml, one of these files (a group), or all. Without a NAME nothing is run: the
tables are made from the records. Finished runs are skipped, and an interrupted run is resumed. Exit status: 0 all runs
are finished, 143 stopped with runs left (the same command continues), 2 wrong names or settings, else that of the first
run that failed.
"""

import argparse
import math
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from cl_bench.config.explain import explain
from cl_bench.config.schema import PACKAGE, compose_config, compute_fingerprint, select_comparable, to_plain_dict
from cl_bench.core.errors import ConfigError, require
from cl_bench.report.published import Group, choose_rows, read_groups
from cl_bench.runs.run import choose_run_dir
from cl_bench.runs.run_dir import read_summary
from cl_bench.system.signals import collect_stop_signals

INSTALLED = PACKAGE / "reproduction"
ROWS = INSTALLED if INSTALLED.is_dir() else PACKAGE.parent / "scripts" / "reproduction"
"""The published settings: inside the package when installed from a wheel, in ``scripts/`` in a checkout."""

OUT = Path("results/reproduction")
PAGES = ("README.md", "docs/methods/*.md")
STOPPED = 143
GRACE_SECONDS = 60.0
"""Seconds that a run has by default to save and stop; then it is killed."""


@dataclass(frozen=True)
class Job:
    """A run: its command line, and the folder that it will have."""

    name: str
    overrides: list[str]
    folder: Path

    @property
    def state(self) -> str:
        """finished, begun or not begun."""
        if read_summary(self.folder):
            return "finished"
        return "begun" if (self.folder / "checkpoint").exists() else "not begun"

    @property
    def command(self) -> str:
        """As one would type it."""
        return shlex.join(["python", "-m", "cl_bench", *self.overrides])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="cl_bench reproduce", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="a row, a group or all")
    parser.add_argument("--seeds", type=int, metavar="N", help="seeds 0 to N-1 (default: what the row says)")
    parser.add_argument("--scale", choices=["mini"], help="small runs, not compared with published numbers")
    parser.add_argument("--minutes", type=float, default=math.inf, metavar="M", help="stop after so many minutes")
    parser.add_argument(
        "--grace", type=float, default=GRACE_SECONDS, metavar="S", help="seconds that a run has to save and stop then"
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs side by side, of one thread each")
    parser.add_argument("--set", nargs="+", default=[], action="extend", metavar="KEY=VALUE", help="for every run")
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"of records and tables (default: {OUT}[-mini])")
    parser.add_argument("--list", action="store_true", help="show the runs and their state, and run nothing")
    options = parser.parse_args(arguments)
    deadline = time.monotonic() + 60 * options.minutes
    out = options.out or (OUT if options.scale is None else OUT.with_name(f"{OUT.name}-{options.scale}"))
    try:
        groups = read_groups(ROWS)
        rows = choose_rows(groups, options.names)
        require(
            options.seeds is None or options.seeds > 0,
            "--seeds",
            expected="1 or more",
            got=options.seeds,
            fix="Leave it out.",
        )
        require(options.jobs > 0, "--jobs", expected="1 or more", got=options.jobs, fix="One for each core.")
        jobs = plan(rows, options.seeds, options.scale, options.set, out / "records")
        if options.list:
            for job in jobs:
                print(f"{job.state:9}  {job.command}")
            return 0
        status = run(jobs, deadline, options.grace, options.jobs)
        write_tables(groups, [group for group, _ in rows], out)
    except (ConfigError, HydraException, OmegaConfBaseException) as error:
        print(f"reproduce: {explain(error)}", file=sys.stderr)
        return 2
    return status


def plan(
    rows: Sequence[tuple[Group, str]], seeds: int | None, scale: str | None, extra: Sequence[str], records: Path
) -> list[Job]:
    """The runs of these rows: the first seed of all rows, then the second, so that an early end leaves some of each."""
    jobs: dict[int, list[Job]] = {}
    for group, name in rows:
        row = group.rows[name]
        for variant in group.variants(row):
            own = [f"name={name}", f"results_dir={records}"]
            base = [*variant, *([f"+scale={scale}"] if scale else [])]
            values = to_plain_dict(compose_config([*base, *extra, *own]))
            settings = select_comparable(values)
            if extra:
                _refuse_other_settings(extra, settings, select_comparable(to_plain_dict(compose_config([*base, *own]))))
            for seed in range(seeds or row.seeds):
                overrides = [*base, f"seed={seed}", *extra, *own]
                jobs.setdefault(seed, []).append(
                    Job(name, overrides, choose_run_dir(values | {"seed": seed}, settings))
                )
    return [job for seed in sorted(jobs) for job in jobs[seed]]


def _refuse_other_settings(extra: Sequence[str], settings: dict[str, object], published: dict[str, object]) -> None:
    require(
        compute_fingerprint(settings) == compute_fingerprint(published),
        "--set",
        expected="keys that change no result, such as device or trainer.checkpoint_seconds",
        got=" ".join(extra),
        fix=f"Write a row of its own in {ROWS.name}/.",
    )


def run(jobs: Sequence[Job], deadline: float, grace: float = GRACE_SECONDS, at_once: int = 1) -> int:
    """Run what is not finished until the deadline (monotonic seconds) or a signal; returns the exit status.

    Runs in progress are then asked to save and stop, and killed after ``grace`` seconds; their last checkpoints count.

    Args:
        at_once: runs side by side. If there are several, each has one thread, unless OMP_NUM_THREADS says otherwise:
            on two cores, two runs of one thread take less time than one after the other on both.
    """
    left = list(enumerate(jobs, start=1))
    running: list[Child] = []
    failures: list[int] = []
    stopped: list[Job] = []
    threads = {"OMP_NUM_THREADS": "1"} if at_once > 1 else {}
    with collect_stop_signals() as caught:
        while left or running:
            stopping = bool(caught) or time.monotonic() >= deadline
            if len(running) < at_once:
                left = [(number, job) for number, job in left if job.state != "finished"]
            while left and len(running) < at_once and not stopping:
                number, job = left.pop(0)
                print(f"[{number}/{len(jobs)}] {job.command}", flush=True)
                running.append(Child(job, threads | os.environ))
            for child in list(running):
                if child.is_running(grace if stopping else None):
                    continue
                running.remove(child)
                if read_summary(child.job.folder):
                    continue
                if stopping:
                    stopped.append(child.job)
                else:
                    status = child.process.returncode
                    print(f"Failed with exit status {status}: {child.job.command}", file=sys.stderr, flush=True)
                    failures.append(status)
            if stopping and not running:
                break
            time.sleep(0.1 if running else 0)
    for job in stopped:
        print(f"Stopped in {job.folder}; the same command continues.", flush=True)
    if left and not stopped:
        print(f"Stopped before {left[0][1].folder}; the same command continues.", flush=True)
    if left or stopped:
        return STOPPED
    return failures[0] if failures else 0


class Child:
    """A run in a process and session of its own: Ctrl-C reaches this process, which asks the run to save and stop."""

    def __init__(self, job: Job, environment: dict[str, str]) -> None:
        self.job, self._asked_at = job, math.inf
        command = [sys.executable, "-m", "cl_bench", *job.overrides]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, env=environment)

    def is_running(self, grace: float | None) -> bool:
        """Whether it has not ended. With ``grace`` it is asked to stop, and killed after that many seconds."""
        if self.process.poll() is not None:
            return False
        if grace is not None:
            now = time.monotonic()
            if self._asked_at == math.inf:
                self.process.terminate()
                self._asked_at = now
            if now - self._asked_at > grace:
                self.process.kill()
        return True


def write_tables(groups: dict[str, Group], wanted: Sequence[Group], out: Path) -> None:
    """Print the tables of the chosen groups, write the tables of all groups, and fill the pages that show them."""
    try:
        from cl_bench.report import reproduction
    except ModuleNotFoundError as error:
        print(f"No tables: {error.name} is not installed. The command without a NAME makes them.", file=sys.stderr)
        return
    records = reproduction.read_records(groups, out / "records")
    reproduction.write_all(groups, records, out, f"python scripts/reproduce.py{'' if out == OUT else f' --out {out}'}")
    if out == OUT:
        pages = [page for pattern in PAGES for page in sorted(Path().glob(pattern))]
        reproduction.fill_pages(pages, groups, records)
    for group in groups.values():
        if group in wanted:
            reproduction.show(group, records)
    print(f"Tables: {out / 'table.md'}")
