"""One data set in several views: permuted or rotated when it is looked up, never stored."""

import dataclasses
import json
import shlex

import numpy as np
import pytest
import torch
import yaml
from helpers import (
    CLASS_IL,
    DIGITS_INSTEAD,
    ROOT,
    configure,
    make_run,
    needs_mnist,
    run_in_process,
    toy_images,
    trainer_of,
)
from PIL import Image

from cl_bench.config.build import build, build_scenario, identify_run
from cl_bench.config.schema import (
    CONFIGS,
    compute_fingerprint,
    import_target,
    read_arguments,
    refuse_void,
    to_plain_dict,
)
from cl_bench.core.errors import ConfigError
from cl_bench.core.images import HostImages, RearrangedImages
from cl_bench.core.types import Data
from cl_bench.data.digits import digits
from cl_bench.report.rows import Run, make_rows
from cl_bench.runs.audit import check_contents, hash_images, scramble_test_images
from cl_bench.scenarios.base import Scenario
from cl_bench.scenarios.domains import Domains

KEYS = {
    "change": "permuted", "num_tasks": 3, "labels": "shared", "permutation_seed": 0, "angles": None, "data_seed": 0,
    "val_fraction": 0.0, "val_choice": "random", "train_per_class": None, "test_per_class": None, "crop_padding": 0,
    "flip": False, "rand_augment": None, "normalisation": "standard", "run_seed": 0,
}  # fmt: skip

SPLITS = ("train", "val", "test")


def make_domains(source=None, **keys) -> Domains:
    return Domains(source=source or toy_images(), **(KEYS | keys))


@pytest.mark.parametrize(("labels", "old"), [("disjoint", "permuted_digits"), ("shared", "permuted_digits_shared")])
def test_the_permuted_digits_are_a_case_of_it(labels, old):
    stored = build_scenario(configure(f"scenario={old}"))
    views = make_domains(digits(), labels=labels, num_tasks=10)
    assert views.shared_labels == stored.shared_labels == (labels == "shared")
    assert views.class_order == stored.class_order
    if labels == "disjoint":
        assert views.class_names == stored.class_names
    for ours, theirs in zip(views.tasks, stored.tasks, strict=True):
        assert ours.classes == theirs.classes
        for split in SPLITS:
            a, b = getattr(ours, split), getattr(theirs, split)
            assert torch.equal(a.images[:], b.images)
            assert torch.equal(a.labels, b.labels)
            assert torch.equal(a.index, b.index)


@pytest.mark.parametrize("shape", [(8, 8, 1), (6, 9, 3)])
def test_a_rotated_image_is_pillows(shape):
    height, width, channels = shape
    source = toy_images(side=max(shape), channels=channels)
    cut = {name: getattr(source, name)[:, :, :height, :width] for name in ("train_images", "test_images")}
    source = dataclasses.replace(source, **{name: np.ascontiguousarray(images) for name, images in cut.items()})
    angles = [0.0, 30.0, 90.0, 200.5]
    views = make_domains(source, change="rotated", num_tasks=4, angles=angles)
    for task, angle in zip(views.tasks, angles):
        expected = [
            [np.asarray(Image.fromarray(channel).rotate(angle)) for channel in image] for image in source.test_images
        ]
        assert (task.test.images[:].numpy() == np.array(expected)).all()
    assert torch.equal(views.tasks[0].train.images[:], torch.from_numpy(source.train_images))


def test_angles_are_equally_spaced_if_none_are_given():
    views = make_domains(change="rotated", num_tasks=4, labels="disjoint")
    assert views.class_names[::4] == [f"class 0 at {angle} degrees" for angle in (0, 45, 90, 135)]
    with pytest.raises(ConfigError, match="angles: expected 4 angles in degrees"):
        make_domains(change="rotated", num_tasks=4, angles=[0.0, 1.0])


def test_what_is_looked_up_is_what_a_stored_view_would_give():
    task = make_domains(toy_images(channels=3), val_fraction=0.5).tasks[2]
    whole = task.train.images[:]
    for which in (torch.tensor([3, 0, 3]), slice(2, 5), torch.arange(len(whole)) % 2 == 0):
        assert torch.equal(task.train.images[which], whole[which])
    assert torch.equal(task.train.images.index_select(0, torch.tensor([4])), whole[4:5])
    assert torch.equal(torch.cat([part.images for part in task.train.split(5)]), whole)
    assert task.train.images.numel() == whole.numel()
    assert task.train.images.shape == whole.shape
    assert not set(task.train.index.tolist()) & set(task.val.index.tolist())


def test_no_view_is_stored():
    source = toy_images()
    views = make_domains(source, num_tasks=200, val_fraction=0.25).to(torch.device("cpu"))
    assert views.nbytes == source.train_images.nbytes + source.test_images.nbytes
    everything = Data.concatenate(task.test for task in views.tasks)  # as an evaluation does
    assert isinstance(everything.images, RearrangedImages)
    assert everything.images.source is views.tasks[0].test.images.source
    assert everything.images.source.data_ptr() == source.test_images.ctypes.data
    assert everything.index.tolist() == list(range(len(everything)))
    last = everything.take(slice(-len(views.tasks[199].test), None))
    assert torch.equal(last.images, views.tasks[199].test.images[:])
    for name in ("rows", "maps"):
        assert len({getattr(task.train.images, name).data_ptr() for task in views.tasks}) == 1


def test_with_other_images_they_are_joined_as_tensors():
    task = make_domains().tasks[1]
    stored = Data(task.train.images[:], task.train.labels, task.train.index)
    for parts in ((task.train, stored), (stored, task.train), (task.train, task.test)):
        joined = Data.concatenate(parts)
        assert torch.equal(joined.images, torch.cat([part.images[:] for part in parts]))


def test_images_on_the_host_give_the_same_batches():
    device, host = (make_domains(val_fraction=0.5).to(torch.device("cpu"), storage) for storage in ("device", "host"))
    assert host.storage == "host"
    sources = [task.train.images.source for task in host.tasks]
    assert all(isinstance(source, HostImages) and source is sources[0] for source in sources)
    for ours, theirs in zip(host.tasks, device.tasks):
        for split in SPLITS:
            assert torch.equal(getattr(ours, split).images[:], getattr(theirs, split).images[:])


@pytest.mark.parametrize("labels", ["shared", "disjoint"])
@pytest.mark.parametrize("method", ["er", "joint", "ewc"])
def test_a_run_is_the_run_over_stored_views(method, labels, tmp_path):
    """The same seeds and the same images: the same record and weights, whether views are stored or not."""
    buffer = ["buffer=reservoir", "buffer.capacity=20"] if method == "er" else ["buffer=none"]
    common = ["backbone=mlp", "backbone.hidden=[16]", *buffer, f"method={method}", "trainer.epochs=1", "device=cpu"]
    views = ["scenario=permuted_mnist", *DIGITS_INSTEAD, f"scenario.labels={labels}", "scenario.num_tasks=3"]
    stored = {
        "disjoint": ["scenario=permuted_digits", "scenario.num_tasks=3"],
        "shared": ["scenario=permuted_digits_shared", "scenario.disjoint.num_tasks=3"],
    }
    found = []
    for number, scenario in enumerate((views, stored[labels])):
        trainer = trainer_of(build(configure(*common, *scenario, "optimizer.lr=0.01")), tmp_path / str(number))
        found.append((trainer.run().to_json(), trainer.method.state_dict()))
    (ours, weights), (theirs, expected) = found
    assert ours["class_il"] == theirs["class_il"]
    assert ours["task_il"] == theirs["task_il"]
    for name, value in weights.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, expected[name]), name


def test_permutations_follow_the_seed_only_if_asked():
    def first(**keys):
        return make_domains(**keys).tasks[0].test.images[:]

    assert torch.equal(first(permutation_seed=5), first(permutation_seed=5, run_seed=7))
    assert torch.equal(first(permutation_seed=None, run_seed=7), first(permutation_seed=7))
    assert not torch.equal(first(permutation_seed=None, run_seed=7), first(permutation_seed=None, run_seed=8))
    followers = [make_domains(permutation_seed=None, run_seed=seed) for seed in (7, 8)]
    assert followers[0].data == followers[1].data  # seeds of one row
    assert all(views.follows_seed for views in followers)
    assert make_domains(permutation_seed=7).data != make_domains(permutation_seed=8).data
    assert make_domains(change="rotated").data != make_domains().data
    assert make_domains(labels="disjoint").data != make_domains().data


@pytest.mark.parametrize(
    "overrides",
    [
        ["scenario=digits", "scenario.class_order=ocl_survey"],
        ["scenario=permuted_mnist", *DIGITS_INSTEAD, "scenario.permutation_seed=null"],
    ],
)
def test_seeds_with_tasks_of_their_own_are_one_row(overrides):
    prints, tasks = set(), []
    for seed in (0, 1):
        config = configure(*overrides, f"seed={seed}", "device=cpu")
        settings, _ = identify_run(config, to_plain_dict(config))
        prints.add(compute_fingerprint(settings))
        parts = build(config)
        assert parts.describe()["follows_seed"]
        tasks.append((parts.describe()["tasks"], parts.scenario.tasks[0].train.images[:5].sum(dim=0)))
    assert len(prints) == 1
    assert tasks[0][0] != tasks[1][0] or not torch.equal(tasks[0][1], tasks[1][1])


def test_each_replica_has_the_tasks_of_its_seed(tmp_path, monkeypatch):
    arguments = ["scenario.class_order=ocl_survey", "trainer.epochs=1", "trainer.replicas=2", "seed=3", "logger=none"]
    monkeypatch.setattr("cl_bench.runs.run.write_report", lambda run_dir: None)
    assert run_in_process(*arguments, "device=cpu", "backbone.hidden=[4]", monkeypatch=monkeypatch, cwd=tmp_path) == 0
    found = [json.loads(path.read_text()) for path in tmp_path.rglob("summary.json")]
    orders = {summary["seed"]: summary["class_order"] for summary in found}
    for seed in (3, 4):
        assert orders[seed] == torch.randperm(10, generator=torch.Generator().manual_seed(seed)).tolist()
    assert len({summary["fingerprint"] for summary in found}) == 1


@pytest.mark.parametrize("follows", [True, False])
def test_a_row_takes_other_tasks_only_where_the_seed_draws_them(tmp_path, follows):
    orders = [[8, 0, 7, 1, 3, 6, 2, 4, 5, 9], [0, 8, 7, 1, 3, 6, 2, 4, 5, 9]]
    folders = [
        make_run(
            tmp_path, seed=seed, class_il=CLASS_IL, class_order=order, follows_seed=follows,
            tasks=[order[i : i + 2] for i in range(0, 10, 2)],
        )
        for seed, order in enumerate(orders)
    ]  # fmt: skip
    runs = [Run.read(folder) for folder in folders]
    if follows:
        assert len(make_rows(runs)) == 1
    else:
        with pytest.raises(ConfigError, match=r"fingerprint: .*class_order, tasks"):
            make_rows(runs)


def test_the_run_seed_cannot_be_configured():
    with pytest.raises(ConfigError, match=r"scenario.run_seed: expected one of the keys"):
        build_scenario(configure("scenario=digits", "+scenario.run_seed=3"))


def test_the_audit_sees_and_replaces_the_views():
    keys = ["scenario=permuted_mnist", *DIGITS_INSTEAD, "scenario.num_tasks=2", "device=cpu"]
    parts = build(configure(*keys, "method=er", "buffer=reservoir", "buffer.capacity=20"))
    tasks = parts.scenario.tasks
    assert hash_images(tasks[1].test.images) == hash_images(tasks[1].test.images[:])
    assert not hash_images(tasks[0].test.images) & hash_images(tasks[1].test.images)
    assert all(check.passed is not False for check in check_contents(parts))
    train, test = (getattr(tasks[0], split).images[:] for split in ("train", "test"))
    scramble_test_images(parts)
    assert torch.equal(train, tasks[0].train.images[:])
    assert not hash_images(test) & hash_images(tasks[0].test.images)


@needs_mnist
def test_protocol_c_of_the_online_methods():
    """17 permutations of 55,000 training images, 5,500 steps of ten a task, pixels in [0, 1]."""
    views = build_scenario(
        configure(
            "scenario=permuted_mnist", "scenario.num_tasks=17", "scenario.permutation_seed=null",
            "scenario.val_fraction=0.0833333", "scenario.val_choice=file_start", "scenario.normalisation=unit",
        )
    )  # fmt: skip
    assert len(views.tasks) == 17
    for task in views.tasks:
        assert (len(task.train), len(task.val), len(task.test)) == (55_000, 5_000, 10_000)
    assert views.tasks[16].val.index.tolist() == list(range(16 * 60_000, 16 * 60_000 + 5_000))
    assert views.nbytes == 70_000 * 784
    x = views.transform.normalise(views.tasks[16].train.images[:100])
    assert (float(x.min()), float(x.max())) == (0.0, 1.0)


PAGE = (ROOT / "docs" / "scenarios.md").read_text()
COMMANDS = [shlex.split(line)[3:] for line in PAGE.splitlines() if line.startswith("    python -m cl_bench ")]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_the_commands_of_the_page_are_right(words):
    config = configure(*words)
    built = import_target(config.scenario, "scenario", [])
    values = read_arguments(config.scenario, "scenario", built, ("run_seed",))
    refuse_void(config.scenario, "scenario", built, values)
    assert issubclass(built, Scenario)
    typed = dict(word.split("=", 1) for word in words if word.startswith("scenario."))
    own = {key.removeprefix("scenario."): yaml.safe_load(value) for key, value in typed.items() if key.count(".") == 1}
    assert {key: values[key] for key in own} == own
    assert f"scenario={config.choices.scenario}" in words


def test_the_page_has_every_scenario():
    for path in (CONFIGS / "scenario").glob("*.yaml"):
        assert f"`{path.stem}`" in PAGE
        assert any(f"scenario={path.stem}" in words for words in COMMANDS)
