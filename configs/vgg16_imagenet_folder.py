"""VGG-16 on ImageNet as folders of pictures, top-1 and top-5 single-view accuracy; 4× fewer MACs.

    accel run configs/vgg16_imagenet_folder.py --weights FILE \\
        --calibration.folder TRAIN --evaluation.folder VALIDATION

VALIDATION holds one folder a class, named so that their order is that of the classes (WordNet
identifiers); TRAIN any training pictures, 3,000 of which are drawn. Otherwise as
``configs/vgg16_imagenet.py``.
"""

from accel.data.settings import FolderImages
from accel.experiment import Experiment
from accel.models import ModelSpec

config = Experiment(
    model=ModelSpec("vgg16"),
    weights=None,
    calibration=FolderImages(pictures=3000),
    evaluation=FolderImages(labels="folders"),
    metrics=("accuracy",),
    rules={"conv1_1": "dense"},
    batch_size=16,
)
