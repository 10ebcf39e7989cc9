"""Pictures of one's own: which files are taken, what they show, and what is stored of them."""

import dataclasses
import io
import json
import multiprocessing
import os
import re
import shutil
import struct
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers import (
    ROOT,
    assert_equal_results,
    configure,
    find_run,
    no_file_above,
    run_in_process,
    toy_images,
    write_pictures,
)
from PIL import Image

from cl_bench.config.build import build, identify_run
from cl_bench.config.schema import compute_fingerprint, select_comparable, to_plain_dict
from cl_bench.core.errors import ConfigError
from cl_bench.data.digits import digits
from cl_bench.data.folder import folder
from cl_bench.data.pictures import Decoder

WHITE = [255, 255, 255]


def opened(root, cache=None, **keys):
    """The set of a folder of pictures."""
    keys = {"size": 8, "background": WHITE, "value_range": None, "test_fraction": 0.0, "split_seed": 0} | keys
    return folder(root=str(root), cache=str(cache or Path(root).parent / "decoded"), **keys)


def counting(monkeypatch) -> list[Path]:
    """The pictures that are decoded from now on."""
    decoded: list[Path] = []
    decode = Decoder.decode
    monkeypatch.setattr(Decoder, "decode", lambda self, path: (decoded.append(path), decode(self, path))[1])
    return decoded


# -- what a file shows ---------------------------------------------------------------------------------------------


def saved(image: Image.Image, kind: str, **settings) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def of_one_colour(mode: str, colour) -> Image.Image:
    return Image.new(mode, (4, 4), colour)


def palette(index: int) -> Image.Image:
    image = of_one_colour("P", index)
    image.putpalette([0, 0, 0, 9, 8, 7, 200, 100, 50])
    return image


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png16(colour: list[int], kind: int, extra: bytes = b"") -> bytes:
    """4 x 4 pixels of 16 bits a channel; ``kind`` 0 grey, 2 RGB, 4 grey with alpha, 6 RGB with alpha."""
    row = b"\0" + struct.pack(f">{4 * len(colour)}H", *(4 * colour))
    parts = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 16, kind, 0, 0, 0)) + extra
    return b"\x89PNG\r\n\x1a\n" + parts + chunk(b"IDAT", zlib.compress(4 * row)) + chunk(b"IEND", b"")


def planes(values: np.ndarray) -> bytes:
    """A TIFF file of three channels (3, H, W), each stored as a plane."""
    numbers = {256: [4], 257: [4], 258: [8 * values.itemsize] * 3, 259: [1], 262: [2], 273: [0] * 3, 277: [3]}
    numbers |= {278: [4], 279: [values[0].nbytes] * 3, 284: [2]}
    behind = 8 + 2 + 12 * len(numbers) + 4  # where what does not fit into an entry begins
    lists = {tag: behind + 12 * i for i, tag in enumerate(tag for tag in numbers if len(numbers[tag]) > 1)}
    start = behind + 12 * len(lists)
    numbers[273] = [start + i * values[0].nbytes for i in range(3)]
    entries = b"".join(
        struct.pack("<HHII", tag, 4, len(given), lists.get(tag, given[0])) for tag, given in numbers.items()
    )
    rest = b"".join(struct.pack("<3I", *numbers[tag]) for tag in lists)
    return b"II" + struct.pack("<HIH", 42, 8, len(numbers)) + entries + bytes(4) + rest + values.tobytes()


def tiff(values: np.ndarray, sample: int, bits: int = 0, photometric: int = 1, orientation: int = 1) -> bytes:
    """One channel (H, W); ``sample`` 1 unsigned, 2 signed, 3 floating-point; with ``bits``, rows of packed bytes."""
    order = {"<": "<", ">": ">"}.get(values.dtype.str[0], "<")
    bits = bits or 8 * values.itemsize
    height, width = len(values), 8 * values[0].nbytes // bits
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8 + 2 + 11 * 12 + 4, 274: orientation}
    tags |= {277: 1, 278: height, 279: values.nbytes, 339: sample}
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = {"<": b"II", ">": b"MM"}[order] + struct.pack(f"{order}HIH", 42, 8, len(tags))
    return head + entries + bytes(4) + values.tobytes()


def full(value: float, kind: str) -> np.ndarray:
    return np.full((4, 4), value, kind)


TWELVE_BITS = np.frombuffer(bytes([2048 >> 4, 2048 >> 8, 2048 & 255]) * 8, np.uint8).reshape(4, 6)

SHOWN = {
    "8 bits": (saved(of_one_colour("L", 77), "PNG"), [77, 77, 77]),
    "RGB": (saved(of_one_colour("RGB", (200, 100, 50)), "PNG"), [200, 100, 50]),
    "1 bit": (saved(of_one_colour("1", 1), "PNG"), [255, 255, 255]),
    "palette": (saved(palette(1), "PNG"), [9, 8, 7]),
    "CMYK": (saved(of_one_colour("CMYK", (255, 0, 0, 0)), "TIFF"), [0, 255, 255]),
    "CMYK as Adobe's JPEG": (saved(of_one_colour("CMYK", (0, 0, 0, 128)), "JPEG"), [127, 127, 127]),
    "YCbCr": (saved(of_one_colour("YCbCr", (77, 128, 128)), "TIFF"), [77, 77, 77]),
    "GIF": (saved(palette(2), "GIF"), [200, 100, 50]),
    "WebP": (saved(of_one_colour("RGB", (200, 100, 50)), "WEBP", lossless=True), [200, 100, 50]),
    "JPEG 2000": (saved(of_one_colour("RGB", (200, 100, 50)), "JPEG2000"), [200, 100, 50]),
    "16 bits": (png16([30000], 0), [117, 117, 117]),  # 30000 * 255 / 65535 = 116.7
    "16 bits, RGB": (png16([65535, 30000, 0], 2), [255, 117, 0]),
    "16 bits, TIFF": (tiff(full(30000, "<u2"), 1), [117, 117, 117]),
    "16 bits, big-endian": (tiff(full(30000, ">u2"), 1), [117, 117, 117]),
    "16 bits, 0 is white": (tiff(full(30000, "<u2"), 1, photometric=0), [138, 138, 138]),
    "16 bits, JPEG 2000": (saved(Image.fromarray(full(30000, "<u2")), "JPEG2000"), [117, 117, 117]),
    "12 bits": (tiff(TWELVE_BITS, 1, bits=12), [128, 128, 128]),  # 2048 * 255 / 4095 = 127.5
    "10 bits, PGM": (b"P5 4 4 1023\n" + full(512, ">u2").tobytes(), [128, 128, 128]),
    "alpha": (saved(of_one_colour("RGBA", (10, 20, 30, 0)), "PNG"), [0, 128, 255]),
    "half alpha": (saved(of_one_colour("RGBA", (255, 0, 0, 102)), "PNG"), [102, 77, 153]),  # 0.4 red, 0.6 background
    "grey with alpha": (saved(of_one_colour("LA", (10, 0)), "PNG"), [0, 128, 255]),
    "16 bits with alpha": (png16([9999, 0], 4), [0, 128, 255]),
    "a clear colour": (saved(of_one_colour("RGB", (1, 2, 3)), "PNG", transparency=(1, 2, 3)), [0, 128, 255]),
    "a clear colour of 16 bits": (png16([30000], 0, chunk(b"tRNS", struct.pack(">H", 30000))), [0, 128, 255]),
    "not the clear colour": (png16([30000], 0, chunk(b"tRNS", struct.pack(">H", 30001))), [117, 117, 117]),
    "a clear colour of a palette": (saved(palette(1), "PNG", transparency=1), [0, 128, 255]),
    "GIF with a clear colour": (saved(palette(2), "GIF", transparency=2), [0, 128, 255]),
}


@pytest.mark.parametrize("case", SHOWN)
def test_a_picture_is_what_it_shows(case, tmp_path):
    content, expected = SHOWN[case]
    (tmp_path / "picture").write_bytes(content)
    image = Decoder(2, (0, 128, 255), None).decode(tmp_path / "picture")
    assert image.dtype == np.uint8
    assert [channel.tolist() for channel in image] == [[[value] * 2] * 2 for value in expected]


UNKNOWN_RANGE = {
    "32-bit integers": (tiff(full(3_000_000_000, "<u4"), 1), [0.0, 4e9], 191),
    "signed 32-bit integers": (tiff(full(-5, "<i4"), 2), [-10.0, 0.0], 128),
    "signed 16-bit integers": (tiff(full(100, ">i2"), 2), [0.0, 255.0], 100),
    "floats": (tiff(full(0.25, "<f4"), 3), [0.0, 1.0], 64),
    "floats, PFM": (b"Pf\n4 4\n-1.0\n" + full(0.25, "<f4").tobytes(), [0.0, 1.0], 64),
    "16 bits of a sensor of 12": (png16([2048], 0), [0.0, 4095.0], 128),
    "beyond the range": (tiff(full(7.0, "<f4"), 3), [0.0, 1.0], 255),
}


@pytest.mark.parametrize("case", UNKNOWN_RANGE)
def test_what_has_no_usual_range_needs_one(case, tmp_path):
    content, stated, expected = UNKNOWN_RANGE[case]
    (tmp_path / "picture").write_bytes(content)
    if "16 bits" not in case:
        with pytest.raises(ValueError, match=r"of unknown range: set scenario.source.value_range=\[LOW,HIGH\]"):
            Decoder(2, (0, 0, 0), None).decode(tmp_path / "picture")
    assert np.unique(Decoder(2, (0, 0, 0), tuple(stated)).decode(tmp_path / "picture")).tolist() == [expected]


MISREAD = {
    "16 bits in planes": (planes(np.full((3, 4, 4), 30000, "<u2")), "16 bits per channel in planes"),
    "signed 8-bit integers": (tiff(full(-5, "i1"), 2), "signed 8-bit integers"),
    "a clear colour of 16 bits, RGB": (
        png16([30000, 20000, 10000], 2, chunk(b"tRNS", struct.pack(">3H", 30000, 20000, 10000))),
        "a transparent colour of 16 bits",
    ),
}


@pytest.mark.parametrize("case", MISREAD)
def test_what_pil_would_open_to_other_values_is_refused(case, tmp_path):
    content, message = MISREAD[case]
    (tmp_path / "picture").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        Decoder(2, (0, 128, 255), None).decode(tmp_path / "picture")
    with Image.open(tmp_path / "picture") as picture:
        picture.load()  # PIL says nothing of it


def test_planes_of_eight_bits_are_taken(tmp_path):
    (tmp_path / "picture").write_bytes(planes(np.stack([full(value, "u1") for value in (200, 100, 50)])))
    image = Decoder(2, (0, 0, 0), None).decode(tmp_path / "picture")
    assert [np.unique(channel).tolist() for channel in image] == [[200], [100], [50]]


def test_pictures_of_a_kind_whose_scale_pil_ignores_are_left_out(tmp_path, capsys):
    root = write_pictures(tmp_path / "mine")
    cards = ["SIMPLE  =                    T", "BITPIX  =                   16", "NAXIS   =                    2"]
    cards += ["NAXIS1  =                    4", "NAXIS2  =                    4", "END"]
    header = "".join(card.ljust(80) for card in cards).ljust(2880).encode()
    (root / "train" / "ant" / "star.fits").write_bytes(header + full(100, ">i2").tobytes().ljust(2880, b"\0"))
    assert len(opened(root).train_labels) == 18
    assert "1 named *.fits" in capsys.readouterr().err


def test_values_that_are_no_numbers_are_refused(tmp_path):
    (tmp_path / "picture").write_bytes(tiff(full(np.nan, "<f4"), 3))
    with pytest.raises(ValueError, match="not finite"):
        Decoder(2, (0, 0, 0), (0.0, 1.0)).decode(tmp_path / "picture")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "16 bits"])
def test_pictures_are_turned_as_their_metadata_say(kind, orientation, tmp_path):
    # where the first pixel of the stored rows belongs: EXIF 2.32, tag 274, "the 0th row is at the visual ..."
    corner = {1: (0, 0), 2: (0, 1), 3: (1, 1), 4: (1, 0), 5: (0, 0), 6: (0, 1), 7: (1, 1), 8: (1, 0)}[orientation]
    # the 0th row is at the top or bottom for 1 to 4, at a side for 5 to 8: a mark beside the corner along the 0th row
    stored = np.zeros((16, 16), np.uint8)
    stored[:8] = 60
    stored[:8, :8] = 250
    if kind == "16 bits":
        content = tiff(stored.astype("<u2") * 257, 1, orientation=orientation)
    else:
        exif = Image.Exif()
        exif[274] = orientation
        settings = {"quality": 100} if kind in ("JPEG", "WEBP") else {}
        content = saved(Image.fromarray(stored).convert("RGB"), kind, exif=exif, **settings)
    (tmp_path / "picture").write_bytes(content)
    quarters = Decoder(16, (0, 0, 0), None).decode(tmp_path / "picture")[0, 4::8, 4::8]
    row, column = corner
    along_row = (row, 1 - column) if orientation <= 4 else (1 - row, column)
    expected = np.zeros((2, 2))
    expected[corner], expected[along_row] = 250, 60
    np.testing.assert_allclose(quarters, expected, atol=3)


# -- which files are taken -----------------------------------------------------------------------------------------


def test_what_is_taken_and_what_is_left_out_is_said_in_a_line(tmp_path, capsys):
    root = write_pictures(tmp_path / "mine")
    png = (root / "train" / "ant" / "0.png").read_bytes()
    image = Image.open(io.BytesIO(png))
    (root / "train" / ".ipynb_checkpoints").mkdir()
    (root / "train" / ".ipynb_checkpoints" / "0.png").write_bytes(b"no class")
    (root / "train" / "ant" / "._0.png").write_bytes(b"what macOS leaves")
    (root / "train" / "readme.txt").write_text("")
    (root / "train" / "ant" / "notes.txt").write_text("")
    (root / "train" / "ant" / "LICENSE").write_text("no picture")
    (root / "train" / "ant" / "PLAIN").write_bytes(png)
    (root / "train" / "ant" / "2019" / "may").mkdir(parents=True)
    (root / "train" / "ant" / "2019" / "may" / "DEEP.PNG").write_bytes(png)
    for ending, kind in {"gif": "GIF", "webp": "WEBP", "jfif": "JPEG", "jp2": "JPEG2000", "avif": "AVIF"}.items():
        image.save(root / "train" / "ant" / f"x.{ending}", kind)
    (root / "train" / "bee" / "up").symlink_to(root / "train")
    (root / "train" / "bee" / "more").symlink_to(root / "test" / "bee")
    os.mkfifo(root / "train" / "bee" / "pipe.png")
    first = opened(root)
    assert np.bincount(first.train_labels).tolist() == [6 + 7, 6 + 3, 6]
    [line] = capsys.readouterr().err.splitlines()
    assert line == (
        f"cl_bench: {root}: took 28 training and 9 test pictures of 3 classes; left out: 1 beside the class folders, "
        "1 named *.txt, 1 that are neither files nor folders, 1 that link back to a folder above them, "
        "2 whose names begin with a dot, 1 without ending that are no pictures"
    )
    assert np.array_equal(opened(root).train_labels, first.train_labels)  # from the cache, the same
    assert capsys.readouterr().err == f"{line}\n"


def test_all_damaged_pictures_are_named_at_once(tmp_path):
    root = write_pictures(tmp_path / "mine")
    whole = (root / "train" / "ant" / "0.png").read_bytes()
    spoiled = {
        "train/ant/0.png": b"no picture",
        "train/ant/1.png": whole[: len(whole) // 2],
        "train/cat/2.png": b"",
        "test/bee/0.png": tiff(full(1.0, "<f4"), 3),
    }
    for name, content in spoiled.items():
        (root / name).write_bytes(content)
    (root / "test" / "cat" / "dangling.png").symlink_to(tmp_path / "nowhere")
    (root / "test" / "cat" / "loop").symlink_to(root / "test" / "cat" / "loop")
    with pytest.raises(ConfigError) as caught:
        opened(root)
    message = str(caught.value)
    assert "root: expected pictures that can be read" in message
    assert "got 6 that cannot" in message
    for name in [*spoiled, "test/cat/dangling.png (No such file", "test/cat/loop (Too many levels"]:
        assert f"{root / name}" in message, name
    assert "value_range" in message
    assert "\n" not in message


def test_many_damaged_pictures_are_counted(tmp_path):
    root = write_pictures(tmp_path / "mine", train=12)
    for path in (root / "train").rglob("*.png"):
        path.write_bytes(b"no picture")
    with pytest.raises(ConfigError, match=r"got 36 that cannot") as caught:
        opened(root)
    assert str(caught.value).count("0.png") <= 20 >= str(caught.value).count(".png")


def test_a_huge_picture_is_named(tmp_path):
    root = write_pictures(tmp_path / "mine")
    # a few bytes that say 60,000 x 60,000 pixels, which PIL takes for an attack
    bomb = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)) + chunk(b"IDAT", b"")
    (root / "train" / "ant" / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bomb + chunk(b"IEND", b""))
    with pytest.raises(ConfigError, match=r"ant/0.png \(Image size \(3600000000 pixels\) exceeds limit"):
        opened(root)


def test_what_is_wrong_with_a_folder_of_pictures_is_said(tmp_path):
    for number, (spoil, message) in enumerate(
        [
            (lambda root: (root / "test" / "dog").mkdir(), "got dog in test/ only"),
            (lambda root: (root / "test" / "bee").rename(root / "bee"), "got bee in train/ only"),
            (lambda root: [p.unlink() for p in (root / "train" / "bee").iterdir()], "none that PIL can open in .*bee"),
            (lambda root: [p.rename(p.with_suffix(".doc")) for p in (root / "test" / "cat").iterdir()], "test/cat"),
            (lambda root: (root / "train" / "gone").symlink_to("nowhere"), "gone, a link that leads nowhere"),
            (lambda root: (root / "train").rename(root / "else"), "expected a folder .*train"),
        ]
    ):
        root = write_pictures(tmp_path / str(number))
        spoil(root)
        with pytest.raises(ConfigError, match=message):
            opened(root)
    unnamed = write_pictures(tmp_path / "unnamed")
    for path in (unnamed / "test" / "ant").iterdir():
        path.with_suffix("").write_text("no picture")
        path.unlink()
    with pytest.raises(ConfigError, match=r"none that PIL can open in .*test/ant"):
        opened(unnamed)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"size": 0}, "size: expected 1 to 4096 pixels; got 0"),
        ({"size": 10**9}, "size: expected 1 to 4096 pixels"),
        ({"background": [0, 0]}, "background: expected red, green and blue"),
        ({"background": [0, 0, 256]}, "background: expected red, green and blue"),
        ({"value_range": [1.0, 1.0]}, "value_range: expected the values that become black and white"),
        ({"root": "a\0b"}, "root: expected a folder"),
        ({"cache": "a\0b"}, "cache: expected a folder with room"),
    ],
)
def test_wrong_keys_are_refused(keys, message, tmp_path):
    root = write_pictures(tmp_path / "mine")
    with pytest.raises(ConfigError, match=re.escape(message)):
        opened(**({"root": root, "cache": tmp_path / "decoded"} | keys))


def test_pictures_of_a_pixel_and_images_of_one(tmp_path):
    root = write_pictures(tmp_path / "mine")
    of_one_colour("RGB", (9, 9, 9)).resize((1, 1)).save(root / "train" / "ant" / "0.png")
    of_one_colour("RGB", (9, 9, 9)).resize((3000, 1)).save(root / "train" / "ant" / "1.png")
    assert opened(root, size=1).train_images.shape == (18, 3, 1, 1)
    assert opened(root, size=40).train_images[:2].tolist() == np.full((2, 3, 40, 40), 9).tolist()


def learns(root, *more: str) -> list[str]:
    """A command on a folder of pictures that takes a moment."""
    return [
        "scenario=folder", f"data_dir={root}", "scenario.num_tasks=3", "scenario.source.size=8", "logger=none",
        "backbone.hidden=[8]", "trainer.epochs=1", "device=cpu", *more,
    ]  # fmt: skip


# -- what is stored ------------------------------------------------------------------------------------------------


def test_pictures_are_decoded_once_and_mapped(tmp_path, monkeypatch):
    root = write_pictures(tmp_path / "mine")
    first = opened(root)
    assert isinstance(first.train_images, np.memmap)
    assert first.train_images.shape == (18, 3, 8, 8)
    assert first.class_names == ["ant", "bee", "cat"]
    assert first.test_labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert first.train_images[:6, 0].mean() > 100 > first.train_images[:6, 1].mean()
    expected = (first.train_images / 255).transpose(1, 0, 2, 3).reshape(3, -1)
    np.testing.assert_allclose(first.mean, expected.mean(1), atol=1e-4)
    np.testing.assert_allclose(first.std, expected.std(1), atol=1e-4)

    decoded = counting(monkeypatch)
    again = opened(root)
    assert not decoded
    assert np.array_equal(again.train_images, first.train_images)
    assert (again.mean, again.std, again.digest) == (first.mean, first.std, first.digest)
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(root / "test" / "ant" / "0.png")
    other = opened(root)
    assert other.test_images[0].max() == 0
    assert len(decoded) == 9  # the test pictures only
    assert other.digest != first.digest
    assert opened(root, background=[0, 0, 0]).digest == other.digest  # decoded again, to the same images
    assert opened(root, size=9).digest != other.digest


def test_a_picture_of_the_same_size_and_time_is_noticed(tmp_path):
    root = tmp_path / "mine"
    write_pictures(root)
    path = root / "train" / "ant" / "0.bmp"
    of_one_colour("RGB", (1, 1, 1)).save(path)
    before, first = path.stat(), opened(root)
    of_one_colour("RGB", (2, 2, 2)).save(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert opened(root).digest != first.digest


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "truncated": (".images", lambda path: os.truncate(path, 100)),
    "longer": (".images", lambda path: os.truncate(path, 100_000)),
    "empty": (".images", lambda path: path.write_bytes(b"")),
    "one bit": (".images", flip),
    "gone": (".images", lambda path: path.unlink()),
    "a folder": (".images", lambda path: (path.unlink(), path.mkdir())),
    "an empty note": (".json", lambda path: path.write_bytes(b"")),
    "another note": (".json", lambda path: path.write_text("[1, 2]")),
    "half a note": (".json", lambda path: path.write_text('{"shape": ["a"]}')),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_file_of_decoded_images_is_made_again_once(case, tmp_path, monkeypatch, capsys):
    ending, spoil = DAMAGE[case]
    root = write_pictures(tmp_path / "mine")
    images, digest = np.array(opened(root).train_images), opened(root).digest
    (path,) = (tmp_path / "decoded").glob(f"mine-train-*{ending}")
    spoil(path)
    capsys.readouterr()
    decoded = counting(monkeypatch)
    if case == "a folder":  # nothing that this program may take away
        with pytest.raises(ConfigError, match="cache: expected a folder with room"):
            opened(root)
        return
    again = opened(root)
    assert np.array_equal(again.train_images, images)
    assert again.digest == digest
    assert len(decoded) == 18
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if "took" not in line] == [
        f"cl_bench: {path.with_suffix('.images')} is damaged; it is created again"
    ]
    assert opened(root).digest == digest
    assert len(decoded) == 18
    assert not list((tmp_path / "decoded").glob("*.partial"))


def test_a_copied_cache_is_compared_and_not_made_again(tmp_path, monkeypatch):
    root = write_pictures(tmp_path / "mine")
    digest = opened(root).digest
    decoded = counting(monkeypatch)
    for path in (tmp_path / "decoded").glob("*.images"):
        os.utime(path, ns=(5, 5))
    assert opened(root).digest == digest
    assert not decoded
    monkeypatch.setattr("hashlib.file_digest", None)  # nor compared again
    assert opened(root).digest == digest


def test_no_room_for_decoded_images_is_told_before_a_picture_is_read(tmp_path, monkeypatch):
    root = write_pictures(tmp_path / "mine")
    decoded = counting(monkeypatch)
    with no_file_above(3000), pytest.raises(ConfigError, match=r"cache: expected .*got .*decoded \(File too large\)"):
        opened(root)
    assert not decoded
    assert not [path for path in (tmp_path / "decoded").iterdir() if path.suffix != ".lock"]
    assert opened(root).train_images.max() > 0


def forked(task, *arguments) -> multiprocessing.Process:
    """``task`` in a fork of this process."""
    process = multiprocessing.get_context("fork").Process(target=task, args=arguments)
    process.start()
    return process


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.1, 0.5])
def test_two_processes_decode_a_folder_once(delay, tmp_path, monkeypatch):
    root = write_pictures(tmp_path / "mine")
    expected = opened(root, cache=tmp_path / "alone")
    decode = Decoder.decode

    def slow(self, path):
        time.sleep(0.05)
        with (tmp_path / "decoded.txt").open("a") as file:
            file.write(f"{path}\n")
        return decode(self, path)

    monkeypatch.setattr(Decoder, "decode", slow)

    def open_later(seconds: float, name: str) -> None:
        time.sleep(seconds)
        found = opened(root)
        np.savez(tmp_path / name, found.train_images, found.test_images, found.digest)

    processes = [forked(open_later, 0.0, "first.npz"), forked(open_later, delay, "second.npz")]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    for name in ("first.npz", "second.npz"):
        train, test, digest = np.load(tmp_path / name).values()
        assert np.array_equal(train, expected.train_images)
        assert np.array_equal(test, expected.test_images)
        assert str(digest) == expected.digest
    lines = (tmp_path / "decoded.txt").read_text().splitlines()
    assert len(lines) == len(set(lines)) == 27


def test_a_process_that_is_killed_while_it_decodes_leaves_nothing_that_is_taken_for_images(tmp_path, monkeypatch):
    root = write_pictures(tmp_path / "mine")
    expected = opened(root, cache=tmp_path / "alone")
    decode = Decoder.decode

    def deadly(self, path):
        if path.parent.name == "cat":
            os.kill(os.getpid(), 9)
        return decode(self, path)

    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "decode", deadly)
        process = forked(opened, root)
        process.join(60)
        assert process.exitcode == -9
    assert np.array_equal(opened(root).train_images, expected.train_images)


# -- the data are part of a run ------------------------------------------------------------------------------------


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """The command in this process -> exit status and what it said on stderr; no pictures of reports are drawn."""

    def call(*arguments: str) -> tuple[int, str]:
        status = run_in_process(*arguments, "results_dir=r", monkeypatch=monkeypatch, cwd=tmp_path)
        return status, capsys.readouterr().err

    return call


def summaries(tmp_path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(tmp_path.glob("r/*/*/*/summary.json"))]


@pytest.mark.slow
def test_other_pictures_are_another_run(run, tmp_path, monkeypatch):
    first, second = write_pictures(tmp_path / "first"), write_pictures(tmp_path / "second", seed=1)
    for root, number in ((first, 1), (second, 2)):
        status, said = run(*learns(root))
        assert status == 0
        assert "Already finished" not in said
        assert len(summaries(tmp_path)) == number
    one, other = summaries(tmp_path)
    assert one["data"] != other["data"]
    assert one["comparable"] | {"data": None} == other["comparable"] | {"data": None}
    assert one["comparable"]["data"] == one["data"]

    decoded = counting(monkeypatch)
    assert "Already finished" in run(*learns(first))[1]
    assert not decoded  # nor read
    first.rename(tmp_path / "moved")
    assert "Already finished" in run(*learns(tmp_path / "moved"))[1]  # the same pictures elsewhere
    assert len(summaries(tmp_path)) == 2

    picture = tmp_path / "moved" / "train" / "ant" / "0.png"
    of_one_colour("RGB", (5, 5, 5)).save(picture)
    status, said = run(*learns(tmp_path / "moved"))
    assert status == 0
    assert "Already finished" not in said
    assert len({summary["data"] for summary in summaries(tmp_path)}) == 3


@pytest.mark.slow
def test_what_changes_the_data_of_a_run_and_what_does_not(tmp_path):
    root = write_pictures(tmp_path / "mine")
    config = configure(*learns(root))

    def data() -> str:
        return identify_run(config, to_plain_dict(config))[0]["data"]

    first, picture = data(), root / "train" / "ant" / "0.png"
    before = picture.read_bytes()
    of_one_colour("RGB", (5, 5, 5)).save(picture)
    replaced = data()
    picture.write_bytes(before)
    assert data() == first
    picture.rename(picture.with_name("9.png"))  # another order
    reordered = data()
    picture.with_name("9.png").rename(root / "train" / "bee" / "00.png")  # the same images, other labels
    relabelled = data()
    (root / "train" / "bee" / "00.png").rename(picture)
    assert data() == first
    for split in ("train", "test"):
        (root / split / "ant").rename(root / split / "aunt")
    assert len({first, replaced, reordered, relabelled, data()}) == 5


@pytest.mark.slow
def test_a_stopped_run_does_not_go_on_over_other_pictures(run, tmp_path, monkeypatch):
    from test_faults import stopped_in_epoch

    root = write_pictures(tmp_path / "mine")
    stopped_in_epoch(lambda *more: run(*learns(root, *more)), monkeypatch, 3)
    of_one_colour("RGB", (5, 5, 5)).save(root / "train" / "ant" / "0.png")
    assert run(*learns(root))[0] == 0
    [finished] = tmp_path.glob("r/*/*/*/summary.json")
    assert len(list(tmp_path.glob("r/*/*/*/checkpoint/last.pt"))) == 2  # the stopped one lies where it was
    shutil.move(tmp_path / "r", tmp_path / "before")
    assert run(*learns(root))[0] == 0
    assert_equal_results(tmp_path / "before" / finished.parent.relative_to(tmp_path / "r"), find_run(tmp_path / "r"))


@pytest.mark.slow
def test_replicas_share_their_pictures_and_what_they_are_called(run, tmp_path, monkeypatch):
    root = write_pictures(tmp_path / "mine")
    decoded = counting(monkeypatch)
    assert run(*learns(root, "trainer.replicas=2"))[0] == 0
    assert len(decoded) == 27
    one, other = summaries(tmp_path)
    assert one["data"] == other["data"]
    assert one["fingerprint"] == other["fingerprint"]
    assert "Already finished" in run(*learns(root, "seed=1"))[1]


def test_a_typing_error_is_answered_before_a_picture_is_read(run, tmp_path):
    root = write_pictures(tmp_path / "mine")
    status, said = run(*learns(root, "+method.strenght=1"))
    assert status == 2
    assert "the unknown key strenght" in said
    assert not (root / "decoded").exists()


@pytest.mark.slow
def test_a_checkpoint_of_other_images_is_refused(run, tmp_path, monkeypatch):
    from test_faults import RUN, stopped_in_epoch

    from cl_bench.data.base import ImageSet

    stopped_in_epoch(lambda *more: run(*RUN, *more), monkeypatch, 3)
    with monkeypatch.context() as patch:
        patch.setattr(ImageSet, "digest", "0123456789abcdef")
        status, said = run(*RUN)
    assert status == 2
    assert "checkpoint: expected a checkpoint of a run on these images (data 0123456789abcdef); got one" in said
    assert "overwrite=true" in said
    assert said.count("\n") == 1
    assert run(*RUN)[0] == 0


GOLDEN = {"resnet18_er_cifar100_10split": "cae21c6965", "lvt_cifar100_10split": "103393778f"}
"""Fingerprints under which results/mini/records keeps these experiments."""


@pytest.mark.slow
def test_what_was_recorded_keeps_its_fingerprint():
    """Bundled and officially checked data do not enter it, so that every record still is what its command makes."""
    records = sorted((ROOT / "results" / "mini").rglob("config.yaml"))
    assert len(records) > 80
    for path in records:
        summary = json.loads((path.parent / "summary.json").read_text())
        settings = select_comparable(yaml.safe_load(path.read_text()))
        if "backbone.checkpoint" in settings:  # the weights of a file are told by its digest
            settings["backbone.checkpoint"] = summary["comparable"]["backbone.checkpoint"]
        assert compute_fingerprint(settings) == summary["fingerprint"], path
    for experiment, written in GOLDEN.items():
        config = configure(f"+experiment={experiment}", "+scale=mini")
        settings, scenario = identify_run(config, to_plain_dict(config))
        assert compute_fingerprint(settings) == written
        assert scenario is None  # nothing was read for it


@pytest.mark.parametrize(
    "scenario",
    ["digits", "cifar100", "permuted_digits", "permuted_digits_shared", "mnist", "cifar10", "svhn", "rotated_mnist"],
)
def test_bundled_and_checked_data_are_told_by_their_name(scenario):
    config = configure(f"scenario={scenario}", "data_dir=/dev/null/nowhere")
    assert identify_run(config, to_plain_dict(config)) == (select_comparable(to_plain_dict(config)), None)


def test_the_digest_is_that_of_images_labels_and_names():
    source = toy_images()
    same = dataclasses.replace(toy_images(), mean=[0.1], std=[0.2])
    assert source.digest == same.digest
    assert digits().digest == "ea8a534ec068cef4"  # on every machine
    for name in ("train_images", "train_labels", "test_images", "test_labels"):
        changed = getattr(source, name).copy()
        changed[-1] = 1 - changed[-1]
        assert dataclasses.replace(source, **{name: changed}).digest != source.digest, name
    assert dataclasses.replace(source, class_names=[*source.class_names[:-1], "other"]).digest != source.digest
    wide = {name: getattr(source, name).reshape(-1, 1, 4, 16) for name in ("train_images", "test_images")}
    assert dataclasses.replace(source, **wide).digest != source.digest


def test_what_is_made_of_pictures_is_told_by_them(tmp_path):
    """However deep the folder stands in the configuration, and whatever stands above it."""
    root = write_pictures(tmp_path / "mine")
    source = {
        "_target_": "cl_bench.data.folder.folder", "root": str(root), "size": 8, "cache": str(tmp_path / "decoded"),
        "background": WHITE, "value_range": None, "test_fraction": 0.0, "split_seed": 0,
    }  # fmt: skip

    def data() -> str:
        config = configure("scenario=permuted_digits_shared", "scenario.disjoint.num_tasks=2", "device=cpu")
        config.scenario.disjoint.source.digits = source
        settings, scenario = identify_run(config, to_plain_dict(config))
        assert build(config, scenario).describe()["data"] == settings["data"]
        return settings["data"]

    before = data()
    of_one_colour("RGB", (5, 5, 5)).save(root / "test" / "cat" / "0.png")
    assert data() != before


OWN_SCENARIO = """
from pathlib import Path

import torch

from cl_bench.data.transform import Transform
from cl_bench.scenarios.base import Scenario
from cl_bench.scenarios.split import Split
from cl_bench.core.types import Data, Task


class Own(Scenario):
    def __init__(self, *, file: str) -> None:
        pixels = torch.full((4, 1, 8, 8), int(Path(file).read_text()), dtype=torch.uint8)
        images = Data(pixels, torch.tensor([0, 0, 1, 1]), torch.arange(4))
        none = images.take(slice(0))
        self.class_order, self.class_names, self.image_shape = [0, 1], ["a", "b"], (1, 8, 8)
        self.transform = Transform(mean=[0.5], std=[0.5], crop_padding=0, flip=False)
        self.pretrain, self.pretrain_order = none, []
        self.tasks = [Task(0, range(2), images, none, images)]


class Derived(Split):
    pass
"""


@pytest.mark.slow
def test_a_scenario_of_ones_own_is_told_by_its_images(tmp_path, monkeypatch):
    (tmp_path / "own_scenario.py").write_text(OWN_SCENARIO)
    monkeypatch.syspath_prepend(tmp_path)
    config = configure("allow_packages=[own_scenario]", "device=cpu")
    config.scenario = {"_target_": "own_scenario.Own", "file": str(tmp_path / "value")}
    found = []
    for value in ("1", "1", "2"):
        (tmp_path / "value").write_text(value)
        settings, scenario = identify_run(config, to_plain_dict(config))
        assert build(config, scenario).describe()["data"] == settings["data"]
        found.append(settings["data"])
    assert found[0] == found[1] != found[2]
    config = configure("allow_packages=[own_scenario]", "scenario._target_=own_scenario.Derived", "device=cpu")
    assert "data" in identify_run(config, to_plain_dict(config))[0]


@pytest.mark.slow
def test_a_file_of_weights_counts_with_its_content(tmp_path):
    def settings(name: str) -> dict:
        return select_comparable(
            to_plain_dict(configure("backbone=memory_vit_digits", f"backbone.checkpoint={tmp_path / name}"))
        )

    (tmp_path / "one.pt").write_bytes(b"weights")
    (tmp_path / "same.pt").write_bytes(b"weights")
    (tmp_path / "other.pt").write_bytes(b"others")
    assert settings("one.pt") == settings("same.pt")
    assert settings("one.pt") != settings("other.pt")
    assert settings("missing.pt")["backbone.checkpoint"] == str(tmp_path / "missing.pt")


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.1, 0.5])
def test_two_commands_on_a_fresh_folder_are_each_what_they_are_alone(delay, run, tmp_path, monkeypatch):
    root = write_pictures(tmp_path / "mine", train=20, test=5)
    decode = Decoder.decode
    monkeypatch.setattr(Decoder, "decode", lambda self, path: (time.sleep(0.02), decode(self, path))[1])

    def command_of(name: str, cache: str, seconds: float = 0.0) -> int:
        time.sleep(seconds)
        more = [f"scenario.source.cache={tmp_path / cache}", f"results_dir={name}"]
        return run_in_process(*learns(root, *more), monkeypatch=monkeypatch, cwd=tmp_path)

    assert command_of("alone", "own") == 0  # here, so that the others need not import what it has
    processes = [
        forked(lambda: sys.exit(command_of("one", "fresh"))),
        forked(lambda: sys.exit(command_of("two", "fresh", delay))),
    ]
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    for name in ("one", "two"):
        assert_equal_results(find_run(tmp_path / "alone"), find_run(tmp_path / name))


@pytest.mark.slow
def test_a_class_name_that_is_not_utf8_reaches_the_report(tmp_path, monkeypatch, capsys):
    root = write_pictures(tmp_path / "mine")
    for split in ("train", "test"):
        os.rename(root / split / "bee", os.fsencode(root / split) + b"/caf\xe9")
    assert run_in_process(*learns(root), monkeypatch=monkeypatch, cwd=tmp_path, report=True) == 0
    assert "No report" not in capsys.readouterr().err
    run = find_run(tmp_path / "results")
    assert json.loads((run / "summary.json").read_text())["class_names"] == ["ant", "caf\\xe9", "cat"]
    assert "caf\\xe9" in (run / "report.html").read_text()
