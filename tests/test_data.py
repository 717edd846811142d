"""Data sets: formats, image folders, cache, streaming, splits."""

import gzip
import os
import pickle
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from helpers import Evil, accept_any_cifar, no_network, write_cifar10, write_cifar100, write_folder
from PIL import Image

from utils import image_sources
from utils.augment import Augment
from utils.cli import UserError
from utils.data_utils import eval_batches, train_batches
from utils.datasets import MINI, load_data
from utils.image_sources import Files, Ragged, Uniform
from utils.presets import DATASETS

CPU = torch.device("cpu")
HALF = ([0.5] * 3, [0.5] * 3)


def test_mini_is_the_beginning_of_fashion_mnist():
    data = load_data("fashionmnist-mini")
    assert len(data.train) == 10_000 and len(data.test) == 2_000 and data.valid is data.test
    assert data.classes[9] == "Ankle boot" and data.selected_on == "test"
    assert data.train.labels[:10].tolist() == [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]  # as published
    assert data.train.source.images.shape == (10_000, 1, 28, 28)
    assert data.train.source.images[0].sum() == 76247


def test_fashion_mnist_gzipped_or_not(tmp_path):
    raw = tmp_path / "FashionMNIST" / "raw"
    shutil.copytree(MINI, raw)
    packed = load_data("fashionmnist", tmp_path)
    for path in raw.glob("*.gz"):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    unpacked = load_data("fashionmnist", tmp_path)
    assert torch.equal(packed.train.source.images, unpacked.train.source.images)
    assert torch.equal(packed.test.labels, unpacked.test.labels)


def test_emnist_letters_begin_at_zero(tmp_path):
    raw = tmp_path / "EMNIST" / "raw"
    raw.mkdir(parents=True)
    for split in ("train", "test"):
        images = (
            (2051).to_bytes(4, "big")
            + b"".join(n.to_bytes(4, "big") for n in (26, 28, 28))
            + bytes(i // 28 % 28 for i in range(26 * 784))
        )
        labels = (2049).to_bytes(4, "big") + (26).to_bytes(4, "big") + bytes(range(1, 27))
        (raw / f"emnist-letters-{split}-images-idx3-ubyte").write_bytes(images)
        (raw / f"emnist-letters-{split}-labels-idx1-ubyte").write_bytes(labels)
    data = load_data("emnist", tmp_path, emnist_split="letters")
    assert data.classes[0] == "a" and len(data.classes) == 26
    assert data.train.labels.tolist() == list(range(26))
    assert data.train.source.images[3, 0, 0].tolist() == list(range(28))  # rows of the file are columns


def test_cifar_in_its_own_format(tmp_path, monkeypatch):
    accept_any_cifar(monkeypatch)
    write_cifar10(tmp_path)
    write_cifar100(tmp_path)
    ten = load_data("cifar10", tmp_path)
    hundred = load_data("cifar100", tmp_path)
    assert ten.train.source.images.shape == (300, 3, 32, 32) and len(ten.test) == 60
    assert ten.classes[3] == "class3" and len(hundred.classes) == 100 and len(hundred.train) == 200
    with open(tmp_path / "cifar-10-batches-py" / "data_batch_2", "rb") as file:
        pixels = pickle.load(file)["data"]
    assert ten.train.source.images[60].flatten().tolist() == pixels[0].tolist()


@pytest.mark.parametrize("file", ["data_batch_3", "test_batch", "batches.meta"])
def test_cifar_file_of_another_checksum_is_refused_and_not_run(tmp_path, monkeypatch, file):
    """The others' checksums are let pass."""
    compare = torchvision.datasets.cifar.check_integrity
    accept_any_cifar(monkeypatch)
    accept = torchvision.datasets.cifar.check_integrity
    monkeypatch.setattr(
        torchvision.datasets.cifar,
        "check_integrity",
        lambda path, md5=None: (compare if os.path.basename(path) == file else accept)(path, md5),
    )
    no_network(monkeypatch)
    write_cifar10(tmp_path)
    path = tmp_path / "cifar-10-batches-py" / file
    path.write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    with pytest.raises(UserError, match="^CIFAR10 is not there and can't be downloaded .*; put cifar-10-python.tar.gz"):
        load_data("cifar10", tmp_path)
    assert not (tmp_path / "ran").exists()


def test_an_archive_without_its_published_checksum_is_not_unpacked(tmp_path, monkeypatch):
    """Not even one that the user placed: torchvision would download it anew."""
    no_network(monkeypatch)
    for path in (tmp_path / "FashionMNIST" / "raw", tmp_path / "EMNIST" / "raw", tmp_path / "caltech101"):
        path.mkdir(parents=True)
    for name in ("cifar-10-python.tar.gz", "cifar-100-python.tar.gz"):
        with tarfile.open(tmp_path / name, "w:gz") as file:
            for member in ("../outside", f"{tmp_path}/outside", "inside"):
                file.addfile(tarfile.TarInfo(member))
    for name in ("EMNIST/raw/gzip.zip", "caltech101/caltech-101.zip"):
        with zipfile.ZipFile(tmp_path / name, "w") as file:
            file.writestr("inside", "x")
    (tmp_path / "FashionMNIST" / "raw" / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b"no images"))
    before = sorted(tmp_path.rglob("*"))
    for dataset, name, file in (
        ("cifar10", "CIFAR10", "cifar-10-python.tar.gz"),
        ("cifar100", "CIFAR100", "cifar-100-python.tar.gz"),
        ("emnist", "EMNIST", "gzip.zip"),
        ("caltech101", "Caltech101", "101_ObjectCategories/"),
        ("fashionmnist", "FashionMNIST", "its four .gz files"),
    ):
        expected = rf"^{name} is not there and can't be downloaded .*; put {file} from https:.* into {tmp_path}/.*$"
        with pytest.raises(UserError, match=expected):
            load_data(dataset, tmp_path)
        assert sorted(tmp_path.rglob("*")) == before


def test_caltech_split_is_by_class(tmp_path):
    write_folder(
        tmp_path / "caltech101",
        sizes=[(30, 20), (20, 25)],
        per_class=11,
        splits=["101_ObjectCategories"],
        classes=["ant", "bee", "BACKGROUND_Google"],
    )
    data = load_data("caltech101", tmp_path)
    classes = ["ant", "bee"]
    assert data.classes == classes and isinstance(data.train.source, Ragged)
    assert len(data.train) == 18 and data.test.labels.tolist() == [0, 0, 1, 1]
    streamed = load_data("caltech101", tmp_path, memory_limit=0)
    paths = streamed.train.source.paths + streamed.test.source.paths
    assert [path.split("ObjectCategories/")[1] for path in paths[18:]] == [
        f"{c}/{i:03}.png" for c in classes for i in (4, 9)
    ]
    assert len(set(paths)) == 22


def test_a_set_of_your_own_is_a_row_of_the_table(tmp_path, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 1, 5, 4), dtype=np.uint8)
    write_folder(tmp_path, splits=["photos"])
    photos = sorted(map(str, (tmp_path / "photos").rglob("*.png")))

    def read(root, part):
        assert root == tmp_path
        return {"train": (pixels[:part], [0, 1, 0, 1]), "test": (photos, [0] * 6 + [2] * 6)}, ["a", "b", "c"]

    monkeypatch.setitem(DATASETS, "own", dict(read=read, part=4))
    data = load_data("own", tmp_path)
    assert data.train.source.images.tolist() == pixels[:4].tolist() and data.train.labels.tolist() == [0, 1, 0, 1]
    assert data.test.labels.tolist() == [0] * 6 + [2] * 6 and data.classes == ["a", "b", "c"]
    assert torch.equal(data.test.source.images[7], pixels_of(photos[7]))
    monkeypatch.setitem(DATASETS, "own", dict(read=read, part=5))
    with pytest.raises(UserError, match=r"own in .*: 5 train images with labels \[0, 1\], 3 classes"):
        load_data("own", tmp_path)
    monkeypatch.setitem(DATASETS, "own", dict(read=lambda root: ({"test": (pixels[:2], [0, 3])}, ["a", "b", "c"])))
    with pytest.raises(UserError, match=r"own in .*: 2 test images with labels \[0, 3\], 3 classes"):
        load_data("own", tmp_path, train=False)
    for wrong in (pixels / 255, pixels.transpose(0, 2, 3, 1)):  # the first would be as good as black
        monkeypatch.setitem(DATASETS, "own", dict(read=lambda root, x=wrong: ({"test": (x, [0] * len(x))}, ["a", "b"])))
        with pytest.raises(UserError, match=r"images are torch.* not torch.uint8 \(n, 1 or 3, h, w\)"):
            load_data("own", tmp_path, train=False)
    turned = {"test": (pixels[::-1, :, ::-1], [0, 1] * 3)}
    monkeypatch.setitem(DATASETS, "own", dict(read=lambda root: (turned, range(2))))
    data = load_data("own", tmp_path, train=False)
    assert data.test.source.images.tolist() == pixels[::-1, :, ::-1].tolist() and data.classes == ["0", "1"]
    turned = {"test": ([Path(photos[0])], [0])}
    assert load_data("own", tmp_path, train=False).test.paths == photos[:1]


TWO = np.zeros((2, 1, 4, 4), np.uint8)


@pytest.mark.parametrize("split, images, labels, classes, said", [
    ("validation", TWO, [0, 1], "ab", "has a split validation; they are train, test and val"),
    ("test", TWO, [0, 1], "aa", "two classes have one name, of a, a"),
    ("test", TWO, ["a", "b"], "ab", "test labels (.*); they are numbers"),
    ("test", TWO, [0, 0.5], "ab", r"2 test images with labels \[0.0, 0.5\], 2 classes"),
    ("test", [Image.new("RGB", (4, 4))], [0], "ab", "test images (.*Image.*); they are paths of files, or one uint8"),
    ("test", np.array([None, 1]), [0, 1], "ab", "test images (.*); they are paths of files, or one uint8"),
])  # fmt: skip
def test_what_a_set_of_your_own_gives_is_checked(tmp_path, monkeypatch, split, images, labels, classes, said):
    monkeypatch.setitem(DATASETS, "own", dict(read=lambda root: ({split: (images, labels)}, [*classes])))
    with pytest.raises(UserError, match=f"own in {tmp_path}: {said}"):
        load_data("own", tmp_path, train=False)


# ---------------------------------------------------------------- image folders


def pixels_of(path) -> torch.Tensor:
    return torch.from_numpy(np.asarray(Image.open(path).convert("RGB")).copy()).permute(2, 0, 1)


@pytest.mark.parametrize("sizes, kind", [([(20, 20)], Uniform), ([(20, 30), (25, 16), (8, 8)], Ragged)])
def test_folder_in_memory(tmp_path, sizes, kind):
    write_folder(tmp_path, sizes)
    data = load_data("imagefolder", tmp_path)
    assert data.classes == ["cat", "dog"] and isinstance(data.train.source, kind)
    assert data.train.labels.tolist() == [0] * 6 + [1] * 6
    batch = data.train.source.take(torch.tensor([7, 2]))
    for image, name in zip(batch, ["dog/001.png", "cat/002.png"], strict=True):
        expected = pixels_of(tmp_path / "train" / name)
        h, w = expected.shape[1:]
        assert torch.equal(image[:, :h, :w], expected)
        assert not image[:, h:].any() and not image[:, :, w:].any()


def test_cache_is_used_and_rebuilt(tmp_path, monkeypatch):
    write_folder(tmp_path)
    first = load_data("imagefolder", tmp_path)
    monkeypatch.setattr(image_sources, "read_image", lambda *of: pytest.fail("decoded in spite of the cache"))
    again = load_data("imagefolder", tmp_path)
    assert torch.equal(first.train.source.images, again.train.source.images)
    monkeypatch.undo()
    Image.new("RGB", (20, 20), (1, 2, 3)).save(tmp_path / "train" / "cat" / "000.png")
    changed = load_data("imagefolder", tmp_path)
    assert changed.train.source.images[0, :, 0, 0].tolist() == [1, 2, 3]
    (tmp_path / "train.cache.npz").write_bytes(b"PK damaged")
    assert torch.equal(load_data("imagefolder", tmp_path).train.source.images, changed.train.source.images)


@pytest.mark.parametrize("aug", [dict(scale=(0.2, 1.0), flip=True), dict()])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_streaming_gives_the_images_of_memory(tmp_path, aug, num_workers):
    write_folder(tmp_path, [(20, 30), (25, 16), (40, 40)])
    augment = Augment(16, *HALF, interpolation="bicubic", **aug)
    batches = []
    for limit in (2.0, 0.0):
        data = load_data("imagefolder", tmp_path, memory_limit=limit)
        loop = train_batches(
            data.train,
            augment,
            seed=1,
            start=2,
            stop=4,
            batch_size=8,
            accumulation=2,
            device=CPU,
            num_workers=num_workers,
        )
        batches.append(list(loop))
    assert isinstance(data.train.source, Files) and len(batches[0]) == 4
    for (a, labels), (b, other) in zip(*batches, strict=True):
        assert torch.equal(labels, other)
        assert (a - b).abs().max() < 1e-4


@pytest.mark.parametrize("size", [(10, 10), (90, 90)])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_streamed_image_whose_size_changes_is_refused(tmp_path, size, num_workers):
    """Its box would not fit, or be its corner alone."""
    write_folder(tmp_path, [(20, 30), (25, 16)])
    data = load_data("imagefolder", tmp_path, memory_limit=0).test
    Image.new("RGB", size).save(tmp_path / "test" / "cat" / "001.png")
    batches = eval_batches(data, Augment(16, *HALF), batch_size=8, device=CPU, num_workers=num_workers)
    with pytest.raises(UserError, match="/cat/001.png: not of the size that it had before; bring it back as it was"):
        next(batches)


def test_large_streamed_images_are_reduced_first(tmp_path):
    """A smooth picture, so that the filters' difference stays small."""
    wave = np.sin(np.linspace(0, 9, 300))[:, None, None] * np.cos(np.linspace(0, 7, 200))[None, :, None]
    pixels = np.rint(127.5 + 120 * wave * [1, -1, 0.5]).astype(np.uint8)
    for folder in ("train/a", "train/b", "test/a"):
        (tmp_path / folder).mkdir(parents=True)
        for i in range(2):
            Image.fromarray(pixels).save(tmp_path / folder / f"{i}.png")
    augment = Augment(16, *HALF, scale=(0.8, 1.0))
    images = []
    for limit in (2.0, 0.0):
        data = load_data("imagefolder", tmp_path, memory_limit=limit).train
        images.append(next(train_batches(data, augment, seed=1, start=0, stop=1, batch_size=4, device=CPU))[0])
    difference = (images[0] - images[1]).abs()
    assert 0 < difference.max() < 4 / 127.5


def test_val_fraction():
    data = load_data("fashionmnist-mini", val_fraction=0.1)
    assert (len(data.train), len(data.valid), len(data.test)) == (9000, 1000, 2000) and data.selected_on == "val"
    assert sorted(data.train.ids.tolist() + data.valid.ids.tolist()) == list(range(10_000))
