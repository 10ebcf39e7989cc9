"""What a network is.

Shapes: B images, C channels, H x W pixels, D features, K classes of the scenario.
"""

from abc import ABC, abstractmethod

from torch import Tensor, nn


class Backbone(nn.Module, ABC):
    """A network with one head over all K classes."""

    @abstractmethod
    def features(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, D), what the head reads."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, K) logits."""
