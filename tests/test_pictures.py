"""Pictures of eval.py --plot, what they are computed from, and what training shows in TensorBoard."""

import io
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import SIZES, TINY, call, places, write_folder
from PIL import Image
from tensorboard.backend.event_processing import plugin_event_multiplexer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

import eval as eval_script
import train
from models import MODELS, NORM_TYPES, create_model, model_sizes
from utils import checkpoint, options, pictures
from utils.cli import UserError
from utils.vis_utils import denormalize, tile

KINDS = ["attention_class", "attention_distance", "attention_heads", "attention_rollout"]
KINDS += ["errors", "patches", "position"]

RUNS = {  # the flags that follow TINY's
    "ViT": [],
    "bf16": ["--bf16"],
    "BN": ["--norm_type", "BN"],
    "Rescale": ["--norm_type", "Rescale"],
    "stem": "--patch_size 4 --stem conv".split(),
    "DEMS": "--model_type DEMS-Ti --img_size 16 --patch_size 2 --merge_num 8 4 --merge_layer 1 2".split(),
    "MViT": "--model_type MViT-Ti --img_size 16 --patch_size 4 --img_sizes 8 16".split(),
}


def run_train(folder: Path, name: str, *words) -> Path:
    """Train in this process; the checkpoint."""
    argv = ["--name", name, *TINY, "--num_steps", "2", "--eval_batch_size", "500", *places(folder), *words]
    args = options.parse_train_args(list(map(str, argv)), MODELS, NORM_TYPES, model_sizes)
    assert train.main(args) == 0
    return folder / "output" / f"{options.run_id(args)}_checkpoint.bin"


def run_eval(*words) -> None:
    assert eval_script.main(options.eval_parser().parse_args(list(map(str, words)))) == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


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


def test_attention_distance_of_known_maps():
    scale = pictures.Scale("patches", (2, 2), 0, 1)
    where, points = pictures.centres([scale], (8, 8))
    assert where.tolist() == [1, 2, 3, 4] and points.tolist() == [[2, 2], [2, 6], [6, 2], [6, 6]]
    to_itself = torch.eye(5)
    to_the_side = torch.eye(5)[[0, 2, 1, 4, 3]]  # the patch left or right, 4 pixels away
    even = torch.full((5, 5), 0.2)  # 0, 4, 4 and 4 sqrt 2 pixels
    maps = torch.stack([to_itself, to_the_side, even, 0.5 * even + 0.5 * torch.eye(5)[[0, 0, 0, 0, 0]]])
    found = pictures.attention_distance(maps, where, points)
    diagonal = (8 + 4 * math.sqrt(2)) / 4
    assert found.tolist() == pytest.approx([0, 4, diagonal, diagonal])  # the class token's share doesn't count


def test_scales_cover_every_token_and_stand_where_the_model_has_them():
    own = {"ViT-Ti_16": {"patch_size": 8}, "DEMS-Ti": {"merge_num": (8, 4), "merge_layer": (1, 2)}, "MViT-Ti": {}}
    for kind, sizes in own.items():
        model = create_model(kind, image_size=32, num_classes=3, **SIZES, **sizes)
        scales, cls = pictures.scales_of(model.eval())
        n = model.attention_maps(torch.zeros(1, 3, 32, 32)).shape[-1]
        owned = [i for scale in scales for i in range(scale.start, scale.end)]
        classes = set(range(n)) - set(owned)
        assert len(owned) == len(set(owned)) and cls in classes and max(owned) < n
        assert len(classes) == (2 if kind == "MViT-Ti" else 1)
        assert len(pictures.positions(model)) == len(scales)
        for scale, table in zip(scales, pictures.positions(model), strict=True):
            assert len(table) == scale.grid[0] * scale.grid[1] == scale.end - scale.start
    assert cls == scales[-1].first == 65 and pictures.finest(scales).grid == (16, 16)


def test_all_scales_spread_coarse_patches_over_their_area():
    scales = [pictures.Scale("coarse", (1, 2), 1, 1), pictures.Scale("fine", (2, 4), 3, 3)]
    received = torch.zeros(1, 11)
    received[0, 1], received[0, 3] = 0.5, 0.5  # the coarse patch on the left, the fine one top left
    expected = torch.tensor([[0.625, 0.125, 0, 0], [0.125, 0.125, 0, 0]]) * 8
    assert torch.allclose(pictures.all_scales(received, scales)[0], expected)
    assert pictures.on_grid(received, scales[0]).tolist() == [[[2.0, 0.0]]]


def test_similarity_is_the_cosine():
    table = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0], [-1.0, 1.0]])
    half = math.sqrt(0.5)
    expected = [[1, 1, 0, -half], [1, 1, 0, -half], [0, 0, 1, half], [-half, -half, half, 1]]
    assert torch.allclose(pictures.similarity(table), torch.tensor(expected))


def test_kernels_shown_are_of_what_comes_first():
    hybrid = dict(patch_size=16, stem_depths=(1, 1, 1), stem_width=32)
    dems = dict(merge_num=(8, 4), merge_layer=(1, 2))
    for kind, sizes, expected in (
        ("ViT-Ti_16", dict(patch_size=8), {"patch embedding": 8}),
        ("ViT-Ti_16", dict(patch_size=8, conv_stem=True), {"patch embedding, first convolution": 3}),
        ("R50-ViT-B_16", hybrid, {"patch embedding, first convolution": 7}),
        ("DEMS-Ti", dems, {f"{side} px patches": side for side in (2, 4, 8, 16)}),
        (
            "DEMS-Ti",
            dems | dict(conv_stem=True),
            {
                "2 px patches, first convolution": 3,
                "4 px patches, first convolution": 3,
                "8 px patches": 8,
                "16 px patches": 16,
            },
        ),
    ):
        model = create_model(kind, image_size=32, num_classes=3, **SIZES, **sizes).eval()
        found = pictures.patch_kernels(model, pictures.scales_of(model)[0])
        assert {name: kernel.shape[-1] for name, kernel in found} == expected


def test_kernel_of_dems_equals_its_three_convolutions():
    module = create_model(
        "DEMS-Ti", image_size=32, num_classes=3, **SIZES, merge_num=(8, 4), merge_layer=(1, 2)
    ).patch_embed_8
    kernel, image = pictures.kernel_of(module.proj), torch.randn(2, 3, 32, 32)
    assert kernel.shape == (32, 3, 16, 16)
    once = F.conv2d(image, kernel, module.proj[-1].bias, stride=16)
    assert torch.allclose(once, module.proj(image), atol=1e-5)


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

    def model(images):
        return logits[images[:, 0, 0, 0].long()]

    images = torch.arange(6.0)[:, None, None, None].expand(-1, 3, 2, 2)
    batches = list(zip(images.split(4), labels.split(4), strict=True))
    found = pictures.most_confident_mistakes(model, batches, torch.device("cpu"), "fp32", limit=3)
    assert found["images"][:, 0, 0, 0].tolist() == [3, 0, 1]
    assert found["true"].tolist() == [0, 1, 0] and found["predicted"].tolist() == [1, 0, 1]
    assert found["probability"].tolist() == pytest.approx([1 / (1 + math.exp(-x)) for x in (9, 4, 1)])
    assert (found["wrong"], found["seen"]) == (4, 6)


def test_small_helpers():
    assert pictures.first_of_each(torch.tensor([2, 2, 0, 1, 0]), limit=2).tolist() == [0, 2]
    canvas = tile(torch.ones(3, 2, 2).numpy(), columns=2, gap=1, fill=0)
    assert canvas.tolist() == [[1, 1, 0, 1, 1]] * 2 + [[0] * 5] + [[1, 1, 0, 0, 0]] * 2
    pixels = torch.rand(2, 3, 4, 4)
    mean, std = [0.4, 0.5, 0.6], [0.1, 0.2, 0.3]
    normal = (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    assert torch.allclose(denormalize(normal, mean, std), pixels, atol=1e-6)


# ---------------------------------------------------------------- eval.py --plot


@pytest.mark.parametrize("kind", ["ViT", "bf16", "Rescale", "DEMS", "MViT"])
def test_every_picture_of_every_model(trained, folder, capsys, kind):
    path = trained(kind)
    capsys.readouterr()
    run_eval(path, "--plot", "attention", "position", "patches", "errors", "--json")
    shown = json.loads(capsys.readouterr().out)
    assert sorted(shown) == KINDS
    for each in shown.values():
        assert Path(each).parent == path.parent
        with Image.open(each) as image:
            assert image.format == "PNG" and min(image.size) > 400 and max(image.size) < 3000
    name = path.name.removesuffix("_checkpoint.bin")
    board = EventAccumulator(str(folder / "logs" / name)).Reload()
    assert {f"pictures/{kind}" for kind in KINDS} <= set(board.Tags()["images"])


def test_chosen_images_and_blocks(trained, tmp_path, capsys):
    write_folder(tmp_path, sizes=[(50, 40), (28, 28)], per_class=2, splits=["photos"], classes=["a"])
    files = sorted((tmp_path / "photos" / "a").iterdir())
    path = trained("ViT")
    run_eval(path, "--plot", "attention", "--images", *files, "--blocks", 1, "--output_dir", tmp_path / "new")
    assert len(capsys.readouterr().out.split()) == len(list((tmp_path / "new").iterdir())) == 4


def test_no_tensorboard_folder_is_made(trained, tmp_path, capsys):
    state = torch.load(trained("ViT"), weights_only=True)
    state["args"]["log_dir"] = str(tmp_path / "elsewhere")
    torch.save(state, tmp_path / "copy_checkpoint.bin")
    run_eval(tmp_path / "copy_checkpoint.bin", "--plot", "patches")
    assert {path.name for path in tmp_path.iterdir()} == {"copy_checkpoint.bin", "copy_patches.png"}


def test_mistakes_are_answered_in_one_line(trained, tmp_path):
    path = trained("ViT")
    for words, text in (
        (["--plot", "errors", "--images", "a.png"], "--images goes with --plot attention alone"),
        (["--plot", "attention", "--blocks", "2"], "--blocks 2: the model has blocks 0 to 1"),
        (["--plot", "patches", "--blocks", "0"], "--blocks chooses what --plot attention shows"),
        (["--plot", "attention", "--images", *["a.png"] * 9], "room for 8 images, not 9"),
        (["--plot", "attention", "--images", str(tmp_path / "a.png")], "no such file"),
        (["--plot", "patches", "--output_dir", str(path)], "cannot be"),
    ):
        with pytest.raises(UserError, match=text):
            run_eval(path, *words)
    error = call("eval.py", path, "--plot", "errors", "--images", "a.png", check=2).stderr
    assert error.count("\n") == 1 and error.startswith("eval.py: error: --images goes with")
    error = call("eval.py", path, "--plot", "heads", check=2).stderr
    assert error.count("\n") == 1 and "attention" in error


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
        experiment = metadata.parse_experiment_plugin_data(events[metadata.EXPERIMENT_TAG])
        tags = {info.name.tag for info in experiment.metric_infos}
        assert tags == {"hparam/best_accuracy", "hparam/last_accuracy", "hparam/minutes"}
        end = [json.loads(line) for line in path.with_name(f"{name}.jsonl").read_text().splitlines()][-1]
        accumulator = board.GetAccumulator(name)
        (tensor,) = accumulator.Tensors("hparam/best_accuracy")
        value = tensor.tensor_proto.float_val[0]
        assert tensor.step == 2 and value == pytest.approx(end["best_accuracy"])
