"""A signal to stop is obeyed soon, wherever it comes, loses nothing, and reaches the jobs of a sweep."""

import fcntl
import itertools
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import traceback
from pathlib import Path

import pytest
import torch
from helpers import TINY, assert_equal_results, command_environment, find_run, run_in_process
from PIL import Image

import cl_bench.engine.evaluate as evaluation
from cl_bench.data.official_files import OfficialFiles
from cl_bench.methods.ewc import EWC
from cl_bench.runs import run as run_module

SECONDS = 10.0
"""A signal is obeyed within less, on a busy machine; each of these would take minutes."""


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """The command in this process, without pictures -> exit status and what it said on stderr."""

    def call(*arguments: str) -> tuple[int, str]:
        return run_in_process(*arguments, monkeypatch=monkeypatch, cwd=tmp_path), capsys.readouterr().err

    return call


def terminate_at_call(number: int, owner: object, name: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """SIGTERM at the given call of a function -> the calls, where each came from; there should be none after it."""
    function, calls = getattr(owner, name), []

    def counted(*arguments, **named):
        calls.append("".join(traceback.format_stack(limit=8)))
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return function(*arguments, **named)

    monkeypatch.setattr(owner, name, counted)
    return calls


@pytest.mark.slow
def test_a_run_stopped_while_it_measures_or_sums_up_ends_the_same(run, tmp_path, monkeypatch):
    """One run is stopped at each of these moments in turn; what was trained by then is not trained again."""
    arguments = [*TINY, "backbone.hidden=[4]", "method=ewc", "optimizer.lr=0.01", "logger=none"]
    assert run(*arguments, "results_dir=straight")[0] == 0
    moments = [
        ("before training", evaluation, "choose_classes", 1, 0),
        ("between the phase and what the method makes of it", EWC, "measure_fisher_information", 1, 8),
        ("after the first task", evaluation, "choose_classes", 1, 8),
        ("in the second of two lines of the matrix", evaluation, "choose_classes", 3, 16),
        ("in the report", run_module, "write_report", 1, 16),
    ]
    for moment, owner, name, number, trained in moments:
        with monkeypatch.context() as patch:
            calls = terminate_at_call(number, owner, name, patch)
            status, error = run(*arguments, "results_dir=stopped")
        assert status == 143, (moment, error)
        assert len(calls) == number, moment  # at once, not at the end of what it was doing
        assert "Stopped; " in error
        assert ("is finished" in error) == (name == "write_report")
        saved = list(tmp_path.glob("stopped/**/last.pt"))
        steps = [torch.load(path, weights_only=True)["counters"][0] for path in saved]
        events = [path.read_text() for path in tmp_path.glob("stopped/**/metrics.jsonl")]
        what = "\n".join([moment, error, *map(str, tmp_path.glob("stopped/**/*")), *events, *calls])
        assert steps == ([trained] if saved or trained else []), what
    assert run(*arguments, "results_dir=stopped")[0] == 0
    assert_equal_results(find_run(tmp_path / "straight"), find_run(tmp_path / "stopped"))


class Termination:
    """SIGTERM one second after the first call of :meth:`begin`: a run that is not there yet would not catch it."""

    def __init__(self) -> None:
        self.began: float | None = None
        self._timer = threading.Timer(1.0, os.kill, [os.getpid(), signal.SIGTERM])

    def begin(self) -> None:
        if self.began is None:
            self.began = time.monotonic()
            self._timer.start()

    def assert_obeyed_soon(self) -> None:
        assert self.began is not None
        assert time.monotonic() - self.began < SECONDS
        self._timer.join()


@pytest.mark.slow
def test_decoding_is_stopped_between_two_pictures(run, tmp_path, monkeypatch):
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.png")
    for split, label in itertools.product(("train", "test"), ("cat", "dog")):
        folder = tmp_path / "data" / split / label
        folder.mkdir(parents=True)
        for number in range(500):
            (folder / f"{number}.png").symlink_to(tmp_path / "picture.png")
    whole, termination = Image.open, Termination()

    def slowly(*arguments, **named):
        termination.begin()
        time.sleep(0.2)
        return whole(*arguments, **named)

    monkeypatch.setattr(Image, "open", slowly)
    status, error = run("scenario=folder", f"data_dir={tmp_path}/data")
    termination.assert_obeyed_soon()
    assert status == 143, error
    assert error.count("Stopped; the same command goes on from here") == 1
    assert "Traceback" not in error


@pytest.mark.slow
def test_a_download_is_stopped(run, tmp_path, monkeypatch):
    termination = Termination()

    def fetch(self, root, download):
        termination.begin()
        time.sleep(600)

    monkeypatch.setattr(OfficialFiles, "fetch_missing", fetch)
    assert run("scenario=cifar100", f"data_dir={tmp_path}")[0] == 143
    termination.assert_obeyed_soon()


@pytest.mark.slow
def test_a_run_that_waits_for_another_ones_decoding_is_stopped(run, tmp_path, monkeypatch):
    for split, label in itertools.product(("train", "test"), ("cat", "dog")):
        folder = tmp_path / "data" / split / label
        folder.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / "0.png")
    arguments = ["scenario=folder", f"data_dir={tmp_path}/data", "scenario.num_tasks=2", "logger=none", "device=cpu"]
    assert run(*arguments)[0] == 0
    for path in (tmp_path / "data").rglob("*.images"):
        path.unlink()
    [path] = (tmp_path / "data").rglob("*-train-*.lock")
    with path.open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        whole, termination = fcntl.flock, Termination()

        def flock(file, operation):
            if operation == fcntl.LOCK_EX:
                termination.begin()
            return whole(file, operation)

        monkeypatch.setattr(fcntl, "flock", flock)
        status, error = run(*arguments)
    termination.assert_obeyed_soon()
    assert status == 143, error
    assert "waiting for another process, which makes " in error


# -- sweeps --------------------------------------------------------------------------------------------------------


def wait_until(condition, process: subprocess.Popen, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)


@pytest.mark.slow
def test_a_signal_to_a_sweep_stops_its_jobs_in_other_processes(tmp_path):
    """Each after a checkpoint; a job that had failed by then is told of again, and the same command goes on."""
    call = [sys.executable, "-m", "cl_bench", "-m", *TINY, "trainer.epochs=2000", "backbone.hidden=[4]", "seed=0,-1,1"]
    call += ["hydra/launcher=joblib", "hydra.launcher.n_jobs=3", "logger=console", "results_dir=r"]
    environment = command_environment(TMPDIR=str(tmp_path))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(call, cwd=tmp_path, env=environment, text=True, **pipes) as sweep:
        wait_until(lambda: len(list(tmp_path.glob("r/*/*/*/checkpoint/last.pt"))) == 2, sweep)
        wait_until(lambda: '"failed"' in "".join(read_texts(tmp_path.glob("r/sweeps/*/jobs-*/1.json"))), sweep)
        children = Path(f"/proc/{sweep.pid}/task/{sweep.pid}/children")
        workers = [int(pid) for pid in children.read_text().split()] if children.exists() else []
        began = time.monotonic()
        sweep.send_signal(signal.SIGTERM)
        table, error = sweep.communicate(timeout=60)
    assert time.monotonic() - began < SECONDS
    assert sweep.returncode == 143, error
    assert "Sweep: 1 failed, 2 stopped\n" in table
    for seed in (0, 1):  # which job says it
        assert error.count(f"[seed={seed}] Stopped; the same command goes on from here") == 1
        assert f"[seed={seed}] default: finetune-mlp-none, seed {seed}, " in error
        assert f"\n[seed={seed}] interrupted after " in error
    assert error.count("cl_bench: job 1 (seed=-1): seed: expected a whole number in [0, 2^32); got -1.") == 1
    assert "    1  seed=-1  failed: seed: expected a whole number in [0, 2^32); got -1." in table
    assert not list(tmp_path.glob("r/sweeps/*/jobs-*"))
    assert "Traceback" not in error
    for last in tmp_path.glob("r/*/*/*/checkpoint/last.pt"):
        assert torch.load(last, weights_only=True)["now"] is not None  # in mid-task
        with (last.parent.parent / ".lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # nobody holds it
    assert not list(tmp_path.glob("cl_bench-*"))
    wait_until_gone(workers)


def read_texts(files) -> list[str]:
    return [file.read_text() for file in files]


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + SECONDS
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


COMMAND = """
import subprocess, sys, time
from pathlib import Path
from cl_bench.runs.sweep import Sweep

sweep = Sweep([], folder=Path("sweep"))
subprocess.Popen([sys.executable, "job.py", str(sweep.pid)])
time.sleep(600)
"""

JOB = """
import sys, time
from pathlib import Path
from cl_bench.system.signals import collect_stop_signals
from cl_bench.runs.sweep import Sweep

def job(config):
    with collect_stop_signals() as caught:
        Path("began").touch()
        while not caught:
            time.sleep(0.01)
    Path("saved").touch()
    raise SystemExit(143)

Sweep([], folder=Path("sweep"), pid=int(sys.argv[1])).perform(job, None)
"""


@pytest.mark.slow
def test_the_jobs_of_a_killed_sweep_save_and_leave(tmp_path):
    for name, code in {"command.py": COMMAND, "job.py": JOB}.items():
        (tmp_path / name).write_text(textwrap.dedent(code))
    call = [sys.executable, "command.py"]
    with subprocess.Popen(call, cwd=tmp_path, env=command_environment(), stderr=subprocess.DEVNULL) as sweep:
        wait_until((tmp_path / "began").exists, sweep)
        [job] = [int(file.suffix[1:]) for file in tmp_path.glob("sweep/job.*")]
        sweep.kill()
    wait_until_gone([job])
    assert (tmp_path / "saved").exists()
    assert not (tmp_path / "sweep").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("rates", "status"), [("-1,0.1,nan", 2), ("0.1,-1,1e30", 1)])
def test_every_failed_job_is_told_of_at_once_and_at_the_end(monkeypatch, tmp_path, capsys, rates, status):
    arguments = ["-m", *TINY, f"optimizer.lr={rates}", "backbone.hidden=[4]", "trainer.epochs=20", "results_dir=r"]
    got = run_in_process(*arguments, "logger=none", "report=false", monkeypatch=monkeypatch, cwd=tmp_path)
    said, error = capsys.readouterr()
    assert got == status, error
    lines = [line for line in error.splitlines() if line.startswith("cl_bench: ")]
    tried = [rate.replace("1e30", "1e+30") for rate in rates.split(",")]
    failed = [number for number, rate in enumerate(tried) if rate != "0.1"]
    begin = [f"cl_bench: job {number} (optimizer.lr={tried[number]}): " for number in failed]
    assert [line[: len(start)] for line, start in zip(lines, begin, strict=True)] == begin
    assert "Traceback" not in error
    title, *rows, compare = said[said.index("Sweep: ") :].splitlines()
    assert title == "Sweep: 1 finished, 2 failed"
    (good,) = (str(path.parent.relative_to(tmp_path)) for path in tmp_path.glob("r/*/*/*/summary.json"))
    assert compare == f"Compare: cl_bench compare {Path(good).parent}"
    width = max(len(f"optimizer.lr={rate}") for rate in tried)
    for number, rate in enumerate(tried):
        reasons = [
            line[len(start) :] for line, start in zip(lines, begin) if start.startswith(f"cl_bench: job {number} ")
        ]
        told = f"failed: {reasons[0]}" if reasons else f"finished, {good}"
        assert rows[number] == f"  {number:>3}  {f'optimizer.lr={rate}':<{width}}  {told}"
