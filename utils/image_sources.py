"""Images in memory or on disk: files decoded once, kept in a cache, or streamed where they are too many."""

import contextlib
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from utils.cli import UserError, refuse, refusing
from utils.image_folder import suffixes

warnings.filterwarnings("ignore", module=r"PIL\.")  # an image is read or refused


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
    """Images on disk; worker processes decode them, at most at `short_side`, cut and resize them."""

    def __init__(self, paths: list[str], sizes: torch.Tensor, short_side: int | None = None):
        self.paths, self.sizes, self.short_side = paths, sizes, short_side

    def to(self, device: torch.device):
        pass


def kept_size(height: int, width: int, short_side: int | None) -> tuple[int, int]:
    """Height and width that an image is kept at: its shorter side is reduced to `short_side`, where it is longer."""
    if not short_side or min(height, width) <= short_side:
        return height, width
    factor = short_side / min(height, width)
    return round(height * factor), round(width * factor)


MEND = "mend or remove it"
# How an image of each of EXIF's orientations becomes upright.
TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM}
TURNS |= {5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE}
TURNS |= {8: Image.Transpose.ROTATE_90}


@contextlib.contextmanager
def _opened(path: str | os.PathLike):
    suffixes()  # Pillow knows all formats then, in every process
    with refusing(f"{path}: not a readable image", MEND), open(path, "rb") as file:
        with Image.open(file) as image:  # by its path, Pillow 13 reads some TIFFs that are turned wrong
            yield image


def orientation(image: Image.Image) -> int:
    """EXIF's, 1 to 8, of pixels as they are stored: 1 for upright, from 5 on lying. Pillow itself turns TIFF."""
    with contextlib.suppress(Exception):  # an image may be whole where its EXIF is not
        found = Image.Image.getexif(image)[ExifTags.Base.Orientation]  # of a PNG, unlike its own, without decoding it
        return found if found in TURNS and image.format != "TIFF" else 1
    return 1


def as_rgb(image: Image.Image) -> Image.Image:
    """Upright, without transparency, and with 16-bit gray scaled to 8 bits. ValueError: 32 bits a pixel and channel."""
    turn = TURNS.get(orientation(image))
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):  # those hold 16
        raise ValueError("pixels of 32 bits, which have no agreed range; convert them to 8 or 16 bits")
    if image.mode.startswith("I"):  # 16-bit gray; Pillow's convert would cut it at 255
        levels = np.asarray(image, dtype=np.float32) / 257
        image = Image.fromarray(levels.clip(0, 255).round().astype(np.uint8))
    image = image if image.mode == "RGB" else image.convert("RGB")
    if turn is not None:
        image = image.transpose(turn)
        image.info = {}  # which would have it turned again
    return image


def read_image(path: str | os.PathLike, short_side: int | None = None, size: list[int] | None = None) -> Image.Image:
    """Read the first frame of an image `as_rgb`, its shorter side reduced to `short_side` where it is longer.

    UserError if it is no image, truncated, too large for Pillow, of 32 bits a channel, or not of `size`, (h, w).
    """
    with _opened(path) as image:
        lying = orientation(image) >= 5
        height, width = kept_size(image.height, image.width, short_side)
        reduced = (width, height) != image.size
        if reduced:  # JPEG is decoded at a half, a quarter or an eighth, where that is still twice as large
            image.draft(None, (2 * width, 2 * height))
        image = as_rgb(image)
        image.load()
        if reduced:
            kept = (height, width) if lying else (width, height)
            image = image.resize(kept, Image.Resampling.BICUBIC, reducing_gap=2.0)
        refuse(size and size != [image.height, image.width], f"{path}: not of the size that it had before; {MEND}")
        return image


def _size(path: str) -> tuple[int, int]:
    with _opened(path) as image:
        return image.size if orientation(image) >= 5 else image.size[::-1]


def _map_with_bar(
    function: Callable, paths: Sequence[str], places: Collection[int], text: str
) -> tuple[list, dict[int, str]]:
    """`function(i)` for places i of the paths, in threads; and why it was a UserError, by the places where it was."""
    broken = {}

    def attempt(i: int):
        try:
            return function(i)
        except UserError as error:
            broken[i] = str(error).removeprefix(f"{paths[i]}: ").removesuffix(f"; {MEND}")

    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
    try:
        bar = tqdm(pool.map(attempt, places), text, len(places), unit=" images", disable=None, leave=False)
        return list(bar), dict(sorted(broken.items()))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # Ctrl-C waits for no image that isn't begun


def _fingerprint(paths: Sequence[str], root: Path, short_side: int | None) -> str:
    digest = hashlib.sha256(f"upright, kept at {short_side}".encode())
    for path in paths:
        digest.update(os.fsencode(f"{os.path.relpath(path, root)}\0"))
        with contextlib.suppress(OSError):  # it will be named as broken
            info = os.stat(path)
            digest.update(f"{info.st_size}\0{info.st_mtime_ns}\n".encode())
    return digest.hexdigest()


@dataclass
class Cache:
    """Sizes and decoded images of a list of files, in an `.npz` in the first of some places that has it or takes it."""

    places: list[Path]
    fingerprint: str  # what it holds is only used for the same files
    note: str = "no cache"

    def read(self, *names: str) -> list | None:
        for path in self.places:
            with contextlib.suppress(Exception), np.load(path, allow_pickle=False) as file:  # damaged: made again
                if str(file["fingerprint"]) == self.fingerprint:
                    self.found(path)
                    return [file[name] for name in names]
        return None

    def found(self, path: Path) -> None:
        self.note = f"cache {path}, {path.stat().st_size / 2**20:.1f} MB"

    def write(self, **arrays) -> None:
        for path in self.places:
            temporary = path.with_name(f".{path.name}.{os.getpid()}")
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with open(temporary, "wb") as file:
                    np.savez(file, fingerprint=self.fingerprint, **arrays)
                os.replace(temporary, path)
                self.found(path)
                if path != self.places[0]:
                    self.note += f" ({self.places[0].parent} cannot be written)"
                return
            except OSError as error:
                self.note = f"no cache ({error.strerror or error}), so images are decoded again next time"
            finally:  # also of Ctrl-C
                with contextlib.suppress(OSError):
                    temporary.unlink()


def load_files(
    paths: Sequence[str], root: Path, places: list[Path], memory_limit: int, short_side: int | None = None
) -> tuple[Uniform | Ragged | Files, dict[int, str], str]:
    """Decode images once into memory, or leave them on disk if that takes more than `memory_limit` bytes.

    `places` are of a `Cache`, `short_side` of `read_image`. Returns the source, why each of the images that can't be
    read (by their places) can't, and a line for the log.
    """
    cache = Cache(places, _fingerprint(paths, root, short_side))
    known = cache.read("sizes", "broken")
    broken = dict(json.loads(str(known[1]))) if known else {}
    if len(_map_with_bar(lambda i: read_image(paths[i], short_side), paths, broken, "checking")[1]) < len(broken):
        known = None  # one was mended, as by chmod, which leaves size and date as they are
    if known:
        native = torch.from_numpy(known[0]).long()
    else:
        read, broken = _map_with_bar(lambda i: _size(paths[i]), paths, range(len(paths)), "reading sizes")
        native = torch.tensor([size or (0, 0) for size in read])
    sizes = torch.tensor([kept_size(*size, short_side) for size in native.tolist()])
    ends = (3 * sizes.prod(dim=1)).cumsum(0).tolist()
    in_memory = ends[-1] <= memory_limit
    kept = cache.read("pixels") if known and in_memory else None
    if kept:
        pixels = torch.from_numpy(kept[0])
    elif in_memory or not known:  # those to be streamed are decoded once, to know what is broken
        pixels = torch.empty(ends[-1] if in_memory else 0, dtype=torch.uint8)

        def decode(i: int) -> None:
            image = read_image(paths[i], short_side, sizes[i].tolist())
            if in_memory:
                image = pil_to_tensor(image).flatten()
                pixels[ends[i] - len(image) : ends[i]] = image

        whole = [i for i in range(len(paths)) if i not in broken]
        broken |= _map_with_bar(decode, paths, whole, "decoding" if in_memory else "checking")[1]
        arrays = dict(pixels=pixels.numpy()) if in_memory else {}
        cache.write(sizes=native.numpy().astype(np.int32), broken=json.dumps(list(broken.items())), **arrays)
    note = describe_sizes(native[[i for i in range(len(paths)) if i not in broken]], short_side)
    size = f"{ends[-1] / 2**20:.1f} MB"
    if not in_memory:
        limit = f"{memory_limit / 2**20:.1f} MB (--memory_limit)"
        note = f"{note}; streamed, as {size} are more than {limit}; {cache.note}"
        return Files(paths, sizes, short_side), broken, note
    note = f"{note}; {size} in memory; {cache.note}"
    if (sizes == sizes[0]).all():
        return Uniform(pixels.view(len(sizes), 3, *sizes[0].tolist())), broken, note
    return Ragged(pixels, sizes), broken, note


def describe_sizes(sizes: torch.Tensor, short_side: int | None) -> str:
    """Sizes (n, 2), for the log."""
    if not len(sizes):
        return "no image"
    pixels = sizes.prod(dim=1)
    ends = (sizes[place].tolist() for place in (pixels.argmin(), pixels.argmax()))
    smallest, largest = (f"{width}x{height}" for height, width in ends)
    text = f"{smallest} pixels" if smallest == largest else f"{smallest} to {largest} pixels"
    if short_side and (sizes.min(dim=1).values > short_side).any():
        text += f", kept at a short side of {short_side} or less, which is all that crops can use"
    return text
