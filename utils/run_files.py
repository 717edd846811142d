"""A run on disk: its name, settings, files, state (new, unfinished or finished), and lock. Imports no torch."""

import contextlib
import fcntl
import json
import os
import shutil
import socket
import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator
from pathlib import Path

from utils.cli import UserError, refuse, refusing

MAX_RUN_ID = 200  # bytes; file systems take 255, and suffixes and temporary names come on top
LENGTH = ("num_steps", "epochs", "warmup_steps", "warmup_epochs")  # differ where a run is extended
UNTIL_DATA = ("num_steps", "epochs", "warmup_steps", "mean", "std")  # may be None until data and weights are read

# Flags that may differ between a run and its continuation, as they don't change what is computed.
NOT_SETTINGS = frozenset(
    "name output_dir log_dir overwrite dry_run cells asked validate device gpu_id local_rank num_workers memory_limit "
    "cache_dir no_cache skip_broken extend eval_batch_size log_every save_every ckpt_freq grad_checkpoint "
    "detect_anomaly".split()
)


def run_id(args: Namespace) -> str:
    """The name of a run's files."""
    pretrained = "T" if args.pretrained_dir or args.load_model_dir else "F"
    seed = "" if args.seed == 42 else f"_seed_{args.seed}"
    model = f"{args.model_type}_norm_{args.norm_type}_fp_{args.fp16 or args.bf16}"
    return f"{args.name}_{model}_img_{args.img_size}_pretrain_{pretrained}{seed}"


def settings(args: Namespace) -> dict:
    """The flags that decide what a run computes, as its record has them: a tuple is a list there, a path a word."""
    deciding = {name: value for name, value in vars(args).items() if name not in NOT_SETTINGS}
    return json.loads(json.dumps(deciding, default=str))


def steps_of(now: dict, old: dict) -> int:
    """The steps that settings ask for, if of epochs by those on disk, which have been rounded to whole steps."""
    return now["num_steps"] or max(1, round(now["epochs"] * old["num_steps"] / old["epochs"]))


def writing(path: Path):
    return refusing(f"{path}: cannot be written", "mend that, then the same command again", OSError)


def read_text(path: Path) -> str:
    with refusing(f"{path}: cannot be read, or is no text", "so it is not the log of a run"):
        return path.read_text(encoding="utf-8")


def read_records(path: Path) -> tuple[list[dict], bool]:
    """The JSON objects of a `.jsonl`, and whether its last line is cut off, as a crash leaves it."""
    text, records = read_text(path), []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if record is None and text.endswith(line):
            return records, True
        refuse(type(record) is not dict, f"{path}: line {number} is no JSON object; move the file away, or mend it")
        records.append(record)
    return records, False


class RunFiles:
    """A run's files, wherever they exist: RUN.txt, .jsonl, _checkpoint.bin, _last.bin, _last.prev.bin; TensorBoard."""

    def __init__(self, output_dir: str | os.PathLike, log_dir: str | os.PathLike, run_id: str):
        self.id, self.folder, self.board = run_id, Path(output_dir), Path(log_dir) / run_id
        self.text, self.json = (self.folder / f"{run_id}{suffix}" for suffix in (".txt", ".jsonl"))
        names = ("checkpoint", "last", "last.prev")
        self.best, self.last, self.previous = (self.folder / f"{run_id}_{name}.bin" for name in names)

    @classmethod
    def of(cls, args: Namespace) -> "RunFiles":
        """Those of the run that flags of train.py name."""
        return cls(args.output_dir, args.log_dir, run_id(args))

    def record(self, event: str) -> dict | None:
        """The newest record of a kind: 'start' has the settings, 'end' the results; an extended run has more starts."""
        records = read_records(self.json)[0] if self.json.exists() else []
        return next((record for record in reversed(records) if record.get("event") == event), None)

    @property
    def saved(self) -> bool:
        """Whether there is a save to go on from."""
        return self.last.exists() or self.previous.exists()

    @property
    def state(self) -> str:
        """'finished'; 'unfinished' where there is an evaluation or a save; else 'new', although there may be a log."""
        if self.record("end"):
            return "finished"
        return "unfinished" if self.saved or self.record("eval") else "new"

    def differences(self, now: dict, free: Iterable[str] = ()) -> list[str]:
        """Settings in which the run on disk differs from `now`, as 'NAME OLD -> NEW'; none where nothing was done yet.

        Of UNTIL_DATA what is None in `now` is left out, and so are those that are `free` to differ.
        """
        from utils.options import defaults  # which imports this module

        if self.state == "new":
            return []
        start = self.record("start") or {}
        old = start.get("settings")
        refuse(type(old) is not dict, f"{self.json}: lacks the run's settings; bring it back, or --overwrite the run")
        old = defaults() | old  # of flags that are newer than the run
        if now["num_steps"] is None:
            now = now | dict(epochs=None, num_steps=steps_of(now, old))
        # accumulation makes the same update of more passes, but for statistics of passes; older logs don't tell of them
        if not start.get("statistics", old["norm_type"] in ("BN", "Rescale") or old["stem"] == "residual"):
            free = {*free, "gradient_accumulation_steps"}
        return [
            f"{name} {old.get(name)} -> {value}"
            for name, value in now.items()
            if name not in free and old.get(name) != value and not (value is None and name in UNTIL_DATA)
        ]

    def check_data(self, classes: list[str], files: dict[str, dict]) -> None:
        """UserError where classes or images differ from the run's on disk, by `datasets.ImageSet.fingerprint`."""
        start = self.record("start")
        if start is None or "files" not in start or self.state == "new":
            return
        was, old = start["classes"], start["files"]
        found = [f"class {name} is gone" for name in was if name not in classes]
        found += [f"class {name} is new" for name in classes if name not in was]
        for split in sorted({*old, *files}):
            for name in (name for name in classes if name in was):
                before, now = (each.get(split, {}).get(name, [0, ""]) for each in (old, files))
                if before[0] != now[0]:
                    found.append(f"{split}/{name} {before[0]} -> {now[0]} images")
                elif before != now:
                    found.append(f"{split}/{name} other names or sizes of files")
        changed = ", ".join(found if len(found) <= 10 else [*found[:10], f"and {len(found) - 10} more"])
        anew = f"--overwrite, or another --name, with --pretrained_dir {self.best} to keep what it learnt"
        refuse(changed, f"run {self.id} exists with other images: {changed}; bring them back, or start anew: {anew}")

    def check_settings(self, now: dict, extend: bool) -> None:
        """UserError where the run on disk has other settings, or isn't there to be extended."""
        changed = ", ".join(self.differences(now, free=LENGTH if extend else ()))
        if extend:
            refuse(self.state == "new", f"--extend: there is no run {self.id} to go on with")
            lost = self.state == "finished" and not self.saved
            refuse(lost, f"--extend: {self.last} is gone, from which run {self.id} would go on; see --load_model_dir")
            old = self.record("start")["settings"]
            steps, had = steps_of(now, old), old["num_steps"]
            refuse(steps < had, f"--extend to {steps} steps: run {self.id} has {had} already")
        refuse(changed, f"run {self.id} exists with other settings: {changed}; another --name, or --overwrite")

    def delete(self) -> None:
        """Remove every file of the run; its settings last, by which a half-removed one is known."""
        binaries = [self.previous, self.last, self.best]
        temporaries = [path.with_name(f".{path.name}.tmp") for path in binaries]  # of a killed process
        for path in (*temporaries, *binaries, self.text, self.json):
            with writing(path):
                path.unlink(missing_ok=True)
        shutil.rmtree(self.board, ignore_errors=True)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Only this process may write the run's files, until the context or the process ends; else a UserError.

        A record lock on `.RUN.lock`, which names its holder and stays: unlike those of flock(2) it is not inherited by
        the workers that decode images, which may live for some seconds longer than a killed process.
        """
        path = self.folder / f".{self.id}.lock"
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            file = open(path, "a+", encoding="utf-8")
        with file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                file.seek(0)
                holder = f"{file.read() or 'another process'}); wait for it, or choose another --name"
                raise UserError(f"run {self.id} is running already ({holder}") from None
            except OSError as error:
                print(f"{path}: no lock ({error.strerror}), so don't start this run twice at a time", file=sys.stderr)
            file.truncate(0)
            file.write(f"{socket.gethostname()}, process {os.getpid()}")
            file.flush()
            yield
