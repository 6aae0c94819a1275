"""As ``configs/quickstart.py``, but calibrated on 12,000 training images instead of 3,000.

    accel run configs/fashion_mnist.py --calibration.folder DIR

DIR holds the four IDX files of Fashion-MNIST (Debian: ``dpkg -L dataset-fashion-mnist``). No label
is looked at. What more images give, before and after label-free repair, is in results/README.md
("Chains at equal MACs").
"""

import dataclasses
from pathlib import Path

from accel.configuration import load_config
from accel.data.settings import IdxImages
from accel.experiment import Experiment

quickstart = load_config(Path(__file__).parent / "quickstart.py", Experiment)
config = dataclasses.replace(quickstart, calibration=IdxImages(stop=12_000))
