"""Training and evaluation speed of a model: this project, timm and a plain loop, taking turns in one process.

    python benchmarks/throughput.py --model_type ViT-Ti_16 --patch_size 2 --img_size 32 --train_batch_size 32 --bf16
    python benchmarks/throughput.py --model_type ViT-B_16 --img_size 224 --train_batch_size 128 --bf16 --compile
    git show HEAD~9:models/vit.py > before.py; python benchmarks/throughput.py --bf16 --vs before.py

Other flags go to train.py; what isn't given is its default, dropout included. The contestants:

  end to end      train.py's own update on images of fashionmnist-mini, or of --dataset: data, augmentation, AdamW
  in place        the same update on one batch that already lies on the device
  timm            a plain loop around timm's VisionTransformer of the same sizes, dropout and precision, one batch in
                  place; with or without torch's fused attention and channels_last, whichever is the fastest here when
                  not compiled
  plain           the same in the style of jeonsworld/ViT-pytorch: float32, three linear layers for q, k and v, softmax
                  spelled out
  --vs FILE       the same loop around the class of this model in another version of its file

Model FLOPs utilisation (MFU) counts 3 forward passes of counted FLOPs a training image, over the best that a large
matrix product reaches in the same precision, which takes turns with the others.
"""

import itertools
import runpy
import statistics
import tempfile
from argparse import Namespace
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from common import parser_of, rate, report, set_up, take_turns, times_faster, timm_vit
from torch import nn

from models import MODELS
from train import Trainer
from utils.device import DTYPES, autocast


class PlainBlock(nn.Module):
    """A block as the reference writes it."""

    def __init__(self, dim: int, heads: int, mlp_dim: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, nn.Dropout(dropout)
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(dim, mlp_dim), nn.Linear(mlp_dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm1(x)
        parts = self.query(y), self.key(y), self.value(y)
        q, k, v = (part.view(*y.shape[:2], self.heads, -1).permute(0, 2, 1, 3) for part in parts)
        weights = torch.softmax(torch.matmul(q, k.transpose(-1, -2)) / q.shape[-1] ** 0.5, dim=-1)
        y = torch.matmul(weights, v).permute(0, 2, 1, 3).contiguous().view(x.shape)
        x = x + self.out(y)
        return x + self.dropout(self.fc2(self.dropout(F.gelu(self.fc1(self.norm2(x))))))


class PlainViT(nn.Module):
    def __init__(
        self, image_size: int, patch_size: int, num_classes: int, dim: int, depth: int, heads: int, mlp_dim: int,
        dropout: float,
    ):  # fmt: skip
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.patch = nn.Conv2d(3, dim, patch_size, patch_size)
        self.cls = nn.Parameter(torch.zeros(1, 1, dim))
        self.position = nn.Parameter(torch.zeros(1, 1 + (image_size // patch_size) ** 2, dim))
        self.blocks = nn.Sequential(*[PlainBlock(dim, heads, mlp_dim, dropout) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch(x).flatten(2).transpose(-1, -2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1) + self.position
        return self.head(self.norm(self.blocks(self.dropout(x)))[:, 0])


class Peer:
    """A training step and an evaluation pass around somebody's model, on one batch in place."""

    def __init__(self, model: nn.Module, images: torch.Tensor, labels: torch.Tensor, precision: str):
        self.model, self.images, self.labels, self.precision = model, images, labels, precision
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)  # as train.py's

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


def peers(args: Namespace, config: dict, precision: str, images: torch.Tensor, vs: Path | None) -> dict[str, Peer]:
    """Models of the same sizes by others, on random labels."""
    device, found = images.device, {}
    labels = torch.randint(0, config["num_classes"], (len(images),), device=device)

    def peer(model: nn.Module, images: torch.Tensor = images, precision: str = precision) -> Peer:
        return Peer(model.to(device), images, labels, precision)

    if args.model_type.startswith("ViT"):
        sizes = {word: config[word] for word in "patch_size num_classes dim depth heads mlp_dim dropout".split()}
        sizes["image_size"] = args.img_size
        for fused, layout in itertools.product((True, False), ("contiguous_format", "channels_last")):
            name = f"timm, {'' if fused else 'not '}fused, {layout.removesuffix('_format')}, {precision}"
            layout = getattr(torch, layout)
            timm.layers.set_fused_attn(fused)
            model = timm_vit(**sizes).to(memory_format=layout)
            for block in model.blocks:
                block.attn.proj_drop.p = 0.0  # dropout where ours has it
            found[name] = peer(model, images.contiguous(memory_format=layout))
        tried = take_turns({name: one.step for name, one in found.items()}, device=device, rounds=1, seconds=0)
        best = min(tried, key=lambda name: min(tried[name]))
        found = {best: found[best]}
        found["plain, fp32"] = peer(PlainViT(**sizes), precision="fp32")
    if vs:
        words = {name: value for name, value in config.items() if name not in ("model_type", "cls", "norm_cls")}
        if args.norm_type == "LN":
            words.pop("norm_type", None)
        cls = MODELS[args.model_type]["cls" if args.norm_type == "LN" else "norm_cls"].split(":")[1]
        found[f"{vs.name}, {precision}"] = peer(runpy.run_path(str(vs))[cls](**words))
    for contestant in found.values() if args.compile else ():
        contestant.model.compile()
    return found


def main() -> None:
    parser = parser_of(__doc__, rounds=5, seconds=2.0, threads=torch.get_num_threads())
    parser.add_argument("--vs", type=Path, default=None, help="another version of the model's file, as a contestant")
    own, rest = parser.parse_known_args()
    torch.set_num_threads(own.threads)
    folder = tempfile.TemporaryDirectory()
    words = "--name speed --dataset fashionmnist-mini --memory_limit 8 --opt adamw".split()
    fed = set_up([*words, *rest], folder.name)
    args, device, test = fed.args, fed.device, fed.data.test
    batch_size, parts = args.train_batch_size, args.gradient_accumulation_steps
    held = Trainer(args, fed.processes, fed.data, source=None)
    for trainer in (fed, held):
        trainer.model.train()
    batches = fed.batches(stop=10**9)  # as at the beginning of an endless training, where --aug dems is strongest
    batch = list(itertools.islice(batches, parts))
    in_place = itertools.cycle(batch)
    test = test.part(torch.arange(min(len(test), 4 * args.eval_batch_size)))

    def evaluate() -> None:
        fed.score(fed.model, test)
        fed.model.train()

    first, second = (f"{name}, {fed.precision}" for name in ("end to end", "in place"))
    training = {first: lambda: fed.update(batches), second: lambda: held.update(in_place)}
    scoring = {first: evaluate}
    config = MODELS[args.model_type] | dict(dropout=fed.model.dropout) | fed.config  # of the flags or the model's own
    images = torch.cat([images for images, _ in batch]).float()
    for name, peer in peers(args, config, fed.precision, images, own.vs).items():
        training[name], scoring[name] = peer.step, peer.score
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device, dtype=DTYPES[fed.precision])
    alone = {"matmul": lambda: a @ b, "data and augmentation alone": lambda: list(itertools.islice(batches, parts))}
    trained = take_turns(training | alone, device=device, rounds=own.rounds, seconds=own.seconds)
    scored = take_turns(scoring, device=device, rounds=own.rounds, seconds=own.seconds)

    peak = 2 * n**3 / min(trained.pop("matmul"))
    flops = 1e9 * fed.gflops
    rows = []
    for name, seconds in trained.items():
        used = 3 * flops * batch_size / statistics.median(seconds) / peak
        images = len(test) if name == first else batch_size
        rows.append({
            "contestant": name,
            "training, images/s": rate(batch_size, seconds),
            "MFU, %": f"{100 * used:.0f}" if name.endswith(fed.precision) else "",
            "end to end / this": times_faster(trained[first], seconds),
            "evaluation, images/s": rate(images, scored[name]) if name in scored else "",
        })  # fmt: skip
    title = (
        f"{args.model_type}, norm {args.norm_type}, {args.img_size} px, patch {config['patch_size']}, "
        f"batch {batch_size}, dropout {config['dropout']}, --aug {args.aug}, {flops / 1e9:.2f} GFLOPs an image, "
        f"{'compiled' if args.compile else 'not compiled'}, peak {peak / 1e12:.2f} TFLOP/s"
    )
    if device.type == "cuda":
        title += f", peak memory of all together {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB"
    report(title, rows, device, own.json)


if __name__ == "__main__":
    main()
