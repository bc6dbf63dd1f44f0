"""Pictures of every kind of file, as a viewer shows them; and one line for whatever is none."""

import numpy as np
import pytest
from PIL import Image, ImageOps

from peft_icm.conditioning import open_images
from peft_icm.pictures import open_picture, picture_size

RAMP = np.linspace(0, 1, 10_000).reshape(100, 100)


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_once_as_exif_says(tmp_path, ending, orientation):
    pixels = np.zeros((50, 80, 3), np.uint8)
    pixels[30:45, 10:30] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / f"a.{ending}"
    Image.fromarray(pixels).save(file, exif=exif)
    with Image.open(file) as picture:
        shown = np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))
    once = open_picture(file)
    assert picture_size(file) == once.size == shown.shape[1::-1]
    assert np.array_equal(once, shown) and np.array_equal(open_picture(once), shown)
    assert np.array_equal(open_images([file])[0], shown)


@pytest.mark.parametrize(
    ("ending", "values"),
    [
        ("png", (RAMP * 65535).astype(np.uint16)),
        ("tif", (RAMP * 4095).astype(">u2")),
        ("tif", (RAMP * 60000 - 30000).astype(np.int32)),
        ("tif", (RAMP * 7 - 3).astype(np.float32)),
    ],
)
def test_deep_values_are_scaled_and_not_clipped(tmp_path, ending, values):
    Image.fromarray(values).save(tmp_path / f"a.{ending}")
    pixels = np.asarray(open_picture(tmp_path / f"a.{ending}"))
    assert pixels.shape == (100, 100, 3) and np.unique(pixels).size == 256 and abs(pixels.mean() - 127.5) < 1


def test_what_is_not_finite_is_black():
    values = RAMP.astype(np.float32)
    values[50, :2] = np.nan, np.inf
    pixels = np.asarray(open_picture(Image.fromarray(values)))
    assert not pixels[50, :2].any() and pixels.max() == 255
    with pytest.raises(ValueError, match="none of its values is finite"):
        open_picture(Image.fromarray(np.full((4, 4), np.nan, np.float32)))


@pytest.mark.parametrize(("mode", "colour"), [("LA", (0, 0)), ("RGBA", (255, 0, 0, 0)), ("PA", 0)])
def test_transparent_parts_are_white(mode, colour):
    assert open_picture(Image.new(mode, (4, 4), colour)).getpixel((0, 0)) == (255, 255, 255)


def test_a_transparent_colour_of_a_palette_is_white(tmp_path):
    picture = Image.new("RGB", (4, 4), "red").convert("P")
    picture.save(tmp_path / "a.png", transparency=picture.getpixel((0, 0)))
    assert open_picture(tmp_path / "a.png").getpixel((0, 0)) == (255, 255, 255)


def test_cmyk_and_the_first_frame(tmp_path):
    assert open_picture(Image.new("CMYK", (4, 4), (0, 255, 255, 0))).getpixel((0, 0)) == (255, 0, 0)
    red, blue = (Image.new("RGB", (4, 4), colour) for colour in ("red", "blue"))
    red.save(tmp_path / "a.gif", save_all=True, append_images=[blue])
    assert open_picture(tmp_path / "a.gif").getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("read", [open_picture, picture_size])
def test_more_pixels_than_pillow_opens(tmp_path, read):
    Image.new("1", (20_000, 20_000)).save(tmp_path / "map.png")
    with pytest.raises(ValueError, match=r"map\.png is too large a picture .*: make it smaller") as error:
        read(tmp_path / "map.png")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("ending", ["dds", "png", "jpg", "gif", "tif", "webp", "bmp", "tga", "ppm", "ico"])
def test_a_cut_file_is_one_line(tmp_path, ending):
    file = tmp_path / f"cut.{ending}"
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    Image.fromarray(noise).save(file)
    whole = file.read_bytes()
    for length in (0, 3, 20, len(whole) // 2):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=rf"cut\.{ending} is no picture that can be opened") as error:
            open_picture(file)
        assert "\n" not in str(error.value)


def test_more_pixels_than_there_is_memory_for():
    class Large(Image.Image):
        def load(self):
            raise MemoryError

    with pytest.raises(ValueError, match="is too large a picture for the memory of this machine: make it smaller"):
        open_picture(Large())


def test_postscript_is_not_run(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.eps")
    with pytest.raises(ValueError, match="runs them as programs"):
        picture_size(tmp_path / "a.eps")
