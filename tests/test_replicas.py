"""Several seeds side by side against the same seeds by themselves."""

import json

import numpy as np
import pytest
import torch
from helpers import TINY, command, configure, parts_of, trainer_of

from cl_bench.config.build import build
from cl_bench.engine.replicas import find_obstacle, run_together
from cl_bench.engine.trainer import Interrupted, run_alone

pytestmark = pytest.mark.arithmetic

SEEDS = (0, 1, 2)
CONVOLUTIONS = [
    "method=er",
    "backbone=resnet18",
    "backbone.width=4",
    "buffer=reservoir",
    "buffer.capacity=20",
]


class Runs:
    """Tiny runs of some seeds; each is built when it begins, as the command does it."""

    def __init__(self, method, folder, *overrides, stop=lambda: False, change=lambda trainer: None):
        self.method, self.folder, self.overrides, self.stop, self.change = method, folder, overrides, stop, change
        self.trainers = {}

    def steps(self, seed):
        settings = [f"seed={seed}", *self.overrides]
        parts = parts_of(self.method, *settings) if self.method else build(configure(*TINY, *settings))
        self.folder.mkdir(exist_ok=True)
        trainer = self.trainers[seed] = trainer_of(parts, self.folder / str(seed), self.stop)
        self.change(trainer)
        return (yield from trainer.generate_steps())

    def side_by_side(self):
        return run_together([self.steps(seed) for seed in SEEDS])

    def one_by_one(self):
        return [run_alone(self.steps(seed)) for seed in SEEDS]


def largest_difference(first, second):
    """Relative to each tensor's largest value."""
    ours, theirs = first.method.state_dict(), second.method.state_dict()
    differences = []
    for name, value in ours.items():
        if isinstance(value, torch.Tensor):
            a, b = value.double(), theirs[name].double()
            differences.append(float((a - b).abs().max() / (1 + b.abs().max())))
    return max(differences)


def in_double(trainer):
    """Sixteen digits: training blows the rounding of single precision up, by how much depends on the processor."""
    method, inputs, plain = trainer.method.double(), trainer.method.inputs, trainer.scenario.transform.normalise
    method.inputs = lambda batch: {n: t.double() if t.is_floating_point() else t for n, t in inputs(batch).items()}
    trainer.scenario.transform.normalise = lambda images: plain(images).double()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # kl_div of LVT has no batching rule
@pytest.mark.parametrize(
    ("method", "overrides"),
    [(None, CONVOLUTIONS), ("er", []), ("derpp", []), ("ewc", []), ("icarl", []), ("lvt", ["backbone.dropout=0"])],
    ids=lambda value: "resnet18" if value is None else value if isinstance(value, str) else "",
)
def test_each_replica_is_the_run_of_its_seed(method, overrides, tmp_path):
    joint, alone = (Runs(method, tmp_path / name, *overrides, change=in_double) for name in ("joint", "alone"))
    for record, expected in zip(joint.side_by_side(), alone.one_by_one()):
        for setting in ("class_il", "task_il"):
            # an image on the border between two classes may fall to either side
            ours, theirs = (r.get_matrix(setting).correct for r in (record, expected))
            assert np.nanmax(np.abs(ours - theirs)) <= 1
    for seed in SEEDS:
        assert joint.trainers[seed].steps_done == alone.trainers[seed].steps_done > 0
        assert largest_difference(joint.trainers[seed], alone.trainers[seed]) < 1e-9
    assert largest_difference(joint.trainers[0], joint.trainers[1]) > 1e-2


@pytest.mark.slow
def test_replicas_are_computed_as_one(tmp_path):
    calls = []

    def count(trainer):
        terms = trainer.method.terms
        trainer.method.terms = lambda inputs, task: (calls.append(inputs["x"].shape), terms(inputs, task))[1]

    runs = Runs("er", tmp_path, change=count)
    runs.side_by_side()
    assert len(calls) == runs.trainers[0].steps_done  # of all three together
    assert {len(shape) for shape in calls} == {4}  # and yet written for one
    assert runs.trainers[0].executor.describe()["used"] == "joint"


@pytest.mark.slow
def test_a_replica_that_fails_leaves_the_others_alone(tmp_path):
    def spoil(trainer):
        if 1 in runs.trainers and trainer is runs.trainers[1]:
            inputs, calls = trainer.method.inputs, []

            def spoiled(batch):
                calls.append(batch)
                if len(calls) == 5:
                    next(trainer.method.net.parameters()).data.fill_(torch.nan)
                return inputs(batch)

            trainer.method.inputs = spoiled

    runs = Runs("er", tmp_path, change=spoil)
    with pytest.raises(FloatingPointError, match="not finite"):
        runs.side_by_side()
    assert [runs.trainers[seed].checkpoint.load()["task"] for seed in SEEDS] == [2, 0, 2]


@pytest.mark.slow
def test_replicas_stop_and_go_on(tmp_path):
    asked = []

    def stop():
        asked.append(None)
        return len(asked) > 20

    with pytest.raises(Interrupted):
        Runs("er", tmp_path / "joint", stop=stop).side_by_side()
    resumed, alone = Runs("er", tmp_path / "joint"), Runs("er", tmp_path / "alone")
    resumed.side_by_side()
    alone.one_by_one()
    for seed in SEEDS:
        assert resumed.trainers[seed].steps_done == alone.trainers[seed].steps_done
        assert largest_difference(resumed.trainers[seed], alone.trainers[seed]) < 1e-4


@pytest.mark.slow
def test_what_cannot_be_computed_as_one_says_why():
    cuda = torch.device("cuda")
    assert find_obstacle(parts_of("er").method, cuda) is None
    assert "dropout" in find_obstacle(parts_of("lvt").method, cuda)
    assert "keeps a network aside" in find_obstacle(parts_of("dytox").method, cuda)
    assert "function of tensors" in find_obstacle(parts_of("den").method, cuda)
    assert "CPU" in find_obstacle(parts_of("er").method, torch.device("cpu"))


@pytest.mark.slow
def test_replicas_have_the_folders_and_results_of_separate_runs(tmp_path):
    arguments = [*TINY, "logger=none", "method=er", "buffer=reservoir", "buffer.capacity=20"]
    done = command(*arguments, "seed=3", "trainer.replicas=2", "results_dir=joint", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "one after the other: a CPU" in done.stderr
    assert command(*arguments, "seed=4", "results_dir=alone", cwd=tmp_path).returncode == 0
    (alone,) = (tmp_path / "alone").rglob("summary.json")
    folder = tmp_path / "joint" / alone.parent.relative_to(tmp_path / "alone")
    assert sorted(path.name for path in folder.parent.iterdir()) == ["seed3", "seed4"]
    for name in ("accuracy_matrix.csv", "metrics.jsonl"):
        assert (folder / name).read_bytes() == (alone.parent / name).read_bytes()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["seed"] == 4
    assert summary["speed"]["replicas"] == 2
