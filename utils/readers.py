"""What lies on disk, as images and labels: image files and folders, IDX, CIFAR's pickles, torchvision's downloads."""

import contextlib
import gzip
import hashlib
import io
import math
import os
import pickle
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from utils.cli import UserError

warnings.filterwarnings("ignore", module=r"PIL\.")  # an image is read or refused; _open does it where Pillow would warn
MAX_PIXELS = Image.MAX_IMAGE_PIXELS  # 89 million
MAX_IDX = 2**32  # bytes of an IDX file; the largest of EMNIST has 0.55e9
MINI = Path(__file__).resolve().parent.parent / "data" / "fashionmnist-mini"
IMAGE_SUFFIXES = frozenset(".png .jpg .jpeg .bmp .gif .ppm .pgm .tif .tiff .webp".split())
FASHION_CLASSES = torchvision.datasets.FashionMNIST.classes


# ---------------------------------------------------------------- where images are


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
    """A split of a data set, or a part of one.

    Attributes:
        source: where the images are.
        ids: (n,) positions in the source.
        labels: (n,) int64.
    """

    source: Uniform | Ragged | Files
    ids: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def sizes(self) -> torch.Tensor:
        """(n, 2) heights and widths."""
        return self.source.sizes[self.ids]

    def part(self, index: torch.Tensor) -> "ImageSet":
        return replace(self, ids=self.ids[index], labels=self.labels[index])


# ---------------------------------------------------------------- image files


@contextlib.contextmanager
def _open(path: str | os.PathLike):
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS}")
            yield image
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:  # a damaged file can raise nearly anything in Pillow
        raise UserError(f"{path}: not a readable image ({error}); mend or remove it") from None


def read_image(path: str | os.PathLike) -> Image.Image:
    """Read the first frame of an image as RGB.

    As in torchvision's ImageFolder, transparency is dropped and EXIF's orientation ignored. 16-bit gray is scaled to 8
    bits.

    Raises:
        UserError: not an image, truncated, too large, or of floating-point pixels, which have no agreed range.
    """
    with _open(path) as image:
        if image.mode == "F":
            raise ValueError("floating-point pixels; convert them to 8 or 16 bits")
        if image.mode.startswith("I"):  # 16-bit gray; Pillow's convert would cut it at 255
            image = Image.fromarray((np.asarray(image, dtype=np.float64) / 257).clip(0, 255).round().astype(np.uint8))
        return image.convert("RGB")


def _size(path: str) -> tuple[int, int]:
    with _open(path) as image:
        return image.height, image.width


def _map_with_bar(function, items: list, text: str) -> list:
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        results = pool.map(function, items)
        try:
            return list(tqdm(results, text, len(items), unit=" images", disable=not sys.stderr.isatty(), leave=False))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _fingerprint(paths: list[str]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        try:
            info = os.stat(path)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); mend or remove it") from None
        digest.update(f"{path}\0{info.st_size}\0{info.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _read_cache(
    path: Path, fingerprint: str, count: int, with_pixels: bool
) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """Sizes and, where wanted and stored, pixels; None if there is no cache of just these files."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if str(file["fingerprint"]) != fingerprint:
                return None
            sizes = torch.from_numpy(file["sizes"].astype(np.int64))
            pixels = torch.from_numpy(file["pixels"]) if with_pixels and "pixels" in file.files else None
            whole = sizes.shape == (count, 2) and bool((sizes > 0).all())
            if pixels is not None:
                whole = whole and pixels.dtype == torch.uint8 and pixels.shape == (int(3 * sizes.prod(dim=1).sum()),)
    except Exception:  # missing, or damaged in any way: it is made again
        return None
    return (sizes, pixels) if whole else None


def _write_cache(path: Path, **arrays) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)
        os.replace(temporary, path)
    except OSError as error:
        print(f"no cache beside the data, the images will be decoded again next time: {error}", file=sys.stderr)
        temporary.unlink(missing_ok=True)


def load_files(paths: list[str], cache: Path, memory_limit: int) -> Uniform | Ragged | Files:
    """Decode images once into memory, or leave them on disk if that takes more than `memory_limit` bytes.

    Args:
        paths: of the images.
        cache: an `.npz` file that holds sizes and pixels, made again when a file changes.
        memory_limit: in bytes.

    Raises:
        UserError: a broken image.
    """
    fingerprint = _fingerprint(paths)
    found = _read_cache(cache, fingerprint, len(paths), with_pixels=memory_limit > 0)
    sizes, pixels = found or (torch.tensor(_map_with_bar(_size, paths, "reading sizes")), None)
    total = int(3 * sizes.prod(dim=1).sum())
    if total > memory_limit:
        if not found:
            _write_cache(cache, fingerprint=fingerprint, sizes=sizes.numpy().astype(np.int32))
        return Files(paths, sizes)
    if pixels is None:
        pixels = torch.empty(total, dtype=torch.uint8)
        ends = (3 * sizes.prod(dim=1)).cumsum(0).tolist()

        def decode(i: int) -> None:
            image = pil_to_tensor(read_image(paths[i])).flatten()
            pixels[ends[i] - len(image) : ends[i]] = image

        _map_with_bar(decode, range(len(paths)), "decoding")
        _write_cache(cache, fingerprint=fingerprint, sizes=sizes.numpy().astype(np.int32), pixels=pixels.numpy())
    if (sizes == sizes[0]).all():
        return Uniform(pixels.view(len(sizes), 3, *sizes[0].tolist()))
    return Ragged(pixels, sizes)


def _class_folders(folder: Path) -> list[str]:
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    for name in names:
        if not name.isprintable():
            raise UserError(f"{folder / name}: the name of a class must be printable text; rename the folder")
    return names


def _list_images(folder: Path, classes: list[str]) -> tuple[list[str], list[int]]:
    """Paths and labels of folder/CLASS/**/*.png and so on, sorted; classes without a folder have no images."""
    paths, labels = [], []
    for label, name in enumerate(classes):
        if not (folder / name).is_dir():
            continue
        files = sorted(
            os.path.join(root, file)
            for root, _, names in os.walk(folder / name)
            for file in names
            if Path(file).suffix.lower() in IMAGE_SUFFIXES and not file.startswith(".")
        )
        if not files:
            raise UserError(f"{folder / name}: no images in this class folder; add some, or remove it")
        paths += files
        labels += [label] * len(files)
    return paths, labels


def _image_set(source: Uniform | Ragged | Files, labels) -> ImageSet:
    return ImageSet(source, torch.arange(len(labels)), torch.as_tensor(labels, dtype=torch.int64))


def _load_folder(folder: Path, classes: list[str], memory_limit: int) -> ImageSet:
    paths, labels = _list_images(folder, classes)
    return _image_set(load_files(paths, folder.parent / f"{folder.name}.cache.npz", memory_limit), labels)


def image_folder(root: Path, splits: tuple[str, ...], memory_limit: int, classes: list[str] | None):
    """Splits of an image folder, and its classes; a split's classes must be among those of training."""
    if not root.is_dir():
        raise UserError(f"--data_dir {root}: no such folder; it holds train/CLASS/*.png and test/CLASS/*.png")
    for split in splits:
        if not (root / split).is_dir():
            wanted = "val/ or test/" if split in ("val", "test") else f"{split}/"
            raise UserError(
                f"--data_dir {root}: has no {wanted}; it holds {', '.join(_class_folders(root)) or 'no folders'}"
            )
        found = _class_folders(root / split)
        if not classes and len(found) == 1:
            raise UserError(f"{root / split}: only one class, {found[0]}; there must be two to tell apart")
        if not found:
            raise UserError(f"{root / split}: no class folders in it; images belong into {root / split}/CLASS/")
        classes = classes or found
        other = sorted(set(found) - set(classes))
        if other:
            raise UserError(
                f"{root / split}: class {other[0]!r} is not among the {len(classes)} known: {', '.join(classes[:10])}"
            )
    return {split: _load_folder(root / split, classes, memory_limit) for split in splits}, classes


# ---------------------------------------------------------------- the named data sets


def _read_idx(path: Path) -> torch.Tensor:
    """Read an IDX file of bytes, also gzipped (yann.lecun.com's MNIST format): labels (n,), or images (n, 28, 28)."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            kind = file.read(4)
            ndim = kind[3] if kind in (b"\0\0\x08\1", b"\0\0\x08\3") else 0
            shape = tuple(int.from_bytes(file.read(4), "big") for _ in range(ndim))
            size = math.prod(shape)
            data = file.read(size + 1) if ndim and size <= MAX_IDX else b""
    except (OSError, EOFError, gzip.zlib.error) as error:
        raise UserError(f"{path}: damaged ({error}); remove it to download it again") from None
    if not data or len(data) != size:
        raise UserError(f"{path}: not an IDX file, or truncated; remove it to download it again")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(shape)


def idx_set(folder: Path, prefixes: tuple[str, str]) -> list[ImageSet] | None:
    """Training and test set from PREFIX-images-idx3-ubyte[.gz] and PREFIX-labels-idx1-ubyte[.gz]; None if not there."""
    sets = []
    for prefix in prefixes:
        arrays = []
        for kind in ("images-idx3", "labels-idx1"):
            candidates = [folder / f"{prefix}-{kind}-ubyte{suffix}" for suffix in ("", ".gz")]
            path = next((path for path in candidates if path.is_file()), None)
            if path is None:
                return None
            arrays.append(_read_idx(path))
        images, labels = arrays
        if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels) or not len(images):
            raise UserError(f"{folder}: images and labels of {prefix} don't belong together")
        sets.append(_image_set(Uniform(images[:, None].contiguous()), labels.long()))
    return sets


class _ArrayUnpickler(pickle._Unpickler):
    """Reads CIFAR's pickles, which hold numpy arrays, and refuses everything else that pickles can do.

    Python's own, as the one in C makes room for as many objects as a damaged file numbers.
    """

    ALLOWED = frozenset(
        [("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")]
        + [(f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")]
        + [(f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")]
    )

    def find_class(self, module: str, name: str):
        if (module, name) not in self.ALLOWED:
            raise UserError(f"refused, it wants to run {module}.{name}")
        return super().find_class(module, name)


def _read_cifar_file(path: Path) -> dict:
    try:
        found = _ArrayUnpickler(io.BytesIO(path.read_bytes()), encoding="latin1").load()
        if not isinstance(found, dict):
            raise TypeError(f"holds no dictionary but {type(found).__name__}")
        return found
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise UserError(f"{path}: not a CIFAR file, or damaged ({error}); remove it to download it again") from None


def _cifar(folder: Path, files: dict[str, list[str]], label_key: str, meta: tuple[str, str]):
    """CIFAR-10 or -100 in its own 'python version' format; None if not all files are there."""
    names = [*files["train"], *files["test"], meta[0]]
    if not all((folder / name).is_file() for name in names):
        return None
    sets = []
    for split in ("train", "test"):
        parts = [_read_cifar_file(folder / name) for name in files[split]]
        try:
            images = np.concatenate([np.asarray(part["data"], dtype=np.uint8).reshape(-1, 3, 32, 32) for part in parts])
            labels = torch.tensor([label for part in parts for label in part[label_key]])
            if labels.dtype != torch.int64:
                raise ValueError("labels are not whole numbers")
        except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise UserError(f"{folder}: not CIFAR's own format ({error})") from None
        if labels.shape != (len(images),):
            raise UserError(f"{folder}: {len(images)} images but {len(labels)} labels in {', '.join(files[split])}")
        sets.append(_image_set(Uniform(torch.from_numpy(images)), labels))
    classes = _read_cifar_file(folder / meta[0]).get(meta[1])
    if not isinstance(classes, list) or not all(isinstance(name, str) and name.isprintable() for name in classes):
        raise UserError(f"{folder / meta[0]}: has no {meta[1]}")
    return *sets, list(classes)


def _cifar10(root: Path):
    files = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
    return _cifar(root / "cifar-10-batches-py", files, "labels", ("batches.meta", "label_names"))


def _cifar100(root: Path):
    files = {"train": ["train"], "test": ["test"]}
    return _cifar(root / "cifar-100-python", files, "fine_labels", ("meta", "fine_label_names"))


def _fashionmnist(root: Path):
    sets = idx_set(root / "FashionMNIST" / "raw", ("train", "t10k"))
    return sets and (*sets, FASHION_CLASSES)


def _emnist(root: Path, split: str):
    sets = idx_set(root / "EMNIST" / "raw", (f"emnist-{split}-train", f"emnist-{split}-test"))
    classes = list(torchvision.datasets.EMNIST.classes_split_dict[split])
    if sets and split == "letters":  # its labels begin at 1
        classes = classes[1:]
        sets = [replace(part, labels=part.labels - 1) for part in sets]
    return sets and (*sets, classes)


def _caltech101(root: Path, memory_limit: int):
    """Caltech-101 without its background class; of each class every fifth image is for testing, as it has no split."""
    folder = root / "caltech101" / "101_ObjectCategories"
    if not folder.is_dir():
        return None
    classes = [name for name in _class_folders(folder) if name != "BACKGROUND_Google"]
    paths, labels = _list_images(folder, classes)
    labels = torch.tensor(labels)
    source = load_files(paths, folder.parent / "caltech101.cache.npz", memory_limit)
    place = torch.arange(len(labels)) - torch.searchsorted(labels, labels)  # within its class
    whole = _image_set(source, labels)
    return whole.part((place % 5 != 4).nonzero()[:, 0]), whole.part((place % 5 == 4).nonzero()[:, 0]), classes


def named(args, root: Path):
    """(train, test, classes) of a named data set on disk, or None."""
    readers = {
        "cifar10": lambda: _cifar10(root),
        "cifar100": lambda: _cifar100(root),
        "fashionmnist": lambda: _fashionmnist(root),
        "emnist": lambda: _emnist(root, args.emnist_split),
        "caltech101": lambda: _caltech101(root, int(args.memory_limit * 2**30)),
    }
    return readers[args.dataset]()


# torchvision's class, its arguments, and the archive that a user without network brings: (file, folder, source).
DOWNLOADS = {
    "cifar10": (torchvision.datasets.CIFAR10, {}, "cifar-10-python.tar.gz", "", "https://www.cs.toronto.edu/~kriz/cifar.html"),
    "cifar100": (torchvision.datasets.CIFAR100, {}, "cifar-100-python.tar.gz", "", "https://www.cs.toronto.edu/~kriz/cifar.html"),
    "fashionmnist": (torchvision.datasets.FashionMNIST, {}, "the four *-ubyte.gz files", "FashionMNIST/raw", "https://github.com/zalandoresearch/fashion-mnist"),
    "emnist": (torchvision.datasets.EMNIST, {"split": "mnist"}, "gzip.zip", "EMNIST/raw", "https://www.nist.gov/itl/products-and-services/emnist-dataset"),
    "caltech101": (torchvision.datasets.Caltech101, {}, "101_ObjectCategories/", "caltech101", "https://data.caltech.edu/records/mzrjq-6wc02"),
}  # fmt: skip


def download(name: str, root: Path) -> None:
    """Let torchvision download (or unpack) a data set, with its checksums and its bar."""
    cls, kwargs, file, folder, url = DOWNLOADS[name]
    try:
        root.mkdir(parents=True, exist_ok=True)
        cls(str(root), download=True, **kwargs)
    except Exception as error:  # no network, a full disk, a bad archive: torchvision raises many kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{name} is not there and can't be downloaded ({reason}); put {file} from {url} into {root / folder}/"
        ) from None
