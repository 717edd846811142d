"""Several processes under torchrun, or one: who writes, exact sums over all, signals, and how a lost one is told."""

import contextlib
import multiprocessing
import os
import re
import signal
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from utils.cli import UserError, world_size
from utils.device import choose_device

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
PATIENCE = 2  # seconds between a signal and giving up data that doesn't come
TIMEOUT = timedelta(minutes=10)  # of an exchange: more than a save or an evaluation's slowest share takes
FIRST_TIMEOUT = timedelta(days=1)  # of the wait for what is done once: a large folder may take hours to decode


@dataclass(frozen=True)
class Processes:
    """This process's place among all; rank 0 writes files and prints."""

    device: torch.device
    rank: int = 0
    local_rank: int = 0
    world: int = 1

    @property
    def main(self) -> bool:
        return self.rank == 0

    @property
    def share(self) -> dict:
        """What `data_utils.train_batches` and `eval_batches` need to know of it."""
        return dict(rank=self.rank, world=self.world, device=self.device)


def start(device: str = "auto", gpu_id: int = 0, timeout: timedelta = TIMEOUT) -> Processes:
    """Choose the device, by `choose_device` and torchrun's LOCAL_RANK, and join torchrun's process group, if any.

    `timeout` is that of every exchange between processes: one that is gone or stuck ends the others after it.
    """
    if world_size() == 1:
        return Processes(choose_device(device, gpu_id))
    local_rank = int(os.environ["LOCAL_RANK"])
    chosen = choose_device(device, local_rank)
    store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # torchrun's store outlives a restart, and holds the addresses of processes that have died; so new names there
        store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    return Processes(chosen, rank, local_rank, world)


def stop() -> None:
    """Leave the process group, if any."""
    if dist.is_initialized():
        dist.destroy_process_group()


def sum_over_processes(tensor: torch.Tensor) -> torch.Tensor:
    """Add up a tensor over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def mean(value: torch.Tensor) -> float:
    """The mean of all processes' numbers; it waits for the device."""
    return sum_over_processes(value.clone()).item() / (dist.get_world_size() if dist.is_initialized() else 1)


def largest(*values: int) -> list[int]:
    """Of each value the largest of all processes'; exchanged on the CPU, so that no GPU need be waited for."""
    if not dist.is_initialized():
        return list(values)
    tensor = torch.tensor(values, dtype=torch.int64)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.tolist()


def explain(error: Exception) -> UserError | None:
    """An error that is no mistake of the code in one line: no memory, a lost process, no compiler for torch.compile."""
    reason = str(error).splitlines()[0] if str(error) else "the host"
    if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error)):
        return UserError("another process is gone or stuck; the same command goes on from the last save")
    if type(error).__module__.startswith("torch._inductor"):  # most often, there is no C++ compiler
        return UserError(f"--compile: torch cannot compile the model here ({reason}); leave it out")
    no_memory = isinstance(error, RuntimeError) and re.search("out of memory|can't allocate memory", str(error))
    if reason.startswith("DataLoader worker"):
        what = f"a process that decodes images was ended by the system, most often as memory ran out ({reason})"
        way_out = "the same command goes on from the last save, or with fewer --num_workers"
    elif no_memory or isinstance(error, MemoryError):
        what, way_out = f"out of memory ({reason})", "fewer images per pass, or a smaller model"
    else:
        return None
    return UserError(f"{what}; {way_out}", on_this_process=True)


def gather(value) -> list:
    """All processes' values, in the order of their ranks."""
    values = [value]
    if dist.is_initialized():
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


class Stalled(BaseException):
    """A signal came, and the data that the process waits for does not."""


class Interrupt:
    """Turns SIGNALS into a request to save and leave after the step; Ctrl-C after that leaves at once.

    SIGTERM and SIGUSR1 may come repeatedly: torchrun and SLURM each pass them on. If data is waited for, PATIENCE
    seconds after the signal, the workers that should bring it are killed, and Stalled is raised.
    """

    waiting = False  # for data

    def __enter__(self) -> "Interrupt":
        self.signum = 0
        self.before = {signum: signal.signal(signum, self) for signum in SIGNALS}
        self.before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self.look)
        return self

    def __exit__(self, *error) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    def __call__(self, signum, frame):
        self.signum = signum
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, PATIENCE, PATIENCE)

    def look(self, signum, frame):
        if Interrupt.waiting:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would make an error of it
            for worker in multiprocessing.active_children():
                worker.kill()
            raise Stalled


@contextlib.contextmanager
def waiting():
    """Around what may wait for data."""
    Interrupt.waiting = True
    try:
        yield
    finally:
        Interrupt.waiting = False


@contextlib.contextmanager
def first_on_each_node(processes: Processes):
    """Run the body on each node's first process, then on its others: what the first one writes, the others find."""
    group = dist.new_group(backend="gloo", timeout=FIRST_TIMEOUT) if dist.is_initialized() else None
    if processes.local_rank:
        dist.barrier(group)
    yield
    if group and not processes.local_rank:
        dist.barrier(group)


def on_first(processes: Processes, action: Callable) -> None:
    """Call `action` on rank 0 alone; all wait, and a UserError of it ends all."""
    error = None
    if processes.main:
        try:
            action()
        except UserError as found:
            error = found
    if largest(error is not None)[0]:
        raise error or UserError("the first process cannot go on")


def parallel(model: nn.Module, processes: Processes) -> nn.Module:
    """The model as several processes train it, whose gradients are averaged; itself where there is one process."""
    if processes.world == 1:
        return model
    ids = [processes.device.index] if processes.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)


def share_statistics(model: nn.Module, processes: Processes) -> tuple[nn.Module, list[str]]:
    """On several GPUs, let BatchNorm normalise by the statistics of all processes' batches; and lines for the log."""
    if processes.world == 1 or not any(isinstance(module, _BatchNorm) for module in model.modules()):
        return model, []
    if processes.device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model), ["Batch statistics are those of all processes together"]
    return model, ["Batch statistics are each process's own; running statistics are averaged over processes"]


def statistics_of(model: nn.Module) -> list[torch.Tensor]:
    """Floating-point buffers that training changes and checkpoints keep, such as BatchNorm's running statistics."""
    kept = model.state_dict().keys()
    return [buffer for name, buffer in model.named_buffers() if name in kept and buffer.is_floating_point()]


def average_statistics(buffers: list[torch.Tensor]) -> None:
    """Make the processes agree on running statistics, each of which saw a part of the batch."""
    if dist.is_initialized() and buffers:
        flat = torch.cat([buffer.flatten() for buffer in buffers])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for buffer, part in zip(buffers, flat.split([buffer.numel() for buffer in buffers]), strict=True):
            buffer.copy_(part.view_as(buffer))


def broadcast_model(model: nn.Module) -> None:
    """Give every process the first one's weights and buffers."""
    if dist.is_initialized():
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, src=0)
