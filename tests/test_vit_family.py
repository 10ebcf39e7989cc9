"""The networks of the Vision Transformer family: their equations, their sizes, and that they run under every method."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from helpers import DEVICE, array, configure, network_of, softmax, trainer_of, write_pictures
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cl_bench.backbones.cct import SequencePooling
from cl_bench.backbones.cvt import ConvAttention
from cl_bench.backbones.deepvit import ReAttention
from cl_bench.backbones.layers.memory_format import put_channels_innermost
from cl_bench.config.build import build
from cl_bench.core.errors import ConfigError
from cl_bench.testing import check_resumption

pytestmark = pytest.mark.arithmetic

SMALL = {
    "vit": ["patch_size=8", "dim=24", "depth=2"],
    "deepvit": ["patch_size=8", "dim=24", "depth=2"],
    "cvt": ["dims=[8,16,16]", "depths=[1,1,1]", "heads=[1,2,2]", "strides=[1,2,2]"],
    "cct": ["dim=16", "depth=2", "heads=2", "conv_layers=2"],
    "efficientvit": ["stride=8", "+options.embed_dim=[16,32,48]", "+options.depth=[1,1,1]",
                     "+options.num_heads=[2,2,2]"],
    "mobilevit": ["stride=8"],
    "mobilevitv2": ["stride=8"],
    "levit": ["stride=8", "+options.embed_dim=[32,48,64]", "+options.depth=[1,1,1]", "+options.num_heads=[2,2,2]"],
    "coat": ["stride=8", "+options.embed_dims=[16,16,16,16]", "+options.serial_depths=[1,1,1,2]"],
}  # fmt: skip
"""The smallest networks that the keys allow, for pictures of 16 x 16 pixels."""

BUFFERS = {"er": "reservoir", "derpp": "reservoir", "mir": "reservoir", "icarl": "herding"}

UNSEEN = ("key.norm.bias",)
"""CvT: the softmax does not see what is added to all keys, so the gradient is 0 up to rounding."""

SIZES = [
    (["deepvit"], 4_493_272, 308.1),
    (["deepvit", "dim=256", "heads=8"], 7_957_796, 541.2),
    (["cvt"], 4_046_500, 90.4),
    (["cvt_13"], 19_638_628, 331.2),
    (["cct"], 3_783_268, 1181.6),  # CCT-7/3x1
    (["cct", "depth=6"], 3_256_932, 1013.9),  # CCT-6/3x1
    (["cct", "dim=128", "depth=4", "heads=2", "mlp_ratio=1", "conv_layers=2"], 493_732, 50.0),  # CCT-4/3x2
    (["cct", "dim=128", "depth=2", "heads=2", "mlp_ratio=1", "conv_layers=2"], 295_332, 35.4),  # CCT-2/3x2
    (["efficientvit"], 2_175_352, 97.4),
    (["efficientvit", "stride=16"], 2_174_944, 23.2),
    (["mobilevit"], 983_124, 80.2),
    (["mobilevit", "name=mobilevit_xs"], 1_971_348, 209.3),
    (["mobilevitv2"], 1_139_293, 102.9),
    (["levit"], 7_045_492, 344.7),
    (["levit", "stride=16"], 7_040_404, 78.6),
    (["coat"], 5_430_756, 133.7),
    (["coat", "name=coat_lite_mini"], 10_547_556, 170.6),
    (["coat", "name=coat_tiny"], 5_355_368, 357.7),
]
"""Parameters at 100 classes, and millions of multiply-adds for an image of 32 x 32 pixels."""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"), classes=("ant", "bee", "cat", "dog"), train=8, test=3)


def choose(name, *keys):
    """Overrides that choose a network and set its keys."""
    return [
        f"backbone={name}",
        *(f"+backbone.{key[1:]}" if key.startswith("+") else f"backbone.{key}" for key in keys),
    ]


def parts_of(name, method, pictures, *overrides):
    buffer = [f"buffer={BUFFERS[method]}", "buffer.capacity=8"] if method in BUFFERS else ["buffer=none"]
    return build(
        configure(
            *choose(name, *SMALL[name]), f"method={method}", *buffer, "scenario=folder", f"data_dir={pictures}",
            "scenario.num_tasks=2", "scenario.source.size=16", "trainer.epochs=1", "trainer.batch_size=8",
            f"device={DEVICE}", *overrides,
        )
    )  # fmt: skip


def measure_side(net, x):
    """The smaller side of the last map, or of a square of as many tokens."""
    if hasattr(net, "trunk"):
        found = net.trunk.forward_features(x)
        prefix = hasattr(net.trunk, "cls_token4")  # CoaT's
    else:
        seen = []
        layer, prefix = {
            "ViT": lambda: (net.net.norm, 1), "DeepViT": lambda: (net.net.norm, 1), "CvT": lambda: (net.stages, 0),
            "CCT": lambda: (net.norm, 0), "NaViT": lambda: (net.norm, 0),
        }[type(net).__name__]()  # fmt: skip
        layer.register_forward_hook(lambda *inputs: seen.append(inputs[2]))
        net(x)
        found = seen[0]
    return min(found.shape[2:]) if found.ndim == 4 else int((found.shape[1] - prefix) ** 0.5)


# -- equations -------------------------------------------------------------------------------------------------------


def randomise(module):
    """Weights and running statistics with which no term is 0 or 1."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in module.state_dict().values():
            if value.is_floating_point():
                value.copy_(torch.rand(value.shape, generator=generator) + 0.1)
    return module.eval().double()


def linear(layer, x):
    return x @ array(layer.weight).T + (0 if layer.bias is None else array(layer.bias))


@pytest.mark.parametrize("backbone", ["cct", "efficientvit", "mobilevit", "mobilevitv2", "resnet18"])
def test_convolutions_keep_their_channels_innermost(backbone):
    net = network_of(f"backbone={backbone}", "+scale=mini")
    maps = []
    for layer in net.modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.register_forward_hook(lambda layer, given, out: maps.append(out))
    net(torch.rand(2, 3, 32, 32))
    assert maps
    assert all(out.is_contiguous(memory_format=torch.channels_last) for out in maps)


def test_a_narrow_convolution_leaves_the_usual_layout():
    narrow, wide = (torch.nn.Sequential(torch.nn.Conv2d(3, width, 3), torch.nn.Conv2d(width, 8, 1)) for width in (7, 8))
    for net, channels_last in ((narrow, False), (wide, True)):
        before = copy.deepcopy(net.state_dict())
        put_channels_innermost(net)
        assert net[0].weight.is_contiguous(memory_format=torch.channels_last) == channels_last
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_reattention_mixes_the_maps_of_the_heads(norm):
    """Eq. 3 of DeepViT: A' = Norm(Theta^T A), out = A' V."""
    from timm.layers import Attention

    heads, tokens, width = 2, 5, 3
    layer = randomise(ReAttention(Attention(heads * width, num_heads=heads, qkv_bias=True), norm))
    x = torch.rand(3, tokens, heads * width, dtype=torch.float64)
    q, k, v = linear(layer.qkv, array(x)).reshape(3, tokens, 3, heads, width).transpose(2, 0, 3, 1, 4)
    maps = softmax((q @ k.transpose(0, 1, 3, 2) / np.sqrt(width)).reshape(-1, tokens)).reshape(3, heads, tokens, tokens)
    theta = array(layer.theta)
    mixed = np.stack([sum(theta[h, g] * maps[:, h] for h in range(heads)) for g in range(heads)], axis=1)
    gain, shift = array(layer.norm.weight)[:, None, None], array(layer.norm.bias)[:, None, None]
    if norm == "batch":
        mean, var = (array(value)[:, None, None] for value in (layer.norm.running_mean, layer.norm.running_var))
    else:
        mean, var = mixed.mean(axis=1, keepdims=True), mixed.var(axis=1, keepdims=True)
    mixed = (mixed - mean) / np.sqrt(var + 1e-5) * gain + shift
    out = linear(layer.proj, (mixed @ v).transpose(0, 2, 1, 3).reshape(3, tokens, -1))
    np.testing.assert_allclose(array(layer(x)), out, rtol=1e-9)
    np.testing.assert_allclose(array(layer.compute_maps(x)[0]), maps, rtol=1e-9)


def test_reattention_starts_near_plain_attention():
    net = network_of("backbone=deepvit")
    for block in net.net.blocks:
        apart = block.attn.theta.detach() - torch.eye(3)
        assert 0 < apart.abs().max() < 0.1


def test_the_projections_of_cvt_are_convolutions():
    """Eq. 2 of CvT: a depth-wise 3 x 3 convolution, BatchNorm, a linear layer; keys and values with a stride of 2."""
    heads, dim, side = 2, 4, 4
    layer = randomise(ConvAttention(dim, heads, kv_stride=2))
    x = torch.rand(3, side, side, dim, dtype=torch.float64)
    padded = np.pad(array(x), ((0, 0), (1, 1), (1, 1), (0, 0)))

    def project(projection, stride):
        kernel, norm = array(projection.conv.weight), projection.norm  # (D, 1, 3, 3)
        rows = range(0, side, stride)
        mean, var, gain, shift = map(array, (norm.running_mean, norm.running_var, norm.weight, norm.bias))
        tokens = [
            sum(padded[:, i + a, j + b] * kernel[:, 0, a, b] for a in range(3) for b in range(3))
            for i in rows for j in rows
        ]  # fmt: skip
        tokens = (np.stack(tokens, axis=1) - mean) / np.sqrt(var + 1e-5) * gain + shift
        return linear(projection.linear, tokens).reshape(3, len(tokens[0]), heads, -1).transpose(0, 2, 1, 3)

    q, k, v = project(layer.query, 1), project(layer.key, 2), project(layer.value, 2)
    assert (q.shape[2], k.shape[2]) == (16, 4)
    scores = q @ k.transpose(0, 1, 3, 2) / np.sqrt(dim / heads)
    maps = softmax(scores.reshape(-1, 4)).reshape(scores.shape)
    out = linear(layer.out, (maps @ v).transpose(0, 2, 1, 3).reshape(3, side, side, dim))
    np.testing.assert_allclose(array(layer(x)), out, rtol=1e-9)


def test_sequence_pooling_is_a_mean_weighted_by_the_tokens():
    """Eq. 1 to 3 of CCT."""
    layer = randomise(SequencePooling(4))
    x = torch.rand(3, 6, 4, dtype=torch.float64)
    weights = softmax(array(x) @ array(layer.score.weight)[0])  # (3, 6)
    np.testing.assert_allclose(array(layer(x)), (weights[..., None] * array(x)).sum(axis=1), rtol=1e-9)


def test_a_block_of_cct_normalises_the_sum_after_attention():
    net = network_of(*choose("cct", *SMALL["cct"])).eval()
    block, x = net.blocks[0], torch.rand(2, 5, 16)
    z = block.norm2(x + block.attention(block.norm1(x)))
    torch.testing.assert_close(block(x), z + block.mlp(z))
    assert [round(block.drop_path.drop_prob, 3) for block in net.blocks] == [0, 0.1]


# -- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "parameters", "macs"),
    SIZES,
    ids=lambda value: "-".join(value) if isinstance(value, list) else str(value),
)
def test_sizes_are_those_of_the_papers_networks(network, parameters, macs):
    net = network_of(*choose(*network)).eval()
    assert sum(p.numel() for p in net.parameters()) == parameters
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        net(torch.zeros(1, 3, 32, 32))
    assert round(counter.get_total_flops() / 2e6, 1) == macs


@pytest.mark.slow
@pytest.mark.parametrize("pixels", [32, 64])
@pytest.mark.parametrize("scale", [[], ["+scale=mini"]], ids=["full", "mini"])
@pytest.mark.parametrize("name", [*SMALL, "navit"])
def test_a_map_of_two_by_two_or_more_is_left(name, scale, pixels):
    net = network_of(f"backbone={name}", *scale, image_shape=(3, pixels, pixels), num_classes=10).eval()
    with torch.no_grad():
        assert measure_side(net, torch.zeros(1, 3, pixels, pixels)) >= 2


@pytest.mark.parametrize(
    ("key", "network", "shape"),
    [("stride", ["levit", "stride=32"], 32), ("stride", ["efficientvit", "stride=2"], 32), ("stride", ["coat"], 28),
     ("stride", ["mobilevit", "stride=3"], 32), ("name", ["levit", "name=levit_999"], 32),
     ("name", ["coat", "name=coatnet_0_224"], 32), ("name", ["coat", "name=resnet18"], 32),
     ("options", ["levit", "+options.embed_dims=[1]"], 32), ("options", ["levit", "+options.embed_dim=[8]"], 32),
     ("options", ["levit", "+options.pretrained=true"], 32), ("options", ["coat", "+options.checkpoint_path=w"], 32),
     ("strides", ["cvt"], 8), ("strides", ["cvt", "strides=[1,2]"], 32), ("heads", ["cvt", "heads=[3,2,4]"], 32),
     ("kernels", ["cvt", "kernels=[3,2,3]"], 32), ("conv_layers", ["cct", "conv_layers=5"], 32),
     ("heads", ["cct", "heads=3"], 32), ("patch_size", ["deepvit", "patch_size=5"], 32),
     ("patch_size", ["vit", "patch_size=32"], 32)],
)  # fmt: skip
def test_what_would_not_work_is_refused(key, network, shape):
    with pytest.raises(ConfigError) as error:
        network_of(*choose(*network), image_shape=(3, shape, shape))
    assert error.value.key == f"backbone.{key}"


# -- under the methods -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", SMALL)
def test_every_parameter_is_trained(name, precision, pictures, tmp_path):
    """Adam moves every weight that has a gradient; behind a gain of 0 there is one from the second step on."""
    parts = parts_of(name, "finetune", pictures, f"precision={precision}", "optimizer=adam", "trainer.epochs=2")
    before = {key: p.detach().clone() for key, p in parts.method.named_parameters()}
    record = trainer_of(parts, tmp_path).run()
    assert not np.isnan(record.class_il.accuracy[-1]).any()
    still = {key for key, p in parts.method.named_parameters() if torch.equal(p, before[key])}
    assert {key for key in still if not key.endswith(UNSEEN)} == set()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["er", "derpp", "lwf", "ewc", "icarl", "joint", "mir", "supsup"])
@pytest.mark.parametrize("name", SMALL)
def test_it_runs_under(method, name, pictures, tmp_path):
    """EWC differentiates each image by vmap, and so does SupSup, with masks on all convolutions and linear layers."""
    parts = parts_of(name, method, pictures, "trainer.max_steps=1")
    record = trainer_of(parts, tmp_path).run()
    assert record.class_il.count.tolist() == [6, 6]
    assert not np.isnan(record.class_il.accuracy[-1]).any()
    if method == "ewc":
        assert all(value.isfinite().all() for value in parts.method.snapshot.importance)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_it_resumes_bit_equal(name, pictures, tmp_path):
    check_resumption(partial(parts_of, name, "er", pictures), tmp_path, few=True)


@pytest.mark.parametrize("name", ["levit", "efficientvit"])
def test_attention_biases_follow_the_weights(name):
    """timm keeps them in evaluation mode: from one pass to the next, and in a copy."""
    net = network_of(*choose(name, *SMALL[name]), image_shape=(3, 16, 16)).eval()
    x = torch.rand(2, 3, 16, 16)
    biases = [key for key in net.state_dict() if key.endswith("attention_biases")]
    assert biases
    before = net(x)
    weights = {key: value + 3 * torch.rand_like(value) if key in biases else value
               for key, value in net.state_dict().items()}  # fmt: skip
    with torch.no_grad():
        for value in net.state_dict().values():
            value.add_(torch.rand_like(value) * 0.1) if value.is_floating_point() else None
    twin = copy.deepcopy(net)
    changed = functional_call(net, weights, (x,))
    net.load_state_dict(weights)
    torch.testing.assert_close(net(x), changed)
    assert not torch.equal(twin(x), before)
    net.train()
