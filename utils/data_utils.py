"""Data sets and batches.

Small images live as one uint8 tensor on the training device, and a batch is an index gather; image folders are decoded
once, with a cache beside the data. Larger folders stream through worker processes. Batch order and augmentation are
functions of (seed, step), for the whole batch of an update, of which each process takes its slice.
"""

import os
import signal
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from torchvision.transforms.functional import pil_to_tensor

from utils.augment import Augment, Mix
from utils.cli import UserError
from utils.dist_util import SIGNALS
from utils.readers import FASHION_CLASSES, MINI, Files, ImageSet, download, idx_set, image_folder, named, read_image


@dataclass
class Data:
    """A data set ready for training.

    Attributes:
        train: None where only evaluation was asked for.
        valid: what 'best' is chosen by, during training.
        test: what is reported; the same object as `valid` unless images were held out.
        classes: names in the order of the labels.
        selected_on: 'val' or 'test'.
    """

    train: ImageSet | None
    valid: ImageSet
    test: ImageSet
    classes: list[str]
    selected_on: str


# ---------------------------------------------------------------- randomness


def seed_of(*key: int) -> int:
    """A 63-bit seed from whole numbers such as (seed, purpose, step); other keys give unrelated seeds."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


ORDER, AUGMENT, HOLD_OUT, DROPOUT, MIX = range(5)  # purposes


def generator(*key: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of(*key))


@lru_cache(maxsize=4)
def _permutation(n: int, seed: int, epoch: int) -> torch.Tensor:
    return torch.randperm(n, generator=generator(seed, ORDER, epoch))


def batch_index(step: int, batch_size: int, n: int, seed: int, ra: int = 1) -> torch.Tensor:
    """Images of update `step` (from 0), (batch_size,): the next ones of an endless row of shuffled epochs.

    So every batch is full and every image is seen once an epoch, whatever n and batch_size are. With repeated
    augmentation (arXiv 1901.09335) each image of the row comes `ra` times; an epoch is then n x ra images long, as in
    the multiscale study (DeiT's ends after n, a part of the set). A batch lists its first copies, then its second
    ones, and so on, each list begun one further, so that copies fall to different processes and mixing hardly ever
    pairs them.
    """
    first, last = step * batch_size // ra, ((step + 1) * batch_size - 1) // ra
    row = _row(first, last + 1 - first, n, seed)
    copies = row[torch.arange(step * batch_size, (step + 1) * batch_size) // ra - first]
    return torch.cat([copies[k::ra].roll(-k) for k in range(ra)])


def _row(position: int, missing: int, n: int, seed: int) -> torch.Tensor:
    """`missing` images from `position` on of the endless row of shuffled epochs."""
    parts = []
    while missing:
        epoch, offset = divmod(position, n)
        part = _permutation(n, seed, epoch)[offset : offset + missing]
        parts.append(part)
        position, missing = position + len(part), missing - len(part)
    return torch.cat(parts)


# ---------------------------------------------------------------- batches


class _Decode(torch.utils.data.Dataset):
    """For DataLoader: a list of (i, box) -> images i, cut to their boxes, (b, 3, h, w) uint8, and their sizes (b, 2).

    Images smaller than the largest are padded. A side of 4 `size` or more is first reduced by averaging whole numbers
    of pixels, to 2 `size` or more; that is hardly seen once the rest is resized, and bounds a batch's memory. Its size
    is then that of the box divided by this number, not always whole.
    """

    def __init__(self, paths: list[str], size: int):
        self.paths, self.size = paths, size

    def __getitems__(self, items: list[tuple[int, list[int] | None]]) -> tuple[torch.Tensor, torch.Tensor] | str:
        try:
            images, sizes = zip(*(self._decode(*item) for item in items), strict=True)
        except UserError as error:  # DataLoader would wrap it in the worker's traceback
            return str(error)
        height, width = (max(image.shape[side] for image in images) for side in (1, 2))
        batch = torch.zeros(len(images), 3, height, width, dtype=torch.uint8)
        for place, image in zip(batch, images, strict=True):
            place[:, : image.shape[1], : image.shape[2]] = image
        return batch, torch.tensor(sizes)

    def _decode(self, i: int, box: list[int] | None) -> tuple[torch.Tensor, tuple[float, float]]:
        image = read_image(self.paths[i])
        top, left, height, width = box or (0, 0, image.height, image.width)
        down, across = (max(1, side // (2 * self.size)) for side in (height, width))
        image = image.reduce((across, down), (left, top, left + width, top + height))
        return pil_to_tensor(image), (height / down, width / across)


def _as_is(batch):
    return batch


def _leave_group(worker: int) -> None:
    """Ctrl-C, torchrun and SLURM signal whole process groups; the main process ends its workers when it is done."""
    os.setpgid(0, 0)
    for signum in signal.sigpending() & {*SIGNALS}:
        signal.sigwait([signum])  # it came before
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _start_workers(loader: DataLoader) -> Iterator:
    """Start the workers, which no signal reaches before they have left the group."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _load(data: ImageSet, plan: Iterator, augment: Augment, device: torch.device, num_workers: int) -> Iterator:
    """Turn a plan of (index, parameters) into batches (images, labels) on the device."""
    if not isinstance(data.source, Files):
        for index, params in plan:
            yield augment(data.source.take(data.ids[index]), params), data.labels[index].to(device, non_blocking=True)
        return

    planned = deque()  # the loader asks for batches ahead of time; what it asked for waits here

    def requests():
        for index, params in plan:
            planned.append((index, params))
            boxes = params["box"].tolist() if "box" in params else [None] * len(index)
            yield list(zip(data.ids[index].tolist(), boxes, strict=True))

    loader = DataLoader(
        _Decode(data.source.paths, augment.size),
        batch_sampler=requests(),
        collate_fn=_as_is,
        worker_init_fn=_leave_group,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # else it would draw from the one that dropout uses
    )
    for loaded in _start_workers(loader):
        if isinstance(loaded, str):
            raise UserError(loaded, alone=True)
        images, sizes = loaded
        index, params = planned.popleft()
        if "box" in params:  # cut already
            params["box"] = torch.cat([torch.zeros_like(sizes), sizes], dim=1)
        yield augment(images.to(device, non_blocking=True), params), data.labels[index].to(device, non_blocking=True)


@lru_cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=-1)


def _beside(batches: Iterator, device: torch.device) -> Iterator:
    """On CUDA, make each batch on a stream of its own while the step before it runs; elsewhere as it is.

    What a step reads must not be written over before it is done. So a batch is kept until a later point of the stream
    waits for its step: memory then goes to the batch after the next.
    """
    if device.type != "cuda":
        yield from batches
        return
    main, side = torch.cuda.current_stream(device), _side_stream(device)
    in_use = None  # a batch, and where its step ends
    side.wait_stream(main)  # for what batches are made from
    try:
        while True:
            with torch.cuda.stream(side):
                batch = next(batches, None)
            if batch is None:
                return
            main.wait_stream(side)
            yield batch
            if in_use:
                side.wait_event(in_use[1])
            in_use = batch, main.record_event()
    finally:
        side.wait_stream(main)


def train_batches(
    data: ImageSet,
    augment: Augment,
    *,
    seed: int,
    start: int,
    stop: int,
    batch_size: int,
    accumulation: int = 1,
    rank: int = 0,
    world: int = 1,
    ra: int = 1,
    mix: Mix | None = None,
    device: torch.device,
    num_workers: int = 0,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of the updates start..stop-1, `accumulation` of them an update, this process's share.

    Args:
        stop: updates of the whole training, which the augmentation's progress counts to.
        ra: copies of each image in a row, differently augmented.
        mix: mixup and cutmix, for all images of an update alike.

    Yields:
        images (batch_size / accumulation / world, 3, size, size) float32 and labels (...,) int64, on the device;
        with `mix`, targets (..., classes) float32 instead of labels.
    """
    share = batch_size // world

    def plan():
        sizes = data.sizes
        for step in range(start, stop):
            index = batch_index(step, batch_size, len(data), seed, ra)
            epoch_length = len(data) * ra
            progress = step * batch_size // epoch_length * epoch_length / (stop * batch_size)
            params = augment.draw(sizes[index], generator(seed, AUGMENT, step), progress)
            for part in torch.arange(rank * share, (rank + 1) * share).chunk(accumulation):
                yield index[part], {name: value[part] for name, value in params.items()}

    batches = _load(data, plan(), augment, device, num_workers)
    if mix:
        batches = _mixed(batches, mix, augment.size, seed, start, accumulation)
    return _beside(batches, device)


def _mixed(batches: Iterator, mix: Mix, size: int, seed: int, start: int, accumulation: int) -> Iterator:
    """Mix what `_load` yields, the `accumulation` batches of an update by the same share and box."""
    for i, (images, labels) in enumerate(batches):
        step = start + i // accumulation
        yield mix(images, labels, *mix.draw((size, size), generator(seed, MIX, step)))


def eval_batches(
    data: ImageSet,
    augment: Augment,
    *,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    device: torch.device,
    num_workers: int = 0,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """This process's images, each exactly once over all processes, in order; the last batch may be smaller."""

    def plan():
        sizes = data.sizes
        for index in torch.arange(len(data))[rank::world].split(batch_size):
            if len(index):  # there may be more processes than images
                yield index, augment.draw(sizes[index])

    return _beside(_load(data, plan(), augment, device, num_workers), device)


def load_data(args, *, train: bool = True, classes: list[str] | None = None) -> Data:
    """Load the data set that the flags name.

    Args:
        args: dataset, data_dir, emnist_split, val_fraction, seed, memory_limit are read.
        train: False leaves the training images out.
        classes: of a checkpoint; the data must have the same, or for an image folder a part of them.

    Raises:
        UserError: missing or broken data, with the file and the way out.
    """
    root, limit = Path(args.data_dir), int(args.memory_limit * 2**30)
    valid = None
    if args.dataset == "imagefolder":
        held_out = [split for split in ("val", "test") if (root / split).is_dir()] or ["test"]
        splits = ("train", *held_out) if train else (held_out[-1],)
        sets, found = image_folder(root, splits, limit, classes)
        training, test = sets.get("train"), sets[held_out[-1]]
        valid = sets.get("val") if len(held_out) == 2 else None
    else:
        if args.dataset == "fashionmnist-mini":
            loaded = (*(idx_set(MINI, ("train", "t10k")) or ()), FASHION_CLASSES)
            if len(loaded) != 3:
                raise UserError(f"{MINI}: its four files are missing; restore them from the repository")
        else:
            loaded = named(args, root)
            if loaded is None:
                download(args.dataset, root)
                loaded = named(args, root)
            if loaded is None:  # torchvision found other files of the set, and left it at that
                raise UserError(f"{args.dataset} in {root}: files are missing; remove its folder to download it again")
        training, test, found = loaded
        labels = torch.cat([training.labels, test.labels])
        if int(labels.max()) >= len(found) or int(labels.min()) < 0:
            raise UserError(f"{args.dataset} in {root}: a label is out of range, there are {len(found)} classes")
        if classes is not None and found != classes:
            raise UserError(
                f"{args.dataset} has other classes ({', '.join(found[:5])}, ...) "
                f"than the checkpoint ({', '.join(classes[:5])}, ...)"
            )
        if not train:
            training = None
    if training is not None and args.val_fraction:
        order = torch.randperm(len(training), generator=generator(args.seed, HOLD_OUT))
        held = max(1, round(args.val_fraction * len(training)))
        valid, training = training.part(order[:held].sort().values), training.part(order[held:].sort().values)
        if not len(training):
            raise UserError(f"--val_fraction {args.val_fraction} leaves no training images")
    return Data(training, valid or test, test, found, "val" if valid else "test")


def to_device(data: Data, device: torch.device) -> None:
    """Move the images that are in memory to the device, once."""
    for source in {id(part.source): part.source for part in (data.train, data.valid, data.test) if part}.values():
        source.to(device)
