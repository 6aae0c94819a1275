"""Makes the bundled images ``fashion_mnist.npz`` from the four IDX files of Fashion-MNIST.

    python scripts/make_bundled_fashion_mnist.py --data DIR

DIR holds the files (Debian: ``dpkg -L dataset-fashion-mnist``). The file gets 3,000 training images
for calibration, without their labels and none of them among those that
``train_fashion_vgg.py`` holds back, and the 10,000 test images with labels. A second run gives the
same bytes.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import tyro
from train_fashion_vgg import HELD_BACK

from accel.data.idx import read_idx

CALIBRATION_IMAGES = 3_000


@dataclasses.dataclass(frozen=True)
class Options:
    data: Path
    out: Path = Path(__file__).parent.parent / "accel" / "bundled" / "fashion_mnist.npz"
    seed: int = 0


def main(options: Options) -> None:
    training_images = read_idx(options.data / "train-images-idx3-ubyte.gz", 3)[:-HELD_BACK]
    drawn = np.random.default_rng(options.seed).choice(
        len(training_images), CALIBRATION_IMAGES, replace=False
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    temporary = options.out.with_name(f"{options.out.name}.partial")
    with temporary.open("wb") as file:
        np.savez_compressed(
            file,
            calibration_images=training_images[np.sort(drawn)],
            test_images=read_idx(options.data / "t10k-images-idx3-ubyte.gz", 3),
            test_labels=read_idx(options.data / "t10k-labels-idx1-ubyte.gz", 1),
        )
    temporary.replace(options.out)
    print(f"{options.out}: {options.out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main(tyro.cli(Options))
