"""The main job on the bundled network: a small VGG on Fashion-MNIST, 4× fewer MACs.

    accel run configs/quickstart.py

Needs no download; one to four minutes on two cores. Measured figures are in the README's first
table.
"""

from accel.data.settings import BundledImages
from accel.experiment import BUNDLED, Experiment
from accel.models import ModelSpec

config = Experiment(
    model=ModelSpec("small_vgg"),
    weights=BUNDLED,
    calibration=BundledImages("calibration"),
    evaluation=BundledImages("test"),
    metrics=("accuracy", "outputs"),
    rules={"conv1_1": "dense"},
    batch_size=100,
    latency_batches=(1, 100),
    latency_seconds=10.0,
)
