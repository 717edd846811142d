"""Training and evaluation speed of a model: this project, timm and a plain loop, taking turns in one process.

    python benchmarks/throughput.py --model_type ViT-Ti_16 --patch_size 2 --img_size 32 --train_batch_size 32 --bf16
    python benchmarks/throughput.py --model_type ViT-B_16 --img_size 224 --train_batch_size 128 --bf16 --compile

Other flags go to train.py. The contestants:

  end to end      train.py's own update on images of fashionmnist-mini, or of --dataset: data, augmentation, AdamW
  in place        the same update on one batch that already lies on the device
  timm            a plain loop around timm's VisionTransformer of the same sizes and precision, one batch in place
  plain           the same in the style of jeonsworld/ViT-pytorch: float32, three linear layers for q, k and v, softmax
                  spelled out

Model FLOPs utilisation (MFU) counts 3 forward passes of counted FLOPs a training image, over --peak, or where that is
not given over what a large matrix product reaches here in the same precision.
"""

import argparse
import itertools
import statistics
import tempfile
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from common import batches_of, rate, report, set_up, take_turns, times_faster
from torch import nn

from models import MODELS
from train import Trainer
from utils.device import DTYPES, autocast


class PlainBlock(nn.Module):
    """A block as the reference writes it."""

    def __init__(self, dim: int, heads: int, mlp_dim: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(dim, mlp_dim), nn.Linear(mlp_dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm1(x)
        q, k, v = (
            layer(y).view(*y.shape[:2], self.heads, -1).permute(0, 2, 1, 3)
            for layer in (self.query, self.key, self.value)
        )
        weights = torch.softmax(torch.matmul(q, k.transpose(-1, -2)) / q.shape[-1] ** 0.5, dim=-1)
        y = torch.matmul(weights, v).permute(0, 2, 1, 3).contiguous().view(x.shape)
        x = x + self.out(y)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class PlainViT(nn.Module):
    def __init__(
        self, image_size: int, patch_size: int, num_classes: int, dim: int, depth: int, heads: int, mlp_dim: int
    ):
        super().__init__()
        self.patch = nn.Conv2d(3, dim, patch_size, patch_size)
        self.cls = nn.Parameter(torch.zeros(1, 1, dim))
        self.position = nn.Parameter(torch.zeros(1, 1 + (image_size // patch_size) ** 2, dim))
        self.blocks = nn.Sequential(*[PlainBlock(dim, heads, mlp_dim) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch(x).flatten(2).transpose(-1, -2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])


class Peer:
    """A training step and an evaluation pass around somebody's model, on one batch in place."""

    def __init__(self, model: nn.Module, images: torch.Tensor, labels: torch.Tensor, precision: str):
        self.model, self.images, self.labels, self.precision = model, images, labels, precision
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def forward(self) -> torch.Tensor:
        with autocast(self.images.device, self.precision):
            return self.model(self.images)

    def step(self) -> None:
        self.model.train()
        F.cross_entropy(self.forward().float(), self.labels).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def score(self) -> torch.Tensor:
        self.model.eval()
        return (self.forward().argmax(dim=1) == self.labels).sum()


def matmul_rate(device: torch.device, precision: str) -> float:
    """FLOP/s of a large matrix product."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device, dtype=DTYPES[precision])
    seconds = take_turns({"matmul": lambda: a @ b}, device=device, seconds=0.5)["matmul"]
    return 2 * n**3 / min(seconds)


def peers(args: argparse.Namespace, config: dict, precision: str, images: torch.Tensor) -> dict[str, Peer]:
    """Models of the same sizes by others, on random labels."""
    classes = config["num_classes"]
    sizes = {name: config[name] for name in ("patch_size", "dim", "depth", "heads", "mlp_dim")}
    labels = torch.randint(0, classes, (len(images),), device=images.device)
    theirs = timm.models.VisionTransformer(
        img_size=args.img_size,
        patch_size=sizes["patch_size"],
        num_classes=classes,
        embed_dim=sizes["dim"],
        depth=sizes["depth"],
        num_heads=sizes["heads"],
        mlp_ratio=sizes["mlp_dim"] / sizes["dim"],
    ).to(images.device)
    if args.compile:
        theirs.compile()
    plain = PlainViT(image_size=args.img_size, num_classes=classes, **sizes).to(images.device)
    return {
        f"timm, {precision}": Peer(theirs, images, labels, precision),
        "plain, fp32": Peer(plain, images, labels, "fp32"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="each turn of each contestant [2]")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--peak", type=float, default=None, help="of the device at this precision, in TFLOP/s")
    parser.add_argument("--json", type=Path, default=None)
    own, rest = parser.parse_known_args()
    if own.threads:
        torch.set_num_threads(own.threads)
    folder = tempfile.TemporaryDirectory()
    words = "--name speed --dataset fashionmnist-mini --memory_limit 8 --opt adamw --dropout 0".split()
    words += ["--output_dir", folder.name, "--log_dir", folder.name, *rest]
    fed = set_up(words)
    args, device, test = fed.args, fed.device, fed.data.test
    batch_size, parts = args.train_batch_size, args.gradient_accumulation_steps
    held = Trainer(args, fed.processes, fed.data, source=None)
    fed.model.train(), held.model.train()
    batches = batches_of(fed, stop=10**9)  # as at the beginning of an endless training, where --aug dems is strongest
    batch = list(itertools.islice(batches, parts))
    in_place = itertools.cycle(batch)
    test = test.part(torch.arange(min(len(test), 4 * args.eval_batch_size)))

    def evaluate() -> None:
        fed.score(fed.model, test)
        fed.model.train()

    first, second = (f"{name}, {fed.precision}" for name in ("end to end", "in place"))
    training = {first: lambda: fed.update(batches), second: lambda: held.update(in_place)}
    scoring = {first: evaluate}
    config = MODELS[args.model_type] | fed.config
    if args.model_type.startswith("ViT"):
        images = torch.cat([images for images, _ in batch]).float()
        for name, peer in peers(args, config, fed.precision, images).items():
            training[name], scoring[name] = peer.step, peer.score
    training["data and augmentation alone"] = lambda: list(itertools.islice(batches, parts))
    trained = take_turns(training, device=device, rounds=own.rounds, seconds=own.seconds)
    scored = take_turns(scoring, device=device, rounds=own.rounds, seconds=own.seconds)

    peak = own.peak * 1e12 if own.peak else matmul_rate(device, fed.precision)
    flops = 1e9 * fed.gflops
    rows = []
    for name, seconds in trained.items():
        used = 3 * flops * batch_size / statistics.median(seconds) / peak
        images = len(test) if name == first else batch_size
        rows.append(
            {
                "contestant": name,
                "training, images/s": rate(batch_size, seconds),
                "MFU, %": f"{100 * used:.0f}" if name.endswith(fed.precision) else "",
                "end to end / this": times_faster(trained[first], seconds),
                "evaluation, images/s": rate(images, scored[name]) if name in scored else "",
            }
        )
    title = (
        f"{args.model_type}, norm {args.norm_type}, {args.img_size} px, "
        f"patch {config['patch_size']}, "
        f"batch {batch_size}, --aug {args.aug}, {flops / 1e9:.2f} GFLOPs an image, "
        f"{'compiled' if args.compile else 'not compiled'}, peak {peak / 1e12:.2f} TFLOP/s"
    )
    if device.type == "cuda":
        title += f", peak memory of all together {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB"
    report(title, rows, device, own.json)


if __name__ == "__main__":
    main()
