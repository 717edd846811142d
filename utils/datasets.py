"""Data sets: images and labels in memory or on disk, image folders, and the named sets.

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
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from torchvision.datasets.folder import find_classes, make_dataset
from torchvision.transforms.functional import pil_to_tensor
from tqdm.contrib.concurrent import thread_map

from utils import seeds
from utils.cli import UserError, refuse, refusing
from utils.device import memory_limit as memory_limit_of
from utils.presets import DATASETS

warnings.filterwarnings("ignore", module=r"PIL\.")  # an image is read or refused
MINI = Path(__file__).resolve().parent.parent / "data" / "fashionmnist-mini"
IMAGE_SUFFIXES = frozenset(".png .jpg .jpeg .bmp .gif .ppm .pgm .tif .tiff .webp".split())


class Uniform:
    """Images of one size in memory: (n, c, h, w) uint8."""

    def __init__(self, images: torch.Tensor):
        self.images = images
        self.sizes = torch.tensor(images.shape[-2:]).expand(len(images), 2)

    def to(self, device: torch.device):
        self.images = self.images.to(device)

    def take(self, ids: torch.Tensor) -> torch.Tensor:
        return self.images[ids.to(self.images.device, non_blocking=True)]


class Ragged:
    """Images of many sizes in memory, end to end in one uint8 line; a batch is padded to its largest image."""

    def __init__(self, pixels: torch.Tensor, sizes: torch.Tensor):
        self.pixels, self.sizes = pixels, sizes
        self.ends = (3 * sizes[:, 0] * sizes[:, 1]).cumsum(0).tolist()

    def to(self, device: torch.device):
        self.pixels = self.pixels.to(device)

    def take(self, ids: torch.Tensor) -> torch.Tensor:
        sizes = self.sizes[ids].tolist()
        height, width = (max(sides) for sides in zip(*sizes, strict=True))
        batch = self.pixels.new_zeros(len(ids), 3, height, width)
        for image, i, (h, w) in zip(batch, ids.tolist(), sizes, strict=True):
            image[:, :h, :w] = self.pixels[self.ends[i] - 3 * h * w : self.ends[i]].view(3, h, w)
        return batch


class Files:
    """Images on disk; worker processes decode, cut and resize them."""

    def __init__(self, paths: list[str], sizes: torch.Tensor):
        self.paths, self.sizes = paths, sizes

    def to(self, device: torch.device):
        pass


@dataclass
class ImageSet:
    """A split of a data set, or a part of one."""

    source: Uniform | Ragged | Files  # where the images are
    ids: torch.Tensor  # (n,) positions in the source
    labels: torch.Tensor  # (n,) int64

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def sizes(self) -> torch.Tensor:
        """(n, 2) heights and widths."""
        return self.source.sizes[self.ids]

    def part(self, index: torch.Tensor) -> "ImageSet":
        return replace(self, ids=self.ids[index], labels=self.labels[index])


@dataclass
class Data:
    """A data set ready for training."""

    train: ImageSet | None  # None where only evaluation was asked for
    valid: ImageSet  # what 'best' is chosen by, during training
    test: ImageSet  # what is reported; the same object as `valid` unless images were held out
    classes: list[str]  # names in the order of the labels
    selected_on: str  # 'val' or 'test'

    def to(self, device: torch.device) -> "Data":
        """Move the images that are in memory to the device, once."""
        for source in {id(part.source): part.source for part in (self.train, self.valid, self.test) if part}.values():
            source.to(device)
        return self


def read_image(path: str | os.PathLike) -> Image.Image:
    """Read the first frame of an image as RGB.

    As in torchvision's ImageFolder, transparency is dropped and EXIF's orientation ignored. 16-bit gray is scaled to 8
    bits. UserError if it is no image, truncated, too large for Pillow, or of floating-point pixels, which have no
    agreed range.
    """
    with refusing(f"{path}: not a readable image", "mend or remove it"), Image.open(path) as image:
        if image.mode == "F":
            raise ValueError("floating-point pixels; convert them to 8 or 16 bits")
        if image.mode.startswith("I"):  # 16-bit gray; Pillow's convert would cut it at 255
            image = Image.fromarray((np.asarray(image, dtype=np.float64) / 257).clip(0, 255).round().astype(np.uint8))
        return image.convert("RGB")


def _size(path: str) -> tuple[int, int]:
    with refusing(f"{path}: not a readable image", "mend or remove it"), Image.open(path) as image:
        return image.height, image.width


def _map_with_bar(function: Callable, items: Sequence, text: str) -> list:
    show = dict(desc=text, unit=" images", disable=not sys.stderr.isatty(), leave=False)
    return thread_map(function, items, max_workers=min(8, os.cpu_count() or 1), **show)


def _fingerprint(paths: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with refusing(f"{path}: cannot be read", "mend or remove it", OSError):
            info = os.stat(path)
        digest.update(os.fsencode(f"{path}\0{info.st_size}\0{info.st_mtime_ns}\n"))
    return digest.hexdigest()


def _cached(path: Path, fingerprint: str, name: str) -> torch.Tensor | None:
    try:
        with np.load(path, allow_pickle=False) as file:
            return torch.from_numpy(file[name]) if str(file["fingerprint"]) == fingerprint else None
    except Exception:  # missing, or damaged in any way: it is made again
        return None


def _write_cache(path: Path, **arrays) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)
        os.replace(temporary, path)
    except OSError as error:
        print(f"no cache beside the data, the images will be decoded again next time: {error}", file=sys.stderr)
        temporary.unlink(missing_ok=True)


def load_files(paths: Sequence[str], cache: Path, memory_limit: int) -> Uniform | Ragged | Files:
    """Decode images once into memory, or leave them on disk if that takes more than `memory_limit` bytes.

    `cache` is an `.npz` file that holds sizes and pixels, made again when a file changes. UserError at a broken image.
    """
    fingerprint = _fingerprint(paths)
    known = _cached(cache, fingerprint, "sizes")
    sizes = torch.tensor(_map_with_bar(_size, paths, "reading sizes")) if known is None else known.long()
    kept = dict(fingerprint=fingerprint, sizes=sizes.numpy().astype(np.int32))
    ends = (3 * sizes.prod(dim=1)).cumsum(0).tolist()
    if ends[-1] > memory_limit:
        if known is None:
            _write_cache(cache, **kept)
        return Files(paths, sizes)
    pixels = _cached(cache, fingerprint, "pixels")
    if pixels is None:
        pixels = torch.empty(ends[-1], dtype=torch.uint8)

        def decode(i: int) -> None:
            image = pil_to_tensor(read_image(paths[i])).flatten()
            pixels[ends[i] - len(image) : ends[i]] = image

        _map_with_bar(decode, range(len(paths)), "decoding")
        _write_cache(cache, **kept, pixels=pixels.numpy())
    if (sizes == sizes[0]).all():
        return Uniform(pixels.view(len(sizes), 3, *sizes[0].tolist()))
    return Ragged(pixels, sizes)


def image_folder(root: Path) -> tuple[dict, list[str]]:
    """ROOT/SPLIT/CLASS/**/*.png and so on; classes are those of train/, where it exists, and sorted."""
    refuse(not root.is_dir(), f"--data_dir {root}: no such folder; it holds train/CLASS/*.png and test/CLASS/*.png")
    splits, classes = {}, []
    for split in ("train", "val", "test"):
        if (root / split).is_dir():
            found = _class_folders(root / split)
            classes = classes or found
            _check_known(root / split, found, classes)
            splits[split] = _list_images(root / split, found, classes)
    return splits, classes


def _class_folders(folder: Path) -> list[str]:
    try:
        names = [name for name in find_classes(folder)[0] if not name.startswith(".")]
    except FileNotFoundError:
        names = []
    refuse(not names, f"{folder}: no class folders in it; images belong into {folder}/CLASS/")
    odd = "".join(name for name in names if not name.isprintable())
    refuse(odd, f"{folder / odd}: the name of a class must be printable text; rename the folder")
    return names


def _check_known(folder: Path | str, found: list[str], classes: list[str]) -> None:
    other = [name for name in found if name not in classes]
    known = f"the {len(classes)} known: {', '.join(classes[:10])}"
    refuse(other, f"{folder}: class {''.join(other[:1])!r} is not among {known}")


def _list_images(folder: Path, found: list[str], classes: list[str]) -> tuple[list[str], torch.Tensor]:
    """Paths and labels, counted in `classes`, of folder/CLASS/**/*.png and so on."""

    def is_image(path: str) -> bool:
        return Path(path).suffix.lower() in IMAGE_SUFFIXES and not os.path.basename(path).startswith(".")

    with refusing(f"{folder}: not every class has images", "add some, or remove the empty folders", FileNotFoundError):
        places = {name: classes.index(name) for name in found}
        paths, labels = zip(*make_dataset(folder, places, is_valid_file=is_image), strict=True)
    return list(paths), torch.tensor(labels)


def cifar(root: Path, cls: str, **fetch) -> tuple[dict, list[str]]:
    """CIFAR-10 or -100 by torchvision's class, which compares the files' MD5 sums."""
    cls, splits = getattr(torchvision.datasets, cls), {}
    for split in ("train", "test"):
        try:
            part = cls(str(root), train=split == "train")
        except Exception:  # missing, damaged or of other sums
            _download(cls, root, **fetch)
            part = cls(str(root), train=split == "train")
        splits[split] = torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets)
    return splits, part.classes


def fashionmnist(root: Path, **fetch) -> tuple[dict, list[str]]:
    cls = torchvision.datasets.FashionMNIST
    return _idx_set(root / fetch["folder"], ("train", "t10k"), lambda: _download(cls, root, **fetch)), cls.classes


def fashionmnist_mini(root: Path) -> tuple[dict, list[str]]:
    """The first 10,000 + 2,000 images of Fashion-MNIST, which are in the repository."""
    return _idx_set(MINI, ("train", "t10k"), lambda: None), torchvision.datasets.FashionMNIST.classes


def emnist(root: Path, split: str, **fetch) -> tuple[dict, list[str]]:
    cls = torchvision.datasets.EMNIST
    prefixes = (f"emnist-{split}-train", f"emnist-{split}-test")
    splits = _idx_set(root / fetch["folder"], prefixes, lambda: _download(cls, root, split=split, **fetch))
    classes = list(cls.classes_split_dict[split])
    if split == "letters":  # its labels begin at 1
        return {name: (images, labels - 1) for name, (images, labels) in splits.items()}, classes[1:]
    return splits, classes


def caltech101(root: Path, folder: str, **fetch) -> tuple[dict, list[str]]:
    """Caltech-101 without its background class; of each class every fifth image is for testing, as it has no split."""
    images = root / folder / "101_ObjectCategories"
    if not images.is_dir():
        _download(torchvision.datasets.Caltech101, root, folder=folder, **fetch)
    classes = [name for name in _class_folders(images) if name != "BACKGROUND_Google"]
    paths, labels = _list_images(images, classes, classes)
    place = torch.arange(len(labels)) - torch.searchsorted(labels, labels)  # within its class
    index = {"train": (place % 5 != 4).nonzero()[:, 0], "test": (place % 5 == 4).nonzero()[:, 0]}
    return {split: ([paths[i] for i in part.tolist()], labels[part]) for split, part in index.items()}, classes


def _read_idx(path: Path) -> torch.Tensor:
    """An IDX file of bytes, also gzipped (yann.lecun.com's MNIST format): labels (n,), or images (n, 28, 28)."""
    with refusing(f"{path}: no IDX file, or damaged", "remove it to download it again"):
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            data = bytearray(file.read())
        ndim = [b"\0\0\x08\0", b"\0\0\x08\1", b"\0\0\x08\2", b"\0\0\x08\3"].index(bytes(data[:4]))
        shape = np.frombuffer(data, ">i4", ndim, offset=4).tolist()
        return torch.frombuffer(data, dtype=torch.uint8, offset=4 + 4 * ndim).view(shape)


def _idx_set(folder: Path, prefixes: tuple[str, str], fetch: Callable[[], None]) -> dict:
    """Splits from PREFIX-images-idx3-ubyte[.gz] and PREFIX-labels-idx1-ubyte[.gz]; `fetch()` brings missing ones."""

    def find() -> list[Path]:
        names = [f"{prefix}-{kind}-ubyte" for prefix in prefixes for kind in ("images-idx3", "labels-idx1")]
        paths = [[folder / name, folder / f"{name}.gz"] for name in names]
        return [next(path for path in pair if path.is_file()) for pair in paths if any(map(Path.is_file, pair))]

    if len(find()) < 4:
        fetch()
    if len(found := find()) < 4:  # torchvision may find other files of the set, and leave it at that
        raise UserError(f"{folder}: files are missing; get them again")
    arrays = [_read_idx(path) for path in found]
    mixed_up = [array.ndim for array in arrays] != [3, 1, 3, 1]
    refuse(mixed_up, f"{folder}: images and labels are mixed up; get them again")
    return {"train": (arrays[0][:, None], arrays[1]), "test": (arrays[2][:, None], arrays[3])}


def _download(cls: type, root: Path, file: str, folder: str, url: str, **words) -> None:
    """Let torchvision download (or unpack) a data set, with its checksums and its bar.

    Without network, a user puts `file` from `url` into `folder`.
    """
    way_out = f"put {file} from {url} into {root / folder}/"
    with refusing(f"{cls.__name__} is not there and can't be downloaded", way_out):
        root.mkdir(parents=True, exist_ok=True)
        cls(str(root), download=True, **words)


def load_data(
    dataset: str, data_dir: str | os.PathLike = "data", *, train: bool = True, classes: list[str] | None = None,
    val_fraction: float = 0.0, seed: int = 42, emnist_split: str = "mnist", memory_limit: float | None = None,
) -> Data:  # fmt: skip
    """Load a data set by its name, a key of `utils.presets.DATASETS`.

    Args:
        data_dir: where it is looked for and downloaded to; for imagefolder the folder that holds train/ and test/.
        train: False leaves the training images out.
        classes: of a checkpoint, which the labels are to count in; those of the images must be among them.
        val_fraction: part of the training images to hold out as `valid`, drawn from `seed`.
        memory_limit: GiB; a split of image files that takes more as uint8 is streamed. None: a quarter of what is free.

    UserError: missing or broken data, with the file and the way out.
    """
    refuse(dataset not in DATASETS, f"no data set {dataset!r}, there are {' '.join(DATASETS)}")
    root, words = Path(data_dir), dict(DATASETS[dataset])
    read = words.pop("read")
    if "split" in words:
        words["split"] = emnist_split
    splits, found = (pkgutil.resolve_name(read) if isinstance(read, str) else read)(root, **words)
    splits = {name: (images, torch.as_tensor(labels).long()) for name, (images, labels) in splits.items()}
    for wanted in (["train"] if train else []), ["val", "test"]:
        if wanted and not splits.keys() & set(wanted):
            there = ", ".join(sorted(path.name for path in root.iterdir() if path.is_dir())) or "no folders"
            raise UserError(f"--data_dir {root}: has no {' or '.join(f'{name}/' for name in wanted)}; it holds {there}")
    if not train:
        splits = {"test": splits.get("test", splits.get("val"))}
    for name, (images, labels) in splits.items():
        n, few = len(images), labels.unique().tolist()
        wrong = n != len(labels) or few[0] < 0 or few[-1] >= len(found)
        refuse(wrong, f"{dataset} in {root}: {n} {name} images with labels {few[:20]}, {len(found)} classes")
    refuse(classes is None and len(found) == 1, f"{root}: only one class, {found[0]}; there must be two to tell apart")
    if classes is not None and found != classes:
        used = [found[i] for i in torch.cat([labels for _, labels in splits.values()]).unique().tolist()]
        _check_known(f"{dataset} in {root}", used, classes)
        place = torch.tensor([classes.index(name) if name in classes else -1 for name in found])
        splits, found = {name: (images, place[labels]) for name, (images, labels) in splits.items()}, classes

    limit = memory_limit_of(torch.device("cpu")) if memory_limit is None else memory_limit
    sets = {}
    for name, (images, labels) in splits.items():
        in_memory = isinstance(images, (torch.Tensor, np.ndarray))
        cache = root / words.get("folder", "") / f"{name}.cache.npz"
        source = Uniform(torch.as_tensor(images)) if in_memory else load_files(images, cache, int(limit * 2**30))
        sets[name] = ImageSet(source, torch.arange(len(labels)), labels)
    training, valid, test = (sets.get(name) for name in ("train", "val", "test"))
    if test is None:
        test, valid = valid, None
    if training is not None and val_fraction:
        order = torch.randperm(len(training), generator=seeds.generator(seed, seeds.HOLD_OUT))
        held = max(1, round(val_fraction * len(training)))
        valid, training = training.part(order[:held].sort().values), training.part(order[held:].sort().values)
        refuse(not len(training), f"--val_fraction {val_fraction} leaves no training images")
    return Data(training, valid or test, test, found, "val" if valid else "test")
