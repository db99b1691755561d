"""Fonts of plots and pictures: matplotlib's own, and for what it cannot draw those that the machine has."""

import functools
import logging

from matplotlib import font_manager

OWN = "DejaVu Sans"  # comes with matplotlib
_OTHERS = (
    *("Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans JP", "Noto Sans SC", "Noto Sans KR", "Source Han Sans"),
    *("WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "IPAGothic", "NanumGothic", "Droid Sans Fallback"),
    *("PingFang SC", "Hiragino Sans", "Apple SD Gothic Neo", "Microsoft YaHei", "Yu Gothic", "Malgun Gothic"),
    *("Noto Sans Devanagari", "Noto Sans Thai", "Arial Unicode MS"),
)


@functools.cache
def families() -> tuple[str, ...]:
    """The families to look for a letter in, in this order."""
    there = {font.name for font in font_manager.fontManager.ttflist}
    # Few of them are bold, which matplotlib says of each.
    logging.getLogger(font_manager.__name__).addFilter(lambda record: "find font weight" not in record.getMessage())
    return (OWN, *(name for name in _OTHERS if name in there))


@functools.cache
def _code_points(family: str) -> frozenset[int]:
    return frozenset(font_manager.get_font(font_manager.findfont(family)).get_charmap())


def can_draw(letter: str) -> bool:
    """Whether one of the families has it; matplotlib warns of any other."""
    return any(ord(letter) in _code_points(family) for family in families())


def file_for(text: str) -> str:
    """The file of the first family that has all letters of a line, of matplotlib's own where none has."""
    whole = (family for family in families() if all(ord(letter) in _code_points(family) for letter in text))
    return font_manager.findfont(next(whole, OWN))
