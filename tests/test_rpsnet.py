"""The network whose cost docs/methods/rpsnet.md states."""

import itertools

import pytest
import torch
from helpers import load_script

pytestmark = pytest.mark.arithmetic


@pytest.fixture(scope="module")
def rpsnet():
    return load_script("rpsnet")


def test_parameters_are_those_of_the_layers_and_the_newest_are_trained(rpsnet):
    widths = (4, 4, 4, 8, 8, 16, 16, 32, 32)  # a sixteenth
    net = rpsnet.RPSNet(widths, used=3)
    parameters, trained, before = 32 * 100 + 100, 32 * 100 + 100, 3
    for place, width in enumerate(widths):
        weights = 9 * before * width + (9 * width**2 if place else 0)
        own = weights + (3 * width if place == 0 else 6 * width)  # biases, and BatchNorm's scales and shifts
        widening = 9 * before * width if place and before != width else 0
        parameters += 8 * own + (widening + 3 * width if widening else 0)
        trained += own
        before = width
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert sum(p.numel() for p in net.list_trained()) == trained
    x, unused = torch.randn(2, 3, 32, 32), net.parts[3]
    net(x).sum().backward()
    assert all(p.grad is not None for p in net.list_trained())
    assert all(p.grad is None for p in unused.parameters())


def test_the_modules_in_use_are_those_drawn_so_far(rpsnet):
    drawn = [len({0, *draw}) for draw in itertools.product(range(8), repeat=2)]
    assert rpsnet.expect_used(0) == rpsnet.expect_used(1) == 1
    assert rpsnet.expect_used(4) == rpsnet.expect_used(5) == pytest.approx(sum(drawn) / len(drawn))


def test_a_run_is_the_sum_of_its_paths_epochs_and_images(rpsnet):
    images = 8 * 100 * (5_000 + 9 * 7_000)
    assert rpsnet.sum_over_run(dict.fromkeys(range(1, 5), (1.0, 0.0))) == pytest.approx(images)
    assert rpsnet.sum_over_run(dict.fromkeys(range(1, 5), (0.0, 1.0))) == pytest.approx(8 * 100 * 9 * 7_000)
