"""The confidence-aware buffer of the Lifelong Vision Transformer (Wang et al. 2022)."""

from torch import Tensor

from cl_bench.buffers.base import Describe, PerClassBuffer, describe_in_chunks
from cl_bench.core.types import Data


class ConfidenceAware(PerClassBuffer):
    """floor(M / classes seen) images of every class, the most confident ones.

    The confidence of (x, y) is the method's softmax probability of y for the un-augmented image, measured once, at the
    end of the task.
    """

    def rank(self, data: Data, describe: Describe) -> Tensor:
        """(N,) confidences."""
        return describe_in_chunks(data, self.transform, describe)["confidence"].cpu()
