"""Buffers: capacity at every moment, quotas, what is kept, and state."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import batch_of, buffer_context
from hypothesis import given, settings
from hypothesis import strategies as st

from cl_bench.buffers.base import Buffer
from cl_bench.buffers.class_balanced import ClassBalanced
from cl_bench.buffers.confidence_aware import ConfidenceAware
from cl_bench.buffers.fixed_memory import FixedMemory
from cl_bench.buffers.greedy import Greedy
from cl_bench.buffers.herding import Herding, compute_herding_order
from cl_bench.buffers.none import NoBuffer
from cl_bench.buffers.reservoir import Reservoir
from cl_bench.buffers.ring import Ring
from cl_bench.core.errors import ConfigError
from cl_bench.core.types import Data, Task

PER_CLASS = [FixedMemory, ConfidenceAware, Herding]
"""Filled at the end of a task."""

ONLINE = [Reservoir, ClassBalanced, Greedy, Ring]
"""Filled while it is learned."""

POLICIES = [*ONLINE, *PER_CLASS]


def task_of(number: int, classes: range, per_class: int) -> Task:
    """A task whose image i is filled with the byte i, so that an image tells which it is."""
    labels = torch.tensor([c for c in classes for _ in range(per_class)])
    shuffled = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(number))]
    images = torch.arange(len(labels)).view(-1, 1, 1, 1).expand(-1, 1, 8, 8).to(torch.uint8)
    data = Data(images.contiguous(), shuffled, torch.arange(len(labels)))
    return Task(number, classes, data, data.take(slice(0)), data)


def describe(x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
    """The brighter, the more confident; logits tell the image as well."""
    brightness = x.mean(dim=(1, 2, 3))
    logits = torch.stack([brightness, y.float()], dim=1)
    return {"confidence": brightness, "logits": logits, "features": x.flatten(1)}


def feed(buffer: Buffer, task: Task, batch_size: int, check) -> None:
    for start in range(0, len(task.train), batch_size):
        part = task.train.take(slice(start, start + batch_size))
        buffer.add(
            batch_of(part.images, part.labels, task.id), logits=describe(part.images.float(), part.labels)["logits"]
        )
        check()
    buffer.close_task(task, describe, keep=("logits",))
    check()


@settings(max_examples=40, deadline=None)
@given(
    policy=st.sampled_from(POLICIES),
    capacity=st.integers(4, 40),
    per_class=st.integers(1, 12),
    batch_size=st.integers(1, 9),
    sizes=st.lists(st.integers(1, 2), min_size=1, max_size=2),
)
def test_capacity_is_never_exceeded(policy, capacity, per_class, batch_size, sizes):
    buffer = policy(capacity=capacity, context=buffer_context(num_classes=4))
    offered, start = 0, 0

    def check():
        assert len(buffer) <= capacity
        assert len(buffer.images) == len(buffer.labels) == capacity
        assert all(len(column) == capacity for column in buffer.columns.values())
        sample = buffer.sample(7)
        assert len(sample) == min(7, len(buffer))
        assert len({(*image.flatten().tolist(), int(y)) for image, y in zip(sample.raw, sample.y)}) == len(sample)

    for number, size in enumerate(sizes):
        task = task_of(number, range(start, start + size), per_class)
        start += size
        offered += len(task.train)
        feed(buffer, task, batch_size, check)
        held = torch.bincount(buffer.labels[: len(buffer)], minlength=4).tolist()
        share = min((capacity // 4) if policy is Ring else (capacity // start), per_class)
        if policy in ONLINE:
            assert buffer.slot_task[: len(buffer)].max() == number
            assert (buffer.slot_task[len(buffer) :] == -1).all()
        if policy is Reservoir:
            assert len(buffer) == min(capacity, offered)
        elif policy in (ClassBalanced, Greedy):  # what is left over belongs to some class
            assert len(buffer) == min(capacity, offered) or all(n >= share for n in held[:start])
            assert all(share <= n for n in held[:start])
            if policy is Greedy and len(buffer) == capacity:
                assert max(held[:start]) - min(held[:start]) <= 1
        else:
            assert held == [share if c < start else 0 for c in range(4)]


def test_confidence_aware_keeps_the_most_confident_of_each_class():
    buffer = ConfidenceAware(capacity=12, context=buffer_context(num_classes=4))
    first, second = task_of(0, range(0, 2), 10), task_of(1, range(2, 4), 10)
    for task in (first, second):
        buffer.close_task(task, describe, keep=("logits",))
    labels = buffer.labels[:12]
    for task in (first, second):
        for c in task.classes:
            brightest = sorted(task.train.images[task.train.labels == c][:, 0, 0, 0].tolist(), reverse=True)[:3]
            assert buffer.images[:12][labels == c][:, 0, 0, 0].tolist() == brightest  # in descending confidence
            stored = buffer.columns["logits"][:12][labels == c]
            torch.testing.assert_close(stored[:, 0] * 255, torch.tensor(brightest).float())
            assert (stored[:, 1] == c).all()


def test_fixed_memory_is_a_random_choice():
    def kept(seed):
        buffer = FixedMemory(capacity=8, context=buffer_context(num_classes=4, seed=seed))
        buffer.close_task(task_of(0, range(4), 10), describe)
        return buffer.images[:, 0, 0, 0].tolist()

    assert kept(0) == kept(0)
    assert kept(0) != kept(1)


def test_reservoir_is_the_sequential_algorithm():
    """Replaying the same draws one image at a time, as Vitter writes it, gives the same memory."""
    buffer = Reservoir(capacity=5, context=buffer_context(seed=3))
    draws = torch.Generator().manual_seed(3)
    memory: list[int] = []
    for start in range(0, 60, 6):
        values = torch.arange(start, start + 6)
        raw = values.view(-1, 1, 1, 1).expand(-1, 1, 8, 8).to(torch.uint8)
        buffer.add(batch_of(raw, values % 4), logits=values.float()[:, None])
        uniform = torch.rand(6, generator=draws, dtype=torch.float64)
        for i, (value, u) in enumerate(zip(values.tolist(), uniform.tolist())):
            seen = start + i
            if seen < 5:
                memory.append(value)
            elif int(u * (seen + 1)) < 5:
                memory[int(u * (seen + 1))] = value
        assert buffer.images[: len(buffer), 0, 0, 0].tolist() == memory
        assert buffer.columns["logits"][: len(buffer), 0].tolist() == memory
        assert buffer.labels[: len(buffer)].tolist() == [value % 4 for value in memory]


@pytest.mark.slow
def test_reservoir_keeps_every_image_with_the_same_probability():
    kept = torch.zeros(40)
    runs = 600
    for seed in range(runs):
        buffer = Reservoir(capacity=10, context=buffer_context(seed=seed))
        for start in range(0, 40, 8):
            values = torch.arange(start, start + 8)
            raw = values.view(-1, 1, 1, 1).expand(-1, 1, 8, 8).to(torch.uint8)
            buffer.add(batch_of(raw, values % 4))
        kept += torch.bincount(buffer.images[:, 0, 0, 0].long(), minlength=40)
    # Binomial(600, 1/4): mean 150, standard deviation 10.6; five of them for the farthest of forty
    assert (kept - runs / 4).abs().max() < 53


@pytest.mark.parametrize("policy", POLICIES)
def test_state_goes_to_another_buffer(policy):
    def filled(seed, steps):
        buffer = policy(capacity=8, context=buffer_context(seed=seed))
        for number in range(steps):
            feed(buffer, task_of(number, range(2 * number, 2 * number + 2), 6), 4, lambda: None)
        return buffer

    old, new = filled(0, 1), policy(capacity=8, context=buffer_context(seed=9))
    new.load_state_dict(old.state_dict())
    new.generator.set_state(old.generator.get_state())
    for buffer in (old, new):
        feed(buffer, task_of(1, range(2, 4), 6), 4, lambda: None)
    assert torch.equal(old.images, new.images)
    assert torch.equal(old.columns["logits"], new.columns["logits"])
    assert torch.equal(old.sample(5).raw, new.sample(5).raw)
    assert torch.equal(old.list_slots(without=1), new.list_slots(without=1))


def test_bytes_count_images_labels_and_columns():
    buffer = Reservoir(capacity=10, context=buffer_context())
    assert buffer.nbytes == 10 * 64 + 10 * 8
    buffer.add(batch_of(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1])), logits=torch.zeros(2, 4))
    assert buffer.nbytes == 10 * 64 + 10 * 8 + 10 * 4 * 4


def test_no_buffer_keeps_nothing():
    buffer = NoBuffer(capacity=0, context=buffer_context())
    feed(buffer, task_of(0, range(2), 3), 2, lambda: None)
    assert len(buffer) == buffer.nbytes == 0
    assert len(buffer.sample(3)) == 0


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("capacity", [0, -1])
def test_no_capacity_is_refused(policy, capacity):
    with pytest.raises(ConfigError, match=f"capacity: expected .*; got {capacity}"):
        policy(capacity=capacity, context=buffer_context())


@pytest.mark.parametrize("policy", [FixedMemory, ConfidenceAware, ClassBalanced, Greedy, Ring])
def test_less_than_one_image_a_class_is_refused(policy):
    with pytest.raises(ConfigError, match="capacity: expected at least 4 images, one per class"):
        policy(capacity=3, context=buffer_context(num_classes=4))


def test_herding_equals_a_brute_force_search():
    features = torch.nn.functional.normalize(torch.randn(9, 4, generator=torch.Generator().manual_seed(5)), dim=1)
    phi = features.double().numpy()
    mean, chosen = phi.mean(axis=0), []
    for k in range(1, 10):
        left = [i for i in range(9) if i not in chosen]
        chosen.append(min(left, key=lambda i: np.linalg.norm(mean - phi[[*chosen, i]].sum(axis=0) / k)))
    assert compute_herding_order(features).tolist() == chosen


def test_herding_keeps_each_classs_front():
    task = task_of(0, range(2), 6)
    noise = torch.randint(256, task.train.images.shape, generator=torch.Generator().manual_seed(6), dtype=torch.uint8)
    task = replace(task, train=replace(task.train, images=noise))
    buffer = Herding(capacity=4, context=buffer_context())
    buffer.close_task(task, describe)
    for c in range(2):
        images = task.train.images[task.train.labels == c]
        features = torch.nn.functional.normalize(images.flatten(1).float() / 255, dim=1)
        kept = buffer.images[:4][buffer.labels[:4] == c]
        assert torch.equal(kept, images[compute_herding_order(features)[:2]])


def stream(buffer: Buffer, labels: list[int], task: int = 0, size: int = 7, first: int = 0) -> None:
    """Offer images of these labels; image i is filled with the byte ``first + i``."""
    values = torch.arange(first, first + len(labels)).to(torch.uint8)
    for part in torch.arange(len(labels)).split(size):
        raw = values[part].view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
        buffer.add(batch_of(raw, torch.tensor(labels)[part], task))


def held(buffer: Buffer, label: int) -> list[int]:
    stored = buffer.data()
    return sorted(stored.images[stored.labels == label][:, 0, 0, 0].tolist())


def test_a_ring_keeps_the_last_images_of_a_class_in_each_task():
    context = replace(buffer_context(num_classes=2), pairs=4)  # two tasks that share two classes
    buffer = Ring(capacity=12, context=context)
    stream(buffer, [0, 1, 0, 0, 0, 1, 0])  # class 0: images 0, 2, 3, 4, 6
    assert held(buffer, 0) == [3, 4, 6]
    assert held(buffer, 1) == [1, 5]
    stream(buffer, [1, 1, 1, 1, 0], task=1, first=100)
    assert held(buffer, 0) == [3, 4, 6, 104]
    assert held(buffer, 1) == [1, 5, 101, 102, 103]
    assert sorted(buffer.sample(12, without=1).raw[:, 0, 0, 0].tolist()) == [1, 3, 4, 5, 6]
    assert Ring(capacity=1105, context=buffer_context(num_classes=85)).length == 13


def test_greedy_takes_the_first_images_and_makes_room_from_the_largest_class():
    buffer = Greedy(capacity=6, context=buffer_context(num_classes=4))
    stream(buffer, [0] * 9)
    assert held(buffer, 0) == [0, 1, 2, 3, 4, 5]
    stream(buffer, [1] * 9, first=20)
    assert len(held(buffer, 0)) == 3
    assert held(buffer, 1) == [20, 21, 22]
    stream(buffer, [2] * 9, first=40)
    assert [len(held(buffer, c)) for c in range(3)] == [2, 2, 2]
    stream(buffer, [3] * 9, first=60)
    assert sorted(len(held(buffer, c)) for c in range(4)) == [1, 1, 2, 2]
    assert held(buffer, 3)[0] == 60


def test_class_balanced_keeps_every_image_of_a_class_with_the_same_probability():
    kept = torch.zeros(60)
    runs = 600
    for seed in range(runs):
        buffer = ClassBalanced(capacity=10, context=buffer_context(num_classes=4, seed=seed))
        stream(buffer, [0] * 20)
        stream(buffer, [1, 0] * 20, first=20)  # class 0 goes on when its quota has fallen to 5
        assert [len(held(buffer, c)) for c in (0, 1)] == [5, 5]
        kept += torch.bincount(buffer.images[:, 0, 0, 0].long(), minlength=60)
    first = torch.cat([kept[:20], kept[21::2]])  # 40 images of class 0, 20 of class 1
    # Binomial(600, 1/8) and (600, 1/4): standard deviations 8.1 and 10.6; five of them for the farthest
    assert (first - runs / 8).abs().max() < 41
    assert (kept[20::2] - runs / 4).abs().max() < 53


def test_a_whole_set_is_offered_in_random_order():
    def taken(seed):
        buffer = Greedy(capacity=8, context=buffer_context(seed=seed))
        buffer.offer(task_of(0, range(4), 10).train, task=3)
        assert (buffer.slot_task == 3).all()
        assert buffer.offered == 40
        return buffer.images[:, 0, 0, 0].tolist()

    assert taken(0) == taken(0)
    assert taken(0) != taken(1)
