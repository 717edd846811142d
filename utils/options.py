"""Every flag of train.py, eval.py and plot.py. Imports no torch, so that --help and a wrong flag are answered at once."""

import argparse
import functools
import os
import shlex
from pathlib import Path

from models import MODELS, NORM_TYPES
from utils import cli, foreign
from utils.cli import Parser, Precision, Replaces, UserError, refuse, world_size
from utils.image_folder import choose_dataset
from utils.presets import AUGS, DATASETS, MAX_IMAGES, NORMALIZE, PICTURES
from utils.run_files import MAX_RUN_ID, RunFiles, run_id

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # for this process
EMNIST_SPLITS = ("byclass", "bymerge", "balanced", "letters", "digits", "mnist")

HIDDEN = argparse.SUPPRESS
DATA_DIR = "data"
MODEL = dict(model_type="ViT-B_16", norm_type="LN", img_size=224)  # defaults, where no checkpoint says it
STEMS = ("conv", "residual")  # --stem, words of models with `_stem` behind them
EVALUATION = ("interpolation", "crop_pct", "scale", "seed", "test_fraction")  # which test images, and how they are cut
SIZES = "patch_size dim depth heads mlp_dim stem merge_num merge_layer img_sizes".split()  # a model's words
WORDS = {"img_size": "image_size", "img_sizes": "image_sizes"}  # of models, where they are not the flags'


# One line a flag; `Parser` ends each text with the default, unless that is given in brackets.
# fmt: off


def _add_device_flags(group) -> None:
    group.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="auto takes the GPU if any")
    group.add_argument("--gpu_id", type=cli.count, default=0, help="which GPU, for one process; torchrun's LOCAL_RANK otherwise")
    group.add_argument("--num_workers", type=cli.bounded(int, 0, 1024), default=min(4, CORES), help="processes that decode a set too large for memory [4, or the cores]")
    group.add_argument("--cache_dir", default=None, metavar="DIR", help="for decoded images of image folders [beside the data; the output folder where that cannot be written]")
    group.add_argument("--no_cache", action="store_true", default=None, help="keep no decoded images on disk")
    group.add_argument("--skip_broken", action="store_true", default=None, help="leave out images that cannot be read, rather than stop")
    group.add_argument("--memory_limit", type=cli.non_negative, default=None, metavar="GIB", help="splits of image folders up to this size as uint8 are kept in memory, larger ones are streamed [a quarter of what is free on the training device and on the host; a continued run keeps its limit]")


def train_parser() -> Parser:
    """The parser of train.py."""
    p = Parser(
        prog="train.py",
        usage="train.py [FLAGS]\n       train.py @recipes/NAME.args [FLAGS]",
        description="Train, fine-tune or validate one Vision Transformer on one data set.\n\n"
        "  python train.py @recipes/demo.args                  flags of a file, and more\n"
        "  python train.py --dataset cifar10 --bf16 --lr 0.01  flags alone\n"
        "  torchrun --nproc_per_node 2 train.py ...            several GPUs, or processes",
        epilog="Results: output/RUN.txt, .jsonl, _checkpoint.bin (best), _last.bin (to go on);\nlogs/RUN for TensorBoard. The same command again continues an unfinished run,\nand leaves a finished one alone.",
    )
    g = p.add_argument_group("run")
    g.add_argument("--name", default=None, help="begins the run id {name}_{model_type}_norm_{norm_type}_fp_{True|False}_img_{size}_pretrain_{T|F}[_seed_N] [the data set's]")
    g.add_argument("--output_dir", default="output", help="for logs and checkpoints")
    g.add_argument("--log_dir", default="logs", help="for TensorBoard")
    g.add_argument("--overwrite", action="store_true", help="delete this run's files and start anew; not where torchrun or SLURM starts the command again")
    g.add_argument("--extend", action="store_true", help="go on with a finished run, its optimizer included, up to more --epochs or --num_steps than it had; the learning rate goes on as in a run of that length")
    g.add_argument("--dry_run", action="store_true", help="check the flags and say what they would do: steps, whether the run is new, unfinished or finished, and how long it would take by finished runs of equal cost")
    g.add_argument("--cells", default=HIDDEN, metavar="FILE", help="with --dry_run: do that for every line of flags in FILE, each in front of the other flags")
    g.add_argument("-v", "--validate", nargs="?", const=True, default=False, type=cli.boolean, metavar="true", help="only evaluate --load_model_dir, or this run's best checkpoint, on the test set; writes nothing but the cache of image files")
    g.add_argument("--seed", type=cli.count, default=None, help="every random choice is a function of (seed, step) [42; with -v, that of the checkpoint]")
    g.add_argument("--local_rank", type=int, default=-1, help=HIDDEN)  # of old launchers
    _add_device_flags(g)

    g = p.add_argument_group("data")
    g.add_argument("--dataset", type=cli.choice(DATASETS, foreign.DATASETS), choices=DATASETS, default=None, metavar="NAME", help=f"one of {' '.join(DATASETS)}; fashionmnist-mini is in the repository [imagefolder where --data_dir holds images, else cifar10]")
    g.add_argument("--data_dir", default=DATA_DIR, help="where data sets are looked for and downloaded to; for imagefolder the folder that holds a folder a class, or train/ and val/ or test/ with these")
    g.add_argument("--labels", default=None, metavar="FILE.csv", help="of an image folder without class folders: columns file,label and perhaps split (train, val, test)")
    g.add_argument("--test_fraction", type=cli.bounded(float, 0, 0.9, open_low=True), default=None, help="part of each class of an image folder without test images that is held out for testing [0.2 where there is no val/ either; with -v, that of the checkpoint]")
    g.add_argument("--emnist_split", choices=EMNIST_SPLITS, default="mnist")
    g.add_argument("--val_fraction", type=cli.rate, default=0.0, help="part of the training images (of image files, of each class) held out to choose the best checkpoint by; where an image folder has val/ and test images it is chosen on val/ instead, else with 0 on the test set, as the reference projects do")
    g.add_argument("--img_size", type=cli.positive_int, default=None, help="side in pixels that images are resized to [224, or that of --load_model_dir]")
    g.add_argument("--normalize", action=Replaces, const="mean std", choices=NORMALIZE, default=None, help="mean and std of the pixels [those of the weights that are loaded, where they are known, else half: to -1..1]")
    g.add_argument("--mean", action=Replaces, const="normalize", type=cli.fraction, nargs=3, default=None, help="of pixels in 0..1, instead of --normalize")
    g.add_argument("--std", action=Replaces, const="normalize", type=cli.positive, nargs=3, default=None, help="of pixels in 0..1, instead of --normalize")
    g.add_argument("--eval_batch_size", type=cli.positive_int, default=256, help="images per forward pass in evaluation, per process")

    g = p.add_argument_group("augmentation")
    g.add_argument("--aug", choices=AUGS, default="crop", help="none; flip; pad: 4 pixels, crop back, flip; crop: random resized crop; mild: crop of most of the area, flip; weak: crop of the whole area at another ratio, flip; strong: crop, flip, RandAugment; dems: crop, flip, colour jitter, grayscale, solarise, rarer towards the end; keras: crop, flip, rotation by up to 7.2 degrees")
    g.add_argument("--aa", dest="aug", type=cli.choice(AUGS, foreign.AUGS), default=HIDDEN, help=HIDDEN)  # timm's names
    g.add_argument("--scale", type=cli.bounded(float, 0, 1, open_low=True), nargs=2, default=None, metavar=("LO", "HI"), help="area of the random resized crop, of the image [0.05 1 for crop, 0.6 1 for mild, 1 1 for weak, 0.8 1 for strong and keras, 0.2 1 for dems]")
    g.add_argument("--interpolation", choices=["bilinear", "bicubic"], default=None, help="[bicubic for mild, weak, strong and dems, else bilinear]")
    g.add_argument("--aug_prob", type=cli.fraction, default=None, help="of dems' jitter, grayscale and solarise, each, in the first epoch; falls to 0 as half a cosine [0.6 for dems]")
    g.add_argument("--reprob", type=cli.fraction, default=0.0, help="probability of random erasing with noise, per image")
    g.add_argument("--mixup", type=cli.non_negative, default=0.0, metavar="ALPHA", help="Beta parameter of mixup; 0 turns it off")
    g.add_argument("--cutmix", type=cli.non_negative, default=0.0, metavar="ALPHA", help="Beta parameter of cutmix; 0 turns it off")
    g.add_argument("--mixup_prob", type=cli.fraction, default=1.0, help="probability of mixing, per update")
    g.add_argument("--mixup_switch_prob", type=cli.fraction, default=0.5, help="probability of cutmix rather than mixup where both are on")
    g.add_argument("--ra", type=cli.positive_int, default=1, metavar="N", help="repeated augmentation: each image comes N times in a row, differently augmented; an epoch is N times as long")
    g.add_argument("--crop_pct", type=cli.bounded(float, 0, 1, open_low=True), default=None, help="evaluation resizes the short side to img_size / crop_pct and cuts the centre; 1 takes the whole image, stretched to a square [1; with -v, that of the checkpoint]")

    g = p.add_argument_group("model")
    g.add_argument("--model_type", choices=MODELS, default=None, metavar="TYPE", help=f"one of {' '.join(MODELS)} [ViT-B_16; with --load_model_dir model, norm and sizes are the checkpoint's]")
    g.add_argument("--norm_type", choices=NORM_TYPES, default=None, help="[LN]")
    for name, text in (("patch_size", "pixels"), ("dim", "width"), ("depth", "blocks"), ("heads", "attention heads"), ("mlp_dim", "hidden width of the MLPs")):
        g.add_argument(f"--{name}", type=cli.positive_int, default=None, help=f"{text}, instead of the model type's")
    g.add_argument("--stem", choices=["none", *STEMS], default=None, help="ViT with norm LN, and DEMS: conv puts 3x3 convolutions of stride 2 before the patch embedding; residual, ViT only, has max-pooling instead of the stride, BatchNorm, and a residual block after each; --patch_size is a power of 2 [none]")
    g.add_argument("--init", choices=["published", "timm"], default=None, help="ViT with norm LN: weights from scratch as in the reference, where class token and positions are 0 and here random, or as timm's: truncated normal, zero biases [published]")
    g.add_argument("--merge_num", type=cli.positive_int, nargs="+", default=None, help="DEMS: tokens that a region keeps at each merge [64 64 for Ti, 64 32 for S]")
    g.add_argument("--merge_layer", type=cli.positive_int, nargs="+", default=None, help="DEMS: the blocks, counted from 1, that the merges come before [6 10]")
    g.add_argument("--img_sizes", type=cli.positive_int, nargs="+", default=None, help="MViT: sides in pixels of the scales, the last is --img_size [half of it, and itself]")
    g.add_argument("--dropout", type=cli.rate, default=None, help="after the embeddings and both MLP layers [the model's: 0.1 for ViT]")
    g.add_argument("--attn_drop", type=cli.rate, default=0.0, help="dropout of attention weights")
    g.add_argument("--drop_path", type=cli.rate, default=0.0, help="stochastic depth of the last block")
    g.add_argument("--pretrained_dir", default=None, metavar="FILE", help="weights to fine-tune from (.npz, .bin, .pth, .safetensors); a head of other classes starts at zero")
    g.add_argument("--load_model_dir", default=None, metavar="FILE", help="weights, head included, to evaluate (-v) or to continue training from")

    g = p.add_argument_group("optimisation")
    g.add_argument("--opt", choices=["sgd", "adamw", "muon"], default="sgd", help="sgd has momentum 0.9; muon takes the matrices of the blocks and of --stem residual, at AdamW's scale of learning rates, and AdamW the rest")
    g.add_argument("--betas", type=cli.rate, nargs=2, default=[0.9, 0.999], help="of AdamW")
    g.add_argument("--num_steps", action=Replaces, const="epochs", type=cli.positive_int, default=10000, help="updates; of --num_steps and --epochs the last one given counts")
    g.add_argument("--epochs", action=Replaces, const="num_steps", type=cli.positive, default=None, help="passes over the training images, instead of --num_steps")
    g.add_argument("--train_batch_size", type=cli.positive_int, default=512, help="images of one update, over all processes and accumulation steps")
    g.add_argument("--gradient_accumulation_steps", type=cli.positive_int, default=1, help="forward passes per update and process; the update stays that of the whole batch")
    g.add_argument("--learning_rate", action=Replaces, const="blr", type=cli.positive, default=None, help="highest learning rate; --lr for short [0.03 for sgd, 0.001 for adamw and muon]")
    g.add_argument("--blr", action=Replaces, const="learning_rate", type=cli.positive, default=None, help="learning rate at batch 256; in force is blr x train_batch_size / 256")
    g.add_argument("--min_lr", type=cli.non_negative, default=0.0, help="learning rate after the last step")
    g.add_argument("--warmup_lr", type=cli.non_negative, default=0.0, help="learning rate that the warm-up rises from")
    g.add_argument("--warmup_steps", action=Replaces, const="warmup_epochs", type=cli.count, default=None, help="steps of linear warm-up [500, or a tenth of a run of 500 steps or fewer]")
    g.add_argument("--warmup_epochs", action=Replaces, const="warmup_steps", type=cli.non_negative, default=None, help="the same in epochs, instead of --warmup_steps")
    g.add_argument("--decay_type", choices=["cosine", "linear", "timm"], default="cosine", help="after the warm-up; timm: the cosine of timm's scheduler, which counts from the start of the run")
    g.add_argument("--decay_by", choices=["step", "epoch"], default="step", help="the learning rate changes at every step, or once an epoch, as DEMS has it: full in the last epoch of the warm-up")
    g.add_argument("--weight_decay", type=cli.non_negative, default=0.0, help="on all parameters but those that a model exempts, as its position embeddings; with sgd on all, as in jeonsworld's")
    g.add_argument("--weight_decay_on_all", action="store_true", help="weight decay on what a model exempts, too")
    g.add_argument("--disable_weight_decay_on_bias_norm", action="store_true", help="no weight decay on biases and norms either")
    g.add_argument("--layer_decay", type=cli.bounded(float, 0, 1, open_low=True), default=1.0, help="learning rate of each block, as a factor of that of the block above")
    g.add_argument("--ema_decay", type=cli.below_one, default=0.0, help="average the weights exponentially with this decay, after a warm-up; average and raw weights are both evaluated, and the better ones count and are kept; 0 turns it off")
    g.add_argument("--freeze", action="store_true", help="train the head alone, of --pretrained_dir; features are computed once where nothing about the images is random (--aug none)")
    g.add_argument("--class_weights", choices=["balanced"], default=None, help="balanced: each class counts alike in the loss, however few images it has [all images count alike]")
    g.add_argument("--max_grad_norm", type=cli.non_negative, default=1.0, help="gradients are clipped to this norm; 0 turns it off")
    g.add_argument("--smoothing", type=cli.rate, default=0.0, help="label smoothing")

    g = p.add_argument_group("precision and speed")
    g.add_argument("--fp16", action=Precision, help="mixed precision: float16 with a gradient scaler on CUDA; elsewhere bfloat16, which a line says")
    g.add_argument("--bf16", action=Precision, help="mixed precision: bfloat16, no scaler needed; of --fp16 and --bf16 the last one given counts")
    g.add_argument("--no_amp", action=Precision, default=HIDDEN, help=HIDDEN)  # neither
    g.add_argument("--fp16_opt_level", choices=["O0", "O1", "O2", "O3"], default="O2", help=HIDDEN)  # Apex's: O0 is float32
    g.add_argument("--loss_scale", type=cli.non_negative, default=0.0, help=HIDDEN)  # of float16: 0 adapts it, another value stays fixed
    g.add_argument("--detect_anomaly", action="store_true", help="when loss or gradient is not finite, say which module made it so; slow, and without --compile; a run that stopped can go on with it")
    g.add_argument("--compile", action="store_true", help="torch.compile: minutes at the start, faster steps on a GPU")
    g.add_argument("--grad_checkpoint", action="store_true", help="keep only each block's input and compute the rest again in the backward pass: a third more work, a fraction of the memory")

    g = p.add_argument_group("logging")
    g.add_argument("--eval_every", type=cli.positive_int, default=100, help="steps between evaluations; the last step is always evaluated")
    g.add_argument("--save_every", type=cli.count, default=0, help="steps between saves of _last.bin besides those at evaluations and every 5 minutes; 0 for none")
    g.add_argument("--ckpt_freq", type=cli.positive_int, default=None, help=HIDDEN)  # --save_every in epochs
    g.add_argument("--log_every", type=cli.positive_int, default=10, help="steps between training scalars in TensorBoard")
    return p


def eval_parser() -> Parser:
    """The parser of eval.py."""
    p = Parser(
        prog="eval.py",
        usage="eval.py CHECKPOINT [FLAGS]",
        description="Evaluate a checkpoint, classify single images with it, or look into it.\nEverything is rebuilt from the checkpoint.\n\n  python eval.py output/RUN_checkpoint.bin\n  python eval.py output/RUN_checkpoint.bin --images shoe.png bag.png\n  python eval.py output/RUN_checkpoint.bin --plot attention errors",
    )
    p.add_argument("checkpoint", help="RUN_checkpoint.bin or RUN_last.bin of train.py")
    p.add_argument("--images", nargs="+", metavar="FILE", help="classify these instead of a data set; of a folder all images in it, into predictions.csv; with --plot attention, look at these")
    p.add_argument("--split", choices=["train", "val", "test"], default="test", help="which images of the data set are scored")
    p.add_argument("--plot", nargs="+", choices=PICTURES, default=None, metavar="KIND", help="draw pictures instead of scoring, as PNG and in the run's TensorBoard folder where that exists: attention (heads, the class token over images, rollout, distance), position (similarity of embeddings), patches (filters), errors (most confident mistakes)")
    p.add_argument("--export", default=None, metavar="FILE", help="write the model for other programs, with FILE's .json beside it: .safetensors (timm's names), .pt2 (torch.export) or .onnx (needs onnx and onnxscript)")
    p.add_argument("--blocks", type=cli.count, nargs="+", default=None, metavar="N", help="of --plot attention, counted from 0 [four, spread evenly]")
    p.add_argument("--heads", type=cli.count, nargs="+", default=None, metavar="N", help="the same of its heads [the first 12]")
    p.add_argument("--top", type=cli.positive_int, default=5, help="classes shown per image")
    p.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    p.add_argument("--output_dir", default=None, help="for predictions.csv, the confusion matrix and pictures [the checkpoint's folder]")
    p.add_argument("--dataset", type=cli.choice(DATASETS, foreign.DATASETS), choices=DATASETS, default=None, metavar="NAME", help="whose test images are scored [that of the checkpoint]")
    p.add_argument("--data_dir", default=None, help="where it is looked for; a folder's test/CLASS/ is scored whole, of CLASS/ alone the part that a run would test on [that of the checkpoint]")
    p.add_argument("--labels", default=None, metavar="FILE.csv", help="of an image folder, as for train.py [that of the checkpoint, where --data_dir is, too]")
    p.add_argument("--emnist_split", choices=EMNIST_SPLITS, default=None, help="[that of the checkpoint]")
    p.add_argument("--eval_batch_size", type=cli.positive_int, default=None, help="images per forward pass [that of the checkpoint]")
    _add_device_flags(p)
    return p


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
    return p


# fmt: on


@functools.cache
def defaults() -> dict:
    """What the flags of train.py are by default, before `check`; runs that are older than a flag had it so."""
    return vars(train_parser().parse_args([]))


def parse_train_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and check what can be checked without data or torch. Exits with status 2 and one line on a mistake.

    `argv` are words of the command line, None for those of this process. With --cells the flags are those of the first
    line, and `cells` has the command and flags of each.
    """
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--cells", default=None)
    file, words = own.parse_known_args(argv)
    if not file.cells:
        return train_parser().parse_args(words, check)
    lines = [line.split() for line in Path(file.cells).read_text().splitlines()] if os.path.isfile(file.cells) else []
    if not lines:
        train_parser().error("nothing to do; look at ARCHS, NORMS, SEEDS and CELL")
    cells = [train_parser().parse_args([*line, *words], check) for line in lines]
    commands = [shlex.join(["python", "train.py", *line, *(w for w in words if w != "--dry_run")]) for line in lines]
    return argparse.Namespace(**vars(cells[0]), cells=list(zip(commands, cells, strict=True)))


def _fill_in(args: argparse.Namespace) -> None:
    """What flags that are not given follow from: the other flags, presets, and the data folder."""
    own_dir = args.data_dir if args.data_dir != DATA_DIR else None
    args.dataset = choose_dataset(args.dataset, own_dir, args.labels) or "cifar10"
    args.name = args.dataset if args.name is None else args.name
    args.asked = {name: value for name in (*MODEL, *SIZES, *EVALUATION) if (value := getattr(args, name)) is not None}
    vars(args).update(MODEL | args.asked)
    args.crop_pct, args.seed = args.crop_pct or 1.0, 42 if args.seed is None else args.seed
    args.stem = None if args.stem == "none" else args.stem  # as where it isn't given, also in older logs
    args.fp16 = args.fp16 and args.fp16_opt_level != "O0"
    if args.blr is not None:
        args.learning_rate = args.blr * args.train_batch_size / 256
    elif args.learning_rate is None:
        args.learning_rate = 0.03 if args.opt == "sgd" else 0.001
    preset = AUGS[args.aug]
    args.flip, args.pad, args.operations = preset.get("flip", False), preset.get("pad", 0), preset.get("operations")
    args.rotation, args.reprob = preset.get("rotation", 0.0), args.reprob or preset.get("reprob", 0.0)
    args.interpolation = args.interpolation or preset.get("interpolation", "bilinear")
    scale = args.scale or preset.get("scale")
    args.scale = list(scale) if scale else None
    args.aug_prob = preset.get("aug_prob", 0.0) if args.aug_prob is None else args.aug_prob
    if args.normalize:
        args.mean, args.std = map(list, NORMALIZE[args.normalize])
    restarted = any(os.environ.get(f"{who}_RESTART_COUNT", "0") != "0" for who in ("TORCHELASTIC", "SLURM"))
    args.overwrite = args.overwrite and not restarted  # torchrun and SLURM start a command again to go on with it


def check(args: argparse.Namespace) -> None:
    """Fill in what is not given, and what -v evaluates; refuse what contradicts itself, with the value and the way out."""
    _fill_in(args)
    name, batch, scale = args.name, args.train_batch_size, args.scale
    for flag in ("min_lr", "warmup_lr"):
        above = getattr(args, flag) > args.learning_rate
        refuse(above, f"--{flag} {getattr(args, flag):g} is above the learning rate, {args.learning_rate:g}; lower it")
    usable = name and not name.startswith(".") and name.isprintable() and not set(name) & {*"/\\"}
    refuse(not usable, f"--name {name!r} must be usable as a file name: no slash, no leading dot")
    excess = len(os.fsencode(run_id(args))) - MAX_RUN_ID
    refuse(excess > 0, f"--name {name!r} makes the run id {excess} bytes longer than {MAX_RUN_ID}; shorten it")
    processes = world_size()
    parts = args.gradient_accumulation_steps * processes
    factors = f"{args.gradient_accumulation_steps} accumulation steps x {processes} processes"
    refuse(batch % parts, f"--train_batch_size {batch} is not divisible by {parts} ({factors})")
    share = f"{batch} / {parts} = {batch // parts}"
    odd = (args.mixup or args.cutmix) and batch // parts % 2
    refuse(odd, f"--mixup and --cutmix need an even number of images per process and pass, not {share}")
    misplaced = args.labels and args.dataset != "imagefolder"
    refuse(misplaced, f"--labels {args.labels} goes with --dataset imagefolder, not {args.dataset}")
    refuse((args.mean is None) != (args.std is None), "--mean and --std go together")
    refuse(scale and scale[0] > scale[1], f"--scale {scale}: the first is above the second")
    for flag in ("scale", "aug_prob"):
        idle = getattr(args, flag) and flag not in AUGS[args.aug]
        others = ", ".join(aug for aug, preset in AUGS.items() if flag in preset)
        refuse(idle, f"--{flag} has no meaning with --aug {args.aug}; --aug {others} would take it")
    headless = args.freeze and not (args.pretrained_dir or args.load_model_dir)
    refuse(headless, "--freeze trains the head alone, of weights that --pretrained_dir FILE gives; it is missing")
    refuse(args.extend and args.overwrite, "--extend goes on with a run, --overwrite deletes it; leave one out")
    both = args.pretrained_dir and args.load_model_dir
    refuse(both, "--pretrained_dir (fine-tune) and --load_model_dir (evaluate or continue) exclude each other")
    if args.validate and not args.load_model_dir:
        fine_tuned = argparse.Namespace(**vars(args) | {"pretrained_dir": "any"})
        paths = list(dict.fromkeys(RunFiles.of(each).best for each in (args, fine_tuned)))
        args.load_model_dir = next((str(path) for path in paths if path.is_file()), None)
        own = " or ".join(map(str, paths))
        refuse(not args.load_model_dir, f"-v evaluates --load_model_dir FILE, or {own}: no such file")
        args.pretrained_dir = None
    weights = args.pretrained_dir or args.load_model_dir
    refuse(weights and os.path.isdir(weights), f"{weights}: a folder; name the file in it, as model.safetensors")
    way_out = "checkpoint/README.md says where weights are got; leave the flag out to start from scratch"
    refuse(weights and not os.path.isfile(weights), f"{weights}: no such file; {way_out}")
    for flag in () if args.validate else ("output_dir", "log_dir"):
        place = Path(getattr(args, flag))
        while not os.path.lexists(place):
            place = place.parent
        fine = place.is_dir() and os.access(place, os.W_OK | os.X_OK)
        refuse(not fine, f"--{flag} {getattr(args, flag)}: {place} is no folder to write into; choose another")


def check_eval(args: argparse.Namespace) -> None:
    """The same for eval.py."""
    plots, images = args.plot or [], args.images or []
    for flag in ("blocks", "heads"):
        missing = getattr(args, flag) is not None and "attention" not in plots
        refuse(missing, f"--{flag} chooses what --plot attention shows, which is missing")
    args.dataset = choose_dataset(args.dataset, args.data_dir, args.labels)
    foreign = args.labels and args.dataset != "imagefolder"
    refuse(foreign, f"--labels {args.labels} goes with --dataset imagefolder, not {args.dataset}")
    data = images and (args.dataset or args.data_dir)
    refuse(data, "--images classifies single files; leave out --dataset and --data_dir")
    others = " ".join(sorted({*plots} - {"attention"}))
    refuse(images and others, f"--images goes with --plot attention alone; draw {others} without --images")
    folder = plots and next((image for image in images if os.path.isdir(image)), None)
    refuse(folder, f"--images {folder}: --plot attention looks at single files")
    other = "--plot" if plots else "--images"
    refuse(args.export and (plots or images), f"--export writes the model, and nothing else; leave out {other}")
    many = plots and len(images) > MAX_IMAGES
    refuse(many, f"--plot attention has room for {MAX_IMAGES} images, not {len(images)}")


def resolve_model(args: argparse.Namespace, config: dict) -> None:
    """Take model and sizes of the checkpoint that --load_model_dir names, but for sizes of images that are given.

    `config` is what made its model. UserError where a flag asks for another model.
    """
    row = MODELS.get(config["model_type"], {})
    for name in (*MODEL, *SIZES):
        word = WORDS.get(name, name)
        its, whole, asked = config.get(word), (row | config).get(word), args.asked.get(name)
        if name == "stem":
            its = whole = next((stem for stem in STEMS if config.get(f"{stem}_stem")), None)
            asked = None if asked == "none" and not its else asked
        if asked is None:
            setattr(args, name, its)
        elif name not in WORDS and asked != (list(whole) if isinstance(whole, tuple) else whole):
            raise UserError(f"{args.load_model_dir} has {name} {whole}, not {asked}; leave --{name} out")


def resolve_steps(args: argparse.Namespace, images: int) -> list[str]:
    """Fill in num_steps, epochs and warmup_steps now that the number of training images is known; lines for the log."""
    per_epoch = images * args.ra / args.train_batch_size
    if args.num_steps is None:
        args.num_steps = max(1, round(args.epochs * per_epoch))
    args.epochs = args.num_steps / per_epoch
    if args.ckpt_freq:
        args.save_every = max(1, round(args.ckpt_freq * per_epoch))
    if args.warmup_epochs is not None:
        args.warmup_steps = round(args.warmup_epochs * per_epoch)
    elif args.warmup_steps is None:
        args.warmup_steps = 500 if args.num_steps > 500 else args.num_steps // 10
    if args.warmup_steps < args.num_steps:
        return []
    why = f"as the {args.warmup_steps} asked for are not fewer than the run's {args.num_steps}"
    args.warmup_steps = args.num_steps // 10
    return [f"Warm-up: {args.warmup_steps} steps, {why}"]


def precision(args: argparse.Namespace) -> str:
    """The precision that the flags ask for: 'fp32', 'bf16' or 'fp16'."""
    return "fp16" if args.fp16 else "bf16" if args.bf16 else "fp32"


def model_config(args: argparse.Namespace) -> dict:
    """Arguments of `create_model` that the flags ask for; `num_classes` comes with the data.

    What the flags leave to the model is not among them, so a model need not know the words of another.
    """
    given = {name: getattr(args, name) for name in (*SIZES, "dropout", "init")}
    overrides = {WORDS.get(name, name): value for name, value in given.items() if value is not None}
    overrides |= {name: getattr(args, name) for name in ("attn_drop", "drop_path") if getattr(args, name)}
    if stem := overrides.pop("stem", None):
        overrides[f"{stem}_stem"] = True
    return dict(model_type=args.model_type, norm_type=args.norm_type, image_size=args.img_size, **overrides)


def describe(args: argparse.Namespace) -> list[str]:
    """Flags in force, a line for each of some groups of the parser: its first one, and what is not the default."""
    lines, off = [], (None, False, 0)
    titles = ("data", "augmentation", "optimisation", "precision and speed")
    for group in train_parser()._action_groups:
        values = {}
        for flag in group._group_actions if group.title in titles else ():
            if not hasattr(args, flag.dest):  # --no_amp, which is another's value
                continue
            value, first = getattr(args, flag.dest), flag is group._group_actions[0]
            if value not in off and (first or value != flag.default) or value in off and flag.default not in off:
                parts = value if isinstance(value, list) else [value]
                values[flag.dest] = " ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in parts)
        if values:
            lines.append(f"Flags, {group.title}: {', '.join(f'{k} {v}' for k, v in values.items())}")
    return lines
