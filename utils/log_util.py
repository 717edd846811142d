"""A run's records: text log, JSON lines, TensorBoard."""

import contextlib
import json
import os
import shutil
import threading
import time
from argparse import Namespace
from pathlib import Path

import torch
from torchvision.utils import make_grid
from tqdm import tqdm

from utils.cli import UserError
from utils.options import run_id, settings
from utils.vis_utils import denormalize


@contextlib.contextmanager
def _writing(path: Path):
    """A full disk, a folder that is gone or read-only is the user's to mend."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); mend that, then the same command again"
        ) from None


class RunLog:
    """Writes `{run_id}.txt`, `{run_id}.jsonl` and `logs/{run_id}/`; on processes other than the first, nothing.

    Args:
        output_dir, log_dir: folders, made where missing.
        run_id: see `utils.options.run_id`.
        enabled: False on all processes but the first.

    Raises:
        UserError: a folder or file cannot be written.
    """

    def __init__(self, output_dir: str, log_dir: str, run_id: str, enabled: bool = True):
        self.enabled = enabled
        self.text, self.json = (Path(output_dir) / f"{run_id}.{suffix}" for suffix in ("txt", "jsonl"))
        self.board_dir, self.board = Path(log_dir) / run_id, None
        if enabled:
            for folder in (self.text.parent, self.board_dir):
                try:
                    folder.mkdir(parents=True, exist_ok=True)
                except OSError as error:
                    raise UserError(f"{folder}: cannot be made ({error.strerror})") from None

    def _append(self, path: Path, text: str) -> None:
        with _writing(path), open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)

    def info(self, *lines: str, screen: str | None = None) -> None:
        """Lines for people, in the text log and on the screen; there, `screen` in their place where given."""
        if self.enabled:
            now = time.strftime("%m/%d/%Y %H:%M:%S")
            self._append(self.text, "".join(f"{now} - INFO - train - {line}\n" for line in lines))
            tqdm.write("\n".join(lines) if screen is None else screen)

    def record(self, **values) -> None:
        """One JSON object."""
        if self.enabled:
            self._append(self.json, json.dumps(values) + "\n")

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """TensorBoard scalars."""
        if self.board:
            with _writing(self.board_dir):
                for name, value in values.items():
                    self.board.add_scalar(name, value, step)

    def images(self, name: str, step: int, images: torch.Tensor, mean: list[float], std: list[float]) -> None:
        """The first 32 of normalised images (b, 3, h, w), as one TensorBoard image."""
        if self.board:
            grid = make_grid(denormalize(images[:32], mean, std), nrow=8, pad_value=1.0)
            with _writing(self.board_dir):
                self.board.add_image(name, grid, step)

    def hparams(self, step: int, settings: dict, results: dict[str, float]) -> None:
        """Settings and results of a finished run, by which TensorBoard's HPARAMS tab compares runs.

        A setting that is None or a list has no place there; without weights to start from, `pretrained_dir` is ''.
        """
        if self.board:
            shown = {name: str(value) if isinstance(value, bool) else value for name, value in settings.items()}
            shown = {name: value for name, value in shown.items() if isinstance(value, (int, float, str))}
            metrics = {f"hparam/{name}": value for name, value in results.items()}
            with _writing(self.board_dir):  # run_name "." keeps them in the run's own folder
                self.board.add_hparams({"pretrained_dir": "", **shown}, metrics, run_name=".", global_step=step)

    def position(self) -> dict[str, int]:
        """Sizes of the files in bytes, for `rewind`; what they hold by now outlasts a power cut."""
        sizes = {}
        if self.board:
            with _writing(self.board_dir):
                self.board.flush()
            for path in filter(Path.exists, (self.text, self.json)):
                with _writing(path), open(path, "rb") as file:
                    os.fsync(file.fileno())
                    sizes[path.suffix] = os.fstat(file.fileno()).st_size
        return sizes

    def rewind(self, position: dict[str, int], step: int) -> None:
        """Forget what was logged after a checkpoint, as those steps will be done again; open TensorBoard."""
        if not self.enabled:
            return
        for path in (self.text, self.json):
            if path.exists():
                with _writing(path):
                    os.truncate(path, min(path.stat().st_size, position.get(path.suffix, 0)))
        from torch.utils.tensorboard import SummaryWriter

        threading.excepthook = _quiet_writer
        with _writing(self.board_dir):
            self.board = SummaryWriter(str(self.board_dir), purge_step=step + 1)

    def close(self) -> None:
        if self.board:
            with _writing(self.board_dir):
                self.board.flush()
                self.board.close()


def _quiet_writer(failed: threading.ExceptHookArgs) -> None:
    """TensorBoard's thread hands an OSError on to the next call; a traceback besides says nothing more."""
    if not issubclass(failed.exc_type, OSError):
        threading.__excepthook__(failed)


def run_description(args: Namespace, facts: dict, weights: str, precision_note: str) -> list[str]:
    """A run as it is resolved, for the log, before its first step.

    Args:
        args: resolved flags.
        facts: run_id, model, parameters, gflops, images, selected_on, processes, precision, device, torch.
        weights: where the first weights come from.
        precision_note: why the precision isn't the one asked for, or ''.
    """
    parts, processes = args.gradient_accumulation_steps, facts["processes"]
    train, valid, test = facts["images"]
    on_test = facts["selected_on"] == "test"
    chosen = "the test images, the same that are reported" if on_test else f"{valid} held-out images (val)"
    return [
        f"Run {facts['run_id']}",
        f"Model: {' '.join(f'{name}={value}' for name, value in facts['model'].items())}",
        f"Total Parameter: \t{facts['parameters'] / 1e6:.1f}M ({facts['parameters']:,}), "
        f"{facts['gflops']:.3f} GFLOPs per image",
        f"Weights: {weights}",
        f"Data: {args.dataset}, {facts['model']['num_classes']} classes, {train} training and {test} test images; "
        f"the best checkpoint is chosen on {chosen}",
        f"Augmentation: {args.aug}, scale {args.scale}, {args.interpolation} to {args.img_size} px, "
        f"erasing {args.reprob:g}, {args.ra} copies of an image; evaluation crop {args.crop_pct:g}",
        f"Mixing: mixup {args.mixup:g}, cutmix {args.cutmix:g}, probability {args.mixup_prob:g}, "
        f"of cutmix {args.mixup_switch_prob:g}",
        f"Normalisation: mean {args.mean}, std {args.std}",
        f"Steps: {args.num_steps} = {args.epochs:.2f} epochs; warm-up {args.warmup_steps} steps, "
        f"then {args.decay_type} decay by {args.decay_by}",
        f"Batch: {args.train_batch_size} = {args.train_batch_size // parts // processes} per process and pass "
        f"x {parts} accumulation steps x {processes} processes",
        f"Optimizer: {args.opt}, learning rate {args.learning_rate:g} (from {args.warmup_lr:g}, to {args.min_lr:g}), "
        f"weight decay {args.weight_decay:g}, clip {args.max_grad_norm:g}, label smoothing {args.smoothing:g}",
        f"Precision: {facts['precision']}{precision_note}; {facts['device']}, torch {facts['torch']}, seed {args.seed}",
    ]


def read_records(path: Path) -> list[dict]:
    """The JSON objects of a `.jsonl`; a last line cut off by a crash is left out."""
    records = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                records.append(json.loads(line))
            except (ValueError, RecursionError):
                break
    return [record for record in records if isinstance(record, dict)]


def recorded_limit(args: Namespace) -> float | None:
    """The --memory_limit of the run that the flags would continue, None if there is none.

    It decides whether images are kept in memory or streamed, so a continued run keeps it.
    """
    records = [] if args.overwrite else read_records(Path(args.output_dir) / f"{run_id(args)}.jsonl")
    limits = [record.get("memory_limit") for record in records if record.get("event") == "start"]
    return limits[0] if limits and isinstance(limits[0], float) else None


def already_done(args: Namespace) -> bool:
    """Whether this run has finished; says so.

    Raises:
        UserError: the run id belongs to a run with other settings, of which there is more than its first line.
    """
    records = read_records(Path(args.output_dir) / f"{run_id(args)}.jsonl")
    saves = [Path(args.output_dir) / f"{run_id(args)}_{kind}.bin" for kind in ("last", "last.prev")]
    began = next((record.get("settings") for record in records if record.get("event") == "start"), None)
    now = settings(args)
    if began is not None and not isinstance(began, dict):
        raise UserError(f"the log of run {run_id(args)} is damaged; mend it, or --overwrite the run")
    changed = [name for name in now if began and began.get(name) != now[name]]
    if changed and (len(records) > 1 or any(save.exists() for save in saves)):
        shown = ", ".join(f"{name} {began.get(name)} -> {now[name]}" for name in changed)
        raise UserError(f"run {run_id(args)} exists with other settings: {shown}; another --name, or --overwrite")
    end = next((record for record in records if record.get("event") == "end"), None)
    if end:
        best, last = (end.get(name) for name in ("best_accuracy", "last_accuracy"))
        if type(best) is not float or type(last) is not float:
            raise UserError(f"the log of run {run_id(args)} is damaged; mend it, or --overwrite the run")
        print(f"{run_id(args)} is finished: best accuracy {best:f}, last {last:f}")
    return end is not None


def delete_run(output_dir: str, log_dir: str, run_id: str) -> None:
    """Remove every file of a run; its settings last, by which a half-removed one is known.

    Raises:
        UserError: the folder cannot be written.
    """
    binaries = [f"{run_id}_{name}.bin" for name in ("last.prev", "last", "checkpoint")]
    temporaries = [f".{name}.tmp" for name in binaries]  # of a killed process
    for name in (*temporaries, *binaries, f"{run_id}.txt", f"{run_id}.jsonl"):
        path = Path(output_dir) / name
        with _writing(path):
            path.unlink(missing_ok=True)
    shutil.rmtree(Path(log_dir) / run_id, ignore_errors=True)
