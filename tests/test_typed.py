"""What users of other projects type: their lines run, or are answered by the line to type; suggestions are near."""

import re
import shlex

import pytest
import torch
from helpers import ROOT, SIZES, in_process, places, run
from tqdm import tqdm

import train
from models import create_model
from utils import cli, options

MIGRATING = (ROOT / "docs" / "migrating.md").read_text(encoding="utf-8")
THEIRS = re.findall(
    r"^(?!\$)(?:WANDB_NAME.*?|python3? |vitrun .*?)((?:train|main|eval_cls|eval_cls_ffcv|eval)\.py|main_\w+) (.*)$",
    "\n".join(re.findall(r"```text\n(.*?)```", MIGRATING, re.DOTALL)),
    re.MULTILINE,
)
SHORT = "--dataset fashionmnist-mini --dim 32 --depth 2 --heads 2 --mlp_dim 64 --num_steps 1 --warmup_steps 0"
SHORT += " --train_batch_size 8 --gradient_accumulation_steps 1 --ra 1 --eval_batch_size 500"
FAMILY = {  # sizes that go with SHORT, and constructor words
    "ViT": ("--img_size 28 --patch_size 7", dict(image_size=28, patch_size=7)),
    "DEMS": (
        "--img_size 32 --patch_size 4 --merge_layer 1 2 --merge_num 4 4",
        dict(image_size=32, patch_size=4, merge_layer=[1, 2], merge_num=[4, 4]),
    ),
    "MViT": (
        "--img_size 16 --patch_size 4 --img_sizes 8 16 --heads 12 --dim 48",
        dict(image_size=16, patch_size=4, image_sizes=[8, 16], heads=12, dim=48),
    ),
}


def parse(*words: str):
    return options.parse_train_args(list(words))


def error(capsys, *words: str) -> str:
    """The one line that these words are answered by."""
    with pytest.raises(SystemExit) as end:
        parse(*words)
    line = capsys.readouterr().err
    assert end.value.code == 2 and line.count("\n") == 1, line
    return line


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> dict[str, str]:
    folder, files = tmp_path_factory.mktemp("weights"), {}
    for family, (_, words) in FAMILY.items():
        model = create_model({"ViT": "ViT-Ti_16"}.get(family, f"{family}-Ti"), num_classes=10, **SIZES | words)
        files[family] = str(folder / f"{family}.pth")
        torch.save({"model": model.state_dict()}, files[family])
    return files


def test_the_page_has_all_sources():
    scripts = [script for script, _ in THEIRS]
    assert len(THEIRS) == 28 and {"main_pretrain", "main_finetune", "eval.py", "eval_cls_ffcv.py"} <= set(scripts)


@pytest.mark.parametrize("script, words", THEIRS, ids=[str(i) for i in range(len(THEIRS))])
def test_their_lines(script, words, weights, tmp_path):
    """With tiny sizes appended, each runs behind train.py or eval.py, or the line that it is answered by does."""
    words = shlex.split(words)
    family = next(
        (name for word in words for name in ("DEMS", "MViT") if name in word.upper().replace("MVIT2", "MViT")), "ViT"
    )
    if words == ["-v", "true"]:  # of a run that is there
        words = [*SHORT.split(), *FAMILY["ViT"][0].split(), *places(tmp_path)]
        run("train.py", *words)
        done = run("train.py", "-v", "true", *words)
        assert "Valid Accuracy" in done.stdout
        (best,) = (tmp_path / "output").glob("*_checkpoint.bin")
        assert f"Weights: {best}: 32 tensors loaded\n" in done.stdout
        best.unlink()
        done = run("train.py", "-v", "true", *words, check=2)
        assert f"-v evaluates --load_model_dir FILE, or {best} or " in done.stderr
        return
    words += [*SHORT.split(), *FAMILY[family][0].split(), *places(tmp_path)]
    if {"-w", "--pretrained", "--pretrained_dir", "--pretrained_weight", "--eval"} & set(words):
        words += ["--pretrained_dir", weights[family], "--norm_type", "LN"]
    done = in_process("eval.py" if script == "eval.py" else "train.py", *words)
    if done.returncode == 2:
        instead = shlex.split(done.stderr.split("; type: ")[1])
        assert instead[:2] == ["python", "train.py"], done.stderr
        done = in_process("train.py", *instead[2:])
    assert done.returncode == 0 and "Valid Accuracy" in done.stdout, (words, done.stderr)


def test_their_lines_keep_their_meaning(capsys, tmp_path):
    """Sizes of names give way to flags, wherever these stand; recipes override as flags do."""
    args = parse(
        "--input_size", "64", "--model", "vit_tiny_patch16_224", "--aa", "rand-m9-mstd0.5-inc1", "--ckpt_freq", "2"
    )
    assert (args.model_type, args.img_size, args.patch_size, args.aug) == ("ViT-Ti_16", 64, None, "strong")
    options.resolve_steps(args, 51_200)
    assert args.save_every == 200
    sizes = {
        "vit_base_patch32_384": ("ViT-B_32", 384, None),
        "vit_small_patch32_224": ("ViT-S_16", 224, 32),
        "vit_base_patch8_224.augreg_in21k": ("ViT-B_16", 224, 8),
        "vit_huge_patch14_224_in21k": ("ViT-H_14", 224, None),
        "deit_tiny_patch16_224": ("ViT-Ti_16", 224, None),
        "deit3_base_patch16_384": ("ViT-B_16", 384, None),
        "vit_base_r50_s16_384": ("R50-ViT-B_16", 384, None),
        "B_32_imagenet1k": ("ViT-B_32", 384, None),
        "dems_tiny": ("DEMS-Ti", 32, None),
        "mvit2_tiny_patch2": ("MViT-Ti", 32, None),
    }
    for name, expected in sizes.items():
        args = parse("--model", name)
        assert (args.model_type, args.img_size, args.patch_size) == expected, name
    assert "@recipes/mvit_ti_multiscale.args" in capsys.readouterr().err
    args = parse("@recipes/vit_ti_cifar10_32.args", "--model", "vit_small_patch16_224")
    assert (args.model_type, args.img_size, args.patch_size) == ("ViT-S_16", 32, 2)
    assert "recipes" not in capsys.readouterr().err
    (tmp_path / "w.pth").touch()
    for flag in ("--finetune", "--initial-checkpoint"):
        args = parse(*f"{flag} {tmp_path}/w.pth --experiment a --log-interval 50 --grad-checkpointing".split())
        assert (args.pretrained_dir, args.name) == (f"{tmp_path}/w.pth", "a")
        assert args.log_every == 50 and args.grad_checkpoint
    for words, expected in {"--fp16 --bf16": (0, 1), "--bf16 --fp16": (1, 0), "--bf16 --no_amp": (0, 0)}.items():
        args = parse(*words.split())
        assert (args.fp16, args.bf16) == expected
    assert parse("@recipes/rescalevit_cifar10.args", "--bf16").bf16
    pixels = "--mean 0 0 0 --std 1 1 1".split()
    for words, mean in ((["--normalize", "half", *pixels], 0), ([*pixels, "--normalize", "half"], 0.5)):
        assert parse(*words).mean == [mean] * 3
    assert parse("--data_location", "/data").dataset == "imagefolder"
    assert parse("--data_location", "/data", "--data_set", "CIFAR100").dataset == "cifar100"
    assert parse("--checkpoint_key", "model", "--name=-x").name == "-x"


CHOICES = {
    "--dataset": "CIFAR100=cifar100 fashion-mnist=fashionmnist FASHIONMNIST=fashionmnist "
    "Fashion_MNIST_mini=fashionmnist-mini Caltech-101=caltech101 EMNIST=emnist ImageFolder=imagefolder "
    "IN1K=imagefolder",
    "--norm_type": "ln=LN bn=BN rescale=Rescale",
    "--opt": "AdamW=adamw SGD=sgd",
    "--model_type": "vit_b32=ViT-B_32 VIT-B_16=ViT-B_16 dems_ti=DEMS-Ti r50-vit-b16=R50-ViT-B_16 mvit-s=MViT-S",
    "--aug": "Strong=strong",
    "--decay_type": "Cosine=cosine",
    "--device": "CPU=cpu",
}


@pytest.mark.parametrize("flag", CHOICES)
def test_choices_in_any_case_and_with_any_hyphens(flag):
    for pair in CHOICES[flag].split():
        typed, meant = pair.split("=")
        assert getattr(parse(flag, typed), flag[2:]) == meant


# What is typed, and what is suggested; nothing where nothing is close.
NEAR = """
--learnin_rate --learning_rate|--learing_rate --learning_rate|--learning-rates --learning_rate
--num_step --num_steps|--nm_steps --num_steps|--epoch --epochs|--datset --dataset|--data_dirs --data_dir
--imgsize --img_size|--image_siz --img_size|--input_sise --img_size|--model_typ --model_type
--modle_type --model_type|--norm_typ --norm_type|--batchsize --train_batch_size
--train_batchsize --train_batch_size|--eval_batch_sise --eval_batch_size|--wieght_decay --weight_decay
--weight_deacy --weight_decay|--warmup_step --warmup_steps|--warm_up_epochs --warmup_epochs
--pretrained_dirs --pretrained_dir|--droppath --drop_path|--grad_checkpoints --grad_checkpoint
--gradient_accumulation --gradient_accumulation_steps|--mix_up --mixup|--cut_mix --cutmix|--compil --compile
--overwrit --overwrite|--fp_16 --fp16|--patchsize --patch_size|--foo -|--beta_schedule -|--tokenizer -|--colour -
--zzz -
"""
NEAR_CHOICES = """
--dataset cifar1000 cifar100|--dataset cifra10 cifar10|--dataset fashion fashionmnist|--dataset caltech caltech101
--dataset imagefolders imagefolder|--model_type ViT-B_61 ViT-B_16|--model_type DEMS-Tiny DEMS-Ti
--norm_type Rescaled Rescale|--opt adam adamw|--opt muom muon|--decay_type cosin cosine|--aug stong strong
--dataset imagenet -|--dataset mnist emnist|--opt lion -|--norm_type RMS -|--model_type resnet50 -
"""


def rows(text: str) -> list[list[str]]:
    return [row.split() for row in text.replace("\n", "|").split("|") if row]


def test_near_misses(capsys):
    for typed, meant in rows(NEAR):
        line = error(capsys, typed, "1")
        suggestion = f"did you mean {meant}?" if meant != "-" else "see train.py --help"
        assert repr(typed) in line and suggestion in line and line.count("did you mean") == (meant != "-"), line
    for flag, typed, meant in rows(NEAR_CHOICES):
        line = error(capsys, flag, typed)
        suggestion = f"did you mean {meant}?" if meant != "-" else "choose from"
        assert f"{flag}: invalid choice: {typed!r}" in line and suggestion in line, line


WORDS = {
    "--gin build_model.drop_path_rate=0.2": "(use --drop_path 0.2); type: python train.py --drop_path 0.2",
    "--gin build_model.head=3": "(not here)",
    "--num_classes 10": "(comes from the data); type: python train.py",
    "--nb-classes 10": "(comes from the data)",
    "--gpus 4": "type: torchrun --nproc_per_node 4 train.py",
    "--amp": "(use --bf16); type: python train.py --bf16",
    "--resume run.pth": "(the same command again goes on by itself)",
    "--sched cosine": "(use --decay_type cosine)",
    "--momentum 0.9": "(is 0.9 with --opt sgd)",
    "--model-ema": "(use --ema_decay 0.999)",
    "--model-ema-decay 0.99": "(use --ema_decay 0.99)",
    "--model-ema-decay 0.99 --model-ema": "--model_ema (leave it out); type: python train.py --ema_decay 0.99",
    "--model-ema --model-ema-decay 0.99": "type: python train.py --ema_decay 0.999 --ema_decay 0.99",
    "--pin-mem": "(done without a flag); type: python train.py",
    "--dist-url env://": "(torchrun says it)",
    "--world_size 2": "(torchrun says it)",
    "--accum_iter 4": "(use --gradient_accumulation_steps 4, parts of --train_batch_size)",
    "--grad-accum-steps 4": "(use --gradient_accumulation_steps 4, parts of --train_batch_size)",
    "--train_path a --val_path b": "(is val/ in the folder); type: python train.py --dataset imagefolder --data_dir F",
    "--sync-bn": "(done without a flag)",
    "--no-cuda": "(use --device cpu)",
    "--log-wandb": "(TensorBoard's files are in logs/)",
    "--evaluate": "(use -v true, scores; python plot.py draws curves)",
    "--ThreeAugment": "(use --aug dems, the nearest)",
    "--pretrained": "(use --pretrained_dir checkpoint/ViT-B_16.npz, weights are a file here)",
    "--checkpoint_key student": "found by itself if it is one of model state_dict",
    "--checkpoint_key network": "found by itself if it is one of model state_dict",
    "--color-jitter 0.4": "(use --aug dems, the nearest)",
    "--cfgs a.gin": "(settings in files are @recipes/NAME.args here)",
}


def test_words_of_other_tools(capsys):
    for words, expected in WORDS.items():
        line = error(capsys, *words.split())
        assert words.split()[0].replace("-", "_").strip("_") in line and expected in line, line


def test_bare_weights_for_eval_py(capsys):
    for file in (["w.pth"], ["-w", "w.pth"]):
        with pytest.raises(SystemExit):
            options.eval_parser().parse_args([*file, "--model", "vit_tiny_patch16_224"])
        line = "type: python train.py -v true --img_size 224 --load_model_dir w.pth --model_type ViT-Ti_16\n"
        assert capsys.readouterr().err.endswith(line)


def test_all_mistakes_at_once(capsys):
    line = error(capsys, "--foo", "1", "--learnin_rate", "2", "--amp", "--num_classes", "3")
    assert line == (
        "train.py: error: unknown arguments '--foo', '--learnin_rate' (did you mean --learning_rate?), "
        "--amp (use --bf16), --num_classes 3 (comes from the data)\n"
    )


@pytest.mark.parametrize("name", ["train", "eval", "plot"])
def test_help_is_whole_at_80_columns(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = getattr(options, f"{name}_parser")().format_help().splitlines()
    assert [line for line in lines if len(line) > 80] == []


def test_the_bar_is_whole_at_80_columns():
    facts = dict(n=9_999, total=10_000, elapsed=35_000, initial=0, ncols=80, bar_format=train.BAR)
    line = tqdm.format_meter(**facts, postfix="epoch 100.0, loss 0.512, best 100.0 %")
    assert len(line) <= 80 and line.endswith("epoch 100.0, loss 0.512, best 100.0 %]"), line


def test_a_run_ends_with_the_line_that_evaluates_it(tmp_path):
    words = [*SHORT.split(), *FAMILY["ViT"][0].split(), *places(tmp_path), "--name", "a b"]
    line = in_process("train.py", *words).stdout.splitlines()[-3]
    best, command = re.fullmatch(r"Best checkpoint: (.*), of step 1; python eval.py (.*)", line).groups()
    assert best == command
    assert "Top-1 accuracy" in in_process("eval.py", *shlex.split(command)).stdout


def test_a_terminal_is_told_what_is_loaded(monkeypatch, capsys):
    cli.say("Loading")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    cli.say("Loading")
    assert capsys.readouterr().err == "Loading\n"
