"""Batched RandAugment against timm's, operation by operation and draw by draw."""

import numpy as np
import pytest
import torch
from helpers import configure, make_split, toy_images
from PIL import Image
from scipy import stats

from cl_bench.config.build import build
from cl_bench.core.errors import ConfigError
from cl_bench.data.rand_augment import OPERATIONS, RandAugment

POLICY = "rand-m9-mstd0.5-inc1"
FILL = [129, 124, 112]
INTERPOLATED = {"Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel"}


def pictures(count: int = 12, channels: int = 3) -> torch.Tensor:
    """Smooth images with flat parts, dark ones and one of a single colour among them."""
    rng = np.random.default_rng(5)
    coarse = torch.from_numpy(rng.uniform(-40, 300, (count, channels, 5, 5)))
    images = torch.nn.functional.interpolate(coarse, size=32, mode="bicubic").clamp(0, 255)
    images[1] *= 0.3
    images[2] = 77.0
    return images.to(torch.uint8)


def timms(name: str, magnitude: float, sign: float, images: torch.Tensor, monkeypatch) -> torch.Tensor:
    """timm's operation on one image after the other, with this magnitude and sign."""
    from timm.data import auto_augment

    monkeypatch.setattr(auto_augment.random, "random", lambda: 0.9 if sign < 0 else 0.1)
    settings = {"img_mean": tuple(FILL), "interpolation": Image.Resampling.BICUBIC, "magnitude_std": 0}
    operation = auto_augment.AugmentOp(name, prob=1.0, magnitude=magnitude, hparams=settings)
    out = [np.asarray(operation(Image.fromarray(image.permute(1, 2, 0).numpy()))) for image in images]
    return torch.from_numpy(np.stack(out)).permute(0, 3, 1, 2)


def ours(number: int, magnitude: float, sign: float, images: torch.Tensor) -> torch.Tensor:
    operation = OPERATIONS[number]
    levels, signs = (torch.full((len(images),), v, dtype=torch.float64) for v in (magnitude, sign))
    argument = operation.argument(levels, signs, images.shape[-1]).float().view(-1, 1, 1, 1)
    return operation.apply(images, argument, FILL)


@pytest.mark.parametrize("number", range(len(OPERATIONS)), ids=[o.name for o in OPERATIONS])
def test_each_operation_is_timms(number, monkeypatch):
    """Exact, but for autocontrast and interpolation: there at most one grey level, at under 2 % of the pixels."""
    images, name = pictures(), OPERATIONS[number].name
    changed = 0
    for magnitude in (7.3, 8.1, 9.0, 9.9):
        for sign in (-1.0, 1.0):
            out, expected = ours(number, magnitude, sign, images), timms(name, magnitude, sign, images, monkeypatch)
            assert out.dtype == torch.uint8
            difference = (out.int() - expected.int()).abs()
            if name in INTERPOLATED | {"AutoContrast"}:
                assert difference.max() <= 1
                assert (difference > 0).float().mean() < 0.02
            else:
                assert difference.max() == 0
            changed += int((out != images).sum())
    assert changed > 0


def test_the_operations_are_the_ones_of_the_policy():
    from timm.data.auto_augment import rand_augment_transform

    theirs = rand_augment_transform(POLICY, {"img_mean": tuple(FILL)})
    assert [o.name for o in theirs.ops] == [o.name for o in OPERATIONS]
    assert {(o.prob, o.magnitude, o.magnitude_std, o.magnitude_max) for o in theirs.ops} == {(0.5, 9, 0.5, None)}
    assert theirs.num_layers == 2
    assert theirs.choice_weights is None


def test_posterize_to_no_bits_is_black():
    number = [o.name for o in OPERATIONS].index("PosterizeIncreasing")
    assert ours(number, 10.0, 1.0, pictures()).max() == 0


def test_grey_images_are_augmented_too():
    images = pictures(channels=1)
    for number, operation in enumerate(OPERATIONS):
        out = operation.apply(
            images,
            operation.argument(torch.full((12,), 9.0).double(), torch.ones(12), 32).float().view(-1, 1, 1, 1),
            [7],
        )
        assert out.shape == images.shape, number
        if operation.name == "ColorIncreasing":
            assert torch.equal(out, images)


def test_draws_have_timms_distribution():
    """Two operations an image, each of fifteen equally likely, applied with 1/2; N(9, 0.5) cut at 10; a fair sign."""
    augment = RandAugment.parse(POLICY, FILL)
    chosen, magnitude, sign = augment.draw(60_000, torch.Generator().manual_seed(0))
    applied = chosen >= 0
    assert applied.float().mean().item() == pytest.approx(0.5, abs=0.01)
    counts = torch.bincount(chosen[applied], minlength=15)
    assert stats.chisquare(counts).pvalue > 1e-3
    assert magnitude.max() == 10
    assert (magnitude == 10).float().mean().item() == pytest.approx(1 - stats.norm.cdf(2), abs=0.003)
    below = magnitude[magnitude < 10].numpy()
    assert stats.kstest(below, stats.truncnorm(-18, 2, loc=9, scale=0.5).cdf).pvalue > 1e-3
    assert sign.mean().item() == pytest.approx(0, abs=0.02)
    assert set(sign.tolist()) == {-1.0, 1.0}


def test_every_image_has_draws_of_its_own_and_two_layers_are_applied():
    augment = RandAugment.parse(POLICY, FILL)
    drawn = []
    draw = augment.draw
    augment.draw = lambda size, generator: drawn.append(draw(size, generator)) or drawn[-1]
    images = pictures()[:1].expand(200, -1, -1, -1)
    before = images.clone()
    out = augment(images, torch.Generator().manual_seed(3))
    assert torch.equal(images, before)  # a new tensor: the stored images stay as they are
    assert len(drawn) == 2
    (first, *_), (second, *_) = drawn
    assert not torch.equal(first, second)
    untouched = (first < 0) & (second < 0)
    assert torch.equal(out[untouched], images[untouched])
    assert 25 < int(untouched.sum()) < 75  # a quarter
    assert len({tuple(image.flatten().tolist()) for image in out[~untouched]}) > 100


def test_an_image_alone_gets_what_it_gets_among_others(monkeypatch):
    """Images that drew the same operation are changed together, but by their own arguments."""
    augment, images = RandAugment.parse(POLICY, FILL), pictures()
    out = augment(images, torch.Generator().manual_seed(8))
    generator = torch.Generator().manual_seed(8)
    layers = [augment.draw(len(images), generator) for _ in range(2)]
    for i, image in enumerate(images):
        expected = image[None]
        for chosen, magnitude, sign in layers:
            if chosen[i] >= 0:
                expected = ours(int(chosen[i]), float(magnitude[i]), float(sign[i]), expected)
        assert torch.equal(out[i], expected[0])


def test_a_seed_is_a_stream():
    augment, images = RandAugment.parse(POLICY, FILL), pictures()
    first = augment(images, torch.Generator().manual_seed(1))
    assert torch.equal(first, augment(images, torch.Generator().manual_seed(1)))
    assert not torch.equal(first, augment(images, torch.Generator().manual_seed(2)))


@pytest.mark.parametrize("policy", ["rand", "rand-m9-inc1", "rand-m9-mstd0.5-inc0", "rand-m9-mstd0.5-inc1-n3", "v0"])
def test_other_policies_are_refused(policy):
    with pytest.raises(ConfigError, match="rand_augment"):
        RandAugment.parse(policy, FILL)


def test_the_scenario_augments_only_where_it_is_asked_to():
    toy = toy_images(channels=3, side=32)
    raw = make_split(toy).tasks[0].train.images
    off, on = make_split(toy), make_split(toy, rand_augment=POLICY)
    assert off.transform.rand_augment is None
    assert on.transform.rand_augment.fill == [128, 128, 128]
    torch.testing.assert_close(off.transform.augment(raw, torch.Generator()), off.transform.normalise(raw))
    assert not torch.equal(on.transform.augment(raw, torch.Generator().manual_seed(0)), on.transform.normalise(raw))
    for name in ("cifar100", "digits"):
        assert configure(f"scenario={name}").scenario.rand_augment is None


def test_the_command_refuses_a_wrong_policy():
    with pytest.raises(ConfigError, match=r"scenario\.rand_augment: expected null, or rand-m"):
        build(configure("scenario.rand_augment=strong", "device=cpu"))
