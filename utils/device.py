"""The device that computes, its memory, and the precision that it works in."""

import contextlib
import ctypes
import os
import re
from pathlib import Path

import torch

from utils.cli import refuse

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(wanted: str = "auto", index: int = 0) -> torch.device:
    """The device 'cpu', 'cuda' (GPU number `index`) or 'mps'; 'auto' takes a GPU where there is one.

    On GPUs float32 products may round their factors to TF32. UserError: it is not there.
    """
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if wanted == "cuda":
        there = torch.cuda.device_count()
        refuse(not torch.cuda.is_available(), "--device cuda: torch sees no GPU here; use --device cpu")
        refuse(index >= there, f"GPU {index} is not there, torch sees {there}; fewer --nproc_per_node?")
        torch.cuda.set_device(index)
    absent = wanted == "mps" and not torch.backends.mps.is_available()
    refuse(absent, "--device mps: not available here; use --device cpu")
    torch.set_float32_matmul_precision("high")
    return torch.device("cuda", index) if wanted == "cuda" else torch.device(wanted)


def keep_memory(device: torch.device) -> None:
    """On a CPU, have glibc keep what is freed for the next step; called when images, which take much, are decoded.

    By default blocks of 32 MiB and more go back to the system and come anew, page by page: with large activations a
    seventh of a step's time. What the environment says of this stays; other C libraries ignore it.
    """
    said = os.environ.keys() & {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"}
    if device.type != "cpu" or said:
        return
    trim, mmap, most = -1, -3, 2**31 - 1  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
    with contextlib.suppress(OSError, TypeError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        # older versions allow 32 MiB at most; the second threshold alone would leave the first at 128 KiB
        if mallopt(mmap, most) or mallopt(mmap, 2**25):
            mallopt(trim, most)


def host_memory() -> int:
    """Bytes that this process may still take of the host's memory, where its node's processes share alike."""
    try:
        free = 1024 * int(re.search(r"MemAvailable: *(\d+) kB", Path("/proc/meminfo").read_text())[1])
    except OSError:  # not Linux: half of what there is
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    with contextlib.suppress(OSError, ValueError):  # a container's limit, 'max' for none
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        free = min(free, limit - used)
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def memory_limit(device: torch.device) -> float:
    """GiB that each split of a data set may take: a quarter of what is free on the device and on the host."""
    free = host_memory()
    if device.type == "cuda":
        free = min(free, torch.cuda.mem_get_info(device)[0])
    return free / 4 / 2**30


def usable_precision(wanted: str, device: torch.device) -> tuple[str, str]:
    """What a device can work in, next to 'fp32', 'bf16' or 'fp16'; and a remark where that is another one, else ''."""
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
