"""Figures as SVG, without a plotting library: bars, lines, and a map of attention heads.

Each function returns one self-contained SVG string, for a file, an <img> or the middle of an HTML page. Text
and axes have the page's own colour where the figure is part of a page, and follow the reader's light or dark
scheme where it stands alone. The six colours have a contrast of at least 3 on white and on near-black, and
differ for colour-blind readers too; markers and dashes tell series apart without any colour. Values that are
None or not finite are left out.
"""

import math
import unicodedata
from collections.abc import Callable, Container, Iterable, Sequence
from html import escape
from typing import TypeGuard

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#9600FF", "#9678FF", "#785A78")
DASHES = ("none", "7 3", "2 3", "9 3 2 3")
MARKERS = ("M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z", "M-4-4h8v8h-8z", "M0-5l5 9h-10z", "M0-5l5 5l-5 5l-5-5z")
STYLE = (  # :root is the figure only where the figure is the whole document
    ":root{color-scheme:light dark} svg:root{color:#1f2328}"
    "@media (prefers-color-scheme:dark){svg:root{color:#e6edf3}}"
)
FONT = 12  # px
PLOT = (420, 220)  # px: the least width and the height of the area inside the axes

Point = Sequence[float | None]  # (x, y) or (x, y, standard deviation)


def finite(value: float | None) -> TypeGuard[float]:
    return value is not None and abs(value) < 1e300  # not NaN, and differences stay finite


def ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """Three to eight round values, 1, 2 or 5 times a power of ten apart, that enclose [low, high]."""
    size = max(abs(low), abs(high))
    if not high - low > max(1e-9 * size, 1e-300):  # one value, but for rounding
        size = size if size > 1e-290 else 1.0
        low, high = low - size / 2, high + size / 2
    power = 10.0 ** math.floor(math.log10((high - low) / 6))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= (high - low) / 6)
    step = max(step, 1.0) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


def label(value: float, spacing: float = 0.0) -> str:
    """A number as text, with as many decimals as values `spacing` apart need."""
    if spacing and 1e-6 < spacing < 1e9:
        return f"{value + 0.0:,.{max(0, -math.floor(math.log10(spacing) + 1e-9))}f}"
    return f"{value + 0.0:.4g}"


def text_width(text: str, size: float = FONT) -> float:
    """About the width of a text in px, rather too much than too little: no font is at hand to ask."""
    return sum(size * (1.05 if unicodedata.east_asian_width(c) in "WF" else 0.6) for c in text)


def shorten(text: str, width: float) -> str:
    """The text, or its beginning and an ellipsis, in at most `width` px."""
    if text_width(text) <= width:
        return text
    while text and text_width(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


def _escape(text: str) -> str:
    return escape("".join(c if c.isprintable() else " " for c in text))


def _text(x: float, y: float, text: str, anchor: str = "start", more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{_escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, more: str = "") -> str:
    return f'<path d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" stroke="currentColor"{more}/>'


def _scale(axis: Sequence[float], start: float, end: float) -> Callable[[float], float]:
    """A function from values to px: the first tick is at `start`, the last one at `end`."""
    return lambda value: start + (value - axis[0]) / (axis[-1] - axis[0]) * (end - start)


GRID, DASHED = ' stroke-opacity="0.15"', ' stroke-dasharray="5 4" stroke-width="1.5"'


def _svg(title: str, width: float, height: float, body: Iterable[str]) -> str:
    title, about = shorten(title, (width - 16) * FONT / 15), _escape(title)  # it is set in 15 px
    heading = _text(8, 22, title, more=' font-size="15" font-weight="600"')
    frame = (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}" height="{height:.0f}" font-family="system-ui,sans-serif" font-size="{FONT}" '
        f'fill="currentColor" style="max-width:100%;height:auto">'
    )
    return "\n".join([frame, f"<title>{about}</title><style>{STYLE}</style>", heading, *body, "</svg>\n"])


def bars(
    title: str,
    names: Sequence[str],
    values: Sequence[float | None],
    deviations: Sequence[float | None] | None = None,
    xlabel: str = "",
    reference: tuple[float, str] | None = None,
) -> str:
    """Horizontal bars from 0 on, one a name, with error bars of plus and minus a standard deviation.

    reference: a value and its name, drawn as a dashed line across all bars.
    """
    spread = [d if finite(d) else 0.0 for d in deviations or [0.0] * len(names)]
    known = [(v, d) for v, d in zip(values, spread, strict=True) if finite(v)]
    reach = [0.0, *(v + s * d for v, d in known for s in (-1, 1)), *(reference or ())[:1]]
    axis = ticks(min(reach), max(reach))
    told = [f"{v:.4f}" if finite(v) else "–" for v in values]
    told = [f"{v} ± {d:.4f}" if d and v != "–" else v for v, d in zip(told, spread, strict=True)]
    shown = [shorten(name, 260) for name in names]
    left = 16 + max(map(text_width, shown), default=0)
    right, width = left + PLOT[0], left + PLOT[0] + 20 + max(map(text_width, told), default=0)
    top, row = 56, 28
    bottom, x = top + row * len(names), _scale(axis, left, right)
    body = [_line(x(v), top, x(v), bottom + 4, GRID) for v in axis]
    body += [_text(x(v), bottom + 18, label(v, axis[1] - axis[0]), "middle") for v in axis]
    body += [_text((left + right) / 2, bottom + 36, xlabel, "middle")] * bool(xlabel)
    for number, (name, value, deviation) in enumerate(zip(shown, values, spread, strict=True)):
        y = top + row * (number + 0.5)
        body.append(_text(left - 8, y + 4, name, "end"))
        body.append(_text(right + 12, y + 4, told[number]))
        if finite(value):
            start, end = sorted((x(0), x(value)))
            body.append(
                f'<rect x="{start:.1f}" y="{y - 9:.1f}" width="{end - start:.1f}" height="18" '
                f'fill="{COLOURS[0]}"><title>{_escape(f"{names[number]}: {told[number]}")}</title></rect>'
            )
            if deviation:
                low, high = x(value - deviation), x(value + deviation)
                caps = f"M{low:.1f} {y - 5:.1f}v10M{low:.1f} {y:.1f}H{high:.1f}M{high:.1f} {y - 5:.1f}v10"
                body.append(f'<path d="{caps}" fill="none" stroke="currentColor" stroke-width="1.5"/>')
    body.append(_line(x(0), top, x(0), bottom))
    if reference:
        what = shorten(f"{reference[1]} {reference[0]:.4f}", width - 16)
        half = text_width(what) / 2
        at = min(max(x(reference[0]), 8 + half), width - 8 - half)
        body += [_line(x(reference[0]), top - 4, x(reference[0]), bottom, DASHED)]
        body += [_text(at, top - 9, what, "middle")]
    return _svg(title, width, bottom + (46 if xlabel else 28), body)


def _legend(entries: list[tuple[str, str]], width: float) -> tuple[list[str], float]:
    """Swatches (drawn around 0, 0) with their names, in as many rows as they need; and the height of all."""
    body, x, y = [], 16.0, 42.0
    for name, swatch in entries:
        name = shorten(name, width - 60)
        if x > 16 and x + 40 + text_width(name) > width:
            x, y = 16.0, y + 18
        body.append(f'<g transform="translate({x + 12:.1f} {y - 4:.1f})">{swatch}</g>')
        body.append(_text(x + 30, y, name))
        x += 48 + text_width(name)
    return body, y + 14 if entries else 38.0


FAINT = ('fill="none" stroke="currentColor" stroke-opacity="0.35"', "")


def _style(number: int, markers: bool) -> tuple[str, str]:
    """The stroke and the marker of a series."""
    colour, dashes = COLOURS[number % len(COLOURS)], DASHES[number % 4]
    stroke = f'fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dashes}"'
    return stroke, f'<path d="{MARKERS[number % 4]}" fill="{colour}"/>' * markers


def lines(
    title: str,
    series: dict[str, Sequence[Point]],
    xlabel: str = "",
    ylabel: str = "",
    reference: tuple[float, str] | None = None,
    faint: Container[str] = (),
    width: float = 640,
) -> str:
    """Lines over a numeric x, one a series of (x, y) or (x, y, standard deviation); a gap where y is missing.

    reference: a value of y and its name, a dashed line. faint: names of series that stand back, such as the
    raw values of a smoothed one. width: of the whole figure, in px.
    """
    points: dict[str, list[tuple]] = {
        name: [(*p, None)[:3] for p in own if finite(p[0])] for name, own in series.items()
    }
    known = [(x, y, d if finite(d) else 0.0) for own in points.values() for x, y, d in own if finite(y)]
    xs, ys = [p[0] for p in known], [y + s * d for _, y, d in known for s in (-1, 1)]
    ys += (reference or ())[:1]
    strong = [name for name in points if name not in faint]
    styles, entries = [], []
    for name, own in points.items():
        # More than some thirty markers hide the line that they stand on.
        stroke, marker = FAINT if name in faint else _style(strong.index(name), markers=len(own) <= 30)
        styles.append((stroke, marker))
        entries.append((name, f'<path d="M-12 0H12" {stroke}/>{marker}'))
    entries = entries if len(entries) > 1 or reference else []
    if reference:
        swatch = f'<path d="M-12 0H12" stroke="currentColor"{DASHED}/>'
        entries.append((f"{reference[1]} {reference[0]:.4f}", swatch))

    across = ticks(min(xs, default=0), max(xs, default=1), all(float(v).is_integer() for v in xs))
    up = ticks(min(ys, default=0), max(ys, default=1))
    texts, below = ([label(v, axis[1] - axis[0]) for v in axis] for axis in (up, across))
    body, top = _legend(entries, width)
    top += 20 if ylabel else 6
    bottom, left = top + PLOT[1], 20 + max(map(text_width, texts))
    right = width - 8 - text_width(below[-1]) / 2
    x, y = _scale(across, left, right), _scale(up, bottom, top)
    body += [_line(left, y(v), right, y(v), GRID) for v in up]
    body += [_text(left - 8, y(v) + 4, text, "end") for v, text in zip(up, texts, strict=True)]
    body += [_line(x(v), bottom, x(v), bottom + 4) for v in across]
    body += [_text(x(v), bottom + 18, text, "middle") for v, text in zip(across, below, strict=True)]
    body += [_line(left, bottom, right, bottom)]
    body += [_text((left + right) / 2, bottom + 36, xlabel, "middle")] * bool(xlabel)
    body += [_text(8, top - 10, ylabel)] * bool(ylabel)
    for own, (stroke, marker) in zip(points.values(), styles, strict=True):
        path, pen = "", "M"
        for at, value, deviation in own:
            if not finite(value):
                pen = "M"
                continue
            path, pen = path + f"{pen}{x(at):.1f} {y(value):.1f}", "L"
            if finite(deviation) and deviation > 0:
                low, high = y(value - deviation), y(value + deviation)
                caps = "".join(f"M{x(at) - 4:.1f} {end:.1f}h8" for end in (low, high))
                caps += f"M{x(at):.1f} {low:.1f}V{high:.1f}"
                body.append(f'<path d="{caps}" fill="none" stroke="currentColor"/>')
        body += [f'<path d="{path}" {stroke} stroke-linejoin="round"/>'] * bool(path)
        spots = [(x(at), y(value)) for at, value, _ in own if finite(value)] if marker else []
        body += [f'<g transform="translate({px:.1f} {py:.1f})">{marker}</g>' for px, py in spots]
    if reference:
        body.append(_line(left, y(reference[0]), right, y(reference[0]), DASHED))
    return _svg(title, width, bottom + (46 if xlabel else 28), body)


def head_map(
    title: str, scores: Sequence[Sequence[float | None]], selected: Iterable[Sequence[int]] = ()
) -> str:
    """Layers (rows) by heads (columns), the more colour the higher the score; selected ones are outlined.

    scores: L lists of H, of which the negative count as 0. selected: (layer, head) pairs.
    """
    heads, chosen = max(map(len, scores), default=0), {tuple(pair) for pair in selected}
    highest = max((score for row in scores for score in row if finite(score)), default=0.0)
    cell, every = (24, 1) if heads <= 24 else (16, 4)  # the numbers of the heads do not touch
    left, top = 62, 66
    bottom, right = top + cell * len(scores), left + cell * heads

    def shade(x: float, y: float, share: float, size: int, told: str = "") -> str:
        return (
            f'<rect x="{x}" y="{y}" width="{size}" height="{size}" fill="{COLOURS[0]}" '
            f'fill-opacity="{0.06 + 0.94 * share:.3f}"><title>{told}</title></rect>'
        )

    def outline(x: float, y: float, size: int) -> str:
        box = f'x="{x}" y="{y}" width="{size}" height="{size}"'
        return f'<rect {box} fill="none" stroke="{COLOURS[1]}" stroke-width="3"/>'

    body = [_text(left - 8, 46, "layer", "end"), _text(left, 46, "head")]
    body += [_text(left + cell * (h + 0.5), 61, str(h), "middle") for h in range(0, heads, every)]
    for layer, row in enumerate(scores):
        y = top + cell * layer
        body.append(_text(left - 8, y + cell / 2 + 4, str(layer), "end"))
        for head, score in enumerate(row):
            if finite(score):
                share = max(score, 0.0) / highest if highest > 0 else 0.0
                told = f"layer {layer}, head {head}: {score:.4g}{', selected' * ((layer, head) in chosen)}"
                body.append(shade(left + cell * head + 1, y + 1, share, cell - 2, told))
    body += [outline(left + cell * head + 1, top + cell * layer + 1, cell - 2) for layer, head in chosen]
    body += [shade(left + 26 + 14 * i, bottom + 12, i / 5, 14, f"{highest * i / 5:.3g}") for i in range(6)]
    body += [_text(left + 20, bottom + 23, "0", "end"), _text(left + 116, bottom + 23, f"{highest:.3g}")]
    body += [outline(left + 27, bottom + 35, 12), _text(left + 46, bottom + 46, f"{len(chosen)} selected")]
    width = max(right + 12, left + 180, min(text_width(title, 15) + 16, 640))
    return _svg(title, width, bottom + 60, body)
