"""Whole networks at 2×, 3×, 4× and 5×: rivals that see no image, the paper's chains, ours.

    accel table configs/paper/whole_network.py --seeds 0 1 2

on the bundled network, as accelerated (``plain``); with label-free repair, with fine-tuning and, as
a control, from scratch (DIR holds the four IDX files of Fashion-MNIST):

    accel table configs/paper/whole_network.py --stages plain repair finetune scratch \\
        --training.images.folder DIR --training.held-back.folder DIR

On the body of VGG-16 with any pictures (which has no classes: ``finetune`` and ``scratch`` are not
for it), or on ImageNet, the latter with the paper's settings for training:

    accel table configs/paper/whole_network.py configs/vgg16_photos.py \\
        --weights FILE --calibration.folder DIR --evaluation.folder DIR
    accel table configs/paper/whole_network.py configs/vgg16_imagenet.py \\
        configs/finetune_vgg16_imagenet.py --stages plain repair finetune scratch \\
        --weights FILE --calibration.data-dir DIR --evaluation.data-dir DIR \\
        --training.images.data-dir DIR --training.held-back.data-dir DIR

Networks are timed after the cells, each in turns with the original. Without any number after
``--latency-batches`` they are not; called again with the same ``--out`` on an idle machine, with

    --latency-batches 1 8

the command times them by their recorded plans, and measures nothing else again.

The rows are explained in ``accel/tables/whole_network.py``; ``--methods`` chooses among them.
"""

from pathlib import Path

from accel.configuration import load_config
from accel.experiment import Experiment
from accel.finetuning_experiment import Finetuning
from accel.tables import WholeNetwork

CONFIGS = Path(__file__).parents[1]

config = WholeNetwork(
    experiment=load_config(CONFIGS / "quickstart.py", Experiment),
    training=load_config(CONFIGS / "finetune_fashion.py", Finetuning),
)
