"""The command as a user types it: results, resuming, signals, wrong input."""

import json
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import (
    HEAVY,
    ROOT,
    TINY,
    assert_equal_results,
    command,
    command_environment,
    configure,
    find_run,
    needs_cifar100,
    run_in_process,
)

from cl_bench.core.labels import shorten_label
from cl_bench.runs import run as run_module

FILES = [
    "accuracy_matrix.csv", "config.yaml", "env.json", "metrics.jsonl", "pace.jsonl", "predictions.npz",
    "report.html", "summary.json",
]  # fmt: skip


@pytest.mark.slow
def test_a_run_from_end_to_end_and_once_more(tmp_path):
    first = command("+experiment=quickstart", *TINY, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    run = find_run(tmp_path / "results")
    assert run.parts[-4:-2] == ("results", "quickstart")
    assert run.name == "seed0"
    assert all((run / name).is_file() for name in FILES)
    assert f"report: {run.relative_to(tmp_path) / 'report.html'}" in first.stdout
    assert "average accuracy" in first.stdout

    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert [summary[key] for key in ("method", "backbone", "scenario", "buffer")] == [
        "lvt", "lvt_digits", "digits", "confidence_aware",
    ]  # fmt: skip
    assert run.parent.name == f"{summary['name']}-{summary['fingerprint']}"
    assert summary["tasks"] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert summary["class_il"]["forward_transfer"] is None
    assert summary["task_il"]["forward_transfer"] is not None
    assert summary["published"] is None
    areas = summary["task_il_auroc"]["tasks"]
    assert len(areas) == 2
    assert summary["task_il_auroc"]["mean"] == pytest.approx(sum(areas) / 2)
    assert summary["cost"]["samples_seen"] == 2 * 2 * 50
    assert summary["cost"]["buffer_bytes"] > 200 * 64

    # The last row of the matrix, the predictions and the summary say the same.
    matrix = pd.read_csv(run / "accuracy_matrix.csv")
    last = matrix[(matrix.setting == "class_il") & (matrix.after_task == 1)].sort_values("task")
    assert last.accuracy.mean() == pytest.approx(summary["class_il"]["average_accuracy"], abs=1e-3)
    predictions = np.load(run / "predictions.npz")
    assert len(predictions["label"]) == 40
    assert (np.diff(predictions["index"]) > 0).all()
    right = predictions["class_il"] == predictions["label"]
    assert [right[predictions["task"] == t].sum() for t in (0, 1)] == last.correct.tolist()
    assert all(predictions["task_il"][predictions["task"] == 1] >= 5)

    checkpoint = torch.load(run / "checkpoint" / "last.pt", weights_only=True)
    assert checkpoint["task"] == 2

    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    again = command("+experiment=quickstart", *TINY, cwd=tmp_path)
    assert again.returncode == 0
    assert "Already finished, nothing to do" in again.stderr
    assert "average accuracy" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == before

    afresh = command("+experiment=quickstart", *TINY, "overwrite=true", cwd=tmp_path)
    assert afresh.returncode == 0
    assert (run / "metrics.jsonl").stat().st_mtime_ns != before[run / "metrics.jsonl"]
    assert json.loads((run / "summary.json").read_text())["class_il"] == summary["class_il"]


@needs_cifar100
@pytest.mark.slow
def test_real_cifar100_killed_in_mid_task_goes_on_bit_equal(tmp_path):
    arguments = [
        "+experiment=lvt_cifar100_10split", "+scale=mini", "scenario.train_per_class=3", "scenario.test_per_class=1",
        "scenario.num_tasks=2", "trainer.epochs=3", "trainer.checkpoint_steps=2", "buffer.capacity=100", "device=cpu",
        "report=false",
    ]  # fmt: skip
    straight = command(*arguments, "results_dir=straight", cwd=tmp_path)
    assert straight.returncode == 0, straight.stderr

    environment = command_environment()
    call = [sys.executable, "-m", "cl_bench", *arguments, "results_dir=killed"]
    process = subprocess.Popen(call, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline:
            lines = [json.loads(line) for path in tmp_path.glob("killed/**/metrics.jsonl") for line in _whole(path)]
            if any(e["event"] == "epoch" and e["task"] == 1 and e["epoch"] == 0 for e in lines):
                break
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not list(tmp_path.glob("killed/**/summary.json"))
    (last,) = tmp_path.glob("killed/**/last.pt")
    saved = torch.load(last, weights_only=True)
    assert saved["task"] == 1
    assert saved["now"] is not None  # in mid-task, not at a boundary

    resumed = command(*arguments, "results_dir=killed", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert_equal_results(find_run(tmp_path / "straight"), find_run(tmp_path / "killed"))


def _whole(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


@pytest.mark.slow
def test_signals_save_and_leave_and_the_same_command_goes_on(tmp_path):
    arguments = ["+experiment=quickstart", *TINY, "trainer.epochs=20", "report=false"]
    call = [sys.executable, "-m", "cl_bench", *arguments, "results_dir=stopped"]
    for number, status, epochs in ((signal.SIGTERM, 143, 2), (signal.SIGINT, 130, 23)):
        process = subprocess.Popen(
            call, cwd=tmp_path, env=command_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if any(path.read_text().count('"epoch", ') >= epochs for path in tmp_path.glob("stopped/**/metrics.jsonl")):
                break
            time.sleep(0.02)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == status, errors
        assert "the same command goes on from here" in errors
        assert "Traceback" not in errors
        assert not list(tmp_path.glob("stopped/**/summary.json"))
    assert command(*arguments, "results_dir=stopped", cwd=tmp_path).returncode == 0
    assert command(*arguments, "results_dir=straight", cwd=tmp_path).returncode == 0
    assert_equal_results(find_run(tmp_path / "straight"), find_run(tmp_path / "stopped"))


@pytest.mark.slow
def test_a_second_process_on_one_run_folder_is_refused(tmp_path, monkeypatch, capsys):
    from cl_bench.runs.run_dir import lock_run_dir

    arguments = [*TINY, f"results_dir={tmp_path}/r"]
    assert run_in_process(*arguments, monkeypatch=monkeypatch, cwd=tmp_path) == 0
    run = find_run(tmp_path / "r")
    with lock_run_dir(run):
        assert run_in_process(*arguments, "overwrite=true", monkeypatch=monkeypatch, cwd=tmp_path) == 2
    assert "expected a run folder that no other process is writing to" in capsys.readouterr().err
    assert (run / "summary.json").exists()


@pytest.mark.slow
def test_a_sweep_gives_every_run_its_folder(tmp_path, monkeypatch):
    arguments = ["-m", *TINY, "seed=0,1", "optimizer.lr=0.1,0.01", "results_dir=r"]
    assert run_in_process(*arguments, monkeypatch=monkeypatch, cwd=tmp_path) == 0
    runs = [path.parent for path in (tmp_path / "r").glob("default/*/*/summary.json")]
    assert sorted(run.name for run in runs) == ["seed0", "seed0", "seed1", "seed1"]
    assert len({run.parent for run in runs}) == 2


@pytest.mark.slow
def test_the_three_seeds_change_only_what_they_govern(tmp_path, monkeypatch):
    def summary(*overrides):
        folder = "-".join(overrides).replace("=", "") or "base"
        arguments = [*TINY, "scenario.class_order=random", f"results_dir={folder}", *overrides]
        assert run_in_process(*arguments, monkeypatch=monkeypatch, cwd=tmp_path) == 0
        run = find_run(tmp_path / folder)
        return json.loads((run / "summary.json").read_text()), np.load(run / "predictions.npz")

    base, base_images = summary()
    other, images = summary("seed=5")
    assert other["class_order"] == base["class_order"]
    assert other["fingerprint"] == base["fingerprint"]
    assert set(images["index"]) == set(base_images["index"])
    assert other["class_il"] != base["class_il"]
    other, images = summary("class_order_seed=5")
    assert other["class_order"] != base["class_order"]
    assert set(images["index"]) == set(base_images["index"])
    other, images = summary("data_seed=5")
    assert other["class_order"] == base["class_order"]
    assert set(images["index"]) != set(base_images["index"])
    assert other["fingerprint"] != base["fingerprint"]


@pytest.mark.slow
def test_validation_in_place_of_test_for_a_search(tmp_path, monkeypatch):
    arguments = [*TINY, "scenario.val_fraction=0.3", "trainer.evaluate_on=val", "results_dir=r"]
    assert run_in_process(*arguments, monkeypatch=monkeypatch, cwd=tmp_path) == 0
    run = find_run(tmp_path / "r")
    assert json.loads((run / "summary.json").read_text())["evaluate_on"] == "val"
    assert len(np.load(run / "predictions.npz")["label"]) == 30  # three of ten training images of ten classes


@pytest.mark.slow
def test_dry_run_says_what_a_run_would_be(tmp_path, monkeypatch, capsys):
    arguments = ["+experiment=quickstart", "dry_run=true", "results_dir=r"]
    assert run_in_process(*arguments, monkeypatch=monkeypatch, cwd=tmp_path) == 0
    out = capsys.readouterr().out
    summary = json.loads(out.splitlines()[-1])
    assert summary["status"] == "dry_run"
    assert summary["cost"]["parameters"] > 1e5
    assert summary["cost"]["buffer_bytes"] > 200 * 64
    assert summary["expected_hours"] > 0
    assert summary["tasks"] == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    assert "expected:" in out
    assert not (tmp_path / "r").exists()


@pytest.mark.slow
def test_help_lists_what_there_is():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = command("--help", cwd=ROOT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime - before.ru_utime < 2  # seconds of the processor; about 1
    assert done.returncode == 0
    for group in ("backbone", "method", "scenario", "buffer", "metrics", "experiment"):
        names = sorted(path.stem for path in (ROOT / "configs" / group).glob("*.yaml"))
        assert f"{group}: {', '.join(names)}" in done.stdout
    assert done.stdout.count("  python -m cl_bench ") == 3


def test_help_loads_nothing_heavy():
    code = f"import atexit, sys; from cl_bench.__main__ import main; heavy = {('torch', 'numpy', *HEAVY)}; "
    code += "atexit.register(lambda: print([m for m in heavy if m in sys.modules])); main()"
    done = subprocess.run([sys.executable, "-c", code, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
    assert "cl_bench reproduce" in done.stdout


WRONG = {
    "unknown experiment": (["+experiment=lvt"], "experiment: expected one of .*quickstart.*; got lvt."),
    "unknown method": (["method=erx"], "method: expected one of .*derpp.*; got erx. Did you mean method=er?"),
    "experiment without a plus": (
        ["experiment=quickstart"],
        r"experiment: expected a plus .*Write \+experiment=quickstart\.",
    ),
    "unknown group": (
        ["methods=er"],
        "methods: expected a key .*; got the unknown key methods. Did you mean method=er?",
    ),
    "unknown key": (["optimizer.lrr=1"], "optimizer.lrr: expected .*; got the unknown key lrr. .* optimizer.lr=1?"),
    "surplus key": (["+optimizer.lrr=1"], "optimizer.lrr: expected one of the keys .*Did you mean optimizer.lr?"),
    "missing key": (["~optimizer.momentum"], "optimizer.momentum: expected a value; got nothing"),
    "wrong type": (["seed=abc"], "seed: expected a whole number; got abc"),
    "wrong type in a group": (["trainer.epochs=many"], "trainer.epochs: expected a value of type int; got many"),
    "half an epoch": (["trainer.epochs=1.5"], "trainer.epochs: expected a value of type int; got 1.5"),
    "zero epochs": (["trainer.epochs=0"], "trainer.epochs: expected above 0; got 0"),
    "negative batch": (["trainer.batch_size=-4"], "trainer.batch_size: expected above 0; got -4"),
    "indivisible tasks": (
        ["scenario.num_tasks=3"],
        r"scenario.num_tasks: expected .* one of \[1, 2, 5, 10\]; got 3. .*classes_per_task=\[4, 3, 3\]",
    ),
    "classes that do not add up": (["scenario.classes_per_task=[5,4]"], "scenario.classes_per_task: .*add up to 10"),
    "class order": (["scenario.class_order=[1,2]"], "scenario.class_order: .* natural, random, ocl_survey, or a"),
    "no superclasses": (["scenario.class_order=superclass"], "scenario.class_order: expected one of natural, random,"),
    "zero capacity": (
        ["method=er", "buffer=reservoir", "buffer.capacity=0"],
        "buffer.capacity: expected a number above 0",
    ),
    "negative capacity": (
        ["method=er", "buffer=reservoir", "buffer.capacity=-5"],
        "buffer.capacity: expected a number above 0; got -5",
    ),
    "less than one a class": (
        ["method=er", "buffer=fixed_memory", "buffer.capacity=9"],
        "buffer.capacity: expected at least 10 images, one per class.*; got 9",
    ),
    "replay without memory": (["method=er"], "buffer: expected a buffer with a capacity.*; got none"),
    "memory without replay": (["buffer=reservoir"], "buffer: expected none, since method=finetune replays nothing"),
    "a method on a network it cannot use": (
        ["method=lvt", "backbone=mlp", "buffer=reservoir"],
        "backbone: expected a network of kind LVT, which method=lvt needs; got mlp. Use backbone=lvt",
    ),
    "a method on a network without one head": (
        ["backbone=lvt_digits", "method=lwf", "buffer=none"],
        "backbone: expected a network of kind SingleHead, which method=lwf needs; got lvt_digits.",
    ),
    "class means without memory": (["method=icarl"], "buffer: expected a buffer with a capacity.*; got none"),
    "class means of a buffer that may miss a class": (
        ["method=icarl", "buffer=reservoir"],
        "buffer: expected a buffer of kind PerClassBuffer, which method=icarl needs; got reservoir. Use buffer=herding",
    ),
    "missing data": (
        ["scenario=cifar100", "data_dir=/dev/null/nowhere", "scenario.source.download=false"],
        "data_dir: expected the CIFAR-100 files .* in /dev/null/nowhere/cifar-100-python; got no such files",
    ),
    "unknown device": (["device=gpu"], "device: expected auto, or one that this machine has: .*cpu; got gpu"),
    "unwritable results": (["results_dir=/proc/results"], "results_dir: expected a folder that can be written to"),
    "a name that leaves the folder": (["name=../../elsewhere"], "name: expected the name of a single folder"),
    "precision": (["precision=fp8"], r"precision: expected one of \[fp32, bf16\]; got fp8"),
    "negative seed": (["seed=-1"], r"seed: expected a whole number in \[0, 2\^32\); got -1"),
    "rate": (["optimizer.lr=-0.1"], "optimizer.lr: expected a number above 0; got -0.1"),
    "option of a method": (
        ["backbone=lvt_digits", "method.distillation=l2"],
        "method.distillation: expected one of kl, mse; got l2",
    ),
    "a target outside the allow-list": (["method._target_=os.system"], "method._target_: expected something in one of"),
    "a target that does not exist": (["method._target_=cl_bench.nothing"], "method._target_: .*cannot be loaded"),
    "validation without images": (["trainer.evaluate_on=val"], "trainer.evaluate_on: expected test"),
    "a metric outside the allow-list": (["+metrics.mine=os.getcwd"], "metrics.mine: expected something in one of"),
    "syntax": (["trainer.epochs=[1"], "command line: expected group=NAME and key=VALUE; got"),
    "a list for a group": (["trainer=[1,2]"], "command line: expected group=NAME and key=VALUE; got"),
    "no images to replay": (
        ["method=derpp", "buffer=reservoir", "method.replay_size=0"],
        "method.replay_size: expected a number above 0; got 0",
    ),
    "dropout": (
        ["backbone=lvt_digits", "backbone.dropout=2"],
        r"backbone.dropout: expected a number in \[0, 1\); got 2",
    ),
    "key width": (["backbone=lvt_digits", "backbone.key_dim=-1"], "backbone.key_dim: expected a number above 0"),
    "no source": (["scenario.source=null"], "scenario.source: expected a node that builds ImageSet; got None"),
    "no logger under a name": (["logger.console=null"], "logger.console._target_: expected the dotted path"),
    "an unknown launcher": (["-m", "hydra/launcher=ray9"], "hydra/launcher: expected one of .*basic.*; got ray9"),
    "a choice under another name": (["choices.method=er"], "choices.method: expected finetune, .*; got er"),
    "no results folder": (["results_dir="], "results_dir: expected a folder; got nothing"),
    "a missing top-level key": (["~seed"], "seed: expected a value; got nothing"),
    "a kind instead of a class": (
        ["method._target_=cl_bench.methods.base.Method"],
        "method._target_: expected a class that can be built; got cl_bench.methods.base.Method",
    ),
    "the options and nothing else": (["trainer=fast"], "trainer: expected one of default; got fast. Choose one"),
    "infinite clipping": (["trainer.clip_norm=inf"], "trainer.clip_norm: expected a finite number; got inf"),
    "not a number": (["optimizer.lr=nan"], "optimizer.lr: expected a finite number; got nan"),
    "a number for a switch": (["scenario.flip=3"], "scenario.flip: expected true or false; got 3"),
    "padding beyond the image": (["scenario.crop_padding=9"], "scenario.crop_padding: expected at most .* 8 pixels"),
    "negative padding": (["scenario.crop_padding=-1"], "scenario.crop_padding: expected 0 or more pixels; got -1"),
    "a rate below zero": (
        ["schedule=cosine", "schedule.min_factor=-1"],
        "schedule.min_factor: expected a number in \\[0, 1\\]; got -1",
    ),
    "a milestone before the start": (
        ["schedule=multistep", "schedule.milestones=[-1]"],
        r"schedule.milestones: expected for each entry 0 or more; got \[-1\]",
    ),
    "text for a list": (["backbone.hidden=abc"], r"backbone.hidden: expected a value of type list\[int\]; got abc"),
    "an empty layer": (
        ["backbone.hidden=[0]"],
        r"backbone.hidden: expected for each entry a number above 0; got \[0\]",
    ),
    "no tasks": (["scenario.classes_per_task=[]"], "scenario.classes_per_task: expected positive numbers that add up"),
    "a huge number": (["seed=100000000000000000000000"], "seed: expected a whole number in"),
    "a huge number in a group": (
        ["backbone.hidden=[100000000000000000000000000]"],
        "backbone.hidden: expected whole numbers of 64 bits",
    ),
    "more than there is memory": (
        ["backbone.hidden=[1000000000000]"],
        "backbone: expected sizes that fit into this machine's memory",
    ),
    "more places than there is memory": (
        ["method=er", "buffer=reservoir", "buffer.capacity=1000000000000000"],
        "buffer: expected sizes that fit into this machine's memory",
    ),
    "layers without end": (
        ["backbone=vit", "backbone.patch_size=4", "backbone.depth=1000000000000"],
        "backbone.depth: expected 1 to 1000 layers; got 1000000000000",
    ),
    "a secret": (["data_dir=${oc.env:HOME}"], "data_dir: expected an environment variable whose name begins with"),
    "letters beyond ASCII": (["method=größer"], ""),
    "too many images": (
        ["scenario.train_per_class=99999"],
        "scenario.train_per_class: expected 1 to .* images per class",
    ),
    "nothing left to train on": (["scenario.val_fraction=0.9999"], "scenario.val_fraction: expected at least one"),
    "momentum": (["optimizer.momentum=1.5"], r"optimizer.momentum: expected a number in \[0, 1\); got 1.5"),
    "one beta": (["optimizer=adamw", "optimizer.betas=[0.9]"], "optimizer.betas: expected two numbers"),
    "a sweep over an unknown name": (["-m", "method=finetune,nope"], "method: expected one of .*; got nope"),
    "a group set to nothing": (["scenario=null"], "command line: expected group=NAME"),
    "a fraction of a replay": (
        ["method=er", "buffer=reservoir", "method.replay_size=1.5"],
        "method.replay_size: expected a value of type int; got 1.5",
    ),
    "strength": (["method=ewc", "method.strength=-1"], "method.strength: expected 0 or more; got -1"),
    "interpolation": (["data_dir=${nothing}", "scenario=cifar100"], "nothing"),
    "an unknown key with a plus": (["+sclae=mini"], "sclae: expected a key .* Did you mean \\+scale=mini?"),
    "a logger with a plus": (["+loger=wandb"], "loger: expected a key .* Did you mean logger=wandb?"),
    "a seed with a plus": (["+seeds=1"], "seeds: expected a key .* Did you mean seed=1?"),
    "two pluses": (
        ["++nothing=1"],
        "nothing: expected a key of the configuration; got the unknown key nothing. --cfg job",
    ),
    "a plus too many": (["+seed=1"], "seed: expected no plus .* Leave it out"),
    "a group with a plus": (["+method=er"], "method: expected no plus .* Write method=er"),
    "a key of another method": (
        ["method.strenght=1", "method=ewc"],
        "method.strenght: .* Did you mean method.strength=1?",
    ),
    "a key of the buffer": (["buffer.capacty=3"], "buffer.capacty: expected .* Did you mean buffer.capacity=3?"),
    "a key of the trainer": (["trainer.replica=5"], "trainer.replica: expected .* Did you mean trainer.replicas=5?"),
    "epochs alone": (["epochs=3"], "epochs: expected a key .* Did you mean trainer.epochs=3?"),
    "lr alone": (["lr=3"], "lr: expected a key .* Did you mean optimizer.lr=3?"),
    "batch_size alone": (["batch_size=8"], "batch_size: expected a key .* Did you mean trainer.batch_size=8?"),
    "a key of another group": (["trainer.lr=1"], "trainer.lr: expected .* Did you mean optimizer.lr=1?"),
    "a group misspelt": (["optimzer.lr=1"], "optimzer.lr: expected .* Did you mean optimizer.lr=1?"),
    "to take away what is not there": (["~epochs"], "epochs: expected a key .* Did you mean trainer.epochs?"),
    "a name alone": (["quickstart"], "command line: .* got quickstart. Did you mean \\+experiment=quickstart?"),
    "a label for an experiment": (["experiment=mine"], "experiment: .* got mine. .* label=mine marks a run as yours"),
    "a scale without a plus": (["scale=mini"], "scale: expected a plus .* Write \\+scale=mini"),
    "the home folder": (["data_dir=~/x"], "data_dir: .* got ~/x. No ~ .* write data_dir=[^~]*/x"),
    "an equals sign": (["name=a=b"], "name: expected a value that Hydra can read; got a=b. .* 'name=\"a=b\"'"),
    "an umlaut": (["name=größe"], "name: expected a value .* Quote it twice, .* 'name=\"größe\"'"),
    "a bracket": (["data_dir=/x (y)"], "data_dir: expected .* 'data_dir=\"/x .y.\"'"),
    "a sweep without -m": (["optimizer.lr=0.1,0.2"], "optimizer.lr: expected one value; got 0.1,0.2. Add -m "),
    "a sweep over nothing": (["-m", "lr=0.1,0.2"], "lr: expected a key .* Did you mean optimizer.lr=0.1,0.2?"),
    "an experiment misspelt": (["+experiment=quikstart"], "Did you mean \\+experiment=quickstart?"),
    "a scale misspelt": (["+scale=minni"], "scale: expected one of mini; got minni. Did you mean \\+scale=mini?"),
    "in capitals": (["+SCALE=mini"], "SCALE: expected a key .* Did you mean \\+scale=mini?"),
    "a key of another choice": (["method.strength=1"], "method.strength: .* method=ewc or ewc_pp has strength."),
    "a key of another choice misspelt": (["schedule.milstones=[3]"], "schedule=multistep has milestones."),
    "a key of no choice": (["method.nothing_like_it=3"], "method.nothing_like_it: .* --cfg job prints every key"),
    "a logger misspelt": (["+logger.wnadb.project=x"], "logger.wnadb: expected keys of a logger that is chosen"),
    "a key of Hydra's": (["+hydra.swep=x"], "hydra.swep: expected a key of Hydra's; .* Did you mean hydra.sweep?"),
    "a choice of nothing": (["+choices.foo=er"], "choices.foo: expected a group of the configuration; got foo"),
    "a key below nothing": (["+published.foo=1"], "published.foo: expected no key below one without a value"),
    "a comma in a path": (["data_dir=/x,y"], "data_dir: expected one value; .* 'data_dir=\"/x,y\"' is a value with"),
    "a range without -m": (["seed=range(0,3)"], "seed: expected one value; got range.0,3.. Add -m for a run with each"),
    "two equals signs": (["trainer.epochs==3"], "command line: .* Did you mean trainer.epochs=3?"),
    "an apostrophe": (["name=it's"], """name: expected a value .* 'name="it'"'"'s"'"""),
    "a sweep that is only printed": (["-m", "--cfg", "job"], "command line: .*Only one of --run, --multirun, --cfg"),
    "no threads": (["threads=0"], "threads: expected auto, or 1 to 1024; got 0"),
    "no number of threads": (["threads=few"], "threads: expected auto, or 1 to 1024; got few"),
    "a folder that is not there": (
        ["--config-dir", "/dev/null/nowhere"],
        "--config-dir: expected one that exists; got /dev/null/nowhere",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_gives_one_message(case, monkeypatch, tmp_path, capsys):
    arguments, message = WRONG[case]
    assert run_in_process(*arguments, monkeypatch=monkeypatch, cwd=tmp_path) == 2
    captured = capsys.readouterr()
    assert re.search(message.replace("?", r"\?"), captured.err), captured.err
    assert captured.err.startswith("cl_bench: ")
    assert captured.err.count("\n") == 1, captured.err
    assert captured.out == ""
    assert not list(tmp_path.rglob("summary.json"))


@pytest.mark.slow
def test_a_sweep_over_a_key_that_nothing_reads_is_refused(monkeypatch, tmp_path, capsys):
    assert run_in_process("-m", "+seeds=0,1", monkeypatch=monkeypatch, cwd=tmp_path) == 2
    error = capsys.readouterr().err
    for number in (0, 1):
        line = f"job {number} (+seeds={number}): seeds: expected a key of the configuration; got the unknown key seeds."
        assert f"{line} Did you mean seed={number}?" in error
    assert not list(tmp_path.rglob("summary.json"))


FILES_OF_ONES_OWN = {
    "an unknown key": ("trainer:\n  epochs: 3\n  epoch: 3\n", "trainer.epoch: .* Did you mean trainer.epochs?", 5),
    "an unknown key at the top": ("optimiser:\n  lr: 1\n", "optimiser: .* Did you mean optimizer?", 3),
    "a wrong type": ("trainer:\n  epochs: many\n", "trainer.epochs: expected a value of type int; got many", 4),
    "a wrong type at the top": ("seed: abc\n", "seed: expected a whole number; got abc", 3),
    "an unknown name": ("defaults:\n  - override /scenario: digit\n", "scenario: .* Did you mean scenario=digits?", 4),
    "an unknown group": ("defaults:\n  - override /scenaro: digits\n", "scenaro: .* Did you mean scenario?", 4),
    "a name in place of keys": (
        "method: ewc\n",
        "method: .* Choose in the list of defaults: - override /method: NAME",
        3,
    ),
    "a key that another part has": ("trainer:\n  lr: 3\n", "trainer.lr: expected one of the keys", 4),
    "no YAML": ("trainer:\n  epochs: 3\n epochs: 4\n", "mine.yaml, line 5: expected YAML", 5),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", FILES_OF_ONES_OWN)
def test_what_is_wrong_in_a_file_of_ones_own_is_said_with_file_and_line(case, monkeypatch, tmp_path, capsys):
    text, message, line = FILES_OF_ONES_OWN[case]
    file = tmp_path / "mine" / "experiment" / "mine.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(f"# @package _global_\n# A file of my own.\n{text}")
    outer = file.with_name("outer.yaml")
    outer.write_text("# @package _global_\ndefaults:\n  - mine\n  - _self_\n")
    for name in ("mine", "outer"):  # as it is, and below another one
        arguments = ["--config-dir", "mine", f"+experiment={name}"]
        assert run_in_process(*arguments, monkeypatch=monkeypatch, cwd=tmp_path) == 2
        error = capsys.readouterr().err
        assert re.search(message.replace("?", r"\?"), error), error
        assert f"{Path('mine/experiment/mine.yaml')}, line {line}" in error
        assert error.count("\n") == 1
    assert run_in_process(*arguments, "trainer.epochs=none", monkeypatch=monkeypatch, cwd=tmp_path) == 2
    if case == "a wrong type":  # typed, so it is not the file's
        assert "mine.yaml" not in capsys.readouterr().err


@pytest.mark.slow
def test_a_file_of_ones_own_without_its_first_line_is_told_of_it(monkeypatch, tmp_path, capsys):
    file = tmp_path / "mine" / "experiment" / "mine.yaml"
    file.parent.mkdir(parents=True)
    for text in ("trainer:\n  epochs: 3\n", "seed: 3\n", "defaults:\n  - override /method: ewc\n"):
        file.write_text(text)
        assert run_in_process("--config-dir", "mine", "+experiment=mine", monkeypatch=monkeypatch, cwd=tmp_path) == 2, (
            text
        )
        error = capsys.readouterr().err
        assert "experiment/mine.yaml: expected # @package _global_ at its top" in error, text
        assert error.count("\n") == 1


def test_what_another_key_gives_a_file_is_not_laid_at_its_door(monkeypatch, tmp_path, capsys):
    arguments = ["scenario=folder", "data_dir=nowhere", "scenario.source.size=8", "device=cpu"]
    assert run_in_process(*arguments, monkeypatch=monkeypatch, cwd=tmp_path) == 2
    error = capsys.readouterr().err
    assert error.startswith("cl_bench: scenario.source.root: expected a folder nowhere/train")
    assert "It is in" not in error


@pytest.mark.slow
def test_a_quoted_value_is_taken_as_it_was_meant(monkeypatch, tmp_path):
    """What the messages tell to type, without the shell's quotes."""
    for value in ("a=b", "größe", "mein ~ Lauf (1), zweite {Fassung}", 'with "quotes" and \\'):
        shown = explain_value(f"label={value}")
        arguments = [*TINY, shown, "dry_run=true"]
        assert configure(shown).label == value, shown
    assert run_in_process(*arguments, monkeypatch=monkeypatch, cwd=tmp_path) == 0


def explain_value(override: str) -> str:
    from hydra.errors import OverrideParseException

    from cl_bench.config.explain import explain

    return explain(OverrideParseException(override, "")).rpartition(": ")[2].strip("'")


@pytest.mark.slow
def test_a_run_has_a_label(monkeypatch, tmp_path, capsys):
    """One's own, or what was typed that makes it another run; neither is part of what it is."""
    labels, folders = [], set()
    for more in ([], ["label=a text of mine"], ["buffer.capacity=20", "seed=3", "label=null"]):
        base = ["method=er", "buffer=reservoir", "dry_run=true"]
        assert run_in_process(*TINY, *base, *more, monkeypatch=monkeypatch, cwd=tmp_path) == 0
        summary = json.loads(capsys.readouterr().out.splitlines()[-1])
        labels.append(summary["label"])
        folders.add(summary["fingerprint"])
    typed = " ".join(argument for argument in TINY if not argument.startswith("device"))
    assert labels == [
        f"{typed} method=er buffer=reservoir",
        "a text of mine",
        f"{typed} method=er buffer=reservoir buffer.capacity=20",
    ]
    assert len(folders) == 2
    assert run_in_process("dry_run=true", monkeypatch=monkeypatch, cwd=tmp_path) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["label"] is None


def test_a_logger_gets_what_was_typed_with_short_keys(monkeypatch):
    typed = ["method=er", "buffer.capacity=20", "optimizer.lr=0.1", "+scale=mini", "seed=3"]
    monkeypatch.setattr(run_module, "list_typed_overrides", lambda: typed)
    label = " ".join(run_module._list_changes())
    assert shorten_label(label) == "capacity=20, lr=0.1"
    assert [shorten_label(text) for text in ("a text of mine", None)] == ["a text of mine", ""]


@pytest.mark.slow
def test_threads_are_set_for_a_run_and_noted(monkeypatch, tmp_path):
    """For this run only; a run with another number is the same run."""
    before = torch.get_num_threads()
    for number in ("2", "auto"):
        arguments = [*TINY, "logger=none", f"threads={number}", f"results_dir=r{number}"]
        assert run_in_process(*arguments, monkeypatch=monkeypatch, cwd=tmp_path) == 0
        assert torch.get_num_threads() == before
    runs = [find_run(tmp_path / name) for name in ("r2", "rauto")]
    assert [json.loads((run / "env.json").read_text())["threads"] for run in runs] == [2, before]
    assert runs[0].relative_to(tmp_path / "r2") == runs[1].relative_to(tmp_path / "rauto")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="GNU's OpenMP")
@pytest.mark.parametrize(("given", "policy"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")])
def test_threads_that_wait_sleep_unless_told_otherwise(given, policy, tmp_path):
    """As OpenMP says itself when torch loads it."""
    done = command("threads=0", cwd=tmp_path, OMP_DISPLAY_ENV="TRUE", **given)
    assert re.search(rf"OMP_WAIT_POLICY *= *'{policy}'", done.stderr), done.stderr


def test_damaged_data_is_named(monkeypatch, tmp_path, capsys):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name in ("train", "test", "meta"):
        (folder / name).write_bytes(b"damaged")
    assert run_in_process("scenario=cifar100", f"data_dir={tmp_path}", monkeypatch=monkeypatch, cwd=tmp_path) == 2
    error = capsys.readouterr().err
    assert error.startswith("cl_bench: data_dir: expected the official CIFAR-100 file")
    assert error.count("\n") == 1


@pytest.mark.slow
def test_tracebacks_on_demand(tmp_path):
    done = command("device=gpu", cwd=tmp_path, HYDRA_FULL_ERROR="1")
    assert done.returncode == 2
    assert "Traceback" in done.stderr
