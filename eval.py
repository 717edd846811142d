"""Evaluate a checkpoint of train.py, classify single images with it, or look into it.

    python eval.py output/RUN_checkpoint.bin                                # the data set that it was trained on
    python eval.py output/RUN_checkpoint.bin --dataset imagefolder --data_dir photos   # other data, same classes
    python eval.py output/RUN_checkpoint.bin --images shoe.png bag.png      # class names and probabilities
    python eval.py output/RUN_checkpoint.bin --json                         # for programs
    python eval.py output/RUN_checkpoint.bin --plot attention position patches errors   # pictures

Model, classes, normalisation and precision come from the checkpoint. The confusion matrix is drawn beside it, and so
are the pictures; those go to the run's TensorBoard folder too, where that exists.
"""

from utils import cli, options
from utils.cli import UserError

if __name__ == "__main__":  # before torch is imported, so that --help and a wrong flag are answered at once
    ARGS = options.eval_parser().parse_args()

import argparse
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.transforms.functional import pil_to_tensor

from models import create_model
from utils import checkpoint, data_utils, dist_util, readers
from utils.augment import Augment


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    num_classes: int,
    device: torch.device,
    precision: str = "fp32",
) -> dict:
    """Score a model on labelled images, over all processes; each image counts once.

    Args:
        model: in eval mode afterwards.
        batches: images (b, 3, h, w) and labels (b,) on the device, this process's share.
        num_classes: of the labels.
        precision: 'fp32', 'bf16' or 'fp16'.

    Returns:
        accuracy and top5 (0..1), loss (mean cross-entropy), correct and seen (images),
        confusion (num_classes, num_classes) int64 on the CPU, rows are the true classes.
    """
    model.eval()
    exact = torch.float32 if device.type == "mps" else torch.float64
    confusion = torch.zeros(num_classes * num_classes, dtype=torch.int64, device=device)
    sums = torch.zeros(2, dtype=exact, device=device)  # loss, correct among the first five
    for images, labels in batches:
        with dist_util.autocast(device, precision):
            logits = model(images)
        logits = logits.float()
        cell = labels * num_classes + logits.argmax(dim=1)
        confusion.index_add_(0, cell, torch.ones_like(cell))
        first_five = logits.topk(min(5, num_classes), dim=1).indices == labels[:, None]
        sums += torch.stack([F.cross_entropy(logits, labels, reduction="sum"), first_five.sum()]).to(exact)
    dist_util.sum_over_processes(confusion)
    dist_util.sum_over_processes(sums)
    confusion = confusion.view(num_classes, num_classes).cpu()
    correct, seen = int(confusion.trace()), int(confusion.sum())
    loss, top5 = (sums / seen).tolist()
    return dict(accuracy=correct / seen, top5=top5, loss=loss, correct=correct, seen=seen, confusion=confusion)


def eval_augment(args: dict, device: torch.device, precision: str) -> Augment:
    """Resize, centre crop and normalisation of evaluation, from the flags of a run."""
    return Augment(
        args["img_size"],
        args["mean"],
        args["std"],
        interpolation=args["interpolation"],
        crop_pct=args["crop_pct"],
        device=device,
        dtype=dist_util.DTYPES[precision],
    )


def load_run(path: str, device: torch.device) -> tuple[torch.nn.Module, dict]:
    """Rebuild a model from a checkpoint of train.py.

    Returns:
        The model in eval mode on the device, and the checkpoint's other entries.

    Raises:
        UserError: not a checkpoint of train.py.
    """
    state = checkpoint.read_file(path)
    wanted = ("model", "config", "classes", "args", "precision", "step")
    missing = [key for key in wanted if key not in state] if isinstance(state, dict) else wanted
    if missing:
        raise UserError(
            f"{path}: has no {missing[0]!r}, so it is not from train.py; score bare weights with train.py -v"
        )
    try:
        state |= options.recorded(path, state)
        config, weights = state["config"], checkpoint.kept_weights(state)
        state.pop("model")
        if config["num_classes"] != len(state["classes"]) or config["image_size"] != state["args"]["img_size"]:
            raise ValueError("its model is not for its classes and images")
        if type(state["step"]) is not int or state["precision"] not in ("fp32", "bf16", "fp16"):
            raise ValueError(f"step {state['step']!r}, precision {state['precision']!r}")
        with torch.device("meta"):  # so that the file has to hold whatever its model takes
            shapes = create_model(**config).state_dict()
        for name, tensor in shapes.items():
            checkpoint.check_tensor(path, name, weights[name], tensor)
            if weights[name].shape != tensor.shape:
                raise ValueError(f"{name} is {tuple(weights[name].shape)}, not {tuple(tensor.shape)}")
        model = create_model(**config)
        model.load_state_dict(weights)
    except UserError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: does not fit this version's models ({error})") from None
    return model.to(device).eval(), state


def test_images(args: argparse.Namespace, run: dict, device: torch.device, precision: str):
    """The test images of the checkpoint's data set, or of the one that the flags name.

    Returns:
        The flags in force, the images, and a function from some of them to batches on the device.
    """
    names = ("dataset", "data_dir", "emnist_split", "eval_batch_size")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    limit = dist_util.memory_limit(device) if args.memory_limit is None else args.memory_limit
    flags = argparse.Namespace(**{**run["args"], **given, "memory_limit": limit})
    data = data_utils.load_data(flags, train=False, classes=run["classes"])
    data_utils.to_device(data, device)

    def batches(images: readers.ImageSet) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return data_utils.eval_batches(
            images, eval_augment(run["args"], device, precision),
            batch_size=flags.eval_batch_size, device=device, num_workers=args.num_workers,
        )  # fmt: skip

    return flags, data.test, batches


def score(args: argparse.Namespace, model: torch.nn.Module, run: dict, device: torch.device, precision: str) -> dict:
    """Evaluate on the checkpoint's data set, or on the one that the flags name."""
    flags, images, batches = test_images(args, run, device, precision)
    result = evaluate(model, batches(images), len(run["classes"]), device, precision)
    return {"dataset": flags.dataset, "data_dir": flags.data_dir, **result}


def read_images(files: list[str], run: dict, device: torch.device, precision: str) -> Iterator[torch.Tensor]:
    """Image files as the model takes them, (1, 3, size, size) each."""
    augment = eval_augment(run["args"], device, precision)
    for file in files:
        image = pil_to_tensor(readers.read_image(file))[None].to(device)
        yield augment(image, augment.draw(torch.tensor([image.shape[-2:]])))


@torch.no_grad()
def classify(files: list[str], model: torch.nn.Module, run: dict, device: torch.device, precision: str, top: int):
    """Class names and probabilities of image files: a list a file, most probable first."""
    answers = []
    for image in read_images(files, run, device, precision):
        with dist_util.autocast(device, precision):
            logits = model(image)
        probability, label = logits.float().softmax(dim=1)[0].topk(min(top, len(run["classes"])))
        answers.append([(run["classes"][i], p) for i, p in zip(label.tolist(), probability.tolist(), strict=True)])
    return answers


def draw(
    args: argparse.Namespace, model: torch.nn.Module, run: dict, device: torch.device, precision: str, name: str
) -> dict[str, Path]:
    """The pictures of --plot, by their kinds."""
    from utils import pictures

    test = (
        None
        if args.images or not {"attention", "errors"} & set(args.plot)
        else test_images(args, run, device, precision)
    )

    def images() -> tuple[torch.Tensor, list[str]]:
        """Those of --images, or the first test images, one of each class, in float32; and their names."""
        if args.images:
            names = [Path(file).name for file in args.images]
            return torch.cat(list(read_images(args.images, run, device, precision))).float(), names
        _, images, batches = test
        index = pictures.first_of_each(images.labels)
        first = [batch for batch, _ in batches(images.part(index))]
        return torch.cat(first).float(), [run["classes"][i] for i in images.labels[index].tolist()]

    album = pictures.Album(Path(args.output_dir or Path(args.checkpoint).parent), name, run)
    pictures.draw(album, args, model, run, precision, images, lambda: test[2](test[1]))
    return album.paths


def print_score(result: dict, classes: list[str], picture: Path) -> None:
    print(f"Top-1 accuracy: {result['accuracy']:.5f} ({result['correct']}/{result['seen']})")
    print(f"Top-5 accuracy: {result['top5']:.5f}")
    print(f"Loss: {result['loss']:.5f}")
    print("Accuracy per class:")
    width = max(map(len, classes))
    for name, row, i in zip(classes, result["confusion"], range(len(classes)), strict=True):
        seen = int(row.sum())
        share = f"{int(row[i]) / seen:.4f}" if seen else "     -"
        print(f"  {name:<{width}}  {share} ({int(row[i])}/{seen})")
    print(f"Confusion matrix: {picture}")


def main(args: argparse.Namespace) -> int:
    if args.images and (args.dataset or args.data_dir):
        raise UserError("--images classifies single files; leave out --dataset and --data_dir")
    options.check_plot(args)
    device = dist_util.start(args.device, args.gpu_id).device
    model, run = load_run(args.checkpoint, device)
    precision, _ = dist_util.usable_precision(run["precision"], device)
    name = Path(args.checkpoint).stem.removesuffix("_checkpoint")
    if args.plot:
        paths = draw(args, model, run, device, precision, name)
        shown = {kind: str(path) for kind, path in paths.items()}
        print(json.dumps(shown) if args.json else "\n".join(shown.values()))
        return 0
    if args.images:
        answers = classify(args.images, model, run, device, precision, args.top)
        if args.json:
            print(json.dumps({file: dict(answer) for file, answer in zip(args.images, answers, strict=True)}))
            return 0
        for file, answer in zip(args.images, answers, strict=True):
            print(f"{file}: " + ", ".join(f"{label} {100 * p:.1f} %" for label, p in answer))
        return 0

    if not args.json:
        print(f"{name}: step {run['step']}, {precision}, on {device.type}")
    result = score(args, model, run, device, precision)
    from utils.vis_utils import plot_confusion

    folder = Path(args.output_dir or Path(args.checkpoint).parent)
    picture = folder / f"{name}_confusion.png"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        title = f"{name}\n{result['dataset']}: {100 * result['accuracy']:.2f} % of {result['seen']}"
        plot_confusion(result["confusion"], run["classes"], picture, title)
    except OSError as error:
        raise UserError(f"{picture}: cannot be written ({error.strerror}); choose another --output_dir") from None
    if args.json:
        confusion = result.pop("confusion")
        share = confusion.diag().double() / confusion.sum(dim=1)
        per_class = {label: None if p != p else p for label, p in zip(run["classes"], share.tolist(), strict=True)}
        facts = dict(checkpoint=args.checkpoint, step=run["step"], confusion_png=str(picture), per_class=per_class)
        print(json.dumps({**facts, **result, "confusion": confusion.tolist()}))
    else:
        print_score(result, run["classes"], picture)
    return 0


def run_main(main, args: argparse.Namespace) -> None:
    """`cli.run_main`, which also ends the process group, and has a line for what is no mistake of the code.

    These are a lack of memory, another process that has ended, and a model that torch cannot compile here.
    """

    def in_one_line(args: argparse.Namespace) -> int:
        try:
            return main(args)
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and dist_util.is_lost(error):
                reason = "another process is gone or stuck; the same command goes on from the last save"
                raise UserError(reason) from None
            reason = str(error).splitlines()[0] if str(error) else "the host"
            if type(error).__module__.startswith("torch._inductor"):  # most often, there is no C++ compiler
                raise UserError(f"--compile: torch cannot compile the model here ({reason}); leave it out") from None
            if isinstance(error, RuntimeError) and not re.search("out of memory|can't allocate memory", str(error)):
                raise
            raise UserError(
                f"out of memory ({reason}); fewer images per pass, or a smaller model", alone=True
            ) from None

    cli.run_main(in_one_line, args, dist_util.stop)


if __name__ == "__main__":
    run_main(main, ARGS)
