"""Train, fine-tune or validate one Vision Transformer on one data set.

    python train.py @recipes/demo.args                                  # minutes on 2 CPU cores
    python train.py --name cifar10 --dataset cifar10 --model_type ViT-B_32 \\
        --pretrained_dir checkpoint/imagenet21k_ViT-B_32.npz            # fine-tune on one GPU
    torchrun --nproc_per_node 4 train.py --name cifar100 --dataset cifar100 --bf16   # several GPUs
    python train.py --name cifar100 --dataset cifar100 -v true --load_model_dir output/RUN_checkpoint.bin

Results land in output/ (RUN.txt, .jsonl, _checkpoint.bin, _last.bin, _last.prev.bin) and logs/RUN (TensorBoard).
The same command again continues an unfinished run, on one machine's CPU to the bit, and leaves a finished one alone.
"""

from models import MODELS, create_model
from utils import cli, options

if __name__ == "__main__":  # before torch is imported, so that --help and a wrong flag are answered at once
    ARGS = options.parse_train_args()
    cli.say_loading()

import contextlib
import os
import shlex
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.utils.checkpoint import checkpoint as checkpoint_activations
from tqdm import tqdm

from eval import evaluate
from utils import checkpoint, data_utils, device, dist_util, frozen, results, scheduler, seeds, weights
from utils.anomaly import Anomaly, NonFinite
from utils.augment import eval_augment, make_mix, train_augment
from utils.cli import UserError, refuse
from utils.datasets import Data, ImageSet, check_apart, data_words, load_data
from utils.dist_util import Processes
from utils.log_util import RunLog, gflops, run_description
from utils.loss import accuracy_of, balanced_weights, loss_of
from utils.optim import Average, make_optimizer, make_scaler
from utils.presets import NORMALIZE
from utils.run_files import RunFiles, settings

BAR = "{percentage:3.0f}%|{bar}| {n}/{total} [{elapsed}<{remaining}{postfix}]"  # at most 76 columns and the bar
SAVE_SECONDS = 300  # _last.bin is never older than this,
SAVE_TIMES = 20  # and is written at evaluations, unless that would take more than a twentieth of the time


def resolve(args: Namespace) -> weights.WeightFile | None:
    """Read the weights to start from, if any, and fill in the flags that depend on them.

    Sizes that don't fit one another are answered here, before any data is loaded.
    """
    path = args.pretrained_dir or args.load_model_dir
    source = weights.read_weights(path) if path else None
    if args.load_model_dir and source.own.get("config"):
        options.resolve_model(args, source.own["config"])
    its = args.validate and source.own.get("args") or {}  # the flags of its run, which choose and cut test images
    vars(args).update({name: its[name] for name in options.EVALUATION if name in its and name not in args.asked})
    if args.mean is None:
        args.mean, args.std = map(list, source and source.normalize or NORMALIZE["half"])
    with torch.device("meta"), contextlib.suppress(RuntimeError, TypeError):  # models of others may need numbers
        make_model(args)
    return source


def prepare(args: Namespace) -> tuple[Processes, Data, weights.WeightFile | None]:
    """Start the processes, load weights and data, and fill in the flags that depend on them.

    Returns:
        This process's place; the data on its device; and the weights to start from, None without any.
    """
    processes = dist_util.start(args.device, args.gpu_id)
    source = resolve(args)
    if args.memory_limit is None:  # whether images are kept or streamed; a continued run keeps what it had
        begun = None if args.validate or args.overwrite else RunFiles.of(args).record("start")
        limit = (begun or {}).get("memory_limit")
        limit = device.memory_limit(processes.device) if limit is None else limit
        args.memory_limit = min(dist_util.gather(limit))
    cli.say(f"Loading {args.dataset} from {args.data_dir} ...")
    with dist_util.first_on_each_node(processes):
        data = load_data(args.dataset, args.data_dir, train=not args.validate, **data_words(args))
    if not args.validate:
        data.notes += options.resolve_steps(args, len(data.train))
    device.keep_memory(processes.device)
    return processes, data.to(processes.device), source


def make_model(args: Namespace, num_classes: int = 1000) -> nn.Module:
    """The model that the flags ask for; UserError: sizes that don't fit one another, or flags that don't fit it."""
    try:
        model = create_model(**options.model_config(args), num_classes=num_classes)
    except ValueError as error:
        raise UserError(str(error)) from None
    lacks = (args.grad_checkpoint or args.layer_decay != 1) and not hasattr(model, "blocks")
    refuse(lacks, f"--grad_checkpoint and --layer_decay go by a model's blocks; {args.model_type} has none")
    twice = args.grad_checkpoint and dist_util.statistics_of(model.blocks)
    what = f"{args.model_type}, {args.norm_type}"
    refuse(twice, f"--grad_checkpoint computes blocks twice, which {what} would count in its statistics")
    return model


def load_source(model: nn.Module, source: weights.WeightFile | None, args: Namespace, data: Data) -> str:
    """Put the weights that --pretrained_dir or --load_model_dir names into a model; a line for the log."""
    if source is None:
        return "from scratch"
    labels = source.labels if {*source.labels} == {*data.classes} else data.classes  # others may be another spelling
    same_classes = source.own.get("classes", labels) == data.classes
    check_apart(source.path, source.own, args, data)
    exact = bool(args.load_model_dir)
    other = f"{source.path} has other classes than {args.dataset}, or another order"
    refuse(exact and not same_classes, f"{other}; try --pretrained_dir")
    report = weights.load_weights(model, source, same_classes, exact)
    anew = next((name for name in report.reinitialised if not name.startswith("head.")), None)
    refuse(args.freeze and anew, f"--freeze trains the head alone, and {source.path} has no {anew} for the model")
    return f"{source.path}: {report}"


@dataclass
class Progress:
    """What a run has reached; saved and restored as one."""

    loss_sum: torch.Tensor  # of the steps since the newest evaluation,
    correct: torch.Tensor  # the share of their images that was classified right, summed as well,
    loss_steps: int = 0  # and their number
    step: int = 0  # updates done
    best: dict = field(default_factory=lambda: {"accuracy": -1.0, "step": 0})
    last: float | None = None  # accuracy of the newest evaluation
    kept: str = "raw"  # weights that were the better ones at it, or "average"
    seconds: float = 0.0  # spent in the processes before this one


class Trainer:
    """A run: model, optimizer and data, its files, and the steps from the first to the last.

    `args` are resolved, `data` is on the device and `source` holds the weights to start from, as `prepare` has them.
    """

    def __init__(self, args: Namespace, processes: Processes, data: Data, source: weights.WeightFile | None):
        self.args, self.processes, self.data, self.device = args, processes, data, processes.device
        self.precision, self.precision_note = device.usable_precision(options.precision(args), self.device)
        row = {word: value for word, value in MODELS[args.model_type].items() if word not in ("cls", "norm_cls")}
        asked = options.model_config(args)
        self.config = asked | row | asked | {"num_classes": len(data.classes)}  # whole, in the order of what is asked
        torch.manual_seed(args.seed)
        self.model = make_model(args, len(data.classes))
        self.weights = load_source(self.model, source, args, data)
        self.model.to(self.device)
        self.parameters = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        if args.freeze:
            frozen.freeze(self.model, args.model_type)
        self.model, self.notes = dist_util.share_statistics(self.model, processes)
        self.notes += weights.check_pixels(source, args.mean, args.std) if source else []
        self.statistics = dist_util.statistics_of(self.model)
        self.average = Average(self.model, args.ema_decay) if args.ema_decay else None
        self.gflops = gflops(self.model, args.img_size)
        for block in self.model.blocks if args.grad_checkpoint else ():
            block.forward = partial(checkpoint_activations, block.forward, use_reentrant=False)
        self.anomaly = Anomaly(self.model) if args.detect_anomaly else None
        if args.compile and self.anomaly:
            self.notes.append("--detect_anomaly: not compiled, as it watches every module")
        elif args.compile:
            self.model.compile()
        self.optimizer = make_optimizer(self.model, args, self.device)
        self.scaler = make_scaler(args.loss_scale, self.device, self.precision)
        self.learning_rate = scheduler.from_flags(args)
        self.augment = train_augment(args, self.device, self.precision)
        self.eval_augment = eval_augment(args, self.device, self.precision)
        self.mix = make_mix(args, len(data.classes))
        balanced = args.class_weights and balanced_weights(data.train.labels, len(data.classes)).to(self.device)
        self.loss = partial(loss_of, smoothing=args.smoothing, class_weights=balanced)
        self.on_features = args.freeze and not self.mix and not frozen.is_random(self.augment)
        if self.on_features:
            self.notes.append("--freeze: features are computed once, as nothing about the images is random")
        self.parallel = dist_util.parallel(self.trained_part(self.model), processes)
        self.progress = Progress(torch.zeros((), device=self.device), torch.zeros((), device=self.device))
        self.bad_step = torch.tensor(-1, device=self.device)  # the first that was not finite
        self.started = self.saved = time.monotonic()
        self.save_took = 0.0  # seconds, the last time
        self.files = RunFiles.of(args)
        self.log = RunLog(self.files, enabled=processes.main)

    def use_features(self) -> None:
        """Put what the head is given, by the weights that the run goes on with, in the place of images."""
        self.data = frozen.on_features(
            self.model, self.data, self.augment, self.eval_augment, self.args, self.device, self.precision
        )
        self.augment = self.eval_augment = frozen.Features()

    def trained_part(self, model: nn.Module) -> nn.Module:
        """What batches are given to: a model, or the head of a frozen one."""
        return model.head if self.on_features else model

    def score(self, model: nn.Module, images: ImageSet) -> dict:
        """`eval.evaluate` of a model of the run's shape, over all processes."""
        words = dict(batch_size=self.args.eval_batch_size, num_workers=self.args.num_workers, **self.processes.share)
        batches = data_utils.eval_batches(images, self.eval_augment, **words)
        return evaluate(self.trained_part(model), batches, len(self.data.classes), self.device, self.precision)

    def batches(self, stop: int | None = None) -> Iterator:
        """What `update` takes: this process's batches from the step that is reached on, to the last or to `stop`."""
        args = self.args
        return data_utils.train_batches(
            self.data.train, self.augment, seed=args.seed, start=self.progress.step, stop=stop or args.num_steps,
            batch_size=args.train_batch_size, accumulation=args.gradient_accumulation_steps, ra=args.ra, mix=self.mix,
            num_workers=args.num_workers, **self.processes.share,
        )  # fmt: skip

    def elapsed(self) -> float:
        return self.progress.seconds + time.monotonic() - self.started

    def save(self, path: Path, previous: Path | None = None, **state) -> None:
        """Write `state` with all else that eval.py needs to rebuild a model; see `checkpoint.save`."""
        if self.processes.main:
            facts = dict(
                config=self.config, classes=self.data.classes, args=vars(self.args), precision=self.precision,
                step=self.progress.step, selected_on=self.data.selected_on, files=self.data.files,
            )  # fmt: skip
            checkpoint.save(path, facts | state, previous)

    def save_last(self) -> None:
        """Write all that resuming needs, if it is sound."""
        self.check_finite()
        began = time.monotonic()
        average = self.average and self.average.state_dict()
        sums = {name: torch.tensor(dist_util.mean(getattr(self.progress, name))) for name in ("loss_sum", "correct")}
        progress = vars(self.progress) | sums | {"seconds": self.elapsed()}
        self.save(
            self.files.last, self.files.previous, model=self.model.state_dict(), average=average, **progress,
            optimizer=self.optimizer.state_dict(), scaler=self.scaler.state_dict(), log=self.log.position(),
        )  # fmt: skip
        self.saved = time.monotonic()
        self.save_took = self.saved - began

    def begin_or_resume(self) -> None:
        """Go on from `_last.bin`, or from the one before if it is damaged, as if nothing had happened; or begin."""
        last = self.files.last
        state, found = checkpoint.read_last(last, self.files.previous)
        if len(set(dist_util.gather(state and state["step"]))) > 1:
            raise UserError(f"the processes see different {last}; --output_dir must be a folder that all nodes share")
        if state is None:
            self.log.rewind({}, 0)
            self.describe()
            return
        self.model.load_state_dict(state["model"])
        if self.average:
            self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:  # empty where the run so far needed none, on another device
            self.scaler.load_state_dict(state["scaler"])
        for name in vars(self.progress).keys() & state.keys():  # an older run's lack some
            value = state[name]
            setattr(self.progress, name, value.to(self.device) if isinstance(value, torch.Tensor) else value)
        self.log.rewind(state["log"], self.progress.step)
        if found != last:
            self.log.info(f"{last} is damaged or missing; {found} takes its place")
            if self.processes.main:
                os.replace(found, last)
        if self.processes.main and self.files.record("start")["settings"]["num_steps"] != self.args.num_steps:
            self.describe()  # it is extended
        self.log.info(f"Resuming {self.files.id} after step {self.progress.step} of {self.args.num_steps}")

    def describe(self) -> None:
        """Log the run as it is resolved, and begin its records."""
        args, data, place = self.args, self.data, self.device
        facts = dict(
            run_id=self.files.id, model=self.config, parameters=self.parameters, gflops=self.gflops,
            classes=data.classes, files=data.files, images=[len(data.train), len(data.valid), len(data.test)],
            selected_on=data.selected_on, processes=self.processes.world, precision=self.precision,
            statistics=bool(self.statistics), torch=torch.__version__, memory_limit=args.memory_limit,
            device=torch.cuda.get_device_name(place) if place.type == "cuda" else place.type,
        )  # fmt: skip
        notes = [*data.notes, *options.describe(args), *self.notes]
        self.log.info(*run_description(args, facts, self.weights, self.precision_note, notes))
        self.log.record(event="start", settings=settings(args), **facts)

    def update(self, batches) -> tuple[torch.Tensor, torch.Tensor]:
        """One update from the next accumulation steps' batches; loss and gradient norm, left on the device."""
        args, progress, parts = self.args, self.progress, self.args.gradient_accumulation_steps
        torch.manual_seed(seeds.seed_of(args.seed, seeds.DROPOUT, progress.step, self.processes.rank))
        self.lr = self.learning_rate(progress.step + 1)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * group.get("lr_scale", 1.0)
        total, correct = torch.zeros(2, device=self.device)
        for part in range(parts):
            self.part = part
            images, labels = next(batches)
            if progress.step == part == 0 and not self.on_features:
                self.log.images("train/batch", 1, images, args.mean, args.std)
            waits = self.processes.world > 1 and part < parts - 1  # gradients are exchanged once an update
            with self.parallel.no_sync() if waits else contextlib.nullcontext():
                with device.autocast(self.device, self.precision):
                    logits = self.parallel(images)
                loss = self.loss(logits.float(), labels) / parts
                self.scaler.scale(loss).backward()
            total += loss.detach()
            correct += accuracy_of(logits.detach(), labels) / parts
        self.scaler.unscale_(self.optimizer)
        norm = clip_grad_norm_(self.model.parameters(), args.max_grad_norm or float("inf"))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        dist_util.average_statistics(self.statistics)
        if self.average:
            self.average.update_parameters(self.model)

        progress.step += 1
        progress.loss_sum += total
        progress.correct += correct
        progress.loss_steps += 1
        # the scaler skips a step whose gradient overflows float16; a loss that isn't finite has no such excuse
        finite = total.isfinite() if self.scaler.is_enabled() else (total + norm).isfinite()
        self.bad_step = torch.where(finite | (self.bad_step >= 0), self.bad_step, progress.step)
        if self.anomaly:
            self.check_finite()
            self.anomaly.found = ""  # a gradient that the scaler skips stops no run
        return total, norm

    def check_finite(self) -> None:
        """Stop at a loss or gradient that is not finite. All processes call it; it waits for the device."""
        (step,) = dist_util.largest(int(self.bad_step))
        if step < 0:
            return
        cause = "--detect_anomaly would say where"
        if self.anomaly:
            found = filter(None, dist_util.gather(self.anomaly.found))
            cause = f"first the {next(found, 'loss')}"
        last = self.files.last
        kept = f"{last} is from before" if last.exists() else "nothing was saved before"
        raise NonFinite(f"not finite at step {step}, learning rate {self.lr:g}; {cause}; {kept}; lower --learning_rate")

    def validate(self) -> None:
        """Evaluate, write the weights if they are the best so far, and log."""
        self.check_finite()
        progress = self.progress
        models = {"average": self.average.module} if self.average else {}
        models["raw"] = self.model
        scores = {kind: self.score(model, self.data.valid) for kind, model in models.items()}
        progress.kept = max(scores, key=lambda kind: scores[kind]["accuracy"])  # the average, where both are as good
        result = scores[progress.kept]
        if self.average:
            result |= {f"{kind}_accuracy": each["accuracy"] for kind, each in scores.items()}
            result["kept"] = progress.kept
        frozen.train_mode(self.model, self.args.freeze)
        train_loss = dist_util.mean(progress.loss_sum) / progress.loss_steps
        train_accuracy = dist_util.mean(progress.correct) / progress.loss_steps
        progress.loss_sum.zero_()
        progress.correct.zero_()
        progress.loss_steps = 0
        progress.last = result["accuracy"]
        if progress.last > progress.best["accuracy"]:
            progress.best = {"accuracy": progress.last, "step": progress.step}
            state = models[progress.kept].state_dict()
            self.save(self.files.best, model=state, accuracy=progress.last, loss=result["loss"])
        epoch = progress.step * self.args.epochs / self.args.num_steps
        facts = dict(train_loss=train_loss, train_accuracy=train_accuracy, lr=self.lr, seconds=round(self.elapsed(), 2))
        self.log.evaluation(progress.step, epoch, self.data.selected_on, result, progress.best["accuracy"], **facts)

    def train(self, interrupt: dist_util.Interrupt) -> int:
        """Take all remaining steps; 0, or the conventional exit status after a signal."""
        args, progress, batches = self.args, self.progress, self.batches()
        hidden = None if self.processes.main else True  # None: where stderr is no terminal
        words = dict(total=args.num_steps, initial=progress.step, dynamic_ncols=True, disable=hidden)
        bar = tqdm(bar_format=BAR, smoothing=0, **words)  # the time that is left is by the whole run's speed
        frozen.train_mode(self.model, args.freeze)
        mark, mark_step, first = time.monotonic(), progress.step, progress.step + 1
        while progress.step < args.num_steps:
            try:
                loss, norm = self.update(batches)
            except dist_util.Stalled:
                if self.processes.world == 1 and self.part == 0:  # nothing of the next update is done
                    self.save_last()
                raise
            bar.update()
            if progress.step == first:
                bar.unpause()  # the first step, which compiles and allocates, is no measure
            at_end = progress.step == args.num_steps
            evaluated = progress.step % args.eval_every == 0 or at_end
            if progress.step % args.log_every == 0 or at_end:
                self.check_finite()
                loss, norm = dist_util.mean(loss), norm.item()
                speed = (progress.step - mark_step) * args.train_batch_size / (time.monotonic() - mark)
                epoch, best = progress.step * args.epochs / args.num_steps, 100 * progress.best["accuracy"]
                best = f"{best:.1f} %" if best >= 0 else "-"
                bar.set_postfix_str(f"epoch {epoch:.1f}, loss {loss:.3f}, best {best}")
                scalars = {"loss": loss, "lr": self.lr, "gradient_norm": norm, "images_per_second": speed}
                self.log.scalars(progress.step, {f"train/{name}": value for name, value in scalars.items()})
            if evaluated:
                self.validate()
            if evaluated or progress.step % args.log_every == 0:
                mark, mark_step = time.monotonic(), progress.step
            longest = min(SAVE_SECONDS, SAVE_TIMES * self.save_took) if evaluated else SAVE_SECONDS
            due = self.processes.main and time.monotonic() - self.saved > longest
            # signals and clocks differ between processes: what one has seen, all act upon, at the same step
            signum, due = dist_util.largest(interrupt.signum, due)
            if due or signum or at_end or (args.save_every and progress.step % args.save_every == 0):
                self.save_last()
            if signum and not at_end:
                bar.close()
                by = "Ctrl-C" if signum == signal.SIGINT else signal.Signals(signum).name
                again = f"the same command{', without --overwrite,' * args.overwrite} goes on from there"
                self.log.info(f"Stopped by {by} after step {progress.step}; saved, {again}")
                return 128 + signum
        bar.close()
        self.finish()
        return 0

    def finish(self) -> None:
        """Score what the reader wants to know, and close the records."""
        progress, split = self.progress, self.data.selected_on
        best, minutes = progress.best["accuracy"], self.elapsed() / 60
        end = dict(best_accuracy=best, best_step=progress.best["step"], last_accuracy=progress.last)
        self.log.info(f"Best Accuracy: \t{best:f}")
        if split == "val":
            model = self.average.module if progress.kept == "average" else self.model
            end["test_accuracy_last"] = self.score(model, self.data.test)["accuracy"]
            if self.processes.main:
                model.load_state_dict(checkpoint.read_file(self.files.best)["model"])
            dist_util.broadcast_model(model)
            end["test_accuracy"] = self.score(model, self.data.test)["accuracy"]
            self.log.info(f"Test Accuracy: \t{end['test_accuracy']:f} (last step {end['test_accuracy_last']:f})")
        path = shlex.quote(str(self.files.best))
        self.log.info(f"Best checkpoint: {path}, of step {progress.best['step']}; python eval.py {path}")
        self.log.info("End Training!", f"last {minutes:.1f} min")
        self.log.scalars(progress.step, {"train/minutes": minutes})
        self.log.hparams(progress.step, settings(self.args))
        self.log.record(event="end", step=progress.step, selected_on=split, **end, seconds=self.elapsed())
        self.log.close()


def validate_only(args: Namespace, processes: Processes, data: Data, source: weights.WeightFile) -> None:
    """Evaluate --load_model_dir on the test set, without writing anything."""
    model, place = make_model(args, len(data.classes)), processes.device
    loaded = load_source(model, source, args, data)
    precision, _ = device.usable_precision(options.precision(args), place)
    words = dict(batch_size=args.eval_batch_size, num_workers=args.num_workers, **processes.share)
    batches = data_utils.eval_batches(data.test, eval_augment(args, place, precision), **words)
    result = evaluate(model.to(place), batches, len(data.classes), place, precision)
    if processes.main:
        for note in data.notes[1:]:  # after the images a class, as eval.py
            print(note, file=sys.stderr)
        print(f"Weights: {loaded}", *weights.check_pixels(source, args.mean, args.std), sep="\n")
        print(f"Valid Loss: {result['loss']:.5f}")
        print(f"Valid Accuracy: {result['accuracy']:.5f} ({result['correct']}/{result['seen']})")


def main(args: Namespace) -> int:
    if args.dry_run:
        cells = getattr(args, "cells", [("", args)])
        for _, cell in cells:
            resolve(cell)
        if os.environ.get("RANK", "0") == "0":  # of torchrun's processes one
            results.print_plans(cells)
        return 0
    processes, data, source = prepare(args)
    if args.validate:
        validate_only(args, processes, data, source)
        return 0
    files = RunFiles.of(args)
    if not args.overwrite:
        files.check_data(data.classes, data.files)
        files.check_settings(settings(args), args.extend)
        if files.state == "finished" and not (args.extend and args.num_steps > files.record("end")["step"]):
            if processes.main:
                print(f"{files.id} is finished: {results.scores(files)}; --extend with more --epochs goes on with it")
            return 0
    cli.say(f"Building {args.model_type} on {processes.device} ...")
    trainer = Trainer(args, processes, data, source)
    with contextlib.ExitStack() as until_end:
        dist_util.on_first(processes, lambda: until_end.enter_context(files.lock()))
        if args.overwrite:
            dist_util.on_first(processes, files.delete)
        trainer.begin_or_resume()
        if trainer.on_features:
            trainer.use_features()
        try:
            with dist_util.Interrupt() as interrupt:
                return trainer.train(interrupt)
        except dist_util.Stalled:
            trainer.log.info(f"Signal {interrupt.signum} while waiting for data, after step {trainer.progress.step}")
            return 128 + interrupt.signum
        except NonFinite as error:
            trainer.log.info(f"Stopped: {error}")
            return 3


if __name__ == "__main__":
    cli.run_main(main, ARGS, dist_util.explain, dist_util.stop)
