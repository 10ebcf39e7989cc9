"""What every method promises, and the loss on three images against numpy."""

from pathlib import Path

import numpy as np
import torch

from cl_bench.config.build import build
from cl_bench.config.schema import compose_config
from cl_bench.testing import SMALL, check_method

CONFIGS = Path(__file__).parent.parent / "mylab" / "configs"
NETWORK = ["backbone=mlp", "backbone.hidden=[32]"]


def test_feature_pull_keeps_the_contract():
    check_method("feature_pull", *NETWORK, config_dir=CONFIGS)


def test_the_loss_is_its_equation():
    overrides = [*SMALL, *NETWORK, "method=feature_pull", "method.strength=0.5", "device=cpu"]
    parts = build(compose_config(overrides, CONFIGS))
    method = parts.method.double()
    with torch.no_grad():
        method.net.head.weight.add_(0.1)
        method.net.trunk[1][0].weight.add_(0.1)  # away from the old network
    images = parts.scenario.tasks[1].train.images[:3]
    x, y = parts.scenario.transform.normalise(images).double(), torch.tensor([5, 6, 7])
    losses, _ = method.terms({"x": x, "y": y}, task=1)

    new, old = (net.features(x).detach().numpy() for net in (method.net, method.teacher.net))
    scores = new @ method.net.head.weight.detach().numpy().T + method.net.head.bias.detach().numpy()
    chances = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(losses["ce"].item(), -np.log(chances[range(3), y.numpy()]).mean())
    pull = 0.5 / 32 * ((new - old) ** 2).sum(axis=1).mean()
    assert pull > 1e-4
    np.testing.assert_allclose(losses["pull"].item(), pull)
    assert set(method.terms({"x": x, "y": y}, task=0)[0]) == {"ce"}
