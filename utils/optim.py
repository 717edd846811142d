"""Optimizers, their parameter groups, and the gradient scaler."""

from argparse import Namespace

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The layers of a model that has a sequence of `blocks`, whatever their parameters' names are; else none."""
    return [block for block in getattr(model, "blocks", ()) if isinstance(block, nn.Module)]


def parameter_groups(
    model: nn.Module, weight_decay: float, *, exempt: bool = True, skip_bias_norm: bool = False,
    layer_decay: float = 1.0,
) -> list[dict]:  # fmt: skip
    """Trained parameters in groups of equal weight decay and learning rate, for torch's optimizers.

    Args:
        weight_decay: of all but, with `exempt`, what the model's `no_weight_decay()`, if it has one, names.
        skip_bias_norm: none on biases, norms and other vectors either.
        layer_decay: each of the model's `blocks` has this times the rate of the one above it; what is made after them
            has the full rate, what before them the lowest (arXiv 2003.10555, BEiT's): `lr_scale` in each group.
    """
    exempted = getattr(model, "no_weight_decay", set)() if exempt else set()
    blocks = blocks_of(model)
    layers = {p: i for i, block in enumerate(blocks, 1) for p in block.parameters()}
    groups, depth, layer = {}, len(blocks), 0 if blocks else 1
    for name, parameter in model.named_parameters():
        layer = layers.get(parameter) or (depth + 1 if layer else 0)
        if not parameter.requires_grad:
            continue
        plain = name in exempted or (skip_bias_norm and (parameter.ndim <= 1 or name.endswith(".bias")))
        key = (0.0 if plain else weight_decay, layer_decay ** (depth + 1 - layer))
        groups.setdefault(key, []).append(parameter)
    return [dict(params=params, weight_decay=decay, lr_scale=scale) for (decay, scale), params in groups.items()]


class Chain:
    """Optimizers of different parameters, in the place of one."""

    def __init__(self, *optimizers: torch.optim.Optimizer):
        self.optimizers = optimizers

    @property
    def param_groups(self) -> list[dict]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def state_dict(self) -> list[dict]:
        return [optimizer.state_dict() for optimizer in self.optimizers]

    def load_state_dict(self, states: list[dict]) -> None:
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)


def make_optimizer(model: nn.Module, args: Namespace, device: torch.device) -> torch.optim.Optimizer | Chain:
    """SGD with momentum 0.9, AdamW, or Muon (arXiv 2502.16982) with AdamW, as the flags say.

    Muon takes the matrices of the blocks and of a stem, with updates scaled to AdamW's usual size, so that learning
    rates and weight decay mean the same for both; embeddings, head, biases and norms are AdamW's.
    """
    groups = parameter_groups(
        model, args.weight_decay, exempt=args.opt != "sgd" and not args.weight_decay_on_all,
        skip_bias_norm=args.disable_weight_decay_on_bias_norm, layer_decay=args.layer_decay,
    )  # fmt: skip
    fused = device.type in ("cuda", "cpu")
    if args.opt == "sgd":
        optimizer = torch.optim.SGD(groups, lr=args.learning_rate, momentum=0.9, fused=fused)
        for group in optimizer.param_groups:  # the fused step leaves them undefined where float16 overflows at once
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer
    adamw = dict(lr=args.learning_rate, betas=tuple(args.betas), fused=fused)
    hidden = {p for block in blocks_of(model) for p in block.parameters()}
    hidden |= {p for name, p in model.named_parameters() if name.startswith("patch_embed.stem.")}
    matrices = {p for p in hidden if p.ndim == 2 and p.requires_grad}
    if args.opt == "adamw" or not matrices:
        return torch.optim.AdamW(groups, **adamw)

    def part(hidden: bool) -> list[dict]:
        parts = [group | {"params": [p for p in group["params"] if (p in matrices) == hidden]} for group in groups]
        return [group for group in parts if group["params"]]

    muon = torch.optim.Muon(part(True), lr=args.learning_rate, adjust_lr_fn="match_rms_adamw")
    return Chain(muon, torch.optim.AdamW(part(False), **adamw))


class Average(AveragedModel):
    """Exponential moving average of a model's weights, as torch's, which would wait for a GPU at every update.

    It warms up: after t updates the next one decays by t / (9 + t) at most, as in TensorFlow, so that the first
    weights don't stay in it for long.
    """

    def __init__(self, model: nn.Module, decay: float):
        super().__init__(model)
        self.decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        updates = int(self.n_averaged)  # a tensor on the CPU
        decay = min(self.decay, updates / (9 + updates))  # 0 at first: a copy
        torch._foreach_lerp_(list(self.module.parameters()), list(model.parameters()), 1 - decay)
        for mine, new in zip(self.module.buffers(), model.buffers(), strict=True):
            mine.copy_(new)
        self.n_averaged += 1


def make_scaler(loss_scale: float, device: torch.device, precision: str) -> torch.amp.GradScaler:
    """Scales float16 gradients on CUDA, by a fixed `loss_scale` or, with 0, one that adapts; else does nothing."""
    never = dict(growth_interval=2**31 - 1, backoff_factor=1 - 1e-12)  # rounds to 1 in float32
    words = dict(init_scale=loss_scale, **never) if loss_scale else {}
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16" and device.type == "cuda", **words)
