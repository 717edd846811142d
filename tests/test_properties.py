"""What holds for all sizes and settings, tried on many: models, schedules, augmentation, batches, weights, names.

HYPOTHESIS_PROFILE=long tries 2000 of each instead of 100.
"""

import contextlib
import io
import itertools
import math
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from models import NORM_TYPES, create_model
from utils import options
from utils.augment import Augment, Mix
from utils.data_utils import batch_index, eval_batches, train_batches
from utils.datasets import ImageSet
from utils.image_sources import Ragged, Uniform
from utils.log_util import RunLog
from utils.presets import AUGS
from utils.resample import crop_flip_resize, resize_weights
from utils.run_files import RunFiles, run_id
from utils.scheduler import learning_rate
from utils.weights import load_weights, resize_pos_embed

CPU = torch.device("cpu")
seeds = st.integers(0, 2**31)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- models ---


@st.composite
def models(draw, odd: bool = False) -> dict:
    """Arguments of `create_model`: sizes that fit one another, or with `odd` sizes that may not."""
    model_type = draw(st.sampled_from(["ViT-Ti_16", "R50-ViT-B_16", "DEMS-Ti", "MViT-Ti"]))
    family, heads = model_type.split("-")[0], draw(st.integers(1, 4))
    patch = {"R50": st.sampled_from([16, 32]), "DEMS": st.integers(1, 3)}.get(family, st.integers(1, 8))
    patch = draw(st.integers(1, 20) if odd else patch)
    unit = {"DEMS": 8 * patch, "MViT": 2 * patch}.get(family, patch)
    least = 2 if (family, patch) == ("R50", 16) else 1  # one pixel is too few for its norms
    side = st.integers(1, 40) if odd else st.integers(least, max(1, 48 // unit)).map(lambda n: n * unit)
    height, width = draw(side), draw(side)
    sizes = dict(
        model_type=model_type,
        norm_type=draw(st.sampled_from(NORM_TYPES if family == "ViT" or odd else ["LN"])),
        image_size=draw(st.sampled_from([height, (height, width)])),
        num_classes=draw(st.integers(1, 12)),
        patch_size=patch,
        heads=heads,
        dim=draw(st.integers(1, 40) if odd else st.integers(1, 4).map(lambda n: 4 * n * heads)),
        depth=draw(st.integers(1, 3)),
        mlp_dim=draw(st.integers(1, 40)),
        dropout=0.0,
    )
    if family in ("ViT", "DEMS") and sizes["norm_type"] == "LN":
        stem = "conv_stem" if family == "DEMS" else draw(st.sampled_from(["conv_stem", "residual_stem"]))
        sizes[stem] = draw(st.booleans()) and (odd or patch in (2, 4, 8))
    if family == "R50":
        sizes |= dict(stem_depths=(1, 1, 1), stem_width=32)
    if family == "DEMS":
        layers = draw(st.lists(st.integers(1, sizes["depth"] + odd), max_size=2, unique=not odd))
        counts = draw(st.lists(st.integers(1, 86 if odd else 85), min_size=len(layers), max_size=len(layers)))
        counts = counts if odd else sorted(counts, reverse=True)
        sizes |= dict(merge_layer=tuple(layers if odd else sorted(layers)), merge_num=tuple(counts))
    if family == "MViT" and draw(st.booleans()):
        sizes["image_sizes"] = [patch * n for n in draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))]
        if not odd:
            sizes["image_sizes"] = sorted(set(sizes["image_sizes"]))
            sizes["image_size"] = sizes["image_sizes"][-1]
    return sizes


@given(models(), seeds)
def test_models_work_at_sizes_that_fit(config, seed):
    torch.manual_seed(seed)
    model = create_model(**config)
    height, width = model.image_size
    logits = model(torch.randn(2, 3, height, width))
    assert logits.shape == (2, config["num_classes"]) and logits.isfinite().all()
    logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@given(models(odd=True))
def test_sizes_that_do_not_fit_are_value_errors(config):
    """What the constructor accepts, works."""
    try:
        model = create_model(**config).eval()
    except ValueError:
        return
    assert model(torch.zeros(2, 3, *model.image_size)).shape == (2, config["num_classes"])


# --- schedules ---


@st.composite
def schedules(draw) -> dict:
    num_steps = draw(st.integers(1, 10**6))
    rate = st.floats(0, 100)
    return dict(
        num_steps=num_steps,
        warmup_steps=draw(st.integers(0, num_steps - 1)),
        base_lr=draw(st.floats(1e-9, 100)),
        min_lr=draw(rate),
        warmup_lr=draw(rate),
        decay_type=draw(st.sampled_from(["cosine", "linear"])),
    )


@given(schedules(), st.data())
def test_schedules(run, data):
    n, warmup, base, low = run["num_steps"], run["warmup_steps"], run["base_lr"], run["min_lr"]
    rates = (base, low, run["warmup_lr"])
    close = 1e-9 * max(rates)
    assert learning_rate(n, **run) == pytest.approx(low, abs=close)
    if warmup:
        assert learning_rate(warmup, **run) == pytest.approx(base, abs=close)
    step = data.draw(st.integers(1, n))
    lr = learning_rate(step, **run)
    assert min(rates) - close <= lr <= max(rates) + close
    if step < n:  # no jumps, and after the warm-up one way only
        after = learning_rate(step + 1, **run)
        slope = abs(base - run["warmup_lr"]) / max(1, warmup)
        if step >= warmup:
            slope = math.pi / 2 * abs(base - low) / (n - warmup)
            assert (after - lr) * (low - base) >= -close
        assert abs(after - lr) <= slope + close
    per_epoch = data.draw(st.floats(1, 2 * n))
    by_epoch = learning_rate(step, **run, steps_per_epoch=per_epoch)
    begin = int((step - 1) / per_epoch) * per_epoch
    assert min(rates) - close <= by_epoch <= max(rates) + close
    if begin >= warmup + 0.01 * per_epoch:
        assert by_epoch == learning_rate(begin, **run)


# --- augmentation ---


@st.composite
def boxes(draw, height: int, width: int) -> list[int]:
    h, w = draw(st.integers(1, height)), draw(st.integers(1, width))
    return [draw(st.integers(0, height - h)), draw(st.integers(0, width - w)), h, w]


sides = st.integers(1, 24)
kinds = st.sampled_from(["bilinear", "bicubic"])


@given(st.data(), st.integers(1, 40), st.integers(1, 40), kinds)
def test_resize_weights(data, in_size, out_size, interpolation):
    length = data.draw(st.integers(1, in_size))
    start = data.draw(st.integers(0, in_size - length))
    rows = resize_weights(torch.tensor([start]), torch.tensor([length]), in_size, out_size, interpolation)
    assert rows.shape == (1, out_size, in_size)
    assert (rows.sum(dim=2) - 1).abs().max() < 1e-5
    assert not rows[..., :start].any() and not rows[..., start + length :].any()
    if length == out_size:
        assert torch.equal(rows[0, :, start : start + length], torch.eye(length))


@given(st.data(), st.integers(1, 3), sides, sides, sides, kinds, seeds)
def test_crop_flip_resize(data, b, height, width, size, interpolation, seed):
    images = torch.randint(0, 256, (b, 3, height, width), generator=seeded(seed), dtype=torch.uint8)
    box = torch.tensor([data.draw(boxes(height, width)) for _ in range(b)])
    flips = torch.tensor([data.draw(st.booleans()) for _ in range(b)])
    out = crop_flip_resize(images, box, flips, size, interpolation)
    assert out.shape == (b, 3, size, size) and out.min() >= -1e-3 and out.max() <= 255 + 1e-3
    assert (crop_flip_resize(images, box, ~flips, size, interpolation).flip(-1) - out).abs().max() < 1e-3
    flat = crop_flip_resize(torch.full_like(images, 77), box, flips, size, interpolation)
    assert (flat - 77).abs().max() < 1e-3
    top, left, h, w = box[0].tolist()
    if h == w == size:
        cut = images[0, :, top : top + h, left : left + w].float()
        assert torch.equal(out[0], cut.flip(-1) if flips[0] else cut)


@st.composite
def pipelines(draw) -> tuple[Augment, dict]:
    """Any --aug with any mean, std, interpolation and erasing, for a small size."""
    name = draw(st.sampled_from([name for name, row in AUGS.items() if "cls" not in row]))
    words = AUGS[name] | dict(interpolation=draw(kinds), reprob=draw(st.sampled_from([0.0, 0.7])))
    mean = [draw(st.floats(0, 1)) for _ in range(3)]
    std = [draw(st.floats(0.1, 1)) for _ in range(3)]
    crop = draw(st.sampled_from([1.0, 0.9, 0.5]))
    size = draw(st.integers(8, 24))
    return Augment(size, mean, std, crop_pct=1.0 if "scale" in words else crop, **words), words


@given(pipelines(), st.integers(1, 5), st.integers(8, 24), st.integers(8, 24), st.sampled_from([1, 3]), seeds)
def test_pipelines(pipeline, b, height, width, channels, seed):
    augment, words = pipeline
    images = torch.randint(0, 256, (b, channels, height, width), generator=seeded(seed), dtype=torch.uint8)
    params = augment.draw(torch.tensor([[height, width]] * b), seeded(seed), progress=0.3)
    assert all(len(value) == b for value in params.values())
    out = augment(images, params)
    assert out.shape == (b, 3, augment.size, augment.size) and out.dtype == torch.float32 and out.isfinite().all()
    factor, bias = (torch.tensor(values)[:, None, None] for values in (augment.factor, augment.bias))
    pixels = (out - bias) / factor
    if not words["reprob"]:
        assert pixels.min() >= -0.1 and pixels.max() <= 255.1
    for i in range(b):  # what becomes of an image doesn't depend on its neighbours
        alone = augment(images[[i]], {name: value[[i]] for name, value in params.items()})
        assert (alone - out[[i]]).abs().max() <= 1e-4
    flat = images[:, :, :1, :1].expand(-1, -1, height, width)
    if not words["reprob"] and not words.get("pad") and not words.get("operations"):
        flat_pixels = (augment(flat, params) - bias) / factor
        assert (flat_pixels - flat[:, :, :1, :1]).abs().max() < 0.02
    plain = Augment(height, [0.0] * 3, [1 / 255] * 3)
    if height == width:
        nothing = plain.draw(torch.tensor([[height, width]] * b))
        assert not nothing and torch.allclose(plain(images, nothing), images.float().expand(-1, 3, -1, -1))


@given(st.lists(st.tuples(sides, sides), min_size=1, max_size=5), st.integers(1, 16), kinds, seeds)
def test_images_of_many_sizes_in_one_batch(sizes, size, interpolation, seed):
    sizes = torch.tensor(sizes)
    pixels = torch.randint(0, 256, (int(3 * sizes.prod(1).sum()),), generator=seeded(seed), dtype=torch.uint8)
    source, augment = Ragged(pixels, sizes), Augment(size, [0.5] * 3, [0.5] * 3, interpolation=interpolation)
    ids = torch.arange(len(sizes))
    params = {"box": torch.cat([torch.zeros_like(sizes), sizes], dim=1)}
    whole = augment(source.take(ids), params)
    for i in range(len(sizes)):
        alone = augment(source.take(ids[[i]]), {"box": params["box"][[i]]})
        assert (alone - whole[[i]]).abs().max() < 1e-4


@given(
    st.integers(1, 4), st.integers(1, 6), st.floats(0, 4), st.floats(0, 4),
    st.floats(0, 1), st.floats(0, 1), sides, sides, seeds,
)  # fmt: skip
def test_mix(pairs, classes, mixup, cutmix, prob, switch_prob, height, width, seed):
    assume(mixup > 1e-3 or cutmix > 1e-3)
    mixup, cutmix = (value if value > 1e-3 else 0.0 for value in (mixup, cutmix))
    mix = Mix(classes, mixup=mixup, cutmix=cutmix, prob=prob, switch_prob=switch_prob)
    images = torch.rand(2 * pairs, 3, height, width, generator=seeded(seed))
    labels = torch.randint(classes, (2 * pairs,), generator=seeded(seed))
    share, box = mix.draw((height, width), seeded(seed))
    assert 0 <= share <= 1
    mixed, targets = mix(images, labels, share, box)
    assert (targets.sum(dim=1) - 1).abs().max() < 1e-5 and targets.min() >= 0
    assert mixed.shape == images.shape and mixed.min() >= -1e-6 and mixed.max() <= 1 + 1e-6
    halves = [mix(images[i : i + 2], labels[i : i + 2], share, box) for i in range(0, 2 * pairs, 2)]
    assert torch.equal(mixed, torch.cat([half[0] for half in halves]))
    if share == 1:
        assert torch.equal(mixed, images)


# --- batches ---


@given(st.integers(1, 40), st.integers(1, 50), st.integers(1, 4), seeds)
def test_every_image_comes_equally_often(n, batch, ra, seed):
    assume(ra <= batch)
    steps = n * ra // math.gcd(n * ra, batch)  # after these, epoch and batch end together
    batches = [batch_index(step, batch, n, seed, ra) for step in range(steps)]
    assert all(len(index) == batch for index in batches)
    assert torch.cat(batches).bincount(minlength=n).tolist() == [steps * batch // n] * n
    if ra == 1:
        row = torch.cat(batches)
        for epoch in row.split(n):
            assert sorted(epoch.tolist()) == list(range(n))


@given(
    st.integers(1, 30), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 2), st.integers(0, 9),
    seeds,
)  # fmt: skip
def test_processes_and_passes_make_up_the_batch(n, share, world, parts, ra, start, seed):
    batch = share * world * parts
    assume(ra <= batch)
    data = ImageSet(Uniform(torch.zeros(n, 1, 1, 1, dtype=torch.uint8)), torch.arange(n), torch.arange(n))
    augment = Augment(1, [0.0] * 3, [1.0] * 3)
    seen = []
    for rank in range(world):
        where = dict(rank=rank, world=world, accumulation=parts, ra=ra, device=CPU)
        batches = list(train_batches(data, augment, seed=seed, start=start, stop=start + 2, batch_size=batch, **where))
        assert [len(labels) for _, labels in batches] == [share] * 2 * parts
        seen.append([torch.cat([labels for _, labels in batches[i : i + parts]]) for i in (0, parts)])
    for i in range(2):
        assert torch.equal(torch.cat([each[i] for each in seen]), batch_index(start + i, batch, n, seed, ra))


@given(st.integers(1, 60), st.integers(1, 6), st.integers(1, 20))
def test_evaluation_counts_every_image_once(n, world, batch):
    data = ImageSet(Uniform(torch.zeros(n, 1, 1, 1, dtype=torch.uint8)), torch.arange(n), torch.arange(n))
    augment = Augment(1, [0.0] * 3, [1.0] * 3)
    for rank in range(world):
        batches = eval_batches(data, augment, batch_size=batch, rank=rank, world=world, device=CPU)
        seen = itertools.chain.from_iterable(labels.tolist() for _, labels in batches)
        assert list(seen) == list(range(n))[rank::world]


# --- weights ---


@settings(max_examples=settings.default.max_examples // 4)
@given(models(), st.sampled_from(["", "module.", "_orig_mod.", "module._orig_mod."]), st.booleans(), seeds)
def test_weights_survive_a_file(config, prefix, nested, seed):
    torch.manual_seed(seed)
    source, target = create_model(**config), create_model(**config)
    state = {f"{prefix}{name}": value for name, value in source.state_dict().items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.pth"
        torch.save({"state_dict": state} if nested else state, path)
        report = load_weights(target, path)
    assert not (report.resized or report.reinitialised or report.ignored)
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in target.state_dict().items())


grids = st.tuples(st.integers(1, 9), st.integers(1, 9))


@given(grids, grids, st.integers(0, 2), seeds)
def test_position_embeddings_of_any_grid(old, new, front, seed):
    pos = torch.randn(1, front + old[0] * old[1], 4, generator=seeded(seed))
    out = resize_pos_embed(pos, old, new)
    assert out.shape == (1, front + new[0] * new[1], 4) and out.isfinite().all()
    assert torch.equal(out[:, :front], pos[:, :front])
    if old == new:
        assert torch.allclose(out, pos, atol=1e-5)
    assert out[:, front:].max() <= pos[:, front:].max() + 1e-5  # bilinear: nothing beyond what there was
    assert (resize_pos_embed(torch.ones_like(pos), old, new) - 1).abs().max() < 1e-6


# --- names ---

anything = st.text(st.characters(categories=["L", "M", "N", "P", "S", "Z", "C"]), max_size=130)
nasty = st.text(st.sampled_from("./\\~$`'\"\n\r\t\0 -*?[]{}|&;<>%é名\u202e\ud800"), max_size=30)


@given(st.one_of(anything, nasty), st.integers(0, 2**31 - 1), st.sampled_from([16, 224, 8192]))
def test_a_run_stays_in_its_folders(name, seed, size):
    """A name is refused, or its files lie directly in the folders, whatever the name is."""
    words = [f"--name={name}", "--seed", str(seed), "--img_size", str(size)]
    try:
        with contextlib.redirect_stderr(io.StringIO()) as error:
            args = options.parse_train_args(words)
    except SystemExit as end:
        assert end.code == 2 and error.getvalue().count("\n") == 1
        return
    run = run_id(args)
    assert run.startswith(name) and run.isprintable() and "/" not in run
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        folder = Path(folder).resolve()
        files = RunFiles(folder / "output", folder / "logs", run)
        with files.lock():
            RunLog(files).info("text")
            for path in (files.json, files.best, files.last, files.previous):
                path.touch()
            ends = (".txt", ".jsonl", "_checkpoint.bin", "_last.bin", "_last.prev.bin", "_last_attention_distance.png")
            (files.folder / f"{run}{ends[-1]}").touch()  # the longest name
            mine = [("output", name) for name in (f".{run}.lock", *(f"{run}{end}" for end in ends))]
            found = sorted(path.relative_to(folder).parts for path in folder.rglob("*"))
            assert found == sorted([("logs",), ("logs", run), ("output",), *mine])
