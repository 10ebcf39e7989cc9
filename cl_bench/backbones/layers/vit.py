"""A plain Vision Transformer (Dosovitskiy et al. 2021) for small images, built from timm's blocks."""

from timm.models.vision_transformer import VisionTransformer

from cl_bench.backbones.base import check_heads, check_layers, check_patches
from cl_bench.core.errors import require_positive


def build_small_vit(
    *,
    patch_size: int,
    dim: int,
    depth: int,
    heads: int,
    mlp_ratio: float,
    num_classes: int,
    image_shape: tuple[int, int, int],
) -> VisionTransformer:
    """timm's pre-norm network with learned positions, a class token and no dropout.

    Args:
        patch_size: side of a patch in pixels; must divide the images' sides, and leave 2 x 2 patches or more.
        dim, depth, heads: width of a token, number of blocks, attention heads per block.
        mlp_ratio: width of the MLP relative to ``dim``.
        num_classes: outputs of the linear head; 0 for none.
        image_shape: (C, H, W) of the images.
    """
    usual = "See configs/backbone/vit.yaml."
    require_positive(fix=usual, patch_size=patch_size, dim=dim, depth=depth, heads=heads, mlp_ratio=mlp_ratio)
    check_layers("depth", depth)
    check_patches(patch_size, image_shape)
    channels, height, width = image_shape
    check_heads(dim, heads)
    return VisionTransformer(
        img_size=(height, width),
        patch_size=patch_size,
        in_chans=channels,
        num_classes=num_classes,
        embed_dim=dim,
        depth=depth,
        num_heads=heads,
        mlp_ratio=mlp_ratio,
    )
