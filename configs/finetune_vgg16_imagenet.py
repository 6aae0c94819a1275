"""Fine-tunes an accelerated VGG-16 on ImageNet with the paper's settings.

    accel finetune runs/NAME configs/finetune_vgg16_imagenet.py --images.data-dir DIR \\
        --held-back.data-dir DIR --evaluation.data-dir DIR

where runs/NAME was written by ``configs/vgg16_imagenet.py``. Learning rate 1e-5, batches of 128,
five windows of each training picture, half of them mirrored: one epoch of these images is five
of the pictures. ImageNet was not at hand where this was written: no figures.
"""

from accel.data.settings import TfdsImages
from accel.finetuning_experiment import Finetuning

config = Finetuning(
    images=TfdsImages(split="train[:-10000]", windows=5),
    held_back=TfdsImages(split="train[-10000:]"),
    evaluation=TfdsImages(split="validation"),
    epochs=1,
    learning_rate=1e-5,
    batch_size=128,
    flip=False,
)
