"""VGG-16 on ImageNet, top-1 and top-5 single-view accuracy as in the paper; 4× fewer MACs.

    accel run configs/vgg16_imagenet.py --weights FILE \\
        --calibration.data-dir DIR --evaluation.data-dir DIR

reads ``imagenet2012`` as prepared by TensorFlow Datasets (``file_format="array_record"``). For
folders of pictures, one folder a class, use ``configs/vgg16_imagenet_folder.py``. Single view:
shorter side 256, centre crop 224. 3,000 training images, 10 positions each, as in the paper.
ImageNet was not at hand where this was written: the path is proved by tests on a tiny data set of
the same structure.
"""

from accel.data.settings import TfdsImages
from accel.experiment import Experiment
from accel.models import ModelSpec

config = Experiment(
    model=ModelSpec("vgg16"),
    weights=None,
    calibration=TfdsImages(split="train[:3000]"),
    evaluation=TfdsImages(split="validation"),
    metrics=("accuracy",),
    rules={"conv1_1": "dense"},
    batch_size=16,
)
