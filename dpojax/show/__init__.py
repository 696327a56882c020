"""Objectives on a terminal and in pictures: equations as plain text, the catalogue as a table, curves as a plot."""

from dpojax.show.curves import Curve, check_matplotlib, curves_named, curves_of, draw, table
from dpojax.show.equations import readable
from dpojax.show.listing import paper, print_catalogue

__all__ = [
    "Curve",
    "check_matplotlib",
    "curves_named",
    "curves_of",
    "draw",
    "paper",
    "print_catalogue",
    "readable",
    "table",
]
