"""Reading weight files: kinds, reports, refusals. Parity with the published implementations is in test_models.py."""

import numpy as np
import pytest
import torch
from helpers import SIZES, write_google_npz

from models import create_model
from utils.checkpoint import kept_weights, read_last, save
from utils.cli import UserError
from utils.weights import load_weights, read_weights, resize_pos_embed

TINY = dict(patch_size=4, **SIZES)
OWN = dict(args={}, classes=["a"], config={}, precision="fp32")  # of a checkpoint of train.py, beside its weights


def tiny(**changes):
    return create_model("ViT-Ti_16", **{**dict(image_size=16, num_classes=10), **TINY, **changes})


def message(function, *args) -> str:
    with pytest.raises(UserError) as error:
        function(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def npz(tmp_path):
    path = tmp_path / "weights.npz"
    write_google_npz(path, **SIZES, patch=4, grid=4, classes=21)
    return path


def test_npz_report_with_another_head_and_grid(npz):
    model = tiny(image_size=24)
    report = load_weights(model, npz)
    assert report.resized == ["pos_embed"]
    assert report.reinitialised == ["head.weight", "head.bias"]
    assert report.ignored == ["pre_logits.weight", "pre_logits.bias"]
    assert len(report.loaded) == len(model.state_dict()) - 3
    assert not model.head.weight.any() and not model.head.bias.any()
    assert str(report).startswith(
        "29 tensors loaded; resized: pos_embed; re-initialised: head.weight, head.bias; ignored: pre_"
    )


def test_rows_of_a_position_embedding(tmp_path):
    """Whether the class token has a row is known from the kind of file, not guessed from its number of rows."""
    state = tiny().state_dict()
    scaled = state | {f"blocks.{i}.ls{j}.gamma": torch.ones(32) for i in range(2) for j in (1, 2)}
    model = tiny(image_size=24)
    for rows, base, expected in [
        (9, state, "its 9 rows are no square grid and a class token"),  # 2 x 4 and one, or 3 x 3
        (16, state, "its 16 rows are no square grid and a class token"),
        (18, scaled, "its 18 rows are no square grid and a class token"),
    ]:
        torch.save(base | {"pos_embed": torch.randn(1, rows, 32)}, tmp_path / "w.pth")
        assert expected in message(load_weights, model, tmp_path / "w.pth")
    pos = torch.randn(1, 16, 32)
    torch.save(scaled | {"pos_embed": pos}, tmp_path / "deit3.pth")
    model = tiny()
    load_weights(model, tmp_path / "deit3.pth")
    assert not model.pos_embed[0, 0].any() and torch.equal(model.pos_embed[:, 1:], pos)
    own = OWN | dict(model=tiny(image_size=(8, 16)).state_dict(), config=dict(image_size=(8, 16), patch_size=4))
    torch.save(own, tmp_path / "run_checkpoint.bin")
    load_weights(model, tmp_path / "run_checkpoint.bin")
    rows = own["model"]["pos_embed"][0, 1:].view(2, 4, 32)
    assert torch.allclose(model.pos_embed[0, 1:].view(4, 4, 32)[::3], rows, atol=1e-6)
    turned = tiny(image_size=(16, 8))  # as many rows, of another grid
    assert load_weights(turned, tmp_path / "run_checkpoint.bin").resized == ["pos_embed"]
    assert torch.allclose(turned.pos_embed[0, 1:].view(4, 2, 32)[::3], rows[:, ::3], atol=1e-6)
    own["model"]["pos_embed"][0, 5] = np.nan
    torch.save(own, tmp_path / "run_checkpoint.bin")
    assert "pos_embed has values that are not finite" in message(load_weights, model, tmp_path / "run_checkpoint.bin")


def test_resizing_is_bilinear_with_aligned_corners():
    side, rows, columns = 4, 7, 10
    pos = torch.randn(1, 1 + side * side, 3, dtype=torch.float64)
    out = resize_pos_embed(pos, (side, side), (rows, columns))
    assert torch.equal(out[:, 0], pos[:, 0])
    grid = pos[0, 1:].view(side, side, 3).numpy()
    y, x = np.linspace(0, side - 1, rows), np.linspace(0, side - 1, columns)
    y0, x0 = np.minimum(y.astype(int), side - 2), np.minimum(x.astype(int), side - 2)
    wy, wx = (y - y0)[:, None, None], (x - x0)[None, :, None]
    top = grid[y0][:, x0] * (1 - wx) + grid[y0][:, x0 + 1] * wx
    bottom = grid[y0 + 1][:, x0] * (1 - wx) + grid[y0 + 1][:, x0 + 1] * wx
    expected = top * (1 - wy) + bottom * wy
    assert np.abs(out[0, 1:].view(rows, columns, 3).numpy() - expected).max() < 1e-5


def test_a_model_that_is_frozen_before_it_is_loaded(npz):
    model = tiny(image_size=24).requires_grad_(False)
    assert load_weights(model, npz).resized == ["pos_embed"]
    expected = "patch_embed.proj.weight is (32, 3, 4, 4) in the file, (32, 3, 8, 8) in the model"
    assert expected in message(load_weights, tiny(patch_size=8).requires_grad_(False), npz)


@pytest.mark.parametrize("wrap", [torch.compile, torch.nn.DataParallel])
def test_a_model_that_is_wrapped(npz, wrap):
    model = tiny(num_classes=21)
    assert len(load_weights(wrap(model), npz).loaded) == len(model.state_dict())
    assert torch.equal(model.head.weight, read_weights(npz).state["head.weight"])


def test_non_square_model_loads_a_square_file(npz):
    model = tiny(image_size=(16, 24))
    assert load_weights(model, npz).resized == ["pos_embed"]
    assert model(torch.randn(1, 3, 16, 24)).shape == (1, 10)


def test_checkpoints_of_this_project(tmp_path):
    """Other files hold no flags; an average is what counts; an exact load needs all of a model's weights."""
    state, path = tiny().state_dict(), tmp_path / "run.bin"
    average = {f"module.{name}": value + 1 for name, value in state.items()} | {"n_averaged": torch.tensor(3)}
    run = OWN | dict(model=state, average=average, args={"mean": [0.0], "std": [1.0]})
    torch.save(run, path)
    file = read_weights(path)
    assert file.own["args"] == run["args"] and file.normalize == ([0.0], [1.0]) and file.origin == "this project"
    assert kept_weights(run).keys() == state.keys() and kept_weights(run | {"average": None}) is state
    model = tiny()
    assert not load_weights(model, path, exact=True).ignored
    assert all(torch.equal(model.state_dict()[name], value + 1) for name, value in state.items())
    theirs = dict(model={f"vit.{name}": v for name, v in state.items()}, classes=["a"], args={"mean": 0.5, "seed": "x"})
    for other in (state, {"model": state}, theirs, theirs | {"config": "vit.yaml"}):
        torch.save(other, path)
        file = read_weights(path)
        assert file.own == {} and file.normalize is None and file.state.keys() == state.keys()
    torch.save({name: value for name, value in state.items() if not name.startswith("head.")}, path)
    assert str(load_weights(model, path)) == "30 tensors loaded; re-initialised: head.weight, head.bias"
    with pytest.raises(UserError, match="lacks head.weight, head.bias"):
        load_weights(model, path, exact=True)
    torch.save(tiny(num_classes=4).state_dict(), path)
    with pytest.raises(UserError, match="its head is of 4 classes, the data has 10"):
        load_weights(model, path, exact=True)
    torch.save(tiny(dim=64).state_dict(), path)  # as many classes
    with pytest.raises(UserError, match=r"cls_token is \(1, 1, 64\) in the file, \(1, 1, 32\) in the model"):
        load_weights(model, path, exact=True)
    torch.save(state | {"head.weight": torch.zeros(10, 64)}, path)  # reads more than the class token
    with pytest.raises(UserError, match=r"head.weight is \(10, 64\) in the file, \(10, 32\) in the model"):
        load_weights(model, path, exact=True)


def test_merges_before_other_blocks(tmp_path):
    """Tensors don't show where a DEMS merges; the run's settings do."""
    words = SIZES | dict(depth=3, image_size=32, patch_size=4, num_classes=10, merge_num=(16, 8))
    first, other = (create_model("DEMS-Ti", **words, merge_layer=layers) for layers in ((1, 2), (2, 3)))
    path, config = tmp_path / "run.bin", dict(merge_layer=[1, 2])
    torch.save(OWN | dict(model=first.state_dict(), config=config), path)
    assert len(load_weights(first, path).loaded) == len(first.state_dict())
    with pytest.raises(UserError, match=r"merges tokens before blocks \[1, 2\], the model before \[2, 3\]"):
        load_weights(other, path)
    with pytest.raises(UserError):  # a model without merges
        load_weights(tiny(depth=3, image_size=32), path)


def test_norms_of_another_type_start_anew(tmp_path):
    """BN and GN have names in common; fine-tuning takes nothing of the one for the other."""
    for theirs in ("LN", "BN", "GN", "Rescale"):
        source = tiny(norm_type=theirs)
        for parameter in source.parameters():
            torch.nn.init.normal_(parameter)
        torch.save(source.state_dict(), tmp_path / "w.pth")
        for ours in {"LN", "BN", "GN", "Rescale"} - {theirs}:
            model = tiny(norm_type=ours)
            fresh = {name: value.clone() for name, value in model.state_dict().items()}
            report = load_weights(model, tmp_path / "w.pth")
            assert len(report.loaded) == 22 and not set(report.loaded) & set(report.reinitialised)
            assert all(torch.equal(model.state_dict()[name], fresh[name]) for name in report.reinitialised)
            with pytest.raises(UserError):
                load_weights(model, tmp_path / "w.pth", exact=True)


def test_norms_of_another_project_do_not(tmp_path):
    """A plain BatchNorm has the names of LayerNorm, and statistics besides."""
    torch.save(tiny().state_dict() | {"blocks.0.norm1.running_mean": torch.ones(32)}, tmp_path / "w.pth")
    assert "blocks.0.norm1.running_mean: no place for it in ViT" in message(load_weights, tiny(), tmp_path / "w.pth")


def test_a_head_of_several_layers_starts_anew_as_it_was_made(tmp_path):
    """At zero, its hidden layers would stay there."""

    def model(classes: int):
        vit = tiny()
        vit.head = torch.nn.Sequential(torch.nn.Linear(32, 16), torch.nn.GELU(), torch.nn.Linear(16, classes))
        return vit

    torch.save(model(4).state_dict(), tmp_path / "w.pth")
    other, same = model(10), model(4)
    fresh = {name: value.clone() for name, value in other.head.state_dict().items()}
    assert len(load_weights(other, tmp_path / "w.pth").reinitialised) == 4
    assert all(torch.equal(other.head.state_dict()[name], value) for name, value in fresh.items())
    assert not load_weights(same, tmp_path / "w.pth", exact=True).reinitialised
    with pytest.raises(UserError, match=r"head.2.weight is \(4, 16\) in the file, \(10, 16\) in the model"):
        load_weights(other, tmp_path / "w.pth", exact=True)


# ---------------------------------------------------------------- refusals


def test_averaged_weights_come_first(tmp_path):
    raw, averaged = tiny(), tiny()
    for key in ("model_ema", "ema_model", "ema"):
        torch.save({"model": raw.state_dict(), key: averaged.state_dict()}, tmp_path / "w.pth")
        model = tiny()
        assert f"of {key} and model the averaged weights" in str(load_weights(model, tmp_path / "w.pth"))
        assert torch.equal(model.pos_embed, averaged.pos_embed)


def test_blocks_that_were_compiled_one_by_one(tmp_path):
    compiled = tiny()
    for i, block in enumerate(compiled.blocks):
        compiled.blocks[i] = torch.compile(block)
    torch.save(torch.nn.DataParallel(compiled).state_dict(), tmp_path / "w.pth")
    assert len(load_weights(tiny(), tmp_path / "w.pth", exact=True).loaded) == 32


def test_weights_under_a_strange_key(tmp_path):
    torch.save({"network": tiny().state_dict(), "epoch": 3}, tmp_path / "w.pth")
    expected = "holds no weights under the usual keys, but network, epoch; save them under model"
    assert expected in message(read_weights, tmp_path / "w.pth")


def test_tensors_on_the_meta_device_hold_nothing(tmp_path):
    torch.save(tiny().state_dict() | {"norm.weight": torch.ones(32, device="meta")}, tmp_path / "w.pth")
    assert "norm.weight does not fit (Tensor.item() " in message(load_weights, tiny(), tmp_path / "w.pth")


def test_layer_scale_of_another_length(tmp_path):
    for scale in (torch.ones(1), torch.ones(33), torch.ones(32, 1), torch.ones(())):
        torch.save(tiny().state_dict() | {"blocks.0.ls1.gamma": scale}, tmp_path / "w.pth")
        assert "blocks.0.ls1.gamma: no place for it in ViT" in message(load_weights, tiny(), tmp_path / "w.pth")


def test_attention_in_parts_must_be_whole(tmp_path):
    state = tiny().state_dict()
    parts = dict(zip(("q", "k", "v"), state.pop("blocks.0.attn.qkv.weight").chunk(3), strict=True))
    state |= {f"blocks.0.attn.{part}.weight": value.clone() for part, value in parts.items()}
    torch.save(state, tmp_path / "w.pth")
    assert len(load_weights(tiny(), tmp_path / "w.pth").loaded) == 32
    torch.save(state | {"blocks.0.attn.v.weight": torch.ones(32, 16)}, tmp_path / "w.pth")
    assert "query, key and value of an attention don't belong together" in message(read_weights, tmp_path / "w.pth")
    del state["blocks.0.attn.k.weight"]
    torch.save(state, tmp_path / "w.pth")
    expected = "blocks.0.attn.q.weight, blocks.0.attn.v.weight: no place for it in ViT"
    assert expected in message(load_weights, tiny(), tmp_path / "w.pth")


def test_the_newer_whole_save_is_read(tmp_path):
    last, previous = tmp_path / "last.bin", tmp_path / "prev.bin"
    assert read_last(last, previous) == (None, last)
    save(last, {"step": 1})
    save(last, {"step": 2}, previous)
    assert read_last(last, previous) == ({"step": 2}, last)
    last.write_bytes(last.read_bytes()[:-100])
    assert read_last(last, previous) == ({"step": 1}, previous)
    last.unlink()  # as between the two renames of a save
    assert read_last(last, previous) == ({"step": 1}, previous)
    previous.write_bytes(b"")
    assert f"{previous}: damaged, so the run cannot go on; --overwrite" in message(read_last, last, previous)
    last.write_bytes(b"")
    assert f"{last} and {previous}: damaged" in message(read_last, last, previous)
