"""Networks that are kept after each task, runs that start from one, and the final state of a finished run."""

import re
from pathlib import Path

import pytest
import torch
from helpers import TINY, configure, parts_of, trainer_of

from cl_bench.backbones.base import Backbone
from cl_bench.config.build import prepare_component
from cl_bench.config.schema import CONFIGS, select_comparable, to_plain_dict
from cl_bench.core.errors import ConfigError
from cl_bench.engine.checkpoint import Checkpoint, clone_state, get_final_state
from cl_bench.engine.trainer import Interrupted

pytestmark = pytest.mark.arithmetic

BACKBONES = sorted(path.stem for path in (CONFIGS / "backbone").glob("*.yaml"))
GROWING = ["apd", "den", "dytox", "memory_vit"]


class Killed(BaseException):
    """What stands in for SIGKILL: nothing of the program catches it."""


def equal(first, second):
    tensors = {name for name, value in first.items() if isinstance(value, torch.Tensor)}
    assert first.keys() == second.keys()
    assert len(tensors) > 1
    return all(torch.equal(first[name], second[name]) for name in tensors)


def kept(folder: Path):
    return {path.name: torch.load(path, weights_only=True) for path in sorted(folder.glob("task*.pt"))}


@pytest.mark.parametrize("method", ["er", "dytox"])
def test_the_network_after_each_task_is_kept(method, tmp_path, monkeypatch):
    trainer = trainer_of(parts_of(method, "trainer.keep_tasks=true"), tmp_path)
    measure, moments = trainer._measure, {}

    def watch(after_task):
        moments[f"task{after_task:02}.pt"] = clone_state(trainer.method.net.state_dict())
        measure(after_task)

    monkeypatch.setattr(trainer, "_measure", watch)
    trainer.run()
    files = kept(tmp_path)
    assert list(files) == ["task00.pt", "task01.pt"]
    assert all(equal(files[name], moments[name]) for name in files)
    assert not (files["task00.pt"].keys() == files["task01.pt"].keys() and equal(*files.values()))


def test_no_network_is_kept_unasked(tmp_path):
    trainer_of(parts_of("finetune"), tmp_path).run()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["boundary.pt", "last.pt", "previous.pt"]


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["in task 1", "while task00.pt is written", "before the next checkpoint"])
def test_a_killed_and_resumed_run_has_every_network(moment, tmp_path, monkeypatch):
    keys = ["trainer.keep_tasks=true", "trainer.checkpoint_steps=3"]
    trainer_of(parts_of("er", *keys), tmp_path / "straight").run()
    stopped = trainer_of(parts_of("er", *keys), tmp_path / "killed")
    write, save = Checkpoint._write_partial, Checkpoint.save

    def write_or_die(self, state):
        path = write(self, state)
        if moment == "while task00.pt is written" and "record" not in state:
            raise Killed
        return path

    def save_or_die(self, state, *, boundary=False):
        if moment == "before the next checkpoint" and state["task"] == 1:
            raise Killed
        save(self, state, boundary=boundary)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "_write_partial", write_or_die)
        patch.setattr(Checkpoint, "save", save_or_die)
        if moment == "in task 1":
            stopped.stop = lambda: stopped.steps_done == 10
        with pytest.raises((Killed, Interrupted)):
            stopped.run()
    names = [] if moment == "while task00.pt is written" else ["task00.pt"]
    assert list(kept(tmp_path / "killed")) == names
    trainer_of(parts_of("er", *keys), tmp_path / "killed").run()
    straight, resumed = kept(tmp_path / "straight"), kept(tmp_path / "killed")
    assert list(resumed) == ["task00.pt", "task01.pt"]
    assert all(equal(straight[name], resumed[name]) for name in straight)


def test_a_method_without_a_net_is_refused(tmp_path):
    parts = parts_of("finetune", "trainer.keep_tasks=true")
    del parts.method.net
    with pytest.raises(ConfigError, match=r"trainer\.keep_tasks: expected false, since this method has no network"):
        trainer_of(parts, tmp_path)


# -- a run that starts from a file ---------------------------------------------------------------------------------


def network(*overrides):
    """The network that these overrides choose; one that wants the images' mean and deviation is given them."""
    size = 64 if overrides[0] == "backbone=detr" else 32  # of stride 32
    wants = overrides[0].startswith(("backbone=memory_vit", "backbone=prompt_vit", "backbone=timm"))
    statistics = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3} if wants else {}
    return prepare_component(configure(*overrides).backbone, "backbone", [], Backbone)(
        num_classes=100, image_shape=(3, size, size), **statistics
    )


@pytest.mark.slow
@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_backbone_starts_from_a_file(backbone, tmp_path):
    choice = [f"backbone={backbone}", "+scale=mini"]
    torch.manual_seed(1)
    saved = network(*choice).state_dict()
    torch.save(saved, tmp_path / "w.pt")
    torch.manual_seed(2)
    drawn = network(*choice).state_dict()
    assert not equal(drawn, saved)
    assert equal(network(*choice, f"backbone.weights={tmp_path / 'w.pt'}").state_dict(), saved)


@pytest.mark.slow
@pytest.mark.parametrize("method", GROWING)
def test_a_growing_network_starts_from_what_it_was_before_its_tasks(method, tmp_path, capsys):
    """Its own weights come from the file; the parts of the file's tasks are left out, and the run learns."""
    grown = parts_of(method)
    for _ in grown.method.learn(grown.scenario.tasks[0]):
        pass
    state = clone_state(grown.method.net.state_dict())
    torch.save(state, tmp_path / "task00.pt")
    parts = parts_of(method, "seed=1", f"backbone.weights={tmp_path / 'task00.pt'}", "trainer.epochs=1")
    told = capsys.readouterr().err  # of DyTox, whose first classifier has all classes until the first task begins
    assert ("not taken, since they depend on the tasks: classifiers.0.1.weight" in told) == (method == "dytox")
    fresh = parts.method.net.state_dict()
    drawn = parts_of(method, "seed=1").method.net.state_dict()
    assert fresh.keys() == drawn.keys() < state.keys()
    tensors = [name for name, value in fresh.items() if isinstance(value, torch.Tensor) and name in state]
    from_file = [name for name in tensors if torch.equal(fresh[name], state[name])]
    assert len(from_file) >= len(tensors) - 2  # a head that the method put in later
    assert any(not torch.equal(drawn[name], state[name]) for name in from_file)
    trainer_of(parts, tmp_path).run()


@pytest.mark.slow
def test_a_run_starts_from_the_network_of_another_run(tmp_path):
    trainer_of(parts_of("er", "trainer.keep_tasks=true"), tmp_path / "first").run()
    file = tmp_path / "first" / "task00.pt"
    parts = parts_of("lwf", f"backbone.weights={file}")
    assert equal(clone_state(parts.method.net.state_dict()), torch.load(file, weights_only=True))


WRONG = {
    "missing": (lambda net: None, "no such file"),
    "text": (lambda net: "some words", "Error"),
    "a number": (lambda net: 3, "TypeError: Expected state_dict"),
    "other shapes": (
        lambda net: net | {"head.weight": torch.zeros(3, 32)},
        r"size mismatch for head\.weight: .*\[3, 32\].*\[10, 32\]",
    ),
    "a part": (
        lambda net: {"head.bias": net["head.bias"]},
        r"\(no trunk[\w.]*weight, no trunk[\w.]*bias, no head\.weight\)",
    ),
    "other keys": (lambda net: net | {"tail.weight": net["head.bias"]}, r"\(an unknown tail\.weight\)"),
    "a pickle": (lambda net: {"head.bias": Path}, "UnpicklingError"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_file_is_refused(kind, tmp_path):
    made, found = WRONG[kind]
    file = tmp_path / "w.pt"
    content = made(parts_of("finetune").method.net.state_dict())
    if isinstance(content, str):
        file.write_text(content)
    elif content is not None:
        torch.save(content, file)
    with pytest.raises(ConfigError) as error:
        parts_of("finetune", f"backbone.weights={file}")
    message = str(error.value)
    assert message.startswith("backbone.weights: expected a file with the weights of this network")
    assert f"got {file} (" in message
    assert re.search(found, message)
    assert message.endswith("Take a file of a run with trainer.keep_tasks=true, the same backbone and the same number "
                            "of classes.")  # fmt: skip
    assert "\n" not in message


@pytest.mark.slow
@pytest.mark.parametrize("method", ["supsup", "supsup_nns"])
def test_a_method_that_draws_its_weights_takes_no_file(method, tmp_path):
    torch.save(parts_of("finetune", "backbone=mlp", "backbone.hidden=[64]").method.net.state_dict(), tmp_path / "w.pt")
    with pytest.raises(ConfigError, match=r"backbone\.weights: expected null, since this method draws the weights"):
        parts_of(method, f"backbone.weights={tmp_path / 'w.pt'}")


def test_a_missing_file_is_told_before_the_data_are_read(monkeypatch):
    monkeypatch.setattr("cl_bench.config.build.build_scenario", None)
    with pytest.raises(ConfigError, match=r"backbone\.weights"):
        parts_of("finetune", "backbone.weights=nowhere.pt")


@pytest.mark.slow
def test_what_makes_runs_comparable_is_the_content_of_the_file(tmp_path):
    first, copy, other = (tmp_path / name for name in ("first.pt", "copy.pt", "other.pt"))
    for path, content in ((first, b"1"), (copy, b"1"), (other, b"2")):
        path.write_bytes(content)

    def settings(*overrides):
        return select_comparable(to_plain_dict(configure(*TINY, *overrides)))

    assert settings(f"backbone.weights={first}") == settings(f"backbone.weights={copy}")
    assert settings(f"backbone.weights={first}") != settings(f"backbone.weights={other}")
    assert settings(f"backbone.weights={first}").keys() - settings().keys() == {"backbone.weights"}
    assert settings("trainer.keep_tasks=true") == settings()
    assert "trainer.keep_tasks" not in settings()
    without = to_plain_dict(configure(*TINY))
    del without["backbone"]["weights"], without["trainer"]["keep_tasks"]  # as an older version wrote it
    assert select_comparable(without) == settings()


# -- the final state of a finished run -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("form", ["now", "before"])
def test_a_finished_run_is_read_and_goes_on_from_either_form_of_its_checkpoint(form, tmp_path):
    trainer = trainer_of(parts_of("er"), tmp_path)
    trainer.run()
    last = tmp_path / "last.pt"
    saved = torch.load(last, weights_only=True)
    assert "final" in saved
    assert "task_start" not in saved
    if form == "before":
        saved["task_start"] = saved.pop("final")
        torch.save(saved, last)
    learned = get_final_state(Checkpoint(tmp_path).load())["method"]
    assert equal(learned, clone_state(trainer.method.state_dict()))
    again = trainer_of(parts_of("er", "seed=1"), tmp_path)
    again.run()
    assert again.steps_done == trainer.steps_done
    assert torch.equal(again.answers.class_il, trainer.answers.class_il)


def test_a_run_that_is_not_finished_has_the_start_of_its_task(tmp_path):
    trainer = trainer_of(parts_of("er"), tmp_path)
    trainer.stop = lambda: trainer.steps_done == 3
    with pytest.raises(Interrupted):
        trainer.run()
    saved = Checkpoint(tmp_path).load()
    assert "task_start" in saved
    assert "final" not in saved
