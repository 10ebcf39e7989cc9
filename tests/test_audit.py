"""The leak audit passes honest runs and catches a method that cheats in each of the ways it is there for."""

import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import TINY, command, configure, load_script

from cl_bench.config.build import Parts, build
from cl_bench.core.types import Data, Phase
from cl_bench.engine.checkpoint import Checkpoint, clone_state
from cl_bench.loggers.group import Loggers
from cl_bench.methods.er import ER
from cl_bench.runs import run_dir as files
from cl_bench.runs.audit import audit, check_contents, check_rehearsal

RUN = [*TINY, "scenario.test_per_class=20", "backbone=mlp", "backbone.hidden=[16]", "method=er", "method.replay_size=8"]
RUN += ["buffer=reservoir", "buffer.capacity=20"]


class Honest(ER):
    """What the cheats are made of."""

    def __init__(self, parts: Parts) -> None:
        keys = {"loss": "joint", "loss_classes": "all", "replay_current_task": True, "scenario": parts.scenario}
        super().__init__(net=parts.method.net, buffer=parts.buffer, replay_size=8, **keys)
        self.scenario = parts.scenario


class AnswersByBatch(Honest):
    """Takes the commonest answer of a batch for all its images."""

    def predict(self, x, task_id):
        scores = self.net(x)
        return scores + 100 * scores.mean(dim=0)


class LooksLabelsUp(Honest):
    """Finds each test image in the scenario and answers with its label."""

    def predict(self, x, task_id):
        everything = Data.concatenate(task.test for task in self.scenario.tasks)
        known = self.scenario.transform.normalise(everything.images).flatten(1)
        return torch.nn.functional.one_hot(
            everything.labels[torch.cdist(x.flatten(1), known).argmin(dim=1)], 10
        ).float()


class TrainsOnTestImages(Honest):
    """Adds the test images to its phase."""

    def learn(self, task):
        data = Data.concatenate([task.test, task.train])
        yield Phase(data, self.observe, self.net.parameters())
        self.buffer.close_task(task, self.describe)


class PeeksAtTestImages(Honest):
    """Adds a test batch to every step."""

    def observe(self, batch):
        test = self.scenario.tasks[batch.task].test
        loss = torch.nn.functional.cross_entropy(self.net(self.scenario.transform.normalise(test.images)), test.labels)
        return super().observe(batch) | {"peek": loss}


class KeepsImagesAside(Honest):
    """Stores a task's images outside the buffer."""

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        self.register_buffer("statistics", torch.zeros(5, *parts.scenario.image_shape))

    def learn(self, task):
        yield from super().learn(task)
        self.statistics.copy_(self.scenario.transform.normalise(task.train.images[:5]))


class KeepsImagesAsideInDisguise(KeepsImagesAside):
    """The same as one long row of numbers from 0 to 1."""

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        self.register_buffer("statistics", torch.zeros(5 * 64))

    def learn(self, task):
        yield from ER.learn(self, task)
        self.statistics.copy_(task.train.images[:5].flatten() / 255)


class KeepsImagesInColumns(Honest):
    """Stores more images beside the ones it may keep."""

    def learn(self, task):
        yield from super().learn(task)
        self.buffer.columns["notes"] = task.train.images[:20].flatten(1).float()


class TrainsOnValidationImages(Honest):
    """Adds the images that are held out to its phase, and remembers some."""

    def learn(self, task):
        yield Phase(Data.concatenate([task.val, task.train]), self.observe, self.net.parameters())
        self.buffer.close_task(task, self.describe)
        self.buffer.images[:3] = task.val.images[:3]


class ChoosesOnTheImagesItIsMeasuredOn(Honest):
    """Keeps its weights only where they do well on the images that are asked about later."""

    def learn(self, task):
        yield from super().learn(task)
        asked = task.get_split("val")
        loss = torch.nn.functional.cross_entropy(
            self.net(self.scenario.transform.normalise(asked.images)), asked.labels
        )
        self.net.head.weight.data *= 1 + loss.item()


class OpensAllClassesAtOnce(Honest):
    """Makes the evaluation believe that every class was seen in the first task."""

    def learn(self, task):
        yield from super().learn(task)
        tasks = self.scenario.tasks
        tasks[:] = [replace(t, classes=range(10) if t.id == 0 else range(10, 10)) for t in tasks]


class OverfillsItsBuffer(Honest):
    """Allocates more places than the capacity."""

    def learn(self, task):
        yield from super().learn(task)
        self.buffer.images = torch.cat([self.buffer.images, task.train.images[:1]])


class StoresTestImages(Honest):
    """Puts test images into the buffer."""

    def learn(self, task):
        yield from super().learn(task)
        self.buffer.images[:5] = task.test.images[:5]


class LearnsWhileAnswering(Honest):
    """Moves its weights when asked."""

    def predict(self, x, task_id):
        self.net.head.weight.data += 1e-3
        return self.net(x)


class LeavesGradients(Honest):
    """Differentiates when asked, and leaves the gradients."""

    def predict(self, x, task_id):
        with torch.enable_grad():
            scores = self.net(x)
            scores.sum().backward()
        return scores.detach()


class NormalisesByBatch(Honest):
    """BatchNorm in training mode at test time."""

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        self.norm = torch.nn.BatchNorm1d(64, affine=False, track_running_stats=False)

    def predict(self, x, task_id):
        self.norm.train()
        return self.net(self.norm(x.flatten(1)).view_as(x) if len(x) > 1 else x)


CHEATS = {
    AnswersByBatch: {"one image a batch gives the same answers", "batches of a single task give the same answers"},
    LooksLabelsUp: {"exchanged test labels bring the accuracy down to chance"},
    TrainsOnTestImages: {
        "every phase trains on training images",
        "every remembered image was in the training set",
        "training does not depend on the images it is measured on",
    },
    TrainsOnValidationImages: {
        "every phase trains on training images",
        "every remembered image was in the training set",
    },
    ChoosesOnTheImagesItIsMeasuredOn: {"training does not depend on the images it is measured on"},
    PeeksAtTestImages: {"training does not depend on the images it is measured on"},
    KeepsImagesAside: {"no training image is kept outside the buffer"},
    KeepsImagesAsideInDisguise: {"no training image is kept outside the buffer"},
    KeepsImagesInColumns: {
        "no training image is kept outside the buffer",
        "the buffer is within its budget",
        "the buffer stays within its budget while learning",
    },
    OpensAllClassesAtOnce: {"no class is answered before it was seen", "the stored answers come again"},
    OverfillsItsBuffer: {"the buffer is within its budget", "the buffer stays within its budget while learning"},
    StoresTestImages: {
        "every remembered image was in the training set",
        "training does not depend on the images it is measured on",
    },
    LearnsWhileAnswering: {"answering leaves the method's state as it was"},
    LeavesGradients: {"answering leaves no gradient behind"},
    NormalisesByBatch: {"BatchNorm is in evaluation mode"},
}


SETTINGS = {
    TrainsOnValidationImages: ["scenario.val_fraction=0.3"],
    ChoosesOnTheImagesItIsMeasuredOn: ["scenario.val_fraction=0.3", "trainer.evaluate_on=val"],
}
"""What a cheat needs to be tempted."""


def verdicts(make: Callable[[Parts], ER], tmp_path, *more: str) -> dict[str, bool | None]:
    def rebuild() -> Parts:
        parts = build(configure(*RUN, *SETTINGS.get(make, []), *more))
        return replace(parts, method=make(parts))

    parts = rebuild()
    trainer = parts.build_trainer(Loggers([]), Checkpoint(tmp_path), stop=lambda: False)
    trainer.run()
    files.write_predictions(tmp_path, trainer.answers, parts.scenario)
    with np.load(tmp_path / "predictions.npz") as stored:
        predictions = dict(stored)
    learned = clone_state(parts.method.state_dict())
    if make is OverfillsItsBuffer:  # a state of another shape does not load into fresh parts: look at these ones
        checks = [*check_contents(parts), *check_rehearsal(rebuild)]
    else:
        checks = audit(rebuild, learned, predictions)
    return {check.name: check.passed for check in checks}


@pytest.mark.slow
def test_an_honest_run_passes(tmp_path):
    found = verdicts(Honest, tmp_path)
    assert len(found) == 14
    assert found.pop("BatchNorm is in evaluation mode") is None  # it has none
    assert all(found.values()), found


@pytest.mark.slow
def test_a_check_that_could_not_fail_is_skipped(tmp_path):
    """On two images a class of tasks of two classes not even a method that looks every label up is above the limit."""
    few = ["scenario.classes_per_task=[2,2,2,2,2]", "scenario.num_tasks=5", "scenario.test_per_class=2"]
    found = verdicts(LooksLabelsUp, tmp_path / "few", *few)
    assert found["exchanged test labels bring the accuracy down to chance"] is None
    assert found["no class is answered before it was seen"]
    found = verdicts(Honest, tmp_path / "one", "scenario.classes_per_task=[10]", "scenario.num_tasks=1")
    assert found["no class is answered before it was seen"] is None


def test_a_run_that_remembers_nothing_is_not_praised_for_it(tmp_path):
    parts = build(configure(*TINY, "backbone.hidden=[16]"))
    [check, *_] = check_contents(parts)
    assert (check.name, check.passed) == ("every remembered image was in the training set", None)


@pytest.mark.slow
@pytest.mark.parametrize("cheat", CHEATS, ids=lambda cheat: cheat.__name__)
def test_a_cheat_is_caught(cheat, tmp_path):
    found = verdicts(cheat, tmp_path)
    caught = {name for name, passed in found.items() if passed is False}
    assert CHEATS[cheat] <= caught
    if cheat not in (LearnsWhileAnswering, NormalisesByBatch, AnswersByBatch):  # which change answers as well
        assert caught == CHEATS[cheat]


def audit_command():
    """``scripts/audit.py`` as a module."""
    return load_script("audit")


@pytest.mark.slow
def test_the_command_audits_a_run_folder(tmp_path, capsys):
    done = command(*RUN, "results_dir=r", "images=host", cwd=tmp_path)  # an audit brings them to the device
    assert done.returncode == 0, done.stderr
    [run] = (tmp_path / "r").rglob("seed0")
    module = audit_command()
    assert module.main([str(run)]) == 0
    printed = capsys.readouterr().out
    written = json.loads((run / "audit.json").read_text())
    assert printed.count("PASS  ") == 13
    assert printed.count("SKIP  BatchNorm is in evaluation mode: the method has no BatchNorm") == 1
    assert len(written) == 14
    assert all(check["passed"] is not False and check["found"] for check in written)
    last = run / "checkpoint" / "last.pt"
    saved = torch.load(last, weights_only=True)
    saved["task_start"] = saved.pop("final")  # as older versions wrote it
    torch.save(saved, last)
    assert module.main([str(run)]) == 0
    assert json.loads((run / "audit.json").read_text()) == written
    capsys.readouterr()
    assert module.main([str(tmp_path)]) == 2
    assert "run_dir: expected the folder of a finished run" in capsys.readouterr().err
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"data": "other images"}))
    assert module.main([str(run)]) == 2
    assert "run_dir: expected the images that it learned (data other images); got others" in capsys.readouterr().err


@pytest.mark.slow
def test_batches_of_one_task_are_said_and_are_no_pass(tmp_path):
    keys = ["method=supsup", "backbone=mlp", "backbone.hidden=[16]", "+method.deciding_images=1"]
    done = command(*TINY, *keys, "trainer.epochs=1", "results_dir=r", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    [run] = (tmp_path / "r").rglob("seed0")
    assert json.loads((run / "summary.json").read_text())["test_batches"] == "single_task"
    assert "every test batch is of one task" in (run / "report.html").read_text()
    assert audit_command().main([str(run)]) == 1
    checks = {check["name"]: check["passed"] for check in json.loads((run / "audit.json").read_text())}
    assert not checks["one image a batch gives the same answers"]
