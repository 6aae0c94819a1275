"""The one error of weight files."""

from __future__ import annotations


class WeightError(ValueError):
    """A weight file cannot be read, or does not fit the network it is loaded into.

    The message names the file and, where there is one, the tensor, with what was expected and what
    was found.
    """
