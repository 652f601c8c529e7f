"""How a run is drawn, the same on the page and in the pictures."""

from typing import NamedTuple

# After Okabe and Ito (jfly.uni-koeln.de/color), without yellow and black, which vanish on one of the grounds.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7F7F7F")
_DASHES = (("solid", "-"), ("dash", "--"), ("dot", ":"), ("dashdot", "-."))


class Line(NamedTuple):
    """Colour, and dash by plotly's and by matplotlib's name."""

    colour: str
    plotly_dash: str
    matplotlib_dash: str


def line_of(number: int) -> Line:
    """The line of a run by its place; each round through the colours has another dash."""
    dash = _DASHES[number // len(_COLOURS) % len(_DASHES)]
    return Line(_COLOURS[number % len(_COLOURS)], *dash)
