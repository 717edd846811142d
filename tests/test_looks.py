"""How pictures look: no text leaves them, no legend is clipped, names of any length and script are told apart."""

from argparse import Namespace

import matplotlib.colors
import numpy as np
import pytest
import torch
from matplotlib import font_manager, rcParams
from test_plot import write_run

import plot
from models import create_model
from utils import pictures, results, vis_utils

LONG = "a-name-that-nobody-would-choose-but-somebody-has-" * 3
SIZES = dict(dim=32, depth=3, heads=4, mlp_dim=64)


def assert_inside(figure) -> None:
    """All that is drawn is within the figure, as it would be saved: texts, legends, axes, which have room."""
    figure.canvas.draw()
    renderer, size = figure.canvas.get_renderer(), figure.get_size_inches()
    box = figure.get_tightbbox(renderer)
    assert min(box.p0) >= -0.02 and (box.p1 <= size + 0.02).all(), (box, size)
    for text in [*figure.texts, figure._suptitle, *(axes.title for axes in figure.axes)]:
        part = text.get_window_extent(renderer)
        assert part.x0 >= -1 and part.x1 <= figure.bbox.x1 + 1 and part.y1 <= figure.bbox.y1 + 1, (text, part)
    for legend in [*figure.legends, *(axes.get_legend() for axes in figure.axes if axes.get_legend())]:
        part = legend.get_window_extent(renderer)
        assert part.x0 >= 0 and part.y0 >= 0 and part.x1 <= figure.bbox.x1 and part.y1 <= figure.bbox.y1, part
    for axes in figure.axes:
        assert axes.bbox.height > 20 and axes.bbox.width > 4, axes.bbox


@pytest.mark.parametrize("count", [1, 3, 40])
@pytest.mark.parametrize("name", ["run", LONG])
def test_comparison_and_curves(tmp_path, count, name):
    for i in range(count):
        scores = [0.5 + 0.4 * i / count] * (1 if i % 3 == 0 else 30)
        write_run(tmp_path, scores, name=f"{name}{i}", smoothing=0.1, aug="crop", steps=len(scores), ended=i % 5 > 0)
    runs, _ = results.read_runs(tmp_path)
    ((key, rows),) = results.tables(runs).items()
    figure = plot.draw_comparison(*key, rows)
    assert_inside(figure)
    lines = figure.axes[0].lines
    assert len(lines) == count
    for line in lines:  # one evaluation is seen, too
        assert len(line.get_xdata()) > plot.FEW or line.get_marker() not in ("None", None)
    looks = [(matplotlib.colors.to_hex(line.get_color()), str(line.get_linestyle()), line.get_dashes()[1]
              if hasattr(line, "get_dashes") else str(line._dash_pattern)) for line in lines]  # fmt: skip
    assert len(set(looks)) == count
    assert all(a[0] != b[0] for a, b in zip(looks, looks[1:], strict=False))
    assert_inside(plot.draw_run(runs[-1], None))


def test_mean_of_the_training_loss_stands_in_the_middle_of_its_interval(tmp_path):
    path = write_run(tmp_path, [0.5, 0.6, 0.7], smoothing=0.1, aug="crop")
    figure = plot.draw_run(results.read_run(path), None)
    line = next(line for line in figure.axes[2].lines if "training" in line.get_label())
    assert line.get_label() == "training loss (augmented, smoothed), mean"
    assert list(line.get_xdata()) == [0.5, 1.5, 2.5]


def confusion(n: int) -> torch.Tensor:
    """80 % right, the largest error 10 %."""
    matrix = torch.eye(n, dtype=torch.int64) * 80
    matrix[torch.arange(n), (torch.arange(n) + 1) % n] += 10
    matrix[torch.arange(n), (torch.arange(n) + 2) % n] += 5
    matrix[torch.arange(n), (torch.arange(n) + 3) % n] += 5
    return matrix


@pytest.mark.parametrize("n", [2, 10, 100])
@pytest.mark.parametrize("names", [["cat"], [LONG, "cat"], ["图像", "사진", "cat"]])
def test_confusion(n, names):
    classes = [f"{names[i % len(names)]} {i}" for i in range(n)]
    classes[-1] = names[0]
    figure = vis_utils.plot_confusion(confusion(n), classes, f"{LONG}\n{n} classes")
    assert_inside(figure)
    axes, bar = figure.axes
    (image,) = axes.images
    errors = image.get_array()
    assert image.norm.vmax == errors.max() and np.ma.getmaskarray(errors).sum() + np.isnan(errors.filled(0)).sum() >= n
    labels = [text.get_text() for text in axes.get_yticklabels()]
    assert len(labels) == n and all(len(label) <= 24 for label in labels)
    heights = [text.get_window_extent() for text in axes.get_yticklabels()]
    assert all(a.y0 >= b.y1 - 2 or a.y1 <= b.y0 + 2 for a, b in zip(heights, heights[1:], strict=False))
    assert axes.bbox.height > 0.4 * figure.bbox.height


def test_a_class_without_images_has_no_share_of_them():
    """As in other data, which may lack some: 0 % on the diagonal would say that all are wrong."""
    figure = vis_utils.plot_confusion(torch.tensor([[3, 1, 0], [0, 0, 0], [0, 2, 2]]), ["a", "b", "c"], "title")
    assert [text.get_text() for text in figure.axes[0].texts] == ["75", "25", "0", "0", "50", "50"]
    shown = figure.axes[0].images[0].get_array()
    assert shown.mask.tolist() == [[True, False, False], [True] * 3, [False, False, True]] and shown.max() == 50


def test_names_without_a_font_are_numbers(monkeypatch, capsys):
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: ["/dev/null"])
    assert vis_utils.legible(["cat", "图像", "é", "사진"]) == ["cat", "#1", "é", "#3"]
    error = capsys.readouterr().err
    assert error == "no font here has the characters of #1 图像, #3 사진: pictures show the numbers\n"


def test_names_that_are_no_text_are_escaped():
    """As of files that a Korean Windows has zipped, which matplotlib would refuse."""
    assert vis_utils.legible(["a.png", "\udcbb\udce7.png", "a\nb"]) == ["a.png", r"\udcbb\udce7.png", r"a\nb"]


def test_a_font_that_has_the_characters_is_taken(monkeypatch, capsys):
    """As if only DejaVu's monospaced font, which comes with matplotlib, had the letters."""
    fonts = {font.name: font.fname for font in font_manager.fontManager.ttflist if font.style == "normal"}
    plain, get = font_manager.findfont("DejaVu Sans"), font_manager.get_font
    mono = font_manager.findfont("DejaVu Sans Mono")
    known = Namespace(get_charmap=lambda: {ord("c"): 1})
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [fonts["cmr10"], mono])
    monkeypatch.setattr(font_manager, "get_font", lambda path: known if path == plain else get(path))
    assert vis_utils.legible(["cé"]) == ["cé"] and not capsys.readouterr().err
    assert rcParams["font.family"] == ["DejaVu Sans", "DejaVu Sans Mono"]
    rcParams["font.family"] = ["DejaVu Sans"]


@pytest.mark.parametrize("kind", ["attention", "errors"])
def test_names_of_classes_and_of_files_are_written_alike(kind, monkeypatch, capsys):
    """One picture has one list of fonts, and no two names have one number."""
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: ["/dev/null"])
    asked, legible, drawn = [], vis_utils.legible, {}
    monkeypatch.setattr(vis_utils, "legible", lambda names: asked.append(names) or legible(names))
    model = create_model("ViT-Ti_16", image_size=8, patch_size=4, num_classes=3, **SIZES).eval()
    images, half = torch.zeros(2, 3, 8, 8), [0.5] * 3

    def probabilities(x):
        return torch.tensor([[0.1, 0.2, 0.7]]).expand(len(x), 3)

    run = Namespace(
        model=model, classes=["cat", "개", "새"], probabilities=probabilities, args=Namespace(mean=half, std=half)
    )
    if kind == "attention":
        scales = pictures.layout_of(model)[0]
        pictures._draw_attention(
            lambda name, *of: drawn.update({name: of}), run, scales, [0], None, images, ["새", "ㄱ.png"]
        )
        *_, names, _ = drawn["attention_class"]
        assert names == ["#2\n→ #2 70 %", "#4\n→ #2 70 %"]
    else:
        run.batches = lambda known: [(images, torch.tensor([1, 0]))]
        known = Namespace(ids=torch.tensor([1, 0]), paths=["photos/개/1.png", "photos/개/ㄱ.png"])
        pictures._draw_errors(lambda name, *of: drawn.update({name: of}), run, known, "test")
        *_, true, predicted, _, names = drawn["errors"]
        assert (true, predicted, names) == (["#1", "cat"], ["#2", "#2"], ["#3", "1.png"])
    assert len(asked) == 1 and capsys.readouterr().err.count("\n") == 1


KINDS = {
    "ViT": ("ViT-Ti_16", dict(image_size=32, patch_size=4)),
    "Rescale": ("ViT-Ti_16", dict(image_size=32, patch_size=4, norm_type="Rescale")),
    "DEMS": ("DEMS-Ti", dict(image_size=32, patch_size=2, merge_num=(16, 8), merge_layer=(2, 3))),
    "MViT": ("MViT-Ti", dict(image_size=32, patch_size=4, image_sizes=[16, 32])),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_pictures_of_every_model(kind, tmp_path, monkeypatch):
    """Attention, positions and filters; of an untrained model, whose attention is nearly even, which stays pale."""
    torch.manual_seed(0)
    family, words = KINDS[kind]
    model = create_model(family, num_classes=10, **SIZES | words).eval()
    figures = {}
    monkeypatch.setattr(
        pictures, "_save", lambda run, folder, kind, plot, *values, title: figures.update({kind: plot(*values, title)})
    )
    args = Namespace(dataset="cifar10", mean=[0.5] * 3, std=[0.5] * 3, log_dir=str(tmp_path / "none"), name="x", seed=1,
                     model_type=family, norm_type="LN", fp16=False, bf16=False, img_size=32, pretrained_dir=None,
                     load_model_dir=None)  # fmt: skip
    images = torch.rand(8, 3, 32, 32) * 2 - 1
    run = Namespace(
        model=model, args=args, name=LONG, step=7, classes=[*(f"class {i}" for i in range(9)), LONG],
        probabilities=lambda x: model(x).softmax(dim=1), inputs=lambda files: images.split(1),
    )  # fmt: skip
    files = [f"{LONG}{i}.png" for i in range(8)]
    pictures.draw_all(run, ["attention", "position", "patches"], tmp_path, files, None, [1, 3])
    assert len(figures) == 6
    for figure in figures.values():
        assert_inside(figure)
    for axes in figures["attention_class"].axes:
        for image in axes.images[1:]:
            assert image.norm.vmin <= 0.5 and image.norm.vmax >= 1.5
    heads = [axes for axes in figures["attention_heads"].axes if axes.images]
    assert [axes.get_title() for axes in heads[1:3]] == ["head 1", "head 3"]
    assert heads[0].images[0].get_array().shape == (32, 32, 3)  # the image itself
    n = model.attention_maps(images[:1]).shape[-1]
    shapes = [axes.images[0].get_array().shape for axes in heads[1:] if axes.images[0].get_array().ndim == 2]
    matrices = [shape for shape in shapes if shape[1] == n]
    assert matrices[0] == (n, n) and len(matrices) == 6
    if kind == "DEMS":
        assert all(1 < rows < n / 2 for rows, _ in matrices[2:])
    titles = [axes.get_title() for axes in figures["position"].axes]
    assert any("8 x 8 of them shown" in title for title in titles) == (kind == "DEMS")


def test_errors_carry_file_names():
    figure = vis_utils.plot_mistakes(
        torch.rand(2, 3, 8, 8), ["cat", LONG], ["dog", "cow"], [0.9, 0.8], ["a.png", LONG], "x"
    )
    assert_inside(figure)
    assert figure.axes[0].get_title() == "dog 90.0 %\nis cat\na.png"
