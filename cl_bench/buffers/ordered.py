"""The first images of every class, for a method that puts them in order."""

import torch
from torch import Tensor

from cl_bench.buffers.base import Describe, PerClassBuffer
from cl_bench.core.types import Data


class Ordered(PerClassBuffer):
    """floor(M / classes seen) images of every class, the first ones in the order in which the method gives them.

    OCS gives its best images first. Other methods give a task's training images in the order of the data set.
    """

    def rank(self, data: Data, describe: Describe) -> Tensor:
        """(N,) the later, the lower."""
        return -torch.arange(len(data), dtype=torch.float64)
