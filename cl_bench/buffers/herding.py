"""Herding selection of iCaRL (Rebuffi, Kolesnikov, Sperl, Lampert, CVPR 2017, Algorithm 4)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_bench.buffers.base import Describe, PerClassBuffer, describe_in_chunks
from cl_bench.core.types import Data


class Herding(PerClassBuffer):
    """floor(M / classes seen) images of every class whose mean feature follows the class's mean most closely.

    Features are the method's ``features`` on un-augmented images, scaled to unit length.
    """

    def rank(self, data: Data, describe: Describe) -> Tensor:
        """(N,) minus each image's rank in the herding order of its class."""
        features = F.normalize(describe_in_chunks(data, self.transform, describe)["features"].float(), dim=1)
        scores = torch.empty(len(data))
        for c in data.labels.unique():
            (of_class,) = torch.nonzero(data.labels == c, as_tuple=True)
            order = compute_herding_order(features[of_class]).cpu()
            scores[of_class.cpu()[order]] = -torch.arange(len(order), dtype=torch.float32)
        return scores


def compute_herding_order(features: Tensor) -> Tensor:
    """(n, D) unit features of one class -> (n,) their order of selection.

    p_k = argmin over the remaining x of || mu - (phi(x) + sum_{j<k} phi(p_j)) / k ||, mu the mean over the class.
    """
    mean = features.mean(dim=0)
    chosen = torch.zeros_like(mean)
    left = torch.ones(len(features), dtype=torch.bool, device=features.device)
    order = torch.empty(len(features), dtype=torch.int64, device=features.device)
    for k in range(len(features)):
        distance = (mean - (features + chosen) / (k + 1)).norm(dim=1)
        best = (
            distance.masked_fill(~left, torch.inf).argmin().view(1)
        )  # shape (1,): indexing with it does not wait for a GPU
        order[k : k + 1] = best
        left.index_fill_(0, best, False)
        chosen = chosen + features.index_select(0, best).squeeze(0)
    return order
