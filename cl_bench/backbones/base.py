"""What a network is.

Shapes: B images, C channels, H x W pixels, D features, K classes of the scenario.
"""

from abc import ABC, abstractmethod

from torch import Tensor, nn

from cl_bench.errors import require

MOST_LAYERS = 1000
"""Layers of a kind that a network may be asked for: building more takes minutes and ends in no memory."""


def check_layers(key: str, layers: int) -> None:
    """Refuse a number of layers that cannot be meant."""
    require(0 < layers <= MOST_LAYERS, key, expected=f"1 to {MOST_LAYERS} layers", got=layers, fix="2 to 24 are usual.")


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
