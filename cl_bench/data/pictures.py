"""What a picture file shows: eight bits a channel, RGB, upright."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, ImageOps

UNREADABLE = {"EPS", "WMF", "MPEG", "HDF5", "GRIB", "BUFR", "FITS"}
"""Kinds that PIL knows by name only or gives to another program, and FITS, whose scale it ignores."""

BITS, PHOTOMETRIC, PLANAR, SAMPLE_FORMAT = 258, 262, 284, 339
"""Tags of a TIFF file: bits of a value; 0 where 0 is white; 2 where each channel is a plane, or values are signed."""


@cache
def list_kinds() -> list[str]:
    """The kinds of picture that PIL can decode here."""
    Image.init()
    return sorted(set(Image.OPEN) - UNREADABLE)


@cache
def list_endings() -> frozenset[str]:
    """Their files' endings, in small letters."""
    readable = {*list_kinds(), "MPO"}  # that one is opened as a JPEG
    return frozenset(ending for ending, kind in Image.registered_extensions().items() if kind in readable)


@dataclass(frozen=True)
class Decoder:
    """How picture files become images.

    Attributes:
        size: side of the image in pixels; the picture is scaled so that its shorter side fits, and cut around its
            centre.
        background: colour behind transparent pixels, 0 to 255 a channel.
        value_range: the values that become black and white in pictures deeper than eight bits; None for the whole range
            of 16 bits. 32-bit integers and floating-point numbers have no usual range, so they need one.
    """

    size: int
    background: tuple[int, int, int]
    value_range: tuple[float, float] | None

    def decode(self, path: Path) -> np.ndarray:
        """(3, size, size) uint8: the first picture of the file, turned as its EXIF data say.

        Raises:
            Exception: the file is damaged, or not to be decoded without a ``value_range``; PIL raises many kinds.
        """
        with Image.open(path, formats=list_kinds()) as picture:
            _refuse_what_pil_misreads(picture)
            picture.load()  # a TIFF file is turned by this already
            shown = ImageOps.exif_transpose(picture)
            if picture.mode[0] in "IF":
                shown = self._convert_to_eight_bits(shown, picture)
            if shown.has_transparency_data:
                behind = Image.new("RGBA", shown.size, (*self.background, 255))
                shown = Image.alpha_composite(behind, shown.convert("RGBA"))
            fitted = ImageOps.fit(shown.convert("RGB"), (self.size, self.size))
        return np.asarray(fitted).transpose(2, 0, 1)

    def _convert_to_eight_bits(self, shown: Image.Image, file: Image.Image) -> Image.Image:
        """A picture of one deep channel; ``file`` says what its values are."""
        values, tags = np.asarray(shown), getattr(file, "tag_v2", {})
        bits = tags.get(BITS, (16,))[0]
        if file.mode == "I" and bits == 32 and tags.get(SAMPLE_FORMAT, (1,))[0] == 1:
            values = values.view(np.uint32)  # PIL has signed ones only
        if self.value_range is not None:
            low, high = self.value_range
        elif file.mode.startswith("I;16") or (file.mode == "I" and file.format in ("PNG", "PPM")):
            low, high = 0.0, 2.0**bits - 1
        else:
            raise ValueError(
                f"{'floating-point numbers' if file.mode == 'F' else 'signed or 32-bit integers'} of unknown range: "
                "set scenario.source.value_range=[LOW,HIGH]"
            )
        if not np.isfinite(values).all():
            raise ValueError("values that are not finite")
        scaled = np.rint((values.astype(np.float64) - low) * (255.0 / (high - low))).clip(0, 255)
        scaled = 255.0 - scaled if tags.get(PHOTOMETRIC) == 0 else scaled
        gray = Image.fromarray(scaled.astype(np.uint8))
        if (clear := file.info.get("transparency")) is not None:  # the one value that stands for transparent pixels
            gray.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
        return gray


def _refuse_what_pil_misreads(picture: Image.Image) -> None:
    """Refuse what PIL would open to other values than the file has, without a word; asked before it is loaded."""
    tags = getattr(picture, "tag_v2", {})
    bits = max(tags.get(BITS, (1,)))
    if bits > 8 and tags.get(PLANAR) == 2 and len(picture.getbands()) > 1:
        raise ValueError(f"{bits} bits a channel in planes: save it with the channels of a pixel side by side")
    if bits == 8 and 2 in tags.get(SAMPLE_FORMAT, ()):
        raise ValueError("signed 8-bit integers: save it with unsigned ones")
    deep = isinstance(picture, ImageFile.ImageFile) and any(tile.args == "RGB;16B" for tile in picture.tile)
    if deep and "transparency" in picture.info:
        raise ValueError("a transparent colour of 16 bits a channel: save it with an alpha channel")
