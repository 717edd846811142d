"""Every --model_type with its class and sizes, and `create_model`. Imports torch only when a model is made.

What a model owes:

- Its constructor takes `image_size` (side in pixels, or height and width), `num_classes`, and the words of its row of
  MODELS. It checks its sizes itself, and raises ValueError with the values where they don't fit one another.
- `forward(x)`: images (b, 3, h, w), normalised, -> logits (b, num_classes).

What it may have, each with what happens without:

- Other words of the constructor, such as `dropout`: the flags of train.py that ask for them are refused.
- `head`, a torch.nn.Linear: no --freeze; weights for other classes are refused, instead of a new head.
- `blocks`, a sequence of its layers, made after the embeddings and before norm and head: no --layer_decay, no
  --grad_checkpoint; --opt muon takes no matrix.
- `no_weight_decay()`, names of parameters that weight decay leaves out: none.
- `grid`, rows and columns of patches: a `pos_embed` of another grid in a weight file is refused, not resampled.
- `fixed`, names of tables that follow from the sizes: those of other sizes in a weight file are refused, not left out.
- `attention_maps(x)` -> (b, depth, heads, n, n), `token_layout()`, and `image_size` (height, width): no --plot
  attention, position and patches.

`token_layout()` tells where things stand in `attention_maps`: dict(class_token=place of the token that is read out,
scales=[...]), a dict a size of patches: `name` for people, `grid`, `first` token (its own class token, if any),
`start`, the first patch, `positions` (n, d) of its patches, and `filters`, a name and a kernel (d, c, p, p).
"""

import inspect
import pkgutil

SIZES = {
    "Ti": dict(dim=192, depth=12, heads=3, mlp_dim=768),
    "S": dict(dim=384, depth=12, heads=6, mlp_dim=1536),
    "B": dict(dim=768, depth=12, heads=12, mlp_dim=3072),
    "L": dict(dim=1024, depth=24, heads=16, mlp_dim=4096),
    "H": dict(dim=1280, depth=32, heads=16, mlp_dim=5120),
}
VIT = dict(cls="models.vit:ViT", norm_cls="models.rescale_vit:RescaleViT")
HYBRID = dict(cls="models.vit:ViT", stem_depths=(3, 4, 9), stem_width=64)
DEMS = dict(cls="models.dems:DEMS", patch_size=2, merge_layer=(6, 10))
MVIT = dict(cls="models.mvit:MViT", patch_size=2)

# `cls` is the model's class, or where to find it; `norm_cls` the one for norms other than LN, which takes `norm_type`.
MODELS = {
    "ViT-Ti_16": VIT | SIZES["Ti"] | dict(patch_size=16),
    "ViT-S_16": VIT | SIZES["S"] | dict(patch_size=16),
    "ViT-B_16": VIT | SIZES["B"] | dict(patch_size=16),
    "ViT-B_32": VIT | SIZES["B"] | dict(patch_size=32),
    "ViT-L_16": VIT | SIZES["L"] | dict(patch_size=16),
    "ViT-L_32": VIT | SIZES["L"] | dict(patch_size=32),
    "ViT-H_14": VIT | SIZES["H"] | dict(patch_size=14),
    "R50-ViT-B_16": HYBRID | SIZES["B"] | dict(patch_size=16),
    "DEMS-Ti": DEMS | SIZES["Ti"] | dict(merge_num=(64, 64)),
    "DEMS-S": DEMS | SIZES["S"] | dict(merge_num=(64, 32)),
    "MViT-Ti": MVIT | SIZES["Ti"] | dict(heads=12),  # 12 at every size
    "MViT-S": MVIT | SIZES["S"] | dict(heads=12),
    "MViT-B": MVIT | SIZES["B"] | dict(heads=12),
}
NORM_TYPES = ("LN", "BN", "GN", "Rescale")


def create_model(
    model_type: str, norm_type: str = "LN", image_size: int | tuple[int, int] = 224, num_classes: int = 1000,
    **overrides,
):  # fmt: skip
    """Make a model with fresh weights: `model(x)` maps images (b, 3, h, w) to logits (b, num_classes).

    Args:
        model_type: a key of MODELS.
        norm_type: a member of NORM_TYPES; other than LN for models with a `norm_cls` only.
        image_size: side in pixels, or (height, width).
        overrides: constructor words of the model, in place of its row of MODELS (`dim=32, depth=3, ...`).

    ValueError: unknown names, words that the model doesn't have, or sizes that don't fit one another.
    """
    if model_type not in MODELS:
        raise ValueError(f"unknown model type {model_type!r}, one of {' '.join(MODELS)}")
    if norm_type not in NORM_TYPES:
        raise ValueError(f"unknown norm type {norm_type!r}, one of {' '.join(NORM_TYPES)}")
    words = dict(MODELS[model_type])
    cls, norm_cls = words.pop("cls"), words.pop("norm_cls", None)  # of the table alone: `overrides` may be a file's
    words |= overrides | dict(image_size=image_size, num_classes=num_classes)
    if norm_type != "LN":
        if norm_cls is None:
            owners = " ".join(name for name, row in MODELS.items() if "norm_cls" in row)
            raise ValueError(f"norm type {norm_type} is made for {owners}, {model_type} has LN only")
        cls, words["norm_type"] = norm_cls, norm_type
    if isinstance(cls, str):
        cls = pkgutil.resolve_name(cls)
    known = inspect.signature(cls).parameters
    unknown = [word for word in words if word not in known]
    if unknown and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        raise ValueError(f"{model_type} with norm {norm_type} takes no {unknown[0]}")
    return cls(**words)
