"""Every recipe says what its source published, and runs."""

import json

import pytest
from helpers import ROOT, SIZES, places, write_cifar10, write_cifar100, write_google_npz

import train
from models import MODELS, NORM_TYPES, create_model, model_sizes
from utils import options

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
    aug="none", scale=None, interpolation="bilinear", drop_path=0.2, epochs=100, warmup_epochs=0, learning_rate=1e-3
)
STUDY = MIXED | dict(
    aug="strong",
    interpolation="bicubic",
    normalize="cifar",
    min_lr=1e-5,
    crop_pct=0.875,
    decay_by="step",
    disable_weight_decay_on_bias_norm=False,
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
)
LONG = STUDY | dict(scale=[0.2, 1], reprob=0.25, train_batch_size=1024, epochs=800, learning_rate=2e-3, attn_drop=0.05)
FINE = LONG | dict(
    aug="weak",
    scale=[1, 1],
    reprob=0,
    epochs=100,
    learning_rate=4e-3,
    drop_path=0.2,
    disable_weight_decay_on_bias_norm=True,
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
    return options.parse_train_args(
        [f"@{ROOT / 'recipes' / recipe}.args", *map(str, more)], MODELS, NORM_TYPES, model_sizes
    )


@pytest.fixture(autouse=True)
def weights_in_place(monkeypatch):
    """The recipes name weight files that a user downloads or trains first."""
    monkeypatch.setattr(options.os.path, "isfile", lambda path: True)


def test_every_recipe_is_checked_against_its_source():
    assert RECIPES == sorted([*PUBLISHED, "demo", "fast_vit_fashionmnist", "fast_dems_fashionmnist"])


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_settings_are_the_published_ones(recipe):
    args = parse(recipe)
    differing = {
        name: (getattr(args, name), value) for name, value in PUBLISHED[recipe].items() if getattr(args, name) != value
    }
    assert not differing
    text = (ROOT / "recipes" / f"{recipe}.args").read_text()
    assert text.startswith("# ") and "Published" in text and "Cost: " in text


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Small CIFAR sets and small Google weights."""
    folder = tmp_path_factory.mktemp("recipes")
    write_cifar10(folder, per_file=16)
    write_cifar100(folder, n=100)
    for patch, grid in ((16, 2), (32, 7)):
        write_google_npz(folder / f"{patch}.npz", **SIZES, patch=patch, grid=grid, classes=21)
    return folder


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_three_steps(recipe, folder, tmp_path):
    accumulation = parse(recipe).gradient_accumulation_steps
    words = [
        "--num_steps",
        3,
        "--warmup_steps",
        0,
        "--train_batch_size",
        max(8, 2 * accumulation),
        "--data_dir",
        folder,
    ]
    words += [word for name, value in SIZES.items() for word in (f"--{name}", value)]
    model_type = parse(recipe).model_type
    if "DEMS" in recipe.upper():
        words += ["--merge_layer", 1, 2, "--merge_num", 16, 8]
    if recipe.startswith(("vit_b32", "vit_l32", "rescalevit")):
        words += ["--pretrained_dir", folder / "32.npz"] if parse(recipe).pretrained_dir else []
    elif recipe == "keras_cifar100_finetune":
        words += ["--pretrained_dir", folder / "16.npz"]
    elif recipe.endswith("finetune"):  # the checkpoint of the recipe that goes before
        before = recipe.removesuffix("_finetune")
        assert train.main(parse(before, *words, *places(tmp_path))) == 0
        checkpoint = options.run_id(parse(before)) + "_checkpoint.bin"
        assert str(parse(recipe).pretrained_dir) == f"output/{checkpoint}"
        words += ["--pretrained_dir", tmp_path / "output" / checkpoint]
    args = parse(recipe, *words, *places(tmp_path))
    assert train.main(args) == 0
    lines = (tmp_path / "output" / f"{options.run_id(args)}.jsonl").read_text().splitlines()
    start, end = json.loads(lines[0]), json.loads(lines[-1])
    assert end["event"] == "end" and end["step"] == 3
    assert start["model"]["model_type"] == model_type
    changed = {
        "num_steps",
        "warmup_steps",
        "train_batch_size",
        "dim",
        "depth",
        "heads",
        "mlp_dim",
        "epochs",
        "warmup_epochs",
        "learning_rate",
    }
    for name, value in PUBLISHED[recipe].items():
        if name not in changed | {"pretrained_dir"}:
            assert start["settings"][name] == value, name


def test_sizes_of_the_multiscale_models():
    assert create_model("MViT-Ti", image_size=32, num_classes=10).image_sizes == [(16, 16), (32, 32)]
