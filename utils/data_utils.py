"""Batches: their order, their making, and streaming from disk.

Small images live as one uint8 tensor on the training device, and a batch is an index gather; larger folders stream
through worker processes. Order and augmentation are functions of (seed, step), for the whole batch of an update.
"""

import math
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from functools import lru_cache
from itertools import tee

import torch
from torch.utils.data import DataLoader
from torchvision.transforms.functional import pil_to_tensor

from utils import seeds
from utils.augment import Augment, Mix
from utils.cli import UserError
from utils.datasets import ImageSet
from utils.dist_util import SIGNALS, waiting
from utils.image_sources import MEND, Files, Ragged, Uniform, read_image

PART = 2**24  # bytes of a part of a batch of many sizes
_print_once = lru_cache(lambda text: print(text, file=sys.stderr))


@lru_cache(maxsize=4)
def _permutation(n: int, seed: int, epoch: int) -> torch.Tensor:
    return torch.randperm(n, generator=seeds.generator(seed, seeds.ORDER, epoch))


def batch_index(step: int, batch_size: int, n: int, seed: int, ra: int = 1) -> torch.Tensor:
    """Images of update `step` (from 0), (batch_size,): the next ones of an endless row of shuffled epochs.

    So every batch is full and every image is seen once an epoch, whatever n and batch_size are. With repeated
    augmentation (arXiv 1901.09335) each image of the row comes `ra` times; an epoch is then n x ra images long, as in
    the multiscale study (DeiT's ends after n). A batch lists its first copies, then its second ones, and so on, each
    list begun one further, so that copies fall to different processes and mixing hardly ever pairs them.
    """
    first, last = step * batch_size // ra, ((step + 1) * batch_size - 1) // ra
    epoch = first // n
    row = torch.cat([_permutation(n, seed, each) for each in range(epoch, last // n + 1)])[first - epoch * n :]
    copies = row[torch.arange(step * batch_size, (step + 1) * batch_size) // ra - first]
    return torch.cat([copies[k::ra].roll(-k) for k in range(ra)])


class _Decode(torch.utils.data.Dataset):
    """For DataLoader: a list of (i, box, goal) -> images i, cut to their boxes: their pixels end to end, their heights
    and widths (b, 2), and the sizes of their boxes (b, 2).

    A side 4 times as long as its `goal`, what it will be resized to, or longer, is first reduced by averaging whole
    numbers of pixels, to twice the goal or more; that is hardly seen once the rest is resized, and saves memory. The
    size of its box is divided by this number, and then not always whole.
    """

    def __init__(self, source: Files, shared: bool):
        self.source, self.shared = source, shared

    def __getitem__(self, items: list[tuple[int, list[int] | None, list[int]]]) -> tuple | str:
        try:
            images, boxes = zip(*(self._decode(*item) for item in items), strict=True)
        except UserError as error:  # DataLoader would wrap it in the worker's traceback
            return str(error)
        shapes = torch.tensor([image.shape[1:] for image in images])
        pixels = torch.cat([image.flatten() for image in images])
        return pixels if self.shared else pixels.numpy(), shapes, torch.tensor(boxes)

    def _decode(self, i: int, box: list[int] | None, goal: list[int]) -> tuple[torch.Tensor, tuple[float, float]]:
        image = read_image(self.source.paths[i], self.source.short_side, self.source.sizes[i].tolist())
        top, left, height, width = box or (0, 0, image.height, image.width)
        down, across = (max(1, side // (2 * to)) for side, to in zip((height, width), goal, strict=True))
        image = image.reduce((across, down), (left, top, left + width, top + height))
        return pil_to_tensor(image), (height / down, width / across)


def _augmented(source: Uniform | Ragged, ids: torch.Tensor, params: dict, augment: Augment) -> torch.Tensor:
    """Images of a source in memory, augmented; those of many sizes in parts of similar ones.

    A part is padded to its largest height and width, and has weights that resize these. It takes PART bytes, or one
    image, at most, and no more than twice what its images do by themselves.
    """
    if isinstance(source, Uniform):
        return augment(source.take(ids), params)
    sizes = source.sizes[ids].tolist()
    parts, height, width, own = [[]], 0, 0, 0
    for i in sorted(range(len(ids)), key=sizes.__getitem__):
        h, w = sizes[i]
        height, width, own, n = max(height, h), max(width, w), own + h * w, len(parts[-1]) + 1
        taken = n * (3 * height * width + 4 * augment.size * (height + width))
        if n > 1 and (taken > PART or n * height * width > 2 * own):
            parts.append([])
            height, width, own = h, w, h * w
        parts[-1].append(i)
    batch = None
    for part in map(torch.tensor, parts):
        done = augment(source.take(ids[part]), {name: value[part] for name, value in params.items()})
        batch = done.new_empty(len(ids), *done.shape[1:]) if batch is None else batch
        batch[part.to(batch.device, non_blocking=True)] = done
    return batch


def _fits_shared_memory(needed: int) -> bool:
    """Whether workers can hand on so many bytes through /dev/shm, which containers have little of; else a line."""
    if os.path.isdir("/dev/shm") and (memory := shutil.disk_usage("/dev/shm")).free < needed:
        _print_once(f"/dev/shm has {memory.total / 2**20:.0f} MB, too few for batches; they go through pipes")
        return False
    return True


def _leave_group(worker: int) -> None:
    """Ctrl-C, torchrun and SLURM signal whole process groups; the main process ends its workers when it is done."""
    os.setpgid(0, 0)
    for signum in signal.sigpending() & {*SIGNALS}:
        signal.sigwait([signum])  # it came before
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _as_it_is(loaded):
    """DataLoader's own would make tensors, in shared memory, of arrays."""
    return loaded


def _start_workers(loader: DataLoader) -> Iterator:
    """Start the workers, which no signal reaches before they have left the group."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _streamed(
    data: ImageSet, plan: Iterator, augment: Augment, device: torch.device, num_workers: int, batch_size: int
) -> Iterator:
    """A plan, see `_load`, with the images of each batch, decoded and cut by workers: their source and ids in it."""
    plan, ahead = tee(plan)  # the loader asks for batches ahead of time

    def requests():
        for index, params in ahead:
            boxes = params["box"].tolist() if "box" in params else [None] * len(index)
            goals = params["window"][:, 2:].tolist() if "window" in params else [[augment.size] * 2] * len(index)
            yield list(zip(data.ids[index].tolist(), boxes, goals, strict=True))

    reduced = (4 * augment.size) ** 2 if augment.crop_pct == 1 else math.inf  # whose centre is cut may be of any length
    largest = 3 * min(int(data.sizes.prod(dim=1).max()), reduced)
    shared = num_workers == 0 or _fits_shared_memory((2 * num_workers + 1) * batch_size * largest)
    loader = DataLoader(  # each request is a batch; without a generator it would draw from the one that dropout uses
        _Decode(data.source, shared), batch_size=None, sampler=requests(), num_workers=num_workers,
        worker_init_fn=_leave_group, pin_memory=device.type == "cuda", generator=torch.Generator(),
        collate_fn=_as_it_is,
    )  # fmt: skip
    loading = _start_workers(loader)
    for index, params in plan:
        with waiting():
            loaded = next(loading)
        if isinstance(loaded, str):
            way_out = "bring it back as it was, and the same command goes on from the last save"
            raise UserError(loaded.removesuffix(MEND) + way_out, on_this_process=True)
        pixels, shapes, boxes = map(torch.as_tensor, loaded)
        if "box" in params:  # cut already
            params["box"] = torch.cat([torch.zeros_like(boxes), boxes], dim=1)
        yield index, params, Ragged(pixels.to(device, non_blocking=True), shapes), torch.arange(len(index))


def _load(data: ImageSet, plan: Iterator, augment: Augment, device: torch.device, **streaming) -> Iterator:
    """Turn a plan of (index, parameters) into batches (images, labels) on the device."""
    if isinstance(data.source, Files):
        batches = _streamed(data, plan, augment, device, **streaming)
    else:
        batches = ((index, params, data.source, data.ids[index]) for index, params in plan)
    for index, params, source, ids in batches:
        yield _augmented(source, ids, params, augment), data.labels[index].to(device, non_blocking=True)


@lru_cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=-1)


def _ahead(batches: Iterator, device: torch.device) -> Iterator:
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
    data: ImageSet, augment: Augment, *, seed: int, stop: int, start: int = 0, batch_size: int, accumulation: int = 1,
    rank: int = 0, world: int = 1, ra: int = 1, mix: Mix | None = None, device: torch.device, num_workers: int = 0,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:  # fmt: skip
    """Batches of the updates start..stop-1, `accumulation` of them an update, this process's share.

    `data` and `augment` are on the device; `stop` is the end of the whole training, to which the augmentation's
    progress counts; each image comes `ra` times in a row; `mix` mixes all images of an update alike. Yields images
    (batch_size / accumulation / world, 3, size, size) and labels (...,) int64, or with `mix` targets (..., classes).
    """
    share = batch_size // world

    def plan():
        sizes = data.sizes
        for step in range(start, stop):
            index = batch_index(step, batch_size, len(data), seed, ra)
            epoch_length = len(data) * ra
            progress = step * batch_size // epoch_length * epoch_length / (stop * batch_size)
            params = augment.draw(sizes[index], seeds.generator(seed, seeds.AUGMENT, step), progress)
            for part in torch.arange(rank * share, (rank + 1) * share).chunk(accumulation):
                yield index[part], {name: value[part] for name, value in params.items()}

    def mixed(batches):  # the batches of an update by the same share and box
        for i, (images, labels) in enumerate(batches):
            generator = seeds.generator(seed, seeds.MIX, start + i // accumulation)
            yield mix(images, labels, *mix.draw((augment.size, augment.size), generator))

    batches = _load(data, plan(), augment, device, num_workers=num_workers, batch_size=share // accumulation)
    return _ahead(mixed(batches) if mix else batches, device)


def eval_batches(
    data: ImageSet, augment: Augment, *, batch_size: int, rank: int = 0, world: int = 1, device: torch.device,
    num_workers: int = 0,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:  # fmt: skip
    """This process's images, each exactly once over all processes, in order; the last batch may be smaller."""

    def plan():
        sizes = data.sizes
        for index in torch.arange(len(data))[rank::world].split(batch_size):
            if len(index):  # there may be more processes than images
                yield index, augment.draw(sizes[index])

    return _ahead(_load(data, plan(), augment, device, num_workers=num_workers, batch_size=batch_size), device)
