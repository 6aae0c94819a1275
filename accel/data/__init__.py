"""Images for calibration and evaluation. ``accel.data.tfds`` needs an extra package."""

from accel.data.augmentation import FlipAndShift
from accel.data.bundled import fashion_calibration_images, fashion_test_images
from accel.data.encoded import EncodedImages
from accel.data.idx import idx_images
from accel.data.image_folder import image_folder
from accel.data.preprocessing import PREPROCESSINGS, preprocess
from accel.data.resized import ResizedImages
from accel.data.source import ArrayImages, LabelledSource, PixelSource
from accel.data.views import CentreView, RandomWindows

__all__ = [
    "PREPROCESSINGS",
    "ArrayImages",
    "CentreView",
    "EncodedImages",
    "FlipAndShift",
    "LabelledSource",
    "PixelSource",
    "RandomWindows",
    "ResizedImages",
    "fashion_calibration_images",
    "fashion_test_images",
    "idx_images",
    "image_folder",
    "preprocess",
]
