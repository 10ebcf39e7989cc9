"""What the backbones made of timm's models share."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from cl_bench.core.errors import require


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse options that are no numbers: a text could name a file or a class for timm to load."""
    ours = ("num_classes", "in_chans", "img_size", "pretrained", "features_only", "scriptable", "exportable", "no_jit")
    for key, value in options.items():
        numbers = value if isinstance(value, list) else [value]
        require(
            str(key) not in ours and all(isinstance(number, (int, float)) for number in numbers),
            "options",
            expected="numbers, true or false, or lists of them, for arguments that no other key sets",
            got=f"{key}={value}",
            fix="For example '+backbone.options.patch_size=4'.",
        )


def say(error: Exception) -> str:
    """An exception of timm's in one line, for a message."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200].rstrip('.')}"


def keep_no_biases(trunk: nn.Module) -> None:
    """Let attention biases be looked up in every forward pass.

    In evaluation mode LeViT, EfficientViT and others keep them from one pass to the next. They would be wrong once
    other weights are loaded, and under ``torch.func`` (EWC, the old network of LwF) they belong to a finished call.
    """
    for module in trunk.modules():
        if hasattr(module, "attention_bias_cache"):
            module.register_forward_hook(lambda module, *_: module.attention_bias_cache.clear())
