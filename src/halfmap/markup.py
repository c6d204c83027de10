"""Pages that people read in a browser: elements, tables and pictures as HTML, with one look for all.

A page is one file: style, scripts and pictures are in it, and nothing is fetched when it is opened.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

WIDTH_px = 1400
"""To which wider pictures are made smaller."""

_VOID = {"img", "input", "br", "meta"}
_TALLEST = 3
"""Height of a picture over the width that it may have."""

_SMALL_bytes = 2**16
_JPEG_GAIN = 0.7
_QUALITY = 88

_SCRIPT = """
const follow = () => {
  let part = document.getElementById(location.hash.slice(1));
  while (part && (part = part.closest("details"))) { part.open = true; part = part.parentElement; }
};
addEventListener("hashchange", follow);
addEventListener("beforeprint", () => {
  for (const part of document.querySelectorAll("details")) part.open = true;
});
follow();
"""
"""Unfolds what a link leads to, and everything on paper."""

LIGHTS = {"red": "wrong", "amber": "look closer", "green": "well", "grey": "not looked at"}
"""What the colours of a finding mean, the worst first."""


class Markup(str):
    """Text that is HTML already; any other text is escaped where it enters an element."""

    __slots__ = ()


Content = str | int | None | Iterable["Content"]
"""What an element may hold: markup, text that is escaped, numbers, nothing, or many of these."""


def _as_html(content: Content) -> str:
    if content is None:
        return ""
    if isinstance(content, Markup):
        return content
    if isinstance(content, str | int):
        return html.escape(str(content))
    return "".join(map(_as_html, content))


def joined(*content: Content) -> Markup:
    """Several contents, one after the other."""
    return Markup(_as_html(content))


def element(tag: str, *content: Content, **attributes: str | int | float | bool | None) -> Markup:
    """An element of a page.

    Parameters
    ----------
    tag : str
        Its name.
    *content
        What is in it; text is escaped unless it is `Markup`.
    **attributes
        Its attributes, with ``_`` for ``-`` and without ``_`` at the end. None and False leave one out, True
        gives it without a value.

    Examples
    --------
    >>> element("p", "a < b", class_="note")
    '<p class="note">a &lt; b</p>'
    """
    text = ""
    for name, value in attributes.items():
        if value is None or value is False:
            continue
        name = name.rstrip("_").replace("_", "-")
        text += f" {name}" if value is True else f' {name}="{html.escape(str(value))}"'
    return Markup(f"<{tag}{text}>" if tag in _VOID else f"<{tag}{text}>{_as_html(content)}</{tag}>")


def page(title: str, *content: Content, style: str = "", script: str = "") -> str:
    """A whole page.

    Parameters
    ----------
    title : str
        Of the window.
    *content
        Of the body.
    style, script : str
        What this page needs besides the common style.
    """
    head = joined(
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("style", Markup(_resource("page.css") + style)),
    )
    body = element("body", element("main", *content), element("script", Markup(_SCRIPT + script)))
    return f'<!DOCTYPE html>\n<html lang="en">{element("head", head)}{body}</html>\n'


@cache
def _resource(name: str) -> str:
    return files("halfmap").joinpath(name).read_text(encoding="utf-8")


def light(colour: str) -> Markup:
    """A coloured disc, one of `LIGHTS`."""
    word = LIGHTS[colour]
    return element("span", class_=f"light {colour}", role="img", aria_label=word, title=word)


def facts(rows: Iterable[tuple[Content, Content]]) -> Markup:
    """A table of names and values; none if there are no rows."""
    lines = [element("tr", element("th", name, scope="row"), element("td", value)) for name, value in rows]
    return element("table", lines, class_="facts") if lines else Markup()


def table(head: Sequence[Content], rows: Iterable[Sequence[Content]], class_: str = "") -> Markup:
    """A table with a line of headings, which scrolls by itself where it is wider than the page."""
    top = element("thead", element("tr", [element("th", name, scope="col") for name in head]))
    lines = [element("tr", [element("td", cell) for cell in row]) for row in rows]
    return element(
        "div", element("table", top, element("tbody", lines), class_=class_ or None), class_="wide"
    )


def folded(title: Content, *content: Content) -> Markup:
    """What is shown once its title is clicked, and when the page is printed."""
    return element("details", element("summary", title), *content)


def picture(path: Path, caption: Content, *, alt: str = "", width: int = WIDTH_px) -> Markup:
    """A picture with its caption; where the file cannot be read, the page says so in its place.

    Parameters
    ----------
    path : Path
        Of a picture.
    caption
        Shown below it.
    alt : str
        What it shows, for those who do not see it.
    width : int
        To which it is made smaller if it is wider, px.
    """
    source = embedded(path, width=width)
    if source is None:
        shown = element("p", f"The picture {path.name} is not there, or cannot be read.", class_="missing")
    else:
        shown = element("img", src=source, alt=alt or path.stem)
    return element("figure", shown, element("figcaption", caption) if caption else None)


def embedded(path: Path, *, width: int = WIDTH_px) -> str | None:
    """A picture file as an address that holds it, smaller if it is large; None if it cannot be read."""
    from PIL import Image

    try:
        if path.suffix == ".png" and path.stat().st_size < _SMALL_bytes:
            return data_address(path.read_bytes(), "image/png")
        with Image.open(path) as image:
            image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    flat = Image.new("RGB", image.size, "white")
    flat.paste(image, mask=image.getchannel("A") if image.mode == "RGBA" else None)
    smaller = min(1.0, width / flat.width, _TALLEST * width / flat.height)
    if smaller < 1:
        size = round(smaller * flat.width), round(smaller * flat.height)
        flat = flat.resize((max(size[0], 1), max(size[1], 1)), Image.Resampling.LANCZOS)
    return encoded(flat)


def encoded(image: Image) -> str:
    """A picture as an address that holds it: as PNG, or as JPEG where that is much shorter."""
    exact, lossy = io.BytesIO(), io.BytesIO()
    image.save(exact, "PNG")
    image.save(lossy, "JPEG", quality=_QUALITY, optimize=True)
    if lossy.tell() < _JPEG_GAIN * exact.tell():
        return data_address(lossy.getvalue(), "image/jpeg")
    return data_address(exact.getvalue(), "image/png")


def data_address(content: bytes, kind: str) -> str:
    """Bytes as an address that needs no file."""
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"
