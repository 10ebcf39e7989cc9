"""Any model of the library timm by its name, with a linear head of ours.

The trunk is timm's model without its classifier: ``features`` is what timm gives the classifier. Nothing of timm's
training is used: no augmentation, no optimizer.

Departures: a model that needs the size of its images is built for the size that it gets. A model whose last map would
be smaller than 2 x 2 is refused, since pooling one pixel is no pooling.
"""

import difflib
import math
import sys
from collections.abc import Mapping
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_bench.backbones.base import LEAST_SIDE, SingleHead, turn_into_buffers
from cl_bench.backbones.layers.memory_format import put_channels_innermost
from cl_bench.backbones.layers.timm import check_options, keep_no_biases, say
from cl_bench.core.errors import ConfigError, require


class TimmModel(SingleHead):
    """A trunk of timm's, and a linear head.

    Args:
        name: as timm spells it, e.g. ``resnet18``, or with the tag of its weights, ``resnet18.a1_in1k``.
        pretrained: the trunk has timm's weights, which timm fetches.
        checkpoint: a file with weights of the model, saved by safetensors or torch, instead.
        normalisation: of the pixels: that of the ``scenario``, or the one that the ``model`` was trained with.
        size: side in pixels to which images are resized (bicubic); ``images`` for their own, ``model`` for the model's.
        frozen: the trunk stays as it is, in evaluation mode. Its weights are then buffers, so that a method trains,
            penalises and counts the head only.
        options: arguments of timm's ``create_model``: numbers, true or false, and lists of them.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        *,
        name: str,
        pretrained: bool,
        checkpoint: str | None,
        normalisation: Literal["scenario", "model"],
        size: int | str,
        frozen: bool,
        options: dict[str, Any],
        num_classes: int,
        image_shape: tuple[int, int, int],
        image_mean: list[float],
        image_std: list[float],
    ) -> None:
        super().__init__()
        _check_name(name)
        check_options(options)
        expected, fix = "null with pretrained=true", "Choose one of them."
        require(not (pretrained and checkpoint), "checkpoint", expected=expected, got=checkpoint, fix=fix)
        channels, config = image_shape[0], _get_config(name)
        self.size = _choose_size(size, image_shape, config.input_size)
        self.trunk = _create_trunk(name, pretrained, channels, self.size, options)
        keep_no_biases(self.trunk)
        put_channels_innermost(self.trunk)
        if checkpoint:
            _load_trunk(self.trunk, name, checkpoint)
        width = _measure_width(self.trunk, name, (channels, *self.size))
        scale, shift = torch.ones(channels), torch.zeros(channels)
        if normalisation == "model":
            expected, fix = f"scenario, since {name} has statistics of {len(config.mean)} channels", "Leave it out."
            require(len(config.mean) == channels, "normalisation", expected=expected, got=normalisation, fix=fix)
            mean, std = torch.tensor(config.mean), torch.tensor(config.std)
            scale, shift = torch.tensor(image_std) / std, (torch.tensor(image_mean) - mean) / std
        for key, values in {"scale": scale, "shift": shift}.items():
            self.register_buffer(key, values[:, None, None], persistent=False)
        self.frozen = frozen
        if frozen:
            turn_into_buffers(self.trunk)
            self.trunk.eval()
        self.head = nn.Linear(width, num_classes)

    def train(self, mode: bool = True) -> "TimmModel":
        """Set the mode of everything except a frozen trunk, which stays in evaluation mode."""
        super().train(mode)
        if self.frozen:
            self.trunk.eval()
        return self

    def features(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, D), what timm gives the model's classifier."""
        if x.shape[2:] != self.size:
            shrinks = self.size[0] < x.shape[2] or self.size[1] < x.shape[3]
            x = F.interpolate(x, size=self.size, mode="bicubic", antialias=shrinks)
        return self.trunk(x * self.scale + self.shift)


def _check_name(name: str) -> None:
    """Refuse a name that timm does not list: with a prefix, timm would fetch a stranger's model under it."""
    models, tagged = timm.list_models(), timm.list_pretrained()
    if name in models or name in tagged:
        return
    near = difflib.get_close_matches(name, models, n=3) or difflib.get_close_matches(name, tagged, n=3)
    raise ConfigError(
        "name",
        expected=f"one of the {len(models)} models of timm {timm.__version__}",
        got=name,
        fix=f"Did you mean {' or '.join(near)}?" if near else "timm.list_models('*vit*') lists them by a pattern.",
    )


def _get_config(name: str) -> Any:
    """What timm knows of a model's published weights: input size, normalisation, name of the classifier."""
    return timm.get_pretrained_cfg(name)


def _choose_size(size: int | str, image_shape: tuple[int, int, int], of_model: tuple[int, int, int]) -> tuple[int, int]:
    """(H, W) of the images that the trunk gets."""
    if size == "images":
        return image_shape[1], image_shape[2]
    if size == "model":
        return of_model[1], of_model[2]
    require(
        type(size) is int and size > 0,
        "size",
        expected="images, model or a side in pixels",
        got=size,
        fix="Try images.",
    )
    return int(size), int(size)


def _create_trunk(
    name: str, pretrained: bool, channels: int, size: tuple[int, int], options: Mapping[str, Any]
) -> nn.Module:
    """timm's model without its classifier, built for images of ``size`` if it needs to know."""
    more: dict[str, Any] = {"num_classes": 0, "in_chans": channels, **options}
    if _get_config(name).fixed_input_size:
        more["img_size"] = size[0] if size[0] == size[1] else size
    try:
        return timm.create_model(name, pretrained=pretrained, **more)
    except Exception as error:  # no network, no weights, an option that it has not, too small images: many kinds
        if options and isinstance(error, TypeError):
            expected, fix = f"arguments of {name}", "Leave out what it does not have."
            raise ConfigError("options", expected=expected, got=say(error), fix=fix) from error
        if pretrained:
            fix = "Without a network, download the file elsewhere and set backbone.checkpoint=PATH pretrained=false."
            raise ConfigError("pretrained", expected=f"weights of {name}", got=say(error), fix=fix) from error
        raise _refuse_size(name, size, say(error), 32) from error


def _load_trunk(trunk: nn.Module, name: str, checkpoint: str) -> None:
    """Load a file into the trunk, converted as timm converts the model's published files."""
    classifier = _get_config(name).classifier or ()
    dropped = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    convert = getattr(sys.modules[type(trunk).__module__], "checkpoint_filter_fn", None)
    try:
        state = timm.models.load_state_dict(checkpoint, weights_only=True)
        missing, surplus = trunk.load_state_dict(convert(state, trunk) if convert else state, strict=False)
        problem = [f"no {key}" for key in missing]
        problem += [f"an unknown {key}" for key in surplus if not key.startswith(tuple(f"{key}." for key in dropped))]
    except Exception as error:  # no such file, not a state dict, other shapes: also many kinds
        problem = [say(error)]
    require(
        not problem,
        "checkpoint",
        expected=f"a file with the weights of {name} (a state dict saved by safetensors or torch)",
        got=f"{checkpoint} ({', '.join(problem[:3])})",
        fix="Set backbone.name to the file's model, or take another file.",
    )


@torch.no_grad()
def _measure_width(trunk: Any, name: str, image_shape: tuple[int, ...]) -> int:
    """D of the trunk; refuse images that are too small for it."""
    x, training = torch.zeros(1, *image_shape), trunk.training
    trunk.eval()
    info = getattr(trunk, "feature_info", None)
    reduction = info[-1]["reduction"] if isinstance(info, list) and info else 32
    try:
        side, features = _measure_side(trunk, trunk.forward_features(x)), trunk(x)
    except Exception as error:  # a convolution of nothing, a window larger than the image
        raise _refuse_size(name, image_shape[1:], say(error), reduction) from error
    trunk.train(training)
    if side is not None and side < LEAST_SIDE:
        raise _refuse_size(name, image_shape[1:], f"a last map of {side} x {side}", reduction)
    require(features.ndim == 2, "name", expected="a model with one vector per image", got=name, fix="Try resnet18.")
    return features.shape[1]


def _measure_side(trunk: Any, found: Any) -> int | None:
    """The smaller side of a trunk's last map; for tokens, that of a square of as many. None if it is not known."""
    if isinstance(found, dict):
        found = found.get("patches")
    if isinstance(found, (list, tuple)):
        found = found[-1]
    if not isinstance(found, Tensor) or found.ndim not in (3, 4):
        return None
    if found.ndim == 4:
        channels_last = found.shape[3] == trunk.num_features != found.shape[1]
        return min(found.shape[1:3] if channels_last else found.shape[2:])
    return math.isqrt(max(0, found.shape[1] - getattr(trunk, "num_prefix_tokens", 0)))


def _refuse_size(name: str, size: tuple[int, ...], why: str, reduction: int) -> ConfigError:
    side = LEAST_SIDE * reduction
    return ConfigError(
        "name",
        expected=f"a model whose last map has {LEAST_SIDE} x {LEAST_SIDE} pixels or more for images of "
        f"{size[0]} x {size[1]}",
        got=f"{name} ({why})",
        fix=f"Try backbone.size={side} or more, or +backbone.options.patch_size=4 of a transformer, or "
        "+backbone.options.output_stride=8 of a convolutional network.",
    )
