"""The plan of an acceleration: what becomes of each layer, as data that fits in a file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """What becomes of one layer.

    Attributes:
        path: Path of the layer in the module tree.
        decomposition: Name of the decomposition, or None where it stays as it is.
        ranks: Ranks of the decomposition; empty where the layer stays as it is.
        reason: Why it stays as it is.
    """

    path: str
    decomposition: str | None = None
    ranks: tuple[int, ...] = ()
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class AccelerationPlan:
    """What becomes of each layer of a network.

    Attributes:
        layers: The convolutions and, where a budget was given for them, the dense layers, in order
            of execution.
        folded: Paths of the batch normalisations that are folded first, each with the path of the
            convolution that takes it in.
    """

    layers: tuple[LayerPlan, ...]
    folded: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def to_json(self) -> str:
        """The plan as JSON text, read back by ``from_json``."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @staticmethod
    def from_json(text: str) -> AccelerationPlan:
        """The plan that ``to_json`` wrote.

        Raises:
            ValueError: If the text is not such a plan.
        """
        try:
            content = json.loads(text)
            layers = (
                LayerPlan(**(layer | {"ranks": tuple(layer["ranks"])}))
                for layer in content["layers"]
            )
            return AccelerationPlan(tuple(layers), dict(content["folded"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not an acceleration plan: {error!r}") from error
