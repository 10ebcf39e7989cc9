"""Confidence-aware memory update of the Lifelong Vision Transformer (Wang et al. 2022)."""

from torch import Tensor

from cl_bench.buffers.base import Describe, PerClassBuffer, described_in_chunks
from cl_bench.core.types import Data


class ConfidenceAware(PerClassBuffer):
    """floor(M / classes seen) images of every class, the most confident ones.

    The confidence of (x, y) is the softmax probability of y under the method's own answer on the un-augmented image,
    taken once, when the task is closed.
    """

    def rank(self, data: Data, describe: Describe) -> Tensor:
        """(N,) confidences."""
        return described_in_chunks(data, self.transform, describe)["confidence"].cpu()
