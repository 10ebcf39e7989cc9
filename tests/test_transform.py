"""Batched augmentation against torchvision's, image by image."""

import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import functional as tv

from cl_bench.data.transform import Transform

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.3, 0.25]


def images(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(1, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)


def test_plain_is_torchvisions_to_tensor_and_normalise():
    raw = images(5)
    expected = tv.normalize(raw.float() / 255, MEAN, STD)
    torch.testing.assert_close(Transform(mean=MEAN, std=STD, crop_padding=4, flip=True).normalise(raw), expected)


def test_every_image_is_a_window_of_its_padded_self_with_its_own_draw():
    raw = images(64)
    transform = Transform(mean=MEAN, std=STD, crop_padding=4, flip=True)
    out = transform.augment(raw, torch.Generator().manual_seed(0))
    padded = F.pad(raw, (4, 4, 4, 4))
    found = []
    for image, x in zip(padded, out):
        candidates = {
            (dy, dx, flip): tv.horizontal_flip(window) if flip else window
            for dy in range(9)
            for dx in range(9)
            for flip in (False, True)
            for window in [image[:, dy : dy + 32, dx : dx + 32]]
        }
        matches = [
            place for place, window in candidates.items() if torch.equal(transform.normalise(window[None])[0], x)
        ]
        assert len(matches) == 1
        found += matches
    ys, xs, flips = zip(*found)
    assert set(ys) == set(xs) == set(range(9))  # all nine offsets occur among 64 draws
    assert 16 < sum(flips) < 48
    assert len(set(found)) > 45  # of 162 places; a shared draw would give one


def test_draws_depend_on_the_generator_alone():
    raw, transform = images(8), Transform(mean=MEAN, std=STD, crop_padding=4, flip=True)
    first = transform.augment(raw, torch.Generator().manual_seed(5))
    torch.manual_seed(99)
    assert torch.equal(first, transform.augment(raw, torch.Generator().manual_seed(5)))
    assert not torch.equal(first, transform.augment(raw, torch.Generator().manual_seed(6)))


def test_without_augmentation_training_sees_the_image_itself():
    raw, transform = images(4), Transform(mean=MEAN, std=STD, crop_padding=0, flip=False)
    assert torch.equal(transform.augment(raw, torch.Generator()), transform.normalise(raw))


def test_bit_equal_to_slicing_each_image():
    raw, transform = images(33), Transform(mean=MEAN, std=STD, crop_padding=4, flip=True)
    generator = torch.Generator().manual_seed(7)
    row, column = torch.randint(9, (2, 33), generator=generator).tolist()
    mirrored = torch.randint(2, (33,), generator=generator).tolist()
    padded = F.pad(raw, (4, 4, 4, 4))
    windows = [image[:, y : y + 32, x : x + 32] for image, y, x in zip(padded, row, column)]
    flipped = torch.stack([window.flip(2) if mirror else window for window, mirror in zip(windows, mirrored)])
    out = transform.augment(raw, torch.Generator().manual_seed(7))
    assert torch.equal(out, transform.normalise(flipped))
    assert out.is_contiguous()
    # in any memory layout, and of any shape
    assert torch.equal(
        out, transform.augment(raw.to(memory_format=torch.channels_last), torch.Generator().manual_seed(7))
    )
    wide = torch.randint(256, (2, 3, 5, 8), dtype=torch.uint8)
    assert transform.augment(wide, generator).shape == wide.shape
