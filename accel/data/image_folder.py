"""Images of a folder: any folder of pictures, with or without classes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from accel.data.encoded import EncodedImages, EncodedPicture
from accel.data.views import CentreView, Viewer

SUFFIXES = frozenset(
    {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)


def image_folder(
    folder: Path,
    preprocessing: str,
    viewer: Viewer | None = None,
    *,
    labels: Literal["folders"] | Path | None = None,
    pictures: int | None = None,
    seed: int = 0,
) -> EncodedImages:
    """The pictures in ``folder`` and the folders in it, in the order of their relative paths.

    Pictures are told by their suffix (``SUFFIXES``, in any case); names that begin with a dot are
    passed over. The header of every file is read at once, so that a file that is no image shows
    before long work; a file that breaks off later shows when its batch is read.

    Args:
        folder: Where to look.
        preprocessing: A name of ``PREPROCESSINGS`` for RGB images.
        viewer: Which part of a picture is an image; ``CentreView()`` if None.
        labels: ``"folders"``: the folders in ``folder`` are the classes, in the order of their
            names (ImageNet's order, where they are named by WordNet identifiers). A path: a text
            file with a line ``relative/path label`` for every picture, labels counted from 0. None:
            no labels.
        pictures: How many pictures to take, drawn by ``seed``; None for all.
        seed: Seed of the draw.

    Raises:
        ValueError: If the folder has too few pictures, a file is not an image, or the labels do not
            fit; the message names the folder or file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: not a folder")
    found = _picture_names(folder)
    if not found:
        raise ValueError(f"{folder}: no images in it (looked for {', '.join(sorted(SUFFIXES))})")
    known: Mapping[str, int] = {}
    class_count = None
    if labels == "folders":
        known, class_count = _labels_by_folder(folder, found)
    elif labels is not None:
        known = _labels_from_file(Path(labels), folder, found)
    if pictures is not None:
        if not 1 <= pictures <= len(found):
            raise ValueError(f"{folder}: {pictures} images wanted, {len(found)} found")
        drawn = np.random.default_rng(seed).choice(len(found), pictures, replace=False)
        found = [found[index] for index in sorted(drawn)]
    for name in found:
        _check_header(folder / name)
    encoded = [EncodedPicture(str(folder / name), folder / name, known.get(name)) for name in found]
    return EncodedImages(encoded, preprocessing, viewer or CentreView(), class_count)


def _picture_names(folder: Path) -> list[str]:
    """Paths relative to ``folder`` with ``/`` between their parts, sorted part by part."""
    found: list[tuple[str, ...]] = []
    # Links to folders are followed: large data sets are often put together from them.
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        parts = Path(parent).relative_to(folder).parts
        found += [
            (*parts, name)
            for name in files
            if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES
        ]
    return ["/".join(parts) for parts in sorted(found)]


def _labels_by_folder(folder: Path, names: Sequence[str]) -> tuple[dict[str, int], int]:
    # A class without pictures keeps its number, so that the others keep theirs.
    classes = sorted(
        entry.name
        for entry in folder.iterdir()
        if entry.is_dir() and not entry.name.startswith(".")
    )
    numbers = {name: number for number, name in enumerate(classes)}
    for name in names:
        if "/" not in name:
            raise ValueError(f"{folder / name}: lies in no class folder")
    return {name: numbers[name.partition("/")[0]] for name in names}, len(classes)


def _labels_from_file(path: Path, folder: Path, names: Sequence[str]) -> dict[str, int]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file of labels")
    known: dict[str, int] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        name, _, label = line.strip().rpartition(" ")
        name = name.strip()
        if not name or not label.isascii() or not label.isdecimal():
            raise ValueError(f"{path}, line {number}: expected 'path label', found {line!r}")
        if name in known:
            raise ValueError(f"{path}, line {number}: {name} is listed twice")
        known[name] = int(label)
    if missing := [name for name in names if name not in known]:
        raise ValueError(f"{path}: no label for {len(missing)} images, the first {missing[0]}")
    if extra := sorted(set(known) - set(names)):
        raise ValueError(f"{path}: {len(extra)} images are not in {folder}, the first {extra[0]}")
    return known


def _check_header(path: Path) -> None:
    try:
        with Image.open(path):
            pass
    # Broken files make Pillow's plugins raise nearly anything.
    except Exception as error:
        raise ValueError(f"{path}: cannot be read as an image: {error}") from error
