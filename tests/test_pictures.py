"""Pictures of eval.py --plot, what they are computed from, and what training shows in TensorBoard."""

import io
import json
import math
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from helpers import SIZES, TINY, places, write_folder
from PIL import Image
from tensorboard.backend.event_processing import plugin_event_multiplexer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

import eval as eval_script
import train
from models import create_model
from utils import checkpoint, options, pictures, vis_utils
from utils.augment import denormalize
from utils.cli import UserError
from utils.run_files import run_id

ATTENTION = ["attention_class", "attention_distance", "attention_heads", "attention_rollout"]
RUNS = {  # the flags that follow TINY's
    "ViT": [],
    "bf16": ["--bf16"],
    "BN": ["--norm_type", "BN"],
    "Rescale": ["--norm_type", "Rescale"],
    "DEMS": "--model_type DEMS-Ti --img_size 16 --patch_size 2 --merge_num 8 4 --merge_layer 1 2".split(),
    "MViT": "--model_type MViT-Ti --img_size 16 --patch_size 4 --img_sizes 8 16".split(),
}


def run_train(folder: Path, name: str, *words) -> Path:
    """Train in this process; the checkpoint."""
    argv = ["--name", name, *TINY, "--num_steps", "2", "--eval_batch_size", "500", *places(folder), *words]
    args = options.parse_train_args(list(map(str, argv)))
    assert train.main(args) == 0
    return folder / "output" / f"{run_id(args)}_checkpoint.bin"


def parse_eval(*words) -> Namespace:
    return options.eval_parser().parse_args(list(map(str, words)), options.check_eval)


def run_eval(*words) -> None:
    assert eval_script.main(parse_eval(*words)) == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> list[Path]:
    root = tmp_path_factory.mktemp("photos")
    write_folder(root, sizes=[(50, 40), (28, 28)], per_class=2, splits=["photos"], classes=["a"])
    return sorted((root / "photos" / "a").iterdir())


@pytest.fixture(scope="module")
def trained(folder):
    """`trained("DEMS")` -> the checkpoint of a run of two steps."""
    made = {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = run_train(folder, kind, *RUNS[kind])
        return made[kind]

    return get


# ---------------------------------------------------------------- what is drawn


def test_rollout_of_two_blocks():
    """Abnar & Zuidema: heads averaged, half of every token goes past, blocks multiplied, the last one in front."""
    heads = torch.tensor([[[0.0, 1.0], [1.0, 0.0]], [[1.0, 0.0], [1.0, 0.0]]])  # mean [[.5, .5], [1, 0]]
    second = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).expand(2, 2, 2)
    rolled = pictures.rollout(torch.stack([second, heads]))
    assert torch.equal(rolled[0], torch.eye(2))
    assert torch.allclose(rolled[1], torch.tensor([[0.75, 0.25], [0.5, 0.5]]))
    maps = torch.rand(4, 3, 7, 7).softmax(dim=-1)
    step = [(block.mean(0) + torch.eye(7)) / 2 for block in maps]
    assert torch.allclose(pictures.rollout(maps)[-1], step[3] @ step[2] @ step[1] @ step[0])


def scale(name: str, grid: tuple[int, int], start: int) -> pictures.Scale:
    return pictures.Scale(name, grid, start, start, torch.empty(0), None)


def test_attention_distance_of_known_maps():
    patches = scale("patches", (2, 2), 1)
    where, points = pictures.centres([patches], (8, 8))
    assert where.tolist() == [1, 2, 3, 4] and points.tolist() == [[2, 2], [2, 6], [6, 2], [6, 6]]
    to_itself = torch.eye(5)
    to_the_side = torch.eye(5)[[0, 2, 1, 4, 3]]  # the patch left or right, 4 pixels away
    even = torch.full((5, 5), 0.2)  # 0, 4, 4 and 4 sqrt 2 pixels
    maps = torch.stack([to_itself, to_the_side, even, 0.5 * even + 0.5 * torch.eye(5)[[0, 0, 0, 0, 0]]])
    found = pictures.attention_distance(maps, where, points)
    diagonal = (8 + 4 * math.sqrt(2)) / 4
    assert found.tolist() == pytest.approx([0, 4, diagonal, diagonal])  # the class token's share doesn't count


def test_look_is_from_the_class_token_that_is_read_out():
    torch.manual_seed(0)
    model = create_model("MViT-Ti", image_size=32, patch_size=8, num_classes=3, **SIZES).eval()
    images = torch.randn(2, 3, 32, 32)
    seen, maps = pictures.look(model, images, [1]), model.attention_maps(images)
    assert torch.allclose(seen.heads, maps[0, [1]], atol=1e-6)
    assert torch.allclose(seen.last, maps[:, -1, :, 5].mean(dim=1), atol=1e-6)  # 4 patches and a class token before it
    assert torch.allclose(seen.rolled, torch.stack([pictures.rollout(each)[:, 5] for each in maps]), atol=1e-6)


class Even:
    """All that pictures of attention need of a model, by the docstring of models/__init__.py."""

    image_size = (8, 8)

    def attention_maps(self, x):
        return torch.full((len(x), 2, 1, 5, 5), 0.2)

    def token_layout(self):
        return dict(class_token=0, scales=[vars(scale("4 px", (2, 2), 1)) | dict(first=0, positions=torch.eye(4))])


def test_attention_of_a_model_without_blocks(tmp_path):
    args = options.parse_train_args(["--log_dir", str(tmp_path), "--normalize", "half"])
    words = dict(name="own", step=1, classes=["a", "b"], args=args, inputs=lambda files: [torch.zeros(1, 3, 8, 8)])
    run = Namespace(model=Even(), probabilities=lambda x: torch.tensor([[0.3, 0.7]]), **words)
    paths = pictures.draw_all(run, ["attention", "position"], tmp_path, files=["a.png"])
    assert sorted(paths) == [*ATTENTION, "position"] and all(Path(path).is_file() for path in paths.values())
    with pytest.raises(UserError, match="--blocks 2: the model has blocks 0 to 1"):
        pictures.draw_all(run, ["attention"], tmp_path, files=["a.png"], blocks=[2])


def test_all_scales_spread_coarse_patches_over_their_area():
    scales = [scale("fine", (2, 4), 3), scale("coarse", (1, 2), 1)]
    received = torch.zeros(1, 11)
    received[0, 1], received[0, 3] = 0.5, 0.5  # the coarse patch on the left, the fine one top left
    expected = torch.tensor([[0.625, 0.125, 0, 0], [0.125, 0.125, 0, 0]]) * 8
    assert torch.allclose(pictures.all_scales(received, scales)[0], expected)
    assert pictures.on_grid(received, scales[1]).tolist() == [[[2.0, 0.0]]]


def test_similarity_is_the_cosine():
    table = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0], [-1.0, 1.0]])
    half = math.sqrt(0.5)
    expected = [[1, 1, 0, -half], [1, 1, 0, -half], [0, 0, 1, half], [-half, -half, half, 1]]
    assert torch.allclose(pictures.similarity(table), torch.tensor(expected))


def test_principal_components_and_what_gray_images_see():
    pattern = torch.randn(2, 3, 4, 4)
    kernels = torch.randn(80, 2) @ torch.tensor([[5.0, 0.0], [0.0, 1.0]]) @ pattern.flatten(1)
    components, share = pictures.principal_components(kernels.unflatten(1, (3, 4, 4)))
    assert components.shape == (2, 3, 4, 4) and share == pytest.approx(1)
    plane = torch.linalg.qr(pattern.flatten(1).T)[0]
    inside = components.flatten(1) @ plane @ plane.T
    assert torch.allclose(inside, components.flatten(1), atol=1e-4)
    title, shown = pictures.shown_filters("patches", kernels.unflatten(1, (3, 4, 4)), gray=True)
    assert shown.shape == (2, 1, 4, 4) and "1-2 of 80 filters" in title
    assert pictures.shown_filters("patches", torch.randn(64, 3, 7, 7), gray=False)[1].shape == (64, 3, 7, 7)


def test_most_confident_mistakes():
    logits = torch.tensor([[4.0, 0], [0, 1], [2, 0], [0, 9], [3, 0], [1, 0]])
    labels = torch.tensor([1, 0, 0, 0, 0, 1])  # the third and fifth are right
    run = Namespace(probabilities=lambda images: logits[images[:, 0, 0, 0].long()].softmax(dim=1))

    images = torch.arange(6.0)[:, None, None, None].expand(-1, 3, 2, 2)
    batches = list(zip(images.split(2), labels.split(2), strict=True))
    found = pictures.most_confident_mistakes(run, batches, limit=3)
    assert found["images"][:, 0, 0, 0].tolist() == [3, 0, 1]
    assert found["true"].tolist() == [0, 1, 0] and found["predicted"].tolist() == [1, 0, 1]
    assert found["probability"].tolist() == pytest.approx([1 / (1 + math.exp(-x)) for x in (9, 4, 1)])
    assert (found["wrong"], found["seen"], found["index"].tolist()) == (4, 6, [3, 0, 1])


def test_small_helpers():
    assert pictures.first_of_each(torch.tensor([2, 2, 0, 1, 0]), limit=2).tolist() == [0, 2]
    canvas = vis_utils.tile(torch.ones(3, 2, 2).numpy(), columns=2, gap=1, fill=0)
    assert canvas.tolist() == [[1, 1, 0, 1, 1]] * 2 + [[0] * 5] + [[1, 1, 0, 0, 0]] * 2
    pixels = torch.rand(2, 3, 4, 4)
    mean, std = [0.4, 0.5, 0.6], [0.1, 0.2, 0.3]
    normal = (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    assert torch.allclose(denormalize(normal, mean, std), pixels, atol=1e-6)


# ---------------------------------------------------------------- eval.py --plot


@pytest.mark.parametrize(
    "kind, words",
    [
        ("ViT", "attention position patches errors"),
        ("DEMS", "attention position patches"),
        ("MViT", "attention position patches"),
    ],
)
def test_pictures_of_every_model(kind, words, trained, folder, photos, capsys):
    """Attention of ten test images for the first, of a chosen one, which is faster, for the others."""
    path, words, shown = trained(kind), words.split(), {}
    capsys.readouterr()
    for part in [words] if kind == "ViT" else [["attention", "--images", photos[0]], words[1:]]:
        run_eval(path, "--plot", *part, "--json")
        shown |= json.loads(capsys.readouterr().out)
    assert sorted(shown) == sorted(ATTENTION + words[1:])
    for each in shown.values():
        assert Path(each).parent == path.parent
        with Image.open(each) as image:
            assert image.format == "PNG" and min(image.size) > 400 and max(image.size) < 3000
    name = path.name.removesuffix("_checkpoint.bin")
    board = EventAccumulator(str(folder / "logs" / name)).Reload()
    assert {f"visual/{kind}" for kind in shown} <= set(board.Tags()["images"])


@pytest.fixture
def drawn(monkeypatch) -> list[tuple]:
    """What is drawn, in the place of drawing it, which takes long: name of the function, and its arguments."""
    drawn = []
    for name in ("plot_heads", "plot_overlays", "plot_distances", "plot_mistakes"):

        def plot(*values, name=name):
            drawn.append((name, *values))
            return vis_utils.new_figure(1, 1, "")

        monkeypatch.setattr(vis_utils, name, plot)
    return drawn


@pytest.mark.parametrize("kind", ["bf16", "BN", "Rescale"])
def test_numbers_drawn_of_other_runs(kind, trained, drawn, tmp_path):
    """First test images, one of each class; whatever the precision, in float32."""
    run_eval(trained(kind), "--plot", "attention", "errors", "--output_dir", tmp_path)
    (_, heads, *_), (_, images, names, rows, _), (_, _, _, later, _), (_, distances, *_), (_, wrong, *_) = drawn
    assert heads.shape == (2, 2, 17, 17) and distances.shape == (2, 2) and wrong.shape == (25, 3, 28, 28)
    assert images.shape == (8, 3, 28, 28) and names[0].startswith("Ankle boot\n→ ")
    for maps in (maps for _, maps in rows + later):
        assert maps.shape == (8, 4, 4) and torch.allclose(maps.mean(dim=(1, 2)), torch.ones(8), atol=1e-4)
    for values in (heads, images, distances, wrong):
        assert values.dtype == torch.float32 and values.isfinite().all() and values.min() >= 0
    assert torch.allclose(heads.sum(dim=-1), torch.ones(2, 2, 17), atol=1e-2 if kind == "bf16" else 1e-5)


def test_chosen_images_and_blocks(trained, photos, drawn, tmp_path, capsys):
    state = torch.load(trained("ViT"), weights_only=True)
    state["args"]["log_dir"] = str(tmp_path / "elsewhere")
    torch.save(state, tmp_path / "run_checkpoint.bin")
    words = ["--images", *photos, "--blocks", 1, "--output_dir", tmp_path / "new"]
    capsys.readouterr()
    run_eval(tmp_path / "run_checkpoint.bin", "--plot", "attention", *words)
    paths = [str(tmp_path / "new" / f"run_{kind}.png") for kind in ATTENTION]
    assert sorted(capsys.readouterr().out.split()) == sorted(map(str, (tmp_path / "new").iterdir())) == paths
    (_, heads, blocks, *_), *overlays, _ = drawn
    assert len(heads) == 1 and blocks == [1] and len(overlays) == 2
    assert not (tmp_path / "elsewhere").exists()  # no folder of TensorBoard is made
    for _, images, names, *_ in overlays:
        assert images.shape == (2, 3, 28, 28) and [name.split("\n")[0] for name in names] == ["000.png", "001.png"]


def test_pictures_of_another_split_lie_beside_in_tensorboard(trained, folder, drawn, tmp_path, monkeypatch):
    """And one loading of the data does for all pictures."""
    path, loaded, load = trained("BN"), [], eval_script.load_data
    monkeypatch.setattr(eval_script, "load_data", lambda *args, **words: loaded.append(args) or load(*args, **words))
    for split in ("test", "train"):
        run_eval(path, "--split", split, "--output_dir", tmp_path)
        loaded.clear()
        run_eval(path, "--plot", "attention", "errors", "--split", split, "--output_dir", tmp_path)
        assert len(loaded) == 1
    board = EventAccumulator(str(folder / "logs" / path.name.removesuffix("_checkpoint.bin"))).Reload()
    tags = {f"visual/{part}{kind}" for part in ("", "train_") for kind in ("confusion", "errors", *ATTENTION)}
    assert tags <= set(board.Tags()["images"])
    assert len(board.Images("visual/confusion")) == len(board.Images("visual/train_confusion")) == 1


def test_no_mistakes_no_picture(trained, tmp_path, capsys, monkeypatch):
    right = dict(wrong=0, seen=2000)
    monkeypatch.setattr(pictures, "most_confident_mistakes", lambda *args: right)
    run_eval(trained("ViT"), "--plot", "errors", "--output_dir", tmp_path)
    assert "No mistakes in 2000 images" in capsys.readouterr().err and not list(tmp_path.iterdir())


# ---------------------------------------------------------------- TensorBoard of a training


def test_first_batch_is_shown_once_also_after_resuming(folder, trained, tmp_path):
    path = trained("ViT")
    name = path.name.removesuffix("_checkpoint.bin")
    board = EventAccumulator(str(folder / "logs" / name)).Reload()
    (event,) = board.Images("train/batch")
    assert event.step == 1
    with Image.open(io.BytesIO(event.encoded_image_string)) as image:
        assert image.size == (8 * 30 + 2, 4 * 30 + 2)  # 32 images of 28 pixels, 2 between
        assert image.convert("RGB").getpixel((5, 5)) != (255, 255, 255)
    run_train(tmp_path, "again", "--num_steps", 2)
    last = next((tmp_path / "output").glob("*_last.bin"))
    state = torch.load(last, weights_only=True)
    lines = next((tmp_path / "output").glob("*.jsonl"))
    lines.write_text("\n".join(line for line in lines.read_text().splitlines() if '"end"' not in line) + "\n")
    state["step"] = 1  # as if it had been stopped there
    checkpoint.save(last, state)
    run_train(tmp_path, "again", "--num_steps", 2)
    board = EventAccumulator(str(next((tmp_path / "logs").iterdir()))).Reload()
    assert len(board.Images("train/batch")) == 1


def test_hparams_compare_the_runs_of_a_sweep(folder, trained):
    """Settings and results lie in each run's own folder, where the HPARAMS tab finds and groups them."""
    paths = [trained("ViT"), trained("BN")]
    board = plugin_event_multiplexer.EventMultiplexer().AddRunsFromDirectory(str(folder / "logs"))
    board.Reload()
    names = {path.name.removesuffix("_checkpoint.bin") for path in paths}
    assert names <= set(board.Runs()) and not any("/" in run for run in board.Runs())
    for path in paths:
        name = path.name.removesuffix("_checkpoint.bin")
        events = board.PluginRunToTagToContent("hparams")[name]
        start = metadata.parse_session_start_info_plugin_data(events[metadata.SESSION_START_INFO_TAG])
        assert start.hparams["norm_type"].string_value == ("BN" if "norm_BN" in name else "LN")
        assert start.hparams["num_steps"].number_value == 2 and start.hparams["fp16"].string_value == "False"
        assert start.hparams["pretrained_dir"].string_value == "" and "merge_num" not in start.hparams
        assert metadata.EXPERIMENT_TAG not in events  # so that TensorBoard finds out itself what differs
        end = [json.loads(line) for line in path.with_name(f"{name}.jsonl").read_text().splitlines()][-1]
        scalars = EventAccumulator(str(folder / "logs" / name)).Reload()
        last = scalars.Scalars("test/best_accuracy")[-1]
        assert last.step == 2 and last.value == pytest.approx(end["best_accuracy"])
        groups = sorted({tag.split("/")[0] for tag in scalars.Tags()["scalars"]})
        assert groups == ["test", "train"]  # the curves come first, and pictures after them
