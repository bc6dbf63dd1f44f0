"""Pictures of every kind of file, in RGB, as a viewer shows them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import ExifTags, Image

Picture = Image.Image | str | os.PathLike[str]
TURNS = {  # EXIF orientation -> what shows the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_picture(image: Picture) -> Image.Image:
    """A picture in RGB, as every viewer shows it.

    It is turned as its EXIF data says; transparent parts are white; values of 16 or 32 bits or floats are scaled to 8 bits, from their
    smallest to their largest, those that are not finite black; of an animation it is the first frame.

    Args:
        image (`PIL.Image.Image`, `str` or `Path`): A picture, or the path of a picture's file.

    Returns:
        `PIL.Image.Image`: Decoded, of mode `"RGB"`.

    Raises:
        `ValueError`: If the file is missing, is no picture, is damaged, or has more pixels than Pillow opens (twice
            `PIL.Image.MAX_IMAGE_PIXELS`, 178 million) or than there is memory for.

    Example:

    ```python
    >>> open_picture(Image.new("LA", (40, 30), (0, 0))).getpixel((0, 0))
    (255, 255, 255)

    ```
    """
    with _opened(image) as picture:
        orientation = _orientation(picture)
        picture.load()
        shown = _rgb(picture)
        shown = shown.transpose(TURNS[orientation]) if orientation in TURNS else shown
        shown.info.clear()  # or its EXIF data would turn it once more
        return shown


def picture_size(image: Picture) -> tuple[int, int]:
    """Width and height of [`open_picture`]'s picture, without decoding it.

    Args:
        image (`PIL.Image.Image`, `str` or `Path`): A picture, or the path of a picture's file.

    Returns:
        `tuple[int, int]`: Width and height, as the picture is shown.

    Raises:
        `ValueError`: If the file is missing, is no picture, or has more pixels than Pillow opens.

    Example:

    ```python
    >>> picture_size(Image.new("L", (40, 30)))
    (40, 30)

    ```
    """
    with _opened(image) as picture:
        width, height = picture.size
        return (height, width) if _orientation(picture) >= 5 else (width, height)


@contextmanager
def _opened(image: Picture) -> Iterator[Image.Image]:
    name = getattr(image, "filename", "") or f"{image!r}" if isinstance(image, Image.Image) else os.fspath(image)
    try:
        with warnings.catch_warnings():
            # Pillow warns from half of its bound on; what is within the bound is simply opened.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            if isinstance(image, Image.Image):
                yield image
                return
            with Image.open(image) as picture:
                if picture.format == "EPS":
                    raise OSError("Pillow hands EPS files to Ghostscript, which runs them as programs")
                yield picture
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} is too large a picture ({error}): make it smaller.") from error
    except MemoryError as error:
        raise ValueError(f"{name} is too large a picture for the memory of this machine: make it smaller.") from error
    except Exception as error:  # a damaged file ends Pillow's decoders with exceptions of any kind
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{name} is no picture that can be opened ({reason}): pass the path of an image file.") from error


def _orientation(picture: Image.Image) -> int:
    """EXIF's orientation, 1 to 8; 1 of a picture that is upright once it is loaded."""
    if picture.format == "TIFF":  # Pillow turns these itself
        picture.load()
        return 1
    try:
        # Not the PNG class' own method, which decodes the whole picture to look for EXIF data behind it.
        orientation = Image.Image.getexif(picture).get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF data of a picture that is whole: no viewer minds
        return 1
    return orientation if orientation in TURNS else 1


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I") or picture.mode == "F":
        values = np.asarray(picture).astype(np.float64)  # and then in place: a picture may have 178 million
        values[~np.isfinite(values)] = np.nan
        low, high = np.fmin.reduce(values, axis=None), np.fmax.reduce(values, axis=None)
        if np.isnan(low):
            raise ValueError("none of its values is finite")
        values -= low
        values *= 255 / max(high - low, 1e-300)
        np.nan_to_num(values, copy=False)
        return Image.fromarray(values.round(out=values).astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        above = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", above.size, "white"), above).convert("RGB")
    return picture.convert("RGB")
