"""Rules by path pattern: which layers to leave alone, and which to fix at a rank.

``{"*": 16, "conv1_*": "dense"}`` leaves conv1_1 and conv1_2 as they are and gives every other layer
rank 16: a later rule wins over an earlier one. Patterns are those of ``fnmatch`` (``*``, ``?``,
``[…]``), case-sensitive, over whole paths; ``*`` also stands for several levels of a path.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Literal

Fixed = Literal["dense"] | int
Rules = Mapping[str, Fixed]


@dataclasses.dataclass(frozen=True)
class Rule:
    """What becomes of every layer whose path matches a pattern.

    Attributes:
        pattern: The pattern, ``"conv1_1"`` or ``"blocks/*/conv2"`` for example.
        value: ``"dense"`` (the layer stays as it is), or the rank it gets.

    Raises:
        ValueError: If the value is neither ``"dense"`` nor a whole number of at least 1.
    """

    pattern: str
    value: Fixed

    def __post_init__(self):
        rank = isinstance(self.value, int) and not isinstance(self.value, bool) and self.value >= 1
        if self.value != "dense" and not rank:
            raise ValueError(
                f"rule {self.pattern!r}: expected 'dense' or a rank of at least 1, found"
                f" {self.value!r}"
            )


def apply_rules(
    widths: Mapping[str, int], rules: Mapping[str, Fixed] | Sequence[Rule]
) -> dict[str, Fixed | None]:
    """What the rules demand of each layer: None (free), ``"dense"``, or a rank.

    Args:
        widths: Number of output channels of each layer by path.
        rules: Rules in order, or the same as a mapping from pattern to value.

    Raises:
        ValueError: If a rule matches no layer, or its rank is above the width of a layer that it
            decides.
    """
    if isinstance(rules, Mapping):
        rules = [Rule(pattern, value) for pattern, value in rules.items()]
    fixed: dict[str, Fixed | None] = dict.fromkeys(widths)
    for rule in rules:
        matched = [path for path in widths if fnmatchcase(path, rule.pattern)]
        if not matched:
            raise ValueError(
                f"rule {rule.pattern!r} matches no layer; the layers are {', '.join(widths)}"
            )
        fixed |= dict.fromkeys(matched, rule.value)
    for path, value in fixed.items():
        if isinstance(value, int) and value > widths[path]:
            raise ValueError(
                f"{path}: a rule fixes the rank at {value}, above the layer's width {widths[path]}"
            )
    return fixed
