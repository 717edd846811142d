"""Batched augmentation against the image-by-image code it stands for (Pillow as timm calls it, torchvision, plain
loops), and parts of a batch against the whole."""

import math
import random
from argparse import Namespace

import numpy as np
import pytest
import timm.data.auto_augment as timm_ops
import timm.data.mixup as timm_mixup
import torch
import torchvision.transforms.functional as TF
from einops import EinopsError, rearrange
from PIL import Image
from timm.data.random_erasing import RandomErasing
from torchvision.transforms import InterpolationMode, RandomResizedCrop

from utils import data_utils, datasets, image_sources, options, randaugment
from utils.augment import ERASED_AREA, Augment, Mix, eval_augment, make_mix, random_resized_boxes, train_augment
from utils.presets import AUGS, NORMALIZE
from utils.resample import crop_flip_resize, line_weights, rotate_reflected, shift

MEAN, STD = NORMALIZE["cifar"]
FILL = (124, 116, 104)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def clothes() -> torch.Tensor:
    """(32, 3, 28, 28) uint8: three different images of Fashion-MNIST as the colours of one."""
    images = datasets.load_data("fashionmnist-mini", train=False).test.source.images
    return rearrange(images[:96], "(c b) 1 h w -> b c h w", c=3)


@pytest.fixture(scope="module")
def waves() -> torch.Tensor:
    """(16, 3, 40, 40) uint8: smooth, colourful, over the whole range."""
    y, x = torch.meshgrid(torch.linspace(0, 6, 40), torch.linspace(0, 6, 40), indexing="ij")
    a, b, c = torch.randn(3, 16, 3, 1, 1, generator=seeded())
    return (127.5 + 127.5 * torch.sin(a * x + b * y + 3 * c)).round().byte()


def pil(image: torch.Tensor) -> Image.Image:
    return Image.fromarray(rearrange(image, "c h w -> h w c").numpy())


def tensor(image: Image.Image) -> torch.Tensor:
    return rearrange(torch.from_numpy(np.array(image)), "h w c -> c h w")


def augment(name: str, size: int = 28, **more) -> Augment:
    return Augment(size, MEAN, STD, **AUGS[name] | more)


# --- RandAugment's operations ---

TIMM_NAMES = {
    name: f"{name}Increasing" for name in ("Posterize", "Solarize", "Color", "Contrast", "Brightness", "Sharpness")
} | {"TranslateX": "TranslateXRel", "TranslateY": "TranslateYRel"}

# One level off in up to 0.5 % of the pixels, where a number lies so near a level that rounding decides: Pillow moves
# pixels in float64, rounds blends in another order and AutoContrast by a table. The other operations are equal.
ONE_OFF = dict.fromkeys(
    "AutoContrast Color Contrast Sharpness Rotate ShearX ShearY TranslateX TranslateY".split(), 5e-3
)


@pytest.mark.parametrize("sign", (-1, 1))
@pytest.mark.parametrize("name", randaugment.OPERATIONS[1:])
def test_operations_as_timm(name, sign, clothes, waves, monkeypatch):
    monkeypatch.setattr(timm_ops, "_randomly_negate", lambda value: sign * value)
    timm_name = TIMM_NAMES.get(name, name)
    argument = randaugment.ARGUMENTS.get(name, lambda level, sign: torch.zeros(()))
    for magnitude in (0.0, 3.3, 7.4, 8.1, 9.0, 9.7):  # at 10 Posterize keeps 0 bits, which newer Pillows refuse
        wanted = timm_ops.LEVEL_TO_ARG[timm_name](magnitude, {}) if timm_ops.LEVEL_TO_ARG[timm_name] else ()
        value = argument(torch.tensor(magnitude / 10), torch.tensor(float(sign)))
        assert not wanted or float(value) == pytest.approx(wanted[0], abs=1e-5)
        for images in (clothes, waves):
            expected = torch.stack(
                [
                    tensor(timm_ops.NAME_TO_OP[timm_name](pil(image), *wanted, fillcolor=FILL, resample=Image.BICUBIC))
                    for image in images
                ]
            )
            number = torch.full((len(images), 1), randaugment.NUMBER[name])
            fill = torch.tensor(FILL, dtype=torch.uint8)
            actual = randaugment.operate(images, number, value.expand(len(images), 1), fill)
            difference = (actual.int() - expected.int()).abs()
            assert difference.max() <= 1
            assert (difference > 0).float().mean() <= ONE_OFF.get(name, 0)


def test_posterize_to_nothing_is_black(clothes):
    assert not randaugment.COLOUR["Posterize"](clothes, torch.zeros(len(clothes), 1, 1, 1)).any()


def test_constant_images_stay(clothes):
    flat = torch.full_like(clothes, 77)
    none = torch.zeros(len(flat), 1, 1, 1)
    assert torch.equal(randaugment.auto_contrast(flat, none), flat)
    assert torch.equal(randaugment.COLOUR["Equalize"](flat, none), flat)


@pytest.mark.parametrize("turn", (-0.1, -0.03, 0.0, 0.1))
def test_hue_as_torchvision(turn, clothes, waves):
    for images in (clothes, waves):
        actual = randaugment.hue(images, torch.full((len(images), 1, 1, 1), turn))
        # torchvision's conversion to float and back scales by 255.999 and cuts off: one level at most
        assert (actual.int() - TF.adjust_hue(images, turn).int()).abs().max() <= 1


def test_operations_in_one_batch(clothes):
    """Grouping by operation, several layers: each image as if it were alone."""
    operation, value = randaugment.draw_randaugment(len(clothes), seeded(3))
    fill = torch.tensor(FILL, dtype=torch.uint8)
    before = clothes.clone()
    together = randaugment.operate(clothes, operation, value, fill)
    alone = [randaugment.operate(clothes[[i]], operation[[i]], value[[i]], fill) for i in range(len(clothes))]
    assert torch.equal(together, torch.cat(alone))
    assert torch.equal(clothes, before)


def test_randaugment_draws():
    b = 20000
    operation, value = randaugment.draw_randaugment(b, seeded())
    assert (operation < 0).float().mean() == pytest.approx(0.5, abs=0.01)
    counts = operation[operation >= 0].bincount(minlength=len(randaugment.OPERATIONS))
    assert counts[randaugment.NUMBER["Hue"]] == 0
    assert counts[1:].float().div(b).sub(1 / 15).abs().max() < 0.005
    degrees = value[operation == randaugment.NUMBER["Rotate"]]
    assert degrees.mean().abs() < 2.5 and degrees.abs().max() <= 30
    # half of all magnitudes lie within 0.6745 x 0.5 of 9
    assert ((degrees.abs() / 3 - 9).abs() < 0.337).float().mean() == pytest.approx(0.5, abs=0.05)


# --- DEMS-ViT's colours ---


def test_dems_schedule(monkeypatch):
    pipeline, seen = augment("dems"), []
    monkeypatch.setattr(
        randaugment, "draw_jitter", lambda b, probability, generator: seen.append(probability) or (0, 0)
    )
    for progress in (0.0, 1 / 3, 0.5, 1.0):
        pipeline.draw(torch.full((4, 2), 28), seeded(), progress)
    assert seen == pytest.approx([0.6, 0.45, 0.3, 0.0])


def test_dems_progress_is_by_epoch(clothes):
    """12 images, 4 an update, 9 updates in 3 epochs: the epoch's number counts, not the step's."""
    pipeline, seen = augment("none"), []
    draw = pipeline.draw
    pipeline.draw = lambda sizes, generator, progress: seen.append(progress) or draw(sizes, generator, progress)
    data = datasets.ImageSet(image_sources.Uniform(clothes[:12]), torch.arange(12), torch.zeros(12, dtype=torch.int64))
    list(data_utils.train_batches(data, pipeline, seed=0, start=0, stop=9, batch_size=4, device=torch.device("cpu")))
    assert seen == pytest.approx([0, 0, 0, 1 / 3, 1 / 3, 1 / 3, 2 / 3, 2 / 3, 2 / 3])


def test_jitter_draws(clothes):
    b = 20000
    operation, value = randaugment.draw_jitter(b, 0.6, seeded())
    jittered, more = operation[:, 0] >= 0, operation[:, 4:] >= 0
    for share in (jittered, more[:, 0], more[:, 1]):
        assert share.float().mean() == pytest.approx(0.6, abs=0.015)
    kinds = {"Brightness": (0.6, 1.4), "Contrast": (0.6, 1.4), "Color": (0.8, 1.2), "Hue": (-0.1, 0.1)}
    for name, bounds in kinds.items():
        mine = operation[:, :4] == randaugment.NUMBER[name]
        assert torch.equal(mine.sum(dim=1) == 1, jittered)
        assert mine.sum(dim=0).div(jittered.sum()).sub(0.25).abs().max() < 0.02  # any place in the order
        assert (value[:, :4][mine].min().item(), value[:, :4][mine].max().item()) == pytest.approx(bounds, abs=1e-3)
    operation, value = randaugment.draw_jitter(len(clothes), 1.0, seeded())
    actual = randaugment.operate(clothes, operation[:, 4:], value[:, 4:], torch.zeros(3, dtype=torch.uint8))
    expected = [tensor(TF.solarize(TF.to_grayscale(pil(image), 3), 128)) for image in clothes]
    assert torch.equal(actual, torch.stack(expected))
    assert (randaugment.draw_jitter(b, 0.0, seeded())[0] == -1).all()


# --- crops ---


@pytest.mark.parametrize("interpolation", ("bilinear", "bicubic"))
@pytest.mark.parametrize("size", (12, 40, 64))
def test_crop_as_torchvision(size, interpolation):
    """Smaller and larger, boxes and images that are not square, images of several sizes padded to one."""
    sizes = torch.tensor([[37, 50], [50, 23], [28, 28], [50, 50], [9, 31]])
    batch = torch.zeros(len(sizes), 3, 50, 50, dtype=torch.uint8)
    for image, (h, w) in zip(batch, sizes.tolist(), strict=True):
        image[:, :h, :w] = torch.randint(70, 180, (3, h, w), generator=seeded())  # the cubic stays within 0..255
    boxes = random_resized_boxes(sizes, (0.1, 1.0), seeded(1))
    flips = torch.tensor([False, True, True, False, True])
    actual = crop_flip_resize(batch, boxes, flips, size, interpolation)
    for image, box, flip, out in zip(batch, boxes.tolist(), flips, actual, strict=True):
        expected = TF.resized_crop(image.float(), *box, [size, size], InterpolationMode(interpolation), antialias=True)
        expected = expected.flip(-1) if flip else expected
        torch.testing.assert_close(out, expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize("interpolation", ("bilinear", "bicubic"))
@pytest.mark.parametrize("in_size, out_size", [(13, 9), (16, 40), (33, 16)])
def test_weights_from_the_table_are_those_computed(in_size, out_size, interpolation):
    """Whole pixels are looked up, others, which streamed images have, computed."""
    every = [(start, length) for length in range(1, in_size + 1) for start in range(in_size + 1 - length)]
    start, length = torch.tensor(every).unbind(1)
    for mirrored in (None, torch.zeros_like(start, dtype=torch.bool), start % 2 == 0):
        arguments = (mirrored, in_size, out_size, interpolation, torch.bfloat16)
        looked_up = line_weights(start, length, *arguments)
        assert torch.equal(looked_up, line_weights(start.float(), length.float(), *arguments))
    part = line_weights(start[:1] + 0.25, length[:1] - 0.5, None, in_size, out_size, interpolation, torch.float32)
    assert part.shape == (1, out_size, in_size)


@pytest.mark.parametrize("size", (20, 45))
def test_bicubic_crop_as_pillow(size, clothes):
    """Over the whole range of levels, where what overshoots is cut off after each of the two passes.

    Pillow also rounds then. Its first pass is along the rows, from version 13 along the columns for some sizes.
    """
    boxes = random_resized_boxes(torch.full((len(clothes), 2), 28), (0.2, 1.0), seeded())
    rows_first = crop_flip_resize(clothes, boxes, None, size, "bicubic")
    columns_first = crop_flip_resize(clothes.mT, boxes[:, [1, 0, 3, 2]], None, size, "bicubic").mT
    errors = []
    for image, box, *outs in zip(clothes, boxes.tolist(), rows_first, columns_first, strict=True):
        expected = tensor(TF.resized_crop(pil(image), *box, [size, size], InterpolationMode.BICUBIC))
        errors.append([(out - expected).abs().max() for out in outs])
    errors = torch.tensor(errors)
    assert (errors.min(dim=1).values <= 1.3).all() and (errors[:, 0] <= 1.3).float().mean() > 0.8


@pytest.mark.parametrize("height, width, scale", [(32, 32, (0.05, 1.0)), (40, 120, (0.8, 1.0)), (100, 10, (0.2, 0.4))])
def test_random_boxes_as_torchvision(height, width, scale):
    n = 4000
    torch.manual_seed(0)
    image = torch.empty(1, height, width)
    theirs = torch.tensor([RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3]) for _ in range(n)])
    ours = random_resized_boxes(torch.tensor([[height, width]]).expand(n, 2), scale, seeded())
    top, left, h, w = ours.unbind(1)
    assert (top >= 0).all() and (left >= 0).all() and (top + h <= height).all() and (left + w <= width).all()
    for f in (
        lambda box: box[:, 2] * box[:, 3],
        lambda box: (box[:, 3] / box[:, 2]).log(),
        lambda box: box[:, 0],
        lambda box: box[:, 1],
    ):
        a, b = f(ours.double()), f(theirs.double())
        spread = max(b.std().item(), 1e-6)
        assert abs(a.mean() - b.mean()) < 4 * math.sqrt(2 / n) * spread + 1e-9
        assert abs(a.std() - b.std()) < 0.06 * spread + 1e-9


def test_pad_moves_and_mirrors_each_image_within_its_own_size():
    sizes = torch.tensor([[20, 60], [20, 20], [33, 9], [8, 8]])
    padded = torch.zeros(8, 3, 33, 60, dtype=torch.uint8)
    for image, (h, w) in zip(padded, sizes.repeat(2, 1).tolist(), strict=True):
        image[:, :h, :w] = torch.randint(1, 256, (3, h, w), generator=seeded())
    augment = Augment(16, [0.5] * 3, [0.5] * 3, pad=4, flip=True)
    params = augment.draw(sizes.repeat(2, 1), seeded())
    params["flip"] = torch.arange(8) < 4  # each of them, mirrored and not
    out = augment(padded, params)
    for i, (h, w) in enumerate(sizes.repeat(2, 1).tolist()):
        alone = augment(padded[[i], :, :h, :w], {name: value[[i]] for name, value in params.items()})
        assert torch.allclose(out[i], alone[0], atol=1e-5)
        assert (out[i] > -1).any()  # not black


def test_pad_as_a_loop(clothes):
    offsets = torch.randint(0, 9, (len(clothes), 2), generator=seeded())
    offsets[:2] = torch.tensor([[0, 0], [8, 8]])
    lasting = clothes.contiguous(memory_format=torch.channels_last)
    for images in (clothes, clothes[:, :1], clothes[..., :9], lasting):
        h, w = images.shape[2:]
        for image, (top, left), actual in zip(images, offsets.tolist(), shift(images, offsets, 4), strict=True):
            expected = np.pad(image.numpy(), ((0, 0), (4, 4), (4, 4)))[:, top : top + h, left : left + w]
            assert np.array_equal(actual.numpy(), expected)


def test_keras_rotation(waves):
    def turned(images, degrees):
        return rotate_reflected(images, torch.full((len(images),), degrees))

    x = waves.float()
    torch.testing.assert_close(turned(x, 0.0), x, atol=1e-2, rtol=0)
    torch.testing.assert_close(turned(x, 90.0), x.rot90(1, (2, 3)), atol=1e-2, rtol=0)
    expected = torch.stack([tensor(pil(image).rotate(7.2, Image.BILINEAR)) for image in waves])
    inner = (..., slice(6, -6), slice(6, -6))
    assert (turned(x, 7.2) - expected)[inner].abs().max() <= 1.01  # Pillow cuts fractions off
    assert turned(torch.full_like(x, 9.0), 7.2).sub(9).abs().max() < 1e-4  # no black corners


# --- random erasing ---


def test_erasing_as_timm():
    n, size = 3000, 32
    pipeline = Augment(size, MEAN, STD, reprob=1.0)
    black = torch.zeros(n, 3, size, size, dtype=torch.uint8)
    params = pipeline.draw(torch.full((n, 2), size), seeded())
    out = pipeline(black, params)
    kept = Augment(size, MEAN, STD)(black[:1], {})
    erased = (out != kept).any(dim=1)  # (n, size, size)
    ours = torch.stack([erased.sum(dim=(1, 2)), erased.any(2).sum(1), erased.any(1).sum(1)], dim=1).double()
    assert torch.equal(ours[:, 0], ours[:, 1] * ours[:, 2])  # rectangles
    assert torch.equal(ours[:, 1:].long(), params["erase"][:, 2:])
    noise = out[erased[:, None].expand_as(out)]
    assert noise.mean().abs() < 0.01 and noise.std() == pytest.approx(1, abs=0.01)

    random.seed(0)
    theirs = []
    for _ in range(n):
        mask = RandomErasing(1.0, mode="pixel", device="cpu")(torch.zeros(1, size, size))[0] != 0
        theirs.append([mask.sum(), mask.any(1).sum(), mask.any(0).sum()])
    theirs = torch.tensor(theirs).double()
    assert (ours.mean(0) - theirs.mean(0)).abs().lt(4 * math.sqrt(2 / n) * theirs.std(0)).all()
    assert (ours.std(0) / theirs.std(0) - 1).abs().max() < 0.06
    area = ours[:, 0] / size**2
    assert area.min() > 0.75 * ERASED_AREA[0] and area.max() < 1.05 * ERASED_AREA[1]  # sides are rounded to pixels


def test_erasing_probability():
    params = Augment(32, MEAN, STD, reprob=0.25).draw(torch.full((20000, 2), 32), seeded())
    assert (params["erase"][:, 2] > 0).float().mean() == pytest.approx(0.25, abs=0.015)


# --- parts of a batch ---

OF_AUGMENT = [name for name, row in AUGS.items() if "cls" not in row]  # a class of its own has tests of its own
PIPELINES = {name: {} for name in OF_AUGMENT} | {"strong": dict(reprob=0.5)}


@pytest.mark.parametrize("channels", (1, 3))
@pytest.mark.parametrize("name", PIPELINES)
def test_parts_as_the_whole(name, channels, clothes):
    images, pipeline = clothes[:, :channels], augment(name, **PIPELINES[name])
    params = pipeline.draw(torch.full((len(images), 2), 28), seeded())
    whole = pipeline(images, params)
    assert whole.shape == (len(images), 3, 28, 28) and whole.dtype == torch.float32 and whole.isfinite().all()
    for parts in (2, 4):
        slices = torch.arange(len(images)).chunk(parts)
        outs = [pipeline(images[part], {key: value[part] for key, value in params.items()}) for part in slices]
        assert torch.equal(torch.cat(outs), whole)


def test_processes_and_accumulation(clothes):
    """One update on 1, 2 or 4 processes, in 1 or 2 passes: the same images and targets, repeated and mixed ones too."""
    data = datasets.ImageSet(image_sources.Uniform(clothes), torch.arange(32), torch.arange(32) % 10)
    kwargs = dict(seed=1, start=3, stop=5, batch_size=16, ra=3, device=torch.device("cpu"))
    mix = Mix(10, mixup=0.8, cutmix=1.0)

    def updates(world: int, accumulation: int) -> list[torch.Tensor]:
        ranks = [
            list(
                data_utils.train_batches(
                    data, augment("strong"), mix=mix, rank=rank, world=world, accumulation=accumulation, **kwargs
                )
            )
            for rank in range(world)
        ]
        batches = [
            batch for i in range(2) for rank in ranks for batch in rank[i * accumulation : (i + 1) * accumulation]
        ]
        return [torch.cat(each) for each in zip(*batches, strict=True)]

    images, targets = updates(1, 1)
    assert images.shape == (32, 3, 28, 28) and targets.shape == (32, 10)
    for world, accumulation in ((2, 1), (4, 1), (1, 2), (2, 2)):
        other_images, other_targets = updates(world, accumulation)
        assert torch.equal(images, other_images) and torch.equal(targets, other_targets)


@pytest.mark.parametrize("batch, ra", [(16, 1), (16, 2), (16, 3), (16, 5), (256, 3)])
def test_repeated_augmentation(batch, ra):
    n = 400
    indices = torch.stack(
        [data_utils.batch_index(step, batch, n, 0, ra) for step in range(16 * 25 * ra // (batch // 16))]
    )
    assert (indices.flatten().bincount(minlength=n) == 16 * ra * 16 * 25 // n).all()  # every image as often
    different = torch.tensor([len(index.unique()) for index in indices])
    assert different.max() <= math.ceil((batch - 1) / ra) + 1 and (batch % ra or (different <= batch // ra).all())
    pairs = indices.view(-1, 2)
    assert (pairs[:, 0] == pairs[:, 1]).float().mean() < (0.05 if batch % ra else 0.005)


# --- mixup and cutmix ---


@pytest.mark.parametrize("kind", ("mixup", "cutmix"))
def test_mixing_as_timm(kind, clothes, monkeypatch):
    """On two images timm's partner, the batch backwards, is the neighbour; its smoothed targets are the loss's here."""
    images, labels = clothes[:8].float() / 255, torch.tensor([3, 1, 4, 1, 5, 9, 2, 6])
    logits, loss = torch.randn(2, 10, generator=seeded()), torch.nn.functional.cross_entropy
    mix = Mix(10, **{kind: 0.8})
    for seed in range(5):
        share, box = mix.draw((28, 28), seeded(seed))
        mixed, targets = mix(images, labels, share, box)
        theirs = timm_mixup.Mixup(label_smoothing=0.1, num_classes=10)
        monkeypatch.setattr(theirs, "_params_per_batch", lambda share=share: (share, kind == "cutmix"))
        if box:
            top, left, bottom, right = box
            monkeypatch.setattr(timm_mixup, "rand_bbox", lambda *_, edges=(top, bottom, left, right), **__: edges)
        for i in range(0, 8, 2):
            expected, expected_targets = theirs(images[i : i + 2].clone(), labels[i : i + 2])
            torch.testing.assert_close(mixed[i : i + 2], expected)
            smoothed = loss(logits, targets[i : i + 2], label_smoothing=0.1, reduction="none")
            torch.testing.assert_close(smoothed, loss(logits, expected_targets, reduction="none"))
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(8))


def test_mixing_draws():
    mix = Mix(10, mixup=0.8, cutmix=1.0, prob=0.8, switch_prob=0.25)
    draws = [mix.draw((24, 40), seeded(seed)) for seed in range(3000)]
    assert draws[7] == mix.draw((24, 40), seeded(7))
    none = [share for share, box in draws if share == 1 and box is None]
    shares = torch.tensor([share for share, box in draws if share < 1 and box is None])
    boxes = torch.tensor([box for _, box in draws if box], dtype=torch.float64)
    assert len(none) / 3000 == pytest.approx(0.2, abs=0.03)
    assert len(boxes) / 3000 == pytest.approx(0.8 * 0.25, abs=0.03)
    assert shares.mean() == pytest.approx(0.5, abs=0.03)
    assert shares.var() == pytest.approx(1 / (4 * (2 * 0.8 + 1)), abs=0.01)  # of Beta(0.8, 0.8)
    np.random.seed(0)
    theirs = torch.tensor([timm_mixup.rand_bbox((24, 40), np.random.beta(1, 1)) for _ in range(3000)]).double()
    theirs = theirs[:, [0, 2, 1, 3]]
    assert (boxes.mean(0) - theirs.mean(0)).abs().lt(4 * theirs.std(0) / math.sqrt(len(boxes)) + 0.1).all()
    assert (boxes.std(0) / theirs.std(0) - 1).abs().max() < 0.1


def test_mixing_refuses():
    with pytest.raises(EinopsError, match="divide axis of length 5"):
        Mix(10, mixup=0.8)(torch.zeros(5, 3, 4, 4), torch.zeros(5, dtype=torch.int64), 0.5, None)
    with pytest.raises(ValueError, match="a <= 0"):
        Mix(10).draw((4, 4), seeded())


# --- flags ---


def parse(*words: str) -> Namespace:
    return options.parse_train_args(["--name", "x", *words])


def settings(pipeline: Augment) -> dict:
    found = {name: value for name, value in vars(pipeline).items() if not isinstance(value, torch.Tensor)}
    return found | dict(fill=pipeline.fill.tolist(), scale=pipeline.scale and tuple(pipeline.scale))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("height, width, size, crop_pct", [(32, 32, 32, 0.875), (40, 57, 28, 0.9), (90, 33, 64, 0.95)])
def test_evaluation_resizes_then_cuts_as_timm(height, width, size, crop_pct, interpolation):
    """To a level, to which timm rounds: 32 px are enlarged to 36, of which the central 32 are taken."""
    create_transform = pytest.importorskip("timm.data").create_transform
    image = torch.randint(0, 256, (1, 3, height, width), generator=seeded(), dtype=torch.uint8)
    image = TF.gaussian_blur(image, 5)  # in noise, bicubic overshoots, and Pillow cuts off pass by pass
    mean, std = NORMALIZE["half"]
    theirs = create_transform((3, size, size), mean=mean, std=std, interpolation=interpolation, crop_pct=crop_pct)
    ours = Augment(size, mean, std, interpolation=interpolation, crop_pct=crop_pct)
    found = ours(image, ours.draw(torch.tensor([[height, width]])))
    assert (found[0] - theirs(TF.to_pil_image(image[0]))).abs().max() < 1.1 / 127.5


@pytest.mark.parametrize("name", OF_AUGMENT)
def test_flags_of_each_pipeline(name):
    args = parse("--aug", name, "--img_size", "28", "--normalize", "cifar", "--reprob", "0.2", "--crop_pct", "0.9")
    found = train_augment(args, torch.device("cpu"), "bf16")
    assert settings(found) == settings(augment(name, reprob=0.2, dtype=torch.bfloat16))
    plain = Augment(28, MEAN, STD, interpolation=AUGS[name].get("interpolation", "bilinear"), crop_pct=0.9)
    assert settings(eval_augment(args, torch.device("cpu"), "fp32")) == settings(plain)


def test_flags_instead_of_a_pipelines_own():
    args = parse("--aug", "dems", "--aug_prob", "0.8", "--scale", "0.3", "0.4", "--interpolation", "bilinear")
    args.mean, args.std = MEAN, STD  # resolved with the data
    own = dict(aug_prob=0.8, scale=(0.3, 0.4), interpolation="bilinear")
    assert settings(train_augment(args, torch.device("cpu"), "fp32")) == settings(augment("dems", 224, **own))


class Upside(Augment):
    """An augmentation of somebody's own, with a word of its own."""

    def __init__(self, *args, times: int, **words):
        super().__init__(*args, **words)
        self.times = times

    def __call__(self, images, params):
        return super().__call__(images, params).flip(-2)


@pytest.mark.parametrize("cls", [Upside, f"{__name__}:Upside"])
def test_own_pipeline(cls, clothes, monkeypatch):
    monkeypatch.setitem(AUGS, "upside", dict(cls=cls, flip=True, times=2))
    args = parse("--aug", "upside", "--img_size", "28", "--normalize", "cifar")
    own, evaluated = (make(args, torch.device("cpu"), "fp32") for make in (train_augment, eval_augment))
    params = own.draw(torch.full((len(clothes), 2), 28), seeded())
    assert torch.equal(own(clothes, params), augment("flip")(clothes, params).flip(-2))
    assert own.times == 2 and type(evaluated) is Augment


def test_flags_of_mixing():
    assert make_mix(parse(), 10) is None
    words = "--mixup 0.8 --cutmix 1 --mixup_prob 0.7 --mixup_switch_prob 0.3 --smoothing 0.1"
    expected = Mix(10, mixup=0.8, cutmix=1.0, prob=0.7, switch_prob=0.3)  # the loss smooths the targets
    assert vars(make_mix(parse(*words.split()), 10)) == vars(expected)


@pytest.mark.parametrize(
    "more", [dict(scale=(0.3, 1.0), flip=True, reprob=0.5), dict(scale=(0.8, 1.0), operations="randaugment")]
)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_bfloat16_is_within_three_levels(clothes, more, channels, interpolation):
    images, sizes = clothes[:, :channels], torch.full((32, 2), 28)
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        augment = Augment(40, (0.3, 0.5, 0.4), (0.2, 0.25, 0.3), interpolation=interpolation, dtype=dtype, **more)
        results.append(augment(images, augment.draw(sizes, torch.Generator().manual_seed(5))))
    exact, rounded = results
    assert exact.shape == rounded.shape == (32, 3, 40, 40) and rounded.dtype == torch.bfloat16
    level = 1 / (255 * torch.tensor([0.2, 0.25, 0.3]))[:, None, None]
    difference = (exact - rounded.float()).abs()
    assert (difference < 3 * level + exact.abs() / 256).all() and difference.mean() < 0.5 * level.mean()
