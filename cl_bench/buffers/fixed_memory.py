"""A fixed number of images with an equal quota per class, drawn at random."""

import torch
from torch import Tensor

from cl_bench.buffers.base import Describe, PerClassBuffer
from cl_bench.core.types import Data


class FixedMemory(PerClassBuffer):
    """floor(M / classes seen) random images of every class (the memory of Rebuffi et al. 2017 without its herding)."""

    def rank(self, data: Data, describe: Describe) -> Tensor:
        """(N,) uniform draws."""
        return torch.rand(len(data), generator=self.generator)
