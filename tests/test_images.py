"""Images that stay on the host, and pictures of one's own: the same batches as from the device's memory."""

import json

import numpy as np
import pytest
import torch
from helpers import TINY, command, configure, parts_of, toy_images, trainer_of, write_pictures

from cl_bench.config.build import build
from cl_bench.core.images import HostImages
from cl_bench.core.types import Data
from cl_bench.data import feed as feeding
from cl_bench.data.feed import open_feed
from cl_bench.scenarios import base

CPU = torch.device("cpu")


def data_of(images: torch.Tensor) -> Data:
    return Data(images, torch.arange(len(images)), torch.arange(len(images)))


def mapped(tmp_path, images: np.ndarray) -> torch.Tensor:
    np.save(tmp_path / "images.npy", images)
    return torch.from_numpy(np.load(tmp_path / "images.npy", mmap_mode="c"))


def test_host_images_are_indexed_like_the_tensor_they_stand_for(tmp_path):
    whole = torch.from_numpy(toy_images().train_images)
    rows = torch.tensor([5, 0, 7, 7, 3, 11])
    ours, expected = HostImages.from_rows(mapped(tmp_path, whole.numpy()), rows, CPU), whole[rows]
    assert ours.shape == expected.shape
    assert ours.numel() == expected.numel()
    for which in (torch.tensor([3, 0]), torch.arange(6) % 2 == 0, slice(1, 4), slice(None)):
        assert torch.equal(ours[which], expected[which])
    assert torch.equal(ours.cpu(), expected)


def test_sets_are_joined_without_a_copy_wherever_they_lie(tmp_path):
    whole = torch.from_numpy(toy_images().train_images)
    on_disk = data_of(HostImages.from_rows(mapped(tmp_path, whole.numpy()), torch.arange(4, 10), CPU))
    both = Data.concatenate([on_disk, data_of(whole[:3]), on_disk])
    assert isinstance(both.images, HostImages)
    expected = torch.cat([whole[4:10], whole[:3], whole[4:10]])
    which = torch.randperm(len(expected), generator=torch.Generator().manual_seed(0))
    assert torch.equal(both.images[which], expected[which])
    assert [len(chunk) for chunk in both.split(4)] == [4, 4, 4, 3]
    assert torch.equal(torch.cat([chunk.images for chunk in both.split(4)]), expected)


@pytest.mark.parametrize("start", [0, 2])
def test_batches_that_are_looked_up_ahead_are_the_same(start):
    whole = torch.from_numpy(toy_images().train_images)
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(1))
    host = data_of(HostImages.from_rows(whole, torch.arange(len(whole)), CPU))
    with open_feed(host, order, 5) as ahead, open_feed(data_of(whole), order, 5) as resident:
        for step in range(start, 5):
            ours, theirs = ahead.load_batch(step), resident.load_batch(step)
            assert torch.equal(ours[0], theirs[0])
            assert torch.equal(ours[1], theirs[1])
            assert len(ahead._coming) == min(feeding.AHEAD, 4 - step)


def test_an_error_of_the_disk_reaches_the_loop():
    class Broken(HostImages):
        def __getitem__(self, which):
            raise OSError("unplugged")

    whole = torch.from_numpy(toy_images().train_images)
    broken = Broken([whole], torch.zeros(len(whole), 2, dtype=torch.int64), CPU)
    with open_feed(data_of(broken), torch.arange(10), 5) as images, pytest.raises(OSError, match="unplugged"):
        images.load_batch(0)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["er", "icarl", "joint", "lvt"])
def test_a_run_from_the_host_is_the_run_from_the_device(method, tmp_path):
    records, states = [], []
    for place, kind in (("host", HostImages), ("device", torch.Tensor)):
        trainer = trainer_of(parts_of(method, f"images={place}"), tmp_path / place)
        assert isinstance(trainer.scenario.tasks[0].train.images, kind)
        records.append(trainer.run().to_json()["class_il"])
        states.append(trainer.method.state_dict())
    assert records[0] == records[1]
    ours, theirs = states
    for name, value in ours.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, theirs[name]), name


@pytest.mark.slow
def test_images_that_do_not_fit_stay_in_their_file(tmp_path, monkeypatch):
    root = write_pictures(tmp_path / "mine")
    settings = ["scenario=folder", f"data_dir={root}", "scenario.num_tasks=3", "scenario.source.size=8", "device=cpu"]
    config = configure(*settings, "method=er", "buffer=reservoir", "buffer.capacity=20", "trainer.epochs=1")
    fits = build(config)
    assert isinstance(fits.scenario.tasks[0].train.images, torch.Tensor)
    assert fits.describe()["images"] == "device"
    monkeypatch.setattr(base, "get_free_bytes", lambda device: 1000)
    large = build(config)
    assert isinstance(large.scenario.tasks[0].train.images, HostImages)
    assert large.describe()["images"] == "host"
    records = [trainer_of(parts, tmp_path / str(n)).run() for n, parts in enumerate((fits, large))]
    assert records[0].to_json()["class_il"] == records[1].to_json()["class_il"]


@pytest.mark.slow
def test_the_command_learns_a_folder_of_pictures(tmp_path):
    write_pictures(tmp_path / "mine")
    done = command(
        *["scenario=folder", "data_dir=mine", "scenario.num_tasks=3", "scenario.source.size=8", "logger=none"],
        *[argument for argument in TINY if argument.startswith("device")],
        *["trainer.epochs=1", "images=host"],
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    (summary,) = (tmp_path / "results").rglob("summary.json")
    assert json.loads(summary.read_text())["images"] == "host"
