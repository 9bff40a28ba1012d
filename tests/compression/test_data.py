import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from compression.data import (
    Arrays,
    Dataset,
    Digits,
    FashionMnist,
    ImageFolder,
    check_source,
    load_dataset,
    open_dataset,
    save_dataset,
)
from compression.errors import DataError

SPLITS = ("train", "validation", "calibration", "test")


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset(Digits(), seed=0)


def arrays(
    place: Path, *, images: np.ndarray | None = None, labels: np.ndarray | None = None, **more: object
) -> Arrays:
    if images is None:
        images = np.random.default_rng(0).integers(0, 255, (60, 6, 6), dtype=np.uint8)
    if labels is None:
        labels = np.arange(len(images)) % 3
    np.savez(place / "data.npz", images=images, labels=labels, **more)
    return Arrays(path=place / "data.npz")


def test_digits_are_all_there_once(digits: Dataset) -> None:
    ids = torch.cat([getattr(digits, split).ids for split in SPLITS])
    assert sorted(ids.tolist()) == list(range(1797))
    assert digits.num_classes == 10
    assert digits.input_shape == (1, 8, 8)


def test_every_class_has_its_share_in_every_split(digits: Dataset) -> None:
    whole = np.bincount(np.concatenate([getattr(digits, split).labels.numpy() for split in SPLITS])) / 1797
    for split in SPLITS:
        labels = getattr(digits, split).labels.numpy()
        np.testing.assert_allclose(np.bincount(labels, minlength=10) / len(labels), whole, atol=0.02)


def test_same_seed_same_hashes_other_seed_others(digits: Dataset) -> None:
    assert load_dataset(Digits(), seed=0).hashes == digits.hashes
    other = load_dataset(Digits(), seed=1)
    assert all(other.hashes[split] != digits.hashes[split] for split in SPLITS)


def test_preprocessing_comes_from_the_train_split_alone(digits: Dataset) -> None:
    scaled = digits.train.images.double() / digits.preprocessing.scale
    assert digits.preprocessing.mean[0] == pytest.approx(scaled.mean().item(), abs=1e-5)
    assert digits.preprocessing.std[0] == pytest.approx(scaled.std(correction=0).item(), abs=1e-5)


def test_a_saved_dataset_opens_equal_and_saves_to_equal_bytes(digits: Dataset, tmp_path: Path) -> None:
    save_dataset(digits, tmp_path / "one")
    opened = open_dataset(tmp_path / "one")
    assert (opened.name, opened.class_names, opened.preprocessing) == (
        digits.name,
        digits.class_names,
        digits.preprocessing,
    )
    assert opened.hashes == digits.hashes
    for split in SPLITS:
        for part in ("images", "labels", "ids"):
            assert torch.equal(getattr(getattr(opened, split), part), getattr(getattr(digits, split), part))
    save_dataset(opened, tmp_path / "two")
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes(), file.name


def test_writing_to_an_opened_image_leaves_the_file_alone(digits: Dataset, tmp_path: Path) -> None:
    save_dataset(digits, tmp_path)
    before = (tmp_path / "train.images.npy").read_bytes()
    open_dataset(tmp_path).train.images[0] += 1
    assert (tmp_path / "train.images.npy").read_bytes() == before


def test_a_limit_keeps_every_class(tmp_path: Path) -> None:
    limited = load_dataset(Digits(limit=200), seed=0)
    assert sum(len(getattr(limited, split).labels) for split in SPLITS) == 200
    assert len(limited.train.labels.unique()) == 10


def test_a_folder_that_is_no_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no readable dataset"):
        open_dataset(tmp_path)


# ---------------------------------------------------------------- arrays


def test_arrays_read_grey_and_colour(tmp_path: Path) -> None:
    grey = load_dataset(arrays(tmp_path), seed=0)
    assert grey.input_shape == (1, 6, 6)
    colour = load_dataset(arrays(tmp_path, images=np.zeros((60, 3, 6, 6), np.float32)), seed=0)
    assert colour.input_shape == (3, 6, 6)
    assert colour.preprocessing.scale == 1.0


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"labels": np.array([0, 1, 7] * 20), "class_names": ["a", "b", "c"]}, "value 7"),
        ({"labels": np.array([0, 1, -2] * 20)}, "value -2"),
        ({"labels": np.array([0.0, 1.5, 2.0] * 20)}, "value 1.5"),
        ({"labels": np.array([0, 2] * 30), "class_names": ["a", "b", "c"]}, "Class 'b'"),
        ({"labels": np.arange(59) % 3}, "60 images and 59 labels"),
        ({"images": np.full((60, 6, 6), np.nan, np.float32)}, "not finite"),
        ({"images": np.zeros((60, 6, 6), np.float64)}, "float64"),
        ({"images": np.zeros((60, 32, 32, 3), np.uint8)}, "transpose"),
        ({"images": np.zeros((6, 6, 6), np.uint8), "labels": np.arange(6) % 3}, "expected at least 4"),
    ],
)
def test_wrong_arrays_are_refused_with_row_value_and_file(tmp_path: Path, content: dict, says: str) -> None:
    with pytest.raises(DataError) as caught:
        load_dataset(arrays(tmp_path, **content), seed=0)
    assert says in str(caught.value)
    assert "data.npz" in str(caught.value)


def test_a_file_that_is_no_npz_and_a_missing_one(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("hello")
    for name in ("text.npz", "none.npz"):
        with pytest.raises(DataError, match=name):
            check_source(Arrays(path=tmp_path / name))


def test_pickled_objects_inside_an_npz_do_not_load(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", images=np.array([object()] * 60), labels=np.arange(60) % 3)
    with pytest.raises(DataError):
        load_dataset(Arrays(path=tmp_path / "data.npz"), seed=0)


def test_an_image_in_two_splits_is_counted_or_refused(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 255, (60, 6, 6), dtype=np.uint8)
    images[1::3] = images[1]
    config = arrays(tmp_path, images=images)
    (warning, *_) = load_dataset(config, seed=0).warnings
    assert "in the train split too" in warning
    with pytest.raises(DataError, match="on_leak"):
        load_dataset(config.model_copy(update={"on_leak": "fail"}), seed=0)


# ---------------------------------------------------------------- Fashion-MNIST


def write_idx(folder: Path, *, train: int = 60, test: int = 30, side: int = 28) -> FashionMnist:
    generator = np.random.default_rng(0)
    for stem, count in (("train", train), ("t10k", test)):
        images = generator.integers(0, 255, (count, side, side), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        with gzip.open(folder / f"{stem}-images-idx3-ubyte.gz", "wb") as file:
            file.write(struct.pack(">IIII", 2051, count, side, side) + images.tobytes())
        with gzip.open(folder / f"{stem}-labels-idx1-ubyte.gz", "wb") as file:
            file.write(struct.pack(">II", 2049, count) + labels.tobytes())
    return FashionMnist(root=folder, split={"validation": 0.2, "calibration": 0.2})


def test_idx_files_keep_their_own_test_set(tmp_path: Path) -> None:
    dataset = load_dataset(write_idx(tmp_path), seed=0)
    assert len(dataset.test.labels) == 30
    assert set(dataset.test.ids.tolist()) == set(range(60, 90))
    assert len(dataset.train.labels) + len(dataset.validation.labels) + len(dataset.calibration.labels) == 60


@pytest.mark.parametrize("damage", ["magic", "short", "not gzip", "labels missing"])
def test_damaged_idx_files_are_named(tmp_path: Path, damage: str) -> None:
    config = write_idx(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    content = gzip.decompress(path.read_bytes())
    if damage == "magic":
        path.write_bytes(gzip.compress(b"\x00\x00\x08\x09" + content[4:]))
    elif damage == "short":
        path.write_bytes(gzip.compress(content[:-100]))
    elif damage == "not gzip":
        path.write_bytes(b"plain text")
    else:
        path = tmp_path / "train-labels-idx1-ubyte.gz"
        path.unlink()
    with pytest.raises(DataError, match=path.name.removesuffix(".gz")):
        load_dataset(config, seed=0)


def test_absent_fashion_mnist_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="dataset-fashion-mnist") as caught:
        check_source(FashionMnist(root=tmp_path))
    assert "data.root" in str(caught.value)


def test_the_real_fashion_mnist_where_it_is_installed() -> None:
    config = FashionMnist()
    try:
        config.check()
    except DataError:
        pytest.skip("Fashion-MNIST is not installed (Debian package dataset-fashion-mnist)")
    dataset = load_dataset(config, seed=0)
    sizes = [len(getattr(dataset, split).labels) for split in SPLITS]
    assert sizes == [56_000, 3000, 1000, 10_000]
    assert dataset.class_names[9] == "Ankle boot"
    assert dataset.preprocessing.mean[0] == pytest.approx(0.286, abs=0.002)


# ---------------------------------------------------------------- image folder


def make_images(root: Path, classes: tuple[str, ...] = ("cat", "dog"), count: int = 12) -> None:
    from PIL import Image

    generator = np.random.default_rng(0)
    for name in classes:
        (root / name).mkdir(parents=True)
        for index in range(count):
            picture = generator.integers(0, 255, (20, 30, 3), dtype=np.uint8)
            Image.fromarray(picture).save(root / name / f"{index:02d}.png")


def test_an_image_folder_becomes_squares_of_the_asked_size(tmp_path: Path) -> None:
    make_images(tmp_path)
    dataset = load_dataset(ImageFolder(root=tmp_path, image_size=16), seed=0)
    assert dataset.input_shape == (3, 16, 16)
    assert dataset.class_names == ("cat", "dog")
    grey = load_dataset(ImageFolder(root=tmp_path, image_size=16, channels=1), seed=0)
    assert grey.input_shape == (1, 16, 16)


def test_train_and_test_folders_are_kept_apart(tmp_path: Path) -> None:
    make_images(tmp_path / "train")
    make_images(tmp_path / "test", count=5)
    assert len(load_dataset(ImageFolder(root=tmp_path, image_size=8), seed=0).test.labels) == 10


def test_a_few_corrupt_files_are_left_out_and_named(tmp_path: Path) -> None:
    make_images(tmp_path)
    broken = tmp_path / "cat" / "00.png"
    broken.write_bytes(broken.read_bytes()[:60])
    (tmp_path / "dog" / "00.png").write_bytes(b"")
    dataset = load_dataset(ImageFolder(root=tmp_path, image_size=8, max_corrupt_share=0.2), seed=0)
    (warning,) = [text for text in dataset.warnings if "unreadable" in text]
    assert warning.startswith("2 unreadable files")
    assert "00.png" in warning
    with pytest.raises(DataError, match="2 unreadable images of 24") as caught:
        load_dataset(ImageFolder(root=tmp_path, image_size=8), seed=0)
    assert "max_corrupt_share" in str(caught.value)


def test_a_folder_without_classes_or_a_missing_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="0 class folders"):
        check_source(ImageFolder(root=tmp_path))
    with pytest.raises(DataError, match="does not exist"):
        check_source(ImageFolder(root=tmp_path / "none"))


def test_other_classes_in_test_than_in_train(tmp_path: Path) -> None:
    make_images(tmp_path / "train")
    make_images(tmp_path / "test", classes=("cat", "cow"))
    with pytest.raises(DataError, match="cow"):
        check_source(ImageFolder(root=tmp_path))
