"""Every flag of train.py, eval.py and plot.py. Imports no torch, so that --help and a wrong flag are answered at once."""

import argparse
import os
from pathlib import Path

from utils.cli import (
    MAX_REAL,
    Parser,
    Replaces,
    UserError,
    boolean,
    bounded,
    count,
    fraction,
    non_negative,
    positive,
    positive_int,
    rate,
    real,
)

DATASETS = ("cifar10", "cifar100", "fashionmnist", "fashionmnist-mini", "emnist", "caltech101", "imagefolder")
PLOTS = ("attention", "position", "patches", "errors")
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # for this process
MAX_IMAGES = 8  # that pictures of attention have room for
MAX_RUN_ID = 200  # bytes; file systems take 255, and suffixes and temporary names come on top
EMNIST_SPLITS = ("byclass", "bymerge", "balanced", "letters", "digits", "mnist")

# --normalize: per-channel (mean, std) of pixels in 0..1.
NORMALIZE = {
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "cifar": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}

# --aug: `scale` is the area range of a random resized crop (ratio 3/4..4/3), `pad` the border of an integer crop.
AUGS = {
    "none": dict(interpolation="bilinear"),
    "flip": dict(flip=True, interpolation="bilinear"),
    "pad": dict(pad=4, flip=True, interpolation="bilinear"),
    "crop": dict(scale=(0.05, 1.0), interpolation="bilinear"),
    "weak": dict(scale=(1.0, 1.0), flip=True, interpolation="bicubic"),
    "strong": dict(scale=(0.8, 1.0), flip=True, operations="randaugment", interpolation="bicubic"),
    "dems": dict(scale=(0.2, 1.0), flip=True, operations="jitter", aug_prob=0.6, interpolation="bicubic"),
    "keras": dict(scale=(0.8, 1.0), flip=True, rotation=7.2, interpolation="bilinear"),  # RandomRotation(0.02)
}

# Flags that may differ between a run and its continuation, as they don't change what is computed.
NOT_SETTINGS = frozenset(
    "name output_dir log_dir overwrite validate device gpu_id local_rank num_workers memory_limit eval_batch_size log_every save_every grad_checkpoint detect_anomaly".split()
)


# One line a flag.
# fmt: off


def _add_device_flags(group) -> None:
    group.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="auto takes the GPU if any [auto]")
    group.add_argument("--gpu_id", type=count, default=0, help="which GPU, for one process; torchrun's LOCAL_RANK otherwise [0]")
    group.add_argument("--num_workers", type=bounded(int, 0, 1024), default=min(4, CORES), help="processes that decode a set too large for memory [4, or the cores]")
    group.add_argument("--memory_limit", type=non_negative, default=None, metavar="GIB", help="splits of image folders up to this size as uint8 are kept in memory, larger ones are streamed [a quarter of what is free on the training device and on the host; a continued run keeps its limit]")
    group.add_argument("--eval_batch_size", type=positive_int, default=None, help="images per forward pass in evaluation, per process [256]")


def _add_data_flags(group, dataset: str | None) -> None:
    group.add_argument("--dataset", choices=DATASETS, default=dataset, help="fashionmnist-mini is in the repository [%(default)s]")
    group.add_argument("--data_dir", "--data_path", "--data_location", default=None if dataset is None else "data", help="where data sets are looked for and downloaded to; for imagefolder the folder that holds train/ and val/ or test/ [data]")
    group.add_argument("--emnist_split", choices=EMNIST_SPLITS, default=None if dataset is None else "mnist", help="[mnist]")


def train_parser(model_types, norm_types) -> Parser:
    """The parser of train.py.

    Args:
        model_types: choices of --model_type.
        norm_types: choices of --norm_type.
    """
    p = Parser(
        prog="train.py",
        usage="train.py --name NAME [FLAGS]\n       train.py @recipes/NAME.args [FLAGS]",
        description="Train, fine-tune or validate one Vision Transformer on one data set.\n\n"
        "  python train.py @recipes/demo.args                       flags from a file, more may follow\n"
        "  python train.py --name c10 --dataset cifar10 --model_type ViT-B_32 --pretrained_dir checkpoint/imagenet21k_ViT-B_32.npz\n"
        "  torchrun --nproc_per_node 2 train.py ...                 several GPUs, or processes on CPU",
        epilog="Results: output/RUN.txt, .jsonl, _checkpoint.bin (best) and _last.bin (to continue); logs/RUN for TensorBoard.\nThe same command again continues an unfinished run and leaves a finished one alone.",
    )
    g = p.add_argument_group("run")
    g.add_argument("--name", required=True, help="begins the run id {name}_{model_type}_norm_{norm_type}_fp_{True|False}_img_{size}_pretrain_{T|F}[_seed_N]")
    g.add_argument("--output_dir", default="output", help="for logs and checkpoints [output]")
    g.add_argument("--log_dir", default="logs", help="for TensorBoard [logs]")
    g.add_argument("--overwrite", action="store_true", help="delete this run's files and start anew")
    g.add_argument("-v", "--validate", nargs="?", const=True, default=False, type=boolean, metavar="true", help="only evaluate --load_model_dir on the test set; writes nothing")
    g.add_argument("--seed", type=count, default=42, help="every random choice is a function of (seed, step) [42]")
    g.add_argument("--local_rank", "--local-rank", type=int, default=-1, help="accepted for old launchers; torchrun's LOCAL_RANK counts")
    _add_device_flags(g)

    g = p.add_argument_group("data")
    _add_data_flags(g, "cifar10")
    g.add_argument("--val_fraction", type=rate, default=0.0, help="part of the training images held out to choose the best checkpoint by; with 0 it is chosen on the test set, as the reference projects do [0]")
    g.add_argument("--img_size", type=positive_int, default=224, help="side in pixels that images are resized to [224]")
    g.add_argument("--normalize", choices=NORMALIZE, default=None, help="mean and std of the pixels [those of the checkpoint that is loaded, else half: to -1..1]")
    g.add_argument("--mean", type=real, nargs=3, default=None, help="of pixels in 0..1, instead of --normalize")
    g.add_argument("--std", type=positive, nargs=3, default=None, help="of pixels in 0..1, instead of --normalize")

    g = p.add_argument_group("augmentation")
    g.add_argument("--aug", choices=AUGS, default="crop", help="none; flip; pad: 4 pixels, crop back, flip; crop: random resized crop; weak: crop of the whole area at another ratio, flip; strong: crop, flip, RandAugment; dems: crop, flip, colour jitter, grayscale, solarise, rarer towards the end; keras: crop, flip, rotation by up to 7.2 degrees [crop]")
    g.add_argument("--scale", type=bounded(float, 0, 1, open_low=True), nargs=2, default=None, metavar=("LO", "HI"), help="area of the random resized crop, of the image [0.05 1 for crop, 1 1 for weak, 0.8 1 for strong and keras, 0.2 1 for dems]")
    g.add_argument("--interpolation", choices=["bilinear", "bicubic"], default=None, help="[bicubic for weak, strong and dems, else bilinear]")
    g.add_argument("--aug_prob", type=fraction, default=None, help="of dems' jitter, grayscale and solarise, each, in the first epoch; falls to 0 as half a cosine [0.6 for dems]")
    g.add_argument("--reprob", type=fraction, default=0.0, help="probability of random erasing with noise, per image [0]")
    g.add_argument("--mixup", type=non_negative, default=0.0, metavar="ALPHA", help="Beta parameter of mixup; 0 turns it off [0]")
    g.add_argument("--cutmix", type=non_negative, default=0.0, metavar="ALPHA", help="Beta parameter of cutmix; 0 turns it off [0]")
    g.add_argument("--mixup_prob", type=fraction, default=1.0, help="probability of mixing, per update [1]")
    g.add_argument("--mixup_switch_prob", type=fraction, default=0.5, help="probability of cutmix rather than mixup where both are on [0.5]")
    g.add_argument("--ra", type=positive_int, default=1, metavar="N", help="repeated augmentation: each image comes N times in a row, differently augmented; an epoch is N times as long [1]")
    g.add_argument("--crop_pct", type=bounded(float, 0, 1, open_low=True), default=1.0, help="evaluation resizes the short side to img_size / crop_pct and cuts the centre; 1 takes the whole image, stretched to a square [1]")

    g = p.add_argument_group("model")
    g.add_argument("--model_type", "--model", choices=model_types, default="ViT-B_16", metavar="TYPE", help=f"one of {' '.join(model_types)} [ViT-B_16]")
    g.add_argument("--norm_type", choices=norm_types, default="LN", help="[LN]")
    for name, text in (("patch_size", "pixels"), ("dim", "width"), ("depth", "blocks"), ("heads", "attention heads"), ("mlp_dim", "hidden width of the MLPs")):
        g.add_argument(f"--{name}", type=positive_int, default=None, help=f"{text}, instead of the model type's")
    g.add_argument("--stem", choices=["none", "conv"], default=None, help="ViT with norm LN, and DEMS: conv puts 3x3 convolutions of stride 2 before the patch embedding; --patch_size is a power of 2 [none]")
    g.add_argument("--merge_num", type=positive_int, nargs="+", default=None, help="DEMS: tokens that a region keeps at each merge [64 64 for Ti, 64 32 for S]")
    g.add_argument("--merge_layer", type=positive_int, nargs="+", default=None, help="DEMS: the blocks, counted from 1, that the merges come before [6 10]")
    g.add_argument("--img_sizes", type=positive_int, nargs="+", default=None, help="MViT: sides in pixels of the scales, the last is --img_size [half of it, and itself]")
    g.add_argument("--dropout", type=rate, default=None, help="after the embeddings and both MLP layers [the model's: 0.1 for ViT]")
    g.add_argument("--attn_drop", type=rate, default=0.0, help="dropout of attention weights [0]")
    g.add_argument("--drop_path", type=rate, default=0.0, help="stochastic depth of the last block [0]")
    g.add_argument("--pretrained_dir", default=None, metavar="FILE", help="weights to fine-tune from (.npz, .bin, .pth, .safetensors); a head of other classes starts at zero")
    g.add_argument("--load_model_dir", default=None, metavar="FILE", help="weights, head included, to evaluate (-v) or to continue training from")

    g = p.add_argument_group("optimisation")
    g.add_argument("--opt", choices=["sgd", "adamw", "muon"], default="sgd", help="sgd has momentum 0.9; muon takes the matrices of the blocks, at AdamW's scale of learning rates, and AdamW the rest [sgd]")
    g.add_argument("--betas", type=rate, nargs=2, default=[0.9, 0.999], help="of AdamW [0.9 0.999]")
    g.add_argument("--num_steps", action=Replaces, const="epochs", type=positive_int, default=10000, help="updates [10000]; of --num_steps and --epochs the last one given counts")
    g.add_argument("--epochs", action=Replaces, const="num_steps", type=positive, default=None, help="passes over the training images, instead of --num_steps")
    g.add_argument("--train_batch_size", "--batch_size", type=positive_int, default=512, help="images of one update, over all processes and accumulation steps [512]")
    g.add_argument("--gradient_accumulation_steps", type=positive_int, default=1, help="forward passes per update and process; the update stays that of the whole batch [1]")
    g.add_argument("--learning_rate", "--lr", action=Replaces, const="blr", type=positive, default=None, help="highest learning rate [0.03 for sgd, 0.001 for adamw and muon]")
    g.add_argument("--blr", action=Replaces, const="learning_rate", type=positive, default=None, help="learning rate at batch 256; in force is blr x train_batch_size / 256")
    g.add_argument("--min_lr", type=non_negative, default=0.0, help="learning rate after the last step [0]")
    g.add_argument("--warmup_lr", type=non_negative, default=0.0, help="learning rate that the warm-up rises from [0]")
    g.add_argument("--warmup_steps", action=Replaces, const="warmup_epochs", type=count, default=None, help="steps of linear warm-up [500, or a tenth of a run of 500 steps or fewer]")
    g.add_argument("--warmup_epochs", action=Replaces, const="warmup_steps", type=non_negative, default=None, help="the same in epochs, instead of --warmup_steps")
    g.add_argument("--decay_type", choices=["cosine", "linear"], default="cosine", help="after the warm-up [cosine]")
    g.add_argument("--decay_by", choices=["step", "epoch"], default="step", help="the learning rate changes at every step, or once an epoch [step]")
    g.add_argument("--weight_decay", type=non_negative, default=0.0, help="on all parameters but those that a model exempts, as its position embeddings [0]")
    g.add_argument("--disable_weight_decay_on_bias_norm", action="store_true", help="no weight decay on biases and norms either")
    g.add_argument("--layer_decay", type=bounded(float, 0, 1, open_low=True), default=1.0, help="learning rate of each block, as a factor of that of the block above [1]")
    g.add_argument("--ema_decay", type=rate, default=0.0, help="average the weights exponentially with this decay; the average is what is evaluated and kept, the raw weights are scored beside it; 0 turns it off [0]")
    g.add_argument("--max_grad_norm", type=non_negative, default=1.0, help="gradients are clipped to this norm; 0 turns it off [1]")
    g.add_argument("--smoothing", "--label_smoothing", type=rate, default=0.0, help="label smoothing [0]")

    g = p.add_argument_group("precision and speed")
    g.add_argument("--fp16", action="store_true", help="mixed precision: float16 with a gradient scaler on CUDA; elsewhere bfloat16, which a line says")
    g.add_argument("--bf16", action="store_true", help="mixed precision: bfloat16, no scaler needed")
    g.add_argument("--fp16_opt_level", choices=["O0", "O1", "O2", "O3"], default="O2", help="Apex's levels: O0 is float32; O1, O2 and O3 all mean torch.amp here [O2]")
    g.add_argument("--loss_scale", type=non_negative, default=0.0, help="of float16: 0 adapts it, another value stays fixed [0]")
    g.add_argument("--sync_bn", action="store_true", help="BatchNorm's batch statistics are taken over all GPUs, not on each by itself; --norm_type BN only")
    g.add_argument("--detect_anomaly", action="store_true", help="when loss or gradient is not finite, say which module made it so; slow, and without --compile; a run that stopped can go on with it")
    g.add_argument("--compile", action="store_true", help="torch.compile: minutes at the start, faster steps on a GPU")
    g.add_argument("--grad_checkpoint", action="store_true", help="keep only each block's input and compute the rest again in the backward pass: a third more work, a fraction of the memory")

    g = p.add_argument_group("logging")
    g.add_argument("--eval_every", type=positive_int, default=100, help="steps between evaluations; the last step is always evaluated [100]")
    g.add_argument("--save_every", type=count, default=0, help="steps between saves of _last.bin besides those at evaluations and every 5 minutes; 0 for none [0]")
    g.add_argument("--log_every", type=positive_int, default=10, help="steps between training scalars in TensorBoard [10]")
    return p


# fmt: on


def parse_train_args(argv: list[str] | None, model_types, norm_types, check_sizes) -> argparse.Namespace:
    """Parse and check what can be checked without data or torch. Exits with status 2 and one line on a mistake.

    Args:
        argv: words of the command line, None for those of this process.
        model_types, norm_types: choices.
        check_sizes: called with the arguments of `create_model`; raises ValueError at sizes that don't fit.
    """
    parser = train_parser(model_types, norm_types)
    args = parser.parse_args(argv)
    try:
        check(args)
        check_sizes(**model_config(args))
    except ValueError as error:
        parser.error(str(error))
    args.stem = None if args.stem == "none" else args.stem  # as where it isn't given, also in older logs
    args.fp16 = args.fp16 and args.fp16_opt_level != "O0"
    if (args.learning_rate, args.blr) == (None, None):
        args.learning_rate = 0.03 if args.opt == "sgd" else 0.001
    if args.blr is not None:
        args.learning_rate = args.blr * args.train_batch_size / 256
    args.eval_batch_size = args.eval_batch_size or 256
    preset = AUGS[args.aug]
    args.flip, args.pad = preset.get("flip", False), preset.get("pad", 0)
    args.scale = list(args.scale or preset["scale"]) if "scale" in preset else None
    args.interpolation = args.interpolation or preset["interpolation"]
    args.operations, args.rotation = preset.get("operations"), preset.get("rotation", 0.0)
    args.aug_prob = preset.get("aug_prob", 0.0) if args.aug_prob is None else args.aug_prob
    if args.normalize and args.mean is None:
        args.mean, args.std = map(list, NORMALIZE[args.normalize])
    return args


def check(args: argparse.Namespace) -> None:
    """Refuse flags that contradict one another.

    Raises:
        UserError: with the value and the way out.
    """
    if not args.name or args.name.startswith(".") or any(c in "/\\" or not c.isprintable() for c in args.name):
        raise UserError(f"--name {args.name!r} must be usable as a file name: no slash, no leading dot")
    excess = len(os.fsencode(run_id(args))) - MAX_RUN_ID
    if excess > 0:
        raise UserError(f"--name {args.name!r} makes the run id {excess} bytes longer than {MAX_RUN_ID}; shorten it")
    processes = world_size()
    parts = args.gradient_accumulation_steps * processes
    if args.train_batch_size % parts:
        factors = f"{args.gradient_accumulation_steps} accumulation steps x {processes} processes"
        raise UserError(f"--train_batch_size {args.train_batch_size} is not divisible by {parts} ({factors})")
    if (args.mean is None) != (args.std is None):
        raise UserError("--mean and --std go together")
    if args.scale and args.scale[0] > args.scale[1]:
        raise UserError(f"--scale {args.scale[0]} {args.scale[1]}: the first is above the second")
    if args.scale and "scale" not in AUGS[args.aug]:
        raise UserError(f"--scale has no meaning with --aug {args.aug}; use --aug crop, weak, strong, dems or keras")
    if args.aug_prob is not None and "aug_prob" not in AUGS[args.aug]:
        raise UserError(f"--aug_prob has no meaning with --aug {args.aug}; use --aug dems")
    if (args.mixup or args.cutmix) and args.train_batch_size // parts % 2:
        share = f"{args.train_batch_size} / {parts} = {args.train_batch_size // parts}"
        raise UserError(f"--mixup and --cutmix need an even number of images per process and pass, not {share}")
    if args.ra > args.train_batch_size:
        raise UserError(f"--ra {args.ra} is more than --train_batch_size {args.train_batch_size}")
    if args.grad_checkpoint and args.norm_type in ("BN", "Rescale"):
        raise UserError(
            f"--grad_checkpoint computes blocks twice, which {args.norm_type} would count in its statistics"
        )
    if args.sync_bn and args.norm_type != "BN":
        raise UserError(f"--sync_bn has no meaning with --norm_type {args.norm_type}; it is for BN")
    if args.fp16 and args.bf16:
        raise UserError("--fp16 and --bf16 exclude each other")
    if args.pretrained_dir and args.load_model_dir:
        raise UserError("--pretrained_dir (fine-tune) and --load_model_dir (evaluate or continue) exclude each other")
    if args.validate and not args.load_model_dir:
        raise UserError("-v evaluates --load_model_dir FILE, which is missing")
    for path in (args.pretrained_dir, args.load_model_dir):
        if path and not os.path.isfile(path):
            raise UserError(
                f"{path}: no such file; put downloaded weights there, or leave the flag out to start from scratch"
            )
    if args.num_steps and args.warmup_steps is not None:
        check_warmup(args.warmup_steps, args.num_steps)
    for flag in () if args.validate else ("output_dir", "log_dir"):
        place = Path(getattr(args, flag))
        while not os.path.lexists(place):
            place = place.parent
        if not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
            raise UserError(f"--{flag} {getattr(args, flag)}: {place} is no folder to write into; choose another")


def world_size() -> int:
    """The number of processes, from torchrun's environment; 1 without one.

    Raises:
        UserError: the environment is not whole.
    """
    world = os.environ.get("WORLD_SIZE", "1")
    if world == "1":
        return 1
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        value = os.environ.get(name, "")
        if not (value if name == "MASTER_ADDR" else value.isdecimal() and int(value) >= (name == "WORLD_SIZE")):
            raise UserError(f"WORLD_SIZE {world!r} with {name} {value!r}: start with torchrun, or unset WORLD_SIZE")
    return int(os.environ["WORLD_SIZE"])


def check_warmup(warmup_steps: int, num_steps: int) -> None:
    if warmup_steps >= num_steps:
        raise UserError(
            f"the warm-up of {warmup_steps} steps is not shorter than the run of {num_steps}; lower --warmup_steps"
        )


def resolve_normalization(args: argparse.Namespace, checkpoint_args: dict | None) -> None:
    """Without a flag, pixels are normalised as in the checkpoint that the run starts from, or to -1..1."""
    if args.mean is None:
        half = dict(zip(("mean", "std"), map(list, NORMALIZE["half"]), strict=True))
        args.mean, args.std = ((checkpoint_args or half)[name] for name in ("mean", "std"))


def resolve_steps(args: argparse.Namespace, images: int) -> None:
    """Fill in num_steps, epochs and warmup_steps now that the number of training images is known.

    Raises:
        UserError: the warm-up is not shorter than the run.
    """
    per_epoch = images * args.ra / args.train_batch_size
    if args.num_steps is None:
        args.num_steps = max(1, round(args.epochs * per_epoch))
    args.epochs = args.num_steps / per_epoch
    if args.warmup_epochs is not None:
        args.warmup_steps = round(args.warmup_epochs * per_epoch)
    elif args.warmup_steps is None:
        args.warmup_steps = 500 if args.num_steps > 500 else args.num_steps // 10
    check_warmup(args.warmup_steps, args.num_steps)


def run_id(args: argparse.Namespace) -> str:
    """The name of a run's files."""
    pretrained = "T" if args.pretrained_dir or args.load_model_dir else "F"
    seed = "" if args.seed == 42 else f"_seed_{args.seed}"
    mixed = args.fp16 or args.bf16
    return f"{args.name}_{args.model_type}_norm_{args.norm_type}_fp_{mixed}_img_{args.img_size}_pretrain_{pretrained}{seed}"


def precision(args: argparse.Namespace) -> str:
    """The precision that the flags ask for: 'fp32', 'bf16' or 'fp16'."""
    return "fp16" if args.fp16 else "bf16" if args.bf16 else "fp32"


def model_config(args: argparse.Namespace) -> dict:
    """Arguments of `create_model` that the flags ask for; `num_classes` comes with the data."""
    names = "patch_size dim depth heads mlp_dim merge_num merge_layer dropout attn_drop drop_path".split()
    overrides = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.img_sizes:
        overrides["image_sizes"] = args.img_sizes
    if args.stem == "conv":
        overrides["conv_stem"] = True
    return dict(model_type=args.model_type, norm_type=args.norm_type, image_size=args.img_size, **overrides)


def settings(args: argparse.Namespace) -> dict:
    """The flags that decide what a run computes."""
    return {name: value for name, value in vars(args).items() if name not in NOT_SETTINGS}


def _three(values) -> bool:
    return isinstance(values, list) and [type(value) for value in values] == [float] * 3


# What a checkpoint's flags must be for eval.py, and for a run that starts from it; a file may hold anything.
RECORDED = {
    "img_size": lambda value: type(value) is int,
    "eval_batch_size": lambda value: type(value) is int and value > 0,
    "mean": lambda value: _three(value) and all(-MAX_REAL <= number <= MAX_REAL for number in value),
    "std": lambda value: _three(value) and all(0 < number <= MAX_REAL for number in value),
    "crop_pct": lambda value: type(value) is float and 0 < value <= 1,
    "interpolation": lambda value: value in ("bilinear", "bicubic"),
    "dataset": lambda value: value in DATASETS,
    "emnist_split": lambda value: value in EMNIST_SPLITS,
    "data_dir": lambda value: isinstance(value, str) and "\0" not in value,
    "log_dir": lambda value: isinstance(value, str),
}


def recorded(path: str | os.PathLike, state: dict) -> dict:
    """The flags and classes, `args` and `classes`, that a checkpoint of train.py records.

    Raises:
        UserError: they are not as train.py writes them.
    """
    args, classes = state["args"], state["classes"]
    try:
        wrong = [name for name, check in RECORDED.items() if not check(args[name])]
        name = run_id(argparse.Namespace(**args))
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{path}: its flags are not those of train.py ({error}); train it again") from None
    if wrong:
        raise UserError(f"{path}: its {wrong[0]} is {args[wrong[0]]!r}, not as train.py writes it; train it again")
    if Path(name).name != name or not name.isprintable():
        raise UserError(f"{path}: its run id {name!r} is no file name; train it again")
    if not isinstance(classes, list) or not all(isinstance(name, str) and name.isprintable() for name in classes):
        raise UserError(f"{path}: its classes are not names; train it again")
    return {"args": args, "classes": classes}


def eval_parser() -> Parser:
    """The parser of eval.py."""
    p = Parser(
        prog="eval.py",
        usage="eval.py CHECKPOINT [FLAGS]",
        description="Evaluate a checkpoint, classify single images with it, or look into it. Everything is rebuilt from the checkpoint.\n\n  python eval.py output/RUN_checkpoint.bin\n  python eval.py output/RUN_checkpoint.bin --images shoe.png bag.png\n  python eval.py output/RUN_checkpoint.bin --plot attention errors",
    )
    # fmt: off
    p.add_argument("checkpoint", help="RUN_checkpoint.bin or RUN_last.bin of train.py")
    p.add_argument("--images", nargs="+", metavar="FILE", help="classify these instead of a data set; with --plot attention, look at these")
    p.add_argument("--plot", nargs="+", choices=PLOTS, default=None, metavar="KIND", help="draw pictures instead of scoring, as PNG and in the run's TensorBoard folder where that exists: attention (heads, the class token over images, rollout, distance), position (similarity of embeddings), patches (filters), errors (most confident mistakes)")
    p.add_argument("--blocks", type=count, nargs="+", default=None, metavar="N", help="of --plot attention, counted from 0 [four, spread evenly]")
    p.add_argument("--top", type=positive_int, default=5, help="classes shown per image [5]")
    p.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    p.add_argument("--output_dir", default=None, help="for the confusion matrix and pictures [the checkpoint's folder]")
    # fmt: on
    _add_data_flags(p, None)
    _add_device_flags(p)
    return p


def check_plot(args: argparse.Namespace) -> None:
    """Refuse flags of eval.py that don't go with what is to be drawn.

    Raises:
        UserError: with the way out.
    """
    plots = set(args.plot or [])
    if args.blocks is not None and "attention" not in plots:
        raise UserError("--blocks chooses what --plot attention shows, which is missing")
    if args.images and plots and plots != {"attention"}:
        other = min(plots - {"attention"})
        raise UserError(f"--images goes with --plot attention alone; draw {other} without --images")
    if plots and args.images and len(args.images) > MAX_IMAGES:
        raise UserError(f"--plot attention has room for {MAX_IMAGES} images, not {len(args.images)}")


# fmt: off


def plot_parser() -> Parser:
    """The parser of plot.py."""
    p = Parser(
        prog="plot.py",
        usage="plot.py [RUNS] [FLAGS]",
        description="Tables and curves of runs: of this project, and of ChaofanTao/RescaleViT.\n\n  python plot.py output/ --logs logs/\n  python plot.py output/RUN.jsonl --out .",
    )
    p.add_argument("runs", nargs="?", default="output", help="folder with .jsonl or .txt of runs, or one such file [output]")
    p.add_argument("--logs", default=None, metavar="DIR", help="TensorBoard folders of the runs; draws the training loss of every logged step [none]")
    p.add_argument("--out", default=None, metavar="DIR", help="for results.md, results.csv and the pictures; made where missing [the folder of the runs]")
    p.add_argument("--plan", nargs=argparse.REMAINDER, default=None, metavar="FLAG", help="only say what train.py with these flags, up to the end of the line, would do: steps, state, and time by finished runs of equal cost")
    return p
