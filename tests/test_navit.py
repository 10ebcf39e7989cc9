"""NaViT: equations, packing, mixed resolutions, dropped tokens, and the methods around it."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import TINY, array, configure, network_of, softmax, trainer_of
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from cl_bench.backbones.navit import lay_out
from cl_bench.config.build import build
from cl_bench.core.errors import ConfigError
from cl_bench.engine.replicas import find_obstacle
from cl_bench.testing import check_resumption

pytestmark = pytest.mark.arithmetic

CPU = torch.device("cpu")
SMALL_NET = ["backbone=navit", "backbone.patch_size=2", "backbone.dim=16", "backbone.depth=2", "backbone.heads=2"]
DRAWING = [*SMALL_NET, "backbone.low_scales=[0.75,0.5]", "backbone.token_drop=0.25"]
DIGIT = (1, 8, 8)
METHODS = ["finetune", "er", "derpp", "lwf", "ewc", "icarl", "joint"]


def network(*overrides, shape=DIGIT):
    """A small network whose weights are far from their first values, in double precision and evaluation mode."""
    torch.manual_seed(0)
    net = network_of(*overrides, num_classes=10, image_shape=shape).double().eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return net


def images(count, shape=DIGIT):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def norm(x, gain):
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5) * gain


def attend(weights, name, x, context, heads):
    """Equations of attention with query-key normalisation, one head after the other."""
    q, k, v = (
        tokens @ weights[f"{name}.{part}.weight"].T for part, tokens in (("q", x), ("k", context), ("v", context))
    )
    found = []
    for parts in zip(*(np.split(part, heads, axis=1) for part in (q, k, v))):
        one_q, one_k = (
            part / np.sqrt((part**2).mean(axis=1, keepdims=True) + 1e-6) * weights[f"{name}.norm_{key}.weight"]
            for key, part in zip("qk", parts)
        )
        found.append(softmax(one_q @ one_k.T / np.sqrt(one_q.shape[1])) @ parts[2])
    return np.concatenate(found, axis=1) @ weights[f"{name}.out.weight"].T + weights[f"{name}.out.bias"]


def apply_mlp(weights, name, x):
    hidden = torch.from_numpy(x @ weights[f"{name}.fc1.weight"].T + weights[f"{name}.fc1.bias"])
    return array(F.gelu(hidden)) @ weights[f"{name}.fc2.weight"].T + weights[f"{name}.fc2.bias"]


def test_features_are_those_of_the_equations():
    net, x = network(*SMALL_NET), images(3)
    weights = {name: array(p) for name, p in net.named_parameters()}
    expected = []
    for image in array(x)[:, 0]:
        patches = image.reshape(4, 2, 4, 2).swapaxes(1, 2).reshape(16, 4)
        tokens = patches @ weights["patches.weight"].reshape(16, 4).T + weights["patches.bias"]
        s = tokens + (weights["rows"][:, None] + weights["columns"]).reshape(16, 16)
        for block in ("blocks.0", "blocks.1"):
            u = norm(s, weights[f"{block}.norm1.weight"])
            s = s + attend(weights, f"{block}.attention", u, u, 2)
            s = s + apply_mlp(weights, f"{block}.mlp", norm(s, weights[f"{block}.norm2.weight"]))
        v = norm(s, weights["norm.weight"])
        y = attend(weights, "pool.attention", weights["pool.query"][0], v, 2)
        expected.append((y + apply_mlp(weights, "pool.mlp", norm(y, weights["pool.norm.weight"])))[0])
    np.testing.assert_allclose(array(net.features(x)), expected, rtol=1e-9)


@pytest.mark.parametrize("per_sequence", [1, 3])
def test_an_image_has_the_same_features_alone_and_packed(per_sequence):
    net, x = network(*DRAWING, f"backbone.images_per_sequence={per_sequence}"), images(7)
    together = net.features(x)
    torch.testing.assert_close(together, torch.cat([net.features(image[None]) for image in x]), rtol=1e-9, atol=1e-9)
    others = torch.cat([x[:1], images(7).flip(0)[:6] * 100])
    torch.testing.assert_close(net.features(others)[0], together[0], rtol=1e-9, atol=1e-9)


def test_images_share_sequences_and_every_token_is_in_one():
    layout = lay_out([4, 4, 3, 2, 2, 1], 7, CPU)
    assert layout.images.tolist() == [[0, 2, -1], [1, 3, 5], [4, -1, -1]]
    assert layout.source.tolist() == [[0, 1, 2, 3, 8, 9, 10], [4, 5, 6, 7, 11, 12, 15], [13, 14, *[16] * 5]]
    assert layout.owner.tolist() == [[0, 0, 0, 0, 2, 2, 2], [1, 1, 1, 1, 3, 3, 5], [4, 4, *[-1] * 5]]
    assert layout.images.flatten()[layout.place].tolist() == [0, 1, 2, 3, 4, 5]
    assert layout.mask_attention()[1, 0].sum(dim=1).tolist() == [4, 4, 4, 4, 2, 2, 1]  # the blocks of a diagonal
    assert layout.mask_pooling()[:, 0].sum(dim=2).tolist() == [[4, 3, 7], [4, 2, 1], [2, 7, 7]]
    alone = lay_out([5], 10, CPU)
    assert alone.source.shape == (1, 5)  # cut to what is used


def test_training_packs_a_share_of_lower_resolutions():
    """Of nine images five are full, two have 3 x 3 and two 2 x 2 patches; a quarter of the tokens is dropped."""
    net = network(*DRAWING).train()
    seen, packed = [], []
    net.patches.register_forward_hook(lambda _, x, y: seen.append(tuple(y.shape)))
    net.blocks[0].register_forward_pre_hook(lambda _, x: packed.append((tuple(x[0].shape), int(x[1].any(dim=3).sum()))))
    assert net.features(images(9)).shape == (9, 16)
    assert seen == [(5, 16, 4, 4), (2, 16, 3, 3), (2, 16, 2, 2)]
    tokens = 5 * 12 + 2 * 7 + 2 * 3  # 6.75 is rounded to 7
    assert packed == [((4, 24, 16), 4 * 24)]
    assert tokens <= 4 * 24 < tokens + 24
    net.eval().features(images(9))
    assert seen[3:] == [(9, 16, 4, 4)]


def test_a_lower_resolution_is_that_of_its_own_image():
    """Also where the images of a batch were reordered; which ones are lowered differs from pass to pass."""
    net, x = network(*SMALL_NET), images(8)
    full, low = net.features(x), net.features(F.interpolate(x, [4, 4], mode="bilinear", antialias=True))
    net.train()
    chosen = []
    for _ in range(6):
        found = net.features(x)
        lowered = (found - low).abs().amax(dim=1) < 1e-9
        assert int(lowered.sum()) == 4
        torch.testing.assert_close(found[~lowered], full[~lowered], rtol=1e-9, atol=1e-9)
        chosen.append(lowered)
    assert len({tuple(lowered.tolist()) for lowered in chosen}) > 1


def test_draws_follow_torchs_generator():
    net, x = network(*DRAWING).train(), images(6)
    torch.manual_seed(3)
    first, second = net.features(x), net.features(x)
    torch.manual_seed(3)
    assert torch.equal(net.features(x), first)
    assert not torch.equal(first, second)


def test_a_step_reads_nothing_back_from_its_device():
    """A tensor on the meta device has no values, so that reading one is an error."""
    net = network(*DRAWING).to("meta").train()
    assert net(images(9).to("meta")).shape == (9, 10)


def test_gradients_of_single_images_can_be_stacked():
    """As EWC and SupSup do; and what is looked up after that is not left from it."""
    net, x = network(*DRAWING), images(3)
    weights = {name: p.detach() for name, p in net.named_parameters()}

    def measure(weights, image):
        return functional_call(net, weights, (image[None],)).square().sum()

    with sdpa_kernel(SDPBackend.MATH):
        stacked = vmap(grad(measure), in_dims=(None, 0))(weights, x)
    for i, image in enumerate(x):
        net.zero_grad()
        net(image[None]).square().sum().backward()
        for name, p in net.named_parameters():
            torch.testing.assert_close(stacked[name][i], p.grad, rtol=1e-6, atol=1e-9)


def parts_of(method, *overrides):
    buffers = dict.fromkeys(("er", "derpp", "er_ace", "mir", "agem"), "reservoir") | {"icarl": "herding"}
    buffer = [f"buffer={buffers[method]}", "buffer.capacity=20"] if method in buffers else ["buffer=none"]
    return build(configure(*TINY, f"method={method}", *DRAWING, *buffer, *overrides))


@pytest.mark.slow
@pytest.mark.parametrize("method", [*METHODS, "er_ace", "mir", "agem", "supsup"])
def test_it_runs_under(method, tmp_path):
    record = trainer_of(parts_of(method, "trainer.epochs=1"), tmp_path).run()
    assert record.class_il.count.tolist() == [20, 20]
    assert not np.isnan(record.class_il.accuracy[-1]).any()


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_resumes_bit_equal_with_its_draws(precision, tmp_path):
    check_resumption(partial(parts_of, "er", f"precision={precision}"), tmp_path, few=precision == "bf16")


@pytest.mark.parametrize("side", [32, 64])
def test_sizes_and_parameters(side):
    """docs/methods/navit.md derives the number; timm's NaFlexViT of these sizes, without packing, has 4,086,244."""
    shape = (3, side, side)
    net = network_of("backbone=navit", image_shape=shape)
    assert (net.rows.shape, net.columns.shape) == ((side // 4, 192), (side // 4, 192))
    assert sum(p.numel() for p in net.parameters()) == 4_472_292 + (side - 32) // 4 * 2 * 192
    assert network_of("backbone=navit", "+scale=mini", image_shape=shape).features(torch.zeros(2, *shape)).shape == (
        2,
        96,
    )


@pytest.mark.parametrize(
    ("override", "key"),
    [("backbone.patch_size=3", "patch_size"), ("backbone.patch_size=8", "patch_size"), ("backbone.heads=3", "heads"),
     ("backbone.low_share=1.5", "low_share"), ("backbone.low_scales=[]", "low_scales"),
     ("backbone.low_scales=[1.0]", "low_scales"), ("backbone.token_drop=1", "token_drop"),
     ("backbone.images_per_sequence=0", "images_per_sequence")],
)  # fmt: skip
def test_what_cannot_be_is_refused(override, key):
    with pytest.raises(ConfigError) as error:
        network(*SMALL_NET, override)
    assert error.value.key == f"backbone.{key}"


def test_replicas_of_a_network_that_draws_are_computed_one_by_one():
    method = parts_of("finetune").method
    other = SimpleNamespace(type="cuda")  # on a CPU there is another reason
    assert "draws in training" in find_obstacle(method, other)
    method.net.draws = False
    assert find_obstacle(method, other) is None
