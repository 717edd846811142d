"""Parameter groups, optimizers, averages of weights, the gradient scaler."""

import copy
import re
from argparse import Namespace

import pytest
import torch
from helpers import SIZES

from models import create_model
from utils.optim import Average, Chain, make_optimizer, make_scaler, parameter_groups

MODELS = [
    ("ViT-Ti_16", "LN", dict(patch_size=4)),
    ("ViT-Ti_16", "LN", dict(patch_size=4, residual_stem=True)),
    ("ViT-Ti_16", "Rescale", dict(patch_size=4)),
    ("DEMS-Ti", "LN", dict(patch_size=2, merge_num=(16, 8), merge_layer=(1, 2))),
    ("MViT-Ti", "LN", dict(patch_size=4)),
]


def names_by_decay(model, **kwargs) -> dict[float, set[str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {}
    for group in parameter_groups(model, 0.05, **kwargs):
        found.setdefault(group["weight_decay"], set()).update(names[id(p)] for p in group["params"])
    return found


@pytest.mark.parametrize("model_type, norm_type, words", MODELS)
def test_every_trained_parameter_is_in_one_group(model_type, norm_type, words):
    model = create_model(model_type, norm_type, image_size=16, num_classes=10, **SIZES, **words)
    for kwargs in (dict(), dict(skip_bias_norm=True), dict(layer_decay=0.7)):
        groups = parameter_groups(model, 0.05, **kwargs)
        ids = [id(p) for group in groups for p in group["params"]]
        assert sorted(ids) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    exempt = names_by_decay(model).get(0.0, set())
    assert exempt == getattr(model, "no_weight_decay", set)()
    assert not names_by_decay(model, exempt=False).get(0.0)
    plain = names_by_decay(model, skip_bias_norm=True)[0.0]
    vectors = {name for name, p in model.named_parameters() if p.ndim <= 1 or name.endswith(".bias")}
    assert plain == {name for name in vectors | exempt if model.get_parameter(name).requires_grad}


def test_layer_decay_rises_to_the_head():
    model = create_model("ViT-Ti_16", image_size=16, num_classes=10, patch_size=4, **SIZES)
    scale = {
        id(p): group["lr_scale"] for group in parameter_groups(model, 0.05, layer_decay=0.5) for p in group["params"]
    }
    assert scale[id(model.head.weight)] == scale[id(model.norm.weight)] == 1
    assert scale[id(model.blocks[1].mlp.fc1.weight)] == 0.5
    assert scale[id(model.blocks[0].attn.qkv.bias)] == 0.25
    assert scale[id(model.pos_embed)] == scale[id(model.patch_embed.proj.weight)] == 0.125


def test_layer_decay_of_a_model_with_names_of_its_own():
    """What is made before the blocks has the lowest rate, what after them the full one."""

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.token = torch.nn.Parameter(torch.zeros(3))
            self.stem = torch.nn.Linear(3, 3)
            self.blocks = torch.nn.ModuleList(torch.nn.Linear(3, 3) for _ in range(2))
            self.out = torch.nn.Linear(3, 2)

    model = Net()
    model.blocks[1].requires_grad_(False)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, 0.05, layer_decay=0.5)
    scales = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    lowest, first, full = (dict.fromkeys(each, scale) for each, scale in (
        (("token", "stem.weight", "stem.bias"), 0.125), (("blocks.0.weight", "blocks.0.bias"), 0.25),
        (("out.weight", "out.bias"), 1.0),
    ))  # fmt: skip
    assert scales == lowest | first | full


@pytest.mark.parametrize("opt", ["sgd", "adamw", "muon"])
def test_a_model_needs_no_blocks(opt):
    """Nor names that weight decay leaves out; Muon has no matrices then, and is AdamW."""
    model = torch.nn.Linear(3, 2)
    optimizer = make_optimizer(model, flags(opt), torch.device("cpu"))
    (group,) = optimizer.param_groups
    assert group["params"] == [model.weight, model.bias] and (group["weight_decay"], group["lr_scale"]) == (0.05, 1)
    assert isinstance(optimizer, torch.optim.SGD if opt == "sgd" else torch.optim.AdamW)


@pytest.mark.parametrize("decay", [0.3, 0.9, 0.99999])
def test_average_warms_up_and_goes_on_as_saved(decay):
    """Against its definition, in float64; buffers are the newest."""
    model = create_model("ViT-Ti_16", "BN", image_size=16, num_classes=10, patch_size=4, **SIZES)
    average, expected = Average(model, decay), [p.double() for p in model.parameters()]
    for t in range(1, 8):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        model(torch.randn(4, 3, 16, 16))  # changes the running statistics
        average.update_parameters(model)
        now = min(decay, (t - 1) / (8 + t))
        expected = [now * mean + (1 - now) * p.double() for mean, p in zip(expected, model.parameters(), strict=True)]
        if t == 4:
            state, average = average.state_dict(), Average(model, decay)
            average.load_state_dict(state)
    for mine, theirs in zip(average.module.parameters(), expected, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(average.module.buffers(), model.buffers(), strict=True):
        assert torch.equal(mine, theirs)


def flags(opt: str) -> Namespace:
    rates = dict(learning_rate=0.1, betas=[0.9, 0.999], weight_decay=0.05, layer_decay=0.5)
    return Namespace(opt=opt, disable_weight_decay_on_bias_norm=False, weight_decay_on_all=False, **rates)


@pytest.mark.parametrize("opt, kind", [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW), ("muon", Chain)])
def test_optimizers(opt, kind):
    model = create_model("ViT-Ti_16", image_size=16, num_classes=10, patch_size=4, **SIZES)
    optimizer = make_optimizer(model, flags(opt), torch.device("cpu"))
    assert isinstance(optimizer, kind) and {group["lr"] for group in optimizer.param_groups} == {0.1}
    before = model.head.weight.detach().clone()
    model(torch.randn(2, 3, 16, 16)).sum().backward()
    optimizer.step()
    assert not torch.equal(before, model.head.weight)


@pytest.mark.parametrize("model_type, norm_type, words", MODELS)
def test_muon_takes_the_matrices_of_blocks_and_stem(model_type, norm_type, words):
    model = create_model(model_type, norm_type, image_size=16, num_classes=10, **SIZES, **words)
    chain = make_optimizer(model, flags("muon"), torch.device("cpu"))
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    muon, adamw = (
        [names.pop(id(p)) for group in optimizer.param_groups for p in group["params"]]
        for optimizer in chain.optimizers
    )
    assert not names
    places = r"blocks\.\d+\.(attn|mlp)\.\w+\.weight|patch_embed\.stem\.layers\.\d+\.(conv\d\.)?weight"
    assert all(re.fullmatch(places, name) for name in muon)
    assert sum(name.startswith("patch_embed") for name in muon) == 6 * words.get("residual_stem", False)
    assert not any(name.startswith("blocks.") and name.endswith(("qkv.weight", "fc1.weight")) for name in adamw)
    assert all("lr_scale" in group for group in chain.param_groups)


def test_muon_goes_on_from_its_state():
    def model_and_optimizer():
        torch.manual_seed(0)
        model = create_model("ViT-Ti_16", image_size=16, num_classes=10, patch_size=4, dropout=0.0, **SIZES)
        return model, make_optimizer(model, flags("muon"), torch.device("cpu"))

    def update(model, optimizer):
        model(torch.ones(2, 3, 16, 16)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    model, optimizer = model_and_optimizer()
    update(model, optimizer)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    update(model, optimizer)
    again, resumed = model_and_optimizer()
    again.load_state_dict(weights)
    resumed.load_state_dict(state)
    update(again, resumed)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_scaler_is_idle_but_for_float16_on_cuda():
    for precision in ("fp32", "bf16", "fp16"):
        assert not make_scaler(0.0, torch.device("cpu"), precision).is_enabled()
    fixed = make_scaler(128.0, torch.device("cpu"), "fp16")
    assert not fixed.is_enabled()


def test_momentum_is_defined_after_an_overflow_at_once():
    """The fused step of torch skips such a step, but counts it as the first, from which it would have momentum."""
    model = torch.nn.Module()
    model.weight = weight = torch.nn.Parameter(torch.ones(10_000))
    optimizer = make_optimizer(model, flags("sgd"), torch.device("cpu"))
    scaler = torch.amp.GradScaler("cpu")
    for gradient in (float("inf"), 0.0):
        weight.grad = torch.full_like(weight, gradient)
        scaler.scale(torch.zeros(()))
        scaler.step(optimizer)
        scaler.update()
    assert (optimizer.state[weight]["momentum_buffer"].abs() <= 0.05).all()  # of weight decay


@pytest.mark.parametrize("opt", ["adamw", "muon"])
def test_blocks_are_known_by_themselves_not_by_their_names(opt):
    """As those of a model of another library, in a class of one's own."""

    class Wrapped(torch.nn.Module):
        def __init__(self, model, kind=list):
            super().__init__()
            self.net, self.blocks = model, kind(model.blocks)

    model = create_model("ViT-Ti_16", image_size=16, num_classes=10, **SIZES, patch_size=4)
    words = dict(learning_rate=1.0, weight_decay=0.1, weight_decay_on_all=True, layer_decay=0.5, betas=(0.9, 0.999))
    args = Namespace(opt=opt, disable_weight_decay_on_bias_norm=False, **words)
    found = []
    for each in (model, Wrapped(model), Wrapped(model, torch.nn.ModuleList)):
        names = {p: name.removeprefix("net.") for name, p in each.named_parameters()}
        groups = make_optimizer(each, args, torch.device("cpu")).param_groups
        found.append([(g["lr_scale"], "adjust_lr_fn" in g, {names[p] for p in g["params"]}) for g in groups])
    assert found[0] == found[1] == found[2] and len({scale for scale, _, _ in found[0]}) > 2
    named = Wrapped(model, lambda blocks: torch.nn.ModuleDict({str(i): block for i, block in enumerate(blocks)}))
    assert {group["lr_scale"] for group in parameter_groups(named, 0.1, layer_decay=0.5)} == {1.0}  # no sequence
