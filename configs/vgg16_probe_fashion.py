"""A linear probe on the real VGG-16 body: what accuracy the accelerated body keeps; 4× fewer MACs.

    python scripts/train_linear_probe.py configs/vgg16_probe_fashion.py --weights FILE --data DIR \\
        --out probe
    accel run configs/vgg16_probe_fashion.py --weights probe/model \\
        --calibration.folder DIR --evaluation.folder DIR

FILE is any VGG-16 of ImageNet for the images of Caffe and Keras (see ``configs/vgg16_photos.py``),
DIR holds the four IDX files of Fashion-MNIST (Debian: ``dpkg -L dataset-fashion-mnist``). The
network is the body with the linear layer that was trained once on the original body's features;
accelerating changes the body alone, so top-1 is the accuracy of that same probe on accelerated
features. Images are upscaled to 64×64, which leaves 2×2 positions behind ``pool5``.

Calibration, without labels, is on 3,000 training images that the probe was neither trained nor
chosen by: those before the last 3,000, which ``train_linear_probe.py`` holds back.

What accuracy is left is in results/README.md, with the command; some 15 minutes for one network on
two slow CPU cores.
"""

from accel.data.settings import IdxImages
from accel.experiment import Experiment
from accel.models import ModelSpec

config = Experiment(
    model=ModelSpec("vgg16", {"num_classes": 10, "hidden_features": (), "pooled_size": 2}),
    weights=None,
    calibration=IdxImages(start=-6000, stop=-3000, preprocessing="caffe", image_size=64),
    evaluation=IdxImages(split="test", preprocessing="caffe", image_size=64),
    metrics=("accuracy", "outputs"),
    rules={"conv1_1": "dense"},
    positions_per_image=10,
    batch_size=50,
)
