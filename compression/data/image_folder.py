"""Images in one folder per class, read with torchvision transforms v2."""

import logging
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from compression.data.source import DataConfig, Pool, ReadFn, Source
from compression.data.splits import SplitConfig
from compression.errors import DataError

logger = logging.getLogger(__name__)

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})
MAX_PIXELS = 100_000_000


class ImageFolder(DataConfig):
    """``root/<class>/*.png``, or ``root/train/<class>`` and ``root/test/<class>``."""

    kind: Literal["image_folder"] = "image_folder"
    root: Path
    """Folder of folders, one per class; their sorted names are the classes."""
    image_size: Annotated[int, Field(ge=4, le=1024)] = 224
    """Side in pixels: the shorter side is resized to it, the middle square is kept."""
    channels: Literal[1, 3] = 3
    """1: grey, 3: colour."""
    max_corrupt_share: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.01
    """Unreadable files up to this share are left out and named; more are an error."""
    split: SplitConfig = SplitConfig()

    def build(self) -> ReadFn:
        """Return the function that reads the source."""
        return partial(_read, self)

    def check(self) -> None:
        """Check that the folder exists and holds at least two classes.

        Raises:
            DataError: it does not.
        """
        train, test = _places(self.root)
        names = _class_names(train)
        if len(names) < 2:
            raise DataError(
                f"Folder '{train}' has {len(names)} class folders, expected two or more. "
                "Put the images of each class into a folder of its own, or correct data.root."
            )
        if test is not None and _class_names(test) != names:
            raise DataError(
                f"Folder '{test}' has the classes {_class_names(test)}, expected {names} as in '{train}'. "
                "Make them equal."
            )


def _places(root: Path) -> tuple[Path, Path | None]:
    if not root.is_dir():
        raise DataError(f"Folder '{root}' does not exist, expected one folder of images per class. Correct data.root.")
    if (root / "train").is_dir() and (root / "test").is_dir():
        return root / "train", root / "test"
    return root, None


def _class_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _read(config: ImageFolder, seed: int) -> Source:
    config.check()
    train, test = _places(config.root)
    names = _class_names(train)
    pools, warnings = [], []
    first_id = 0
    for folder in [train] if test is None else [train, test]:
        pool, corrupt = _pool(config, folder, names, first_id=first_id)
        first_id += len(pool.labels) + len(corrupt)
        pools.append(pool)
        if corrupt:
            shown = ", ".join(corrupt[:10]) + (", ..." if len(corrupt) > 10 else "")
            warnings.append(f"{len(corrupt)} unreadable files of '{folder}' were left out: {shown}")
    for warning in warnings:
        logger.warning("%s", warning)
    own_test = pools[1] if test is not None else None
    return Source(config.root.name, tuple(names), train=pools[0], test=own_test, scale=255.0, warnings=tuple(warnings))


def _pool(config: ImageFolder, folder: Path, names: list[str], *, first_id: int) -> tuple[Pool, list[str]]:
    files = [
        (path, label)
        for label, name in enumerate(names)
        for path in sorted((folder / name).rglob("*"))
        if path.suffix.lower() in SUFFIXES and path.is_file()
    ]
    images = np.empty((len(files), config.channels, config.image_size, config.image_size), dtype=np.uint8)
    transform = _transform(config)
    labels, ids, corrupt = [], [], []
    for number, (path, label) in enumerate(files):
        try:
            images[len(labels)] = _decode(path, transform, config.channels)
        except (OSError, ValueError, SyntaxError, RuntimeError) as error:
            corrupt.append(f"{path.relative_to(folder)} ({type(error).__name__}: {str(error)[:80]})")
            continue
        labels.append(label)
        ids.append(first_id + number)
    if len(corrupt) > config.max_corrupt_share * len(files):
        listed = "\n  ".join(corrupt[:20])
        raise DataError(
            f"Folder '{folder}' has {len(corrupt)} unreadable images of {len(files)}, expected at most "
            f"{config.max_corrupt_share:.1%}. Repair or remove them, or raise data.max_corrupt_share:\n  {listed}"
        )
    pool = Pool(
        images=images[: len(labels)],
        labels=np.asarray(labels, dtype=np.int64),
        ids=np.asarray(ids, dtype=np.int64),
        origin=str(folder),
    )
    return pool, corrupt


def _transform(config: ImageFolder) -> Any:
    from torchvision.transforms import v2

    return v2.Compose(
        [
            v2.PILToTensor(),
            v2.Resize(config.image_size, antialias=True),
            v2.CenterCrop(config.image_size),
        ]
    )


def _decode(path: Path, transform: Any, channels: int) -> np.ndarray:
    """uint8 [C,H,W]; a picture of absurd size is refused before it is unpacked."""
    from PIL import Image

    with Image.open(path) as picture:
        if picture.width * picture.height > MAX_PIXELS:
            raise ValueError(f"{picture.width} x {picture.height} pixels")
        return transform(picture.convert("RGB" if channels == 3 else "L")).numpy()
