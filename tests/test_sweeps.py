"""Sweeps on every launcher give the runs that are made one by one, also if jobs are lost; and a search goes on.

Ray, submitit and Optuna are optional: their tests are skipped without the extra ``sweep``.
"""

import csv
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import TINY, assert_equal_results, command, command_environment, run_in_process
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from cl_bench.config.explain import choose_exit_status, explain
from cl_bench.core.errors import ConfigError
from cl_bench.report.folders import LeftOut, scan
from cl_bench.runs import run as run_module
from cl_bench.runs.ray_jobs import refuse_unmet_needs, start_ray
from cl_bench.runs.search import read_space, search
from cl_bench.runs.sweep import Job, JobFailed, Sweep, check_searched_values, format_table

SMALL = [*TINY, "backbone.hidden=[4]", "logger=none", "report=false"]
LONG = [*SMALL, "trainer.epochs=400", "trainer.checkpoint_steps=20"]
SEARCH = ["-m", *SMALL, "trainer.epochs=1", "scenario.val_fraction=0.2", "trainer.evaluate_on=val"]
SEARCH += ["optimizer.lr=interval(0.003,0.3)", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=4"]


@pytest.fixture
def run(monkeypatch, tmp_path, capfd):
    """The command in this process -> exit status, stdout, stderr."""

    def call(*arguments: str) -> tuple[int, str, str]:
        status = run_in_process(*arguments, monkeypatch=monkeypatch, cwd=tmp_path)
        return status, *capfd.readouterr()

    return call


def assert_equal_sweeps(one: Path, other: Path, count: int) -> None:
    """Both folders have the same finished runs, bit by bit."""
    (ours, left), (theirs, _) = scan(one), scan(other)
    assert (len(ours), left) == (count, [])
    assert [run.relative_to(one) for run in ours] == [run.relative_to(other) for run in theirs]
    for mine, its in zip(ours, theirs):
        assert_equal_results(mine, its)


@pytest.mark.slow
def test_two_jobs_of_joblib_are_equal_to_runs_one_by_one(run, tmp_path):
    sweep = ["-m", *SMALL, "trainer.epochs=1", "seed=0,1,2"]
    status, said, error = run(*sweep, "results_dir=alone")
    assert status == 0, error
    status, said, error = run(*sweep, "results_dir=joblib", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    assert status == 0, error
    assert_equal_sweeps(tmp_path / "joblib", tmp_path / "alone", 3)
    for seed in range(3):
        assert f"seed {seed} (seed={seed})" in said
    assert "Sweep: 3 finished\n" in said
    status, said, error = run(*sweep[:-1], "seed=2,3", "results_dir=alone")  # finished runs are skipped
    assert "Sweep: 1 finished, 1 finished before\n" in said


def test_the_table_of_a_sweep_says_what_became_of_each_job():
    jobs = [
        Job(0, "seed=0", "finished", ("r/e/a-1/seed0",)),
        Job(1, "seed=1", "skipped", ("r/e/a-1/seed1",)),
        Job(10, "lr=1e9", "failed", ("r/e/a-2/seed0",), "not finite", 1),
        Job(11, "seed=3", "started", ("r/e/b-3/seed3",)),
    ]
    assert format_table(jobs).splitlines() == [
        "Sweep: 1 finished, 1 finished before, 1 failed, 1 lost",
        "    0  seed=0  finished, r/e/a-1/seed0",
        "    1  seed=1  finished before, r/e/a-1/seed1",
        "   10  lr=1e9  failed: not finite",
        "   11  seed=3  lost: its process ended without a word, r/e/b-3/seed3",
        "Compare: cl_bench compare r/e/a-1",
    ]
    many = [Job(n, f"lr={n}", "finished", (f"r/e/a-{n}/seed0",)) for n in range(7)]
    assert format_table(many).splitlines()[-1] == "Compare: cl_bench compare r/e"


@pytest.mark.slow
def test_a_run_does_not_import_the_compiler_and_can_leave_the_report_out(tmp_path):
    """What a run costs besides training: torch's compiler takes 4 s of CPU, the report 4 s."""
    code = "import sys; from cl_bench.__main__ import main; main(); "
    code += "print('loaded', [n for n in ('torch._dynamo', 'matplotlib', 'pandas') if n in sys.modules])"
    call = [sys.executable, "-c", code, *SMALL, "trainer.epochs=1"]
    done = subprocess.run(call, cwd=tmp_path, env=command_environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "loaded []" in done.stdout
    ((folder,), _) = scan(tmp_path / "results")
    assert f"no report; cl_bench report {folder.relative_to(tmp_path)} makes it" in done.stdout
    assert not (folder / "report.html").exists()


def test_reports_are_made_later(run, tmp_path, monkeypatch):
    assert run(*SMALL, "trainer.epochs=1")[0] == 0
    ((folder,), _) = scan(tmp_path / "results")
    assert run("report", "results") == (0, f"{folder.relative_to(tmp_path)}/report.html\n", "")
    assert (folder / "plots").is_dir()
    assert "has a report" in run("report", "results")[2]
    status, _, error = run("report", "nowhere")
    assert (status, error.count("\n")) == (2, 1)
    again = run(*SMALL, "trainer.epochs=1", "report=true")
    assert "Already finished" in again[2]


@pytest.mark.parametrize(
    "space",
    ["interval(1,0.1)", "tag(log,interval(0,1))", "glob(*)", "range(3,3)"],
)
def test_a_space_without_values_is_refused(space):
    (override,) = OverridesParser.create().parse_overrides([f"optimizer.lr={space}"])
    with pytest.raises(ConfigError, match=rf"optimizer.lr: expected interval\(LOW,HIGH\).* got {re.escape(space)}\."):
        check_searched_values(override)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n_trials": "abc"}, "n_trials: expected a whole number of 1 or more; got abc"),
        ({"n_trials": 2.5}, "n_trials: expected .* got 2.5"),
        ({"n_jobs": 0}, "n_jobs: expected a whole number of 1 or more; got 0"),
        ({"sampler": {"kind": "tpe", "seed": -1}}, "sampler.seed: expected a whole number of 0 or more; got -1"),
        ({"direction": "minimize"}, "direction: expected maximize"),
    ],
)
def test_wrong_settings_of_a_search_are_refused(wrong, message, tmp_path):
    with pytest.raises(ConfigError, match=rf"^hydra\.sweeper\.{message}"):
        search_for("optimizer.lr=interval(0.1,1)", tmp_path, **wrong)


def test_only_a_job_on_the_machine_of_the_command_has_a_temporary_folder(tmp_path, monkeypatch):
    """Nobody would look into it there, or remove it."""
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    seen = []
    try:
        for machine in (socket.gethostname(), "another"):
            sweep = Sweep([], folder=tmp_path / f"cl_bench-{machine}", pid=0, machine=machine)
            sweep.perform(lambda config: seen.append(find_jobs(tmp_path)), OmegaConf.create({}))
        nowhere = Sweep([], folder=tmp_path / "not there" / "cl_bench-0", pid=0)  # a job may not see the command's
        assert nowhere.perform(lambda config: 7, OmegaConf.create({})) == 7
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert seen == [[os.getpid()], []]
    assert [folder.name for folder in tmp_path.iterdir()] == [f"cl_bench-{socket.gethostname()}"]


def test_a_run_that_needs_more_than_there_is_does_not_wait_for_ever():
    there = {"CPU": 2.0, "memory": 1e9}
    refuse_unmet_needs({"cpus_per_task": 2, "gpus_per_task": 0}, there)
    for needs in ({"cpus_per_task": 3, "gpus_per_task": 0}, {"cpus_per_task": 1, "gpus_per_task": 0.5}):
        with pytest.raises(ConfigError, match=r"hydra\.launcher\.[cg]pus_per_task: expected at most the [02] [CG]PUs"):
            refuse_unmet_needs(needs, there)


def test_a_ray_cluster_that_is_not_there_gives_one_message(monkeypatch):
    def init(**arguments):
        raise ConnectionError("Could not find any running\nRay instance.")

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(init=init))
    monkeypatch.setenv("RAY_DEDUP_LOGS", "0")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    message = r"hydra\.launcher\.address: expected a Ray cluster that answers, .* got auto\. .*any running Ray"
    with pytest.raises(ConfigError, match=message), start_ray({"address": "auto", "deduplicate_logs": False}):
        pass


@pytest.mark.slow
def test_a_launcher_without_its_package_gives_one_message(run, monkeypatch):
    for package in ("ray", "submitit", "optuna"):
        monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    for choice in ("launcher=ray", "sweeper=optuna"):
        arguments = ["trainer.evaluate_on=val", "scenario.val_fraction=0.2", f"hydra/{choice}"]
        status, said, error = run("-m", *SMALL, *arguments, "optimizer.lr=choice(0.1,0.2)")
        group, _, name = choice.partition("=")
        assert (status, said) == (2, ""), error
        expected = f"cl_bench: hydra/{group}: expected a {group} whose package is installed; got {name}, which is not"
        assert expected in error
    hydra_error = RuntimeError("Unknown plugin class : 'hydra_plugins.hydra_submitit_launcher.submitit_launcher.Local'")
    assert choose_exit_status(hydra_error) == 2
    assert explain(hydra_error).startswith(
        "hydra/launcher: expected a launcher whose package is installed; got submitit"
    )
    assert choose_exit_status(RuntimeError("another")) is None


# -- Ray -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_six_runs_on_ray_are_equal_to_runs_one_by_one(run, tmp_path):
    pytest.importorskip("ray")
    sweep = ["-m", *SMALL, "trainer.epochs=1", "seed=0,1,2,3,4,5"]
    assert run(*sweep, "results_dir=alone")[0] == 0
    done = command(*sweep, "results_dir=ray", "hydra/launcher=ray", "hydra.launcher.cpus=2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Sweep: 6 finished\n" in done.stdout
    for seed in range(6):
        assert f"seed {seed} (seed={seed})" in done.stdout
    assert_equal_sweeps(tmp_path / "ray", tmp_path / "alone", 6)


@pytest.mark.slow
def test_a_sweep_on_ray_survives_the_loss_of_a_machine(run, tmp_path, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    for name, value in command_environment().items():
        monkeypatch.setenv(name, value)
    from ray.cluster_utils import Cluster

    sweep = ["-m", *LONG, "seed=0,1,2"]
    assert run(*sweep, "results_dir=alone")[0] == 0
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        machine = cluster.add_node(num_cpus=1)
        call = [sys.executable, "-m", "cl_bench", *sweep, "results_dir=ray", "hydra/launcher=ray"]
        call += [f"hydra.launcher.address={cluster.address}"]
        with subprocess.Popen(
            call, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as command:
            wait_until(lambda: count_running(tmp_path / "ray") == 2, command)
            cluster.remove_node(machine, allow_graceful=False)
            wait_until(lambda: count_running(tmp_path / "ray") < 2, command)
            said, _ = command.communicate(timeout=500)
        assert command.returncode == 0, said
        assert "Sweep: 3 finished\n" in said
        assert_equal_sweeps(tmp_path / "ray", tmp_path / "alone", 3)
    finally:
        cluster.shutdown()


def find_jobs(folder: Path) -> list[int]:
    """The processes of the jobs of a sweep that has its temporary folder in ``folder``."""
    return [int(file.suffix[1:]) for file in folder.glob("cl_bench-*/job.*")]


def count_running(folder: Path) -> int:
    """Runs that have a checkpoint and a process."""
    _, begun = scan(folder)
    return sum((run / "checkpoint" / "last.pt").exists() and LeftOut.of(run).state == "running" for run in begun)


def wait_until(condition, process: subprocess.Popen, seconds: float = 400) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


# -- submitit ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_job_of_submitit_stops_with_a_checkpoint_and_goes_on_when_it_is_requeued(run, tmp_path):
    """The signal is the one that SLURM sends near a job's time limit."""
    pytest.importorskip("submitit")
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    sweep = ["-m", *LONG, "seed=0,-1"]
    assert run(*sweep, "results_dir=alone")[0] == 2
    call = [sys.executable, "-m", "cl_bench", *sweep, "results_dir=submitit", "hydra/launcher=submitit_local"]
    environment = command_environment(TMPDIR=str(tmp_path))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(call, cwd=tmp_path, env=environment, text=True, **pipes) as command:
        wait_until(lambda: count_running(tmp_path / "submitit") == 1 and len(find_jobs(tmp_path)) == 1, command)
        os.kill(find_jobs(tmp_path)[0], signal.SIGUSR2)
        said, error = command.communicate(timeout=500)
    assert command.returncode == 2, error
    assert "Sweep: 1 finished, 1 failed\n" in said
    assert error.count("cl_bench: job 1 (seed=-1): seed: expected") == 1  # it came from the job's log to the terminal
    logs = "".join(file.read_text() for file in tmp_path.glob("submitit/sweeps/*/.submitit/*/*_log.*"))
    assert logs.count("Requeued job") == 1
    assert "[seed=0] Stopped; the same command goes on from here" in logs
    assert_equal_sweeps(tmp_path / "submitit", tmp_path / "alone", 1)


# -- Optuna --------------------------------------------------------------------------------------------------------


class Outcome:
    """What a launcher gives for a job: its value, or an error when that is read."""

    def __init__(self, value):
        self.value = value

    @property
    def return_value(self):
        if isinstance(self.value, Exception):
            raise self.value
        return self.value


def search_for(space: str, folder: Path, *fixed: str, values: tuple = (), **settings) -> list[list[str]]:
    """Search without runs, which would give these values; returns the overrides of the runs."""
    defaults = {"direction": "maximize", "n_trials": len(values) or 1, "n_jobs": 1, "params": None, "storage": None}
    defaults |= {"sampler": {"kind": "random", "seed": 0}, "study_name": None, "folder": str(folder)}
    chosen = OmegaConf.create(defaults | settings)
    config = {"experiment": "e", "dry_run": False, "trainer": {"evaluate_on": "val"}, "hydra": {"sweeper": chosen}}
    config |= {"scenario": {"_target_": "cl_bench.scenarios.split.Split"}, "allow_packages": []}
    waiting, launched = iter(values), []

    def launch(jobs, initial_job_idx):
        launched.extend(jobs)
        return [Outcome(next(waiting)) for _ in jobs]

    search(OmegaConf.create(config), dict(chosen), SimpleNamespace(launch=launch), [space, *fixed])
    return launched


def test_a_search_is_the_same_one_if_only_keys_differ_that_change_no_result(tmp_path, capsys):
    pytest.importorskip("optuna")
    space = "optimizer.lr=interval(0.1,1)"
    assert len(search_for(space, tmp_path, "method=er", values=(1.0, 2.0))) == 2
    assert search_for(space, tmp_path, "method=er", "trainer.checkpoint_steps=5", n_trials=2) == []
    assert len(search_for(space, tmp_path, "method=ewc", values=(1.0,))) == 1


def test_what_optuna_cannot_do_gives_one_message(tmp_path, capsys):
    pytest.importorskip("optuna")
    with pytest.raises(ConfigError, match="method: expected one that answers without the task"):
        search_for("optimizer.lr=interval(0.1,1)", tmp_path, values=(None,))
    with pytest.raises(ConfigError, match=r"hydra\.sweeper\.storage: expected a database .* got foo\."):
        search_for("optimizer.lr=interval(0.1,1)", tmp_path, storage="foo")
    search_for("optimizer.lr=0.1,0.2", tmp_path, values=(1.0,), study_name="mine")
    with pytest.raises(ConfigError, match=r"hydra\.sweeper\.study_name: expected .* of the same values; got mine\."):
        search_for("optimizer.lr=0.1,0.3", tmp_path, study_name="mine", n_trials=2)


def test_a_trial_with_a_wrong_configuration_is_tried_again_and_one_that_diverged_is_not(tmp_path, capsys):
    """It takes none of ``n_trials``, unless its values are no longer searched."""
    pytest.importorskip("optuna")
    options = {"n_trials": 3, "study_name": "mine"}
    with pytest.raises(JobFailed):
        search_for("optimizer.lr=interval(0.1,1)", tmp_path, values=(1.0, JobFailed("no data", 2)), **options)
    first = search_for("optimizer.lr=interval(0.1,1)", tmp_path, values=(2.0, JobFailed("nan", 1)), **options)
    assert len(first) == 2
    assert search_for("optimizer.lr=interval(0.1,1)", tmp_path, **options) == []

    options = {"n_trials": 2, "study_name": "narrower"}
    with pytest.raises(JobFailed):
        search_for("optimizer.lr=interval(-2,-1)", tmp_path, values=(JobFailed("lr", 2),), **options)
    ((lr,),) = search_for("optimizer.lr=interval(1,2)", tmp_path, values=(1.0,), **options)
    assert 1 <= float(lr.removeprefix("optimizer.lr=")) <= 2


def read_trials(folder: Path) -> list[dict[str, str]]:
    (file,) = folder.glob("searches/*/trials.csv")
    with file.open() as lines:
        return list(csv.DictReader(lines))


def test_what_is_searched_and_what_is_fixed():
    optuna = pytest.importorskip("optuna")
    kinds = optuna.distributions
    file = ["a.choice=choice(1,x,true)", "a.fixed=choice(1,2)"]
    typed = ["+experiment=quickstart", "a.log=tag(log,interval(0.001,1))", "a.whole=int(interval(1,8))"]
    typed += ["a.range=range(1,10,4)", "a.steps=range(0.0,1.0,0.25)", "a.list=3,1", "a.fixed=5", "a.words=[1,2]"]
    space, fixed = read_space(optuna, file, typed)
    assert space == {
        "a.choice": kinds.CategoricalDistribution([1, "x", True]),
        "a.log": kinds.FloatDistribution(0.001, 1, log=True),
        "a.whole": kinds.IntDistribution(1, 8),
        "a.range": kinds.IntDistribution(1, 9, step=4),
        "a.steps": kinds.FloatDistribution(0.0, 0.75, step=0.25),
        "a.list": kinds.CategoricalDistribution([3, 1]),
    }
    assert fixed == ["+experiment=quickstart", "a.fixed=5", "a.words=[1,2]"]


@pytest.mark.slow
def test_a_search_goes_on_after_an_interruption_and_ends_the_same(run, tmp_path, monkeypatch):
    pytest.importorskip("optuna")
    assert run(*SEARCH, "results_dir=straight")[0] == 0
    trials = read_trials(tmp_path / "straight")
    assert [(trial["number"], trial["state"]) for trial in trials] == [(str(n), "complete") for n in range(4)]
    assert len({trial["optimizer.lr"] for trial in trials}) == 4
    calls = []

    def begin(*arguments):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return whole(*arguments)

    whole = run_module.begin_summary
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "begin_summary", begin)
        status, said, error = run(*SEARCH, "results_dir=stopped")
    assert status == 143, error
    assert [trial["state"] for trial in read_trials(tmp_path / "stopped")] == ["complete", "complete", "running"]
    assert "Sweep: 2 finished, 1 stopped\n" in said
    status, said, error = run(*SEARCH, "results_dir=stopped")
    assert status == 0, error
    assert read_trials(tmp_path / "stopped") == trials
    assert "Sweep: 2 finished\n" in said
    best = max(trials, key=lambda trial: float(trial["value"]))
    assert f"Best of 4 trials: {float(best['value']):.2f} with optimizer.lr={best['optimizer.lr']}\n" in said
    (picture,) = tmp_path.glob("stopped/searches/*/trials.png")
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_search_is_refused_on_test_images_and_stops_at_a_wrong_configuration(run, tmp_path):
    pytest.importorskip("optuna")
    status, _, error = run(*SEARCH, "trainer.evaluate_on=test")
    assert (status, "trainer.evaluate_on: expected val in a search" in error) == (2, True)
    assert not list(tmp_path.glob("results/searches/*"))
    status, said, error = run(*SEARCH, "optimizer.momentum=7")
    assert (status, error.count("optimizer.momentum: expected")) == (2, 1)
    assert "Sweep: 1 failed\n" in said
