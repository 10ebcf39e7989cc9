"""The loggers against real files, a real terminal and W&B offline."""

import json
import os
import pty
import re
import subprocess
import sys
import textwrap
import timeit
from contextlib import contextmanager
from dataclasses import replace
from inspect import signature
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import list_logged, read_points, select_kind, wandb_files, wandb_records
from hydra import compose, initialize_config_dir
from hydra.utils import get_object
from omegaconf import OmegaConf
from PIL import Image

from cl_bench.core.errors import ConfigError
from cl_bench.loggers import console as console_module
from cl_bench.loggers.base import Logger, Progress, RunInfo
from cl_bench.loggers.console import Console
from cl_bench.loggers.dashboard import Series, flatten_summary, make_group, make_name
from cl_bench.loggers.delivered import Delivered
from cl_bench.loggers.group import Loggers
from cl_bench.loggers.jsonl import JsonLines
from cl_bench.loggers.pace import Pace
from cl_bench.loggers.tensorboard import TensorBoard
from cl_bench.loggers.wandb import (
    Wandb,
    compute_run_id,
    has_api_key,
    resolve_mode,
)

CONFIGS = Path(__file__).parents[1] / "configs"


def info(folder: Path, seed: int = 0, **config) -> RunInfo:
    folder.mkdir(parents=True, exist_ok=True)
    return RunInfo(folder, "some_Experiment", "er", seed, "0a1b2c", config, num_tasks=2)


def epoch(step: int, task: int, number: int, **losses: float) -> dict:
    mean = sum(losses.values())
    where = {"event": "epoch", "step": step, "task": task, "phase": 0, "epoch": number}
    return where | {"lr": 0.1 / step, "loss": mean, "losses": losses}


def task(step: int, number: int, *class_il: float) -> dict:
    averages = {"class_il_average": sum(class_il) / len(class_il), "task_il_average": None}
    accuracies = {"class_il": list(class_il), "task_il": [None] * len(class_il)}
    return {"event": "task", "step": step, "task": number} | accuracies | averages


EVENTS = [
    {"event": "start", "step": 0, "num_tasks": 2},
    epoch(10, 0, 0, ce=2.0),
    epoch(20, 0, 1, ce=1.0),
    task(20, 0, 80.0),
    epoch(30, 1, 0, ce=1.5, replay=0.5),
    epoch(40, 1, 1, ce=0.5, replay=0.25),
    task(40, 1, 40.0, 70.0),
    {"event": "finish", "step": 40},
]


def tell(logger: Logger, first: int = 0, stop: int = len(EVENTS)) -> None:
    for number in range(first, stop):
        logger.log_event(number, EVENTS[number])


class Killed(BaseException):
    """Stands for a SIGKILL: no logger may handle it."""


@contextmanager
def killed_before_mark(count: int):
    """The process dies after it has delivered event ``count - 1`` and before it has noted that."""
    mark = Delivered.mark

    def dying_mark(self, new_count, **note):
        if new_count == count:
            raise Killed
        mark(self, new_count, **note)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Delivered, "mark", dying_mark)
        with pytest.raises(Killed):
            yield


# metrics.jsonl


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_jsonl_line_is_on_disk_after_its_event(tmp_path):
    logger = JsonLines()
    logger.start(info(tmp_path))
    for number, event in enumerate(EVENTS):
        logger.log_event(number, event)
        assert lines(tmp_path) == EVENTS[: number + 1]
    logger.finish("finished", None)


@pytest.mark.parametrize("again_from", [0, 3, 5])
@pytest.mark.parametrize("debris", [b"", b'{"event": "epo', b'{"event": "epoch"}', b"\0\0\0\0\n", b"17\n"])
def test_jsonl_resume_gives_the_file_of_an_uninterrupted_run(tmp_path, again_from, debris):
    whole, resumed = JsonLines(), JsonLines()
    whole.start(info(tmp_path / "whole"))
    tell(whole)
    whole.finish("finished", None)

    resumed.start(info(tmp_path / "resumed"))
    tell(resumed, stop=5)
    with (tmp_path / "resumed" / "metrics.jsonl").open("ab") as file:
        file.write(debris)
    after = JsonLines()
    after.start(info(tmp_path / "resumed"))
    assert lines(tmp_path / "resumed") == EVENTS[:5]
    tell(after, first=again_from)
    after.finish("finished", None)
    resumed.finish("failed", None)
    assert (tmp_path / "resumed" / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


def test_jsonl_keeps_no_stale_lines_when_fewer_are_handed_over(tmp_path):
    for first, stop in [(0, 6), (2, 3)]:
        logger = JsonLines()
        logger.start(info(tmp_path))
        tell(logger, first, stop)
        logger.finish("interrupted", None)
    assert lines(tmp_path) == EVENTS[:3]


def test_jsonl_refuses_to_leave_a_gap(tmp_path):
    logger = JsonLines()
    logger.start(info(tmp_path))
    tell(logger, stop=2)
    with pytest.raises(ConfigError, match=r"metrics\.jsonl: expected the 5 lines .* got 2 lines.*overwrite=true"):
        logger.log_event(5, EVENTS[5])
    logger.finish("failed", None)


def test_pace_is_that_of_the_steps_after_the_first_of_each_epoch_that_ended(tmp_path, monkeypatch):
    # three steps, a measurement of five seconds after the second, the end of the epoch; a step; a step, an end
    clock = iter([0.0, 1.0, 6.0, 6.5, 7.0, 10.0, 14.0, 15.0])
    monkeypatch.setattr("cl_bench.loggers.pace.time.perf_counter", lambda: next(clock))
    logger, step = Pace(), Progress(0, 2, 0, 0, 2, 0, 3)
    logger.start(info(tmp_path))
    logger.log_step(step)
    logger.log_step(step)
    logger.log_event(0, {"event": "sample", "step": 2})
    logger.log_step(step)
    logger.log_event(0, EVENTS[1])  # two steps in two seconds, without the measurement
    logger.log_event(1, EVENTS[3])
    logger.log_step(step)
    logger.finish("interrupted", None)
    again = Pace()
    again.start(info(tmp_path))
    again.log_step(step)
    again.log_event(1, EVENTS[2])
    again.finish("finished", None)
    first, second = ([*json.loads(line).values()] for line in (tmp_path / "pace.jsonl").read_text().splitlines())
    assert first == [0, 0, 0, 10, 1.0, 2, 2]
    assert second == [0, 0, 1, 20, None, 2, 2]


def test_jsonl_writes_null_for_what_json_does_not_know(tmp_path):
    logger = JsonLines()
    logger.start(info(tmp_path))
    logger.log_event(0, epoch(10, 0, 0, ce=float("nan"), kd=float("-inf"), ok=np.float64(1.5)) | {"name": "é"})
    logger.finish("finished", None)
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    [line] = lines(tmp_path)
    assert line["losses"] == {"ce": None, "kd": None, "ok": 1.5}
    assert line["loss"] is None
    assert line["name"] == "é"


# Loggers


class Recorder(Logger):
    def __init__(self, **raises: BaseException):
        self.raises = raises
        self.calls: list[str] = []

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name in self.raises:
            raise self.raises[name]

    def start(self, run):
        self._call("start")

    def log_event(self, number, event):
        self._call("event")

    def log_step(self, progress):
        self._call("step")

    def finish(self, status, summary):
        self._call(f"finish {status}")


PROGRESS = Progress(task=0, num_tasks=2, phase=0, epoch=0, epochs=2, step=0, steps=10)


def run_through(logger: Logger, folder: Path) -> None:
    logger.start(info(folder))
    for number in (0, 1):
        logger.log_event(number, EVENTS[number])
        logger.log_step(PROGRESS)
    logger.finish("finished", None)


@pytest.mark.parametrize("call", ["start", "event", "step"])
def test_group_drops_a_failing_logger_and_says_so_once(tmp_path, capsys, call):
    bad, good = Recorder(**{call: ValueError("no\nroute")}), Recorder()
    run_through(Loggers([bad, JsonLines(), good]), tmp_path)
    assert good.calls == ["start", "event", "step", "event", "step", "finish finished"]
    assert lines(tmp_path) == EVENTS[:2]
    # It is closed at once, so that it can give back what it holds, and hears nothing afterwards.
    assert bad.calls == [*good.calls[: good.calls.index(call) + 1], "finish failed"]
    assert capsys.readouterr().err == (
        f"cl_bench: logger Recorder failed in {call} (ValueError: no route); training goes on without it\n"
    )


def test_group_finishes_every_logger_when_one_raises(tmp_path, capsys):
    bad, good = Recorder(**{"finish finished": RuntimeError("upload")}), Recorder()
    run_through(Loggers([bad, good]), tmp_path)
    assert good.calls[-1] == "finish finished"
    assert capsys.readouterr().err.count("RuntimeError: upload") == 1


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), SystemExit(143)])
@pytest.mark.parametrize("call", ["start", "event", "step", "finish finished"])
def test_group_lets_a_stop_through(tmp_path, capsys, stop, call):
    last = Recorder()
    group = Loggers([Recorder(**{call: stop}), last])
    with pytest.raises(type(stop)):
        run_through(group, tmp_path)
    if call.startswith("finish"):
        assert last.calls[-1] == "finish finished"
    assert capsys.readouterr().err == ""


def test_group_lets_jsonl_fail_the_run(tmp_path, capsys):
    other = Recorder()
    group = Loggers([JsonLines(), other])
    with pytest.raises(OSError, match=r"metrics\.jsonl"):
        group.start(RunInfo(tmp_path / "missing", "e", "n", 0, "f", {}, 2))
    group.finish("failed", None)
    assert other.calls == ["finish failed"]
    assert capsys.readouterr().err == ""


def test_every_logger_can_be_finished_before_it_starts_and_twice(capsys):
    wandb = Wandb(project="p", entity=None, mode="offline", tags=[], notes=None, job_type=None)
    for logger in (JsonLines(), Console(min_seconds=0.0), TensorBoard(), wandb):
        logger.finish("failed", None)
        logger.finish("failed", None)
    assert capsys.readouterr().err == ""


# TensorBoard


EXPECTED_POINTS = {
    "lr": [(10, 0.01), (20, 0.005), (30, 0.00333), (40, 0.0025)],
    "loss": [(10, 2.0), (20, 1.0), (30, 2.0), (40, 0.75)],
    "losses/ce": [(10, 2.0), (20, 1.0), (30, 1.5), (40, 0.5)],
    "losses/replay": [(30, 0.5), (40, 0.25)],
    "class_il_tasks/task_1": [(20, 80.0), (40, 40.0)],
    "class_il_tasks/task_2": [(40, 70.0)],
    "class_il/average_accuracy": [(20, 80.0), (40, 55.0)],
    "class_il/average_incremental_accuracy": [(20, 80.0), (40, 67.5)],
    "class_il/learning_accuracy": [(20, 80.0), (40, 75.0)],
    "class_il/forgetting": [(40, 40.0)],
    "class_il/backward_transfer": [(40, -40.0)],
}


def write_events(folder: Path, stop: int = len(EVENTS)) -> None:
    """``metrics.jsonl`` of a run that got so far."""
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in EVENTS[:stop]))


@pytest.mark.parametrize("again_from", [1, 3, 4])
def test_tensorboard_has_every_point_once_after_kills(tmp_path, again_from):
    write_events(tmp_path)
    first = TensorBoard()
    first.start(info(tmp_path))
    tell(first, stop=4)
    with killed_before_mark(5):
        tell(first, first=4, stop=5)
    assert (30, 1.5) in read_points(tmp_path / "tensorboard")["losses/ce"]  # written, but nobody knows
    first.finish("failed", None)
    with (tmp_path / "tensorboard" / "events.out.tfevents.cl_bench").open("ab") as file:
        file.write(b"\x18\0\0\0")  # half a record

    for begin, stop in [(again_from, 6), (5, len(EVENTS))]:
        later = TensorBoard()
        later.start(info(tmp_path))
        tell(later, begin, stop)
        later.finish("interrupted", None)
    assert read_points(tmp_path / "tensorboard") == EXPECTED_POINTS


def test_tensorboard_starts_afresh_where_its_first_event_was_killed(tmp_path):
    for _ in range(2):
        logger = TensorBoard()
        logger.start(info(tmp_path))
        with killed_before_mark(2):
            logger.log_event(1, EVENTS[1])
        logger.finish("failed", None)
    assert read_points(tmp_path / "tensorboard")["losses/ce"] == [(10, 2.0)]


def test_tensorboard_gets_from_metrics_what_it_missed(tmp_path):
    metrics = JsonLines()
    metrics.start(info(tmp_path))
    tell(metrics, stop=5)
    logger = TensorBoard()
    logger.start(info(tmp_path))
    for number in range(5, len(EVENTS)):
        metrics.log_event(number, EVENTS[number])
        logger.log_event(number, EVENTS[number])
    metrics.finish("finished", None)
    logger.finish("finished", None)
    assert read_points(tmp_path / "tensorboard") == EXPECTED_POINTS


# W&B


@pytest.fixture
def wandb_home(tmp_path, monkeypatch):
    """W&B with a key, no way to use it, and no other place to write to."""
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef" * 3)
    monkeypatch.setenv("SOME_TOKEN", "very-secret-token")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return tmp_path


@pytest.fixture
def offline(monkeypatch):
    """Any attempt of this process to reach another machine is an error."""

    def refuse(*args, **kwargs):
        raise AssertionError(f"network: {args}")

    monkeypatch.setattr("socket.getaddrinfo", refuse)
    monkeypatch.setattr("socket.create_connection", refuse)


def offline_wandb() -> Wandb:
    return Wandb(project="p", entity=None, mode="offline", tags=["t"], notes="tried", job_type=None)


@pytest.mark.slow
def test_wandb_offline_over_a_kill(wandb_home, offline):
    folder = wandb_home / "run"
    folder.mkdir()
    write_events(folder)
    first = offline_wandb()
    first.start(info(folder, url="https://me:very-secret-token@host", nested={"list": ["very-secret-token", 1]}))
    tell(first, stop=5)
    with killed_before_mark(5):  # whether or not W&B's own process has written what it was told
        first.finish("interrupted", None)

    (folder / "config.yaml").write_text("url: https://me:very-secret-token@host\n")
    (folder / "plots").mkdir()
    Image.new("RGB", (2, 2)).save(folder / "plots" / "accuracy_matrix.png")
    second = offline_wandb()
    second.start(info(folder))
    tell(second, first=2)
    summary = {"status": "finished", "class_il": {"forgetting": 40.0}, "cost": {"train_seconds": 2.5}}
    second.finish("finished", summary | {"buffer_by_class": [3, 2], "class_names": ["cat", "dog"]})

    before, after = map(wandb_records, wandb_files(folder))
    [run] = select_kind(before, "run")
    assert (run.run_id, run.job_type) == (compute_run_id(info(folder)), "er")
    assert (run.display_name, run.run_group) == ("er seed 0", "some_Experiment er 0a1b2c")
    assert (list(run.tags), run.notes) == (["t"], "tried")
    assert {run.run_id for run in select_kind(after, "run")} == {run.run_id}
    assert [e.exit_code for e in select_kind(before, "exit") + select_kind(after, "exit")] == [130, 0]

    # W&B's counter is the number of the event: those it got twice (1 to 4) have the same number and are one point.
    assert [row["_step"] for row in list_logged(before)] == [1, 2, 3, 4]
    *rows, last = list_logged(after)
    assert [row["_step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows] == [10, 20, 20, 30, 40, 40]
    assert rows[4]["losses/replay"] == 0.25
    assert rows[5]["class_il_tasks/task_2"] == 70.0
    assert rows[5]["class_il/forgetting"] == 40.0
    assert [(row["epoch"], row["task"]) for row in rows] == [(1, 1), (2, 1), (2, 1), (3, 2), (4, 2), (4, 2)]
    assert not any("task_il" in key for row in rows for key in row)

    assert last["_step"] > 6
    [table] = folder.glob("wandb/offline-run-*/files/media/table/buffer_by_class*.json")
    assert json.loads(table.read_text())["data"] == [["cat", 3], ["dog", 2]]
    [image] = folder.glob("wandb/offline-run-*/files/media/images/plots/accuracy_matrix*.png")
    assert image.read_bytes().startswith(b"\x89PNG")
    [copy] = folder.glob("wandb/offline-run-*/files/cl_bench/config.yaml")
    assert copy.read_text() == "url: https://me:***@host\n"
    (folder / "config.yaml").unlink()  # the run's own; below, what W&B was given
    summary = {i.key: json.loads(i.value_json) for s in select_kind(after, "summary") for i in s.update if i.key}
    assert (summary["class_il/forgetting"], summary["cost/train_seconds"]) == (40.0, 2.5)

    # Neither the key nor what a configuration took from the environment is in any file.
    config = {i.key: json.loads(i.value_json) for c in select_kind(before, "config") for i in c.update}
    assert config["url"] == "https://me:***@host"
    for path in folder.rglob("*"):
        if path.is_file():
            assert b"very-secret-token" not in path.read_bytes(), path
            assert b"0123456789abcdef" not in path.read_bytes(), path
    # W&B's service process reports nothing of its own to the network either.
    assert '"disable-analytics":true' in next(folder.glob("wandb/offline-run-*/logs/debug-core.log")).read_text()


def test_the_series_of_an_event_do_not_depend_on_where_a_logger_begins(tmp_path):
    write_events(tmp_path)
    points = [Series(tmp_path).extract(number, event) for number, event in enumerate(EVENTS)]
    straight = Series(tmp_path)
    assert [straight.extract(number, event) for number, event in enumerate(EVENTS)] == points
    assert [point and point.axes for point in points] == [
        None,
        {"step": 10, "epoch": 1, "task": 1},
        {"step": 20, "epoch": 2, "task": 1},
        {"step": 20, "epoch": 2, "task": 1},
        {"step": 30, "epoch": 3, "task": 2},
        {"step": 40, "epoch": 4, "task": 2},
        {"step": 40, "epoch": 4, "task": 2},
        None,
    ]


@pytest.mark.slow
def test_wandb_jobs_of_one_process_have_their_own_runs(wandb_home, offline):
    jobs = [offline_wandb(), offline_wandb()]
    for seed, job in enumerate(jobs):  # the first one has not finished when the second starts
        job.start(info(wandb_home / f"seed{seed}", seed))
    for job in jobs:
        tell(job, stop=3 + jobs.index(job))
    for job in jobs:
        job.finish("finished", None)
    for seed in range(2):
        [file] = wandb_files(wandb_home / f"seed{seed}")
        assert file.name == f"run-{compute_run_id(info(wandb_home, seed))}.wandb"
        assert len(list_logged(wandb_records(file))) == 2 + seed


class FakeServer:
    """Stands for wandb online: remembers the ids it was given, and what was done to each run."""

    def __init__(self, *known: str):
        self.known = set(known)
        self.next_step: dict[str, int] = {}
        self.inits: list[dict] = []
        self.runs: list[SimpleNamespace] = []
        self.Settings = dict

    def init(self, **arguments):
        self.inits.append(arguments)
        resumed = arguments["id"] in self.known
        self.known.add(arguments["id"])
        name = arguments["id"]
        step = self.next_step.get(name, 0)
        run = SimpleNamespace(id=name, resumed=resumed, step=step, rows=[], exit_codes=[], config={}, summary={})
        run.config = SimpleNamespace(update=lambda *args, **kwargs: None)
        run.define_metric = lambda *args, **kwargs: None
        run.log = lambda row, step, commit: (run.rows.append(step), self.next_step.update({name: step + 1}))
        run.finish = lambda exit_code: run.exit_codes.append(exit_code)
        self.runs.append(run)
        return run


@pytest.fixture
def online(monkeypatch):
    def connect(*known: str) -> FakeServer:
        server = FakeServer(*known)
        monkeypatch.setitem(sys.modules, "wandb", server)
        monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
        return server

    return connect


def test_wandb_resumes_its_run_online(tmp_path, online):
    server = online()
    for first, stop in [(0, 5), (3, 8)]:
        logger = Wandb(project="p", entity="me", mode="online", tags=[], notes=None, job_type=None)
        logger.start(info(tmp_path))
        tell(logger, first, stop)
        logger.finish("interrupted", None)
    assert [run.rows for run in server.runs] == [[1, 2, 3, 4], [5, 6]]
    first = (compute_run_id(info(tmp_path)), "allow", "online")
    assert [(i["id"], i["resume"], i["mode"]) for i in server.inits] == [first] * 2


def test_wandb_goes_on_under_the_id_that_the_folder_began_with(tmp_path, online):
    """Ids had another form before; a folder of that time gets no second one."""
    server = online("0a1b2c-seed0-er-some-experiment")
    Delivered(tmp_path, "wandb/delivered.json").mark(3, id="0a1b2c-seed0-er-some-experiment")
    logger = Wandb(project="p", entity=None, mode="online", tags=[], notes=None, job_type=None)
    logger.start(info(tmp_path))
    tell(logger, 3)
    logger.finish("finished", None)
    assert [i["id"] for i in server.inits] == ["0a1b2c-seed0-er-some-experiment"]
    assert json.loads((tmp_path / "wandb" / "delivered.json").read_text())["note"]["id"] == server.inits[0]["id"]


def test_wandb_gets_again_what_a_kill_may_have_lost(tmp_path, online):
    """The server says how far it is; where a run was killed after its last event, the end makes up for it."""
    server = online()
    metrics = JsonLines()
    metrics.start(info(tmp_path))
    tell(metrics, 0, len(EVENTS))
    metrics.finish("finished", None)
    killed = Wandb(project="p", entity=None, mode="online", tags=[], notes=None, job_type=None)
    killed.start(info(tmp_path))
    tell(killed, 0, len(EVENTS))
    server.next_step = dict.fromkeys(server.next_step, 3)  # the others never came there
    resumed = Wandb(project="p", entity=None, mode="online", tags=[], notes=None, job_type=None)
    resumed.start(info(tmp_path))
    resumed.finish("finished", None)
    assert [run.rows for run in server.runs] == [[1, 2, 3, 4, 5, 6], [3, 4, 5, 6]]


def test_wandb_does_not_mix_a_run_started_afresh_into_the_old_one(tmp_path, online):
    ids = [compute_run_id(info(tmp_path)) + suffix for suffix in ("", "-2", "-3")]
    server = online(*ids[:2])
    for first, stop in [(0, 3), (3, 8)]:
        logger = Wandb(project="p", entity=None, mode="online", tags=[], notes=None, job_type=None)
        logger.start(info(tmp_path))
        tell(logger, first, stop)
        logger.finish("finished", None)
    assert [i["id"] for i in server.inits] == [*ids, ids[2]]
    assert [(run.rows, run.exit_codes) for run in server.runs] == [
        ([], [0]),
        ([], [0]),
        ([1, 2], [0]),
        ([3, 4, 5, 6], [0]),
    ]


@pytest.mark.parametrize(("status", "code"), [("finished", 0), ("interrupted", 130), ("failed", 1)])
def test_wandb_closes_its_run_even_when_the_end_fails(tmp_path, online, status, code):
    server = online()
    logger = Wandb(project="p", entity=None, mode="online", tags=[], notes=None, job_type=None)
    logger.start(info(tmp_path))
    server.runs[0].summary = None
    with pytest.raises(AttributeError):
        logger.finish(status, {"class_il": {}})
    assert server.runs[0].exit_codes == [code]


def test_the_next_run_has_a_service_of_its_own_after_that_of_wandb_died(tmp_path, online):
    server, calls = online(), []
    server.teardown = lambda: calls.append("teardown")
    logger = Wandb(project="p", entity=None, mode="online", tags=[], notes=None, job_type=None)
    logger.start(info(tmp_path))
    for error, torn in ((ValueError("a row"), []), (ConnectionResetError("lost"), ["teardown"])):

        def fail(*args, error=error, **kwargs):
            raise error

        server.runs[0].log = fail
        with pytest.raises(type(error)):
            logger.log_event(1, EVENTS[1])
        assert calls == torn


def test_wandb_disabled_does_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import would fail
    run_through(Wandb(project="p", entity=None, mode="disabled", tags=[], notes=None, job_type=None), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_wandb_mode_auto(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    accounts = tmp_path / "netrc"
    monkeypatch.setenv("NETRC", str(accounts))
    assert resolve_mode("auto") == "offline"
    accounts.write_text("machine example.org login user password abc\n")
    accounts.chmod(0o600)
    assert not has_api_key()
    accounts.write_text("machine api.wandb.ai login user password abc\n")
    assert resolve_mode("auto") == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert resolve_mode("auto") == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "k")
    assert resolve_mode("auto") == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert resolve_mode("auto") == "disabled"
    assert resolve_mode("offline") == "offline"


def test_wandb_refuses_what_cannot_work(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"^mode: expected one of auto, .* got dryrun"):
        Wandb(project="p", entity=None, mode="dryrun", tags=[], notes=None, job_type=None)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_IDENTITY_TOKEN_FILE", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"^mode: expected an API key .* wandb login"):
        Wandb(project="p", entity=None, mode="online", tags=[], notes=None, job_type=None)


UNLIKE = {
    "another script": ("größe", "grosse", "数字", "цифры"),
    "signs and capitals": ("Run_1", "run-1", "run_1", "run 1", "run.1"),
    "long names": ("x" * 141, "x" * 141 + "y", "x" * 140),
}


def test_run_ids_are_plain_and_no_two_runs_share_one(tmp_path):
    base = RunInfo(tmp_path, experiment="A/b c", name="ER++", seed=0, fingerprint="FF", config={}, num_tasks=2)
    changed = [{}, {"seed": 1}, {"fingerprint": "0"}, {"experiment": "a-b", "name": "c"}]
    changed += [{"experiment": "a", "name": "b-c"}, {"seed": 11, "name": "1"}, {"seed": 1, "name": "11"}]
    changed += [{key: name} for key in ("experiment", "name") for names in UNLIKE.values() for name in names]
    ids = [compute_run_id(replace(base, **change)) for change in changed]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"[a-z0-9]{32}", i) for i in ids)
    assert compute_run_id(replace(base, folder=tmp_path / "moved")) == ids[0]


def test_wandb_names_say_what_was_typed_and_a_group_is_a_row(tmp_path):
    runs = [replace(info(tmp_path, seed), label="capacity=100, lr=0.05") for seed in (0, 1)]
    assert [make_name(run) for run in runs] == [f"er capacity=100, lr=0.05 seed {seed}" for seed in (0, 1)]
    assert {make_group(run) for run in runs} == {"some_Experiment er capacity=100, lr=0.05 0a1b2c"}
    other = replace(runs[0], fingerprint="ff", label="x" * 200)
    assert (len(make_group(other)), make_group(other)[-4:]) == (128, "x ff")
    assert (len(make_name(other)), make_name(other)[-8:]) == (128, "x seed 0")


def test_summary_values_leave_out_the_unknown():
    summary = {"class_il": {"forgetting": None, "average_accuracy": 1.0}, "task_il": None, "seed": 3}
    assert flatten_summary(summary) == {"class_il/average_accuracy": 1.0}


# the console


def loop(logger: Logger, clock: SimpleNamespace) -> None:
    """Two tasks of two epochs of ten steps, each taking a second."""
    number = 0
    logger.log_event(number, EVENTS[0])
    for event in EVENTS[1:-1]:
        if event["event"] == "epoch":
            for step in range(10):
                clock.now += 1.0
                logger.log_step(Progress(event["task"], 2, 0, event["epoch"], 2, step, 10))
        number += 1
        logger.log_event(number, event)


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=100.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr(console_module, "time", clock)
    return clock


@pytest.mark.parametrize(("min_seconds", "shown"), [(0.0, 4), (11.0, 2), (1e9, 1)])
def test_console_lines_without_a_terminal(tmp_path, capsys, clock, min_seconds, shown):
    console = Console(min_seconds=min_seconds)
    console.start(info(tmp_path))
    loop(console, clock)
    console.finish("finished", None)
    out, err = capsys.readouterr()
    assert out == ""
    assert "\x1b" not in err
    first, *rest = err.splitlines()
    assert first == f"some_Experiment: er, seed 0, 2 tasks, in {tmp_path}"
    # 10 of 40 steps in 10 s; measured since the first step, which is when the loop is first seen.
    assert rest[0] == "task 1/2, epoch 1/2: loss 2, lr 0.01 [0:00:10, 0:00:30 left]"
    epochs = [line for line in rest if "epoch" in line]
    assert len(epochs) == shown
    if shown == 4:
        assert epochs[2] == "task 2/2, epoch 1/2: loss 2 (ce 1.5, replay 0.5), lr 0.00333 [0:00:30, 0:00:10 left]"
    assert [line for line in rest if "done" in line] == [
        "task 1/2 done: Class-IL  80.00 %, Task-IL        - [0:00:20]",
        "task 2/2 done: Class-IL  55.00 %, Task-IL        - [0:00:40]",
    ]
    assert rest[-1] == "finished after 0:00:40"


@pytest.mark.parametrize("terminal", [False, True])
def test_each_line_of_a_job_beside_others_says_which_job_it_is(tmp_path, capsys, clock, monkeypatch, terminal):
    monkeypatch.setattr(console_module, "has_terminal", lambda: terminal)  # bars would draw over each other
    console = Console(min_seconds=0.0)
    console.start(replace(info(tmp_path), job="lr=0.05, layers=[4]"))
    loop(console, clock)
    console.finish("failed", None)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 8
    assert all(line.startswith("[lr=0.05, layers=[4]] ") for line in lines)


def test_console_says_where_it_was_interrupted(tmp_path, capsys, clock):
    console = Console(min_seconds=0.0)
    console.start(info(tmp_path))
    console.log_step(Progress(3, 10, 1, 4, 20, 0, 10))
    console.finish("interrupted", None)
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted after 0:00:00 in task 4/10, phase 2 epoch 5/20"


TERMINAL_SCRIPT = """
import os, signal, sys, time
from pathlib import Path
from cl_bench.loggers.base import Progress, RunInfo
from cl_bench.loggers.console import Console

console = Console(min_seconds=0.0)
console.start(RunInfo(Path("."), "exp [bold]", "er", 0, "f", {{}}, 2))
ending = {ending!r}
try:
    for step in range(3):
        console.log_step(Progress(0, 2, 0, 1, 4, step, 3))
        time.sleep(0.21)
    for _ in range(1000):
        console.log_step(Progress(0, 2, 0, 1, 4, step, 3))
    accuracies = {{"class_il": [80.0], "task_il": [90.0], "class_il_average": 80.0, "task_il_average": 90.0}}
    console.log_event(1, {{"event": "task", "step": 3, "task": 0}} | accuracies)
    print("a warning of some library", file=sys.stderr)
    if ending == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if ending == "failed":
        raise RuntimeError("boom")
    if ending == "interrupted":
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
finally:
    console.finish(ending, None)
    print("the final table")
"""


def run_on_terminal(script: str) -> tuple[str, str]:
    """What a script writes to a terminal as stderr, and to a pipe as stdout."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        stdout=subprocess.PIPE,
        stderr=theirs,
        cwd=CONFIGS.parent,
        env=environment,
        text=True,
    )
    os.close(theirs)
    written = b""
    while True:
        try:
            written += os.read(ours, 65536)
        except OSError:  # how a terminal says that nobody holds its other end
            break
    os.close(ours)
    out, _ = process.communicate(timeout=30)
    return written.decode(), out


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["finished", "failed", "interrupted", "killed"])
def test_console_gives_the_terminal_back(ending):
    err, out = run_on_terminal(TERMINAL_SCRIPT.format(ending=ending))
    assert "exp [bold]: er, seed 0, 2 tasks" in err
    assert "━" in err
    for label in ("task 1/2", "epoch 2/4", "batch 1/3"):
        assert label in err
    assert 3 <= err.count("batch ") < 20  # of 1003 steps: each drawing waits for its time
    assert "task 1/2 done: Class-IL  80.00 %, Task-IL  90.00 %" in err
    # What is printed meanwhile comes where the bars were.
    assert err[: err.index("a warning of some library")].endswith("\x1b[2K")
    assert err.rindex("\x1b[?25h") > err.rindex("\x1b[?25l"), "the cursor is hidden at the end"
    if ending != "killed":
        assert out == "the final table\n"
        assert f"{ending} after 0:00:0" in err
        assert "\x1b[2K" in err[err.rindex("━") : err.rindex(f"{ending} after")], "the bars are not wiped out"


def test_console_on_a_dumb_terminal_writes_lines(monkeypatch):
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setenv("TERM", "dumb")
    assert not console_module.has_terminal()
    monkeypatch.setenv("TERM", "xterm")
    assert console_module.has_terminal()


def test_step_costs_next_to_nothing(tmp_path, capsys, monkeypatch):
    console = Console(min_seconds=2.0)
    group = Loggers([JsonLines(), console])
    group.start(info(tmp_path))
    group.log_step(PROGRESS)
    with monkeypatch.context() as patch:
        patch.setattr(console, "_times", None)  # looking at the step would fail
        console.log_step(PROGRESS)
    for step, limit in [(console.log_step, 1e-6), (group.log_step, 1.5e-6)]:
        seconds = min(timeit.repeat(lambda step=step: step(PROGRESS), number=10_000, repeat=7)) / 10_000
        assert seconds < limit
    group.finish("finished", None)


# configuration


@pytest.mark.parametrize(
    ("name", "loggers"),
    [
        ("none", []),
        ("console", ["console"]),
        ("tensorboard", ["console", "tensorboard"]),
        ("wandb", ["console", "wandb"]),
        ("mlflow", ["console", "mlflow"]),
        ("trackio", ["console", "trackio"]),
        ("many", ["console", "tensorboard", "wandb"]),
    ],
)
def test_yaml_names_loggers_and_all_their_keys(name, loggers):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = OmegaConf.to_container(compose(f"logger/{name}")["logger"])
    assert list(config) == loggers
    if name in ("mlflow", "trackio"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    for node in config.values():
        cls = get_object(node.pop("_target_"))
        assert set(node) == set(signature(cls).parameters)
        cls(**node)
