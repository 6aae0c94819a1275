"""The error of single layers against rank: linear and nonlinear, symmetric and asymmetric.

    accel table configs/paper/single_layer.py --seeds 0 1 2

on the bundled network; on the body of VGG-16 with any pictures, or on ImageNet:

    accel table configs/paper/single_layer.py configs/vgg16_photos.py \\
        --layers conv2_2 conv3_3 conv4_3 --weights FILE --calibration.folder DIR
    accel table configs/paper/single_layer.py configs/vgg16_imagenet.py \\
        --layers conv2_2 conv3_3 conv4_3 --weights FILE --calibration.data-dir DIR

What is in a row: ``accel/tables/single_layer.py``.
"""

from pathlib import Path

from accel.configuration import load_config
from accel.experiment import Experiment
from accel.tables import SingleLayer

config = SingleLayer(
    experiment=load_config(Path(__file__).parents[1] / "quickstart.py", Experiment),
    layers=("conv1_2", "conv2_2", "conv3_2"),
)
