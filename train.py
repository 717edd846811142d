"""Train, fine-tune or validate one Vision Transformer on one data set.

    python train.py @recipes/demo.args                                  # minutes on 2 CPU cores
    python train.py --name cifar10 --dataset cifar10 --model_type ViT-B_32 \\
        --pretrained_dir checkpoint/imagenet21k_ViT-B_32.npz            # fine-tune on one GPU
    torchrun --nproc_per_node 4 train.py --name cifar100 --dataset cifar100 --bf16   # several GPUs
    python train.py --name cifar100 --dataset cifar100 -v true --load_model_dir output/RUN_checkpoint.bin

Results land in output/ (RUN.txt, .jsonl, _checkpoint.bin, _last.bin, _last.prev.bin) and logs/RUN (TensorBoard).
The same command again continues an unfinished run, on one machine's CPU to the bit, and leaves a finished one alone.
"""

from models import MODELS, NORM_TYPES, create_model, model_sizes
from utils import options
from utils.cli import UserError

if __name__ == "__main__":  # before torch is imported, so that --help and a wrong flag are answered at once
    ARGS = options.parse_train_args(None, MODELS, NORM_TYPES, model_sizes)

import contextlib
import os
import signal
import sys
import time
from argparse import Namespace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.utils.checkpoint import checkpoint as checkpoint_activations
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from eval import eval_augment, evaluate, run_main
from utils import checkpoint, data_utils, dist_util
from utils.anomaly import Anomaly
from utils.augment import Augment, Mix
from utils.log_util import RunLog, already_done, delete_run, recorded_limit, run_description
from utils.optim import Average, make_optimizer, make_scaler
from utils.run_lock import RunLock
from utils.scheduler import learning_rate

SAVE_SECONDS = 300  # _last.bin is never older than this,
SAVE_TIMES = 20  # and after an evaluation not older than so many times what a save takes: a twentieth of the time


class NonFinite(ArithmeticError):
    """The loss or the gradient is infinite or not a number."""


def gflops(config: dict) -> float:
    """Floating-point operations of one image's forward pass, in 10^9; a multiply-add counts 2."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        create_model(**config).eval()(torch.empty(1, 3, config["image_size"], config["image_size"]))
    return counter.get_total_flops() / 1e9


def check_memory(args: Namespace, config: dict, device: torch.device) -> None:
    """Refuse what cannot fit: weights, gradients, the optimizer's states and the images of one pass.

    Raises:
        UserError: with what they take and what is free.
    """
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in create_model(**config).parameters())
    copies = 3 + (args.opt == "adamw") + bool(args.ema_decay)
    images = args.train_batch_size // (args.gradient_accumulation_steps * options.world_size())
    needed, free = 4 * (copies * parameters + images * 3 * args.img_size**2), dist_util.free_memory(device)
    if needed > free:
        raise UserError(
            f"{parameters:,} parameters and {images} images of {args.img_size} px a pass take more than "
            f"{needed / 2**30:.1f} GiB, {free / 2**30:.1f} are free on {device}; a smaller model or --train_batch_size"
        )


def load_weights(model: torch.nn.Module, args: Namespace, keep_head: bool) -> str:
    """Put the weights that the flags name into a model; a line for the log."""
    path = args.pretrained_dir or args.load_model_dir
    if not path:
        return "from scratch"
    report = checkpoint.load_weights(model, path, keep_head)
    if args.load_model_dir and report.reinitialised:
        missing = ", ".join(report.reinitialised[:4])
        raise UserError(f"{path}: lacks {missing} at this size; --pretrained_dir would start those anew")
    return f"{path}: {report}"


class Run:
    """A run: model, optimizer and data, its files, and the steps from the first to the last.

    Args:
        args: resolved flags.
        processes: this process's place.
        data: on the device.
        keep_head: whether the head of the weights it starts from is for the same classes.
    """

    def __init__(self, args: Namespace, processes: dist_util.Processes, data: data_utils.Data, keep_head: bool):
        self.args, self.processes, self.data, self.device = args, processes, data, processes.device
        self.id = options.run_id(args)
        self.config = options.model_config(args) | {"num_classes": len(data.classes)}
        self.precision, self.precision_note = dist_util.usable_precision(options.precision(args), self.device)

        check_memory(args, self.config, self.device)
        torch.manual_seed(args.seed)
        self.model = create_model(**self.config)
        self.weights = load_weights(self.model, args, keep_head)
        self.model.to(self.device)
        if args.sync_bn and processes.world > 1:
            self.model = dist_util.sync_batchnorm(self.model, self.device)
        self.statistics = dist_util.statistics_of(self.model)
        self.average = None
        if args.ema_decay:
            self.average = Average(self.model, args.ema_decay)
        if args.grad_checkpoint:
            for block in self.model.blocks:
                block.forward = partial(checkpoint_activations, block.forward, use_reentrant=False)
        self.anomaly = Anomaly(self.model) if args.detect_anomaly else None
        if args.compile and not self.anomaly:
            self.model.compile()
        self.parallel = self.model
        if processes.world > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            self.parallel = DistributedDataParallel(self.model, device_ids=ids, gradient_as_bucket_view=True)
        self.optimizer = make_optimizer(self.model, args, self.device)
        self.scaler = make_scaler(args.loss_scale, self.device, self.precision)
        self.augment = Augment(
            args.img_size, args.mean, args.std, interpolation=args.interpolation, scale=args.scale, flip=args.flip,
            pad=args.pad, rotation=args.rotation, operations=args.operations, aug_prob=args.aug_prob,
            reprob=args.reprob, device=self.device, dtype=dist_util.DTYPES[self.precision],
        )  # fmt: skip
        self.mix = None
        if args.mixup or args.cutmix:
            odds = dict(prob=args.mixup_prob, switch_prob=args.mixup_switch_prob)
            self.mix = Mix(len(data.classes), mixup=args.mixup, cutmix=args.cutmix, **odds)
        self.eval_augment = eval_augment(vars(args), self.device, self.precision)

        self.step = 0  # updates done
        self.best = {"accuracy": -1.0, "step": 0}
        self.best_weights = None  # what `_checkpoint.bin` will be at the next save, if that has something new
        self.last = None  # the newest evaluation's accuracy
        self.loss_sum = torch.zeros((), device=self.device)  # of the steps since the last evaluation
        self.loss_steps = 0
        self.bad_step = torch.tensor(-1, device=self.device)  # the first that was not finite
        self.seconds = 0.0  # spent before this process
        self.started = self.saved = time.monotonic()
        self.save_took = 0.0  # seconds, the last time
        self.log = RunLog(args.output_dir, args.log_dir, self.id, enabled=processes.main)

    # ------------------------------------------------------------ files

    def path(self, suffix: str) -> Path:
        return Path(self.args.output_dir) / f"{self.id}{suffix}"

    def elapsed(self) -> float:
        return self.seconds + time.monotonic() - self.started

    def save(self, suffix: str, previous: Path | None = None, **state) -> None:
        """Write `state` with all else that eval.py needs to rebuild a model; see `checkpoint.save`."""
        if self.processes.main:
            facts = dict(
                config=self.config,
                classes=self.data.classes,
                args=vars(self.args),
                precision=self.precision,
                step=self.step,
                selected_on=self.data.selected_on,
            )
            checkpoint.save(self.path(suffix), facts | state, previous)

    def save_best(self) -> None:
        """Write the best weights, if they aren't yet."""
        if self.best_weights:
            self.save("_checkpoint.bin", **self.best_weights)
            self.best_weights = None

    def save_last(self) -> None:
        """Write all that resuming needs, if it is sound, and the best weights."""
        self.check_finite()
        began = time.monotonic()
        self.save_best()
        self.save(
            "_last.bin",
            self.path("_last.prev.bin"),
            model=self.model.state_dict(),
            average=self.average and self.average.state_dict(),
            optimizer=self.optimizer.state_dict(),
            scaler=self.scaler.state_dict(),
            best=self.best,
            last=self.last,
            loss_sum=self.loss_sum,
            loss_steps=self.loss_steps,
            seconds=self.elapsed(),
            log=self.log.position(),
        )
        self.saved = time.monotonic()
        self.save_took = self.saved - began

    def begin_or_resume(self) -> None:
        """Go on from `_last.bin`, or from the one before if it is damaged, as if nothing had happened; or begin."""
        last = self.path("_last.bin")
        state, found = checkpoint.read_last(last, self.path("_last.prev.bin"))
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
        for name in ("step", "best", "last", "loss_steps", "seconds"):
            setattr(self, name, state[name])
        self.loss_sum = state["loss_sum"].to(self.device)
        self.log.rewind(state["log"], self.step)
        if found != last:
            self.log.info(f"{last} is damaged or missing; {found} takes its place")
            if self.processes.main:
                os.replace(found, last)
        self.log.info(f"Resuming {self.id} after step {self.step} of {self.args.num_steps}")

    def describe(self) -> None:
        """Log the run as it is resolved, and begin its records."""
        args, data = self.args, self.data
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        facts = dict(
            run_id=self.id,
            model=self.config,
            parameters=sum(param.numel() for param in self.model.parameters() if param.requires_grad),
            gflops=gflops(self.config),
            images=[len(data.train), len(data.valid), len(data.test)],
            selected_on=data.selected_on,
            processes=self.processes.world,
            precision=self.precision,
            device=device,
            torch=torch.__version__,
            memory_limit=args.memory_limit,
        )
        self.log.info(*run_description(args, facts, self.weights, self.precision_note))
        if args.compile and self.anomaly:
            self.log.info("--detect_anomaly: not compiled, as it watches every module")
        if args.sync_bn:
            effect = "of all processes together" if self.processes.world > 1 else "of the one process, as without"
            self.log.info(f"--sync_bn: batch statistics are those {effect}")
        elif self.processes.world > 1 and self.statistics:
            self.log.info("Batch statistics are each process's own; running statistics are averaged over processes")
        self.log.record(event="start", settings=options.settings(args), **facts)

    # ------------------------------------------------------------ steps

    def update(self, batches) -> tuple[torch.Tensor, torch.Tensor]:
        """One update from the next accumulation steps' batches; loss and gradient norm, left on the device."""
        args, parts = self.args, self.args.gradient_accumulation_steps
        torch.manual_seed(data_utils.seed_of(args.seed, data_utils.DROPOUT, self.step, self.processes.rank))
        self.lr = learning_rate(
            self.step + 1, base_lr=args.learning_rate, num_steps=args.num_steps, warmup_steps=args.warmup_steps,
            decay_type=args.decay_type, min_lr=args.min_lr, warmup_lr=args.warmup_lr,
            steps_per_epoch=args.num_steps / args.epochs if args.decay_by == "epoch" else None,
        )  # fmt: skip
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * group["lr_scale"]
        total = torch.zeros((), device=self.device)
        for part in range(parts):
            images, labels = next(batches)
            if self.step == part == 0:
                self.log.images("train/batch", 1, images, args.mean, args.std)
            waits = self.processes.world > 1 and part < parts - 1  # gradients are exchanged once an update
            with self.parallel.no_sync() if waits else contextlib.nullcontext():
                with dist_util.autocast(self.device, self.precision):
                    logits = self.parallel(images)
                loss = F.cross_entropy(logits.float(), labels, label_smoothing=args.smoothing) / parts
                self.scaler.scale(loss).backward()
            total += loss.detach()
        self.scaler.unscale_(self.optimizer)
        norm = clip_grad_norm_(self.model.parameters(), args.max_grad_norm or float("inf"))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        dist_util.average_statistics(self.statistics)
        if self.average:
            self.average.update_parameters(self.model)

        self.step += 1
        self.loss_sum += total
        self.loss_steps += 1
        # the scaler skips a step whose gradient overflows float16; a loss that isn't finite has no such excuse
        finite = total.isfinite() if self.scaler.is_enabled() else (total + norm).isfinite()
        self.bad_step = torch.where(finite | (self.bad_step >= 0), self.bad_step, self.step)
        return total, norm

    def check_finite(self) -> None:
        """Stop at a loss or gradient that is not finite. All processes call it; it waits for the device."""
        step = dist_util.largest(int(self.bad_step))
        if step >= 0:
            last = self.path("_last.bin")
            kept = f"{last} is from before" if last.exists() else "nothing was saved before"
            cause = "--detect_anomaly would say where"
            if self.anomaly:
                found = filter(None, dist_util.gather(self.anomaly.found))
                cause = f"first the {next(found, 'loss')}"
            raise NonFinite(
                f"not finite at step {step}, learning rate {self.lr:g}; {cause}; {kept}; lower --learning_rate"
            )

    def mean_over_processes(self, value: torch.Tensor) -> float:
        return dist_util.sum_over_processes(value.clone()).item() / self.processes.world

    @property
    def candidate(self) -> torch.nn.Module:
        """The model that is evaluated and kept: the average where there is one."""
        return self.average.module if self.average else self.model

    def evaluate(self, model: torch.nn.Module, images: data_utils.ImageSet) -> dict:
        p, args = self.processes, self.args
        batches = data_utils.eval_batches(
            images, self.eval_augment, batch_size=args.eval_batch_size,
            rank=p.rank, world=p.world, device=self.device, num_workers=args.num_workers,
        )  # fmt: skip
        result = evaluate(model, batches, len(self.data.classes), self.device, self.precision)
        self.model.train()
        return result

    def validate(self) -> None:
        """Evaluate, log, and keep a copy of the weights if they are the best so far."""
        self.check_finite()
        result = self.evaluate(self.candidate, self.data.valid)
        if self.average:
            result["raw_accuracy"] = self.evaluate(self.model, self.data.valid)["accuracy"]
        train_loss = self.mean_over_processes(self.loss_sum) / self.loss_steps
        self.loss_sum.zero_()
        self.loss_steps = 0
        self.last = result["accuracy"]
        lines = [
            "Validation Results",
            f"Global Steps: {self.step}",
            f"Train Loss: {train_loss:.5f}",
            f"Valid Loss: {result['loss']:.5f}",
            f"Valid Accuracy: {result['accuracy']:.5f}",
        ]
        if self.average:
            lines.append(f"Accuracy of the raw weights: {result['raw_accuracy']:.5f}")
        self.log.info(*lines, screen=" | ".join(lines[1:]))
        split = self.data.selected_on
        self.log.scalars(self.step, {f"{split}/accuracy": result["accuracy"], f"{split}/loss": result["loss"]})
        if result["accuracy"] > self.best["accuracy"]:
            self.best = {"accuracy": result["accuracy"], "step": self.step}
            if self.processes.main:
                weights = {name: tensor.to("cpu", copy=True) for name, tensor in self.candidate.state_dict().items()}
                score = dict(accuracy=result["accuracy"], loss=result["loss"])
                self.best_weights = dict(model=weights, step=self.step, **score)
        result.pop("confusion")
        self.log.record(
            event="eval",
            step=self.step,
            epoch=self.step * self.args.epochs / self.args.num_steps,
            split=split,
            **result,
            best=self.best["accuracy"],
            train_loss=train_loss,
            lr=self.lr,
            seconds=round(self.elapsed(), 2),
        )

    def train(self, interrupt: dist_util.Interrupt) -> int:
        """Take all remaining steps; 0, or the conventional exit status after a signal."""
        args, p = self.args, self.processes
        batches = data_utils.train_batches(
            self.data.train, self.augment, seed=args.seed, start=self.step, stop=args.num_steps,
            batch_size=args.train_batch_size, accumulation=args.gradient_accumulation_steps, ra=args.ra, mix=self.mix,
            rank=p.rank, world=p.world, device=self.device, num_workers=args.num_workers,
        )  # fmt: skip
        show = p.main and sys.stderr.isatty()
        bar = tqdm(total=args.num_steps, initial=self.step, unit="step", dynamic_ncols=True, disable=not show)
        self.model.train()
        mark, mark_step = time.monotonic(), self.step
        while self.step < args.num_steps:
            loss, norm = self.update(batches)
            if self.anomaly:
                self.check_finite()
                self.anomaly.clear()  # what the scaler excuses is none
            bar.update()
            at_end = self.step == args.num_steps
            if self.step % args.log_every == 0 or at_end:
                self.check_finite()
                loss, norm = self.mean_over_processes(loss), norm.item()
                speed = (self.step - mark_step) * args.train_batch_size / (time.monotonic() - mark)
                bar.set_postfix_str(f"loss {loss:.4f}, lr {self.lr:.3g}, {speed:.0f} images/s")
                scalars = {"loss": loss, "lr": self.lr, "gradient_norm": norm, "images_per_second": speed}
                self.log.scalars(self.step, {f"train/{name}": value for name, value in scalars.items()})
                mark, mark_step = time.monotonic(), self.step
            evaluated = self.step % args.eval_every == 0 or at_end
            if evaluated:
                self.validate()
                mark, mark_step = time.monotonic(), self.step
            oldest = min(SAVE_SECONDS, SAVE_TIMES * self.save_took) if evaluated else SAVE_SECONDS
            due = p.main and time.monotonic() - self.saved > oldest
            # signals and clocks differ between processes: what one has seen, all act upon, at the same step
            wish = dist_util.largest(interrupt.signum or (signal.NSIG if due else 0))
            if at_end or wish or (args.save_every and self.step % args.save_every == 0):
                self.save_last()
            if 0 < wish < signal.NSIG and not at_end:
                bar.close()
                self.log.info(f"Signal {wish} after step {self.step}; saved, the same command goes on from there")
                return 128 + wish
        bar.close()
        self.finish()
        return 0

    def finish(self) -> None:
        """Score what the reader wants to know, and close the records."""
        end = dict(best_accuracy=self.best["accuracy"], best_step=self.best["step"], last_accuracy=self.last)
        self.log.info(f"Best Accuracy: \t{self.best['accuracy']:f}")
        if self.data.selected_on == "val":
            end["test_accuracy_last"] = self.evaluate(self.candidate, self.data.test)["accuracy"]
            if self.processes.main:
                self.candidate.load_state_dict(checkpoint.read_file(self.path("_checkpoint.bin"))["model"])
            dist_util.broadcast_model(self.candidate)
            end["test_accuracy"] = self.evaluate(self.candidate, self.data.test)["accuracy"]
            self.log.info(f"Test Accuracy: \t{end['test_accuracy']:f} (last step {end['test_accuracy_last']:f})")
        self.log.info("End Training!")
        self.log.info(f"last {self.elapsed() / 60:.1f} min")
        results = dict(best_accuracy=self.best["accuracy"], last_accuracy=self.last, minutes=self.elapsed() / 60)
        self.log.hparams(self.step, options.settings(self.args), results)
        self.log.record(event="end", step=self.step, selected_on=self.data.selected_on, **end, seconds=self.elapsed())
        self.log.close()


def validate_only(args: Namespace, processes: dist_util.Processes, data: data_utils.Data) -> None:
    """Evaluate --load_model_dir on the test set, without writing anything."""
    model = create_model(**options.model_config(args), num_classes=len(data.classes))
    load_weights(model, args, keep_head=True)
    precision, _ = dist_util.usable_precision(options.precision(args), processes.device)
    batches = data_utils.eval_batches(
        data.test, eval_augment(vars(args), processes.device, precision), batch_size=args.eval_batch_size,
        rank=processes.rank, world=processes.world, device=processes.device, num_workers=args.num_workers,
    )  # fmt: skip
    result = evaluate(model.to(processes.device), batches, len(data.classes), processes.device, precision)
    if processes.main:
        print(f"Valid Loss: {result['loss']:.5f}")
        print(f"Valid Accuracy: {result['accuracy']:.5f} ({result['correct']}/{result['seen']})")


def main(args: Namespace) -> int:
    processes = dist_util.start(args.device, args.gpu_id)
    source = checkpoint.facts_of(args.pretrained_dir or args.load_model_dir)
    options.resolve_normalization(args, source.get("args"))
    if args.memory_limit is None:
        limit = None if args.validate else recorded_limit(args)
        limit = dist_util.memory_limit(processes.device) if limit is None else limit
        args.memory_limit = -dist_util.largest(-limit)  # of all processes the smallest
    with dist_util.first_on_each_node(processes):
        data = data_utils.load_data(args, train=not args.validate)
    same_classes = source.get("classes", data.classes) == data.classes
    if args.load_model_dir and not same_classes:
        raise UserError(f"{args.load_model_dir} has other classes than {args.dataset}; fine-tune with --pretrained_dir")
    data_utils.to_device(data, processes.device)
    if args.validate:
        validate_only(args, processes, data)
        return 0
    options.resolve_steps(args, len(data.train))
    run_id = options.run_id(args)
    if not args.overwrite and already_done(args):
        return 0
    run = Run(args, processes, data, keep_head=same_classes)
    with dist_util.on_first(processes, lambda: RunLock(args.output_dir, run_id)) or contextlib.nullcontext():
        if args.overwrite:
            dist_util.on_first(processes, lambda: delete_run(args.output_dir, args.log_dir, run_id))
        run.begin_or_resume()
        try:
            with dist_util.Interrupt() as interrupt:
                return run.train(interrupt)
        except NonFinite as error:
            run.save_best()
            run.log.info(f"Stopped: {error}")
            return 3


if __name__ == "__main__":
    run_main(main, ARGS)
