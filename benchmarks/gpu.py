"""A GPU's turn in one command: whether all is right on it, how fast it is, and what the recipes reach.

    python benchmarks/gpu.py                   # 25 minutes in all, of which 9.5 now; the same command again goes on
    python benchmarks/gpu.py --minutes 60 --data_dir data --recipes vit_ti_cifar10_32     # more time: more is done
    python benchmarks/gpu.py --smoke           # all of it at toy size, also on a CPU: minutes on one core
    python benchmarks/gpu.py --markdown        # the tables for docs/speed.md, of what is in --json; needs no GPU

Every item is a process of its own; what fails is recorded with its last lines, and the next one begins. What was cut
off goes on next time, what failed is done again with --again. Exit status 1: something is not right on the device.
"""

import argparse
import contextlib
import copy
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from functools import partial
from itertools import groupby, pairwise
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from common import ROOT, machine, markdown, set_up, take_turns
from einops import rearrange
from torch import nn

from models import MODELS, NORM_TYPES, create_model
from utils import data_utils
from utils.device import autocast, choose_device
from utils.presets import DATASETS
from utils.run_files import read_records

SELF = [sys.executable, __file__]
ENDS = dict(correctness=0.25, throughput=0.65, ways=0.68, cell=0.82, accuracy=1.0)  # of --minutes, where a part ends
GRACE = 20  # seconds that train.py has for its last save
TOY = "--img_size 28 --patch_size 7 --dim 32 --depth 1 --heads 2 --mlp_dim 64".split()
THROUGHPUT = {
    "ViT-Ti, 32 px, patch 2, batch 256": "--model_type ViT-Ti_16 --patch_size 2 --img_size 32 --train_batch_size 256",
    "ViT-B_32, 224 px, batch 512": "--model_type ViT-B_32 --img_size 224 --train_batch_size 512",
    "ViT-B_16, 224 px, batch 128": "--model_type ViT-B_16 --img_size 224 --train_batch_size 128",
    "ViT-S_16, 224 px, batch 256": "--model_type ViT-S_16 --img_size 224 --train_batch_size 256",
    "ViT-L_16, 224 px, batch 64": "--model_type ViT-L_16 --img_size 224 --train_batch_size 64",
    "DEMS-Ti, 32 px, batch 256": "--model_type DEMS-Ti --img_size 32 --train_batch_size 256",
    "MViT-Ti, 32 px, batch 256": "--model_type MViT-Ti --img_size 32 --train_batch_size 256",
}
# Relative errors without TF32, which alone makes 3e-4. On a CPU they are 2e-6, 3e-3 and 2e-2 at most.
BOUNDS = dict(fp32=5e-5, fp16=1e-2, bf16=5e-2)


def use_tf32(on: bool) -> None:
    torch.set_float32_matmul_precision("high" if on else "highest")
    torch.backends.cudnn.allow_tf32 = on


def relative(ours: list[torch.Tensor], reference: list[torch.Tensor]) -> float:
    """‖ours - reference‖ / ‖reference‖ over all of their numbers; NaN where one is."""
    error = size = 0.0
    for pair in zip(ours, reference, strict=True):
        a, b = (each.detach().cpu().double() for each in pair)
        error, size = error + (a - b).square().sum().item(), size + b.square().sum().item()
    return math.sqrt(error / size)


def verdict(check: str, figure: float, bound: float) -> dict:
    return {"check": check, "figure": f"{figure:.2g}", "at most": f"{bound:.2g}", "ok": figure <= bound}


def published(device: torch.device, toy: bool) -> Iterator[dict]:
    """The tests of outputs of published implementations, in float32, with their models on the device."""
    import pytest

    rows, errors = [], []
    torch.zeros(1, device=device)  # tests/conftest.py hides GPUs from what is not started yet
    use_tf32(False)

    def on_device(*args, **words) -> nn.Module:
        model = create_model(*args, **words).to(device)
        for name in {"forward", "forward_features", "attention_maps"} & {*dir(model)}:
            method = getattr(model, name)
            setattr(model, name, lambda x, *args, method=method, **words: method(x.to(device), *args, **words))
        return model

    def assert_close(actual: torch.Tensor, expected, atol: float = 1e-5) -> None:
        errors.append((actual.detach().cpu() - torch.as_tensor(expected)).abs().max().item())
        assert errors[-1] <= atol

    class Plugin:
        @pytest.fixture(autouse=True)
        def placed(self, request, monkeypatch):
            monkeypatch.setattr(request.module, "create_model", on_device)
            monkeypatch.setattr(request.module, "assert_close", assert_close)
            errors.clear()

        def pytest_runtest_logreport(self, report):
            if report.when == "call":
                name = report.nodeid.partition("::")[2]
                rows.append(verdict(f"{name}, largest error", max(errors, default=math.nan), 1e-5))
                rows[-1]["ok"] = report.passed

    words = [str(ROOT / "tests" / "test_models.py"), "-k", "_reference", "-p", "no:cacheprovider"]
    if pytest.main(words, plugins=[Plugin()]) not in (0, 1):
        raise RuntimeError("pytest ran no test")
    yield from rows


def in_float64(device: torch.device, toy: bool) -> Iterator[dict]:
    """Logits and gradients of every model against the same weights on the CPU in float64."""
    kinds = {name: (name, {}) for name in MODELS}
    kinds |= {f"ViT-Ti_16, {norm}": ("ViT-Ti_16", dict(norm_type=norm)) for norm in NORM_TYPES[1:]}
    kinds |= {f"{name}, conv stem": (name, dict(conv_stem=True)) for name in ("ViT-Ti_16", "DEMS-Ti")}
    kinds |= {"ViT-Ti_16, residual stem": ("ViT-Ti_16", dict(residual_stem=True))}
    use_tf32(False)
    for name, (model_type, words) in kinds.items():
        patch, hybrid = MODELS[model_type]["patch_size"], "stem_depths" in MODELS[model_type]
        words = words | dict(image_size=32 if patch == 2 else 224) | (dict(stem_depths=(1, 1, 1)) if hybrid else {})
        if toy:
            words |= dict(image_size=patch * (8 if patch == 2 else 2), dim=48, depth=2, heads=4, mlp_dim=96)
            words |= dict(merge_layer=(1, 2)) if "merge_layer" in MODELS[model_type] else {}
        loose = 10 if hybrid or "residual_stem" in words else 1  # of gradients: rounding flips ReLUs and maxima
        row, ok, errors = {"logits, gradients: relative error": name}, True, {}
        try:
            errors = errors_of(device, model_type, words)
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {error}")
        for precision, bound in BOUNDS.items():
            logits, gradients = errors.get(precision, (math.nan, math.nan))
            row[f"{precision}, at most {bound:g}"] = f"{logits:.1e}, {gradients:.1e}"
            ok = ok and logits <= bound and gradients <= bound * loose
        yield row | {"ok": ok}


def errors_of(device: torch.device, model_type: str, words: dict) -> dict[str, tuple[float, float]]:
    """For each precision the relative errors of logits and gradients, in training mode without dropout."""
    torch.manual_seed(0)
    with device:
        fresh = create_model(model_type, num_classes=10, dropout=0.0, **words)
    for vector in (parameter for parameter in fresh.parameters() if parameter.ndim == 1):
        vector.data += 0.1 * torch.randn_like(vector)  # so that layer scale, 1e-4 at first, hides no block
    images, weights = torch.randn(2, 3, *fresh.image_size), torch.randn(2, 10)

    def results(model: nn.Module, precision: str, images: torch.Tensor) -> tuple[list, list]:
        with autocast(images.device, precision):
            logits = model(images)
        (logits * weights.to(logits.device)).sum().backward()  # not in half precision
        return [logits], [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    reference = results(copy.deepcopy(fresh).cpu().double(), "fp32", images.double())
    found = {name: results(copy.deepcopy(fresh), name, images.to(device)) for name in BOUNDS}
    return {name: tuple(map(relative, ours, reference)) for name, ours in found.items()}


def train_run(folder: Path, words: str, toy: bool, stop: int = 0, tf32: bool = True) -> list[torch.Tensor]:
    """Begin or continue a run of train.py; the losses of its steps, and the weights after them."""
    flags = "--name check --dataset fashionmnist-mini --model_type ViT-Ti_16 --img_size 28 --patch_size 4 --lr 0.001 "
    flags += f"--train_batch_size 64 --num_steps 20 --eval_every 1000 {words}"
    trainer = set_up([*flags.split(), *(TOY if toy else [])], folder)
    use_tf32(tf32)
    update, losses, interrupt = trainer.update, [], SimpleNamespace(signum=0)

    def watched(batches) -> tuple[torch.Tensor, torch.Tensor]:
        loss, norm = update(batches)
        losses.append(loss)
        interrupt.signum = signal.SIGINT if trainer.progress.step == stop else 0  # as after Ctrl-C
        return loss, norm

    trainer.update = watched
    trainer.begin_or_resume()
    trainer.train(interrupt)
    return [*losses, *trainer.model.parameters()]


def repeating(device: torch.device, toy: bool) -> Iterator[dict]:
    """Runs that are the same to the bit, if a run and the same again are."""
    exact = "CUBLAS_WORKSPACE_CONFIG" in os.environ
    torch.use_deterministic_algorithms(exact, warn_only=True)
    kind = "deterministic algorithms" if exact else "as train.py is"
    words = "--bf16 --opt adamw --aug strong --reprob 0.25 --mixup 0.8 --drop_path 0.1 --ema_decay 0.9"
    with tempfile.TemporaryDirectory() as folder:
        ahead, data_utils._ahead = data_utils._ahead, lambda batches, device: batches
        plain, again = (train_run(Path(folder) / name, words, toy) for name in ("plain", "again"))
        data_utils._ahead = ahead
        whole = train_run(Path(folder) / "whole", words, toy)
        half = train_run(Path(folder) / "parts", words, toy, stop=10)[:10]
        parts = half + train_run(Path(folder) / "parts", words, toy)
    noise = relative(again, plain)
    yield verdict(f"a run again, {kind}", noise, 1e-2)
    yield verdict(f"with and without a stream for batches, {kind}", relative(whole, plain), 10 * noise)
    yield verdict(f"resumed after half of the steps, {kind}", relative(parts, whole), 10 * noise)


def training(device: torch.device, toy: bool) -> Iterator[dict]:
    """Accumulation, float16 and --compile."""
    words = "--opt sgd --lr 0.01 --dropout 0"
    with tempfile.TemporaryDirectory() as folder:
        whole = train_run(Path(folder) / "whole", words, toy, tf32=False)
        parts = train_run(Path(folder) / "parts", f"{words} --gradient_accumulation_steps 2", toy, tf32=False)
        yield verdict("batches of 2 x 32 instead of 64, losses and weights in fp32", relative(parts, whole), 1e-5)
        losses = train_run(Path(folder) / "half", "--fp16 --opt adamw --lr 0.003 --aug flip --num_steps 100", toy)
        begin, end = (torch.stack(losses[i : i + 10]).mean().item() for i in (0, 90))
        yield verdict("--fp16: mean loss of steps 91-100 / of 1-10", end / begin, 0.9)
        compiled = train_run(Path(folder) / "compiled", f"{words} --compile", toy, tf32=False)
        yield verdict("--compile, losses and weights in fp32", relative(compiled, whole), 1e-5)


def throughput_row(name: str, path: Path) -> list[dict]:
    """benchmarks/throughput.py's table as one row."""
    found = json.loads(path.read_text())

    def cell(contestant: str, column: str) -> str:
        return next((row[column] for row in found["rows"] if row["contestant"].startswith(contestant)), "")

    training, evaluation, mfu = "training, images/s", "evaluation, images/s", "MFU, %"
    row = {"bf16": name, training: cell("end to end", training), "batch in place": cell("in place", training)}
    row |= {"timm": cell("timm", training), mfu: cell("end to end", mfu), "timm's MFU, %": cell("timm", mfu)}
    row |= {evaluation: cell("end to end", evaluation), "timm's": cell("timm", evaluation)}
    return [row | {"peak, TFLOP/s": found["title"].partition("peak ")[2].partition(" TFLOP")[0]}]


def ways(device: torch.device, toy: bool) -> Iterator[dict]:
    """What the models do on a GPU against what they do on a CPU, both here."""

    def row(what: str, *steps: Callable[[], torch.Tensor]) -> dict:
        def step(forward: Callable[[], torch.Tensor]) -> None:
            with autocast(device, "bf16"):
                y = forward()
            y.backward(torch.ones_like(y))

        words = dict(device=device, rounds=2 if toy else 7, seconds=0.01 if toy else 0.3)
        taken = take_turns({i: partial(step, forward) for i, forward in enumerate(steps)}, **words)
        gpu, cpu = (1000 * statistics.median(seconds) for seconds in taken.values())
        row = {"forward and backward, bf16": what, "as on a GPU, ms": f"{gpu:.3f}", "as on a CPU, ms": f"{cpu:.3f}"}
        return row | {"CPU's way / GPU's": cpu / gpu}

    sizes = {"ViT-B_32, batch 128": (128, 224, 32, 768), "ViT-Ti, 32 px, patch 2, batch 256": (256, 32, 2, 192)}
    for name, (batch, size, p, dim) in ({"toy": (2, 8, 2, 8)} if toy else sizes).items():
        proj = nn.Conv2d(3, dim, p, p, device=device)
        x = torch.randn(batch, 3, size, size, device=device, dtype=torch.bfloat16)  # as augmented with --bf16
        positions = nn.Parameter(torch.randn(1, (size // p) ** 2, dim, device=device))  # a sum in the model's layout

        def convolution(proj=proj, x=x, positions=positions) -> torch.Tensor:
            return rearrange(proj(x), "b d h w -> b (h w) d") + positions

        def product(proj=proj, x=x, positions=positions, p=p) -> torch.Tensor:
            y = rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p)
            return F.linear(y, proj.weight.flatten(1), proj.bias) + positions

        yield row(f"patch embedding, {name}: convolution, one product", convolution, product)

    x = torch.randn((2, 5, 8) if toy else (256, 257, 768), device=device, dtype=torch.bfloat16, requires_grad=True)

    def sixteen_bits() -> torch.Tensor:
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=device).random_(-(2**63), None)
        keep = bits.view(torch.int16)[: x.numel()].view(x.shape).ge_(round(0.1 * 2**16) - 2**15)
        return x * keep.to(x.dtype).mul_(1 / 0.9)

    yield row(f"dropout of {tuple(x.shape)}: F.dropout, 16 bits an element", lambda: F.dropout(x, 0.1), sixteen_bits)


def cell(device: torch.device, toy: bool) -> Iterator[dict]:
    """20,000 steps of ViT-B_32 by the time of 500, an evaluation of 10,000 images every 100 included."""
    sizes = dict(train=64, test=32) if toy else dict(train=50000, test=10000)  # CIFAR-10's

    def random_images(root: Path) -> tuple[dict, list[str]]:
        images = {name: torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8) for name, n in sizes.items()}
        return {name: (x, torch.arange(len(x)) % 10) for name, x in images.items()}, [*map(str, range(10))]

    DATASETS["random"] = dict(read=random_images)
    steps, every, compiled = (10, 2, "") if toy else (500, 100, " --compile")
    for words in ("--norm_type LN", "--norm_type Rescale", f"--norm_type LN --bf16{compiled}"):
        flags = f"@{ROOT}/recipes/rescalevit_cifar10.args --dataset random --num_steps {steps} --eval_every {every} "
        flags += words
        with tempfile.TemporaryDirectory() as folder:
            trainer = set_up([*flags.split(), *(TOY if toy else [])], folder)
            trainer.begin_or_resume()
            trainer.train(SimpleNamespace(signum=0))
            times = [record["seconds"] for record in read_records(trainer.files.json)[0] if record["event"] == "eval"]
        usual = statistics.median(later - earlier for earlier, later in pairwise(times))
        row = {"recipes/rescalevit_cifar10.args": words, f"first {every} steps, evaluation, s": times[0]}
        yield row | {"the same later, s": usual, "20,000 steps, min": (times[0] + (20000 / every - 1) * usual) / 60}


def accuracy_row(recipe: str, seed: int, folder: Path) -> list[dict]:
    """What a run of train.py, finished or not, has reached."""
    records = read_records(next(folder.glob(f"{recipe}_*_seed_{seed}.jsonl")))[0]
    steps, last = records[0]["settings"]["num_steps"], [each for each in records if each["event"] == "eval"][-1]
    row = {"recipe": f"{recipe}, {records[0]['images'][0]:,} images", "seed": seed}
    row |= {"steps": f"{last['step']:,} of {steps:,}"}
    return [row | {"last, %": 100 * last["accuracy"], "best, %": 100 * last["best"], "minutes": last["seconds"] / 60}]


# Items of this file: function, part, seconds that it should take, and what is set in its environment.
CHILDREN = {
    "published": (published, "correctness", 30, ""),
    "in_float64": (in_float64, "correctness", 120, ""),
    "repeating": (repeating, "correctness", 60, ""),
    "repeating, deterministic": (repeating, "correctness", 60, "CUBLAS_WORKSPACE_CONFIG=:4096:8"),
    "training": (training, "correctness", 90, ""),
    "ways": (ways, "ways", 30, ""),
    "cell": (cell, "cell", 180, ""),
}


# A process of a part: its name, seconds that it should take, its words, and a function that reads rows from its path.
Item = namedtuple("Item", "part name seconds command path read")


def plan(args: argparse.Namespace) -> list[Item]:
    """All that there is to do, in order."""
    items, toy, device = [], TOY if args.smoke else [], ["--device", args.device]
    for name, (_, part, seconds, setting) in CHILDREN.items():
        path = args.runs / f"{name}.json"
        command = ["env", *setting.split(), *SELF, "--child", name, "--json", path, *device, *["--smoke"] * bool(toy)]
        items.append(Item(part, name, seconds, command, path, lambda path: json.loads(path.read_text())))
    speed = ["env", "TORCHDYNAMO_DISABLE=1"] if toy else []  # as `training` compiles, for a minute on a CPU
    speed += [sys.executable, ROOT / "benchmarks" / "throughput.py", *device, "--bf16"]
    speed += ["--rounds", "1" if toy else "3", "--seconds", "0.01" if toy else "0.5"]
    for how, flags, seconds in (("eager", [], 40), ("compiled", ["--compile"], 200)):
        for model, words in [*THROUGHPUT.items()][: 1 if toy else None]:
            name = f"{model}, {how}"
            path = args.runs / f"{name}.json"
            command = [*speed, *words.split(), *flags, *toy, "--json", path]
            items.append(Item("throughput", name, seconds, command, path, partial(throughput_row, name)))
    data = ["--data_dir", args.data_dir] if args.data_dir else []
    data += ["--dataset", "imagefolder"] if data and not any(args.data_dir.glob("cifar-10*")) else []
    for seed in range(1, 2 if toy else 6):
        for recipe in args.recipes or (["rescalevit_cifar10", "vit_ti_cifar10_32"] if data else ["demo"]):
            command = [sys.executable, ROOT / "train.py", f"@{ROOT}/recipes/{recipe}.args", *data, *device, *toy]
            command += ["--num_steps", "20", "--eval_every", "10"] if toy else []
            command += ["--overwrite"] if args.again else []
            command += ["--name", recipe, "--seed", seed, "--output_dir", args.runs, "--log_dir", args.runs / "logs"]
            read = partial(accuracy_row, recipe, seed)
            items.append(Item("accuracy", f"{recipe}, seed {seed}", 40, command, args.runs, read))
    return sorted(items, key=lambda item: list(ENDS).index(item.part))


def carry_out(item: Item, limit: float) -> dict:
    """Run an item for so many seconds at most: its state (done, failed, unfinished), rows, seconds, and last lines."""
    began, state = time.monotonic(), "unfinished"
    if item.path.is_file():  # of an earlier time
        item.path.unlink()
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        command, streams = [*map(str, item.command)], dict(stdout=output, stderr=subprocess.STDOUT)
        process = subprocess.Popen(command, cwd=ROOT, process_group=0, **streams)
        try:
            state = "failed" if process.wait(limit) else "done"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
        finally:
            with contextlib.suppress(ProcessLookupError):  # nobody of the item is left
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        says, rows = [line for line in output.read().splitlines() if line.strip()][-5:], []
    with contextlib.suppress(OSError, LookupError, StopIteration, ValueError):  # there are none yet
        rows = item.read(item.path)
    if not all(row.get("ok", True) for row in rows) or (state == "done" and not rows):
        state = "failed"
    return dict(part=item.part, state=state, seconds=time.monotonic() - began, rows=rows, says=says)


def tables(items: dict[str, dict]) -> None:
    """Print what there is, as Markdown."""
    for part in ENDS:
        found = {name: item for name, item in items.items() if item["part"] == part}
        if found:
            print(f"\n### {part.capitalize()}\n\n{'; '.join({item['machine']: 0 for item in found.values()})}\n")
        for _, alike in groupby((row for item in found.values() for row in item["rows"]), key=tuple):
            print(f"{markdown(list(alike))}\n")
        for name, item in found.items():
            if item["state"] != "done":
                print(f"- {name}: {item['state']}; {' '.join(item['says'][-1:])}")


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=25, help="in all, over all commands [25]")
    parser.add_argument("--slice", type=float, default=9.5, help="minutes after which this command ends [9.5]")
    parser.add_argument("--data_dir", type=Path, help="CIFAR-10, as an image folder or in torchvision's format")
    parser.add_argument("--recipes", nargs="+", help="[rescalevit_cifar10 vit_ti_cifar10_32; demo without --data_dir]")
    parser.add_argument("--only", nargs="+", default=[*ENDS], help=f"parts ({', '.join(ENDS)}) or items, by name")
    again = "do anew what is done or failed; without it again to go on"
    parser.add_argument("--again", action="store_true", help=again)
    parser.add_argument("--smoke", action="store_true", help="toy sizes; also on a CPU")
    parser.add_argument("--markdown", action="store_true", help="print the tables of what is in --json, and do nothing")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, help="[benchmarks/speed/gpu.json; with --smoke RUNS/results.json]")
    parser.add_argument("--runs", type=Path, help="for what the items write [output/gpu; output/gpu-smoke]")
    parser.add_argument("--child", choices=CHILDREN, help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    if args.child:
        rows = []
        for row in CHILDREN[args.child][0](choose_device(args.device), args.smoke):
            rows.append(row)
            args.json.write_text(json.dumps(rows))  # what there is if it is cut off
        return 0
    args.runs = (args.runs or ROOT / "output" / ("gpu-smoke" if args.smoke else "gpu")).resolve()
    path = args.json or (args.runs / "results.json" if args.smoke else ROOT / "benchmarks" / "speed" / "gpu.json")
    kept = json.loads(path.read_text()) if path.exists() else {}
    if args.markdown:
        if not kept:
            parser.error(f"{path}: no results yet; leave out --markdown on a machine with a GPU")
        tables(kept)
        return 0
    if args.device == "auto" and not args.smoke and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --smoke tries all of it at toy size, on a CPU too")
    everything = plan(args)
    if unknown := {*args.only} - {*ENDS} - {item.name for item in everything}:
        parser.error(f"--only {' '.join(unknown)}: there are {'; '.join([*ENDS, *(item.name for item in everything)])}")
    items = [item for item in everything if {item.part, item.name} & {*args.only}]
    if args.again:
        kept = {name: item for name, item in kept.items() if name not in {item.name for item in items}}
    for folder in (args.runs, path.parent):
        folder.mkdir(parents=True, exist_ok=True)
    began, fresh = time.monotonic(), dict(state="unfinished", seconds=0)
    here = machine(choose_device(args.device)) + ("; toy sizes" if args.smoke else "")
    for late in (False, True):  # at last what its part had no time for
        for item in items:
            before, whole = kept.get(item.name, fresh), 60 * args.minutes
            used = sum(each["seconds"] for each in kept.values())
            left = min(whole - used, 60 * args.slice - GRACE - (time.monotonic() - began))
            own = left if late else min(left, whole * ENDS[item.part] - used)
            if before["state"] != "unfinished" or own < item.seconds:
                continue
            print(f"{item.part}: {item.name} ...", flush=True)
            limit = left if item.part == "accuracy" else min(left, 4 * item.seconds)
            done = carry_out(item, limit) | {"machine": here}
            if done["state"] == "unfinished" and limit < left:
                done |= dict(state="failed", says=[f"not done after {limit:.3g} s"])
            print(f"  {done['state']}, {done['seconds']:.0f} s", flush=True)
            kept[item.name] = done | {"seconds": before["seconds"] + done["seconds"]}
            path.with_suffix(".tmp").write_text(json.dumps(kept, indent=1) + "\n")
            os.replace(path.with_suffix(".tmp"), path)  # whole, whenever this process is killed
    tables(kept)
    if missing := [item.name for item in items if kept.get(item.name, fresh)["state"] == "unfinished"]:
        print(f"\nNot done yet: {'; '.join(missing)}. The same command goes on; once --minutes are over, with more.")
    wrong = [name for name, item in kept.items() if item["part"] == "correctness" and item["state"] == "failed"]
    print(f"\nNot right: {'; '.join(wrong)}" if wrong else "\nNothing found wrong.")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
