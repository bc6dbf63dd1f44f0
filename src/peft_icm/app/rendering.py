"""What the page shows, as HTML: every colour has its number in words beside it, and what comes from users is escaped."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

from PIL import Image

from ..generator.reading import Reading
from .serving import SECONDS, Request, Scene, Token

BARS = 5  # tasks that are shown
MOST = 8.0  # nats, of the deepest colour
VERDICTS = {
    "warn": "this is the adapter of the nearest one, and it may do harm.",
    "shrink": "the adapter is made weaker, to what the reading is worth.",
    "base": "the base is left as it is.",
    "raise": "no adapter is made.",
}
# Colours of its own in both of gradio's modes, so that the contrast is known: #1c1917 on #fb923c, the deepest, is 8 to 1.
CSS = """
.gradio-container { max-width: 1200px !important; margin: 0 auto !important; }
.icm { color: #1c1917; background: #fff; border: 1px solid #d6d3d1; border-radius: 8px; padding: 14px 16px; line-height: 1.5; }
.icm :is(h2, h3) { font-size: 1rem; font-weight: 600; margin: 0 0 6px; color: #1c1917; }
.icm p { margin: 0 0 8px; color: #1c1917; }
.icm b { color: inherit !important; }
.icm .muted { color: #57534e; font-size: .875rem; }
.icm .known, .icm .unknown { display: inline-block; border-radius: 999px; padding: 0 10px; font-weight: 600; font-size: .875rem; }
.icm .known { background: #dcfce7; color: #14532d; }
.icm .unknown { background: #ffedd5; color: #7c2d12; }
.gradio-container .html-container { padding: 0 !important; }
.gradio-container .or { color: inherit !important; }
.icm table { width: 100%; border-collapse: collapse; margin: 0; }
.icm table, .icm tr { border: 0 !important; }
.icm table.bars th { width: 34%; }
.icm th, .icm td { border: 0 !important; padding: 2px 6px 2px 0 !important; text-align: left; font-weight: 400; color: #1c1917;
  overflow-wrap: anywhere; }
.icm td.number { width: 3.2em; text-align: right; font-variant-numeric: tabular-nums; }
.icm tr.rule > * { border-top: 1px solid #d6d3d1 !important; padding-top: 6px !important; }
.icm .track { position: relative; height: 12px; background: #f5f5f4; border-radius: 3px; }
.icm .bar { height: 12px; border-radius: 3px; background: #0f766e; }
.icm .familiarity { background: #1d4ed8; }
.icm .mark { position: absolute; top: -3px; width: 2px; height: 18px; background: #1c1917; }
.icm .sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(210px, 100%), 1fr)); gap: 16px; }
.icm .pairs { grid-template-columns: 1fr 1fr; gap: 4px 12px; }
.icm .tokens { font-family: ui-monospace, monospace; font-size: .875rem; white-space: pre-wrap; overflow-wrap: anywhere; margin: 0 0 8px; }
.icm .tokens span { color: #1c1917; }
.icm .tokens .new { border-bottom: 2px solid #1d4ed8; }
.icm details { margin-top: 8px; }
.icm summary { cursor: pointer; color: #1d4ed8; font-size: .875rem; }
.icm .numbers { max-height: 240px; overflow: auto; font-size: .8125rem; }
.icm svg { width: 100%; height: auto; border-radius: 4px; background: #e7e5e4; display: block; }
.icm rect { fill: none; vector-effect: non-scaling-stroke; }
.icm figure { margin: 0 0 10px; }
.icm figcaption { font-size: .875rem; color: #1c1917; }
.icm .scale { display: inline-block; width: 90px; height: 10px; border-radius: 3px; background: linear-gradient(90deg, #fff, #fb923c);
  border: 1px solid #d6d3d1; vertical-align: middle; }
"""


def heard(reading: Reading | None, request: Request) -> str:
    """What was heard, as bars with the familiarity and the threshold.

    Args:
        reading ([`Reading`], *optional*): `None` where the generator takes the request as it is.
        request ([`Request`]): What was asked for.

    Returns:
        `str`: HTML.
    """
    if reading is None:
        return _panel(
            "Heard", "<p>Taken as it is: of pictures and examples this generator does not tell whether they are of its tasks.</p>"
        )
    verdict = "<span class='known'>known</span>" if reading.known else "<span class='unknown'>unknown</span>"
    said = f"<p>{verdict} <b>{escape(reading.task)}</b>: {escape(reading.description)}</p>"
    if not reading.known:
        said += f"<p>This is none of the generator's tasks; {VERDICTS[request.on_unknown]}</p>"
    if request.on_unknown == "shrink":
        said += f"<p class='muted'>Strength {request.strength * reading.worth:.2f}: {request.strength:.2f} times what it is worth.</p>"
    rows = "".join(_bar(name, share) for name, share in list(reading.tasks.items())[:BARS])
    if reading.threshold is None:
        said += "<p class='muted'>Without a threshold every request is known.</p>"
    else:
        rows += _bar("familiarity", reading.familiarity, "familiarity", reading.threshold)
        rows += f"<tr><th scope='row'>threshold</th><td>where known begins</td><td class='number'>{reading.threshold:.2f}</td></tr>"
    return _panel("Heard", f"{said}<table class='bars' aria-live='off'>{rows}</table>")


def _bar(name: str, share: float, kind: str = "", threshold: float | None = None) -> str:
    mark = f"<div class='mark' style='left:{100 * threshold:.1f}%'></div>" if threshold is not None else ""
    bar = f"<div class='track' aria-hidden='true'><div class='bar {kind}' style='width:{100 * share:.1f}%'></div>{mark}</div>"
    rule = " class='rule'" if kind else ""
    return f"<tr{rule}><th scope='row'>{escape(name)}</th><td>{bar}</td><td class='number'>{share:.2f}</td></tr>"


def continued(base: Sequence[Token], adapted: Sequence[Token]) -> str:
    """A text and its two continuations side by side, each token on the colour of its surprise.

    Args:
        base, adapted (`Sequence[Token]`): What [`~Service.go_on`] returned.

    Returns:
        `str`: HTML.
    """
    scale = f"0 <span class='scale' aria-hidden='true'></span> {MOST:.0f} nats a token: how much it surprised the model that reads."
    sides = "".join(_side(name, tokens) for name, tokens in (("Base", base), ("Adapted", adapted)))
    return _panel(
        "The text, and how each goes on from it",
        f"<p class='muted'>{scale} Underlined: what the model wrote.</p><div class='sides'>{sides}</div>",
    )


def _side(name: str, tokens: Sequence[Token]) -> str:
    given = [token.nats for token in tokens if not token.new]
    shown = "".join(
        f"<span class='{'new' if token.new else 'given'}' title='{token.nats:.2f} nats' style='background:{_colour(token.nats)}'>"
        f"{escape(token.text)}</span>"
        for token in tokens
    )
    rows = "".join(f"<tr><td>{escape(repr(token.text)[1:-1])}</td><td class='number'>{token.nats:.2f}</td></tr>" for token in tokens)
    return (
        f"<section aria-label='{name}'><h3>{name}: {sum(given) / len(given):.2f} nats a token of the text</h3>"
        f"<div class='tokens' aria-live='off'>{shown}</div><details aria-live='off'><summary>{name}: nats of each token</summary>"
        f"<div class='numbers' tabindex='0' role='region' aria-label='{name}: nats of each token'>"
        f"<table><tr><th scope='col'>token</th><th scope='col'>nats</th></tr>{rows}</table></div></details></section>"
    )


def _colour(nats: float) -> str:
    share = min(nats / MOST, 1.0)
    return "#" + "".join(f"{round(255 + (deep - 255) * share):02x}" for deep in (0xFB, 0x92, 0x3C))


def looked_at(scenes: Sequence[Scene], wanted: int) -> str:
    """Pictures with the boxes of base and adapted model, side by side.

    Args:
        scenes (`Sequence[Scene]`): What [`~Service.look`] returned.
        wanted (`int`): Pictures that were to be looked at.

    Returns:
        `str`: HTML.
    """
    late = "" if len(scenes) == wanted else f"<p>After {SECONDS:.0f} seconds {wanted - len(scenes)} pictures were left out.</p>"
    pairs = "".join(_figure("base", scene.picture, scene.base) + _figure("adapted", scene.picture, scene.adapted) for scene in scenes)
    return _panel("What each finds", f"{late}<div class='sides pairs'><h3>Base</h3><h3>Adapted</h3>{pairs}</div>")


def _figure(name: str, picture: Image.Image, found: Sequence[tuple[str, float, list[float]]]) -> str:
    width, height = picture.size
    told = ", ".join(f"{escape(label)} {score:.2f}" for label, score, _ in found) or "nothing"
    boxes = "".join(
        f"<rect x='{x1:.1f}' y='{y1:.1f}' width='{x2 - x1:.1f}' height='{y2 - y1:.1f}' {stroke}/>"
        for _, _, (x1, y1, x2, y2) in found
        for stroke in ("stroke='#fff' stroke-width='5'", "stroke='#c2410c' stroke-width='2.5'")  # seen on every ground
    )
    buffer = io.BytesIO()
    picture.save(buffer, "PNG" if width * height < 256**2 else "JPEG", quality=85)
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f"<figure><svg viewBox='0 0 {width} {height}' role='img' aria-label='{name} found: {told}'>"
        f"<image href='data:image;base64,{data}' width='{width}' height='{height}'/>{boxes}</svg>"
        f"<figcaption aria-hidden='true'>{told}</figcaption></figure>"
    )


def _panel(title: str, content: str) -> str:
    return f"<div class='icm'><h2>{title}</h2>{content}</div>"
