"""Images in [0, 1], by name or from files, and afresh binarised."""

import gzip
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pvi.datasets.tables import digits, sklearn_datasets
from pvi.errors import DataError

FASHION = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package dataset-fashion-mnist
TRAINING = 1500  # of the 1,797 digits
SPLITS = ("train", "test")
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Images:
    """Grey images as `(N, 1, H, W)` float32 in [0, 1], for training and testing.

    `labels` and `test_labels` are `(N,)`, or `None` where there are none.
    """

    train: Tensor
    test: Tensor
    labels: Tensor | None = None
    test_labels: Tensor | None = None


def images(source: Any = "digits") -> Images:
    """Images to train on, and held-out ones.

    Args:
        source: "digits" (scikit-learn's 1,797 of 8 x 8, 297 of them held out); "fashion-mnist", of
            Debian's package dataset-fashion-mnist; "mnist", from openml.org by scikit-learn; the
            path of an .npz file with arrays x_train and x_test (and y_train, y_test) of whole
            numbers to 255 or of fractions; or of a folder with the four .gz files of MNIST.

    Raises:
        DataError: it is not there, or holds something else.
    """
    if source == "digits":
        found = _digits()
    elif source == "mnist":
        found = _openml()
    elif source == "fashion-mnist":
        if not FASHION.is_dir():
            raise DataError(
                "fashion-mnist: install Debian's package dataset-fashion-mnist, or give the path "
                "of the folder with its four .gz files"
            )
        found = _folder(FASHION)
    else:
        path = Path(source)
        if not path.exists():
            raise DataError(f"expected digits, mnist, fashion-mnist or a path, got {source}")
        found = _folder(path) if path.is_dir() else _npz(path)
    return _checked(found, source)


class Binarized(Dataset):
    """Images whose pixels are drawn anew each time they are read: 1 with their value as the chance.

    Data for `pvi.fit` and the `fit` of models ("dynamic binarisation"): an importance-weighted
    bound then sees one binary image for all its particles.

    Args:
        x: `(N, *shape)` in [0, 1].

    Reference:
        Burda, Grosse, Salakhutdinov (2016), Importance Weighted Autoencoders, section 5.
    """

    def __init__(self, x: Any):
        self.x = torch.as_tensor(x)
        if not bool(((self.x >= 0) & (self.x <= 1)).all()):
            raise DataError("Binarized: expected pixels from 0 to 1, got others: divide by 255")

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor]:
        return (self.x[i].bernoulli(),)

    def __getitems__(self, numbers: list[int]) -> list[tuple[Tensor]]:
        return [(row,) for row in self.x[numbers].bernoulli()]

    def fixed(self, seed: int) -> Tensor:
        """One draw of all images, to evaluate on: `(N, *shape)`."""
        return self.x.bernoulli(generator=torch.Generator().manual_seed(seed))


def _digits() -> Arrays:
    bunch: Any = sklearn_datasets().load_digits()
    order = np.random.default_rng(0).permutation(len(bunch.target))
    x, y = digits()[order].reshape(-1, 8, 8) / 16.0, bunch.target[order]
    parts = {"train": slice(TRAINING), "test": slice(TRAINING, None)}
    return {f"{k}_{s}": v[p] for k, v in (("x", x), ("y", y)) for s, p in parts.items()}


def _openml() -> Arrays:
    try:
        bunch: Any = sklearn_datasets().fetch_openml("mnist_784", as_frame=False)
    except OSError as error:
        raise DataError(
            f"mnist could not be fetched from openml.org ({error}): give the path of an .npz file "
            "with x_train and x_test, or of a folder with the four .gz files"
        ) from error
    x, y = bunch.data.reshape(-1, 28, 28) / 255.0, bunch.target.astype(int)
    return {"x_train": x[:60000], "x_test": x[60000:], "y_train": y[:60000], "y_test": y[60000:]}


def _npz(path: Path) -> Arrays:
    try:
        with np.load(path) as file:
            return {k: file[k] for k in file if k in ("x_train", "x_test", "y_train", "y_test")}
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path} is no .npz file of arrays: {error}") from error


def _folder(path: Path) -> Arrays:
    """The four files of MNIST: images with 16 bytes before them, labels with 8."""
    found = {}
    for split, name in zip(SPLITS, ("train", "t10k"), strict=True):
        for key, kind, header in (("x", "images-idx3", 16), ("y", "labels-idx1", 8)):
            file = path / f"{name}-{kind}-ubyte.gz"
            if not file.is_file():
                raise DataError(f"{path} has no {file.name}")
            raw = np.frombuffer(gzip.decompress(file.read_bytes()), np.uint8)
            size = raw[8:16].view(">i4") if key == "x" else ()
            found[f"{key}_{split}"] = raw[header:].reshape(-1, *size)
    return found


def _checked(found: Arrays, source: Any) -> Images:
    tensors: dict[str, Any] = {}
    for split in SPLITS:
        x = found.get(f"x_{split}")
        if x is None or x.ndim < 3 or not len(x):
            raise DataError(f"{source}: expected images x_{split} of shape (N, H, W)")
        x = torch.as_tensor(x.astype(np.float32) / (255.0 if x.dtype == np.uint8 else 1.0))
        if not bool(((x >= 0) & (x <= 1)).all()):
            raise DataError(f"{source}: expected pixels from 0 to 1 or bytes, in x_{split}")
        y = found.get(f"y_{split}")
        tensors[f"x_{split}"] = x if x.ndim == 4 else x[:, None]
        tensors[f"y_{split}"] = None if y is None else torch.as_tensor(y.astype(np.int64))
    return Images(*(tensors[k] for k in ("x_train", "x_test", "y_train", "y_test")))
