"""Exported models compute the same where they are read, and nothing is left of one that doesn't."""

import json

import numpy as np
import pytest
import torch
from helpers import SIZES, TINY, in_process, places, run
from PIL import Image

from eval import load_run
from models import create_model
from utils import export as module
from utils.cli import UserError
from utils.export import export

MODELS = {
    "ViT": ("ViT-Ti_16", "LN", dict(patch_size=8)),
    "conv stem": ("ViT-Ti_16", "LN", dict(patch_size=8, conv_stem=True)),
    "residual stem": ("ViT-Ti_16", "LN", dict(patch_size=8, residual_stem=True)),
    "BN": ("ViT-Ti_16", "BN", dict(patch_size=8)),
    "Rescale": ("ViT-Ti_16", "Rescale", dict(patch_size=8)),
    "DEMS": ("DEMS-Ti", "LN", dict(patch_size=4, merge_layer=(1, 2), merge_num=(16, 8))),
    "MViT": ("MViT-Ti", "LN", dict(patch_size=4)),
}


@pytest.mark.parametrize("kind", MODELS)
def test_torch_export_of_any_batch(kind, tmp_path):
    model_type, norm_type, words = MODELS[kind]
    model = create_model(model_type, norm_type, 32, 10, **SIZES | words).eval()
    export(model, tmp_path / "m.pt2", {"classes": list("abcdefghij")})
    read = torch.export.load(tmp_path / "m.pt2").module()
    for batch in (1, 5):
        x = torch.randn(batch, 3, 32, 32)
        assert (read(x) - model(x)).abs().max() < 1e-5
    assert json.loads((tmp_path / "m.json").read_text())["classes"][1] == "b"


@pytest.mark.parametrize("kind", ["ViT", pytest.param("DEMS", marks=pytest.mark.slow)])
def test_onnx(kind, tmp_path):
    pytest.importorskip("onnxscript")
    reference = pytest.importorskip("onnx.reference")
    model_type, norm_type, words = MODELS[kind]
    model = create_model(model_type, norm_type, 32, 10, **SIZES | words).eval()
    export(model, tmp_path / "m.onnx", {})
    x = torch.randn(3, 3, 32, 32)
    (found,) = reference.ReferenceEvaluator(str(tmp_path / "m.onnx")).run(None, {"images": x.numpy()})
    assert (torch.from_numpy(found) - model(x)).abs().max() < 1e-4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.json", "m.onnx"]


def test_safetensors_for_timm_by_the_command(tmp_path):
    timm, safetensors = pytest.importorskip("timm"), pytest.importorskip("safetensors.torch")
    words = ["--num_steps", 1, "--aug", "none", "--normalize", "cifar", "--crop_pct", 0.8, *places(tmp_path)]
    run("train.py", "--name", "x", *TINY, *words)
    (path,) = (tmp_path / "output").glob("*_checkpoint.bin")
    file = tmp_path / "m.safetensors"
    done = in_process("eval.py", path, "--export", file)
    beside = tmp_path / "m.json"
    expected = f"{file}: gives the model's logits; {beside}: how to prepare images, and the classes\n"
    assert (done.returncode, done.stdout) == (0, expected)
    sizes = dict(img_size=28, patch_size=7, embed_dim=32, depth=2, num_heads=2, mlp_ratio=2, num_classes=10)
    for state in (safetensors.load_file(file), torch.load(path, weights_only=True)["model"]):
        timm.create_model("vit_tiny_patch16_224", **sizes).load_state_dict(state)
    facts = json.loads(beside.read_text())
    assert facts["image_size"] == 28 and facts["image_mean"][0] == 0.4914 and len(facts["classes"]) == 10
    score = ["train.py", "--name", "y", *TINY, "-v", "--load_model_dir"]  # which reads the preparation beside it
    assert in_process(*score, file).stdout.splitlines()[1:] == in_process(*score, path).stdout.splitlines()[1:]
    for more, reason in (("--heads 4", "has 2 attention heads, the model 4"), ("--depth 3", "lacks blocks.2.")):
        done = in_process("train.py", "--name", "z", *TINY, *more.split(), "--pretrained_dir", file, *places(tmp_path))
        assert done.returncode == 2 and reason in done.stderr
    beside.write_text(json.dumps(facts | {"classes": list("abcdefghij")}))  # as many, but others
    done = in_process(*score, file)
    assert done.returncode == 2 and "has other classes than" in done.stderr
    for name in (tmp_path / "m.tflite", ""):
        done = in_process("eval.py", path, "--export", name)
        assert done.returncode == 2 and "a name ends with .safetensors, .pt2, .onnx" in done.stderr


@pytest.mark.parametrize("crop_pct", [0.8, 1.0])
def test_images_are_prepared_as_the_facts_say(tmp_path, crop_pct):
    """In timm's words, for an image that is no square."""
    create_transform = pytest.importorskip("timm.data").create_transform
    words = ["--num_steps", 1, "--aug", "none", "--crop_pct", crop_pct, *places(tmp_path)]
    run("train.py", "--name", "x", *TINY, *words)
    trained = load_run(*(tmp_path / "output").glob("*_checkpoint.bin"))
    facts = {name.removeprefix("image_"): value for name, value in trained.facts().items()}
    facts = {name: facts[name] for name in ("mean", "std", "interpolation", "crop_pct", "crop_mode")}
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    assert (create_transform(28, **facts)(image)[None] - next(trained.inputs(image))).abs().max() < 0.02


def test_safetensors_of_tensors_that_modules_share(tmp_path):
    pytest.importorskip("safetensors.torch")
    model_type, norm_type, words = MODELS["DEMS"]
    export(create_model(model_type, norm_type, 32, 10, **SIZES | words), tmp_path / "m.safetensors", {})


def test_nothing_is_left_of_what_differs(tmp_path, monkeypatch):
    model = create_model("ViT-Ti_16", "LN", 32, 10, patch_size=8, **SIZES)
    write = module._write

    def other(model, x, path):
        read = write(model, x, path)
        return lambda x: read(x) + 0.1

    monkeypatch.setattr(module, "_write", other)
    with pytest.raises(UserError, match="its logits differ by"):
        export(model, tmp_path / "m.pt2", {})
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(module, "_write", write)
    (tmp_path / "m.json").mkdir()  # where the facts can't be written
    with pytest.raises(UserError, match="m.pt2: not exported"):
        export(model, tmp_path / "m.pt2", {})
    assert [path.name for path in tmp_path.iterdir()] == ["m.json"]

    def absent(*args):
        raise ModuleNotFoundError("No module named 'onnx'", name="onnx")

    monkeypatch.setattr(module, "_write", absent)
    with pytest.raises(UserError, match="needs the package onnx; pip install onnx"):
        export(model, tmp_path / "m.onnx", {})
