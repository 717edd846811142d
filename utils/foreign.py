"""Words of other projects' command lines, and what they are here. Imports no torch.

The sources are jeonsworld/ViT-pytorch, ChaofanTao/RescaleViT, visresearch/dems, erow/vitookit and
lukemelas/PyTorch-Pretrained-ViT; docs/migrating.md has their lines beside ours.
"""

import re
import shlex
from collections.abc import Container

from utils.weight_names import AVERAGED, PLAIN

# The same there and here, under another name: understood.
ALIASES = {
    "--model": "--model_type", "--arch": "--model_type", "-a": "--model_type",
    "--batch_size": "--train_batch_size", "-b": "--train_batch_size", "--lr": "--learning_rate",
    "--label_smoothing": "--smoothing", "--wd": "--weight_decay", "--optimizer": "--opt", "--opt_betas": "--betas",
    "--clip_grad": "--max_grad_norm", "--warmup": "--warmup_epochs", "--drop_path_rate": "--drop_path",
    "--data_set": "--dataset", "--data_path": "--data_dir", "--data_location": "--data_dir",
    "--input_size": "--img_size", "--image_size": "--img_size", "--workers": "--num_workers", "-j": "--num_workers",
    "-w": "--pretrained_dir", "--pretrained_weight": "--pretrained_dir", "--pretrained_weights": "--pretrained_dir",
    "--finetune": "--pretrained_dir", "--initial_checkpoint": "--pretrained_dir", "--experiment": "--name",
    "--output": "--output_dir", "--gpu": "--gpu_id", "--validation_batch_size": "--eval_batch_size",
    "--log_interval": "--log_every", "--grad_checkpointing": "--grad_checkpoint",
}  # fmt: skip

# Names of models: the type here, image size, patch size if it is not the type's; and the recipe that trains it as
# published there.
MODELS = {
    "dems_tiny": ("DEMS-Ti", 32, None, "dems_ti_cifar10"),
    "dems_small": ("DEMS-S", 32, None, "dems_s_cifar10"),
    "dems_tiny_patch2_32": ("DEMS-Ti", 32, None, "dems_ti_multiscale"),
    "mvit2_tiny_patch2": ("MViT-Ti", 32, None, "mvit_ti_multiscale"),
    "vit_base_r50_s16_224": ("R50-ViT-B_16", 224, None, None),
    "vit_base_r50_s16_384": ("R50-ViT-B_16", 384, None, None),
}
TIMM = re.compile(r"(?:vit|deit3?)_(tiny|small|base|large|huge)_patch(\d+)_(\d+)(?:[._].*)?")  # tags name the weights
PRETRAINED_VIT = re.compile(r"([BL]_(?:16|32))(_imagenet1k)?")
DATASETS = {"IN1K": "imagefolder", "IN100": "imagefolder", "Folder": "imagefolder"}
AUGS = {"rand-m9-mstd0.5-inc1": "strong", "": "weak", "none": "weak"}  # --aa

PROCESSES = "torchrun starts them"
# Not the same: the words to type instead, with the value in {}, and why. What needs no flag has no words.
ROWS = [
    ("--num_classes --nb_classes --n_classes", "", "comes from the data"),
    ("--amp --use_amp --mixed_precision", "--bf16", ""),
    ("--sched --scheduler --lr_scheduler", "--decay_type {}", ""),
    ("--resume --auto_resume --start_epoch", "", "the same command again goes on by itself"),
    ("--model_ema_decay --ema", "--ema_decay {}", ""),
    ("--model_ema", "--ema_decay 0.999", ""),
    ("--momentum", "", "is 0.9 with --opt sgd"),
    ("--accum_iter --grad_accum_steps", "--gradient_accumulation_steps {}", "parts of --train_batch_size"),
    ("--pin_mem --no_pin_mem --pin_memory --use_cuda --cuda --vit --sync_bn", "", "done without a flag"),
    ("--dist_url --dist_backend --init_method --distributed --world_size --rank", "", "torchrun says it"),
    ("--gpus --ngpus --num_gpus --devices --nproc_per_node", "", PROCESSES),
    ("--no_cuda --cpu", "--device cpu", ""),
    ("--remode --recount --resplit --mixup_mode", "", "as there by default"),
    ("--log_wandb --wandb --tensorboard", "", "TensorBoard's files are in logs/"),
    ("--train_path", "--dataset imagefolder --data_dir FOLDER", "no FFCV files here"),
    ("--val_path", "", "is val/ in the folder"),
    ("--eval --evaluate -e", "-v true", "scores; python plot.py draws curves"),
    ("--ThreeAugment --three_augment --src --color_jitter", "--aug dems", "the nearest"),
    ("--global_pool", "", "the class token is read out here"),
    ("--prefix", "", "prefixes of wrapped models are dropped by themselves"),
    ("--pretrained", "--pretrained_dir checkpoint/ViT-B_16.npz", "weights are a file here"),
    ("--cfgs", "", "settings in files are @recipes/NAME.args here"),
    ("build_model.drop_path_rate", "--drop_path {}", ""),  # of --gin
    ("build_model.attn_drop", "", "changed nothing there"),
    ("build_model.img_size", "--img_size {}", ""),
    ("build_model.patch_size", "--patch_size {}", ""),
    ("build_model.model_name", "--model_type {}", ""),
    ("build_model.num_classes", "", "comes from the data"),
    ("build_model.global_pool", "", "the class token is read out here"),
    ("build_transform.scale", "--scale {}", ""),
    ("build_transform.mean", "--mean {}", ""),
    ("build_transform.std", "--std {}", ""),
]
ANSWERS = {flag: (use, why) for flags, use, why in ROWS for flag in flags.split()}
FOUND = [key for key in PLAIN + AVERAGED if key != "student"]  # beside a student there is a teacher, which is taken
OF_MODELS = ("--model_type", "--pretrained_dir", "--img_size", "--patch_size", "--mean", "--std")  # for eval.py to tell


def model(name: str) -> tuple[str, int, int | None, str | None] | None:
    """What a row of MODELS has, for another project's model name; None where it is none that is here."""
    if found := MODELS.get(name.lower()):
        return found
    if found := TIMM.fullmatch(name.lower()):
        size = {"tiny": "Ti", "small": "S", "base": "B", "large": "L", "huge": "H"}[found[1]]
        own = "14" if size == "H" else found[2] if size in "BL" and found[2] == "32" else "16"
        return f"ViT-{size}_{own}", int(found[3]), None if found[2] == own else int(found[2]), None
    if found := PRETRAINED_VIT.fullmatch(name):
        return f"ViT-{found[1]}", 384 if found[2] else 224, None, None
    return None


def split(words: list[str], flags: Container[str] = ()) -> list[tuple[str, list[str], list[str]]]:
    """Words of a command line as (flag, its values, the words themselves); '' where no flag is in front.

    Flags have underscores, and those that are `flags` under another name have the name here, in the words, too.
    """
    groups = []
    for word in words:
        typed, equals, value = word.partition("=") if word.startswith("--") else (word, "", "")
        if re.match(r"-[^\d.\s]", word) and " " not in typed:
            flag = "--" + typed[2:].replace("-", "_") if typed.startswith("--") else typed
            flag = ALIASES[flag] if ALIASES.get(flag) in flags else flag
            groups.append((flag, [value] if equals else [], [flag + equals + value if flag in flags else word]))
        elif word.startswith("@") or not groups or groups[-1][0] == "":
            groups.append(("", [word], [word]))
        else:
            groups[-1][1].append(word)
            groups[-1][2].append(word)
    return groups


def understood(words: list[str], flags: Container[str]) -> tuple[list[str], str | None]:
    """Words with `flags` under their names here; in front the sizes that a model's name says, where no flag does.

    Returns the words, and the recipe that trains the model as its project does, if there is one.
    """
    sizes, rest, recipe = {}, [], None
    for flag, values, raw in split(words, flags):
        if flag == "--model_type" and len(values) == 1 and (found := model(values[0])):
            kind, sizes["--img_size"], sizes["--patch_size"], recipe = found
            raw = [flag, kind]
        if flag != "--checkpoint_key":  # answers() has refused what isn't found without it
            rest += raw
    given = {flag for flag, _, _ in split(rest)}
    front = [word for flag, size in sizes.items() if size and flag not in given for word in (flag, str(size))]
    return front + rest, recipe


def answers(words: list[str], flags: Container[str]) -> tuple[list[str], list[str], str]:
    """Words that mean something else here, or nothing, replaced by what to type instead.

    Returns the words here, what to say of each one that changed, and what runs the script.
    """
    here, said, launch = [], [], "python"
    for flag, values, raw in split(words, flags):
        text, value = f"{flag} {' '.join(values)}".strip(), " ".join(values)
        found = [(text, value, ANSWERS.get(flag) if flag not in flags else None)]
        if flag == "--gin":
            settings = [each.partition("=")[::2] for each in values]
            found = [
                (f"--gin {key}={value}", " ".join(re.findall(r"[\w.+-]+", value)), ANSWERS.get(key, ("", "not here")))
                for key, value in settings
            ]
        elif flag == "--checkpoint_key" and value not in FOUND:
            found = [(text, value, ("", f"found by itself if it is one of {' '.join(FOUND)}"))]
        for text, value, answer in found:
            if answer is None:
                here += raw
                continue
            use = answer[0].format(value)
            fixed = use and use == answer[0] and use.split()[0] in here  # the value that is typed counts
            use, why = (use, answer[1]) if not use or use.split()[0] in flags and not fixed else ("", "leave it out")
            if why == PROCESSES:
                launch = f"torchrun --nproc_per_node {value or 'N'}"
            said.append(f"{text} ({', '.join(filter(None, [use and f'use {use}', why]))})")
            here += shlex.split(use)
    return here, said, launch


def translate(script: str, words: list[str], flags: Container[str]) -> tuple[list[str], list[str], str, bool]:
    """Words as a script with these flags knows them.

    Returns the words, what to say of those that it cannot take so, the line to type instead, and whether that begins
    with a recipe that trains the model as its project does.
    """
    said = []
    if script == "train.py" and words and not words[0].startswith(("-", "@")):  # as timm and torchvision take the data
        said = [f"{words[0]} (use --dataset imagefolder --data_dir {words[0]})"]
        words = ["--dataset", "imagefolder", "--data_dir", *words]
    named = {flag for flag, _, _ in split(words)}
    bare = script == "eval.py" and {ALIASES.get(flag, flag) for flag in named} & {"--model_type", "--pretrained_dir"}
    if bare:
        script, said, flags = "train.py", ["bare weights are scored by train.py -v"], {*flags, *OF_MODELS}
        words = words if words[0].startswith(("-", "@")) else ["--pretrained_dir", *words]
    if "--data_location" in named and not named & {"--dataset", "--data_set"}:
        words = ["--dataset", "imagefolder", *words]  # ImageNet's folder
    here, more, launch = answers(words, flags)
    said += more
    here, recipe = understood(here, flags)
    line = ["-v", "true", *here] if bare else here
    if not recipe and {"--gin", "CIFAR10", "vit_tiny_patch16_224"} <= set(words):
        recipe = "vit_ti_cifar10_32"  # vitookit's study
    scored = "-v" in line
    if scored:
        line = ["--load_model_dir" if word == "--pretrained_dir" else word for word in line]
    if any(word.startswith("@") for word in words):
        recipe = None
    if recipe:
        line = [f"@recipes/{recipe}{'_finetune' * ('--pretrained_dir' in line)}.args", *line]
    line = shlex.join([*launch.split(), script, *line])
    return [] if bare else here, said, line, recipe is not None and not scored
