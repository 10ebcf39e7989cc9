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


class SingleHead(Backbone):
    """A network that is its features and one linear head on them."""

    head: nn.Module
    """(B, D) -> (B, K)."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, K) logits."""
        return self.head(self.features(x))
