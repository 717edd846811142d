"""Fixtures: reference outputs of the published implementations, weight files made from them, and train.py in forks."""

import json
import os
import signal
from multiprocessing.process import BaseProcess
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests are of what a CPU repeats to the bit, also where there is a GPU

import numpy as np
import pytest
import torch
from helpers import children, fork_train
from hypothesis import settings

torch.set_num_threads(1)  # models this small gain nothing from more, and lose much on a busy machine

settings.register_profile("ci", max_examples=100, derandomize=True, deadline=None)
settings.register_profile("long", max_examples=2000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture
def reference():
    """`reference("dems")` -> (sizes, arrays): what a published implementation computed from random weights."""

    def load(name: str) -> tuple[dict, dict[str, np.ndarray]]:
        with np.load(Path(__file__).parent / "data" / f"{name}.npz", allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
        return json.loads(str(arrays.pop("config"))), arrays

    return load


@pytest.fixture
def write_weights(tmp_path):
    """`write_weights(arrays, "w:", "weights.npz")` -> path of a weight file with the arrays of that prefix."""

    def write(arrays: dict[str, np.ndarray], prefix: str, filename: str) -> Path:
        weights = {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}
        path = tmp_path / filename
        if path.suffix == ".npz":
            np.savez(path, **weights)
        else:
            torch.save({key: torch.from_numpy(value) for key, value in weights.items()}, path)
        return path

    return write


@pytest.fixture
def start(tmp_path):
    """`start(*words)` -> train.py in a process of its own, with `error`, the file of its stderr; it ends with the test.

    Other arguments as for `train_in_fork`.
    """
    started = []

    def begin(*words, **how) -> BaseProcess:
        started.append(fork_train(*words, error=tmp_path / f"stderr{len(started)}", **how))
        return started[-1]

    yield begin
    for process in started:
        for child in children(process.pid):
            os.kill(child, signal.SIGKILL)
        process.kill()
        process.join()
