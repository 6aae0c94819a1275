"""How many principal components hold 90, 95, 99 and 99.9 % of each layer's response energy.

    accel table configs/paper/layer_energies.py --seeds 0 1 2

on the bundled network; on the body of VGG-16 with any pictures, or on ImageNet:

    accel table configs/paper/layer_energies.py configs/vgg16_photos.py \\
        --weights FILE --calibration.folder DIR
    accel table configs/paper/layer_energies.py configs/vgg16_imagenet.py \\
        --weights FILE --calibration.data-dir DIR

What is in a row: ``accel/tables/layer_energies.py``.
"""

from pathlib import Path

from accel.configuration import load_config
from accel.experiment import Experiment
from accel.tables import LayerEnergies

config = LayerEnergies(
    experiment=load_config(Path(__file__).parents[1] / "quickstart.py", Experiment)
)
