"""Image sets: small ones in memory as uint8, large ones through grain.

Both give the same thing: `rows(indices)`, uint8 pictures and their labels, and
`stream(order)`, an iterator over batches of rows. The order of an epoch is a pure
function of (seed, stage, epoch), so that a resumed run sees what it would have seen.
"""

import dataclasses
import hashlib
import os
import pathlib
import tempfile
import zipfile
from collections.abc import Iterator
from typing import Any

import numpy as np

from compressjax.core import errors
from train import config as configs


class DatasetError(RuntimeError):
    """An image set is not there, or is not what the config says."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """A whole split in memory: pixels u8[N, H, W, C], labels i32[N]."""

    pixels: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.pixels.shape[1:]

    def rows(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        return {"image": self.pixels[indices], "label": self.labels[indices]}

    def stream(self, order: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
        """Batches of rows: order is i64[steps, batch]."""
        return (self.rows(indices) for indices in order)


@dataclasses.dataclass(frozen=True)
class Files:
    """A split that stays on disk; pictures are decoded by grain as they are needed."""

    source: Any
    size: int
    workers: int

    def __len__(self) -> int:
        return len(self.source)

    @property
    def shape(self) -> tuple[int, ...]:
        return _pixels(self.source[0], self.size).shape

    def rows(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        return _batch([self._row(i) for i in indices])

    def _row(self, index: int) -> dict[str, np.ndarray]:
        return _row(self.source[int(index)], self.size)

    def stream(self, order: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
        import grain
        from absl import flags

        if not flags.FLAGS.is_parsed():  # grain reads its flags, in any program
            flags.FLAGS.mark_as_parsed()
        if not order.size:
            return iter(())
        size = self.size
        dataset = grain.MapDataset.source(_Ordered(self.source, order.reshape(-1)))
        batches = dataset.map(lambda x: _row(x, size)).batch(order.shape[1])
        iterator = batches.to_iter_dataset()
        if self.workers:
            iterator = iterator.mp_prefetch(
                grain.MultiprocessingOptions(num_workers=self.workers)
            )
        return iter(iterator)


@dataclasses.dataclass(frozen=True)
class _Ordered:
    """A data source read in a given order (a class, so that workers can have it)."""

    source: Any
    order: np.ndarray

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> Any:
        return self.source[int(self.order[index])]


def order(size: int, batch: int, *, seed: int, stage: int, epoch: int) -> np.ndarray:
    """The examples of an epoch: i64[steps, batch]; the tail that fills no batch rests.

    >>> order(5, 2, seed=0, stage=0, epoch=0).shape
    (2, 2)
    """
    steps = size // batch
    generator = np.random.Generator(np.random.PCG64([seed, stage, epoch]))
    return generator.permutation(size)[: steps * batch].reshape(steps, batch)


def open_split(config: configs.Config, split: str) -> Memory | Files:
    """One split of the config's image set."""
    images = config.images
    data_dir = _data_dir(config)
    if images.name == "digits":
        data_dir = _digits(config)
    if not images.in_memory:
        source = _source(images, split, data_dir)
        return Files(source, images.size, images.workers)
    cache = _cache_path(config, split, data_dir)
    if cache is not None and (found := _read_cache(cache)) is not None:
        return found
    source = _source(images, split, data_dir)
    rows = [_row(source[i], images.size) for i in range(len(source))]
    if len({row["image"].shape for row in rows}) != 1:
        raise DatasetError(
            f"{images.name}: pictures of {split} have different sizes. "
            "Set config.images.size to bring them to one."
        )
    batch = _batch(rows)
    found = Memory(batch["image"], batch["label"])
    _check_labels(found.labels, images)
    if cache is not None:
        _write_cache(cache, found)
    return found


def _check_labels(labels: np.ndarray, images: configs.Images) -> None:
    if labels.min() < 0 or labels.max() >= images.classes:
        raise DatasetError(
            f"{images.name} has labels {labels.min()}..{labels.max()}, and "
            f"config.images.classes is {images.classes}."
        )


def _pixels(example: dict[str, Any], size: int) -> np.ndarray:
    image = np.asarray(example["image"], np.uint8)
    if size and image.shape[:2] != (size, size):
        from PIL import Image

        mode = image[..., 0] if image.shape[-1] == 1 else image
        resized = Image.fromarray(mode).resize((size, size), Image.Resampling.BILINEAR)
        image = np.asarray(resized, np.uint8).reshape(size, size, image.shape[-1])
    return image


def _row(example: dict[str, Any], size: int) -> dict[str, np.ndarray]:
    return {"image": _pixels(example, size), "label": np.int32(example["label"])}


def _batch(rows: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {
        "image": np.stack([row["image"] for row in rows]),
        "label": np.array([row["label"] for row in rows], np.int32),
    }


def _data_dir(config: configs.Config) -> str:
    where = config.data_dir or os.environ.get("TFDS_DATA_DIR")
    return os.path.expanduser(where or os.path.join("~", "tensorflow_datasets"))


def _cache_dir(config: configs.Config) -> pathlib.Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    where = config.cache_dir or os.path.join(base, "compressjax")
    return pathlib.Path(where).expanduser()


def _digits(config: configs.Config) -> str:
    """The directory that holds the embedded set, written there if need be."""
    where = _cache_dir(config) / "tfds"

    def is_there() -> bool:
        return any(where.glob("digits/*/dataset_info.json"))

    if not is_there():
        from train import digits

        try:
            digits.prepare(str(where))
        except OSError:  # another process came first
            if not is_there():
                raise
    return str(where)


def _source(images: configs.Images, split: str, data_dir: str) -> Any:
    """A TFDS data source; never downloads."""
    import tensorflow_datasets as tfds

    name = images.name
    try:
        return tfds.data_source(name, split=split, data_dir=data_dir, download=False)
    except Exception as error:
        if pathlib.Path(data_dir, name).is_dir():
            raise DatasetError(
                f'{name}: split "{split}" cannot be read below {data_dir}: '
                f"{str(error).splitlines()[0]} The set must be prepared with "
                'file_format="array_record".'
            ) from error
        if isinstance(error, tfds.core.DatasetNotFoundError):
            known = tfds.list_builders(with_community_datasets=False)
            raise DatasetError(
                "config.images.name: TFDS has no image set of this name, and there is "
                f"none below {data_dir}. "
                f"{errors.no_match('set', name, ['digits', *known])}"
            ) from None
        raise DatasetError(
            f"{name} is not prepared below {data_dir}. Say where it is with "
            "--config.data_dir=DIR or TFDS_DATA_DIR, or prepare it once, with a "
            'network: python -c "import tensorflow_datasets as tfds; '
            f"tfds.builder('{name}', data_dir='{data_dir}', "
            "file_format='array_record').download_and_prepare()\""
        ) from error


def _cache_path(
    config: configs.Config, split: str, data_dir: str
) -> pathlib.Path | None:
    """Where the .npz of a split lives; its name changes when the set's files do."""
    images = config.images
    files = sorted(pathlib.Path(data_dir, images.name).rglob("*"))
    if not files:
        return None
    seen = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    text = repr((seen, split, images.size)).encode()
    name = f"{images.name}-{hashlib.sha256(text).hexdigest()[:16]}.npz"
    return _cache_dir(config) / "npz" / name


def _read_cache(path: pathlib.Path) -> Memory | None:
    """The cached split, or None where there is none or it does not read back."""
    if not path.exists():
        return None
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
            return Memory(stored["pixels"], stored["labels"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        print(f"{path} is damaged ({error}); reading the set again.", flush=True)
        return None


def _write_cache(path: pathlib.Path, split: Memory) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        np.savez(file, pixels=split.pixels, labels=split.labels)
    os.replace(file.name, path)
