"""Rank selection on and off, by energies and by measured errors, at equal MACs.

    accel table configs/paper/rank_selection.py --seeds 0 1 2

on the bundled network; on the body of VGG-16 with any pictures, or on ImageNet:

    accel table configs/paper/rank_selection.py configs/vgg16_photos.py --speedups 4 \\
        --weights FILE --calibration.folder DIR --evaluation.folder DIR
    accel table configs/paper/rank_selection.py configs/vgg16_imagenet.py \\
        --weights FILE --calibration.data-dir DIR --evaluation.data-dir DIR

Layers become pairs of k×k and 1×1, or what ``--decomposition`` names. For the paper's own
question alone: ``--solvers nonlinear --inputs asymmetric --ranks greedy uniform``; ``--solvers
joint`` has all factors fitted together. What is in a row: ``accel/tables/rank_selection.py``.
"""

from pathlib import Path

from accel.configuration import load_config
from accel.experiment import Experiment
from accel.tables import RankSelection

config = RankSelection(
    experiment=load_config(Path(__file__).parents[1] / "quickstart.py", Experiment)
)
