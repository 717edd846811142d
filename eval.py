"""Evaluate a checkpoint of train.py, classify images with it, or look into it.

    python eval.py output/RUN_checkpoint.bin                                # the data set that it was trained on
    python eval.py output/RUN_checkpoint.bin --dataset imagefolder --data_dir photos   # other data, same classes
    python eval.py output/RUN_checkpoint.bin --images shoe.png bag.png      # class names and probabilities
    python eval.py output/RUN_checkpoint.bin --images folder                # all images in it: predictions.csv
    python eval.py output/RUN_checkpoint.bin --json                         # for programs
    python eval.py output/RUN_checkpoint.bin --plot attention position patches errors   # pictures
    python eval.py output/RUN_checkpoint.bin --export model.safetensors     # for timm; .pt2 and .onnx for others

Model, classes, normalisation and precision come from the checkpoint. The confusion matrix is drawn beside it, and so
are the pictures; those go to the run's TensorBoard folder too, where that exists. From Python:

    run = load_run("output/RUN_checkpoint.bin")
    run.predict(["shoe.png"])                       # [[("Sneaker", 0.93), ("Ankle boot", 0.04), ...]]
"""

from utils import cli, options

if __name__ == "__main__":  # before torch is imported, so that --help and a wrong flag are answered at once
    ARGS = options.eval_parser().parse_args(None, options.check_eval)
    cli.say_loading()

import csv
import json
import os
import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from models import create_model
from utils import checkpoint, data_utils, dist_util, metrics
from utils.augment import eval_augment, short_side
from utils.cli import UserError, refuse, refusing
from utils.datasets import ImageSet, check_apart, data_words, load_data
from utils.device import autocast, choose_device, keep_memory, memory_limit, usable_precision
from utils.export import export
from utils.image_folder import NOT_READ, files_in, is_image, kinds
from utils.image_sources import as_rgb, read_image

Images = str | Path | Image.Image | torch.Tensor | Sequence[str | Path | Image.Image | torch.Tensor]


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Iterable, num_classes: int, device: torch.device, precision: str = "fp32"
) -> dict:
    """Score a model on labelled images, over all processes; each image counts once. It is in eval mode afterwards.

    `batches` are images (b, 3, h, w) and labels (b,) on the device, this process's share; `precision` is 'fp32', 'bf16'
    or 'fp16'. Returns accuracy and top5 (0..1), loss (mean cross-entropy), correct and seen (images), and confusion
    (num_classes, num_classes) int64 on the CPU, whose rows are the true classes.
    """
    model.eval()
    exact = torch.float32 if device.type == "mps" else torch.float64
    confusion = torch.zeros(num_classes * num_classes, dtype=torch.int64, device=device)
    sums = torch.zeros(2, dtype=exact, device=device)  # loss, correct among the first five
    with torch.autocast(device.type, enabled=False):  # outermost: what the weights are cast to stays for all batches
        for images, labels in batches:
            with autocast(device, precision):
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


class Classifier:
    """A trained model with what belongs to it; from `load_run`.

    `model` is in eval mode on `device`, in `precision`; `classes` are names in the order of its logits, `args` the
    flags of the run, `name` its id, and `step` the updates that it was trained for.
    """

    def __init__(self, path: str | Path, state: dict, device: torch.device):
        self.args, self.classes, self.step = Namespace(**state["args"]), state["classes"], state["step"]
        self.config = state["config"]  # words of create_model
        self.own = {name: state.get(name) for name in ("args", "files")}
        self.model = create_model(**self.config)
        self.model.load_state_dict(checkpoint.kept_weights(state))
        self.model.eval()
        self.device, self.name = device, Path(path).stem.removesuffix("_checkpoint")
        self.precision, _ = usable_precision(state["precision"], device)
        keep_memory(device)
        self.augment = eval_augment(self.args, device, self.precision)

    def inputs(self, images: Images) -> Iterator[torch.Tensor]:
        """Each image as the model takes it, (1, 3, size, size): resized, cut and normalised as in evaluation."""
        one = isinstance(images, (str, Path, Image.Image)) or (isinstance(images, torch.Tensor) and images.ndim == 3)
        for image in [images] if one else images:
            if isinstance(image, (str, Path)):
                image = read_image(image, short_side(self.args))
            if isinstance(image, Image.Image):
                image = pil_to_tensor(as_rgb(image))
            kind = "a file, a PIL image (Image.fromarray makes one of an array) or a tensor"
            refuse(not isinstance(image, torch.Tensor), f"an image is {kind}, not {type(image).__name__}")
            fits = image.ndim == 3 and len(image) in (1, 3) and image.numel()
            refuse(not fits, f"an image is (1 or 3, height, width) pixels, not {tuple(image.shape)}")
            if image.is_floating_point():
                known = (image > -0.5).all() and (image < 1.5).all()  # a resize may overshoot
                refuse(not known, "pixels of floats are from 0 to 1; bytes, from 0 to 255, are taken, too")
                image = (255 * image).round().clamp(0, 255).byte()
            refuse(image.dtype != torch.uint8, f"pixels are bytes or floats, not {image.dtype} of unknown range")
            yield self.augment(image[None].to(self.device), self.augment.draw(torch.tensor([image.shape[-2:]])))

    @torch.no_grad()
    def probabilities(self, x: torch.Tensor) -> torch.Tensor:
        """What `inputs` gives, or batches of it (b, 3, size, size) -> softmax (b, classes), float32."""
        with autocast(self.device, self.precision):
            logits = self.model(x)
        return logits.float().softmax(dim=1)

    def predict(self, images: Images, top: int = 5) -> list[list[tuple[str, float]]]:
        """Classify files, PIL images, a tensor (b, 1 or 3, h, w) of bytes, or of floats in 0..1; or one of them.

        Returns for each image the `top` names and probabilities, the most probable first. UserError: no readable image.
        """
        refuse(top < 1, f"top is the number of names for each image, at least 1, not {top}")
        inputs, answers, top = self.inputs(images), [], min(top, len(self.classes))
        while batch := list(islice(inputs, 32)):
            probability, label = self.probabilities(torch.cat(batch)).topk(top, dim=1)
            for shares, places in zip(probability.tolist(), label.tolist(), strict=True):
                answers.append([(self.classes[i], p) for i, p in zip(places, shares, strict=True)])
        return answers

    def facts(self) -> dict:
        """What another program needs to know of the model: preparation of images, classes, and what made it."""
        args = self.args
        pixels = dict(image_size=args.img_size, image_mean=args.mean, image_std=args.std)
        crop_mode = "squash" if args.crop_pct == 1.0 else "center"  # timm's words; its crop_pct 1 alone cuts the centre
        pixels |= dict(interpolation=args.interpolation, crop_pct=args.crop_pct, crop_mode=crop_mode)
        return dict(run=self.name, step=self.step, **pixels, classes=self.classes, model=self.config)

    def images_of(self, split: str) -> ImageSet:
        """The images of 'train', 'val' or 'test' of the data set that `args` name, split as in training.

        UserError: there are none.
        """
        args = self.args
        words = dict(train=split != "test", classes=self.classes)
        data = load_data(args.dataset, args.data_dir, **words, **data_words(args)).to(self.device)
        check_apart(self.name, self.own, args, data)
        for note in data.notes[1:]:  # after the images a class
            print(note, file=sys.stderr)
        found = {"train": data.train, "val": data.valid if data.valid is not data.test else None, "test": data.test}
        refuse(not found[split], f"--split {split}: {args.dataset} has no {split} images beside its test images")
        return found[split]

    def batches(self, images: ImageSet) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Images and labels for `evaluate`."""
        words = dict(batch_size=self.args.eval_batch_size, num_workers=self.args.num_workers, device=self.device)
        return data_utils.eval_batches(images, self.augment, **words)


def load_run(path: str | Path, device: torch.device | str = "auto") -> Classifier:
    """Rebuild a model from RUN_checkpoint.bin or RUN_last.bin, on a device or one's name; 'auto' takes the GPU if any.

    UserError: not a checkpoint of train.py.
    """
    state = checkpoint.read_file(path)
    device = choose_device(device) if isinstance(device, str) else device
    way_out = "score bare weights with train.py -v; a model of your own needs its row in MODELS"
    with refusing(f"{path}: not a checkpoint of this train.py", way_out):
        run = Classifier(path, state, device)
    run.model.to(device)  # no memory for it is not the file's fault
    return run


def score(run: Classifier, args: Namespace, folder: Path) -> None:
    """Evaluate on a split, draw the confusion matrix, and print both."""
    from utils import pictures  # where something is drawn, as matplotlib takes a while
    from utils.vis_utils import cells

    if not args.json:
        print(f"{run.name}: step {run.step}, {run.precision}, on {run.device.type}, {args.split} images")
    images = run.images_of(args.split)
    result = evaluate(run.model, run.batches(images), len(run.classes), run.device, run.precision)
    picture = pictures.draw_confusion(run, result, folder)
    confusion = result.pop("confusion")
    by_class, means = metrics.class_scores(confusion), metrics.mean_scores(confusion)
    worst = metrics.worst_confusions(confusion, run.classes)
    if len(run.classes) <= 5:  # where it is 1
        del result["top5"]
    rows = list(zip(run.classes, *(by_class[name].tolist() for name in by_class), strict=True))
    if args.json:
        share = {name: recall if n else None for name, _, recall, _, n in rows}
        each = {row[0]: dict(zip(by_class, row[1:], strict=True)) for row in rows}
        facts = dict(checkpoint=args.checkpoint, step=run.step, split=args.split, confusion_png=str(picture))
        facts |= dict(confusion=confusion.tolist(), per_class=share, classes=each, worst_confusions=worst, **means)
        print(json.dumps(dict(dataset=run.args.dataset, data_dir=run.args.data_dir, **result, **facts)))
        return
    print(f"Top-1 accuracy: {result['accuracy']:.5f} ({result['correct']}/{result['seen']})")
    if "top5" in result:
        print(f"Top-5 accuracy: {result['top5']:.5f}")
    print(f"Loss: {result['loss']:.5f}\nBalanced accuracy: {means['balanced_accuracy']:.5f}")
    macro = [means[f"macro_{name}"] for name in ("precision", "recall", "f1")]
    rows.append(("mean of the classes", *macro, result["seen"]))
    width = max(cells(name) for name, *_ in rows)
    print(f"  {'Class':<{width}}  precision  recall      F1  images")
    for name, precision, recall, f1, n in rows:
        print(f"  {name}{' ' * (width - cells(name))}     {precision:.4f}  {recall:.4f}  {f1:.4f}  {n:>6}")
    for true, taken, n, of in worst:
        print(f"{true} taken for {taken}: {n} of {of}")
    print(f"Confusion matrix: {picture}")


def predict_folder(run: Classifier, folders: list[str], args: Namespace, out: Path) -> None:
    """Classify all images in folders, and write predictions.csv: file, class, probability, runner-up."""
    found = [file for folder in folders for file in (files_in(folder) if os.path.isdir(folder) else [folder])]
    files = [file for file in found if is_image(file) or file in folders]
    others = kinds(file for file in found if not is_image(file) and file not in folders)
    refuse(not files, f"{folders[0]}: no images in it" + f" (it holds {others})" * bool(others))
    if others:
        print(f"{NOT_READ}: {others}", file=sys.stderr)
    unreadable, rows, path = [], [], out / "predictions.csv"
    for start in tqdm(range(0, len(files), 32), desc="classifying", unit=" x 32", disable=None, leave=False):
        readable, images = [], []
        for file in files[start : start + 32]:
            try:
                images.append(read_image(file, short_side(run.args)))
                readable.append(file)
            except UserError as error:
                unreadable.append(str(error))
        for file, ((name, p), *second) in zip(readable, run.predict(images, top=2), strict=True):
            rows.append([file, name, f"{p:.4f}", second[0][0] if second else ""])
    refuse(not rows, "; ".join([f"none of {len(files)} images can be read", *unreadable[:1]]))
    with refusing(f"{path}: cannot be written", "choose another --output_dir", OSError):
        out.mkdir(parents=True, exist_ok=True)
        with open(path, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            csv.writer(file).writerows([["file", "class", "probability", "runner-up"], *rows])
    if args.json:
        print(json.dumps(dict(predictions=str(path), images=len(rows), unreadable=unreadable)))
        return
    print("\n".join([*(f"left out: {cli.one_line(text)}" for text in unreadable), f"{path}: {len(rows)} images"]))


def main(args: Namespace) -> int:
    run = load_run(args.checkpoint, choose_device(args.device, args.gpu_id))
    given = "dataset data_dir emnist_split eval_batch_size num_workers memory_limit skip_broken cache_dir no_cache"
    changed = {name: getattr(args, name) for name in given.split() if getattr(args, name) is not None}
    told = "dataset data_dir emnist_split labels".split()
    trained_on = [getattr(run.args, name, None) for name in told]
    run.args = Namespace(**{**vars(run.args), "memory_limit": memory_limit(run.device), **changed})
    folder = Path(args.output_dir or Path(args.checkpoint).parent)
    run.args.output_dir = str(folder)  # where the cache goes if it cannot be beside the data
    run.args.labels = args.labels or (None if args.data_dir else getattr(run.args, "labels", None))
    if [getattr(run.args, name, None) for name in told] != trained_on:  # its pictures beside the first ones
        run.name += f"_{run.args.dataset}_{Path(run.args.data_dir).resolve().name}"
    if args.split != "test":
        run.name += f"_{args.split}"
    if args.plot:
        from utils import pictures

        paths = pictures.draw_all(run, args.plot, folder, args.images, args.blocks, args.heads, args.split)
        print(json.dumps(paths) if args.json else "\n".join(paths.values()))
    elif args.export is not None:
        beside = export(run.model, args.export, run.facts())
        said = f"{args.export}: gives the model's logits; {beside}: how to prepare images, and the classes"
        print(json.dumps(dict(export=args.export, facts=str(beside))) if args.json else said)
    elif args.images and any(map(os.path.isdir, args.images)):
        predict_folder(run, args.images, args, folder)
    elif args.images:
        answers = dict(zip(args.images, run.predict(args.images, args.top), strict=True))
        if args.json:
            print(json.dumps({file: dict(answer) for file, answer in answers.items()}))
        else:
            for file, answer in answers.items():
                print(f"{cli.one_line(file)}: " + ", ".join(f"{name} {100 * p:.1f} %" for name, p in answer))
    else:
        score(run, args, folder)
    return 0


if __name__ == "__main__":
    cli.run_main(main, ARGS, dist_util.explain)
