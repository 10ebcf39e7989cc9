"""``cl_bench.run`` and ``cl_bench.load``: a run in three lines of a notebook, and its trained model."""

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TINY

import cl_bench
from cl_bench.core.errors import ConfigError
from cl_bench.core.types import Data

RUN = [*TINY, "logger=none", "backbone=mlp", "backbone.hidden=[16]"]
METHODS = {
    "er": ["method=er", "buffer=reservoir", "buffer.capacity=20"],
    "icarl": ["method=icarl", "buffer=herding", "buffer.capacity=20"],
    "supsup": ["method=supsup", "backbone.hidden=[64]", "method.mask=threshold", "method.outputs=50", "optimizer=adam"],
}


@pytest.fixture
def notebook(tmp_path, monkeypatch):
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of fine-tuning."""
    folder = tmp_path_factory.mktemp("finished")
    return cl_bench.run([*RUN, "method=finetune", "buffer=none", f"results_dir={folder}"])


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_run_is_made_and_its_model_answers_as_it_did_when_it_was_measured(method, notebook):
    run = cl_bench.run([*RUN, *METHODS[method]])
    assert run.run_dir.is_relative_to("results")
    assert run.summary["status"] == "finished"
    stored = run.predictions
    test = Data.concatenate(task.test for task in run.scenario.tasks)
    place = {index: row for row, index in enumerate(stored["index"].tolist())}
    rows = [place[index] for index in test.index.tolist()]
    for task in run.scenario.tasks:
        own = [place[index] for index in task.test.index.tolist()]
        np.testing.assert_array_equal(run.predict(task.test.images, task=task.id), stored["task_il"][own])
        if run.method.test_batches == "single_task":
            np.testing.assert_array_equal(run.predict(task.test.images), stored["class_il"][own])
    if run.method.test_batches != "single_task":
        np.testing.assert_array_equal(run.predict(test.images.numpy()), stored["class_il"][rows])
    with (run.run_dir / "accuracy_matrix.csv").open() as file:
        lines = [line for line in csv.DictReader(file) if (line["setting"], line["after_task"]) == ("class_il", "1")]
    last = [float(line["accuracy"]) for line in lines]
    np.testing.assert_allclose(run.record.get_matrix("class_il").accuracy[-1], last, atol=1e-3)
    assert run.record.cost.parameters == run.summary["cost"]["parameters"]


@pytest.mark.slow
def test_a_finished_run_is_loaded_and_not_made_again(finished):
    results = finished.run_dir.parents[2]
    written = (finished.run_dir / "checkpoint" / "last.pt").stat().st_mtime_ns
    again = cl_bench.run([*RUN, "method=finetune", "buffer=none", f"results_dir={results}"])
    assert again.run_dir == finished.run_dir
    assert (finished.run_dir / "checkpoint" / "last.pt").stat().st_mtime_ns == written
    for name, tensor in again.method.state_dict().items():
        assert torch.equal(tensor, finished.method.state_dict()[name])


@pytest.mark.slow
def test_a_run_is_loaded_from_any_working_directory_and_place(finished, notebook):
    shutil.copytree(finished.run_dir, "copy")
    images = finished.scenario.tasks[0].test.images
    np.testing.assert_array_equal(cl_bench.load("copy").predict(images), finished.predict(images))


def test_nothing_is_asked_and_nothing_answered(finished):
    assert finished.predict(np.empty((0, 1, 8, 8), np.uint8)).shape == (0,)


@pytest.mark.slow
def test_a_method_that_needs_the_task_says_so_by_minus_one(notebook):
    run = cl_bench.run(
        [*TINY, "logger=none", "backbone=apd_digits", "scenario.val_fraction=0.2", "method.consolidate_every=2"]
        + ["method.clusters=1"]
    )
    images = run.scenario.tasks[1].test.images
    assert set(run.predict(images)) == {-1}
    assert set(run.predict(images, task=1)) <= set(run.scenario.list_class_ids(run.scenario.tasks[1]))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer.lrr=1"], r"optimizer\.lrr: expected .*; got .*optimizer\.lr\b"),
        (["method=nothing"], r"method: expected .*; got .*nothing"),
        (["+sclae=mini"], r"sclae: expected .*; got .*scale"),
        (["seed=many"], r"seed: expected .*; got"),
        (["seed=="], r"expected .*; got seed=="),
        (["optimizer.lr=-1"], r"optimizer\.lr: expected .*; got -1"),
        (["optimizer.lr=0.1,0.2"], r"optimizer\.lr: expected one value; got"),
        (["dry_run=true"], r"dry_run: expected false"),
    ],
)
def test_what_is_wrong_is_one_configuration_error(overrides, message, notebook):
    with pytest.raises(ConfigError, match=message) as caught:
        cl_bench.run([*RUN, *overrides])
    assert str(caught.value).count("expected") >= 1
    assert caught.value.key
    assert caught.value.fix
    assert not list(notebook.iterdir())


def test_what_is_no_finished_run_is_refused(notebook, finished):
    with pytest.raises(ConfigError, match=r"run_dir: expected the folder of a finished run.*; got nowhere"):
        cl_bench.load("nowhere")
    shutil.copytree(finished.run_dir, "begun")
    (notebook / "begun" / "summary.json").unlink()
    with pytest.raises(ConfigError, match="got begun"):
        cl_bench.load("begun")


@pytest.mark.parametrize(
    ("images", "got"),
    [
        (np.zeros((2, 8, 8), np.uint8), r"uint8 of shape \(2, 8, 8\)"),
        (np.zeros((2, 1, 8, 8), np.float32), r"float32 of shape \(2, 1, 8, 8\)"),
        (np.zeros((2, 3, 8, 8), np.uint8), r"uint8 of shape \(2, 3, 8, 8\)"),
    ],
)
def test_images_of_another_shape_or_type_are_refused(finished, images, got):
    with pytest.raises(ConfigError, match=rf"images: expected uint8 of shape \(N, 1, 8, 8\); got {got}"):
        finished.predict(images)


@pytest.mark.parametrize("task", [-1, 2])
def test_a_task_that_there_is_not_is_refused(finished, task):
    with pytest.raises(ConfigError, match=rf"task: expected 0 to 1, or None if it is not known; got {task}"):
        finished.predict(np.zeros((1, 1, 8, 8), np.uint8), task=task)


@pytest.mark.slow
def test_yaml_files_of_ones_own_are_found(notebook):
    (notebook / "own" / "experiment").mkdir(parents=True)
    (notebook / "own" / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /method: finetune\n  - override /buffer: none\nexperiment: mine\n"
    )
    run = cl_bench.run([*RUN, "+experiment=mine"], config_dir="own")
    assert run.summary["experiment"] == "mine"
    assert run.summary["method"] == "finetune"


def test_a_stop_is_a_keyboard_interrupt(notebook, monkeypatch):
    monkeypatch.setattr("cl_bench.runs.load.run_all", lambda config: (_ for _ in ()).throw(SystemExit(130)))
    with pytest.raises(KeyboardInterrupt, match="SIGINT"):
        cl_bench.run([*RUN, "method=finetune", "buffer=none"])


@pytest.mark.parametrize("old", ["data", "."])
def test_images_that_were_moved_are_found_and_no_other_value_changes(old):
    from omegaconf import OmegaConf

    from cl_bench.runs.load import _move_data

    source = {"_target_": "cl_bench.data.folder.folder", "root": old, "cache": f"{old}/decoded"}
    config = OmegaConf.create({"data_dir": old, "scenario": {"source": source}, "backbone": {"act": "relu"}})
    _move_data(config, Path("/mnt"))
    moved = source | {"root": "/mnt", "cache": "/mnt/decoded"}
    assert config == {"data_dir": "/mnt", "scenario": {"source": moved}, "backbone": {"act": "relu"}}
