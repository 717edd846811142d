"""What can be known of the CUDA path without a GPU: see fake_gpu.py."""

import contextlib

import pytest
import torch
from fake_gpu import FakeGPU, Race, Stream, WaitsForDevice
from helpers import TINY, places, write_folder

import train
from utils import data_utils, options, resample
from utils.datasets import ImageSet, load_data
from utils.dist_util import Processes

DEVICE = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    gpu = FakeGPU(monkeypatch)
    with gpu:
        yield gpu
    data_utils._side_stream.cache_clear()
    resample._weight_table.cache_clear()


def start(gpu, monkeypatch, tmp_path, *words):
    """A run, its data and its batches, after which no wait is allowed. Backward passes only put gradients in place."""
    flags = [*TINY, *places(tmp_path), *"--name test --num_steps 9 --eval_batch_size 16 --depth 1".split(), *words]
    args = options.parse_train_args(list(map(str, flags)))
    args.mean, args.std = [0.5] * 3, [0.5] * 3
    with gpu.waiting_allowed():
        data = load_data(args.dataset, args.data_dir, memory_limit=args.memory_limit).to(DEVICE)
        options.resolve_steps(args, len(data.train))
        trainer = train.Trainer(args, Processes(DEVICE), data, source=None)

    def backward(loss):
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad + 1

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr(trainer.log, "images", lambda *args: None)  # those of the first step, which wait
    trainer.model.train()
    return trainer, data, trainer.batches()


def scored(trainer: train.Trainer, images: ImageSet) -> int:
    """Evaluate; how many images were seen when the host waited for the first time."""
    sizes = []
    model = trainer.average.module if trainer.average else trainer.model
    hook = model.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    with pytest.raises(WaitsForDevice):
        trainer.score(model, images)
    hook.remove()
    model.train()
    return sum(sizes)


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")  # copying a model's weights does
@pytest.mark.parametrize(
    "words",
    [
        "",
        "--aug weak --reprob 0.5 --bf16",
        "--aug strong --bf16 --opt adamw --gradient_accumulation_steps 2",
        "--aug dems --fp16 --opt adamw --gradient_accumulation_steps 2",
        "--aug pad --mixup 0.8 --cutmix 1 --opt muon --ema_decay 0.9 --ra 2",
        "--aug keras --fp16 --norm_type Rescale",
        "--norm_type BN --smoothing 0.1",
        "--norm_type GN --bf16 --depth 2 --drop_path 0.1 --grad_checkpoint",
        "--stem conv --img_size 32 --patch_size 4 --bf16",
        "--model_type DEMS-Ti --img_size 16 --patch_size 2 --merge_num 16 --merge_layer 1 --bf16",
        "--model_type MViT-Ti --img_size 32 --patch_size 4 --dim 24 --heads 12 --bf16",
    ],
)
def test_host_never_waits_and_streams_are_in_order(words, gpu, monkeypatch, tmp_path):
    trainer, data, batches = start(gpu, monkeypatch, tmp_path, *words.split())
    for _ in range(2):
        trainer.update(batches)
    assert scored(trainer, data.test.part(torch.arange(40))) == 40
    trainer.update(batches)
    batches.close()
    assert not gpu.races


@pytest.mark.parametrize("limit", ["8", "0"])  # in memory, and streamed
def test_images_of_many_sizes(limit, gpu, monkeypatch, tmp_path):
    write_folder(tmp_path / "data", sizes=((20, 30), (41, 29)), per_class=20)
    words = ["--dataset", "imagefolder", "--data_dir", tmp_path / "data", "--num_workers", 0, "--memory_limit", limit]
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, device=None: tensor)
    trainer, data, batches = start(gpu, monkeypatch, tmp_path, *words)
    for _ in range(2):
        trainer.update(batches)
    assert scored(trainer, data.test) == 40
    batches.close()
    assert not gpu.races


@pytest.mark.parametrize("broken", ["wait_stream", "wait_event", "record_event"])
def test_a_missing_wait_is_noticed(broken, gpu, monkeypatch, tmp_path):
    trainer, data, batches = start(gpu, monkeypatch, tmp_path)
    monkeypatch.setattr(Stream, broken, lambda stream, *other: Stream().clock)
    with contextlib.suppress(Race):
        for _ in range(4):
            trainer.update(batches)
        assert gpu.races


def test_waits_are_noticed(gpu):
    with gpu.waiting_allowed():
        x, index = torch.ones(3, 4, device=DEVICE), torch.tensor([0, 2])
        there = index.to(DEVICE)
    for wait in (
        lambda: x.sum().item(),
        lambda: x.cpu(),
        lambda: bool((x > 0).all()),
        lambda: x[x > 0],
        lambda: x.nonzero(),
        lambda: x[index],
        lambda: index.to(DEVICE),
        lambda: x.index_put_((there,), torch.tensor(1.0)),
        lambda: torch.tensor([1.0, 2.0], device=DEVICE),
    ):
        with pytest.raises(WaitsForDevice):
            wait()
    assert (x[index.to(DEVICE, non_blocking=True)] + torch.tensor(1.0)).shape == (2, 4)


def test_launches_of_an_augmented_batch(gpu, monkeypatch, tmp_path):
    """The host takes a few microseconds for each, in which a small model's step must fit."""
    words = "--aug strong --reprob 0.25 --bf16 --train_batch_size 128".split()
    _, _, batches = start(gpu, monkeypatch, tmp_path, *words)
    next(batches)
    gpu.launches.clear()
    next(batches)
    assert gpu.launches.total() < 800, dict(gpu.launches)
    batches.close()
