"""Fine-tunes what ``configs/quickstart.py`` gave on Fashion-MNIST's training images.

    accel finetune runs/NAME configs/finetune_fashion.py --images.folder DIR --held-back.folder DIR

where DIR holds the four IDX files of Fashion-MNIST (Debian: ``dpkg -L dataset-fashion-mnist``).
The last 3,000 training images are held back to watch it; the test images are looked at before and
after. What it gives at 5× is in the README (``results/fashion_whole_network``). One epoch of 12,000
images, at any of several learning rates, did not raise accuracy on the held-back images.
"""

from accel.data.settings import BundledImages, IdxImages
from accel.finetuning_experiment import Finetuning

config = Finetuning(
    images=IdxImages(stop=-3000),
    held_back=IdxImages(start=-3000),
    evaluation=BundledImages("test"),
    epochs=3,
    learning_rate=1e-3,
    optimizer="adamw",
    shift=1,
)
