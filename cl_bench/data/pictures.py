"""Decode a picture file to RGB, eight bits per channel, upright."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, ImageOps

UNREADABLE = {"EPS", "WMF", "MPEG", "HDF5", "GRIB", "BUFR", "FITS"}
"""Formats that PIL cannot decode itself, and FITS, whose scale it ignores."""

BITS, PHOTOMETRIC, PLANAR, SAMPLE_FORMAT = 258, 262, 284, 339
"""Tags of a TIFF file: bits per value; 0 if 0 means white; 2 if each channel is a plane; 2 if values are signed."""


@cache
def list_kinds() -> list[str]:
    """The picture formats that PIL can decode here."""
    Image.init()
    return sorted(set(Image.OPEN) - UNREADABLE)


@cache
def list_endings() -> frozenset[str]:
    """The file endings of these formats, in lower case."""
    readable = {*list_kinds(), "MPO"}  # PIL opens it as a JPEG
    return frozenset(ending for ending, kind in Image.registered_extensions().items() if kind in readable)


@dataclass(frozen=True)
class Decoder:
    """Turns picture files into images.

    Attributes:
        size: side of the image in pixels; the picture is scaled so that its shorter side fits, and cropped at its
            centre.
        background: colour behind transparent pixels, 0 to 255 per channel.
        value_range: the values that become black and white in pictures of more than eight bits; None for the whole
            range of 16 bits. 32-bit integers and floating-point numbers have no usual range, so they need one.
    """

    size: int
    background: tuple[int, int, int]
    value_range: tuple[float, float] | None

    def decode(self, path: Path) -> np.ndarray:
        """The first picture of the file, (3, size, size) uint8, rotated as its EXIF data say.

        Raises:
            Exception: the file is damaged, or needs a ``value_range``; PIL raises many types.
        """
        return np.asarray(ImageOps.fit(self.read(path), (self.size, self.size))).transpose(2, 0, 1)

    def read(self, path: Path, stored: tuple[int, int] | None = None) -> Image.Image:
        """The first picture of the file in its own size, as RGB; see :meth:`decode`.

        Args:
            path: the file.
            stored: the width and height, in pixels, of a picture that is not to be rotated.
        """
        with Image.open(path, formats=list_kinds()) as picture:
            _refuse_what_pil_misreads(picture)
            picture.load()  # this already rotates a TIFF file
            shown = picture if picture.size == stored else ImageOps.exif_transpose(picture)
            if picture.mode[0] in "IF":
                shown = self._convert_to_eight_bits(shown, picture)
            if shown.has_transparency_data:
                behind = Image.new("RGBA", shown.size, (*self.background, 255))
                shown = Image.alpha_composite(behind, shown.convert("RGBA"))
            return shown.convert("RGB")

    def _convert_to_eight_bits(self, shown: Image.Image, file: Image.Image) -> Image.Image:
        """A picture with one channel of more than eight bits, as eight bits; ``file`` says what its values mean."""
        values, tags = np.asarray(shown), getattr(file, "tag_v2", {})
        bits = tags.get(BITS, (16,))[0]
        if file.mode == "I" and bits == 32 and tags.get(SAMPLE_FORMAT, (1,))[0] == 1:
            values = values.view(np.uint32)  # PIL knows only signed ones
        if self.value_range is not None:
            low, high = self.value_range
        elif file.mode.startswith("I;16") or (file.mode == "I" and file.format in ("PNG", "PPM")):
            low, high = 0.0, 2.0**bits - 1
        else:
            raise ValueError(
                f"{'floating-point numbers' if file.mode == 'F' else 'signed or 32-bit integers'} of unknown range: "
                "set scenario.source.value_range=[LOW,HIGH], or save it with 16 bits if the source has no such key"
            )
        if not np.isfinite(values).all():
            raise ValueError("values that are not finite")
        scaled = np.rint((values.astype(np.float64) - low) * (255.0 / (high - low))).clip(0, 255)
        scaled = 255.0 - scaled if tags.get(PHOTOMETRIC) == 0 else scaled
        gray = Image.fromarray(scaled.astype(np.uint8))
        if (clear := file.info.get("transparency")) is not None:  # the value that means transparent
            gray.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
        return gray


def _refuse_what_pil_misreads(picture: Image.Image) -> None:
    """Refuse a picture that PIL would silently decode to wrong values; called before it is loaded."""
    tags = getattr(picture, "tag_v2", {})
    bits = max(tags.get(BITS, (1,)))
    if bits > 8 and tags.get(PLANAR) == 2 and len(picture.getbands()) > 1:
        raise ValueError(f"{bits} bits per channel in planes: save it with the channels of a pixel side by side")
    if bits == 8 and 2 in tags.get(SAMPLE_FORMAT, ()):
        raise ValueError("signed 8-bit integers: save it with unsigned ones")
    deep = isinstance(picture, ImageFile.ImageFile) and any(tile.args == "RGB;16B" for tile in picture.tile)
    if deep and "transparency" in picture.info:
        raise ValueError("a transparent colour of 16 bits per channel: save it with an alpha channel")
