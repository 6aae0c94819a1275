"""Fine-tunes what ``configs/quickstart.py`` gave on Fashion-MNIST's training images.

accel finetune runs/quickstart configs/finetune_fashion.py --data DIR
"""

from accel.experiment import BundledImages, IdxImages
from accel.finetuning_experiment import Finetuning

config = Finetuning(
    images=IdxImages(stop=-3000),
    held_back=IdxImages(start=-3000),
    evaluation=BundledImages("test"),
    epochs=5,
    learning_rate=1e-3,
    optimizer="adamw",
    shift=1,
)
