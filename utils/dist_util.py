"""Processes and devices: one process by default, several under torchrun."""

import contextlib
import ctypes
import os
import re
import signal
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from utils.cli import UserError
from utils.options import world_size

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
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


def _device(wanted: str, index: int) -> torch.device:
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if wanted == "cuda":
        if not torch.cuda.is_available():
            raise UserError("--device cuda: torch sees no GPU here; use --device cpu")
        if index >= torch.cuda.device_count():
            raise UserError(
                f"GPU {index} is not there, torch sees {torch.cuda.device_count()}; fewer --nproc_per_node?"
            )
        torch.cuda.set_device(index)
        return torch.device("cuda", index)
    if wanted == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: not available here; use --device cpu")
    return torch.device(wanted)


def keep_memory() -> None:
    """Have glibc keep what is freed for the next step; called where a CPU computes. Other C libraries ignore it.

    By default blocks of 32 MiB and more go back to the system at once and come anew, page by page: with large
    activations a seventh of a step's time. The process then stays as large as it has ever been. What the environment
    says about these two thresholds stays.
    """
    if os.environ.keys() & {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"}:
        return
    trim, mmap, most = -1, -3, 2**31 - 1  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
    with contextlib.suppress(OSError, TypeError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        # older versions allow 32 MiB at most; the second threshold alone would leave the first at 128 KiB
        if mallopt(mmap, most) or mallopt(mmap, 2**25):
            mallopt(trim, most)


def start(device: str = "auto", gpu_id: int = 0, timeout: timedelta = TIMEOUT) -> Processes:
    """Choose the device, and join the process group if torchrun's environment is there.

    On a CPU, `keep_memory`; on GPUs float32 products may round their factors to TF32.

    Args:
        device: 'auto', 'cpu', 'cuda' or 'mps'.
        gpu_id: for a single process; under torchrun LOCAL_RANK chooses the GPU.
        timeout: of every exchange between processes; one that is gone or stuck ends the others after it.

    Raises:
        UserError: the device is not there.
    """
    world = world_size()
    local_rank = int(os.environ["LOCAL_RANK"]) if world > 1 else 0
    chosen = _device(device, local_rank if world > 1 else gpu_id)
    torch.set_float32_matmul_precision("high")
    if chosen.type == "cpu":
        keep_memory()
    if world == 1:
        return Processes(chosen)
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":  # torchrun's store outlives a restart, and old keys name the dead
        store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
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


def barrier() -> None:
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()


def largest(value: int | float) -> int | float:
    """The largest of all processes' values; an exchange on the CPU, so that the device need not be waited for."""
    if not dist.is_initialized():
        return value
    tensor = torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else torch.int64)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.item()


def _host_memory() -> int:
    """Bytes that this process may still take of the host's memory, where its node's processes share alike."""
    try:
        free = 1024 * int(re.search(r"MemAvailable: *(\d+) kB", Path("/proc/meminfo").read_text())[1])
    except OSError:  # not Linux: half of what there is
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    with contextlib.suppress(OSError, ValueError):  # a container's limit, 'max' for none
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        free = min(free, limit - used)
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still take of the device's memory."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _host_memory()


def memory_limit(device: torch.device) -> float:
    """GiB that each split of a data set may take: a quarter of what is free on the device and on the host."""
    return min(free_memory(device), _host_memory()) / 4 / 2**30


def is_lost(error: RuntimeError) -> bool:
    """Whether an exchange failed because another process is gone or does not answer."""
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)


def gather(value) -> list:
    """All processes' values, in the order of their ranks."""
    values = [value]
    if dist.is_initialized():
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


class Interrupt:
    """Turns SIGNALS into a request to save and leave after the step; Ctrl-C after that leaves at once.

    SIGTERM and SIGUSR1 may come repeatedly: torchrun and SLURM each pass them on.
    """

    def __enter__(self) -> "Interrupt":
        self.signum = 0
        self.before = {signum: signal.signal(signum, self) for signum in SIGNALS}
        return self

    def __exit__(self, *error) -> None:
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    def __call__(self, signum, frame):
        self.signum = signum
        signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextlib.contextmanager
def first_on_each_node(processes: Processes):
    """Run the body on each node's first process, then on its others: what the first one writes, the others find."""
    group = dist.new_group(backend="gloo", timeout=FIRST_TIMEOUT) if dist.is_initialized() else None
    if processes.local_rank:
        dist.barrier(group)
    yield
    if group and not processes.local_rank:
        dist.barrier(group)


def on_first(processes: Processes, action):
    """Call `action` on rank 0 alone, and return its result there; all wait, and a UserError of it ends all."""
    result = error = None
    if processes.main:
        try:
            result = action()
        except UserError as found:
            error = found
    if largest(error is not None):
        raise error or UserError("the first process cannot go on")
    return result


def usable_precision(wanted: str, device: torch.device) -> tuple[str, str]:
    """The precision that a device can work in, next to what was wanted.

    Args:
        wanted: 'fp32', 'bf16' or 'fp16'.

    Returns:
        One of the three, and a remark for the log, empty where it is the wanted one.
    """
    if device.type == "cuda":
        if wanted == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
            return "fp16", " (this GPU has no bfloat16)"
    elif wanted == "fp16":
        capabilities = torch.cpu.get_capabilities()
        if device.type == "mps" or any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16")):
            return "bf16", " (float16 needs CUDA)"
        return "fp32", " (float16 needs CUDA, and this CPU has no bfloat16)"
    return wanted, ""


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Mixed precision for the forward pass; nothing for 'fp32'."""
    return torch.autocast(device.type, dtype=DTYPES[precision], enabled=precision != "fp32")


def sync_batchnorm(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """Let the BatchNorms of a model normalise by the statistics of all processes' batches.

    Raises:
        UserError: not on CUDA, which alone has that.
    """
    if device.type != "cuda":
        raise UserError(f"--sync_bn needs CUDA, this is {device.type}; leave it out, or use one process")
    return torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)


def statistics_of(model: torch.nn.Module) -> list[torch.Tensor]:
    """Floating-point buffers that training changes and checkpoints keep, such as BatchNorm's running statistics."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    state = model.state_dict()
    return [state[name] for name in state if name not in parameters and state[name].is_floating_point()]


def average_statistics(buffers: list[torch.Tensor]) -> None:
    """Make the processes agree on running statistics, each of which saw a part of the batch."""
    if dist.is_initialized() and buffers:
        flat = torch.cat([buffer.flatten() for buffer in buffers])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for buffer, part in zip(buffers, flat.split([buffer.numel() for buffer in buffers]), strict=True):
            buffer.copy_(part.view_as(buffer))


def broadcast_model(model: torch.nn.Module) -> None:
    """Give every process the first one's weights and buffers."""
    if dist.is_initialized():
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, src=0)
