"""The residual layers of a CIFAR ResNet18 (He et al. 2016, basic block, projection shortcut)."""

import torch.nn.functional as F
from torch import Tensor, nn

from cl_bench.backbones.layers.memory_format import put_channels_innermost


class BasicBlock(nn.Module):
    """relu( BN(conv(relu(BN(conv x)))) + shortcut(x) ), 3 x 3 convolutions without bias."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), nn.BatchNorm2d(channels_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, H / stride, W / stride)."""
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x), inplace=True)


def build_resnet_layers(channels_in: int, width: int, num_layers: int) -> nn.Sequential:
    """The CIFAR stem (one 3 x 3 convolution, no pooling) and the first ``num_layers`` of ResNet18's four layers.

    Layer i has two blocks of ``width * 2^i`` channels; all but the first halve the map: (B, channels_in, H, W) ->
    (B, width * 2^(num_layers - 1), H / 2^(num_layers - 1), ...).
    """
    stem = nn.Sequential(
        nn.Conv2d(channels_in, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
    )
    layers, channels = [stem], width
    for i in range(num_layers):
        out = width * 2**i
        layers.append(nn.Sequential(BasicBlock(channels, out, 1 if i == 0 else 2), BasicBlock(out, out, 1)))
        channels = out
    net = nn.Sequential(*layers)
    put_channels_innermost(net)
    return net
