"""The four models and the hybrid: parity with reference outputs of the published implementations, sizes, gradients,
compilation, attention maps and where tokens stand in them, parts shared between files, messages, models of others."""

import inspect
import statistics

import pytest
import torch
from torch import nn

from models import MODELS, create_model, dems, mvit, rescale_vit, vit
from models.rescale_vit import RescaleViT
from models.vit import ViT
from utils.weights import load_weights

TINY = dict(image_size=16, num_classes=5, patch_size=4, dim=32, depth=3, heads=2, mlp_dim=64)
KINDS = {
    "ViT": ("ViT-Ti_16", "LN", TINY),
    "conv stem": ("ViT-Ti_16", "LN", TINY | dict(conv_stem=True)),
    "residual stem": ("ViT-Ti_16", "LN", TINY | dict(residual_stem=True)),
    "BN": ("ViT-Ti_16", "BN", TINY),
    "GN": ("ViT-Ti_16", "GN", TINY),
    "Rescale": ("ViT-Ti_16", "Rescale", TINY),
    "hybrid": ("R50-ViT-B_16", "LN", TINY | dict(image_size=32, patch_size=16, stem_depths=(2, 1, 1), stem_width=32)),
    "DEMS": ("DEMS-Ti", "LN", TINY | dict(patch_size=1, merge_num=(16, 8), merge_layer=(2, 3))),
    "DEMS conv stem": (
        "DEMS-Ti",
        "LN",
        TINY | dict(patch_size=2, merge_num=(16, 8), merge_layer=(2, 3), conv_stem=True),
    ),
    "MViT": ("MViT-Ti", "LN", TINY | dict(image_sizes=(4, 8, 16))),
}
all_kinds = pytest.mark.parametrize("kind", KINDS)


def make(kind: str, **overrides):
    torch.manual_seed(0)
    model_type, norm_type, sizes = KINDS[kind]
    return create_model(model_type, norm_type, **sizes | overrides)


def images(model, batch: int = 4) -> torch.Tensor:
    return torch.randn(batch, 3, *model.image_size, generator=torch.Generator().manual_seed(1))


def assert_close(actual: torch.Tensor, expected, atol: float = 1e-5) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(expected), atol=atol, rtol=0)


# --- parity ---


def test_dems_reference(reference, write_weights):
    config, arrays = reference("dems")
    sizes = {word: config[word] for word in "image_size num_classes dim depth heads merge_num merge_layer".split()}
    model = create_model("DEMS-Ti", **sizes, patch_size=config["patch_size"], mlp_dim=4 * config["dim"]).eval()
    fresh = {name: table.clone() for name, table in model.named_parameters() if name.startswith("pos_embed")}
    model.load_state_dict(torch.load(write_weights(arrays, "w:", "dems.pth")), strict=True)
    assert len(fresh) == 4
    for name, table in fresh.items():
        assert_close(table, arrays[f"w:{name}"], atol=1e-6)
    assert_close(model(torch.from_numpy(arrays["input"])), arrays["logits"])


def test_mvit_reference(reference, write_weights):
    config, arrays = reference("mvit")
    model = create_model(
        "MViT-Ti",
        image_size=config["img_sizes"][-1],
        image_sizes=config["img_sizes"],
        patch_size=config["patch_size"],
        num_classes=config["num_classes"],
        dim=config["embed_dim"],
        depth=config["depth"],
        heads=config["num_heads"],
        mlp_dim=config["mlp_ratio"] * config["embed_dim"],
    ).eval()
    model.load_state_dict(torch.load(write_weights(arrays, "w:", "mvit.pth")), strict=True)
    x = torch.from_numpy(arrays["input"])
    assert_close(model.forward_features(x), arrays["tokens"])
    assert_close(model(x), arrays["logits"])


def vit_like(config: dict, norm_type: str = "LN", **overrides):
    sizes = dict(dim=config["dim"], depth=config["layers"], heads=config["heads"], mlp_dim=config["mlp"])
    sizes |= dict(image_size=config["img"], patch_size=config.get("patch"), num_classes=config["classes"])
    return create_model("ViT-B_16", norm_type, **sizes | overrides)


@pytest.mark.parametrize("norm_type", ["LN", "BN", "GN", "Rescale"])
def test_rescale_vit_reference(reference, write_weights, norm_type):
    config, arrays = reference(f"rescale_vit_{norm_type}")
    model = vit_like(config, norm_type, dropout=0.0)
    report = load_weights(model, write_weights(arrays, "w:", "run_checkpoint.bin"))
    assert not report.reinitialised and not report.ignored

    train_input = torch.from_numpy(arrays["train_input"])
    for x, logits in zip(train_input, arrays["train_logits"], strict=True):
        assert_close(model(x), logits)
    after = {name: value.clone() for name, value in model.named_buffers()}
    assert_close(model.eval()(train_input[0]), arrays["eval_logits"])
    assert all(torch.equal(value, after[name]) for name, value in model.named_buffers())

    names = {"attention_norm": "norm1", "ffn_norm": "norm2", "encoder_norm": "norm", "addbias": "bias1"}
    names |= {"ffn_addbias": "bias2", "init_mean": "mean"}
    for key in (key for key in arrays if key.startswith("after:")):
        words = [names.get(word, word) for word in key.removeprefix("after:").split(".")]
        name = ".".join(words).replace("transformer.encoder.", "").replace("layer.", "blocks.", words[2] == "layer")
        assert_close(after[name], arrays[key])
    assert len(after) == {"LN": 0, "BN": 3 * 7, "GN": 0, "Rescale": 2 * 6}[norm_type]


@pytest.mark.parametrize("prefix,filename", [("w:", "ViT-B_16.npz"), ("jeonsworld:", "run_checkpoint.bin")])
@pytest.mark.parametrize("size", ["img", "img2"])
def test_vit_reference(reference, write_weights, prefix, filename, size):
    config, arrays = reference("vit_google_npz")
    suffix = "_resized" if size == "img2" else ""
    model = vit_like(config, image_size=config[size]).eval()
    report = load_weights(model, write_weights(arrays, prefix, filename))
    assert report.resized == (["pos_embed"] if suffix else [])
    x = torch.from_numpy(arrays["input" + suffix])
    assert_close(model(x), arrays["logits" + suffix])
    assert_close(model.attention_maps(x), arrays["attention" + suffix])


def test_hybrid_reference(reference, write_weights):
    config, arrays = reference("vit_hybrid_npz")
    width = round(64 * config["width"])
    sizes = dict(dim=config["dim"], depth=config["layers"], heads=config["heads"], mlp_dim=config["mlp"])
    model = create_model(
        "R50-ViT-B_16", "LN", config["img"], config["classes"], stem_depths=config["units"], stem_width=width, **sizes
    ).eval()
    report = load_weights(model, write_weights(arrays, "w:", "R50.npz"))
    assert not report.reinitialised
    assert_close(model(torch.from_numpy(arrays["input"])), arrays["logits"])


# --- weights of LayerNorm models in other norms ---


@pytest.mark.parametrize("prefix,filename", [("w:", "ViT-B_16.npz"), ("jeonsworld:", "run_checkpoint.bin")])
@pytest.mark.parametrize("norm_type", ["BN", "GN", "Rescale"])
def test_layer_norm_weights_stay_out(reference, write_weights, norm_type, prefix, filename):
    config, arrays = reference("vit_google_npz")
    model = vit_like(config, norm_type)
    fresh = {name: value.clone() for name, value in model.state_dict().items()}
    report = load_weights(model, write_weights(arrays, prefix, filename))

    is_norm = [name for name in fresh if any(word in name for word in ("norm", "bias1", "bias2", "scale"))]
    assert sorted(report.reinitialised) == sorted(is_norm) and report.reinitialised[0] in str(report)
    assert all(torch.equal(model.state_dict()[name], fresh[name]) for name in is_norm)
    assert sorted(report.loaded) == sorted(set(fresh) - set(is_norm))
    assert {"norm.weight", "norm.bias", "blocks.0.norm1.weight"} <= set(report.ignored)

    same = vit_like(config)
    load_weights(same, write_weights(arrays, prefix, filename))
    assert all(torch.equal(model.state_dict()[name], same.state_dict()[name]) for name in report.loaded)


# --- sizes ---


@pytest.mark.parametrize(
    "model_type,image_size,num_classes,overrides,parameters",
    [
        ("ViT-B_16", 224, 10, {}, 85_806_346),
        ("ViT-B_32", 224, 10, {}, 87_462_922),
        ("ViT-L_16", 224, 10, {}, 303_311_882),
        ("ViT-L_32", 224, 10, {}, 305_520_650),
        ("ViT-H_14", 224, 10, {}, 630_777_610),
        ("R50-ViT-B_16", 224, 10, {}, 97_897_802),
        ("DEMS-Ti", 32, 10, {}, 5_582_888),
        ("DEMS-S", 32, 10, {}, 22_218_504),
        ("DEMS-Ti", 256, 101, dict(patch_size=16), 6_329_991),
        ("DEMS-S", 256, 101, dict(patch_size=16), 23_708_839),
        ("MViT-Ti", 32, 10, {}, 5_842_378),
    ],
)
def test_parameter_counts(model_type, image_size, num_classes, overrides, parameters):
    with torch.device("meta"):
        model = create_model(model_type, image_size=image_size, num_classes=num_classes, **overrides)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == parameters


def test_conv_stem():
    """Channels double up to dim, each 3x3 convolution halves the sides, and images stay apart."""
    embed = make("conv stem").patch_embed
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    tokens = embed(x)
    for conv, channels in zip(embed.stem.layers[::3], (16, 32), strict=True):
        x = torch.nn.functional.conv2d(x, conv.weight, conv.bias, stride=2, padding=1)
        x = torch.nn.functional.gelu(torch.nn.functional.layer_norm(x, (channels, *x.shape[2:])))
    expected = torch.nn.functional.linear(x.flatten(2).mT, embed.proj.weight[:, :, 0, 0], embed.proj.bias)
    assert tokens.shape == (4, 16, 32)
    assert_close(tokens, expected)


def test_residual_stem():
    """A stage is a convolution, halved by pooling, and a residual block; BatchNorm after every convolution."""
    embed = make("residual stem").patch_embed
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))

    def convolved(x, conv, pool=1):
        filters = conv.weight.view(-1, x.shape[1], 3, 3)
        x = torch.nn.functional.max_pool2d(torch.nn.functional.conv2d(x, filters, padding=1), pool)
        return (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), keepdim=True, correction=0) + 1e-5).sqrt()

    gelu, tokens = torch.nn.functional.gelu, embed(x)
    for conv, block, channels in zip(embed.stem.layers[::5], embed.stem.layers[4::5], (16, 32), strict=True):
        x = gelu(convolved(x, conv, pool=2))
        x = gelu(x + convolved(gelu(convolved(x, block.conv1)), block.conv2))
        assert x.shape[1] == channels
    expected = torch.nn.functional.linear(x.flatten(2).mT, embed.proj.weight[:, :, 0, 0], embed.proj.bias)
    assert tokens.shape == (4, 16, 32)
    assert_close(tokens, expected)


@pytest.mark.parametrize("model_type", MODELS)
def test_every_row_makes_a_model(model_type):
    with torch.device("meta"):
        model = create_model(model_type, image_size=224, num_classes=7)
        assert model(torch.empty(1, 3, 224, 224)).shape == (1, 7)


def test_default_dropout():
    assert {kind: make(kind).dropout for kind in KINDS} == dict.fromkeys(KINDS, 0.1) | dict.fromkeys(
        ("DEMS", "DEMS conv stem", "MViT"), 0.0
    )


@all_kinds
def test_no_weight_decay_names_exist(kind):
    model = make(kind)
    expected = {
        "DEMS": set(),
        "DEMS conv stem": set(),
        "MViT": {"cls_token", "pos_embed", "temporal_pos_embed", "attn_pool.latent"},
    }
    exempt = getattr(model, "no_weight_decay", set)()
    assert exempt == expected.get(kind, {"cls_token", "pos_embed"})
    assert exempt <= dict(model.named_parameters()).keys()


# --- training ---


@all_kinds
def test_every_parameter_gets_a_gradient(kind):
    model = make(kind)
    model(images(model)).square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.any(), f"no gradient for {name}"
        else:
            assert parameter.grad is None
    if kind == "MViT":
        assert not model.attn_pool.latent.grad[:, :-1].any()


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in KINDS if "stem" not in kind])  # those are torch's own modules
def test_compiles_as_one_graph(kind):
    one = dict(dropout=0.0, depth=1) | (dict(merge_num=(16,), merge_layer=(1,)) if kind == "DEMS" else {})
    model, twin = make(kind, **one), make(kind, **one)
    compiled = torch.compile(twin, fullgraph=True, backend="eager")
    x = images(model)
    for training in (True, True, False):
        expected, actual = model.train(training)(x), compiled.train(training)(x)
        assert_close(actual, expected)
        if training:
            actual.sum().backward()
    for value, expected in zip(twin.buffers(), model.buffers(), strict=True):
        assert_close(value, expected)


@all_kinds
def test_bf16_autocast(kind):
    model = make(kind)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(images(model)).float().square().sum()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert all(value.isfinite().all() for value in model.buffers())


@pytest.mark.parametrize("word", ["dropout", "attn_drop", "drop_path"])
@all_kinds
def test_dropout_in_training_only(kind, word):
    off = dict(dropout=0.0, attn_drop=0.0, drop_path=0.0)
    plain, model = make(kind, **off).eval(), make(kind, **off | {word: 0.5}).eval()
    if kind == "MViT":  # fresh layer scale hides what the blocks do
        for block in [*plain.blocks, *model.blocks]:
            torch.nn.init.ones_(block.gamma_1)
            torch.nn.init.ones_(block.gamma_2)
    x = images(model)
    assert torch.equal(plain(x), model(x))
    torch.manual_seed(2)
    assert (plain.train()(x) - model.train()(x)).abs().max() > 1e-4


def test_drop_path_rates():
    rates = {kind: [block.drop_path for block in make(kind, drop_path=0.2).blocks] for kind in KINDS}
    assert rates.pop("MViT") == [0.2, 0.2, 0.2]
    assert all(rate == [0.0, 0.1, 0.2] for rate in rates.values())


def test_drop_path_keeps_the_mean():
    torch.manual_seed(0)
    x = torch.ones(10_000, 1, 1)
    dropped = vit.drop_path(x, 0.2, training=True)
    assert set(dropped.unique().tolist()) == {0.0, 1.25}
    assert abs(dropped.mean() - 1) < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.93])
def test_dropout_is_torchs(p, dtype):
    """Dropped with probability p to within 1e-4, each element for itself, and scaled as by torch."""
    torch.manual_seed(0)
    outputs = [vit.dropout(torch.ones(2**12, 2**11, dtype=dtype), p, training=True) for _ in range(8)]
    dropped = statistics.mean((y == 0).float().mean(dtype=torch.float64).item() for y in outputs)
    assert abs(dropped - p) < 1e-4
    y = outputs[0][:64]
    theirs = torch.nn.functional.dropout(torch.ones(999, dtype=dtype), p)
    assert set(y.unique().tolist()) == set(theirs.unique().tolist())
    keep = (y > 0).float()
    for lag in (1, 2, 3, 4, 5, 64, 2**12):  # four neighbours come from one number
        a, b = keep.flatten()[:-lag] - (1 - p), keep.flatten()[lag:] - (1 - p)
        assert abs((a * b).mean()) / (p * (1 - p)) < 4 / keep.numel() ** 0.5


def test_dropout_repeats_by_its_seed_and_has_its_mask_as_gradient():
    x = torch.randn(3, 5, 7).requires_grad_()
    torch.manual_seed(1)
    y = vit.dropout(x, 0.4, training=True)
    y.sum().backward()
    torch.manual_seed(1)
    assert torch.equal(y, vit.dropout(x, 0.4, training=True))
    assert_close(y, x * x.grad)
    assert vit.dropout(x, 0.4, training=False) is x and vit.dropout(x, 0.0, training=True) is x


@pytest.mark.parametrize("module", [vit, dems, mvit, rescale_vit])
def test_patches_as_a_product_are_the_convolution(module):
    embed, x = module.PatchEmbed(3, 32, 4), torch.randn(2, 3, 8, 12)
    by_convolution = embed.proj(x)
    assert_close(embed(x), by_convolution.flatten(2).mT)
    embed(x).square().sum().backward()
    gradient, embed.proj.weight.grad = embed.proj.weight.grad, None
    by_convolution.square().sum().backward()
    assert_close(gradient, embed.proj.weight.grad, atol=1e-4)


@pytest.mark.parametrize("kind", ["ViT", "conv stem", "hybrid", "DEMS", "DEMS conv stem"])
def test_what_the_head_does_not_read_changes_nothing(kind):
    """forward() leaves out a part of the last block, forward_features() doesn't; outputs and gradients are the same."""
    model = make(kind, dropout=0.0).double()
    x, trained = images(model).double(), [p for p in model.parameters() if p.requires_grad]
    short, whole = model(x), model.head(model.forward_features(x)[:, 0])
    assert_close(short, whole)
    gradients = (torch.autograd.grad(y.square().sum(), trained) for y in (short, whole))
    for one, other in zip(*gradients, strict=True):
        assert_close(one, other)


def test_rescale_counts_eight_passes():
    bias = rescale_vit.CentredBias(2)
    torch.nn.init.ones_(bias.bias)
    inputs = [torch.full((3, 4, 2), float(i)) for i in range(10)]
    assert_close(bias.eval()(inputs[5])[0, 0], [5.01, 5.01])
    bias.train()
    outputs = [bias(x)[0, 0, 0].item() for x in inputs]
    means = [sum(range(min(i, 7) + 1)) / (min(i, 7) + 1) for i in range(10)]
    assert outputs == pytest.approx([i + (0.01 if i < 8 else 1) - means[i] for i in range(10)])
    assert bias.count == 8 and bias.count.dtype == torch.int64


# --- attention maps ---


@all_kinds
def test_attention_rows_sum_to_one(kind):
    model = make(kind, dropout=0.0)
    x = images(model, batch=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    maps = model.attention_maps(x)
    tokens = {"hybrid": 1 + 2 * 2, "DEMS": 1 + 4 * 85, "DEMS conv stem": 1 + 85, "MViT": 2 + 5 + 17}.get(
        kind, 1 + 4 * 4
    )
    assert maps.shape == (2, 3, 2, tokens, tokens)
    assert_close(maps.sum(dim=-1), torch.ones(2, 3, 2, tokens))
    with_dropout = make(kind, dropout=0.5)
    with_dropout.load_state_dict(before)
    assert_close(with_dropout.attention_maps(x), maps)
    assert model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_mvit_attention_is_block_causal():
    model = make("MViT").eval()
    maps = model.attention_maps(images(model, batch=2))
    level = torch.tensor([0] * 2 + [1] * 5 + [2] * 17)
    seen = level[None, :] <= level[:, None]
    assert (maps[..., seen] > 0).all() and not maps[..., ~seen].any()
    # The same by a mask in one call of attention.
    block, x = model.blocks[0], model.embed(images(model, batch=2))
    q, k, v = block.attn.split_heads(x)
    masked = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    assert_close(block.attn(x), block.attn.proj(masked.transpose(1, 2).flatten(2)))


def test_mvit_positions_are_resampled():
    model = make("MViT")
    grid = model.pos_embed.detach().reshape(1, 4, 4, 32).permute(0, 3, 1, 2)
    for i, side in enumerate((1, 2)):
        expected = torch.nn.functional.interpolate(grid, size=(side, side), mode="bicubic", antialias=True)
        assert_close(model.get_buffer(f"to_grid_{i}") @ model.pos_embed, expected.flatten(2).transpose(1, 2), atol=1e-6)


def test_dems_maps_stand_in_grid_order():
    model = make("DEMS").eval()
    x = images(model, batch=2)
    maps = model.attention_maps(x)
    raw = model.blocks[0].attn.weights(model.blocks[0].norm1(model.embed(x)))
    # Grid of 16 x 16 patches, regions of 8 x 8: patch (0, 9) is token 1 of region 1, patch (8, 0) token 0 of region 2;
    # of patch side 2p, 8 x 8, patch (1, 5) is token 5 of region 1; patch 3 of side 8p is the last of all.
    for place, token in [
        (0, 0),
        (1 + 9, 1 + 85 + 1),
        (1 + 8 * 16, 1 + 170),
        (1 + 256 + 13, 1 + 85 + 64 + 5),
        (340, 340),
    ]:
        assert_close(maps[:, 0, :, 0, place], raw[:, :, 0, token], atol=1e-7)
        assert_close(maps[:, 0, :, place, 0], raw[:, :, token, 0], atol=1e-7)


def test_dems_merges_inside_regions():
    merge = dems.Merge(32, 8, regions=4)
    x = torch.randn(2, 1 + 4 * 85, 32)
    y = merge(x)
    assert y.shape == (2, 1 + 4 * 8, 32) and torch.equal(y[:, 0], x[:, 0])
    changed = x.clone()
    changed[:, 1 + 85 : 1 + 170] += 1
    same = (merge(changed) == y).all(dim=-1)[0].tolist()
    assert same == [True] + [True] * 8 + [False] * 8 + [True] * 16


# --- where tokens stand ---


@all_kinds
def test_token_layout(kind):
    model = make(kind).eval()
    layout = model.token_layout()
    n = model.attention_maps(images(model, batch=1)).shape[-1]
    patches, classes = [], set(range(n))
    for scale in layout["scales"]:
        count = scale["grid"][0] * scale["grid"][1]
        assert scale["positions"].shape == (count, 32) and isinstance(scale["name"], str)
        assert 0 <= scale["start"] - scale["first"] <= 1
        patches += range(scale["start"], scale["start"] + count)
    assert len(patches) == len(set(patches)) and set(patches) < classes  # every patch has a place of its own
    classes -= set(patches)
    assert classes == ({0, 2, 7} if kind == "MViT" else {0}) and layout["class_token"] == max(classes)
    finest = max(layout["scales"], key=lambda scale: len(scale["positions"]))
    assert finest["grid"] == model.grid
    assert torch.equal(finest["positions"], model.pos_embed[0, -len(finest["positions"]) :])
    if kind != "MViT":  # the head reads this token
        x = images(model)
        assert_close(model.head(model.forward_features(x)[:, layout["class_token"]]), model(x), atol=1e-6)


@pytest.mark.parametrize("kind", ["ViT", "BN", "Rescale", "DEMS", "MViT"])  # what is left out mixes its tokens
def test_patches_stand_where_the_image_has_them(kind):
    """Other pixels in one of the smallest patches change the scores of this one, and of the larger ones around it."""
    height = make(kind).image_size[0]
    overrides = dict(image_sizes=((8, 4), (32, 16))) if kind == "MViT" else {}
    model = make(kind, image_size=(2 * height, height), **overrides).eval()
    layout, row, column = model.token_layout(), 3, 2
    side, x = height // model.grid[1], images(model, batch=1)
    other = x.clone()
    other[..., row * side : (row + 1) * side, column * side : (column + 1) * side] += 3
    cls = layout["class_token"]
    before, after = (model.attention_maps(each)[0, 0, :, cls].log() for each in (x, other))
    change = after - before
    changed = ((change - change[:, [cls]]).abs() > 1e-4).any(dim=0)  # but for the softmax, which shifts all alike
    expected = torch.zeros(len(changed), dtype=torch.bool)
    for scale in layout["scales"]:
        rows, columns = scale["grid"]
        expected[scale["start"] + row * rows // model.grid[0] * columns + column * columns // model.grid[1]] = True
    assert torch.equal(changed, expected)


@pytest.mark.parametrize(
    "kind,filters",
    [
        ("ViT", [("patch embedding", 4)]),
        ("BN", [("patch embedding", 4)]),
        ("conv stem", [("patch embedding, first convolution", 3)]),
        ("residual stem", [("patch embedding, first convolution", 3)]),
        ("hybrid", [("patch embedding, first convolution", 7)]),
        ("DEMS", [(f"{side} px patches", side) for side in (1, 2, 4, 8)]),
        (
            "DEMS conv stem",
            [(f"{side} px patches, first convolution", 3) for side in (2, 4)]
            + [(f"{side} px patches", side) for side in (8, 16)],
        ),
        ("MViT", [None, None, ("patch embedding", 4)]),
    ],
)
def test_filters_are_of_what_comes_first(kind, filters):
    model = make(kind)
    found = [scale["filters"] for scale in model.token_layout()["scales"]]
    assert [each and (each[0], each[1].shape[-1]) for each in found] == filters
    assert all(each[1].shape[1:] == (3, *each[1].shape[-1:] * 2) for each in found if each)


def test_kernel_of_dems_equals_its_three_convolutions():
    embed = make("DEMS conv stem").patch_embed_8
    kernel, x = embed.kernel(), torch.randn(2, 3, 32, 32)
    assert kernel.shape == (32, 3, 16, 16)
    once = torch.nn.functional.conv2d(x, kernel, embed.proj[-1].bias, stride=16)
    assert_close(once, embed.proj(x))


# --- parts shared between files ---


@pytest.mark.parametrize(
    "part,files",
    [
        ("dropout", [rescale_vit, dems, mvit]),
        ("drop_path", [rescale_vit, dems, mvit]),
        ("attend", [rescale_vit, dems, mvit]),
        ("ConvStem", [dems]),
        ("FeedForward", [rescale_vit, dems, mvit]),
        ("Attention.split_heads", [rescale_vit, dems, mvit]),
        ("Attention.weights", [rescale_vit, dems]),
        ("Attention.forward", [dems]),
        ("Block.forward", [dems]),
    ],
)
def test_shared_parts_read_the_same(part, files):
    def source(file):
        obj = file
        for word in part.split("."):
            obj = getattr(obj, word)
        return inspect.getsource(obj)

    for file in files:
        assert source(file) == source(vit), f"{part} in {file.__name__} differs from models.vit"


def test_parts_that_differ_by_a_word():
    assert inspect.getsource(dems.Attention).replace(", bias=False", "") == inspect.getsource(vit.Attention)
    assert inspect.getsource(dems.Block).replace("1e-5", "1e-6") == inspect.getsource(vit.Block)
    for file in (dems, mvit):
        assert inspect.getsource(file.PatchEmbed) == inspect.getsource(rescale_vit.PatchEmbed)
    for method in ("init_weights", "no_weight_decay", "embed", "token_layout"):
        assert inspect.getsource(getattr(RescaleViT, method)) == inspect.getsource(getattr(ViT, method))


def test_vit_names_are_timms():
    timm = pytest.importorskip("timm")
    sizes = dict(img_size=16, patch_size=4, num_classes=5, embed_dim=32, depth=3, num_heads=2, mlp_ratio=2)
    theirs, ours = timm.models.VisionTransformer(**sizes).eval(), make("ViT").eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert_close(ours(images(ours)), theirs(images(ours)))
    assert ours.no_weight_decay() == theirs.no_weight_decay() & dict(ours.named_parameters()).keys()


# --- messages ---


@pytest.mark.parametrize(
    "kind,overrides,message",
    [
        ("ViT", dict(image_size=30), "image size 30 is not divisible by patch size 4"),
        ("ViT", dict(image_size=(16, 30)), "image size 16x30 is not divisible by patch size 4"),
        ("ViT", dict(heads=3), "dim 32 is not divisible by heads 3"),
        ("conv stem", dict(image_size=18, patch_size=6), "a conv stem needs patches of 2, 4, 8, ... pixels, not 6"),
        ("conv stem", dict(patch_size=1), "a conv stem needs patches of 2, 4, 8, ... pixels, not 1"),
        ("BN", dict(image_size=30), "image size 30 is not divisible by patch size 4"),
        ("Rescale", dict(heads=3), "dim 32 is not divisible by heads 3"),
        ("GN", dict(dim=30), "dim 30 is not divisible by 4, as GN needs"),
        ("hybrid", dict(patch_size=8), "patch size 8 is not a multiple of 16, the stem's stride"),
        ("hybrid", dict(stem_depths=(1, 1)), "stem depths 1 1 are not three, one a block"),
        ("hybrid", dict(stem_width=48), "stem width 48 is not a multiple of 32, the groups of its norms"),
        ("hybrid", dict(image_size=16), "image size 16 leaves the stem one pixel, too few for its norms"),
        ("hybrid", dict(conv_stem=True), "stem_depths, conv_stem and residual_stem ask for more than one stem"),
        ("DEMS", dict(image_size=20), "image size 20 is not divisible by 8, 8 x patch size 1"),
        ("DEMS", dict(heads=3), "dim 32 is not divisible by heads 3"),
        ("DEMS", dict(dim=30), "dim 30 is not divisible by 4, as DEMS needs"),
        ("DEMS", dict(merge_num=(16,)), "merge_num has 1 counts for 2 merge layers"),
        ("DEMS", dict(merge_layer=(2, 4)), "merge layers 2 4 don't rise within 1 .. 3, the depth"),
        ("DEMS", dict(merge_layer=(3, 2)), "merge layers 3 2 don't rise within 1 .. 3, the depth"),
        ("DEMS", dict(merge_num=(86, 8)), "merge count 86 is not within 1 .. 85, the tokens that a region has before"),
        ("DEMS", dict(merge_num=(8, 16)), "merge count 16 is not within 1 .. 8, the tokens that a region has before"),
        ("DEMS conv stem", dict(patch_size=1), "a conv stem needs patches of 2, 4, 8, ... pixels, not 1"),
        ("MViT", dict(image_sizes=(6, 16)), "image size 6 is not divisible by patch size 4"),
        ("MViT", dict(image_size=20, image_sizes=None), "image size 10 is not divisible by patch size 4"),
        ("MViT", dict(image_sizes=(16, 8)), "image sizes 16 8 don't rise to the image size, 16"),
        ("MViT", dict(image_sizes=(8, 12)), "image sizes 8 12 don't rise to the image size, 16"),
        ("MViT", dict(heads=3), "dim 32 is not divisible by heads 3"),
        ("MViT", dict(dim=33, heads=3), "dim 33 is not divisible by 2, as MViT needs"),
    ],
)
def test_bad_sizes(kind, overrides, message):
    with pytest.raises(ValueError) as error:
        make(kind, **overrides)
    assert str(error.value) == message


VITS = "ViT-Ti_16 ViT-S_16 ViT-B_16 ViT-B_32 ViT-L_16 ViT-L_32 ViT-H_14"


@pytest.mark.parametrize(
    "arguments,overrides,message",
    [
        (("ViT-X",), {}, f"unknown model type 'ViT-X', one of {' '.join(MODELS)}"),
        (("ViT-B_16", "XN"), {}, "unknown norm type 'XN', one of LN BN GN Rescale"),
        (("DEMS-Ti", "BN"), {}, f"norm type BN is made for {VITS}, DEMS-Ti has LN only"),
        (("MViT-S", "Rescale"), {}, f"norm type Rescale is made for {VITS}, MViT-S has LN only"),
        (("R50-ViT-B_16", "GN"), {}, f"norm type GN is made for {VITS}, R50-ViT-B_16 has LN only"),
        (("ViT-B_16", "BN"), dict(conv_stem=True), "ViT-B_16 with norm BN takes no conv_stem"),
        (("MViT-Ti",), dict(conv_stem=True), "MViT-Ti with norm LN takes no conv_stem"),
        (("ViT-B_16",), dict(merge_num=(8, 8)), "ViT-B_16 with norm LN takes no merge_num"),
        (("DEMS-Ti",), dict(image_sizes=(16, 32)), "DEMS-Ti with norm LN takes no image_sizes"),
    ],
)
def test_bad_names(arguments, overrides, message):
    with pytest.raises(ValueError) as error:
        create_model(*arguments, **overrides)
    assert str(error.value) == message


@all_kinds
def test_images_of_another_size(kind):
    model = make(kind)
    height = model.image_size[0]
    with pytest.raises(ValueError, match=f"the image is {2 * height}x{height}, the model expects"):
        model(torch.zeros(1, 3, 2 * height, height))


def test_unknown_norm_in_class():
    with pytest.raises(ValueError, match="unknown norm type 'LN', one of BN GN Rescale"):
        RescaleViT(norm_type="LN", **TINY)


@pytest.mark.parametrize("module", [vit, dems, mvit, rescale_vit])
def test_attention_in_bfloat16_is_torchs(module):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 17, 8, dtype=torch.bfloat16).requires_grad_()
    k, v = k[:, :, :11], v[:, :, :11]
    exact = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert (module.attend(q, k, v) - exact).abs().max() < 0.03
    dropped = torch.stack([module.attend(q, k, v, 0.5) for _ in range(400)]).double().mean(dim=0)
    assert (dropped - exact).abs().mean() < 0.05  # dropout keeps the mean


# --- models of others ---


class Own(nn.Module):
    """No more than what models/__init__.py asks for."""

    def __init__(self, *, image_size: int, num_classes: int):
        super().__init__()
        self.head = nn.Linear(3 * image_size**2, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x.flatten(1))


@pytest.mark.parametrize("cls", [Own, f"{__name__}:Own"])
def test_own_model(cls, monkeypatch):
    monkeypatch.setitem(MODELS, "Own", dict(cls=cls))
    model = create_model("Own", image_size=8, num_classes=3)
    assert type(model).__name__ == "Own" and model(torch.zeros(2, 3, 8, 8)).shape == (2, 3)
    with pytest.raises(ValueError, match="Own with norm LN takes no dropout"):
        create_model("Own", image_size=8, num_classes=3, dropout=0.1)
    with pytest.raises(ValueError, match=f"norm type BN is made for {VITS}, Own has LN only"):
        create_model("Own", "BN", image_size=8, num_classes=3)


def test_own_norm_and_own_words(monkeypatch):
    class Words(Own):
        def __init__(self, *, image_size, num_classes, **words):
            super().__init__(image_size=image_size, num_classes=num_classes)
            self.words = words

    monkeypatch.setitem(MODELS, "Own", dict(cls=Own, norm_cls=Words, width=5))
    with pytest.raises(ValueError, match="Own with norm LN takes no width"):
        create_model("Own", image_size=8)
    model = create_model("Own", "GN", image_size=8, num_classes=3, depth=2)
    assert model.words == dict(norm_type="GN", width=5, depth=2)
