"""How classes and images are cut into tasks."""

import dataclasses
import io
import multiprocessing
import shutil
import tarfile
import time
from hashlib import md5

import numpy as np
import pytest
import torch
from helpers import DATA, SPLIT_KEYS, configure, make_split, needs_cifar100, toy_images

from cl_bench.config.build import build, build_scenario
from cl_bench.core.errors import ConfigError
from cl_bench.data import cifar100 as cifar100_module
from cl_bench.data.cifar100 import cifar100
from cl_bench.data.digits import digits
from cl_bench.scenarios.shared_labels import SharedLabels
from cl_bench.scenarios.split import Split, choose_task_sizes, order_classes


def test_tasks_partition_the_classes_and_images():
    source = toy_images(num_classes=6)
    scenario = make_split(source, num_tasks=3, class_order=[5, 0, 3, 1, 4, 2])
    assert [scenario.list_class_ids(t) for t in scenario.tasks] == [[5, 0], [3, 1], [4, 2]]
    assert [t.classes for t in scenario.tasks] == [range(0, 2), range(2, 4), range(4, 6)]
    seen = torch.cat([t.train.index for t in scenario.tasks])
    assert sorted(seen.tolist()) == list(range(len(source.train_labels)))
    for task in scenario.tasks:
        original = torch.tensor(scenario.class_order)[task.train.labels]
        assert original.tolist() == source.train_labels[task.train.index.numpy()].tolist()
        assert torch.equal(task.train.images, torch.from_numpy(source.train_images[task.train.index.numpy()]))


def test_class_orders():
    source = toy_images(num_classes=4)
    assert order_classes(source, "natural", 0) == [0, 1, 2, 3]
    assert order_classes(source, "superclass", 0) == [0, 2, 1, 3]  # parents 0, 1, 0, 1
    assert order_classes(source, "random", 1) != order_classes(source, "random", 2)
    hundred = toy_images(num_classes=100, per_class=1)
    # iCaRL's order, as PyCIL and others use it: numpy's global generator seeded with 1993
    np.random.seed(1993)
    assert order_classes(hundred, "random", 1993) == np.random.permutation(100).tolist()


@pytest.mark.parametrize(
    "order", ["alphabetical", [0, 1, 2], [0, 1, 2, 2], [0, 1, 2, 4], ["0", "1", "2", "3"], 7, None]
)
def test_a_wrong_class_order_is_refused(order):
    with pytest.raises(ConfigError, match="class_order: expected one of natural, random, superclass, ocl_survey, or a"):
        make_split(class_order=order)


def test_validation_comes_out_of_training_class_by_class():
    whole, held = make_split(), make_split(val_fraction=0.5)
    for a, b in zip(whole.tasks, held.tasks):
        assert sorted(b.train.index.tolist() + b.val.index.tolist()) == a.train.index.tolist()
        assert torch.bincount(b.val.labels, minlength=4).max() == 3
        assert torch.equal(a.test.index, b.test.index)
        assert len(a.val) == 0


def test_small_classes_have_a_validation_image_where_a_fraction_is_asked():
    source = toy_images()
    few = np.concatenate([np.flatnonzero(source.train_labels != 2), np.flatnonzero(source.train_labels == 2)[:2]])
    small = dataclasses.replace(source, train_images=source.train_images[few], train_labels=source.train_labels[few])
    for fraction, expected in ((0.01, [1, 1, 1, 1]), (0.1, [1, 1, 1, 1]), (0.4, [2, 2, 1, 2]), (0.0, [0, 0, 0, 0])):
        tasks = make_split(small, val_fraction=fraction).tasks
        assert torch.bincount(torch.cat([task.val.labels for task in tasks]), minlength=4).tolist() == expected
        assert sum(len(task.val) + len(task.train) for task in tasks) == 20
    one = few[:-1]
    small = dataclasses.replace(source, train_images=source.train_images[one], train_labels=source.train_labels[one])
    with pytest.raises(ConfigError, match=r"val_fraction: .*got none left of class 2 at 0.1\. .*another image"):
        make_split(small, val_fraction=0.1)


def test_orders_of_published_experiments_follow_the_seed():
    """B of the online protocols: torch's permutation; C: agem shuffles what its three tuning tasks leave."""
    hundred = toy_images(num_classes=100, per_class=1)
    starts = [[44, 19, 93, 90, 71], [45, 15, 90, 32, 35]]
    for seed in range(5):
        split = make_split(hundred, num_tasks=20, class_order="ocl_survey", class_order_seed=9, run_seed=seed)
        assert split.class_order == torch.randperm(100, generator=torch.Generator().manual_seed(seed)).tolist()
        torch.manual_seed(seed)
        assert split.class_order == torch.randperm(100).tolist()
        assert split.class_order[:5] == (starts[seed] if seed < 2 else split.class_order[:5])

        agem = make_split(hundred, num_tasks=17, pretrain_classes=15, class_order="agem", run_seed=seed)
        labels = np.arange(15, 100)  # as conv_split_cifar.py draws them
        np.random.seed(1234 + seed)
        np.random.shuffle(labels)
        assert [agem.list_class_ids(task) for task in agem.tasks] == labels.reshape(17, 5).tolist()
        assert agem.pretrain_order == list(range(15))
        assert agem.follows_seed
    assert (
        agem.class_order[:3]
        != make_split(hundred, class_order="agem", pretrain_classes=15, num_tasks=17).class_order[:3]
    )
    assert not make_split(hundred, class_order="random", num_tasks=20).follows_seed


@pytest.mark.parametrize("choice", ["last", "file_start", "file_end"])
def test_validation_images_by_the_order_of_the_file(choice):
    source = toy_images(num_classes=4, per_class=10)
    tasks = make_split(source, val_fraction=0.2, val_choice=choice, data_seed=3).tasks
    val = torch.cat([task.val.index for task in tasks]).sort().values.tolist()
    train = torch.cat([task.train.index for task in tasks]).sort().values.tolist()
    assert sorted(val + train) == list(range(40))
    assert val == {"last": list(range(32, 40)), "file_start": list(range(8)), "file_end": list(range(32, 40))}[choice]
    order = np.argsort(source.train_labels, kind="stable")  # a file sorted by class
    by_class = dataclasses.replace(
        source, train_images=source.train_images[order], train_labels=source.train_labels[order]
    )
    if choice == "last":
        held = [t.val.index.tolist() for t in make_split(by_class, val_fraction=0.2, val_choice=choice).tasks]
        assert held == [[8, 9, 18, 19], [28, 29, 38, 39]]
    else:
        with pytest.raises(ConfigError, match=r"val_choice: .*none left of class .*Use val_choice=random or last"):
            make_split(by_class, val_fraction=0.2, val_choice=choice)
    with pytest.raises(ConfigError, match="val_fraction: expected at least one training image per class"):
        make_split(source, val_fraction=0.96, val_choice="last")


@needs_cifar100
def test_protocol_a_measures_the_last_fifty_images_of_each_class():
    overrides = ["scenario=cifar100", "scenario.num_tasks=20", "scenario.val_fraction=0.1", "scenario.val_choice=last"]
    split = build_scenario(configure(*overrides, "scenario.normalisation=symmetric"))
    source = cifar100(root=str(DATA), download=False)
    for task in (split.tasks[0], split.tasks[19]):
        assert (len(task.train), len(task.val)) == (2250, 250)
        for c in split.list_class_ids(task):
            own = np.flatnonzero(source.train_labels == c)
            held = task.val.index[task.val.labels == c]  # natural order: positions are class ids
            assert held.tolist() == own[450:].tolist()
    x = split.transform.normalise(split.tasks[0].train.images)
    assert x.min() == -1
    assert x.max() == 1


NORMALISED = {
    "standard": lambda x, train: (x - 0.5) / 0.25,  # the mean and std of the toy images
    "unit": lambda x, train: x,
    "symmetric": lambda x, train: 2 * x - 1,
    "mean_image": lambda x, train: x - train.mean(axis=0),
}


@pytest.mark.parametrize("name", NORMALISED)
def test_normalisation_by_key(name):
    source = toy_images(channels=3)
    split = make_split(source, normalisation=name, val_fraction=0.5)  # the mean image is that of all training images
    raw = split.tasks[1].test.images
    expected = NORMALISED[name](raw.numpy() / 255, source.train_images / 255)
    x = split.transform.normalise(raw)
    np.testing.assert_allclose(x.numpy(), expected, atol=1e-6)
    assert torch.equal(split.transform.recover_pixels(x), raw)
    assert len(split.transform.mean) == len(split.transform.std) == 3
    with pytest.raises(ConfigError, match="normalisation: expected one of standard, unit, symmetric, mean_image"):
        build_scenario(configure("scenario=digits", "scenario.normalisation=zero"))


@pytest.mark.parametrize("missing", [1, 3])
@pytest.mark.parametrize("kind", ["train", "test"])
def test_a_class_without_images_is_named(kind, missing):
    source = toy_images()
    labels = getattr(source, f"{kind}_labels")
    kept = {f"{kind}_{what}": getattr(source, f"{kind}_{what}")[labels != missing] for what in ("images", "labels")}
    with pytest.raises(ConfigError, match=f"source: .*got {kind} images of 3, none of class {missing}"):
        make_split(dataclasses.replace(source, **kept))


def test_classes_for_pretraining_are_part_of_no_task():
    source = toy_images(num_classes=6)
    order = [5, 0, 3, 1, 4, 2]
    held = make_split(source, pretrain_classes=2, class_order=order, val_fraction=0.5)
    assert held.pretrain_order == [5, 0]
    assert held.class_order == [3, 1, 4, 2]
    assert held.num_classes == 4
    assert [held.list_class_ids(t) for t in held.tasks] == [[3, 1], [4, 2]]
    for data, ids in ((held.pretrain, [5, 0]), *((t.train, held.class_order) for t in held.tasks)):
        assert torch.tensor(ids)[data.labels].tolist() == source.train_labels[data.index.numpy()].tolist()
    assert len(held.pretrain) == 2 * 3  # validation images are held out of these classes, too
    assert len(make_split(source).pretrain) == 0


def test_subsets_are_drawn_by_the_data_seed_only():
    def chosen(**keys):
        return [t.train.index.tolist() for t in make_split(train_per_class=2, test_per_class=1, **keys).tasks]

    assert chosen() == chosen()
    assert chosen() != chosen(data_seed=1)
    by_class = {c: set() for c in range(4)}
    for keys in ({}, {"class_order": "random", "class_order_seed": 3}):
        for task in make_split(train_per_class=2, **keys).tasks:
            for index in task.train.index.tolist():
                by_class[index % 4].add(index)  # toy labels repeat 0 1 2 3
    assert all(len(indices) == 2 for indices in by_class.values())  # the order of classes changes no choice of images


def test_sizes_of_tasks():
    assert choose_task_sizes(100, 20, None) == [5] * 20
    assert choose_task_sizes(100, 10, [50, 10, 10, 10, 10, 10]) == [50, 10, 10, 10, 10, 10]
    with pytest.raises(ConfigError, match=r"one of \[1, 2, 4, 5, 10, 20, 25, 50, 100\]; got 15") as caught:
        choose_task_sizes(100, 15, None)
    suggested = [7] * 10 + [6] * 5
    assert f"classes_per_task={suggested}" in str(caught.value)
    assert choose_task_sizes(100, 15, suggested) == suggested
    for wrong in ([], [50, 49], [101, -1], [0, 100]):
        with pytest.raises(ConfigError, match="classes_per_task: expected positive numbers that add up to 100"):
            choose_task_sizes(100, 10, wrong)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"train_per_class": 7}, "train_per_class: expected 1 to 6 images per class"),
        ({"test_per_class": 0}, "test_per_class: expected 1 to 6"),
        ({"val_fraction": 1.0}, r"val_fraction: expected a number in \[0, 1\)"),
        ({"val_fraction": 0.95}, "at least one training image per class .*none left of class 0, class 1"),
        (
            {"val_fraction": 0.1, "train_per_class": 1},
            "val_fraction: .*none left of class 0, class 1, class 2, class 3 at 0.1",
        ),
        ({"data_seed": -1}, "data_seed: expected a whole number"),
        ({"pretrain_classes": 4}, "pretrain_classes: expected 0 to 3 classes"),
        ({"pretrain_classes": -1}, "pretrain_classes: expected 0 to 3 classes"),
        ({"pretrain_classes": 1}, "num_tasks: expected a number that divides 3"),
        ({"num_tasks": 0}, "num_tasks: expected a number that divides 4"),
    ],
)
def test_wrong_keys_are_refused(keys, message):
    with pytest.raises(ConfigError, match=message):
        make_split(**keys)


def test_digits():
    source = digits()
    assert source.train_images.shape == (1437, 1, 8, 8)
    assert source.test_images.shape == (360, 1, 8, 8)
    assert source.train_images.dtype == np.uint8
    from sklearn.datasets import load_digits

    theirs = load_digits()
    test = np.arange(1797) % 5 == 0
    assert (source.train_images[:, 0] == np.rint(theirs.images[~test] * 255 / 16)).all()
    assert (source.test_labels == theirs.target[test]).all()
    assert source.train_images.max() == 255
    assert np.bincount(source.test_labels, minlength=10).min() > 25


def test_missing_and_damaged_cifar100(tmp_path):
    with pytest.raises(ConfigError, match=r"no such files.*quickstart needs no download") as caught:
        cifar100(root=str(tmp_path), download=False)
    assert str(tmp_path / "cifar-100-python") in str(caught.value)
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name in ("train", "test", "meta"):
        (folder / name).write_bytes(b"cos\nsystem\n(S'echo pickled code ran'\ntR.")  # must never be unpickled
    with pytest.raises(ConfigError, match=r"the official CIFAR-100 file .*train.*; got a damaged or different file"):
        cifar100(root=str(tmp_path), download=False)


def test_a_failed_download_says_where_to_get_the_files(tmp_path, monkeypatch):
    import torchvision

    def unreachable(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.datasets.utils, "download_and_extract_archive", unreachable)
    with pytest.raises(ConfigError, match=r"fetching it failed \(no route to host\)"):
        cifar100(root=str(tmp_path), download=True)


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """A small archive in place of the published one -> its path on the web, and where the data go."""
    import torchvision

    contents = {name: name.encode() * 10_000 for name in ("train", "test", "meta")}
    path = tmp_path / "web" / "cifar-100-python.tar.gz"
    path.parent.mkdir()
    with tarfile.open(path, "w:gz") as tar:
        for name, content in contents.items():
            member = tarfile.TarInfo(f"cifar-100-python/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    for name, value in {"url": path.as_uri(), "tgz_md5": md5(path.read_bytes()).hexdigest()}.items():
        monkeypatch.setattr(torchvision.datasets.CIFAR100, name, value)
    files = dataclasses.replace(cifar100_module.FILES, md5={name: md5(c).hexdigest() for name, c in contents.items()})
    monkeypatch.setattr(cifar100_module, "FILES", files)
    monkeypatch.setattr(torchvision.datasets.utils, "_get_redirect_url", lambda url, max_hops: url)
    monkeypatch.setattr(torchvision.datasets.utils, "_urlretrieve", lambda url, to: shutil.copyfile(path, to))
    return path, tmp_path / "data"


def files_of(root) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (root / "cifar-100-python").iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.2])
def test_two_processes_fetch_cifar100_once(archive, monkeypatch, delay):
    path, root = archive
    extract = torchvision_utils().extract_archive

    def slow(*args, **kwargs):
        with (path.parent / "extracted").open("a") as file:
            file.write("x")
        extract(*args, **kwargs)
        time.sleep(0.4)  # for the other one to come while all is extracted and not in its place

    monkeypatch.setattr(torchvision_utils(), "extract_archive", slow)

    def fetch(seconds: float) -> None:
        time.sleep(seconds)
        if not cifar100_module.FILES.is_there(root):
            cifar100_module.FILES.fetch_missing(root, download=True)
        assert files_of(root) == {name: name.encode() * 10_000 for name in ("train", "test", "meta")}

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=fetch, args=(seconds,)) for seconds in (0.0, delay)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert (path.parent / "extracted").read_text() == "x"
    assert sorted(p.name for p in root.iterdir()) == [
        ".cifar-100-python.lock", "cifar-100-python", "cifar-100-python.tar.gz"
    ]  # fmt: skip


def test_a_fetch_that_was_killed_is_made_again(archive):
    path, root = archive
    (root / "cifar-100-python").mkdir(parents=True)
    (root / "cifar-100-python" / "train").write_bytes(b"of somebody else")
    (root / ".cifar-100-python.partial" / "cifar-100-python").mkdir(parents=True)
    (root / "cifar-100-python.tar.gz").write_bytes(path.read_bytes()[:100])
    cifar100_module.FILES.fetch_missing(root, download=True)
    assert files_of(root)["train"] == b"train" * 10_000
    path.unlink()
    (root / "cifar-100-python" / "meta").unlink()
    with pytest.MonkeyPatch.context() as patch:  # the archive is there: nothing is fetched
        patch.setattr(torchvision_utils(), "_urlretrieve", None)
        cifar100_module.FILES.fetch_missing(root, download=True)
    assert files_of(root)["meta"] == b"meta" * 10_000


def torchvision_utils():
    from torchvision.datasets import utils

    return utils


@needs_cifar100
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Avalanche's imports warn; they are not ours to mend
def test_the_split_is_avalanches():
    from avalanche.benchmarks.classic import SplitCIFAR100

    order = np.random.RandomState(7).permutation(100).tolist()
    ours = Split(
        source=cifar100(root=str(DATA), download=False), **(SPLIT_KEYS | {"num_tasks": 10, "class_order": order})
    )
    theirs = SplitCIFAR100(
        n_experiences=10, fixed_class_order=order, dataset_root=DATA / "cifar-100-python" / "..", return_task_id=False
    )
    for task, train, test in zip(ours.tasks, theirs.train_stream, theirs.test_stream):
        assert set(ours.list_class_ids(task)) == set(train.classes_in_this_experience)
        for data, experience in ((task.train, train), (task.test, test)):
            targets = sorted(experience.dataset.targets)  # Avalanche sorts a task's images by class
            assert sorted(torch.tensor(ours.class_order)[data.labels].tolist()) == targets
    images = {image.numpy().tobytes() for image in ours.tasks[9].test.images}
    loaded = theirs.test_stream[9].dataset.eval()
    assert images == {tv_to_uint8(loaded[i][0]).numpy().tobytes() for i in range(len(loaded))}


def tv_to_uint8(normalised: torch.Tensor) -> torch.Tensor:
    """Undo Avalanche's CIFAR-100 normalisation."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)))
    return ((normalised * std + mean) * 255).round().to(torch.uint8)


def test_shared_labels_are_places_within_the_tasks():
    disjoint = make_split(num_tasks=2, class_order=[3, 1, 0, 2], val_fraction=0.5)
    shared = SharedLabels(disjoint=disjoint)
    assert shared.num_classes == 2
    assert [t.classes for t in shared.tasks] == [range(2), range(2)]
    for mine, theirs in zip(shared.tasks, disjoint.tasks):
        for part in ("train", "val", "test"):
            a, b = getattr(mine, part), getattr(theirs, part)
            assert torch.equal(a.images, b.images)
            assert torch.equal(a.index, b.index)
            assert torch.equal(a.labels + 2 * theirs.id, b.labels)
    with pytest.raises(ConfigError, match=r"disjoint: expected tasks with equally many classes.*got tasks of 1 and 3"):
        SharedLabels(disjoint=make_split(classes_per_task=[1, 3]))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method=lwf"], "method: expected one that can learn tasks with shared labels"),
        (["backbone=den_mlp", "method=den"], "method: expected one that can learn tasks with shared labels"),
        (["method=er", "buffer=herding"], "buffer: expected one without a quota per class"),
    ],
)
def test_what_counts_on_new_classes_is_refused_where_labels_are_shared(overrides, message):
    with pytest.raises(ConfigError, match=message):
        build(configure("scenario=permuted_digits_shared", "scenario.disjoint.num_tasks=2", *overrides, "device=cpu"))


ONLINE = ["er_ace", "agem", "mir", "gdumb", "ocs", "scr"]
"""Methods with a buffer that is filled during a task."""


@pytest.mark.parametrize(
    "method", ["finetune", "joint", "er", "derpp", "ewc", "supsup", "supsup_nns", "ewc_pp", *ONLINE]
)
def test_what_does_not_is_built(method):
    buffer = "reservoir" if method in ("er", "derpp", *ONLINE) else "none"
    keys = ["scenario=permuted_digits_shared", "scenario.disjoint.num_tasks=2", f"method={method}", f"buffer={buffer}"]
    assert build(configure(*keys, "device=cpu")).describe()["tasks"] == [list(range(10))] * 2
