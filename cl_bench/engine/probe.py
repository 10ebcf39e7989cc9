"""The linear probe: how well a linear classifier separates the classes by the features of the trained network.

It is fitted after the last task, on the training images of ALL tasks. So it is no continual learner: its accuracy says
what the features contain, not what the method has kept. Held-out and test images are not among them.

Source: Soutif-Cormerais et al. 2023. As in their released code: features in evaluation mode of three augmented passes
over the training images, scaled to mean 0 and variance 1, and scikit-learn's logistic regression with its defaults
(L2, C = 1, L-BFGS) and at most 200 iterations.
"""

import warnings
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from cl_bench.backbones.base import Backbone
from cl_bench.core.errors import ConfigError
from cl_bench.methods.base import Method, Predict
from cl_bench.scenarios.base import Scenario

LINEAR_PROBE = "linear_probe"
"""Its name among the alternatives of ``summary.json``."""

PASSES, MOST_ITERATIONS = 3, 200
"""Passes over the training images, and iterations of L-BFGS."""

BATCH = 500


def require_features(method: Method) -> Backbone:
    """The method's network; :class:`ConfigError` if it has none with one set of features for all tasks."""
    net = getattr(method, "net", None)
    if not isinstance(net, Backbone):
        raise ConfigError(
            "trainer.linear_probe",
            expected="false, since this method has no network net with features",
            got=True,
            fix="Leave the key out, or take a method with one network for all tasks.",
        )
    return net


def fit_linear_probe(method: Method, scenario: Scenario, autocast: torch.autocast) -> Predict:
    """The rule (B, C, H, W) -> (B, K) of the linear classifier; -inf for a class without training images."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    net = require_features(method)
    method.eval()
    features, labels = _compute_features(net, scenario, autocast)
    scaler, classifier = StandardScaler(), LogisticRegression(max_iter=MOST_ITERATIONS)
    scaled = scaler.fit_transform(features)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the number of iterations is part of the protocol
        classifier.fit(scaled, labels)

    device = scenario.tasks[0].train.labels.device
    weight, bias = classifier.coef_, classifier.intercept_
    if len(weight) == 1:  # of two classes, scikit-learn keeps the second one's scores only
        weight, bias = np.vstack([0 * weight, weight]), np.append(0 * bias, bias)

    def send(values: Any) -> Tensor:
        return torch.as_tensor(values, dtype=torch.float32, device=device)

    mean, scale, weights, biases = send(scaler.mean_), send(scaler.scale_), send(weight), send(bias)
    classes = torch.as_tensor(classifier.classes_, device=device)

    def predict(x: Tensor, task_id: Tensor | None) -> Tensor:
        scaled = (net.features(x).float() - mean) / scale
        with torch.autocast(x.device.type, enabled=False):
            logits = scaled @ weights.T + biases
        return logits.new_full((len(x), scenario.num_classes), -torch.inf).index_copy_(1, classes, logits)

    return predict


@torch.no_grad()
def _compute_features(net: Backbone, scenario: Scenario, autocast: torch.autocast) -> tuple[np.ndarray, np.ndarray]:
    """(N, D) features and (N,) labels of all passes, on the host."""
    generator = Generator().manual_seed(0)
    features, labels = [], []
    for _ in range(PASSES):
        for task in scenario.tasks:
            for batch in task.train.split(BATCH):
                with autocast:
                    found = net.features(scenario.transform.augment(batch.images, generator))
                features.append(found.float().cpu())
                labels.append(batch.labels.cpu())
    return torch.cat(features).numpy(), torch.cat(labels).numpy()
