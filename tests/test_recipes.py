"""Every recipe says what its source published, and runs."""

import copy
import math
import re
import shlex
from functools import partial

import numpy as np
import pytest
import torch
from helpers import ROOT, SIZES, accept_any_cifar, places, write_cifar10, write_cifar100, write_google_npz

import train
from benchmarks.common import set_up
from models import create_model
from utils import options
from utils.log_util import gflops
from utils.run_files import RunFiles, run_id

RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.args"))

GOOGLE = dict(
    aug="crop",
    scale=[0.05, 1],
    interpolation="bilinear",
    normalize="half",
    opt="sgd",
    learning_rate=0.03,
    weight_decay=0,
    train_batch_size=512,
    warmup_steps=500,
    decay_type="cosine",
    max_grad_norm=1,
    mixup=0,
    cutmix=0,
    smoothing=0,
)
SWEEP = GOOGLE | dict(
    dataset="cifar10",
    model_type="ViT-B_32",
    img_size=224,
    train_batch_size=128,
    num_steps=20000,
    warmup_steps=None,  # train.py's own 500, so that a sweep with fewer --num_steps gets a shorter warm-up
    eval_every=100,
    fp16=True,
)
MIXED = dict(
    mixup=0.8,
    cutmix=1,
    mixup_prob=1,
    mixup_switch_prob=0.5,
    smoothing=0.1,
    opt="adamw",
    weight_decay=0.05,
    decay_type="cosine",
    img_size=32,
    patch_size=2,
    dataset="cifar10",
)
DEMS = MIXED | dict(
    aug="dems",
    scale=[0.2, 1],
    interpolation="bicubic",
    normalize="imagenet",
    drop_path=0.15,
    attn_drop=0.05,
    train_batch_size=256,
    epochs=800,
    warmup_epochs=10,
    learning_rate=5e-4,
    min_lr=1e-6,
    decay_by="epoch",
)
DEMS_FINE = DEMS | dict(
    aug="none",
    scale=None,
    interpolation="bilinear",
    drop_path=0.2,
    epochs=100,
    warmup_epochs=0,
    learning_rate=1e-3,
    attn_drop=0,
)
STUDY = MIXED | dict(
    aug="strong",
    interpolation="bicubic",
    normalize="cifar",
    min_lr=1e-5,
    crop_pct=0.875,
    decay_by="step",
    decay_type="timm",
    attn_drop=0,  # the study's flag for it is swallowed
    disable_weight_decay_on_bias_norm=True,
    weight_decay_on_all=False,
)
VIT = STUDY | dict(
    model_type="ViT-Ti_16",
    scale=[0.8, 1],
    reprob=0.1,
    ra=3,
    train_batch_size=256,
    epochs=200,
    warmup_epochs=10,
    learning_rate=1e-3,
    warmup_lr=1e-6,
    dropout=0,
    init="timm",
)
LONG = STUDY | dict(scale=[0.2, 1], reprob=0.25, train_batch_size=1024, epochs=800, learning_rate=2e-3)
FINE = LONG | dict(
    aug="weak",
    scale=[1, 1],
    reprob=0,
    epochs=100,
    learning_rate=4e-3,
    drop_path=0.2,
    disable_weight_decay_on_bias_norm=False,  # there, a flag of that name has the opposite effect
    weight_decay_on_all=True,
)
MVIT = dict(model_type="MViT-Ti", img_sizes=[16, 32], warmup_epochs=0)
KERAS = dict(dataset="cifar100", model_type="ViT-B_16", aug="keras", scale=[0.8, 1])

PUBLISHED = {
    "vit_b32_cifar10_224": GOOGLE | dict(dataset="cifar10", model_type="ViT-B_32", img_size=224, num_steps=1000),
    "vit_b32_cifar10_384": GOOGLE | dict(dataset="cifar10", model_type="ViT-B_32", img_size=384, num_steps=10000),
    "vit_l32_cifar100_384": GOOGLE | dict(dataset="cifar100", model_type="ViT-L_32", img_size=384, num_steps=10000),
    "rescalevit_cifar10": SWEEP | dict(norm_type="Rescale", learning_rate=0.05, pretrained_dir=None),
    "rescalevit_cifar10_pretrained": SWEEP | dict(norm_type="LN", learning_rate=0.03),
    "keras_cifar100": KERAS
    | dict(img_size=72, patch_size=6, dim=768, depth=12, heads=12, mlp_dim=3072, dropout=0.1, epochs=100)
    | dict(train_batch_size=256, gradient_accumulation_steps=16, learning_rate=1e-3),
    "keras_cifar100_finetune": KERAS
    | dict(img_size=384, train_batch_size=512, gradient_accumulation_steps=64, epochs=30),
    "dems_ti_cifar10": DEMS | dict(model_type="DEMS-Ti", aug_prob=0.6),
    "dems_s_cifar10": DEMS | dict(model_type="DEMS-S", aug_prob=0.8),
    "dems_ti_cifar10_finetune": DEMS_FINE | dict(model_type="DEMS-Ti"),
    "dems_s_cifar10_finetune": DEMS_FINE | dict(model_type="DEMS-S"),
    "vit_ti_cifar10_32": VIT,
    "vit_ti_cifar10_64": VIT | dict(img_size=64, patch_size=4),
    "dems_ti_multiscale": LONG | dict(model_type="DEMS-Ti", warmup_epochs=10, warmup_lr=1e-6, drop_path=0.2),
    "dems_ti_multiscale_finetune": FINE | dict(model_type="DEMS-Ti", warmup_epochs=10, warmup_lr=1e-6),
    "mvit_ti_multiscale": LONG | MVIT | dict(drop_path=0),
    "mvit_ti_multiscale_finetune": FINE | MVIT,
}


def parse(recipe: str, *more):
    words = [f"@{ROOT / 'recipes' / recipe}.args", *map(str, more)]
    with pytest.MonkeyPatch.context() as patch:  # recipes name weight files that a user downloads or trains first
        patch.setattr("os.path.isfile", lambda path: True)
        return options.parse_train_args(words)


def test_every_recipe_is_checked_against_its_source():
    own = {"demo": "fashionmnist-mini", "photos": "imagefolder"}
    own |= dict.fromkeys(["fast_vit_fashionmnist", "fast_dems_fashionmnist"], "fashionmnist")
    own |= dict.fromkeys(["fast_vit_cifar10", "fast_vit_cifar10_10min"], "cifar10")
    assert RECIPES == sorted([*PUBLISHED, *own])
    assert {recipe: parse(recipe).dataset for recipe in own} == own


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_settings_are_the_published_ones(recipe):
    args = parse(recipe)
    differing = {
        name: (getattr(args, name), value) for name, value in PUBLISHED[recipe].items() if getattr(args, name) != value
    }
    assert not differing
    text = (ROOT / "recipes" / f"{recipe}.args").read_text()
    assert text.startswith("# ") and "Published" in text and "Cost: " in text


SMALLER = dict(num_steps=2, warmup_steps=0) | SIZES  # and what follows from these
CHANGED = {*SMALLER, "epochs", "warmup_epochs", "train_batch_size", "learning_rate", "pretrained_dir"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """`trained(recipe)` -> files of a run of two steps, on small CIFAR sets and from small weights."""
    folder, made = tmp_path_factory.mktemp("recipes"), {}
    write_cifar10(folder, per_file=16)
    write_cifar100(folder, n=16)
    for patch, grid in ((16, 2), (32, 7)):
        write_google_npz(folder / f"{patch}.npz", **SIZES, patch=patch, grid=grid, classes=21)

    def get(recipe: str) -> RunFiles:
        if recipe in made:
            return made[recipe]
        published = parse(recipe)
        batch = published.gradient_accumulation_steps * (2 if published.mixup else 1)
        words = [word for name, value in SMALLER.items() for word in (f"--{name}", value)]
        words += ["--train_batch_size", max(8, batch), "--data_dir", folder]
        if published.model_type.startswith("DEMS"):
            words += ["--merge_layer", 1, 2, "--merge_num", 16, 8]
        if published.pretrained_dir and published.pretrained_dir.endswith(".npz"):
            words += ["--pretrained_dir", folder / f"{published.model_type.split('_')[1]}.npz"]
        elif published.pretrained_dir:  # the checkpoint of the recipe that goes before
            before = recipe.removesuffix("_finetune")
            assert published.pretrained_dir == f"output/{run_id(parse(before))}_checkpoint.bin"
            words += ["--pretrained_dir", get(before).best]
        args = parse(recipe, *words, *places(folder))
        assert train.main(args) == 0
        made[recipe] = RunFiles.of(args)
        return made[recipe]

    with pytest.MonkeyPatch.context() as patch:
        accept_any_cifar(patch)
        yield get


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_two_steps(recipe, trained):
    files = trained(recipe)
    start, end = files.record("start"), files.record("end")
    assert end["step"] == 2 and start["model"]["model_type"] == parse(recipe).model_type
    for name, value in PUBLISHED[recipe].items():
        if name not in CHANGED:
            assert start["settings"][name] == value, name


IMAGES = {"cifar10": 50_000, "cifar100": 50_000, "fashionmnist": 60_000, "fashionmnist-mini": 10_000}


@pytest.mark.parametrize("recipe", RECIPES)
def test_cost_as_a_run_counts_it(recipe):
    """Three times the forward pass an image, as docs/results.md has it; rounded."""
    found = re.search(r"([\d.,]+) ([TP])FLOP", (ROOT / "recipes" / f"{recipe}.args").read_text())
    if not found:  # photos are as many as there are
        return
    said = float(found[1].replace(",", "")) * {"T": 1e3, "P": 1e6}[found[2]]  # GFLOP
    args = parse(recipe)
    options.resolve_steps(args, IMAGES[args.dataset])
    with torch.device("meta"):
        model = create_model(**options.model_config(args), num_classes=10)
    cost = 3 * gflops(model, args.img_size) * args.num_steps * args.train_batch_size
    assert cost == pytest.approx(said, rel=0.09 if said < 1e4 else 0.03)
    minutes = re.search(r"([\d.]+) (minutes|hours) at 100 TFLOP/s", (ROOT / "recipes" / f"{recipe}.args").read_text())
    if minutes:
        assert cost / 1e5 / {"minutes": 60, "hours": 3600}[minutes[2]] == pytest.approx(float(minutes[1]), rel=0.08)


def test_sizes_of_the_multiscale_models():
    assert create_model("MViT-Ti", image_size=32, num_classes=10).image_sizes == [(16, 16), (32, 32)]


# --- the same losses as loops written from the papers' and projects' facts alone ---


def cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


def jeonsworld_rate(step: int, total: int, warmup: int, base: float) -> float:
    """Its scheduler steps before its optimizer, so the first update has number 1."""
    return base * (step / warmup if step < warmup else cosine((step - warmup) / (total - warmup)))


def timm_rate(step: int, total: int, warmup: int, base: float) -> float:
    done = step - 1
    return 1e-6 + (base - 1e-6) * done / warmup if done < warmup else 1e-5 + (base - 1e-5) * cosine(done / total)


def dems_rate(step: int, total: int, warmup: int, base: float) -> float:
    """By epochs, of which the warm-up has `warmup` and the run `total`, 5 steps each."""
    epoch = (step - 1) // 5
    rise = np.linspace(1e-6, base, warmup)
    return rise[epoch] if epoch < warmup else 1e-6 + (base - 1e-6) * cosine((epoch - warmup) / (total - warmup))


EXEMPT = ("cls_token", "pos_embed", "temporal_pos_embed", "attn_pool.latent")
ALL, BUT_VECTORS = dict(exempt=(), vectors=True), dict(exempt=(), vectors=False)  # what decays
STUDY = dict(exempt=EXEMPT, vectors=False)
PLAIN = "--dropout 0 --drop_path 0 --attn_drop 0 --train_batch_size 8"
STRONG = "--lr 5e-3 --weight_decay 1"  # so that 50 steps tell what decays, and when
REFERENCES = {  # flags, weight decay and what it is on, rate(step), clipping
    "vit_b32_cifar10_224": (
        "--weight_decay 0.1 --warmup_steps 20", 0.1, ALL, partial(jeonsworld_rate, total=50, warmup=20, base=0.03), 1.0
    ),
    "vit_ti_cifar10_32": (
        f"{STRONG} --warmup_epochs 1", 1, STUDY, partial(timm_rate, total=50, warmup=15, base=5e-3), None
    ),
    "mvit_ti_multiscale": (STRONG, 1, STUDY, partial(timm_rate, total=50, warmup=0, base=5e-3), None),
    "mvit_ti_multiscale_finetune": (STRONG, 1, ALL, partial(timm_rate, total=50, warmup=0, base=5e-3), None),
    "dems_ti_multiscale": (
        f"{STRONG} --warmup_epochs 3", 1, BUT_VECTORS, partial(timm_rate, total=50, warmup=15, base=5e-3), None
    ),
    "dems_ti_cifar10": (f"{STRONG} --warmup_epochs 3", 1, ALL, partial(dems_rate, total=10, warmup=3, base=5e-3), None),
}  # fmt: skip


@pytest.mark.parametrize("recipe", REFERENCES)
def test_losses_of_fifty_steps(recipe, tmp_path, monkeypatch):
    accept_any_cifar(monkeypatch)
    write_cifar10(tmp_path, per_file=8)
    flags, decay, decayed, rate, clip = REFERENCES[recipe]
    lines = (ROOT / "recipes" / f"{recipe}.args").read_text().splitlines()
    words = shlex.split("\n".join(line for line in lines if "pretrained_dir" not in line), comments=True)
    words = [word for word in words if word not in ("--bf16", "--fp16")]
    words += [*PLAIN.split(), *flags.split(), *(str(w) for name, value in SIZES.items() for w in (f"--{name}", value))]
    words += ["--data_dir", str(tmp_path), "--img_size", "32", "--patch_size", "4"]
    if "dems" in recipe:
        words += ["--patch_size", "2", "--merge_layer", "1", "2", "--merge_num", "16", "8"]
    images = 120 if "--ra" in words else 40
    words += ["--num_steps", "50"] if "vit_b32" in recipe else ["--epochs", repr(50 * 8 / images)]
    trainer = set_up(words, tmp_path)
    assert trainer.args.num_steps == 50 and trainer.precision == "fp32"

    model = copy.deepcopy(trainer.model)
    groups = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = name in decayed["exempt"] or (parameter.ndim < 2 and not decayed["vectors"])
            groups[not plain].append(parameter)
    groups = [dict(params=params, weight_decay=decay * on) for on, params in groups.items() if params]
    sgd = trainer.args.opt == "sgd"
    optimizer = torch.optim.SGD(groups, lr=1.0, momentum=0.9) if sgd else torch.optim.AdamW(groups, lr=1.0)
    batches = list(trainer.batches())
    ours, theirs = [], []
    given = iter([(images.clone(), labels.clone()) for images, labels in batches])
    for step, (images, labels) in enumerate(batches, 1):
        ours.append(trainer.update(given)[0].item())
        probabilities = labels if labels.is_floating_point() else torch.eye(10)[labels]
        smoothing = trainer.args.smoothing
        probabilities = probabilities * (1 - smoothing) + smoothing / 10
        loss = -(probabilities * model(images).log_softmax(dim=1)).sum(dim=1).mean()
        optimizer.zero_grad()
        loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        optimizer.step()
        theirs.append(loss.item())
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 1e-5
    assert abs(theirs[0] - theirs[-1]) > 1e-3  # something was learned, or the comparison says little


def test_timms_initialisation():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=10).state_dict()
    torch.manual_seed(0)
    model = create_model("ViT-Ti_16", num_classes=10, init="timm")
    for name, tensor in model.state_dict().items():
        if theirs[name].unique().numel() == 1:  # zeros and ones
            assert torch.equal(tensor, theirs[name]), name
            continue
        mean, std = tensor.mean().item(), tensor.std().item()
        error = theirs[name].std().item() / tensor.numel() ** 0.5
        assert abs(mean - theirs[name].mean().item()) < 6 * error, name
        assert std == pytest.approx(theirs[name].std().item(), rel=6 / tensor.numel() ** 0.5), name


def test_scales_of_mvit_start_almost_equal():
    model = create_model("MViT-Ti", image_size=32, num_classes=10)
    scales = model.temporal_pos_embed[0, :, 0].detach()
    assert (scales[1] - scales[0]).norm().item() == pytest.approx(2.3e-4, rel=0.02)
