"""Data sets: splits of images with labels, image folders, and the named sets.

`load_data(name)` gives a data set ready for training. A set of your own is a row of `utils.presets.DATASETS`, whose
`read` is a function of the data folder that returns

- a dict of splits, 'train', 'test' and perhaps 'val': a pair of images and labels each. Images are a uint8 tensor
  (n, 1 or 3, h, w), or paths of image files, which are decoded into memory or, where they are too many, streamed;
- the names of the classes, which the labels count from 0.
"""

import gzip
import hashlib
import os
import pkgutil
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from os.path import realpath
from pathlib import Path

import numpy as np
import torch
import torchvision

from utils import seeds
from utils.augment import short_side
from utils.cli import refuse, refusing
from utils.device import memory_limit as memory_limit_of
from utils.image_folder import check_known, class_folders, hold_out, nfc, refuse_broken
from utils.image_sources import Files, Ragged, Uniform, load_files
from utils.presets import DATASETS

MINI = Path(__file__).resolve().parent.parent / "data" / "fashionmnist-mini"


@dataclass
class ImageSet:
    """A split of a data set, or a part of one."""

    source: Uniform | Ragged | Files  # where the images are
    ids: torch.Tensor  # (n,) positions in the source
    labels: torch.Tensor  # (n,) int64
    paths: list[str] | None = None  # of all images of the source, where they are files

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def sizes(self) -> torch.Tensor:
        """(n, 2) heights and widths."""
        return self.source.sizes[self.ids]

    def part(self, index: torch.Tensor) -> "ImageSet":
        return replace(self, ids=self.ids[index], labels=self.labels[index])

    def hold_out(self, fraction: float, seed: int, root: Path) -> tuple["ImageSet", "ImageSet"]:
        """Two parts, of which the second has this fraction: of files, of each class, by `image_folder.hold_out`."""
        if self.paths:
            names = [nfc(os.path.relpath(self.paths[i], root)) for i in self.ids.tolist()]
            sides = hold_out(names, self.labels.tolist(), fraction, seed)
            stays, held = (torch.tensor(side, dtype=torch.int64) for side in sides)
        else:
            order = torch.randperm(len(self), generator=seeds.generator(seed, seeds.HOLD_OUT))
            n = max(1, min(round(fraction * len(self)), len(self) - 1))
            stays, held = order[n:].sort().values, order[:n].sort().values
        return self.part(stays), self.part(held)

    def fingerprint(self, root: Path, classes: list[str]) -> dict[str, list]:
        """Of each class the number of images, and for files a digest of their names and sizes in bytes."""
        count = self.labels.bincount(minlength=len(classes)).tolist()
        digests = {name: hashlib.sha256() for name in classes}
        for i, label in zip(self.ids.tolist(), self.labels.tolist(), strict=True) if self.paths else ():
            path = self.paths[i]
            size = os.path.getsize(path) if os.path.exists(path) else None
            digests[classes[label]].update(os.fsencode(f"{nfc(os.path.relpath(path, root))}\0{size}\n"))
        return {name: [n, digests[name].hexdigest()[:16]] for name, n in zip(classes, count, strict=True)}


def copies(training: ImageSet, held: ImageSet) -> list[str]:
    """A line for the log where files that are held out are in training, too, under other names; of those in memory."""

    def pixels(part: ImageSet) -> list[int]:
        images = (part.source.take(each).numpy() for each in part.ids.split(1))
        return [hash((image.shape, image.tobytes())) for image in images]

    if not held.paths or isinstance(held.source, Files):
        return []
    known = dict(zip(pixels(training), training.ids.tolist(), strict=True))
    pairs = [(i, known[key]) for i, key in zip(held.ids.tolist(), pixels(held), strict=True) if key in known]
    as_this = " of ".join(held.paths[i] for i in pairs[0]) if pairs else ""
    what = f"{len(pairs)} of {len(held)} images that are held out are copies of training images, as {as_this}"
    return [f"{what}, which makes scores too good"] * bool(pairs)


@dataclass
class Data:
    """A data set ready for training."""

    train: ImageSet | None  # None where only evaluation was asked for, or a checkpoint's data has no train/
    valid: ImageSet  # what 'best' is chosen by, during training
    test: ImageSet  # what is reported; the same object as `valid` unless images were held out
    classes: list[str]  # names in the order of the labels
    selected_on: str  # 'val' or 'test'
    notes: list[str] = field(default_factory=list)  # lines for the log
    files: dict[str, dict] = field(default_factory=dict)  # `ImageSet.fingerprint` of train, val and test
    drawn: float | None = None  # share of the images that the seed drew for `test`; None where these are given

    def to(self, device: torch.device) -> "Data":
        """Move the images that are in memory to the device, once."""
        for part in filter(None, (self.train, self.valid, self.test)):  # a source that is there stays
            part.source.to(device)
        return self


def cifar(root: Path, cls: str, **fetch) -> tuple[dict, list[str]]:
    """CIFAR-10 or -100 by torchvision's class, which compares the files' MD5 sums."""
    cls, splits = getattr(torchvision.datasets, cls), {}
    for split in ("train", "test"):
        part = _download(cls, root, train=split == "train", **fetch)
        splits[split] = torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), part.targets
    return splits, part.classes


def fashionmnist(root: Path, **fetch) -> tuple[dict, list[str]]:
    cls = torchvision.datasets.FashionMNIST
    return _idx_set(root / fetch["folder"], ("train", "t10k"), lambda: _download(cls, root, **fetch)), cls.classes


def fashionmnist_mini(root: Path) -> tuple[dict, list[str]]:
    """The first 10,000 + 2,000 images of Fashion-MNIST, which are in the repository."""
    return _idx_set(MINI, ("train", "t10k"), lambda: None), torchvision.datasets.FashionMNIST.classes


def emnist(root: Path, split: str, **fetch) -> tuple[dict, list[str]]:
    """EMNIST as people see it: NIST's files, and torchvision, have rows and columns exchanged."""
    cls = torchvision.datasets.EMNIST
    prefixes = (f"emnist-{split}-train", f"emnist-{split}-test")
    splits = _idx_set(root / fetch["folder"], prefixes, lambda: _download(cls, root, split=split, **fetch))
    first = int(split == "letters")  # the label that its first class has
    splits = {name: (images.mT.contiguous(), labels - first) for name, (images, labels) in splits.items()}
    return splits, cls.classes_split_dict[split][first:]


def caltech101(root: Path, folder: str, **fetch) -> tuple[dict, list[str]]:
    """Caltech-101 without its background class; of each class every fifth image is for testing, as it has no split."""
    images = root / folder / "101_ObjectCategories"
    if not images.is_dir():
        _download(torchvision.datasets.Caltech101, root, folder=folder, **fetch)
    found, _ = class_folders(images, leave_out=["BACKGROUND_Google"])
    splits = {"train": ([], []), "test": ([], [])}
    for label, files in enumerate(found.values()):
        for place, path in enumerate(files):
            paths, labels = splits["test" if place % 5 == 4 else "train"]
            paths.append(path)
            labels.append(label)
    return splits, list(found)


def _read_idx(path: Path) -> torch.Tensor:
    """An IDX file of bytes, also gzipped (yann.lecun.com's MNIST format): labels (n,), or images (n, 28, 28)."""
    with refusing(f"{path}: no IDX file, or damaged", "get it again"):
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            data = bytearray(file.read())
        ndim = data[3]
        if data[:3] != b"\0\0\x08" or ndim > 3:
            raise ValueError("its first bytes are others")
        shape = np.frombuffer(data, ">i4", ndim, offset=4).tolist()
        return torch.frombuffer(data, dtype=torch.uint8, offset=4 + 4 * ndim).view(shape)


def _idx_set(folder: Path, prefixes: tuple[str, str], fetch: Callable[[], None]) -> dict:
    """Splits from PREFIX-images-idx3-ubyte[.gz] and PREFIX-labels-idx1-ubyte[.gz]; `fetch()` brings missing ones."""

    def files() -> list[Path]:
        paths = [folder / f"{prefix}-{kind}-ubyte" for prefix in prefixes for kind in ("images-idx3", "labels-idx1")]
        return [path if path.is_file() else path.with_suffix(".gz") for path in paths]

    if not all(path.is_file() for path in files()):
        fetch()
    images, labels, test_images, test_labels = map(_read_idx, files())
    return {"train": (images[:, None], labels), "test": (test_images[:, None], test_labels)}


def _download(cls: type, root: Path, file: str, folder: str, url: str, **words):
    """A data set of torchvision's, which downloads or unpacks what isn't there, with its checksums and its bar.

    Without network, a user puts `file` from `url` into `folder`.
    """
    way_out = f"put {file} from {url} into {root / folder}/"
    with refusing(f"{cls.__name__} is not there and can't be downloaded", way_out):
        root.mkdir(parents=True, exist_ok=True)
        return cls(str(root), download=True, **words)


def load_data(
    dataset: str, data_dir: str | os.PathLike = "data", *, train: bool = True, classes: list[str] | None = None,
    val_fraction: float = 0.0, test_fraction: float | None = None, seed: int = 42, emnist_split: str = "mnist",
    labels: str | None = None, memory_limit: float | None = None, short_side: int | None = None,
    cache_dirs: Sequence[str | os.PathLike | None] = (None,), skip_broken: bool = False,
) -> Data:  # fmt: skip
    """Load a data set by its name, a key of `utils.presets.DATASETS`.

    Args:
        data_dir: where it is looked for and downloaded to; for imagefolder see `utils.image_folder`.
        train: False leaves the training images out.
        classes: of a checkpoint, which the labels are to count in; those of the images must be among them. Where there
            are images to test or validate on, a run's fractions then hold out no others.
        val_fraction: part of the training images to hold out as `valid`, drawn from `seed`; of image files, of each
            class.
        test_fraction: the same for `test`, of image files without a test folder; None: 0.2 where there is no folder
            val/ either.
        labels: of imagefolder, a CSV that names each file's class.
        memory_limit: GiB; a split of image files that takes more as uint8 is streamed. None: a quarter of what is free.
        short_side: pixels that the shorter side of image files is kept at, where it is longer.
        cache_dirs: folders for the cache of image files, the first one that can be written; None: beside the data.
        skip_broken: leave out images that can't be read, rather than refuse them.

    UserError: missing or broken data, with the file and the way out.
    """
    refuse(dataset not in DATASETS, f"no data set {dataset!r}, there are {' '.join(DATASETS)}")
    root = Path(data_dir)
    splits, found, notes = _read(dataset, root, split=emnist_split, labels=labels)
    if train and classes is None:  # of a run; another one may score data that is split already
        refuse("train" not in splits, f"{root}: has no train/; put CLASS folders into one, beside {', '.join(splits)}/")
        refuse(test_fraction and "test" in splits, f"--test_fraction {test_fraction}: {root} has test images already")
        if val_fraction and splits.keys() >= {"val", "test"}:
            notes.append(f"There are validation images, so --val_fraction {val_fraction} holds out no others")
    if splits.keys() == {"train"}:
        test_fraction = test_fraction or 0.2
        way = "--test_fraction of train.py; images in test/ would all be"
        notes.append(f"No test images, so {test_fraction} of each class are for testing ({way})")
    if not train and (not test_fraction or "test" in splits):
        splits = {name: splits[name] for name in ["test" if "test" in splits else "val"]}
    if classes is None:
        refuse(len(found) == 1, f"{root}: only one class, {found[0]}; there must be two")
    else:
        classes = [nfc(name) for name in classes]
        splits, found = _relabelled(splits, found, classes, f"{dataset} in {root}"), classes

    limit = memory_limit_of(torch.device("cpu")) if memory_limit is None else memory_limit
    places = {name: [_cache_path(folder, root, dataset, name) for folder in cache_dirs] for name in splits}
    sets, broken, lines = _image_sets(splits, root, places, int(limit * 2**30), short_side)
    notes += lines + refuse_broken(broken, skip_broken)
    empty = " and ".join(name for name, part in sets.items() if not len(part))
    refuse(empty, f"{root}: none of the {empty} images can be read")

    training, valid, test = (sets.get(name) for name in ("train", "val", "test"))
    drawn = test_fraction if training is not None and test is None else None
    if drawn:
        training, test = training.hold_out(test_fraction, seed, root)
        refuse(not len(test), f"{root}: too few images a class to test on {test_fraction} of them; put some into test/")
        notes += copies(training, test)
    if test is None:
        test, valid = valid, None
    if training is not None and val_fraction and valid is None:
        training, valid = training.hold_out(val_fraction, seed, root)
        refuse(not len(valid), f"--val_fraction {val_fraction} holds out no image; each class has too few")
        notes += copies(training, valid)
    parts = {"train": training, "val": valid, "test": test}
    files = {name: part.fingerprint(root, found) for name, part in parts.items() if part}
    notes.insert(0, describe_classes(files, found))
    selected_on = "val" if valid else "test"
    return Data(training if train else None, valid or test, test, found, selected_on, notes, files, drawn)


def _read(dataset: str, root: Path, **flags) -> tuple[dict, list[str], list[str]]:
    """What the data set's `read` gives, whose labels are checked: splits, names of classes, and lines for the log."""
    words = dict(DATASETS[dataset])
    read = words.pop("read")
    words |= {name: value for name, value in flags.items() if name in words}
    splits, found, *notes = (pkgutil.resolve_name(read) if isinstance(read, str) else read)(root, **words)
    what, found = f"{dataset} in {root}", [*map(str, found)]
    others = ", ".join(splits.keys() - {"train", "val", "test"})
    refuse(others, f"{what}: has a split {others}; they are train, test and val")
    refuse(len({*found}) < len(found), f"{what}: two classes have one name, of {', '.join(found[:20])}")
    for name, (images, labels) in splits.items():
        with refusing(f"{what}: {name} labels", "they are numbers that count the classes from 0"):
            labels = torch.as_tensor(np.ascontiguousarray(labels))
        few = labels.unique().tolist()  # none in a split that is to be left out
        with refusing(f"{what}: {name} images", "they are paths of files, or one uint8 tensor (n, 1 or 3, h, w)"):
            if isinstance(images, np.ndarray) and images.dtype.kind not in "OU":
                images = torch.as_tensor(np.ascontiguousarray(images))
            images = images if torch.is_tensor(images) else [*map(os.fspath, images)]
        wrong = labels.shape != (len(images),) or not {*few} <= {*range(len(found))}
        refuse(wrong, f"{what}: {len(images)} {name} images with labels {few[:20]}, {len(found)} classes")
        if torch.is_tensor(images):
            fine = images.dtype == torch.uint8 and images.ndim == 4 and images.shape[1] in (1, 3)
            kind = f"{images.dtype} {tuple(images.shape)}, not torch.uint8 (n, 1 or 3, h, w)"
            refuse(not fine, f"{what}: {name} images are {kind}")
        splits[name] = images, labels.long()
    return splits, found, notes[0] if notes else []


def _relabelled(splits: dict, found: list[str], classes: list[str], what: str) -> dict:
    """Splits whose labels count in `found`, counting in `classes`. UserError: images of a class that's not in these."""
    used = [found[i] for i in torch.cat([labels for _, labels in splits.values()]).unique().tolist()]
    check_known(what, used, classes)
    place = torch.tensor([classes.index(name) if name in classes else -1 for name in found])
    return {name: (images, place[labels]) for name, (images, labels) in splits.items()}


def _image_sets(
    splits: dict, root: Path, places: dict[str, list[Path]], memory_limit: int, short_side: int | None
) -> tuple[dict[str, ImageSet], dict[str, str], list[str]]:
    """The splits; why those of their files that can't be read, which are left out, can't; and lines for the log."""
    sets, broken, notes = {}, {}, []
    for name, (images, labels) in splits.items():
        if isinstance(images, torch.Tensor):
            sets[name] = ImageSet(Uniform(images), torch.arange(len(labels)), labels)
            continue
        source, reasons, line = load_files(images, root, places[name], memory_limit, short_side)
        ids = torch.tensor([i for i in range(len(images)) if i not in reasons], dtype=torch.int64)
        sets[name] = ImageSet(source, ids, labels[ids], list(images))
        broken |= {images[i]: reason for i, reason in reasons.items()}
        notes.append(f"Images, {name}: {line}")
    return sets, broken, notes


def data_words(args: Namespace) -> dict:
    """What the flags of a run say of its images, for `load_data`; those of an older run lack some."""
    names = "val_fraction test_fraction seed emnist_split labels memory_limit skip_broken".split()
    words = {name: getattr(args, name) for name in names if hasattr(args, name)}
    places = [args.cache_dir] if getattr(args, "cache_dir", None) else [None, args.output_dir]
    return words | dict(short_side=short_side(args), cache_dirs=[] if getattr(args, "no_cache", None) else places)


def check_apart(path: str | os.PathLike, own: dict, args: Namespace, data: Data) -> None:
    """Refuse to test on images that weights were trained on, where a folder's are drawn; a note where it has changed.

    `own` has `args` and `files` of the run that the weights come from, as its checkpoint has them; the note is added to
    those of the data.
    """
    its, files = own.get("args") or {}, own.get("files") or data.files
    if data.drawn and its.get("dataset") == args.dataset and realpath(its["data_dir"]) == realpath(args.data_dir):
        flags = f"--seed {its['seed']} --test_fraction {its.get('test_fraction') or 0.2}"
        what = f"{path}: trained on some of the images of {args.data_dir} that are drawn for testing now"
        way_out = f"keep to its {flags}, or put images into test/"
        refuse(flags != f"--seed {args.seed} --test_fraction {data.drawn}", f"{what}; {way_out}")
        others = ", ".join(name for name, now in data.files["test"].items() if now != files["test"].get(name))
        data.notes += [f"{path}: perhaps trained on some of the test images; changed since: {others}"] * bool(others)


def describe_classes(files: dict[str, dict], classes: list[str]) -> str:
    """Images of each class in each split, for the log; of many classes the largest and the smallest."""
    counts = {name: [split[name][0] for split in files.values()] for name in classes}
    order = sorted(classes, key=lambda name: -sum(counts[name]))
    shown = [f"{name} {'/'.join(map(str, counts[name]))}" for name in order]
    if len(shown) > 20:
        shown = [*shown[:5], "...", *shown[-5:]]
    return f"Images a class, {'/'.join(files)}: {', '.join(shown)}"


def _cache_path(folder: str | os.PathLike | None, root: Path, dataset: str, split: str) -> Path:
    """In the data's own folder, or in one that may hold the caches of several."""
    if folder is None:
        return root / DATASETS[dataset].get("folder", "") / f"{split}.cache.npz"
    place = root.resolve()
    return Path(folder) / f"{place.name}-{hashlib.sha256(os.fsencode(place)).hexdigest()[:8]}.{split}.cache.npz"
