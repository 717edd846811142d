"""Every --model_type with its sizes, and `create_model`. Imports torch only when a model is made."""

SIZES = {
    "Ti": dict(dim=192, depth=12, heads=3, mlp_dim=768),
    "S": dict(dim=384, depth=12, heads=6, mlp_dim=1536),
    "B": dict(dim=768, depth=12, heads=12, mlp_dim=3072),
    "L": dict(dim=1024, depth=24, heads=16, mlp_dim=4096),
    "H": dict(dim=1280, depth=32, heads=16, mlp_dim=5120),
}

# What stands before the first hyphen is the family, which decides the class. MViT has 12 heads at every size.
MODELS = {
    "ViT-Ti_16": dict(patch_size=16, **SIZES["Ti"]),
    "ViT-S_16": dict(patch_size=16, **SIZES["S"]),
    "ViT-B_16": dict(patch_size=16, **SIZES["B"]),
    "ViT-B_32": dict(patch_size=32, **SIZES["B"]),
    "ViT-L_16": dict(patch_size=16, **SIZES["L"]),
    "ViT-L_32": dict(patch_size=32, **SIZES["L"]),
    "ViT-H_14": dict(patch_size=14, **SIZES["H"]),
    "R50-ViT-B_16": dict(patch_size=16, stem_depths=(3, 4, 9), stem_width=64, **SIZES["B"]),
    "DEMS-Ti": dict(patch_size=2, merge_num=(64, 64), merge_layer=(6, 10), **SIZES["Ti"]),
    "DEMS-S": dict(patch_size=2, merge_num=(64, 32), merge_layer=(6, 10), **SIZES["S"]),
    "MViT-Ti": dict(patch_size=2, **SIZES["Ti"]) | dict(heads=12),
    "MViT-S": dict(patch_size=2, **SIZES["S"]) | dict(heads=12),
    "MViT-B": dict(patch_size=2, **SIZES["B"]) | dict(heads=12),
}

NORM_TYPES = ("LN", "BN", "GN", "Rescale")

# Constructor words that one family alone has.
OWN_WORDS = {"R50": {"stem_depths", "stem_width"}, "DEMS": {"merge_num", "merge_layer"}, "MViT": {"image_sizes"}}


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def _shown(size: tuple[int, int]) -> str:
    return str(size[0]) if size[0] == size[1] else f"{size[0]}x{size[1]}"


# The largest values of what is counted. Nobody trains beyond them, and what lies far beyond would fill the memory.
LIMITS = dict(
    patch_size=4096, dim=2**16, depth=1000, heads=2**16, mlp_dim=2**20, channels=1024, stem_depths=1000, stem_width=4096
) | dict(image_size=8192, image_sizes=8192, merge_num=1000, merge_layer=1000, num_classes=2**20)  # fmt: skip
MAX_PARAMETERS = 10**10
MAX_TOKENS = 2**20
SEQUENCES = ("image_size", "image_sizes", "merge_num", "merge_layer", "stem_depths")  # words that may have several
RATES = ("dropout", "attn_drop", "drop_path")
SWITCHES = ("conv_stem",)


def _numbers(value) -> list:
    """The numbers of a size: itself, or those of its sequences."""
    return [number for part in value for number in _numbers(part)] if isinstance(value, (tuple, list)) else [value]


def _check_number(word: str, number) -> None:
    if word in RATES and not (isinstance(number, (int, float)) and 0 <= number < 1):
        raise ValueError(f"{word} {number!r} is not within 0 .. 1")
    if word in SWITCHES and type(number) is not bool:
        raise ValueError(f"{word} {number!r} is neither True nor False")
    if word in LIMITS and not (type(number) is int and 1 <= number <= LIMITS[word]):
        raise ValueError(f"{word} {number!r} is not a whole number within 1 .. {LIMITS[word]}")


def _check_numbers(sizes: dict) -> None:
    for word, value in sizes.items():
        for number in _numbers(value) if word in SEQUENCES else [value]:
            _check_number(word, number)
    (height, width), patch, dim = _pair(sizes["image_size"]), sizes["patch_size"], sizes["dim"]
    tokens = (height // patch) * (width // patch)
    parameters = sizes["depth"] * (4 * dim**2 + 2 * dim * sizes["mlp_dim"]) + dim * (3 * patch**2 + tokens)
    if tokens > MAX_TOKENS or parameters > MAX_PARAMETERS:
        raise ValueError(
            f"about {parameters:.1e} parameters and {tokens} tokens are more than {MAX_PARAMETERS:.0e} and {MAX_TOKENS}"
        )


def _check_image(family: str, patch_size: int, size: tuple[int, int], image_sizes: list[tuple[int, int]]) -> None:
    multiple, named = patch_size, f"patch size {patch_size}"
    if family == "DEMS":
        multiple, named = 8 * patch_size, f"{8 * patch_size}, 8 x {named}"
    for height, width in image_sizes:
        if height % multiple or width % multiple:
            raise ValueError(f"image size {_shown((height, width))} is not divisible by {named}")
    if image_sizes != sorted(set(image_sizes)) or image_sizes[-1] != size:
        shown = " ".join(map(_shown, image_sizes))
        raise ValueError(f"image sizes {shown} don't rise to the image size, {_shown(size)}")


def _check_merges(depth: int, merge_num: tuple[int, ...], merge_layer: tuple[int, ...]) -> None:
    if len(merge_num) != len(merge_layer):
        raise ValueError(f"merge_num has {len(merge_num)} counts for {len(merge_layer)} merge layers")
    if list(merge_layer) != sorted(set(merge_layer)) or not all(1 <= layer <= depth for layer in merge_layer):
        raise ValueError(f"merge layers {' '.join(map(str, merge_layer))} don't rise within 1 .. {depth}, the depth")
    before = 85  # tokens in a region: 64 + 16 + 4 + 1
    for num in merge_num:
        if not 1 <= num <= before:
            raise ValueError(f"merge count {num} is not within 1 .. {before}, the tokens that a region has before")
        before = num


def model_sizes(model_type: str, norm_type: str = "LN", image_size: int | tuple[int, int] = 224, **overrides) -> dict:
    """Constructor words of a model: its row of MODELS with `overrides` in place.

    Checked here too what can be checked without torch, so that a wrong flag is answered at once.

    Raises:
        ValueError: unknown model or norm, or sizes that don't fit one another.
    """
    if model_type not in MODELS:
        raise ValueError(f"unknown model type {model_type!r}, one of {' '.join(MODELS)}")
    if norm_type not in NORM_TYPES:
        raise ValueError(f"unknown norm type {norm_type!r}, one of {' '.join(NORM_TYPES)}")
    family = model_type.split("-")[0]
    if norm_type != "LN" and family != "ViT":
        raise ValueError(f"norm type {norm_type} is made for plain ViT models, {model_type} has LN only")
    for owner, words in OWN_WORDS.items():
        for word in sorted(words & overrides.keys()):
            if owner != family:
                raise ValueError(f"{word} belongs to {owner} models, {model_type} has none")
    if "conv_stem" in overrides and (family not in ("ViT", "DEMS") or norm_type != "LN"):
        raise ValueError(f"a conv stem is made for ViT with norm LN and DEMS, not for {model_type} with {norm_type}")
    sizes = MODELS[model_type] | overrides
    _check_numbers(sizes | dict(image_size=image_size, image_sizes=sizes.get("image_sizes") or ()))

    size = _pair(image_size)
    image_sizes = [size]
    if family == "MViT":
        image_sizes = [_pair(s) for s in sizes.get("image_sizes") or ((size[0] // 2, size[1] // 2), size)]
    _check_image(family, sizes["patch_size"], size, image_sizes)
    if sizes["dim"] % sizes["heads"]:
        raise ValueError(f"dim {sizes['dim']} is not divisible by heads {sizes['heads']}")
    kind = family if norm_type == "LN" else norm_type
    divisor = {"DEMS": 4, "MViT": 2, "GN": 4}.get(kind, 1)
    if sizes["dim"] % divisor:
        raise ValueError(f"dim {sizes['dim']} is not divisible by {divisor}, as {kind} needs")
    if family == "DEMS":
        _check_merges(sizes["depth"], sizes["merge_num"], sizes["merge_layer"])
    patch_size = sizes["patch_size"]
    if sizes.get("conv_stem") and (patch_size == 1 or patch_size.bit_count() > 1):
        raise ValueError(f"a conv stem needs patches of 2, 4, 8, ... pixels, not {patch_size}")
    if family == "R50":
        if len(sizes["stem_depths"]) != 3:
            raise ValueError(f"stem depths {sizes['stem_depths']} are not three, one a block")
        if sizes["patch_size"] % 16:
            raise ValueError(f"patch size {sizes['patch_size']} is not a multiple of 16, the stem's stride")
        if sizes["stem_width"] % 32:
            raise ValueError(f"stem width {sizes['stem_width']} is not a multiple of 32, the groups of its norms")
    return sizes


def create_model(
    model_type: str,
    norm_type: str = "LN",
    image_size: int | tuple[int, int] = 224,
    num_classes: int = 1000,
    **overrides,
):
    """Make a model with fresh weights.

    Args:
        model_type: a key of MODELS.
        norm_type: a member of NORM_TYPES; other than LN for plain ViT models only.
        image_size: side in pixels, or (height, width).
        num_classes: size of the head.
        **overrides: constructor words of the model, in place of its row of MODELS (`dim=32, depth=3, ...`).

    Returns:
        The module; `model(x)` maps images (b, 3, h, w) to logits (b, num_classes).

    Raises:
        ValueError: unknown names or sizes that don't fit one another.
    """
    _check_number("num_classes", num_classes)
    sizes = model_sizes(model_type, norm_type, image_size, **overrides) | dict(
        image_size=image_size, num_classes=num_classes
    )
    family = model_type.split("-")[0]
    if family == "DEMS":
        from models.dems import DEMS

        return DEMS(**sizes)
    if family == "MViT":
        from models.mvit import MViT

        return MViT(**sizes)
    if norm_type != "LN":
        from models.rescale_vit import RescaleViT

        return RescaleViT(norm_type=norm_type, **sizes)
    from models.vit import ViT

    return ViT(**sizes)
