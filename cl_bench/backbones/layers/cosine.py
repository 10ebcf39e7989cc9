"""A head whose logits are cosines (Gidaris and Komodakis 2018; as in the code of ER-ACE, Caccia et al. 2022)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SCALE = 10.0
"""Largest logit."""


class CosineHead(nn.Module):
    """scale * cos(features, w_k) for each class k, without a bias; first weights as those of ``nn.Linear``.

    Args:
        width: D, the number of features.
    """

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_classes, width).uniform_(-(width**-0.5), width**-0.5))

    def forward(self, x: Tensor) -> Tensor:
        """(B, D) -> (B, K) logits in [-scale, scale]."""
        return SCALE * F.linear(F.normalize(x, dim=1), F.normalize(self.weight, dim=1))
