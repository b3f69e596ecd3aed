"""Image sets: the embedded one, caches, grain, and what is said when one is missing."""

import os

import numpy as np
import pytest

from tests.train import tiny
from train import augment, images
from train import config as configs


@pytest.fixture
def config(cache_dir):
    found = tiny.get_config()
    found.cache_dir = str(cache_dir)
    return found


def test_digits_are_scikit_learns(config):
    from sklearn import datasets

    train, test = images.open_split(config, "train"), images.open_split(config, "test")
    assert (len(train), len(test)) == (1437, 360)
    assert train.pixels.dtype == np.uint8 and train.shape == (8, 8, 1)
    digits = datasets.load_digits()
    expected = np.round(digits.images * (255 / 16)).astype(np.uint8)
    rows = [*train.pixels[..., 0], *test.pixels[..., 0]]
    assert sorted(r.tobytes() for r in rows) == sorted(e.tobytes() for e in expected)
    labels = np.concatenate([train.labels, test.labels])
    np.testing.assert_array_equal(np.bincount(labels), np.bincount(digits.target))


def test_a_damaged_cache_is_read_again(config, tmp_path):
    config.cache_dir = str(tmp_path)
    first = images.open_split(config, "test")
    (cache,) = (tmp_path / "npz").iterdir()
    cache.write_bytes(cache.read_bytes()[:-100])
    again = images.open_split(config, "test")
    np.testing.assert_array_equal(first.pixels, again.pixels)
    np.testing.assert_array_equal(first.labels, again.labels)


def test_size_resizes(config):
    config.images.size = 16
    assert images.open_split(config, "test").shape == (16, 16, 1)


@pytest.mark.parametrize("workers", [0, 2], ids=["threads", "processes"])
def test_grain_gives_what_memory_gives(config, workers):
    order = images.order(1437, 16, seed=0, stage=1, epoch=2)[:3]
    memory = images.open_split(config, "train")
    config.images.in_memory, config.images.workers = False, workers
    files = images.open_split(config, "train")
    assert len(files) == len(memory) and files.shape == memory.shape
    streams = zip(memory.stream(order), files.stream(order), strict=True)
    for a, b in streams:
        np.testing.assert_array_equal(a["image"], b["image"])
        np.testing.assert_array_equal(a["label"], b["label"])


def test_order_is_a_permutation_and_changes_with_its_place():
    a = images.order(10, 3, seed=0, stage=0, epoch=0)
    assert a.shape == (3, 3) and len(set(a.reshape(-1).tolist())) == 9
    places = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    orders = {
        images.order(99, 9, seed=s, stage=t, epoch=e).tobytes() for s, t, e in places
    }
    assert len(orders) == 4
    again = images.order(10, 3, seed=0, stage=0, epoch=0)
    np.testing.assert_array_equal(a, again)


def test_a_missing_set_says_how_to_prepare_it(config, tmp_path):
    config.images.name, config.data_dir = "fashion_mnist", str(tmp_path)
    with pytest.raises(images.DatasetError, match="download_and_prepare") as error:
        images.open_split(config, "train")
    assert str(tmp_path) in str(error.value)


def test_a_set_that_tfds_does_not_know_cannot_be_prepared(config, tmp_path):
    config.images.name, config.data_dir = "fashon_mnist", str(tmp_path)
    with pytest.raises(images.DatasetError, match="TFDS has no image set") as error:
        images.open_split(config, "train")
    assert "download_and_prepare" not in str(error.value)
    assert 'Did you mean "fashion_mnist"' in str(error.value)


def test_labels_outside_the_classes_are_refused(config):
    config.images.classes, config.images.size = 9, 9
    with pytest.raises(images.DatasetError, match="labels 0..9"):
        images.open_split(config, "test")


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10"])
def test_prepared_sets_read_back(config, name):
    where = os.environ.get("TFDS_DATA_DIR", "")
    if not os.path.isdir(os.path.join(where, name)):
        pytest.skip(f"TFDS_DATA_DIR has no {name}")
    config.data_dir, config.images.name = where, name
    split = images.open_split(config, "test")
    assert len(split) == 10000 and np.bincount(split.labels).tolist() == (
        [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
        if name == "mnist"
        else [1000] * 10
    )


def test_augmentation_by_hand(key):
    # Without padding and mirror it is (p / 255 - 0.5) / 0.25: 0 -> -2, 255 -> 2.
    pixels = np.array([[[[0], [255]]]], np.uint8)
    plain = augment.augment(configs.Images())(pixels, key)
    np.testing.assert_allclose(plain.reshape(-1), [-2.0, 2.0], atol=1e-6)
    # A mirrored or shifted picture is one of the few that can be.
    many = np.repeat(pixels, 64, axis=0)
    flipped = augment.augment(configs.Images(flip=True))(many, key)
    rows = {tuple(np.round(r.reshape(-1)).tolist()) for r in flipped}
    assert rows == {(-2.0, 2.0), (2.0, -2.0)}
    shifted = augment.augment(configs.Images(pad=1))(many, key)
    rows = {tuple(np.round(r.reshape(-1)).tolist()) for r in shifted}
    assert rows == {(-2.0, 2.0), (-2.0, -2.0), (2.0, -2.0)}
