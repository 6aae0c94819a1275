"""The convolutional body of VGG-16, ImageNet weights, on any folders of pictures; 4× fewer MACs.

    accel run configs/vgg16_photos.py --weights FILE \\
        --calibration.folder DIR --evaluation.folder DIR

FILE is any VGG-16 of ImageNet: Keras ``.h5``, ``.onnx``, torchvision ``.pth`` or ``.safetensors``
(the latter two with ``--calibration.preprocessing torch --evaluation.preprocessing torch``).
Measured is how far the output (relu5_3) is from the original's on pictures that nothing was fitted
to: on 113 of them an error of 0.079, fitted to 985 of 1,095 in some 15 minutes on two slow cores;
``--calibration.windows 4 --positions-per-image 15`` takes an hour and leaves about a tenth less.
All figures are in results/README.md.
"""

from accel.data.settings import FolderImages
from accel.experiment import Experiment
from accel.models import ModelSpec

config = Experiment(
    model=ModelSpec("vgg16_body"),
    weights=None,
    calibration=FolderImages(windows=1),
    evaluation=FolderImages(),
    metrics=("outputs",),
    rules={"conv1_1": "dense"},
    positions_per_image=20,
    batch_size=8,
)
