"""Tables: grids of measurements, each a config in ``configs/paper/`` and a folder of results.

A kind of table is one file with one final dataclass: the fields that are varied, how a cell is
measured, and how the table is made of the cells' lines. The frame (``grid``) does the rest.
"""

from accel.tables.grid import Table, make_table
from accel.tables.layer_energies import LayerEnergies
from accel.tables.rank_selection import RankSelection
from accel.tables.single_layer import SingleLayer
from accel.tables.whole_network import WholeNetwork

__all__ = [
    "LayerEnergies",
    "RankSelection",
    "SingleLayer",
    "Table",
    "WholeNetwork",
    "make_table",
]
