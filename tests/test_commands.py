"""The commands beside runs: that there are ten, what a shell completes, ``status``, ``export`` and ``wandb``."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import threading
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml
from helpers import (
    CLASS_IL,
    ROOT,
    TASK_IL,
    command,
    list_logged,
    make_run,
    read_points,
    select_kind,
    wandb_files,
    wandb_records,
)
from PIL import Image

from cl_bench.commands import COMMANDS, complete, run_command
from cl_bench.commands import export as export_module
from cl_bench.commands.export import build_logger, export, replay
from cl_bench.commands.status import list_runs, make_table
from cl_bench.commands.wandb import make_sweep, make_workspace
from cl_bench.config.schema import PACKAGE
from cl_bench.core.errors import ConfigError
from cl_bench.core.record import SETTINGS
from cl_bench.report.page import Run
from cl_bench.system.atomic import hold_lock, is_locked

METRICS = ["average_accuracy", "average_incremental_accuracy", "forgetting", "backward_transfer", "learning_accuracy"]

PROMISED = {
    "step": [
        *("lr", "loss", "losses/ce", "losses/replay"),
        *(f"sample_{setting}/average_accuracy" for setting in SETTINGS),
        *(f"sample_{setting}_tasks/task_{task}" for setting in SETTINGS for task in range(1, 6)),
    ],
    "task": [
        *(f"{setting}/{metric}" for setting in SETTINGS for metric in [*METRICS, "anytime_average_accuracy"]),
        *(f"{setting}_tasks/task_{task}" for setting in SETTINGS for task in range(1, 6)),
    ],
}
"""Axis -> the series that every dashboard gets."""


def finished_run(root: Path, **options) -> Path:
    """A finished run of five tasks with all kinds of events, a report's pictures and an image of its buffer."""
    folder = make_run(root, label="buffer.capacity=20", buffer_by_class=[2] * 10, data="d1", **options)
    events = []
    for task in range(5):
        for epoch in range(2):
            where = {"step": 20 * task + 10 * (epoch + 1), "task": task}
            losses = {"ce": 1 / (1 + epoch)} | ({"replay": 0.5} if task else {})
            events.append(
                {"event": "epoch", **where, "phase": 0, "epoch": epoch, "lr": 0.1, "loss": 1.0, "losses": losses}
            )
        rows = dict(zip(SETTINGS, (CLASS_IL[task], TASK_IL[task])))
        means = {s: sum(row) / len(row) for s, row in rows.items()}
        sampled = {f"sample_{s}": row for s, row in rows.items()} | {f"sample_{s}_average": m for s, m in means.items()}
        events.append({"event": "sample", **where, **sampled})
        events.append({"event": "task", **where, **rows, **{f"{s}_average": m for s, m in means.items()}})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (folder / "config.yaml").write_text("experiment: digits\nscale: null\nurl: https://me:very-secret-token@host\n")
    (folder / "report.html").write_text("<p>very-secret-token</p>")
    (folder / "plots").mkdir()
    for name in ("accuracy_matrix", "confusion"):
        Image.new("RGB", (2, 2)).save(folder / "plots" / f"{name}.png")
    return folder


# ---- the commands


def test_every_command_has_a_file_and_every_file_is_a_command():
    files = {path.stem for path in (PACKAGE / "commands").glob("*.py")} - {"__init__"}
    assert files == set(COMMANDS)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as stop:
        run_command([name, "--help"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: cl_bench {name} ")


def test_settings_are_hydras(capsys):
    for words in (
        [],
        ["seed=1"],
        ["+experiment=quickstart"],
        ["--help"],
        ["-m", "seed=0,1"],
        ["~schedule"],
        ["quickstart"],
    ):
        assert run_command(words) is None
    assert run_command(["comapre", "results"]) == 2
    assert "got comapre. Did you mean compare?" in capsys.readouterr().err


def test_a_shell_completes_commands_and_their_options():
    assert complete("cl_bench ") == ([*COMMANDS], True)
    assert complete("cl_bench co") == (["compare", "completion"], True)
    assert complete("cl_bench status --wa") == (["--watch"], False)
    words, more = complete("cl_bench compare results --")
    assert {"--out", "--where", "--format", "--help"} <= set(words)
    assert not more
    assert complete("cl_bench compare res") == ([], False)  # the shell offers files
    assert complete("cl_bench method=er buf") == ([], True)


PRESS = r"""
press() {  # TAB at the end of a line
    COMP_LINE=$1 COMP_POINT=${#1}
    COMPREPLY=()
    _cl_bench "${1%% *}" "${1##*[ =]}"
    printf '%s|' "${COMPREPLY[@]}"; echo
}
_old() { COMPREPLY=(old); }
complete -F _old python
"""


def test_bash_completes_both_forms_of_the_command(tmp_path, capsys):
    """bash itself calls the function; in place of the programs something that knows four words."""
    assert run_command(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    for name in ("cl_bench", "python"):
        program = tmp_path / name
        program.write_text(
            f'#!/bin/sh\necho "{name} $@: $COMP_LINE" >> asked\necho "method=er method=derpp metrics. $HOME"\n'
        )
        program.chmod(0o755)
    lines = ["cl_bench method=de", "cl_bench me", "python -m cl_bench method=de", "python -m cl_bench ", "python train"]
    presses = "\n".join(f"press '{line}'" for line in lines)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "HOME": "$(touch harmed)"}
    call = ["bash", "--norc", "-c", f"{PRESS}\n{script}\n{script}\n{presses}\ncomplete -p cl_bench python3"]
    done = subprocess.run(call, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "derpp |",
        "method=er |method=derpp |metrics.|",
        "derpp |",
        "method=er |method=derpp |metrics.|$(touch |harmed) |",
        "old|",
        "complete -o bashdefault -o default -o nospace -F _cl_bench cl_bench",
        "complete -o bashdefault -o default -o nospace -F _cl_bench python3",
    ]
    assert (tmp_path / "asked").read_text().splitlines() == [
        "cl_bench -sc query=bash: cl_bench method=de",
        "cl_bench -sc query=bash: cl_bench me",
        "python -m cl_bench -sc query=bash: cl_bench method=de",
        "python -m cl_bench -sc query=bash: cl_bench ",
    ]
    assert not (tmp_path / "harmed").exists()


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_zsh_can_read_its_script(capsys):
    assert run_command(["completion", "zsh"]) == 0
    assert subprocess.run(["zsh", "-n"], input=capsys.readouterr().out, text=True, capture_output=True).stderr == ""


@pytest.mark.slow
def test_the_shell_is_answered_by_the_command(tmp_path):
    def ask(line: str) -> list[str]:
        done = command("-sc", "query=bash", cwd=tmp_path, COMP_LINE=line)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    assert {"method=", "metrics", "metrics."} <= set(ask("cl_bench m")) | {"metrics."}
    assert ask("cl_bench export wandb --ag") == ["--again"]
    assert "method=derpp" in ask("cl_bench method=de")


@pytest.mark.slow
def test_help_names_the_commands_and_the_version_is_ours(tmp_path):
    began = os.times()
    text = command("--help", cwd=tmp_path).stdout
    ended = os.times()
    cpu = ended.children_user + ended.children_system - began.children_user - began.children_system
    assert cpu < 2, f"{cpu:.2f} s of CPU"
    for name, told in COMMANDS.items():
        assert f"cl_bench {name}" in text, name
        assert told in " ".join(text.split()), name
    assert command("--version", cwd=tmp_path).stdout == "cl_bench 0.1.0\n"


def test_the_published_settings_are_in_the_wheel():
    import tomllib

    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["force-include"] == {"configs": "cl_bench/configs", "scripts/reproduction": "cl_bench/reproduction"}


VAL = ["scenario.val_fraction=0.1", "trainer.evaluate_on=val"]

WRONG = {
    "compare: no runs": (["compare", "{empty}"], "RUN_OR_FOLDER: expected a finished run .* got no run at all"),
    "compare: no folder": (["compare", "{empty}/none"], "got '.*none', which is not there"),
    "compare: unknown key": (["compare", "{run}", "--group", "colour"], "--group: expected"),
    "compare: half a summary": (
        ["compare", "{half}"],
        "summary.json: expected a JSON object; got text that breaks off",
    ),
    "compare: half a matrix": (["compare", "{cut}", "--out", "o"], "accuracy_matrix.csv: expected the accuracy matrix"),
    "compare: no common seeds": (["compare", "{run}", "{other}", "--reference", "2"], "--reference: .* in common"),
    "compare: nothing to import": (["compare", "{run}", "--import", "none.csv"], "--import: .* which is not there"),
    "status: no folder": (["status", "{empty}/none"], "RESULTS: expected a folder of runs; got .*not there"),
    "status: no runs": (["status", "{empty}"], "RESULTS: expected a folder with runs"),
    "status: no time": (["status", "{run}", "--watch", "0"], "--watch: expected seconds above 0; got 0"),
    "export: no runs": (["export", "tensorboard", "{empty}"], "RUN_OR_FOLDER: expected a finished run"),
    "export: no path": (["export", "wandb", "project=p"], "RUN_OR_FOLDER: expected .* got none"),
    "export: unknown key": (["export", "wandb", "{run}", "projekt=p"], "logger.wandb.projekt.*wandb.project"),
    "export: wrong mode": (["export", "wandb", "{run}", "mode=dryrun"], "logger.wandb.mode: expected one of auto"),
    "export: nothing sent": (["export", "wandb", "{run}", "mode=disabled"], "mode: expected online or offline"),
    "export: half a summary": (["export", "tensorboard", "{half}"], "summary.json: .* got text that breaks off"),
    "audit: half a summary": (["audit", "{half}"], "summary.json: expected a JSON object; got text that breaks off"),
    "metrics: half a summary": (["metrics", "{half}", "--add", "forgetting_clipped"], "got text that breaks off"),
    "audit: no run": (["audit", "{empty}"], "run_dir: expected the folder of a finished run"),
    "metrics: unknown": (["metrics", "{run}", "--add", "forgeting"], "--add: expected .* Did you mean forgetting"),
    "reproduce: unknown": (["reproduce", "derpp5"], "NAME: expected a group"),
    "new: a name that there is": (["new", "method", "er"], "NAME: expected a name that no method has"),
    "wandb: no space": (
        ["wandb", "sweep", "+experiment=quickstart", *VAL],
        r"\+search: expected a search space; got none",
    ),
    "wandb: test images": (
        ["wandb", "sweep", "+experiment=quickstart", "optimizer.lr=interval(0.01,0.3)"],
        r"trainer.evaluate_on: expected val in a search \(a W&B sweep\), .*; got test",
    ),
    "wandb: no values": (
        ["wandb", "sweep", "+experiment=quickstart", *VAL, "method=glob(e*)"],
        r"method: expected interval\(LOW,HIGH\), .* got glob\(e\*\)",
    ),
    "wandb: no logarithm": (
        ["wandb", "sweep", "+experiment=quickstart", *VAL, "optimizer.lr=tag(log,interval(0,1))"],
        r"optimizer.lr: expected interval\(LOW,HIGH\), with log above 0",
    ),
    "wandb: nothing told": (
        ["wandb", "sweep", "+experiment=quickstart", *VAL, "optimizer.lr=0.1,0.2", "logger=tensorboard"],
        "logger: expected one that logs to W&B, .* got console, tensorboard",
    ),
    "wandb: two spaces": (["wandb", "sweep", "+search=lvt,lvt"], "search: expected one of lvt; got lvt,lvt"),
    "reproduce: no seeds": (["reproduce", "--seeds", "0"], "--seeds: expected 1 or more; got 0. Leave it out"),
    "wandb: unknown space": (["wandb", "sweep", "+search=lvd"], "search: expected one of lvt; got lvd"),
    "wandb: unknown key": (["wandb", "sweep", "optimizer.lrr=1,2", "trainer.epoch=1"], "trainer.epoch: .*epochs"),
    "wandb: half a project": (["wandb", "workspace", "cl_bench"], "ENTITY/PROJECT: expected two names; got cl_bench"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_gives_one_message_and_status_2(case, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    words, message = WRONG[case]
    run = make_run(tmp_path / "r")
    folders = {"empty": tmp_path / "empty", "run": run, "other": make_run(tmp_path / "r", name="other", seed=1)}
    for name, file in (("half", "summary.json"), ("cut", "accuracy_matrix.csv")):
        folders[name] = make_run(tmp_path / name)
        text = (folders[name] / file).read_text()
        (folders[name] / file).write_text(text[: len(text) // 2].rpartition(",")[0])
    filled = [word.format(**folders) for word in words]
    assert run_command(filled) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    import re

    assert re.search(message, error), error


def test_a_report_that_cannot_be_made_does_not_stop_the_others(tmp_path, capsys, monkeypatch):
    broken, whole = make_run(tmp_path, seed=0), make_run(tmp_path, seed=1)

    def write_report(run):
        if run == broken:
            raise KeyError("event")  # a damaged file, say
        return run / "report.html"

    monkeypatch.setattr("cl_bench.report.page.write_report", write_report)
    assert run_command(["report", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert out == f"{whole / 'report.html'}\n"
    assert err == f"cl_bench: {broken}: KeyError: 'event'\n"


# ---- status


def begin(root: Path, name: str, seed: int, **config) -> Path:
    """A run that is not finished."""
    folder = root / "digits" / name / f"seed{seed}"
    folder.mkdir(parents=True)
    (folder / "env.json").write_text("{}")
    trainer = {"evaluate_on": "test", "epochs": 3}
    (folder / "config.yaml").write_text(yaml.safe_dump({"scale": None, "seed": seed, "trainer": trainer, **config}))
    return folder


PACE = {"task": 1, "phase": 0, "epoch": 2, "step": 70, "steps_per_second": 12.345, "num_tasks": 5, "epochs": 20}


def test_status_shows_every_run_with_its_state(tmp_path, capsys):
    make_run(tmp_path, seed=0)
    make_run(tmp_path, seed=1)
    running = begin(tmp_path, "er-f1", 0, method={"alpha": 0.9})
    (running / "pace.jsonl").write_text(json.dumps(PACE | {"task": 0}) + "\n" + json.dumps(PACE) + '\n{"task": ')
    failed = begin(tmp_path, "er-f1", 1, method={"alpha": 0.9})
    (failed / "failure.txt").write_text("no room\n")
    stopped = begin(tmp_path, "er-f1", 2, method={"alpha": 0.9})
    (stopped / "pace.jsonl").write_text(json.dumps(PACE | {"phase": 1}) + "\n")
    begin(tmp_path, "er-f1", 3, method={"alpha": 0.9})
    damaged = begin(tmp_path, "er-f1", 4, method={"alpha": 0.9})
    (damaged / "summary.json").write_text('{"schema": 1, "sta')
    with hold_lock(running / ".lock"):
        lines = list_runs(tmp_path)
        assert run_command(["status", str(tmp_path)]) == 0
    assert [(line.seed, line.state) for line in lines] == [
        *(("0", "running"), ("1", "failed"), ("4", "failed"), ("2", "interrupted"), ("3", "interrupted")),
        *(("0", "finished"), ("1", "finished")),
    ]
    told = [line.told for line in lines]
    assert told[0].startswith("task 2/5, epoch 3/20, 12.3 steps/s, ")
    assert told[1:5] == [
        "no room",
        "summary.json cannot be read",
        "task 2/5, epoch 3/20 of phase 2",
        "before the end of the first epoch",
    ]
    assert told[5] == "Class-IL 68.60, Task-IL 94.60"
    assert {line.label for line in lines} == {"alpha=0.9", "alpha=0.5"}
    out = capsys.readouterr().out
    assert "1 running, 2 failed, 2 interrupted, 2 finished" in out
    assert out.count("alpha=0.9") == 5
    assert make_table(lines).row_count == 7


def test_a_run_may_begin_while_its_folder_is_looked_at(tmp_path):
    file = tmp_path / ".lock"
    file.touch()
    reader = file.open()
    fcntl.flock(reader, fcntl.LOCK_SH)  # as is_locked() does for a moment
    threading.Timer(0.01, reader.close).start()
    with hold_lock(file):
        assert is_locked(file)
        with pytest.raises(BlockingIOError), hold_lock(file):
            pass


def test_status_needs_nothing_heavy(tmp_path):
    heavy = "('torch', 'pandas', 'matplotlib', 'wandb')"
    code = f"import sys, cl_bench.commands.status; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_status_is_shown_again_until_it_is_stopped(tmp_path, capsys, monkeypatch):
    make_run(tmp_path)
    waits = iter([None, None])

    def wait(seconds):
        assert seconds == 7
        if next(waits, "over") == "over":
            raise KeyboardInterrupt

    monkeypatch.setattr("cl_bench.commands.status.time.sleep", wait)
    assert run_command(["status", str(tmp_path), "--watch", "7"]) == 130
    assert capsys.readouterr().out.count("1 finished") == 3


# ---- export


def test_tensorboard_gets_the_series_of_a_finished_run_once(tmp_path, capsys):
    folder = finished_run(tmp_path)
    assert run_command(["export", "tensorboard", str(tmp_path)]) == 0
    points = read_points(folder / "tensorboard")
    assert set(points) == {name for names in PROMISED.values() for name in names}
    assert points["class_il/forgetting"][-1] == (100, 28.25)  # the example of Chaudhry's definition
    assert points["class_il/backward_transfer"][-1] == (100, -28.25)
    assert points["class_il/average_accuracy"][-1] == (100, 68.6)
    assert points["class_il_tasks/task_1"] == [(20, 95), (40, 80), (60, 70), (80, 72), (100, 60)]
    assert run_command(["export", "tensorboard", str(tmp_path)]) == 0
    assert "sent before, skipped" in capsys.readouterr().out
    assert run_command(["export", "tensorboard", str(tmp_path), "--again"]) == 0
    assert read_points(folder / "tensorboard") == points


def test_a_report_that_is_missing_is_made_before_a_run_is_sent(tmp_path, monkeypatch):
    folder = finished_run(tmp_path)
    (folder / "report.html").unlink()
    made = []
    monkeypatch.setattr(export_module, "prepare_report", made.append)
    assert export(Run.read(folder), "tensorboard")
    assert made == [folder]


def test_a_run_that_cannot_be_sent_does_not_stop_the_others(tmp_path, capsys):
    broken, whole = finished_run(tmp_path, seed=0), finished_run(tmp_path, seed=1)
    (broken / "config.yaml").unlink()
    begin(tmp_path, "er-f1", 3)
    assert run_command(["export", "tensorboard", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert out.splitlines() == [f"sent: {whole}"]
    assert f"not sent: {broken} (FileNotFoundError: " in err
    assert f"interrupted, skipped: {tmp_path / 'digits' / 'er-f1' / 'seed3'}" in err


def get_axes(records: list, name: str) -> set[str]:
    """The axes that W&B was told for a series."""
    metrics = select_kind(records, "metric")
    return {m.step_metric for m in metrics if m.step_metric and (m.name == name or fnmatch(name, m.glob_name or "-"))}


@pytest.mark.slow
def test_wandb_gets_a_finished_run_as_the_live_logger_tells_it(tmp_path, monkeypatch):
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("SOME_TOKEN", "very-secret-token")
    folder, live = finished_run(tmp_path / "a"), finished_run(tmp_path / "b")
    words = ["project=p", "mode=offline", "tags=[x,y]", "notes=why"]
    assert run_command(["export", "wandb", str(folder), *words]) == 0
    replay(Run.read(live), build_logger("wandb", words))  # what the loop tells a logger
    records = [record for file in wandb_files(folder) for record in wandb_records(file)]
    rows = list_logged(records)
    for axis, names in PROMISED.items():
        for name in names:
            assert get_axes(records, name) == {axis}, name
            told = [row for row in rows if name in row]
            assert told, name
            assert all({"step", "epoch", "task"} <= set(row) for row in told)
    last = next(row for row in reversed(rows) if "class_il/forgetting" in row)
    assert (last["task"], last["epoch"], last["step"], last["class_il/forgetting"]) == (5, 10, 100, 28.25)
    [run] = select_kind(records, "run")
    assert (run.project, run.job_type, list(run.tags), run.notes) == ("p", "er", ["x", "y"], "why")
    assert run.display_name == "er capacity=20 seed 0"
    assert run.run_group == "digits er capacity=20 f0"
    config = {i.key: json.loads(i.value_json) for c in select_kind(records, "config") for i in c.update}
    summary = json.loads((folder / "summary.json").read_text())
    assert [config[key] for key in ("fingerprint", "label", "scale", "data")] == ["f0", "capacity=20", None, "d1"]
    assert config["class_order"] == summary["class_order"]
    media = folder / "wandb"
    for name in ("accuracy_matrix", "confusion"):
        assert [*media.glob(f"offline-run-*/files/media/images/plots/{name}*.png")], name
    [table] = media.glob("offline-run-*/files/media/table/buffer_by_class*.json")
    assert json.loads(table.read_text())["data"][0] == ["digit_0", 2]
    copies = {path.name: path.read_text() for path in media.glob("offline-run-*/files/cl_bench/*")}
    assert set(copies) == {"report.html", "config.yaml", "summary.json", "accuracy_matrix.csv"}
    assert "very-secret-token" not in copies["report.html"] + copies["config.yaml"] + json.dumps(config)

    def strip(rows: list[dict]) -> list[dict]:
        return [{k: v for k, v in row.items() if not k.startswith("_")} for row in rows if "step" in row]

    others = [record for file in wandb_files(live) for record in wandb_records(file)]
    assert strip(list_logged(others)) == strip(rows)


@pytest.mark.filterwarnings("ignore")  # MLflow's own
def test_mlflow_gets_a_finished_run(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed (extra dashboards)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SOME_TOKEN", "very-secret-token")
    folder = finished_run(tmp_path / "r")
    uri = f"sqlite:///{tmp_path}/m.db"
    assert run_command(["export", "mlflow", str(folder), f"uri='{uri}'", "experiment=e"]) == 0
    client = mlflow.MlflowClient(tracking_uri=uri)
    [run] = client.search_runs([client.get_experiment_by_name("e").experiment_id])
    assert (run.info.status, run.info.run_name) == ("FINISHED", "er capacity=20 seed 0")
    assert run.data.params["url"] == "https://me:***@host"
    for name in [name for names in PROMISED.values() for name in names]:
        assert client.get_metric_history(run.info.run_id, name), name
    history = client.get_metric_history(run.info.run_id, "class_il_tasks/task_1")
    assert [(point.step, point.value) for point in history] == [(20, 95), (40, 80), (60, 70), (80, 72), (100, 60)]
    assert run.data.metrics["summary/class_il/forgetting"] == 28.25
    names = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert {"plots", "report.html", "config.yaml"} <= names


def test_trackio_gets_a_finished_run(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("SOME_TOKEN", "very-secret-token")
    why = "trackio is not installed (it needs an older pillow than constraints.txt has)"
    trackio = pytest.importorskip("trackio", reason=why)
    folder = finished_run(tmp_path / "r")
    assert run_command(["export", "trackio", str(folder), "project=p"]) == 0
    [run] = trackio.Api().runs("p")
    assert run.name == "er capacity=20 seed 0 (digits f0)"
    assert (run.config["url"], run.config["fingerprint"]) == ("https://me:***@host", "f0")
    logs = trackio.sqlite_storage.SQLiteStorage.get_logs("p", run.name, run_id=run.id)
    for names in PROMISED.values():
        for name in names:
            assert any(name in row for row in logs), name
    rows = [(row["step"], row["task"], row["class_il/forgetting"]) for row in logs if "class_il/forgetting" in row]
    assert rows[-1] == (100, 5, 28.25)
    assert any("plots/confusion" in row for row in logs)


# ---- W&B


def test_a_search_becomes_a_sweep_file():
    sweep = make_sweep(["+experiment=lvt_cifar100_10split", "+search=lvt", "+scale=mini", "seed=1"])
    assert sweep["metric"] == {"name": "class_il/average_accuracy", "goal": "maximize"}
    assert sweep["run_cap"] == 40
    assert sweep["parameters"]["method.new_weight_rule"] == {"values": ["constant", "decay"]}
    assert sweep["parameters"]["method.gamma"] == {"values": [0.0, 1.0, 100.0, 10000.0, 100000.0]}
    command_line = sweep["command"]
    assert command_line[:4] == ["${env}", "python", "-m", "cl_bench"]
    assert command_line[-1] == "${args_no_hyphens}"
    assert {
        "trainer.evaluate_on=val",
        "scenario.val_fraction=0.1",
        "trainer.epochs=2",
        "seed=1",
        "logger=wandb",
    } <= set(command_line)
    assert not [word for word in command_line if word.startswith(("hydra", "+search"))]
    assert "${" not in "".join(command_line[4:-1])  # W&B has macros of its own


def test_a_typed_space_becomes_a_sweep_file(capsys):
    words = ["+experiment=quickstart", "scenario.val_fraction=0.1", "trainer.evaluate_on=val", "logger=many"]
    space = ["optimizer.lr=tag(log,interval(0.01,0.3))", "buffer.capacity=20,50", "trainer.epochs=int(interval(1,3))"]
    space += ["method.alpha=interval(0.1,1)", "seed=range(0,3)"]
    assert run_command(["wandb", "sweep", *words, *space]) == 0
    sweep = yaml.safe_load(capsys.readouterr().out)
    assert sweep["parameters"] == {
        "optimizer.lr": {"distribution": "log_uniform_values", "min": 0.01, "max": 0.3},
        "buffer.capacity": {"values": [20, 50]},
        "trainer.epochs": {"distribution": "int_uniform", "min": 1, "max": 3},
        "method.alpha": {"distribution": "uniform", "min": 0.1, "max": 1.0},
        "seed": {"values": [0, 1, 2]},
    }
    assert "logger=wandb" not in sweep["command"]


def test_what_is_typed_replaces_what_a_search_file_says(tmp_path, monkeypatch):
    (tmp_path / "search").mkdir()
    text = "# @package _global_\ndefaults:\n  - override /hydra/sweeper: optuna\n  - override /optimizer: adam\n"
    text += "hydra: {sweeper: {params: {optimizer.lr: 'choice(0.1,0.2)', buffer.capacity: 'choice(10,20)'}}}\n"
    (tmp_path / "search" / "mine.yaml").write_text(text)
    monkeypatch.setattr("cl_bench.commands.wandb.find_installed", lambda: {"mylab": tmp_path})
    sweep = make_sweep(["+experiment=quickstart", *VAL, "+search=mine", "buffer.capacity=30"])
    assert sweep["parameters"] == {"optimizer.lr": {"values": [0.1, 0.2]}}
    assert {"optimizer=adam", "buffer.capacity=30"} <= set(sweep["command"])
    typed = make_sweep(["+experiment=quickstart", *VAL, "+search=mine", "optimizer=sgd"])["command"]
    assert "optimizer=sgd" in typed
    assert "optimizer=adam" not in typed


def test_a_sweep_file_knows_ones_own_folder_of_configurations(tmp_path, capsys):
    for group, text in {"search": "hydra: {sweeper: {params: {buffer.capacity: 'choice(10,20)'}}}\n",
                        "buffer": "defaults: [reservoir]\ncapacity: 7\n"}.items():  # fmt: skip
        (tmp_path / group).mkdir()
        (tmp_path / group / "mine.yaml").write_text("# @package _global_\n" * (group == "search") + text)
    keys = ["+experiment=quickstart", *VAL, "buffer=mine", "+search=mine"]
    assert run_command(["wandb", "sweep", "--config-dir", str(tmp_path), *keys]) == 0
    sweep = yaml.safe_load(capsys.readouterr().out)
    assert sweep["parameters"] == {"buffer.capacity": {"values": [10, 20]}}
    assert sweep["command"][4] == f"--config-dir={tmp_path}"
    assert run_command(["wandb", "sweep", *keys]) == 2
    assert run_command(["wandb", "sweep", "--config-dir", str(tmp_path / "nowhere"), *keys]) == 2
    assert "--config-dir: expected a folder with YAML files; got" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")  # wandb-workspaces' own
def test_what_a_workspace_would_be(monkeypatch, capsys):
    pytest.importorskip("wandb_workspaces", reason="wandb-workspaces is not installed (extra dashboards)")

    def refuse(*args, **kwargs):
        raise AssertionError(f"network: {args}")

    monkeypatch.setattr("socket.getaddrinfo", refuse)
    page = make_workspace("me/cl_bench")
    assert (page.entity, page.project) == ("me", "cl_bench")
    assert run_command(["wandb", "workspace", "me/cl_bench", "--print"]) == 0
    text = capsys.readouterr().out
    for setting in SETTINGS:
        for metric in ("average_accuracy", "forgetting", "backward_transfer", "learning_accuracy"):
            assert f'"{setting}/{metric}"' in text
    assert text.count('"xAxis": "task"') == 8
    assert '"name": "group"' in text


def test_a_workspace_needs_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports.v2", None)
    with pytest.raises(ConfigError, match=r"expected the package wandb-workspaces; got none\. pip install"):
        make_workspace("me/cl_bench")


@pytest.mark.parametrize("name", ["mlflow", "trackio"])
def test_an_export_needs_its_package(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    folder = finished_run(tmp_path)
    with pytest.raises(ConfigError, match=f"logger: expected the package {name}; got none. pip install"):
        export(Run.read(folder), name)
    assert not (folder / name).exists()
