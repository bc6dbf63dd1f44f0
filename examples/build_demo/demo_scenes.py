"""Small detection scenes: icons of many artists' styles pasted on photographs, with tight boxes from alpha.

Icons come from the `@iconify-json` packages of npm, photographs from two Debian packages of wallpapers. Three styles and five
photographs are never seen in training: they make the test set. Classes are COCO's; six of them are never taught to the base model.
"""

from __future__ import annotations

import io
import json
import re
import subprocess
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import resvg_py
from PIL import Image
from tqdm.auto import tqdm

PACKAGES = {  # npm: @iconify-json/NAME at this version
    "noto": "1.2.9", "noto-v1": "1.2.5", "twemoji": "1.2.5", "openmoji": "1.2.29", "fluent-emoji": "1.2.7", "fluent-emoji-flat": "1.2.6",
    "emojione": "1.2.3", "emojione-v1": "1.2.3", "fxemoji": "1.2.2", "streamline-emojis": "1.2.4", "mdi": "1.2.3", "fa6-solid": "1.2.4",
    "ph": "1.2.2", "tabler": "1.2.41", "lucide": "1.2.137", "iconoir": "1.2.11", "game-icons": "1.2.4", "emojione-monotone": "1.2.1",
    "fluent-emoji-high-contrast": "1.2.6", "icon-park": "1.2.4",
}  # fmt: skip
TEST_STYLES = ("noto", "twemoji", "openmoji")
COLOUR_STYLES = ("noto-v1", "fluent-emoji", "fluent-emoji-flat", "emojione", "emojione-v1", "fxemoji", "streamline-emojis")
GLYPH_STYLES = tuple(name for name in PACKAGES if name not in TEST_STYLES + COLOUR_STYLES)  # of one colour, which is drawn at random
PHOTOGRAPHS = ("lomiri-wallpapers-16.04", "lomiri-wallpapers-20.04")
TEST_PHOTOGRAPHS = 5

CLASSES = {  # COCO's name: names of its icons
    "dog": ("dog", "dog-face"), "cat": ("cat", "cat-face"), "bicycle": ("bicycle", "bike"), "car": ("automobile", "car"),
    "bus": ("bus", "oncoming-bus"), "truck": ("delivery-truck", "truck"), "airplane": ("airplane", "plane"), "boat": ("sailboat",),
    "traffic light": ("vertical-traffic-light", "traffic-light"), "bird": ("bird", "dove", "crow"), "cow": ("cow", "cow-face"),
    "elephant": ("elephant",), "tv": ("television", "tv"), "book": ("open-book", "closed-book", "orange-book", "book"),
    "scissors": ("scissors",), "banana": ("banana",), "apple": ("red-apple", "green-apple", "apple"),
    "cup": ("hot-beverage", "teacup-without-handle", "cup"), "couch": ("couch-and-lamp", "couch", "sofa"),
    "motorcycle": ("motorcycle", "motorbike"), "horse": ("horse", "horse-face"), "umbrella": ("umbrella", "umbrella-with-rain-drops"),
    "clock": ("alarm-clock", "alarm", "clock"), "pizza": ("pizza", "pizza-slice"),
}  # fmt: skip
# What may be drawn at all: tests of unseen classes are kept elsewhere, on nouns that nothing here has ever shown.
SEEN = frozenset(json.loads((Path(__file__).parent / "nouns.json").read_text(encoding="utf-8"))["seen"])
UNTAUGHT = ("couch", "motorcycle", "horse", "umbrella", "clock", "pizza")
TAUGHT = tuple(name for name in CLASSES if name not in UNTAUGHT)
# Emoji that are no objects, alike, or kin to a class: never a distractor.
NO_OBJECT = re.compile(
    r"flag|face|hand|button|arrow|square|circle|person|people|man\b|woman|men\b|women|boy|girl|child|family|couple|kiss|heart|finger"
    r"|oclock|thirty|moon|sign|symbol|zodiac|mark|letter|keycap|number|input|eyes?$|mouth|nose|ear$|foot|leg|arm|thumb|fist|skin|hair"
    r"|tone|medium|light|dark|victory|bus|car\b|truck|taxi|automobile|motor|scooter|bike|bicycl|horse|carousel|unicorn|zebra|dog|wolf"
    r"|poodle|paw|cat\b|tiger|leopard|lion|fox|ox$|cow|buffalo|bird|chick|eagle|duck|owl|rooster|turkey|dove|airplane|boat|ship|ferry"
    r"|canoe|television|computer|book|ledger|notebook|scissor|banana|apple|cup|tea|beverage|sake|couch|bed|seat|umbrella|clock|watch"
    r"|timer|hourglass|pizza|elephant|traffic|police|fire-engine|ambulance|trolley|minibus|tractor|racing|sport-utility|lorry|tram|rail|metro|train|locomotive|station|speech|thought|bubble|cloud"
    r"|sun|star|rain|snow|dot|zzz|anger|dash|sweat|droplet|repeat|play|stop|record|eject|recycl|plus|minus|division|infinity|japanese"
    r"|spade|club|diamond|clef|note|dizzy|collision|hundred|exclamation|question|prohibit|no-|non-|om$|cross$|atom|peace|wheel|dharma"
)


def fetch(build: Path) -> None:
    """Download and unpack the icon sets and photographs by their registries' ordinary clients."""
    archives = build / "packages"
    archives.mkdir(parents=True, exist_ok=True)
    for name, version in tqdm(PACKAGES.items(), desc="icons"):
        target = build / "icons" / name
        if not target.exists():
            subprocess.run(["npm", "pack", "-s", f"@iconify-json/{name}@{version}"], cwd=archives, check=True, stdout=subprocess.DEVNULL)
            with tarfile.open(archives / f"iconify-json-{name}-{version}.tgz") as archive:
                members = [member for member in archive.getmembers() if member.name in ("package/icons.json", "package/info.json")]
                for member in members:
                    member.name = Path(member.name).name
                archive.extractall(target, members)
    for package in PHOTOGRAPHS:
        if not list((build / "photographs").glob(f"**/{package}*")):
            subprocess.run(["apt-get", "download", "-q", package], cwd=archives, check=True)
            subprocess.run(["dpkg", "-x", str(next(archives.glob(f"{package}_*.deb"))), str(build / "photographs")], check=True)


@dataclass(frozen=True)
class Icon:
    """A drawing: what it shows, whose style, and its RGBA pixels cut to what is visible."""

    label: str
    style: str
    pixels: Image.Image


class Icons:
    """The icon sets, rendered once: `build/icons/SET/icons.json` -> RGBA pictures of at most 96 pixels.

    Args:
        build (`Path`): Where [`fetch`] put them.
    """

    def __init__(self, build: Path):
        self.sets = {name: json.loads((build / "icons" / name / "icons.json").read_text()) for name in PACKAGES}

    def draw(self, style: str, name: str, label: str) -> Icon | None:
        """Render one icon; None where the set has none of that name, or nothing of it is visible."""
        found = self.sets[style]
        aliases = found.get("aliases", {})
        while name in aliases and name not in found["icons"]:
            name = aliases[name]["parent"]
        icon = found["icons"].get(name)
        if icon is None:
            return None
        width, height = (icon.get(side, found.get(side, 16)) for side in ("width", "height"))
        box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
            f' viewBox="{box}" width="96" height="96">{icon["body"].replace("currentColor", "#000")}</svg>'
        )
        picture = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg)))).convert("RGBA")
        visible = picture.getchannel("A").point(lambda alpha: 255 * (alpha > 64)).getbbox()
        return Icon(label, style, picture.crop(visible)) if visible else None

    def of_classes(self, labels: Sequence[str], styles: Sequence[str]) -> dict[str, list[Icon]]:
        """All icons of each class in these styles."""
        drawn = {label: [self.draw(style, name, label) for style in styles for name in CLASSES[label]] for label in labels}
        return {label: [icon for icon in icons if icon] for label, icons in drawn.items()}

    @cached_property
    def seen(self) -> dict[str, list[Icon]]:
        """Every noun under `seen` of nouns.json that at least two of the coloured training styles have, with its glyphs."""
        drawn = {name: [self.draw(style, name, name) for style in COLOUR_STYLES + GLYPH_STYLES] for name in sorted(SEEN)}
        found = {name: [icon for icon in icons if icon] for name, icons in drawn.items()}
        return {name: icons for name, icons in found.items() if sum(icon.style in COLOUR_STYLES for icon in icons) >= 2}

    @cached_property
    def distractors(self) -> dict[str, list[Icon]]:
        """Other objects under `seen` of nouns.json that at least four of the coloured training styles have, none of them kin to a class."""
        counts: dict[str, int] = {}
        for style in COLOUR_STYLES:
            for name in {*self.sets[style]["icons"], *self.sets[style].get("aliases", {})}:
                counts[name] = counts.get(name, 0) + 1
        names = sorted(name for name, count in counts.items() if count >= 4 and name in SEEN and not NO_OBJECT.search(name))
        drawn = {name: [self.draw(style, name, name) for style in COLOUR_STYLES] for name in names}
        return {name: [icon for icon in icons if icon] for name, icons in drawn.items()}


def photographs(build: Path, *, test: bool, crops: int, size: int, seed: int = 0) -> list[Image.Image]:
    """Square crops of the photographs of one split, at many scales."""
    files = sorted((build / "photographs").glob("usr/share/backgrounds/**/*.jpg"))
    files = files[:TEST_PHOTOGRAPHS] if test else files[TEST_PHOTOGRAPHS:]
    draw = np.random.default_rng(seed)
    result = []
    for file in files:
        with Image.open(file) as opened:
            picture = opened.convert("RGB")
        picture.thumbnail((1600, 1600))
        for _ in range(crops // len(files) + 1):
            side = int(draw.integers(size, min(picture.size)))
            left, top = (int(draw.integers(0, length - side + 1)) for length in picture.size)
            result.append(picture.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BICUBIC))
    return result


def _recolour(icon: Icon, draw: np.random.Generator, strength: float) -> Image.Image:
    """Another hue, contrast and brightness; a glyph of one colour gets a colour."""
    pixels = np.asarray(icon.pixels).astype(np.float32)
    colour, alpha = pixels[..., :3], pixels[..., 3:]
    if icon.style in GLYPH_STYLES and icon.style != "icon-park":
        colour = np.broadcast_to(draw.uniform(0, 255, 3).astype(np.float32), colour.shape)
    elif strength and draw.random() < 0.7:
        grey = colour.mean(-1, keepdims=True)
        mixed = np.eye(3) + draw.normal(0, 0.35 * strength, (3, 3))
        colour = grey + (colour - grey) @ mixed.astype(np.float32).T * draw.uniform(0.5, 1.4)
        if draw.random() < 0.3:
            colour = colour[..., draw.permutation(3)]
    if strength:
        colour = (colour - 128) * draw.uniform(0.7, 1.2) + 128 + draw.uniform(-40, 40) * strength
    return Image.fromarray(np.concatenate([colour.clip(0, 255), alpha], -1).astype(np.uint8))


@dataclass(frozen=True)
class Scene:
    """A picture with its objects: boxes `[x1, y1, x2, y2]` in pixels and labels."""

    picture: Image.Image
    boxes: list[tuple[int, int, int, int]]
    labels: list[str]


def compose(
    background: Image.Image,
    icons: Sequence[Icon],
    draw: np.random.Generator,
    jitter: float = 1.0,
    sides: tuple[float, float] = (0.22, 0.55),
) -> Scene:
    """Paste icons on a photograph, none covering more than a seventh of another; one that finds no place is left out.

    Args:
        background (`Image`): Square, of the scene's size.
        icons (`Sequence[Icon]`): What to paste.
        draw (`np.random.Generator`): Source of places, sizes, colours.
        jitter (`float`, defaults to 1.0): Strength of the changes of colour; 0 for none.
        sides (`tuple[float, float]`, defaults to `(0.22, 0.55)`): Smallest and largest side of an object, as a share of the scene's.

    Returns:
        `Scene`: Boxes are tight around what is visible (alpha above a quarter).
    """
    scene, size = background.copy(), background.width
    if jitter:
        scene = Image.blend(scene, Image.new("RGB", scene.size, tuple(int(c) for c in draw.integers(0, 256, 3))), draw.uniform(0, 0.3))
    boxes, labels = [], []
    for icon in icons:
        picture = _recolour(icon, draw, jitter)
        side = size * draw.uniform(*sides)
        stretch = np.exp(draw.normal(0, 0.08))
        width, height = (length / max(picture.size) * side for length in picture.size)
        picture = picture.resize((max(4, round(width * stretch)), max(4, round(height / stretch))), Image.Resampling.BICUBIC)
        if draw.random() < 0.5:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if draw.random() < 0.5:
            picture = picture.rotate(draw.uniform(-12, 12), Image.Resampling.BICUBIC, expand=True)
        visible = picture.getchannel("A").point(lambda alpha: 255 * (alpha > 64)).getbbox()
        if visible is None:
            continue
        picture = picture.crop(visible)
        if max(picture.size) >= size:
            continue
        for _ in range(12):
            left, top = (int(draw.integers(0, size - length + 1)) for length in picture.size)
            box = (left, top, left + picture.width, top + picture.height)
            if all(_covered(box, other) < 1 / 7 for other in boxes):
                scene.paste(picture, (left, top), picture)
                boxes.append(box)
                labels.append(icon.label)
                break
    return Scene(scene, boxes, labels)


def _covered(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> float:
    """Intersection over the smaller of two boxes."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    smaller = min((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return max(0, width) * max(0, height) / smaller


def scenes(
    icons: dict[str, list[Icon]],
    backgrounds: Sequence[Image.Image],
    count: int,
    *,
    seed: int,
    distractors: dict[str, list[Icon]] | None = None,
    others: float = 0.15,
    glyphs: float = 0.25,
    jitter: float = 1.0,
    most: int = 4,
) -> Iterator[Scene]:
    """`count` scenes of 1 to `most` objects, all classes alike often, a repeated class in every fourth.

    Args:
        icons (`dict[str, list[Icon]]`): Of each class.
        backgrounds (`Sequence[Image]`): Photographs.
        count (`int`): How many.
        seed (`int`): Of everything that is drawn.
        distractors (`dict[str, list[Icon]]`, *optional*): Other objects.
        others (`float`, defaults to 0.15): Share of objects that are distractors.
        glyphs (`float`, defaults to 0.25): Share of glyphs of one colour where a class has them.
        jitter (`float`, defaults to 1.0): See [`compose`].
        most (`int`, defaults to 4): Objects in a scene at the most.
    """
    draw = np.random.default_rng(seed)
    names, unnamed = list(icons), list(distractors or {})
    pools = {
        name: [[icon for icon in found if (icon.style in GLYPH_STYLES) == glyph] for glyph in (False, True)]
        for name, found in (icons | (distractors or {})).items()
    }
    for _ in range(count):
        chosen: list[str] = []
        for _ in range(int(draw.integers(1, most + 1))):
            if chosen and draw.random() < 0.12:
                chosen.append(chosen[-1])
            elif unnamed and draw.random() < others:
                chosen.append(unnamed[int(draw.integers(len(unnamed)))])
            else:
                chosen.append(names[int(draw.integers(len(names)))])
        picked = []
        for name in chosen:
            coloured, glyph = pools[name]
            pool = glyph if glyph and (not coloured or draw.random() < glyphs) else coloured
            picked.append(pool[int(draw.integers(len(pool)))])
        yield compose(backgrounds[int(draw.integers(len(backgrounds)))], picked, draw, jitter)


def write_coco(found: Iterator[Scene], folder: Path, annotations: Path, labels: Sequence[str], *, total: int) -> None:
    """Write scenes as JPEG files and a COCO instances file that names the objects of these labels.

    Args:
        found (`Iterator[Scene]`): The scenes.
        folder (`Path`): Of the pictures.
        annotations (`Path`): The JSON file.
        labels (`Sequence[str]`): Categories, in order; other objects are not annotated.
        total (`int`): Number of scenes, for the progress bar.
    """
    folder.mkdir(parents=True, exist_ok=True)
    images, objects = [], []
    for index, scene in enumerate(tqdm(found, total=total, desc=annotations.stem)):
        name = f"{index:05d}.jpg"
        scene.picture.save(folder / name, quality=88)
        images.append({"id": index, "file_name": name, "width": scene.picture.width, "height": scene.picture.height})
        for (x1, y1, x2, y2), label in zip(scene.boxes, scene.labels, strict=True):
            if label in labels:
                box = [x1, y1, x2 - x1, y2 - y1]
                category = labels.index(label) + 1
                found_object = {"id": len(objects) + 1, "image_id": index, "category_id": category, "bbox": box, "iscrowd": 0}
                objects.append({**found_object, "area": box[2] * box[3]})
    categories = [{"id": index + 1, "name": label} for index, label in enumerate(labels)]
    temporary = annotations.with_suffix(".part")
    temporary.write_text(json.dumps({"images": images, "annotations": objects, "categories": categories}))
    temporary.replace(annotations)
