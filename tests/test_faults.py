"""Damaged files, full disks, lost folders, too little memory: one message, the exit status, nothing finished lost."""

import errno
import itertools
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TINY, assert_equal_results, find_run, no_file_above, run_in_process
from torch._subclasses.fake_tensor import FakeTensorMode

from cl_bench.core.errors import ConfigError
from cl_bench.engine.checkpoint import Checkpoint, State
from cl_bench.engine.step import PhaseContext
from cl_bench.loggers.jsonl import JsonLines
from cl_bench.methods.finetune import Finetune
from cl_bench.runs import run as run_module
from cl_bench.runs import run_dir as files
from cl_bench.system.memory import list_largest_tensors

RUN = [*TINY, "backbone.hidden=[4]", "trainer.checkpoint_steps=3", "logger=none"]


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """The folder of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("straight")
    with pytest.MonkeyPatch.context() as patch:
        assert run_in_process(*RUN, "results_dir=r", monkeypatch=patch, cwd=folder) == 0
    return find_run(folder)


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """The command in this process -> exit status and what it said on stderr; pictures are drawn where asked only."""

    def call(*arguments: str) -> tuple[int, str]:
        status = run_in_process(*RUN, *arguments, monkeypatch=monkeypatch, cwd=tmp_path)
        return status, capsys.readouterr().err

    return call


def states() -> Iterator[State]:
    for step in itertools.count():
        yield {"step": step, "weights": torch.arange(40.0) + step, "name": "größe", "list": [1.5, None, (1, 2)]}


def equal(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b


# -- checkpoints ---------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # torch warns about some of the damage
def test_no_flipped_bit_in_a_checkpoint_goes_unnoticed(tmp_path, capsys):
    """A bit in every third byte: the file is refused, or nothing that counts has changed (padding between members)."""
    checkpoint = Checkpoint(tmp_path / "checkpoint")
    state = next(states())
    checkpoint.save(state)
    path = checkpoint.folder / "last.pt"
    whole = path.read_bytes()
    missed_by_torch = noticed = 0
    for place in range(0, len(whole), 3):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            loaded = checkpoint.load()
        except ConfigError:
            noticed += 1
        else:
            assert equal(loaded, state), place
            continue
        try:
            missed_by_torch += not equal(torch.load(path, weights_only=True), state)
        except Exception:
            continue
    assert noticed > len(whole) / 6
    assert missed_by_torch > 30  # what the check is there for


@pytest.mark.parametrize("length", [0, 1, 100, -100, -1])
def test_a_truncated_checkpoint_falls_back_to_the_one_before(tmp_path, capsys, length):
    checkpoint = Checkpoint(tmp_path / "checkpoint")
    first, second, third = itertools.islice(states(), 3)
    checkpoint.save(first)
    checkpoint.save(second)
    last = checkpoint.folder / "last.pt"
    last.write_bytes(last.read_bytes()[:length])
    again = Checkpoint(tmp_path / "checkpoint")
    assert equal(again.load(), first)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{last} is damaged" in error
    assert "going on from the one before it" in error

    again.save(third)  # the good one stays beside it, not the damaged one
    last.unlink()
    assert equal(Checkpoint(tmp_path / "checkpoint").load(), first)


@pytest.mark.parametrize(("boundary", "moments"), [(False, 5), (True, 7)])
def test_a_kill_while_a_checkpoint_is_written_leaves_a_whole_one(tmp_path, monkeypatch, boundary, moments):
    """Stopped before each call that touches the disk, and in the middle of the file; a later save loses nothing."""

    class Killed(BaseException):
        pass

    folder = tmp_path / "checkpoint"
    first, second, third, fourth = itertools.islice(states(), 4)
    save, fsync, replace, link = torch.save, os.fsync, Path.replace, os.link
    for moment in range(moments):
        shutil.rmtree(folder, ignore_errors=True)
        Checkpoint(folder).save(first)
        Checkpoint(folder).save(second, boundary=True)
        calls = itertools.count()

        def maybe(calls=calls, moment=moment) -> None:
            if next(calls) == moment:
                raise Killed

        def half(state, file, maybe=maybe) -> None:
            maybe()
            save(state, file)
            try:
                maybe()
            except Killed:
                file.truncate(file.tell() // 2)
                raise

        with monkeypatch.context() as patch:
            patch.setattr(torch, "save", half)
            patch.setattr(os, "fsync", lambda number, maybe=maybe: (maybe(), fsync(number)))
            patch.setattr(Path, "replace", lambda path, other, maybe=maybe: (maybe(), replace(path, other)))
            patch.setattr(os, "link", lambda path, other, maybe=maybe: (maybe(), link(path, other)))
            with pytest.raises(Killed):
                Checkpoint(folder).save(third, boundary=boundary)
        newest = second if moment < 5 else third  # from the sixth call on the new one is in its place
        assert equal(Checkpoint(folder).load(), newest), moment
        for again in (False, True):
            Checkpoint(folder).save(fourth, boundary=again)
            assert equal(torch.load(folder / "last.pt", weights_only=True), fourth), moment
            assert equal(torch.load(folder / "boundary.pt", weights_only=True), fourth if again else second), moment


def test_where_there_are_no_hard_links_the_boundary_is_a_copy(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(errno.EPERM, "Operation not permitted")

    checkpoint = Checkpoint(tmp_path / "checkpoint")
    first, second, third = itertools.islice(states(), 3)
    checkpoint.save(first, boundary=True)
    os.link(checkpoint.folder / "boundary.pt", checkpoint.folder / "twin.pt")  # as a kill may leave it
    monkeypatch.setattr(os, "link", refuse)
    checkpoint.save(second, boundary=True)
    checkpoint.save(third)
    for name, state in (("last.pt", third), ("previous.pt", second), ("boundary.pt", second)):
        assert equal(torch.load(checkpoint.folder / name, weights_only=True), state)


@pytest.mark.slow
def test_a_run_goes_on_from_the_checkpoint_between_two_tasks_alone(run, straight, tmp_path, monkeypatch):
    """What is brought home from a lent machine: the record and ``boundary.pt``."""
    stopped_in_epoch(run, monkeypatch, 4, "results_dir=r")  # an epoch of the second task
    [last] = tmp_path.glob("r/**/last.pt")
    saved = [torch.load(last.with_name(name), weights_only=True) for name in Checkpoint.NAMES]
    assert [s["task"] for s in saved] == [1, 1, 1]
    assert [s["now"] is None for s in saved] == [False, False, True]
    assert last.with_name("boundary.pt").stat().st_size < last.stat().st_size
    last.unlink()
    last.with_name("previous.pt").unlink()
    status, error = run("results_dir=r")
    assert (status, "damaged" in error) == (0, False)
    assert_equal_results(straight, find_run(tmp_path / "r"))


@pytest.mark.slow
def test_a_run_with_a_damaged_checkpoint_goes_on_and_ends_the_same(run, straight, tmp_path, monkeypatch):
    stopped_in_epoch(run, monkeypatch, 3, "results_dir=damaged")
    [last] = tmp_path.glob("damaged/**/last.pt")
    flip(last)
    status, error = run("results_dir=damaged")
    assert status == 0
    assert error.count("is damaged") == 1
    assert_equal_results(straight, find_run(tmp_path / "damaged"))


@pytest.mark.slow
def test_without_a_whole_checkpoint_a_run_is_never_begun_afresh_unasked(run, tmp_path, monkeypatch):
    stopped_in_epoch(run, monkeypatch, 3, "results_dir=r")
    [last] = tmp_path.glob("r/**/last.pt")
    for name in Checkpoint.NAMES:
        flip(last.with_name(name))
    before = {path: path.read_bytes() for path in last.parent.parent.rglob("*") if path.is_file()}
    status, error = run("results_dir=r")
    assert status == 2
    assert "checkpoint: expected a whole checkpoint; got last.pt is damaged" in error
    assert "overwrite=true" in error
    assert error.count("\n") == 1
    after = {path: path.read_bytes() for path in last.parent.parent.rglob("*") if path.is_file()}
    why = after.pop(last.parents[1] / "failure.txt").decode()
    assert "last.pt is damaged" in why
    assert after == before
    assert run("results_dir=r", "overwrite=true")[0] == 0


def flip(path: Path) -> None:
    """One bit of what torch would load without a word: the middle of the file, where the weights are."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def stopped_in_epoch(run, monkeypatch, event: int, *arguments: str) -> None:
    """A run that a power cut ends as it writes the given line of metrics.jsonl."""

    class PowerCut(BaseException):
        pass

    write = JsonLines.log_event

    def cut(self, number, content):
        if number == event:
            raise PowerCut
        write(self, number, content)

    with monkeypatch.context() as patch:
        patch.setattr(JsonLines, "log_event", cut)
        with pytest.raises(PowerCut):
            run(*arguments)


# -- disks and folders ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_no_room_for_a_checkpoint_stops_with_one_message(run, straight, tmp_path):
    with no_file_above(5_000):
        status, error = run("results_dir=r")
    assert status == 1
    assert error.startswith("cl_bench: r")
    assert "File too large" in error
    assert "the same command goes on from the last checkpoint" in error
    assert error.count("\n") == 1
    assert run("results_dir=r")[0] == 0
    assert_equal_results(straight, find_run(tmp_path / "r"))


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.slow
@pytest.mark.parametrize("file", ["config.yaml", "metrics.jsonl", "predictions.npz", "summary.json", "report.html"])
def test_no_room_for_a_file_stops_with_one_message(run, straight, tmp_path, monkeypatch, file):
    def full(*args, **kwargs):
        raise FULL

    places = {
        "config.yaml": (files, "write_text"),
        "metrics.jsonl": (JsonLines, "log_event"),
        "predictions.npz": (np, "savez_compressed"),
        "summary.json": (files, "write_json"),
        "report.html": (run_module, "write_report"),
    }
    if file == "summary.json":
        write = files.write_json

        def full(path, value):
            if path.name == file:
                raise FULL
            write(path, value)

    with monkeypatch.context() as patch:
        patch.setattr(*places[file], full)
        status, error = run("results_dir=r")
    assert status == 1
    assert error.count("\n") == 1
    assert "No space left on device" in error
    assert ("the run is finished" in error) == (file == "report.html")
    assert run("results_dir=r")[0] == 0
    assert_equal_results(straight, find_run(tmp_path / "r"))
    assert (find_run(tmp_path / "r") / "report.html").exists()


@pytest.mark.slow
def test_a_report_that_cannot_be_made_does_not_fail_its_run(run, straight, tmp_path, monkeypatch):
    def broken(place):
        raise UnicodeEncodeError("utf-8", "caf\udce9", 3, 4, "surrogates not allowed")

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "write_report", broken)
        for _ in range(2):  # nor when it is asked for again
            status, error = run("results_dir=r")
            assert status == 0
            assert [line for line in error.splitlines() if line.startswith("No report (UnicodeEncodeError: ")]
    assert_equal_results(straight, find_run(tmp_path / "r"))


@pytest.mark.slow
def test_a_folder_removed_in_mid_run_stops_with_one_message(run, tmp_path, monkeypatch):
    observe = Finetune.observe
    calls = itertools.count()

    def removing(self, batch):
        if next(calls) == 5:
            shutil.rmtree(tmp_path / "r")
        return observe(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Finetune, "observe", removing)
        status, error = run("results_dir=r")
    assert status == 1
    assert "the folder was removed while the run wrote to it" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "r").exists()
    assert run("results_dir=r")[0] == 0


def test_a_file_where_a_folder_should_be(run, tmp_path):
    (tmp_path / "r").write_text("")
    status, error = run("results_dir=r")
    assert status == 2
    assert "results_dir: expected a folder that can be written to" in error


@pytest.mark.slow
@pytest.mark.parametrize("logger", ["tensorboard", "wandb"])
def test_a_logger_without_its_folder_is_dropped_and_the_run_finishes(run, tmp_path, logger):
    """Where a file is in the way of the logger's folder, it cannot start."""
    assert run("results_dir=r")[0] == 0
    folder = find_run(tmp_path / "r")
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / logger).write_text("in the way")
    arguments = [argument for argument in RUN if argument != "logger=none"]
    status, error = run(*arguments, f"logger={logger}", "~logger.console", "results_dir=r")
    assert status == 0
    assert error.count("training goes on without it") == 1
    assert (folder / "summary.json").exists()


# -- numbers and memory --------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_names_step_terms_and_checkpoint(run, tmp_path):
    status, error = run("results_dir=r", "optimizer.lr=1e30", "trainer.epochs=20")
    assert status == 1
    assert error.count("\n") == 1
    assert "a loss term is not finite by step" in error
    assert "'ce': " in error
    [last] = tmp_path.glob("r/**/last.pt")
    saved = torch.load(last, weights_only=True)
    assert f"The last good checkpoint is {last.relative_to(tmp_path)}, of step {saved['counters'][0]}." in error
    assert all(value.isfinite().all() for value in saved["task_start"]["method"].values())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["finetune", "ewc", "joint"])
def test_scores_that_are_no_numbers_are_no_result(run, tmp_path, method):
    """One step with a huge rate: its loss and even the weights after it are finite, but not what they answer.

    EWC draws labels by those answers before they are measured, which torch refuses in words of its own.
    """
    huge = ["trainer.batch_size=2000", "trainer.epochs=1", "optimizer.lr=1e38", "scenario.classes_per_task=[10]"]
    status, error = run("results_dir=r", f"method={method}", *huge)
    assert status == 1
    assert re.match(r"cl_bench: the scores of \d+ of 40 images are not numbers at step 1\. The last good check", error)
    assert error.count("\n") == 1
    assert not list(tmp_path.rglob("summary.json"))
    assert finite(tmp_path)


@pytest.mark.parametrize(("step", "saved"), [(8, 6), (6, 3)], ids=["the last of a phase", "before a checkpoint"])
@pytest.mark.parametrize("spoilt", ["net.head.weight", "precision_0"])
def test_weights_are_looked_at_before_they_are_saved_or_measured(run, tmp_path, monkeypatch, spoilt, step, saved):
    update, calls = PhaseContext.update, itertools.count(1)

    def spoiling(self):
        update(self)
        if next(calls) == step:
            self.method.state_dict()[spoilt].view(-1)[0] = torch.inf if spoilt == "precision_0" else torch.nan

    with monkeypatch.context() as patch:
        patch.setattr(PhaseContext, "update", spoiling)
        status, error = run("results_dir=r", "method=ewc", "optimizer.lr=0.001")
    assert status == 1
    assert error.startswith(f"cl_bench: the method is not finite at step {step} (task 1, phase 1): {spoilt} (1 of")
    assert f"last.pt, of step {saved}. Lower" in error
    assert error.count("\n") == 1
    assert finite(tmp_path)


def finite(folder: Path) -> bool:
    [last] = folder.glob("r/**/last.pt")
    saved = torch.load(last, weights_only=True)
    states = [saved["task_start"], *saved["phase_ends"], *([saved["now"]["state"]] if saved["now"] else [])]
    return all(tensor.isfinite().all() for state in states for tensor in state["method"].values())


@pytest.mark.slow
def test_fake_tensors_of_a_compiler_are_left_out_of_the_largest_tensors():
    with FakeTensorMode():
        fake = torch.empty(7, 10**9)
    real = torch.empty(7, 10**6)
    lines = list_largest_tensors({"mine": real})
    assert fake.shape == (7, 10**9)
    assert not any("(7, 1000000000)" in line for line in lines)
    assert any(line.startswith("mine (7, 1000000) float32") for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has ..."),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried ..."),
        MemoryError("Unable to allocate 1 TiB for an array"),
    ],
    ids=["device", "host", "numpy"],
)
def test_too_little_memory_names_the_largest_tensors_and_three_ways_out(run, tmp_path, monkeypatch, kind):
    calls = itertools.count()
    observe = Finetune.observe

    def greedy(self, batch):
        activation = batch.x.new_zeros(3_000_000)
        if next(calls) == 9:
            raise type(kind)(*kind.args)  # a new one: an old one holds on to the tensors of its frames
        return observe(self, batch) | {"nothing": activation[0]}

    with monkeypatch.context() as patch:
        patch.setattr(Finetune, "observe", greedy)
        status, error = run("results_dir=r", "backbone.hidden=[5000]")
    assert status == 1
    assert error.count("\n") == 1
    assert f"out of memory on cpu ({str(kind).splitlines()[0]})" in error
    assert "a temporary one (3000000,) float32 12.0 MB" in error
    assert "method.net.trunk.1.0.weight (5000, 64) float32 1.3 MB" in error
    assert "Ways out: trainer.batch_size=8" in error
