"""The embedded default set: scikit-learn's handwritten digits, as a TFDS builder.

1797 grey images of 8x8 pixels, the test part of UCI's Optical Recognition of
Handwritten Digits. No download, no TensorFlow: images are given to TFDS as PIL images
and stored as array_record. Every fifth example is a test example (360), the others
train (1437).
"""

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from sklearn import datasets


class Digits(tfds.core.GeneratorBasedBuilder):
    """8x8 handwritten digits; pixels 0..16 are stored as 0..255."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First release."}

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description="Handwritten digits, 8x8, from scikit-learn.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1)),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        return {"train": self._examples(test=False), "test": self._examples(test=True)}

    def _generate_examples(self, *, test: bool):
        return self._examples(test=test)

    def _examples(self, *, test: bool):
        digits = datasets.load_digits()
        pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
        for i, (image, label) in enumerate(zip(pixels, digits.target, strict=True)):
            if (i % 5 == 0) == test:
                yield i, {"image": Image.fromarray(image), "label": int(label)}


def prepare(data_dir: str) -> None:
    """Write the set below `data_dir`, if it is not there."""
    tfds.disable_progress_bar()
    Digits(data_dir=data_dir, file_format="array_record").download_and_prepare()
