"""Pictures of maps of evidence over photos, by Pillow alone: a server can draw them too."""

import functools
import importlib.util
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_SIDE = 168  # pixels of the longer side of a panel; larger photos are made smaller
_GAP, _LINE, _FONT = 10, 15, 11
_INK, _SOFT, _WARN = (31, 41, 55), (91, 100, 114), (213, 94, 0)
WORD = "no better than random"
# Cividis (Nunez et al. 2018), which looks the same to people of any colour vision, at nine places.
_CIVIDIS = np.array(
    [
        [0, 34, 78],
        [18, 53, 112],
        [59, 73, 108],
        [87, 93, 109],
        [112, 113, 115],
        [138, 134, 120],
        [165, 156, 116],
        [195, 179, 105],
        [254, 232, 56],
    ],
    np.float64,
)


class Drawn(NamedTuple):
    """A map and the lines below it."""

    heat: np.ndarray  # float [H, W]
    lines: Sequence[str]
    true: bool  # better than random; else it is greyed out


def colours(heat: np.ndarray) -> np.ndarray:
    """float [...] in [0, 1] -> uint8 [..., 3]."""
    places = np.linspace(0, 1, len(_CIVIDIS))
    return np.stack([np.interp(heat, places, channel) for channel in _CIVIDIS.T], axis=-1).round().astype(np.uint8)


def scaled(heat: np.ndarray) -> np.ndarray:
    """What is above 0 in a map, against its 99th percentile: [H, W] in [0, 1]."""
    positive = np.maximum(heat, 0)
    top = np.quantile(positive, 0.99) or positive.max()
    return np.clip(positive / top, 0, 1) if top > 0 else positive


def photo(pixels: np.ndarray) -> Image.Image:
    """uint8 [H, W, C] as it is, its pixels enlarged without smoothing."""
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels[..., :3]).convert("RGB")
    shrinks = max(picture.size) > _SIDE
    return picture.resize(_size(picture.size), Image.Resampling.BOX if shrinks else Image.Resampling.NEAREST)


def overlay(pixels: np.ndarray, drawn: Drawn) -> Image.Image:
    """A map in colours over the grey photo; in greys alone, crossed out with a word that fits, where it is not true."""
    under = photo(pixels)
    heat = Image.fromarray((255 * scaled(drawn.heat)).astype(np.uint8))
    heat = np.asarray(heat.resize(under.size, Image.Resampling.BILINEAR), np.float64) / 255
    gray = np.asarray(under.convert("L"), np.float64)[..., None]
    over = colours(heat).astype(np.float64) if drawn.true else np.full((*heat.shape, 3), 160.0) + 60 * heat[..., None]
    share = 0.2 + 0.5 * heat[..., None] if drawn.true else 0.75
    picture = Image.fromarray(((1 - share) * gray + share * over).round().astype(np.uint8))
    if not drawn.true and (box := _word_box(picture.size)):
        draw, font = ImageDraw.Draw(picture), _font(_FONT + 2)
        middle = (picture.width // 2, picture.height // 2)
        draw.rectangle([box[0] - 4, box[1] - 3, box[2] + 4, box[3] + 3], fill="white")
        draw.text(middle, WORD, fill=_WARN, font=font, anchor="mm")
    return picture


def _word_box(size: tuple[int, int]) -> tuple[float, ...] | None:
    """Left, top, right and bottom of the word in the middle of a panel; None where it is too small for it."""
    middle, draw = (size[0] // 2, size[1] // 2), ImageDraw.Draw(Image.new("L", (1, 1)))
    box = draw.textbbox(middle, WORD, font=_font(_FONT + 2), anchor="mm")
    return box if box[0] >= 0 and box[1] >= 0 else None


def _lines(drawn: Drawn, size: tuple[int, int]) -> list[str]:
    """The lines below a panel, with the word that is not in it."""
    said = drawn.true or _word_box(size) or any(WORD in line for line in drawn.lines)
    return [*drawn.lines, *([] if said else [WORD])]


def _wrapped(text: str, size: int, room: int) -> list[str]:
    """A text in lines of at most `room` pixels; a word that is longer loses its end."""
    text = " ".join(text.splitlines())
    length = _font(size, text).getlength
    lines = [text]
    while length(lines[-1]) > room:
        words = lines.pop().split(" ")
        count = next((n for n in range(len(words) - 1, 0, -1) if length(" ".join(words[:n])) <= room), 0)
        first, rest = " ".join(words[:count]), " ".join(words[count:] if count else words[1:])
        if not count:
            first = next(words[0][:n] for n in range(len(words[0]), -1, -1) if length(f"{words[0][:n]}…") <= room) + "…"
        lines += [first, rest] if rest else [first]
    return lines


def _font(size: int, text: str = "") -> ImageFont.FreeTypeFont:
    """That of the plots, which has the letters of most languages; Pillow's own knows no accents."""
    if max(text, default="") < "\u1100":  # where the alphabets end that it has
        (matplotlib,) = importlib.util.find_spec("matplotlib").submodule_search_locations
        return _opened(str(pathlib.Path(matplotlib, "mpl-data", "fonts", "ttf", "DejaVuSans.ttf")), size)
    from vitcls.report import fonts

    return _opened(fonts.file_for(text), size)


@functools.cache
def _opened(file: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(file, size)


def beside(pixels: np.ndarray, title: str, drawn: Drawn) -> Image.Image:
    """The photo, the map over it, and its evidence."""
    return sheet(pixels, title, [("", [drawn])])


def sheet(pixels: np.ndarray, title: str, rows: Sequence[tuple[str, Sequence[Drawn]]]) -> Image.Image:
    """The photo on the left, and a row of maps for each class below its name; long names take several lines."""
    first = photo(pixels)
    width, height = first.size
    texts = [_lines(drawn, first.size) for _, row in rows for drawn in row]
    column = int(max(width, _SIDE, *(_font(_FONT).getlength(line) for lines in texts for line in lines))) + _GAP
    columns = 1 + max(len(row) for _, row in rows)
    titles = _wrapped(title, _FONT + 2, columns * column - _GAP)
    names = [_wrapped(name, _FONT, (columns - 1) * column - _GAP) for name, _ in rows]
    above = _LINE * max(map(len, names))
    row_height = above + height + _LINE * (max(map(len, texts)) + 1) + _GAP
    head = 2 * _GAP + _LINE * len(titles)
    whole = Image.new("RGB", (columns * column + _GAP, head + len(rows) * row_height), "white")
    draw, font = ImageDraw.Draw(whole), _font(_FONT)
    for k, line in enumerate(titles):
        draw.text((_GAP, _GAP + k * _LINE), line, fill=_INK, font=_font(_FONT + 2, title))
    for i, (_, row) in enumerate(rows):
        top = head + i * row_height
        for k, line in enumerate(names[i]):
            draw.text((_GAP + column, top + k * _LINE), line, fill=_INK, font=_font(_FONT, rows[i][0]))
        if not i:
            whole.paste(first, (_GAP, top + above))
        for j, drawn in enumerate(row, start=1):
            left = _GAP + j * column
            whole.paste(overlay(pixels, drawn), (left, top + above))
            for k, line in enumerate(_lines(drawn, first.size)):
                at = (left, top + above + height + 3 + k * _LINE)
                draw.text(at, line, fill=_INK if not k else _SOFT, font=font)
    return whole


def _size(size: tuple[int, int]) -> tuple[int, int]:
    """Of a panel, whole multiples of small photos."""
    factor = _SIDE / max(size)
    factor = int(factor) if factor >= 1 else factor
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))
