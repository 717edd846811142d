"""A run's records: text log, JSON lines, TensorBoard."""

import json
import os
import threading
import time
from argparse import Namespace
from pathlib import Path

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torchvision.utils import make_grid
from tqdm import tqdm

from utils.augment import denormalize
from utils.run_files import RunFiles, writing


class RunLog:
    """Writes a run's `.txt`, `.jsonl` and TensorBoard folder, where `enabled`: on the first process alone.

    UserError where a folder or file cannot be written.
    """

    def __init__(self, files: RunFiles, enabled: bool = True):
        self.files, self.enabled, self.board = files, enabled, None
        if enabled:
            for folder in (files.folder, files.board):
                with writing(folder):
                    folder.mkdir(parents=True, exist_ok=True)

    def _append(self, path: Path, text: str) -> None:
        with writing(path), open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)

    def info(self, *lines: str, screen: str | None = None) -> None:
        """Lines for people, in the text log and on the screen; there, `screen` in their place where given."""
        if self.enabled:
            now = time.strftime("%m/%d/%Y %H:%M:%S")
            self._append(self.files.text, "".join(f"{now} - INFO - train - {line}\n" for line in lines))
            tqdm.write("\n".join(lines) if screen is None else screen)

    def record(self, **values) -> None:
        if self.enabled:
            self._append(self.files.json, json.dumps(values) + "\n")

    def evaluation(self, step: int, epoch: float, split: str, result: dict, best: float, **facts) -> None:
        """An evaluation: lines for people, TensorBoard's scalars, and a record.

        `split` is 'val' or 'test'; `result` is from `eval.evaluate`, and tells of raw and averaged weights where both
        were scored; `best` is the highest accuracy so far; facts are train_loss, train_accuracy, lr and seconds.
        """
        figures = {"Train Loss": facts["train_loss"], "Valid Loss": result["loss"]}
        figures |= {"Valid Accuracy": result["accuracy"], "Train Accuracy": facts["train_accuracy"]}
        for kind in ("raw", "average") if "kept" in result else ():
            kept = " (these count)" if kind == result["kept"] else ""
            figures[f"Accuracy of the {kind} weights{kept}"] = result[f"{kind}_accuracy"]
        lines = [f"Global Steps: {step}", *(f"{name}: {value:.5f}" for name, value in figures.items())]
        self.info("Validation Results", *lines, screen=" | ".join(lines))
        board = {f"{split}/accuracy": result["accuracy"], f"{split}/best_accuracy": best}
        self.scalars(step, board | {f"{split}/loss": result["loss"], "train/accuracy": facts["train_accuracy"]})
        scores = {name: value for name, value in result.items() if name != "confusion"}
        self.record(event="eval", step=step, epoch=epoch, split=split, **scores, best=best, **facts)

    def on_board(self, method: str, *values, **words) -> None:
        """Call a method of TensorBoard's SummaryWriter."""
        if self.board:
            with writing(self.files.board):
                getattr(self.board, method)(*values, **words)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.on_board("add_scalar", name, value, step)

    def images(self, name: str, step: int, images: torch.Tensor, mean: list[float], std: list[float]) -> None:
        """The first 32 of normalised images (b, 3, h, w), as one TensorBoard image."""
        if self.board:
            grid = make_grid(denormalize(images[:32], mean, std), nrow=8, pad_value=1.0)
            self.on_board("add_image", name, grid, step)

    def hparams(self, step: int, settings: dict) -> None:
        """Settings of a finished run, by which TensorBoard's HPARAMS tab compares runs, those that differ first.

        None and lists have no place there. (`SummaryWriter.add_hparams` would add scalars of its own in front of the
        curves, and list all settings alike.)
        """
        if self.board:
            from torch.utils.tensorboard.summary import hparams

            shown = {name: str(value) if isinstance(value, bool) else value for name, value in settings.items()}
            shown = {name: value for name, value in shown.items() if isinstance(value, (int, float, str))}
            _, start, end = hparams({"pretrained_dir": "", **shown}, {})
            with writing(self.files.board):
                for summary in (start, end):
                    self.board.file_writer.add_summary(summary, step)

    def position(self) -> dict[str, int]:
        """Sizes of the files in bytes, for `rewind`; what they hold by now outlasts a power cut."""
        sizes = {}
        self.on_board("flush")
        if self.enabled:
            for path in filter(Path.exists, (self.files.text, self.files.json)):
                with writing(path), open(path, "rb") as file:
                    os.fsync(file.fileno())
                    sizes[path.suffix] = os.fstat(file.fileno()).st_size
        return sizes

    def rewind(self, position: dict[str, int], step: int) -> None:
        """Forget what was logged after a checkpoint, as those steps will be done again; open TensorBoard."""
        if not self.enabled:
            return
        for path in (self.files.text, self.files.json):
            if path.exists():
                with writing(path):
                    os.truncate(path, min(path.stat().st_size, position.get(path.suffix, 0)))
        from torch.utils.tensorboard import SummaryWriter

        threading.excepthook = _quiet_writer
        with writing(self.files.board):
            self.board = SummaryWriter(str(self.files.board), purge_step=step + 1)

    def close(self) -> None:
        self.on_board("close")


def _quiet_writer(failed: threading.ExceptHookArgs) -> None:
    """TensorBoard's thread hands an OSError on to the next call; a traceback besides says nothing more."""
    if not issubclass(failed.exc_type, OSError):
        threading.__excepthook__(failed)


def gflops(model: nn.Module, image_size: int) -> float:
    """Floating-point operations of one image's forward pass, in 10^9; a multiply-add counts 2."""
    training, place = model.training, next(model.parameters()).device
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.eval()(torch.zeros(1, 3, image_size, image_size, device=place))
    model.train(training)
    return counter.get_total_flops() / 1e9


def run_description(args: Namespace, facts: dict, weights: str, precision_note: str, notes: list[str]) -> list[str]:
    """A run as it is resolved, for the log, before its first step.

    `facts` are those of the record 'start', `weights` says where the first ones come from, `precision_note` why the
    precision isn't the one asked for; `notes` are further lines, such as `utils.options.describe` gives.
    """
    parts, processes = args.gradient_accumulation_steps, facts["processes"]
    train, valid, test = facts["images"]
    on_test = facts["selected_on"] == "test"
    chosen = "the test images, the same that are reported" if on_test else f"{valid} held-out images (val)"
    factors = [f"{args.train_batch_size // parts // processes} per process and pass"]
    factors += [f"{parts} accumulation steps"] * (parts > 1) + [f"{processes} processes"] * (processes > 1)
    return [
        f"Run {facts['run_id']}",
        f"Model: {' '.join(f'{name}={value}' for name, value in facts['model'].items())}",
        f"Total Parameter: \t{facts['parameters'] / 1e6:.1f}M ({facts['parameters']:,}), "
        f"{facts['gflops']:.3f} GFLOPs per image",
        f"Weights: {weights}",
        f"Data: {args.dataset}, {facts['model']['num_classes']} classes, {train} training and {test} test images; "
        f"the best checkpoint is chosen on {chosen}",
        *notes,
        f"Batch: {args.train_batch_size} = {' x '.join(factors)}",
        f"Precision: {facts['precision']}{precision_note}; {facts['device']}, torch {facts['torch']}, seed {args.seed}",
    ]
