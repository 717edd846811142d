"""Weight files of other projects, made by their own code: they compute the same here, or are refused by name."""

import argparse
import collections
import datetime
import json
import pathlib
import re

import numpy as np
import pytest
import torch
from helpers import SIZES, TINY, in_process, places, run, write_google_npz

from eval import evaluate
from models.vit import ViT
from utils.augment import Augment
from utils.cli import UserError
from utils.data_utils import eval_batches
from utils.datasets import load_data
from utils.presets import NORMALIZE
from utils.weights import load_weights, read_weights

CLASSES = 10


def ours(image_size: int = 28, patch_size: int = 7, **changes) -> ViT:
    sizes = SIZES | dict(image_size=image_size, patch_size=patch_size, num_classes=CLASSES)
    return ViT(**sizes | changes).eval()


def randomise(model: torch.nn.Module) -> torch.nn.Module:
    """Weights far from their start, so that nothing is zero or one by chance."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator) + 0.5 * (parameter.ndim == 1))
    return model.eval()


def message(*args, **words) -> str:
    with pytest.raises(UserError) as error:
        load_weights(*args, **words)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---------------------------------------------------------------- the same logits, made by the projects' own code


def timm_vit(**words) -> torch.nn.Module:
    timm = pytest.importorskip("timm")
    sizes = dict(img_size=28, patch_size=7, embed_dim=32, depth=2, num_heads=2, mlp_ratio=2, num_classes=CLASSES)
    return randomise(timm.models.vision_transformer.VisionTransformer(**sizes | words))


def hugging_face(kind: str, folder: pathlib.Path):
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=7)
    sizes |= dict(mlp_ratio=2) if kind == "Dinov2" else dict(intermediate_size=64)
    config = getattr(transformers, f"{kind}Config")(**sizes, num_labels=CLASSES, layer_norm_eps=1e-6)
    if kind == "ViT":
        model = randomise(transformers.ViTForImageClassification(config))
        model.save_pretrained(folder)
        return lambda x: model(x).logits, folder / "model.safetensors"
    model = randomise(getattr(transformers, f"{kind}Model")(config))  # the encoder; a head of ours stands on it
    head = torch.nn.Linear(32, CLASSES)
    state = model.state_dict() | {f"classifier.{name}": value for name, value in head.state_dict().items()}
    torch.save(state, folder / "w.pth")
    if kind == "ViTMAE":  # which drops patches and mixes up their order: told to keep all, as they stand
        model.config.mask_ratio = 0.0
        noise = torch.arange(16.0)[None]
        return lambda x: head(model(x, noise=noise.expand(len(x), -1)).last_hidden_state[:, 0]), folder / "w.pth"
    return lambda x: head(model(x).last_hidden_state[:, 0]), folder / "w.pth"


def torchvision_vit(folder):
    from torchvision.models import VisionTransformer

    model = randomise(VisionTransformer(28, 7, 2, 2, 32, 64, num_classes=CLASSES))
    torch.save(model.state_dict(), folder / "w.pth")
    return model, folder / "w.pth"


def pretrained_vit(folder):
    package = pytest.importorskip("pytorch_pretrained_vit.model")
    package.resize_positional_embedding = False  # a name that the package's last release forgot to define
    sizes = dict(image_size=28, patches=7, dim=32, ff_dim=64, num_heads=2, num_layers=2, num_classes=CLASSES)
    model = randomise(package.ViT(name=None, **sizes))
    torch.save(model.state_dict(), folder / "w.pth")
    return model, folder / "w.pth"


def saved(model, folder, obj=None, state=None):
    torch.save(obj or state or model.state_dict(), folder / "w.pth")
    return model, folder / "w.pth"


def timm_checkpoint(folder):
    """As timm's train.py writes it: flags in a Namespace, numbers of numpy, raw and averaged weights."""
    raw, averaged = timm_vit(), timm_vit()
    torch.nn.init.normal_(raw.head.weight)
    args = argparse.Namespace(model="vit_tiny_patch16_224", gp=None, mean=None, std=None, output=pathlib.Path("/x"))
    facts = dict(arch=args.model, args=args, metric=np.float64(0.5), when=datetime.datetime(2026, 1, 1), epoch=3)
    facts |= dict(history=collections.defaultdict(list, loss=[np.float32(1)]), order=collections.OrderedDict(a=1))
    state = {f"module.{name}": value for name, value in averaged.state_dict().items()}
    torch.save(facts | dict(state_dict=raw.state_dict(), state_dict_ema=state), folder / "checkpoint-3.pth.tar")
    return averaged, folder / "checkpoint-3.pth.tar"


def dino(folder, wrap=lambda teacher: {"teacher": teacher}):
    """A teacher beside its student, each with a projection head, which has no classes: ours is put on it."""
    model = timm_vit()
    backbone = {f"backbone.{name}": v for name, v in model.state_dict().items() if not name.startswith("head.")}
    head = {"head.weight": model.head.weight.data, "head.bias": model.head.bias.data}
    projection = {"head.mlp.0.weight": torch.ones(8, 32), "head.last_layer.weight_v": torch.ones(4, 8)}
    student = {f"module.{name}": torch.zeros_like(v) for name, v in (backbone | projection).items()}
    torch.save(dict(student=student, **wrap(backbone | projection)), folder / "w.pth")
    return model, folder / "w.pth", head


def big_vision(folder, scanned: bool, brain: bool):
    """Arrays under big_vision's names, from a ViT of ours; the class token has no position there."""
    model = randomise(ours())
    state = dict(model.state_dict())
    state["pos_embed"][:, 0] = 0
    arrays = {
        "cls": state["cls_token"], "pos_embedding": state["pos_embed"][:, 1:], "head/bias": state["head.bias"],
        "embedding/kernel": state["patch_embed.proj.weight"].permute(2, 3, 1, 0), "head/kernel": state["head.weight"].T,
        "embedding/bias": state["patch_embed.proj.bias"], "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
    }  # fmt: skip
    layers = []
    for i in range(2):
        block = {name.removeprefix(f"blocks.{i}."): v for name, v in state.items() if name.startswith(f"blocks.{i}.")}
        layer = {}
        for ours_, theirs in (("norm1", "LayerNorm_0"), ("norm2", "LayerNorm_1")):
            layer |= {f"{theirs}/scale": block[f"{ours_}.weight"], f"{theirs}/bias": block[f"{ours_}.bias"]}
        for ours_, theirs in (("fc1", "Dense_0"), ("fc2", "Dense_1")):
            layer[f"MlpBlock_0/{theirs}/kernel"] = block[f"mlp.{ours_}.weight"].T
            layer[f"MlpBlock_0/{theirs}/bias"] = block[f"mlp.{ours_}.bias"]
        attention = "MultiHeadDotProductAttention_0"
        for part, name in enumerate(("query", "key", "value")):
            weight, bias = block["attn.qkv.weight"].chunk(3)[part], block["attn.qkv.bias"].chunk(3)[part]
            layer[f"{attention}/{name}/kernel"] = weight.T.reshape(32, 2, 16)
            layer[f"{attention}/{name}/bias"] = bias.reshape(2, 16)
        layer[f"{attention}/out/kernel"] = block["attn.proj.weight"].T.reshape(2, 16, 32)
        layer[f"{attention}/out/bias"] = block["attn.proj.bias"]
        layers.append(layer)
    for name in layers[0]:
        if scanned:
            arrays[f"Transformer/encoderblock/{name}"] = torch.stack([layer[name] for layer in layers])
        else:
            arrays |= {f"Transformer/encoderblock_{i}/{name}": layer[name] for i, layer in enumerate(layers)}
    prefix = "opt/target/" if brain else "params/"
    arrays = {f"{prefix}{name}": value.contiguous() for name, value in arrays.items()}
    if brain:
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16().float()
        as_bytes = {k: v.bfloat16().view(torch.int16).numpy().view(np.dtype("V2")) for k, v in arrays.items()}
        np.savez(folder / "w.npz", **as_bytes)
    else:
        np.savez(folder / "w.npz", **{name: value.numpy() for name, value in arrays.items()})
    return model, folder / "w.npz"


ORIGINS = {
    "timm": lambda f: saved(timm_vit(), f),
    "timm LayerScale": lambda f: saved(timm_vit(init_values=0.1), f),
    "timm no_embed_class": lambda f: saved(timm_vit(init_values=0.1, no_embed_class=True), f),
    "timm without biases": lambda f: saved(timm_vit(qkv_bias=False, proj_bias=False), f),
    "timm checkpoint": timm_checkpoint,
    "Hugging Face ViT": lambda f: hugging_face("ViT", f),
    "Hugging Face DINOv2": lambda f: hugging_face("Dinov2", f),
    "Hugging Face MAE": lambda f: hugging_face("ViTMAE", f),
    "Hugging Face MSN": lambda f: hugging_face("ViTMSN", f),
    "torchvision": torchvision_vit,
    "PyTorch-Pretrained-ViT": pretrained_vit,
    "big_vision": lambda f: big_vision(f, scanned=False, brain=False),
    "big_vision scanned, bfloat16": lambda f: big_vision(f, scanned=True, brain=True),
}


@pytest.fixture(params=ORIGINS)
def origin(request, tmp_path):
    return ORIGINS[request.param](tmp_path)


def test_logits_are_the_projects_own(origin):
    theirs, path = origin
    model = ours()
    report = load_weights(model, path, exact=True)
    assert not report.reinitialised and not [name for name in report.ignored if not name.startswith("mask_token")]
    x = torch.randn(4, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(x)
    assert expected.std() > 0.1 and (model(x) - expected).abs().max() < 1e-4


def test_average_of_torchvisions_train_py(tmp_path):
    """As its reference scripts save it: the state of torch's AveragedModel, which counts its updates."""
    model, path = torchvision_vit(tmp_path)
    averaged = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    torch.save({"model": model.state_dict(), "model_ema": averaged.state_dict()}, path)
    report = load_weights(ours(), path, exact=True)
    assert len(report.loaded) == 32 and report.ignored == ["n_averaged"]


def test_heads_that_users_put_on_torchvisions(tmp_path):
    model, path = torchvision_vit(tmp_path)
    head = model.heads.head
    for model.heads in (head, torch.nn.Sequential(head)):
        saved(model, tmp_path)
        vit = ours()
        assert len(load_weights(vit, path, exact=True).loaded) == 32
        assert torch.equal(vit.head.weight, head.weight) and torch.equal(vit.head.bias, head.bias)


def test_scored_by_train_py(origin, tmp_path):
    """-v gives the loss that the project's own model has on the same images."""
    theirs, path = origin
    mean, std = NORMALIZE["half"]
    test = load_data("fashionmnist-mini", "data", train=False).test
    batches = eval_batches(test, Augment(28, mean, std), batch_size=500, device=torch.device("cpu"), num_workers=0)

    class Theirs(torch.nn.Module):
        forward = staticmethod(theirs)

    expected = evaluate(Theirs(), batches, CLASSES, torch.device("cpu"))
    done = run("train.py", "--name", "x", *TINY, "--normalize", "half", "-v", "--load_model_dir", path)
    found = float(re.search(r"Valid Loss: ([\d.]+)", done.stdout)[1])
    assert found == pytest.approx(expected["loss"], abs=2e-4)
    assert f"({expected['correct']}/2000)" in done.stdout and f"Weights: {path}: 3" in done.stdout


@pytest.mark.parametrize("kind", ["DINO", "iBOT", "MoCo-v3", "MAE"])
def test_pretraining_without_classes(kind, tmp_path):
    """The features of the averaged network are loaded for fine-tuning, the head starts anew; scoring is refused."""
    model, path, head = dino(tmp_path)
    body = {name: value for name, value in model.state_dict().items() if not name.startswith("head.")}
    if kind == "iBOT":
        masked = {"backbone.masked_embed": torch.ones(1, 32)}
        model, path, head = dino(tmp_path, lambda teacher: {"teacher": teacher | masked})
    if kind == "MoCo-v3":
        both = {f"module.base_encoder.{name}": v for name, v in body.items()}
        both |= {f"module.momentum_encoder.{name}": torch.zeros_like(v) for name, v in body.items()}
        both |= {"module.base_encoder.head.0.weight": torch.ones(8, 32), "module.predictor.0.weight": torch.ones(8, 8)}
        torch.save({"state_dict": both, "arch": "vit_small"}, path)
    if kind == "MAE":
        decoder = {"mask_token": torch.ones(1, 1, 8), "decoder_pos_embed": torch.ones(1, 17, 8)}
        torch.save({"model": body | decoder}, path)
    vit = ours()
    report = load_weights(vit, path)
    assert report.reinitialised == ["head.weight", "head.bias"]
    assert all(torch.equal(vit.state_dict()[name], value) for name, value in body.items())
    assert ("averaged weights, teacher" in str(report)) == (kind in ("DINO", "iBOT"))
    assert read_weights(path).normalize == tuple(map(list, NORMALIZE["imagenet"]))
    assert "lacks head.weight, head.bias" in message(ours(), path, exact=True)
    words = ["--name", "x", *TINY, "--num_steps", 1, "--aug", "none", *places(tmp_path)]
    assert "not trained" not in in_process("train.py", *words, "--pretrained_dir", path).stderr
    text = next((tmp_path / "output").glob("*.txt")).read_text()
    assert "mean 0.485 0.456 0.406" in text  # by default as for the weights


def test_layers_around_a_model(tmp_path):
    """They may have its names: neither of two tensors of one name is left out in silence."""
    body = {f"backbone.{name}": value for name, value in timm_vit(num_classes=0).state_dict().items()}
    head = {"head.weight": torch.ones(CLASSES, 32), "head.bias": torch.ones(CLASSES)}
    norm = {"norm.weight": torch.ones(32), "norm.bias": torch.ones(32)}
    for outer in (body | norm | head, norm | head | body):
        _, path = saved(None, tmp_path, outer)
        for exact in (True, False):
            assert "norm.weight is a second norm.weight: no place" in message(ours(), path, exact=exact)
    _, path = saved(None, tmp_path, body | head)
    assert len(load_weights(ours(), path, exact=True).loaded) == 32


@pytest.mark.parametrize("layer", ["pre_logits", "pooler", "projector", "predictor"])
def test_layers_before_the_head(layer, tmp_path):
    """Fine-tuning leaves them out; a head that reads them is not scored without, and one that isn't there is named."""
    state = timm_vit().state_dict() | {f"{layer}.weight": torch.ones(32, 32), f"{layer}.bias": torch.ones(32)}
    _, path = saved(None, tmp_path, state)
    assert load_weights(ours(), path).ignored == [f"{layer}.weight", f"{layer}.bias"]
    assert f"{layer}.weight, {layer}.bias: no place for it in ViT" in message(ours(), path, exact=True)
    _, path = saved(None, tmp_path, {name: value for name, value in state.items() if not name.startswith("head.")})
    assert ": lacks head.weight, head.bias; " in message(ours(), path, exact=True)


def test_jeonsworld_as_safetensors(tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    write_google_npz(tmp_path / "w.npz", **SIZES, patch=7, grid=4, classes=CLASSES)
    google = read_weights(tmp_path / "w.npz").state
    names = {
        "patch_embed.proj.": "transformer.embeddings.patch_embeddings.",
        "norm.": "transformer.encoder.encoder_norm.",
        "pos_embed": "transformer.embeddings.position_embeddings",
        "cls_token": "transformer.embeddings.cls_token",
    }
    state = {}
    for name, tensor in google.items():
        name = next((name.replace(a, b, 1) for a, b in names.items() if name.startswith(a)), name)
        name = re.sub(r"^blocks\.(\d+)\.", r"transformer.encoder.layer.\1.", name)
        name = name.replace("norm1", "attention_norm").replace("norm2", "ffn_norm").replace(".mlp.", ".ffn.")
        if ".attn.qkv." in name:
            for part, piece in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                state[name.replace("qkv", part)] = piece.clone()
        else:
            state[name.replace(".attn.proj.", ".attn.out.")] = tensor.contiguous()
    save_file(state, tmp_path / "w.safetensors")
    model = ours()
    assert len(load_weights(model, tmp_path / "w.safetensors").loaded) == 32
    assert all(torch.equal(value, google[name]) for name, value in model.state_dict().items())


# ---------------------------------------------------------------- models of timm: equal, or refused by name

SMALL = dict(embed_dim=32, depth=2, num_heads=2)
EQUAL = (
    "deit_tiny_patch16_224 deit_base_patch16_384 deit3_small_patch16_224 deit3_huge_patch14_224 test_vit "
    "vit_tiny_patch16_224 vit_small_patch32_384 vit_base_patch8_224 vit_base_patch16_224 vit_base_patch16_224_miil "
    "vit_base_patch16_plus_240 vit_base_patch32_plus_256 vit_small_patch14_dinov2 vit_large_patch14_224 "
    "vit_small_patch16_36x1_224 vit_giant_patch14_224"
).split()
REFUSED = {
    "beit_base_patch16_224": "blocks.0.attn.q_bias, blocks.0.attn.v_bias, blocks.0.attn.relative_position_bias_table",
    "beitv2_base_patch16_224": "blocks.0.attn.q_bias, blocks.0.attn.v_bias, blocks.0.attn.relative_position_bias_table",
    "beit3_base_patch16_224": "blocks.0.attn.norm.weight, blocks.0.attn.norm.bias, blocks.0.mlp.norm.weight",
    "cait_xxs24_224": "blocks.0.attn.proj_l.weight",
    "convit_tiny": "blocks.0.attn.gating_param",
    "deit_tiny_distilled_patch16_224": "dist_token, head_dist.weight, head_dist.bias: no place for it in ViT",
    "eva02_tiny_patch14_224": "blocks.0.attn.q_bias, blocks.0.attn.v_bias",
    "flexivit_small": "its 225 rows are no square grid and a class token",
    "levit_128s": "stem.conv1.bn.running_mean",
    "pit_ti_224": "patch_embed.conv.weight",
    "samvit_base_patch16_224": "blocks.0.attn.rel_pos_h",
    "swin_tiny_patch4_window7_224": "layers.0.blocks.0.norm1.weight",
    "tnt_s_patch16_224": "patch_pos, pixel_pos, pixel_embed.proj.weight",
    "visformer_tiny": "stem.0.weight",
    "vit_base_patch16_18x2_224": "blocks.0.attns.0.norm.weight",
    "vit_base_patch16_clip_224": "norm_pre.weight, norm_pre.bias: no place for it in ViT",
    "vit_base_patch16_gap_224": "lacks cls_token",
    "vit_base_patch16_rpn_224": "fc_norm.weight, fc_norm.bias: no place for it in ViT",
    "vit_base_patch16_siglip_224": "attn_pool.latent",
    "vit_base_patch16_xp_224": "blocks.0.in_norm.weight",
    "vit_giant_patch14_dinov2": "blocks.0.mlp.fc2.weight is (32, 85) in the file, (32, 170) in the model",  # SwiGLU
    "vit_intern300m_patch14_448": "lacks norm.weight, norm.bias",
    "vit_medium_patch16_gap_240": "lacks cls_token",
    "vit_relpos_small_patch16_224": "blocks.0.attn.rel_pos.mlp.fc1.weight",
    "vit_small_patch14_reg4_dinov2": "reg_token: no place for it in ViT",
    "vit_small_patch16_dinov3": "reg_token: no place for it in ViT",
    "vit_small_patch16_rope_224": "rotary positions",
    "vit_small_patch16_rope_ape_224": "rotary positions",  # holds no tensor that tells
    "vit_small_patch16_rope_mixed_ape_224": "rotary positions",
    "vit_srelpos_small_patch16_224": "shared_rel_pos.mlp.fc1.weight",
    "vit_tiny_r_s16_p8_224": "patch_embed.backbone.conv.weight",
    "vit_wee_patch16_reg1_gap_256": "reg_token, fc_norm.weight, fc_norm.bias: no place for it in ViT",
    "xcit_nano_12_p16_224": "patch_embed.proj.0.0.weight",
}


def timm_model(name: str) -> torch.nn.Module:
    timm = pytest.importorskip("timm")
    try:
        return timm.create_model(name, num_classes=CLASSES, **SMALL)
    except TypeError:  # not of these sizes
        return timm.create_model(name, num_classes=CLASSES)


@pytest.mark.parametrize("name", [*EQUAL, *REFUSED])
def test_models_of_timm(name, tmp_path):
    theirs = timm_model(name)
    state = theirs.state_dict()
    torch.save(state, tmp_path / f"{name}.pth")
    size = theirs.default_cfg["input_size"][-1]
    side = state["patch_embed.proj.weight"].shape[-1] if "patch_embed.proj.weight" in state else 16
    mlp = state.get("blocks.0.mlp.fc1.weight", torch.zeros(128, 1)).shape[0]
    vit = ours(size // side * side, side, mlp_dim=mlp)
    if name in REFUSED:
        for exact in (True, False):
            assert REFUSED[name] in message(vit, tmp_path / f"{name}.pth", exact=exact)
        return
    randomise(theirs)
    torch.save(theirs.state_dict(), tmp_path / f"{name}.pth")
    load_weights(vit, tmp_path / f"{name}.pth", exact=True)
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        assert (vit(x) - theirs(x)).abs().max() < 1e-4


def test_what_only_flags_beside_the_weights_tell(tmp_path):
    """Pooling, heads and the activation leave no trace in the tensors."""
    _, path = saved(None, tmp_path, dict(state_dict=timm_vit().state_dict(), args=argparse.Namespace(gp="avg")))
    assert "pooled by 'avg'" in message(ours(), path)
    _, path = saved(None, tmp_path, dict(state_dict=timm_vit().state_dict(), arch="vit_small_patch16_rope_ape_224"))
    assert "vit_small_patch16_rope_ape_224: rotary positions" in message(ours(), path)
    args = argparse.Namespace(mean=[0.4], std=(0.2,))
    _, path = saved(None, tmp_path, dict(state_dict=timm_vit().state_dict(), args=args))
    assert read_weights(path).normalize == ([0.4] * 3, [0.2] * 3)  # as timm understands one number
    for name in ("europe.pth", "dinosaurs.pth"):  # only whole words count
        torch.save(timm_vit().state_dict(), tmp_path / name)
        assert read_weights(tmp_path / name).likely is None
    write_google_npz(tmp_path / "w.npz", **SIZES, patch=7, grid=4, classes=CLASSES)
    assert "has 2 attention heads, the model 4" in message(ours(heads=4), tmp_path / "w.npz")
    _, path = saved(timm_vit(), tmp_path)
    heads = "has 4 attention heads, the model 2"
    for facts, expected in (
        ({"num_attention_heads": 4}, heads),
        ({"model_args": {"num_heads": 4}}, heads),
        ({"global_pool": "avg"}, "config.json: pooled by 'avg'"),
        ({"model_args": {"global_pool": "avg"}}, "config.json: pooled by 'avg'"),  # of transformers' TimmWrapper
        ({"model_args": None, "num_attention_heads": 4}, heads),
        ({"hidden_act": "relu"}, "config.json: activation 'relu'"),
        ({"model_args": {"act_layer": "quick_gelu"}}, "config.json: activation 'quick_gelu'"),
    ):
        for encoding in ("utf-8", "utf-8-sig"):
            (tmp_path / "config.json").write_text(json.dumps(facts), encoding=encoding)
            assert expected in message(ours(), path)
    (tmp_path / "config.json").write_text('{"num_heads": 4,}')
    assert re.search(r"config.json: no JSON \(.+\); mend it, or move it away", message(ours(), path))


def test_vit_s_of_moco_v3_has_twice_as_many_heads(tmp_path):
    state = timm_vit(embed_dim=384, num_heads=12).state_dict()
    names = {f"module.base_encoder.{name}": v for name, v in state.items() if not name.startswith("head.")}
    torch.save({"arch": "vit_small", "state_dict": names}, tmp_path / "vit-s-300ep.pth.tar")
    words = dict(dim=384, mlp_dim=768)
    assert "has 12 attention heads, the model 6" in message(ours(heads=6, **words), tmp_path / "vit-s-300ep.pth.tar")
    assert len(load_weights(ours(heads=12, **words), tmp_path / "vit-s-300ep.pth.tar").loaded) == 30


def test_norms_without_biases(tmp_path):
    """RMSNorm has the names of LayerNorm."""
    norm = pytest.importorskip("timm.layers").RmsNorm
    _, path = saved(timm_vit(norm_layer=norm), tmp_path)
    for exact in (True, False):
        assert "lacks blocks.0.norm1.bias, blocks.0.norm2.bias" in message(ours(), path, exact=exact)


def test_refused_projects(tmp_path):
    package = pytest.importorskip("vit_pytorch")
    model = package.ViT(image_size=28, patch_size=7, num_classes=10, dim=32, depth=2, heads=2, mlp_dim=64)
    _, path = saved(model, tmp_path)
    assert "to_patch_embedding.1.weight" in message(ours(), path)
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=7)
    for kind, words, expected in [
        ("DeiT", dict(intermediate_size=64), "distillation_token"),
        ("Dinov2WithRegisters", dict(mlp_ratio=2), "register_tokens: no place for it in ViT"),
        ("Dinov2", dict(mlp_ratio=2, use_swiglu_ffn=True), "blocks.0.mlp.gate_proj.weight"),
    ]:
        model = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**sizes, **words))
        _, path = saved(model, tmp_path)
        assert expected in message(ours(), path)
    torch.save({"conv1.weight": torch.zeros(3), "head.weight": torch.zeros(CLASSES, 32)}, path)
    assert "conv1.weight: no place for it in ViT; another --model_type" in message(ours(), path)


# ---------------------------------------------------------------- files that hold no weights, or too much


def test_what_is_no_file_of_weights(tmp_path):
    script = tmp_path / "script.pt"
    torch.jit.script(torch.nn.Linear(2, 2)).save(script)
    model = tmp_path / "model.pth"
    torch.save(torch.nn.Linear(2, 2), model)
    (tmp_path / "lfs.pth").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    (tmp_path / "page.npz").write_text("<!DOCTYPE html><html>not found</html>")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    (tmp_path / "model.onnx").write_bytes(b"\x08\x0a")
    for name, expected in {
        "script.pt": "it holds a TorchScript and could run code; if you trust it, save its weights alone",
        "model.pth": "refused, it holds a torch.nn.modules.linear.Linear and could run code; if you trust it",
        "lfs.pth": "a pointer of Git LFS or a web page, not the file;",
        "page.npz": "a pointer of Git LFS or a web page, not the file;",
        "model.safetensors.index.json": "holds no weights that can be read here; take one file of .bin",
        "model.onnx": "holds no weights that can be read here; take one file of .bin, .pth, .npz or .safetensors",
        "nothing.pth": "cannot be read (No such file or directory); name a file that you may read",
        ".": "cannot be read (Is a directory); name a file",
    }.items():
        assert expected in message(ours(), tmp_path / name)


# ---------------------------------------------------------------- pixels


def test_normalisation_of_the_weights(tmp_path):
    """The default where the file or its project says it, a line where a flag says otherwise, a hint by the name."""
    _, path = torchvision_vit(tmp_path)
    score = ["train.py", *TINY, "-v", "--load_model_dir", path]
    line = "trained with --normalize imagenet; this run normalises in another way"
    assert line not in in_process(*score, "--name", "x").stdout
    assert f"{path}: by what it comes from, {line}" in in_process(*score, "--name", "x", "--normalize", "half").stdout
    deit = tmp_path / "deit_tiny.pth"
    torch.save(timm_vit().state_dict(), deit)
    score[-1] = deit
    assert f"{deit}: by its name, {line}" in in_process(*score, "--name", "x").stdout
    assert line not in in_process(*score, "--name", "x", "--normalize", "imagenet").stdout
    for kind in ("dinov2", "vit_mae", "vit_msn"):  # of Hugging Face, without a processor
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        assert read_weights(saved(timm_vit(), tmp_path)[1]).likely == "imagenet"
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": {"mean": [0.1] * 3, "std": [0.2] * 3}}))
    assert read_weights(deit).normalize == ([0.1] * 3, [0.2] * 3)
    write_google_npz(tmp_path / "w.npz", **SIZES, patch=7, grid=4, classes=CLASSES)  # in the same folder, of no JSON
    assert read_weights(tmp_path / "w.npz").normalize == ([0.5] * 3, [0.5] * 3)


@pytest.mark.parametrize(
    "words, mean, std",
    [
        ({}, 0.5, 0.25),
        ({"do_normalize": False, "rescale_factor": 1 / 255}, 0, 1),
        ({"rescale_factor": 1 / 127.5}, 0.25, 0.125),
    ],
)
def test_pixels_of_hugging_faces_processor(tmp_path, words, mean, std):
    """What it makes of a pixel is what normalising with `mean` and `std` does."""
    processor = pytest.importorskip("transformers").ViTImageProcessor
    processor = processor(size=dict(height=2, width=2), image_mean=[0.5] * 3, image_std=[0.25] * 3, **words)
    processor.save_pretrained(tmp_path)
    _, path = saved(timm_vit(), tmp_path)
    assert np.allclose(read_weights(path).normalize, ([mean] * 3, [std] * 3))
    image = np.full((2, 2, 3), 51, dtype=np.uint8)
    assert np.allclose(processor(image, return_tensors="np")["pixel_values"], (51 / 255 - mean) / std, atol=1e-5)


def test_pixels_of_an_export_beside_a_model_of_others(tmp_path):
    """The JSON with the file's own name is nearer than those of the folder."""
    _, path = saved(timm_vit(), tmp_path)
    for name, mean in (("preprocessor_config", 0.1), ("config", 0.2), ("w", 0.3)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"image_mean": [mean] * 3, "image_std": [0.5] * 3}))
        assert read_weights(path).normalize == ([mean] * 3, [0.5] * 3)


@pytest.mark.parametrize("word", ["id2label", "label_names"])
def test_classes_in_another_order(word, tmp_path):
    """Scored as they stand, most images would be wrong; a head in the order of the data is taken."""
    _, path = hugging_face("ViT", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"id2label": None}
    score = ["train.py", "--name", "x", *TINY, "-v", "--load_model_dir", path]
    classes = load_data("fashionmnist-mini", train=False).classes
    line = "has other classes than fashionmnist-mini, or another order; try --pretrained_dir"
    for names in (classes, list("abcdefghij"), classes[::-1]):
        named = [dict(enumerate(names)), names][: 1 + (word == "label_names")]  # timm's may be a list
        for config[word] in named:
            (tmp_path / "config.json").write_text(json.dumps(config))
            assert (line in in_process(*score).stderr) == (names == classes[::-1])
    words = ["--name", "x", *TINY, "--num_steps", 1, "--pretrained_dir", path, *places(tmp_path)]
    run("train.py", *words)
    text = next((tmp_path / "output").glob("*.txt")).read_text()
    assert "re-initialised: head.weight, head.bias" in text


# ---------------------------------------------------------------- the model that an own checkpoint records


def test_own_checkpoint_brings_its_model(tmp_path):
    words = ["--num_steps", 2, "--eval_every", 2, "--aug", "none", *places(tmp_path)]
    run("train.py", "--name", "bn", *TINY, "--norm_type", "BN", *words)
    (path,) = (tmp_path / "output").glob("bn_*_checkpoint.bin")
    score = ["train.py", "--name", "x", "--dataset", "fashionmnist-mini", "-v", "--load_model_dir", path]
    log = path.with_name(path.name.replace("_checkpoint.bin", ".jsonl"))
    best = json.loads(log.read_text().splitlines()[-1])
    done = in_process(*score)
    assert f"Valid Accuracy: {best['best_accuracy']:.5f}" in done.stdout and "tensors loaded" in done.stdout
    assert in_process(*score, "--norm_type", "BN", "--dim", 32).stdout == done.stdout
    for words, expected in [
        ("--norm_type GN", "has norm_type BN, not GN; leave --norm_type out"),
        ("--heads 4", "has heads 2, not 4; leave --heads out"),
        ("--patch_size 14", "has patch_size 7, not 14"),
        ("--model_type DEMS-Ti", "has model_type ViT-Ti_16, not DEMS-Ti"),
    ]:
        done = in_process(*score, *words.split())
        assert done.returncode == 2 and expected in done.stderr and done.stderr.count("\n") == 1
    assert "resized: pos_embed" in run(*score, "--img_size", 42).stdout
    more = "--name on --dataset fashionmnist-mini --num_steps 1 --train_batch_size 32".split()
    run("train.py", *more, "--load_model_dir", path, *places(tmp_path))
    assert (tmp_path / "output" / "on_ViT-Ti_16_norm_BN_fp_False_img_28_pretrain_T.txt").exists()


def test_own_checkpoint_takes_other_scales(tmp_path):
    sizes = "--model_type MViT-Ti --img_size 16 --patch_size 4 --img_sizes 8 16 --heads 2".split()
    run("train.py", "--name", "x", *TINY, *sizes, "--num_steps", 1, *places(tmp_path))
    (path,) = (tmp_path / "output").glob("*_checkpoint.bin")
    score = ["train.py", "--dataset", "fashionmnist-mini", "-v", "--load_model_dir", path, "--img_size", 24]
    assert "resized: pos_embed" in run(*score, "--img_sizes", 12, 24).stdout
