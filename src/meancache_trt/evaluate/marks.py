"""How methods look, in every plot and legend: a colour and a marker each.

Plots are drawn with stand-in colours, which become the page's CSS variables: one drawing is then
right on a light and on a dark page.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from meancache_trt.calibration.evaluation import Evaluation

INK, MUTED, LINE, SURFACE = "#fe0001", "#fe0002", "#fe0003", "#fe0004"
"""What the page calls --ink, --muted, --line and --surface."""

SERIES = 13
"""Colours of the page, --s0 to --s12; more methods than that begin again."""

_MARKERS = "os^DvPX*<>h"
_SYMBOLS = "●■▲◆▼✚✖★◀▶⬢"
_VARIABLES = {INK: "--ink", MUTED: "--muted", LINE: "--line", SURFACE: "--surface"}


@dataclass(frozen=True)
class Mark:
    """A method's place in the palette."""

    index: int

    @property
    def colour(self) -> str:
        """The stand-in colour, for matplotlib."""
        return f"#fd00{self.index % SERIES:02x}"

    @property
    def marker(self) -> str:
        """A matplotlib marker; another one even where colours cannot be told apart."""
        return _MARKERS[self.index % len(_MARKERS)]

    @property
    def symbol(self) -> str:
        """The marker as a letter, for text."""
        return _SYMBOLS[self.index % len(_SYMBOLS)]

    @property
    def variable(self) -> str:
        """The page's name of the colour."""
        return f"--s{self.index % SERIES}"


def marks_of(evaluation: Evaluation) -> dict[str, Mark]:
    """A mark for each method, in their order; the compared one has the page's accent."""
    others = [method for method in evaluation.methods if method != evaluation.against]
    places = {method: index for index, method in enumerate([evaluation.against, *others])}
    return {method: Mark(places[method]) for method in evaluation.methods}


def for_page(svg: str, name: str) -> str:
    """A drawing by matplotlib as part of a page: themed, sized by the page, its ids its own."""
    svg = svg[svg.index("<svg") :]
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    svg = re.sub(r"#fd00([0-9a-f]{2})", lambda found: f"var(--s{int(found[1], 16)})", svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    # The page's parser knows these without an address, and no address shall stand in the page.
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = svg.replace("url(#", f"url(#{name}-")
    return re.sub(r'href="#', f'href="#{name}-', svg)
