"""tools/figures.py: valid XML, nothing outside of the picture, no text on another, nothing missing drawn."""

import math
import re
from xml.etree import ElementTree

import pytest

from tools.figures import COLOURS, bars, head_map, lines, shorten, text_width, ticks

SVG = "{http://www.w3.org/2000/svg}"
ODD = 'a <b> & "c" \x00\x1b 東京 ' + "long " * 30
NAN, INF = math.nan, math.inf

FIGURES = {
    "bars": bars("t", ["dream", "x", ODD], [0.93, 0.2, 0.5], [0.01, 0.1, None], "NDCG@10", (0.64, "BM25")),
    "bars, gaps": bars(ODD, ["a", "b", "c"], [None, NAN, 0.5], [0.1, INF, NAN]),
    "bars, negative": bars("t", ["a", "b"], [-0.3, 0.5], [0.2, 0.2], "x", (-0.6, ODD)),
    "bars, nothing": bars("t", [], []),
    "bars, zeros": bars("t", ["a"], [0.0]),
    "bars, least": bars("t", ["a"], [5e-324]),
    "bars, next to nothing": bars("t", ["a", "b"], [0.0, 3e-310]),
    "bars, too large": bars("t", ["a", "b", "c"], [1.7e308, -1.7e308, 0.5], [1.0, 1.0, 1e308]),
    "bars, at the edge": bars("t", ["a"], [0.1], None, "", (0.9999, "a rather long name of a reference")),
    "lines": lines("t", {"a": [(2, 0.5, 0.1), (4, 0.7)], "b": [(2, 0.1), (4, 0.2)]}, "x", "y", (0.6, "BM25")),
    "lines, gaps": lines("t", {"a": [(1, 0.5), (2, None), (3, NAN, 1.0), (None, 1.0), (4, 0.6, NAN)]}, "x"),
    "lines, one point": lines("t", {"a": [(8, 0.5)]}),
    "lines, one value": lines("t", {"a": [(0.3, 0.1 + 0.2), (0.30000000000000004, 0.3)]}),
    "lines, nothing": lines(ODD, {"a": [], "b": [(NAN, 1.0)]}, "x", "y"),
    "lines, least": lines("t", {"a": [(5e-324, 5e-324), (1e-323, 1e-323)]}, "x", "y"),
    "lines, too large": lines("t", {"a": [(0, 1.7e308), (1, -1.7e308), (2, 0.5)]}, "x", "y"),
    "lines, many": lines(
        "t", {f"{ODD} {i}": [(s, i / 9) for s in range(500)] for i in range(8)}, "step", "w"
    ),
    "lines, narrow": lines("t", {"a": [(0, 1), (1000, 2)], ODD: [(0, 2)]}, "x", "y", faint=("a",), width=480),
    "lines, large": lines("t", {"a": [(1e6 * i, 1e7 * i) for i in range(9)]}, "x", "y"),
    "lines, small": lines("t", {"a": [(i / 1e7, 1 + i / 1e6) for i in range(9)]}, "x", "y"),
    "heads": head_map("t", [[0.1 * h for h in range(8)] for _ in range(4)], [(0, 1), [3, 7]]),
    "heads, many": head_map(ODD, [[h * layer / 900 for h in range(40)] for layer in range(80)], [(79, 39)]),
    "heads, gaps": head_map("t", [[NAN, None, -1.0]]),
    "heads, nothing": head_map("t", []),
}


def boxes(root):
    """(left, top, right, bottom) of each text that is shown, by the figures' own guess at its width."""
    found = []
    for text in root.iter(SVG + "text"):
        size = float(text.get("font-size", root.get("font-size")))
        width = text_width(text.text or "", size)
        left = float(text.get("x")) - {"start": 0, "middle": width / 2, "end": width}[text.get("text-anchor")]
        y = float(text.get("y"))
        found.append((left, y - 0.75 * size, left + width, y + 2))
    return found


@pytest.mark.parametrize("name", FIGURES)
def test_figures_are_whole(name):
    svg = FIGURES[name]
    root = ElementTree.fromstring(svg)
    assert root.get("role") == "img" and root.find(SVG + "title").text
    numbers = re.sub(r">[^<]*<", "", svg)
    assert not re.search("nan|inf|None", numbers)
    assert "currentColor" in svg and "prefers-color-scheme:dark" in svg
    width, height = map(float, root.get("viewBox").split()[2:])
    places = boxes(root)
    for left, top, right, bottom in places:
        assert 0 <= left and right <= width and 0 <= top and bottom <= height
    for number, (left, top, right, bottom) in enumerate(places):
        for other in places[:number]:
            assert right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top
    placed = re.sub(r"<g .*?</g>", "", svg)  # swatches and markers are drawn around their own 0, 0
    for drawn in re.findall(r' d="([^"]*)"', placed):
        for x, y in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", drawn):
            assert 0 <= float(x) <= width and 0 <= float(y) <= height
    for box in root.iter(SVG + "rect"):
        x, y, w, h = (float(box.get(key)) for key in ("x", "y", "width", "height"))
        assert 0 <= x and x + w <= width and 0 <= y and y + h <= height and w >= 0


def test_bars_have_the_lengths_of_their_values():
    root = ElementTree.fromstring(bars("t", ["a", "b", "c", "d"], [0.5, 0.25, None, -0.5]))
    first, second, last = root.iter(SVG + "rect")  # c is left out
    width = float(first.get("width"))
    assert float(second.get("width")) == pytest.approx(width / 2, abs=0.1)
    assert float(last.get("width")) == pytest.approx(width, abs=0.1)
    assert float(last.get("x")) + width == pytest.approx(float(first.get("x")), abs=0.2)
    shown = [text.text for text in root.iter(SVG + "text")]
    assert {"0.5000", "0.2500", "–", "-0.5000"} <= set(shown)


def test_a_missing_value_breaks_the_line():
    svg = lines("t", {"a": [(1, 0.5), (2, 0.6), (3, NAN), (4, 0.7), (5, 0.8)]})
    (path,) = [p for p in re.findall(r'd="([^"]*)" fill="none" stroke="#', svg) if p != "M-12 0H12"]
    assert path.count("M") == 2 and path.count("L") == 2
    assert svg.count("<g transform") == 4  # a marker each, and no legend for a single series


def test_a_faint_series_stands_back_and_takes_no_colour():
    svg = lines("t", {"raw": [(1, 0.5), (2, 0.6)], "mean": [(1, 0.5), (2, 0.7)]}, faint=("raw",), width=480)
    raw, mean = re.findall(r'd="M[\d.]+ [^"]*L[^"]*" fill="none" (stroke="[^>]*) stroke-linejoin', svg)
    assert raw == 'stroke="currentColor" stroke-opacity="0.35"'
    assert mean == f'stroke="{COLOURS[0]}" stroke-width="2" stroke-dasharray="none"'
    assert svg.count("<g transform") == 4  # two swatches, and the markers of the mean
    assert ElementTree.fromstring(svg).get("width") == "480"


def test_selected_heads_are_outlined():
    root = ElementTree.fromstring(head_map("t", [[0.1, 0.2], [0.4, -0.3]], [(1, 0)]))
    rects = list(root.iter(SVG + "rect"))
    shades = {r.find(SVG + "title").text: float(r.get("fill-opacity")) for r in rects[:4]}
    assert list(shades) == [
        "layer 0, head 0: 0.1",
        "layer 0, head 1: 0.2",
        "layer 1, head 0: 0.4, selected",
        "layer 1, head 1: -0.3",
    ]
    assert shades["layer 1, head 0: 0.4, selected"] == 1.0 > shades["layer 0, head 1: 0.2"] > 0.5
    outlined = [r for r in rects if r.get("fill") == "none"]
    assert len(outlined) == 2  # the head, and the key
    assert (outlined[0].get("x"), outlined[0].get("y")) == (rects[2].get("x"), rects[2].get("y"))


def test_colours_tell_series_apart_and_so_do_dashes():
    svg = lines("t", {str(i): [(0, i), (1, i)] for i in range(8)})
    styles = re.findall(r'stroke="(#\w+)" stroke-width="2" stroke-dasharray="([^"]*)" stroke-linejoin', svg)
    assert len(set(styles)) == 8


@pytest.mark.parametrize(
    "low, high, expected",
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0.03, 0.93, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0, 150, [0, 50, 100, 150]),
        (-3, 3, [-3, -2, -1, 0, 1, 2, 3]),
        (0.5, 0.5, [0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]),
    ],
)
def test_ticks_are_round(low, high, expected):
    assert ticks(low, high) == expected


def test_ticks_enclose_everything_and_are_few():
    for low in (-7.3e8, -1.0, -1e-7, 0.0, 1e-9, 3.3, 12345.6):
        for size in (1e-6, 0.013, 1, 17, 999, 1e6):
            found = ticks(low, low + size)
            slack = 1e-6 * size + 1e-9 * abs(low)
            assert found[0] <= low + slack and found[-1] >= low + size - slack and 2 <= len(found) <= 9


def test_whole_numbers_get_whole_ticks():
    assert ticks(2, 4, whole=True) == [2, 3, 4]


def test_shorten():
    assert shorten("short", 100) == "short"
    assert shorten("word " * 50, 60).endswith("…") and text_width(shorten("word " * 50, 60)) <= 60
