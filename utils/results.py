"""What runs have reached, read from their files: .jsonl, or .txt in this project's or ChaofanTao/RescaleViT's form.

Imports no torch, so that tables are there at once.
"""

import ast
import csv
import io
import json
import logging
import math
import re
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from utils.cli import UserError
from utils.options import NOT_SETTINGS

APART = NOT_SETTINGS | {"seed", "data_dir"}  # may differ between the runs of a mean; a folder of images is named apart
NORMS = ("LN", "BN", "GN", "Rescale")

# The inverse of `options.run_id`.
RUN_ID = re.compile(
    r"(?P<name>.+)_(?P<model>(?:[A-Z0-9]+-)?ViT-[A-Za-z]+_\d+|[A-Za-z]+-[A-Za-z]+)_norm_(?P<norm>LN|BN|GN|Rescale)"
    r"_fp_(?P<fp>True|False)_img_(?P<size>\d+)_pretrain_(?P<pretrain>T|F)(?:_seed_(?P<seed>\d+))?"
)
# A line of a text log after its time, level and source.
FACT = re.compile(
    r"(Training parameters|Run|Data|Steps|Global Steps|Train Loss|Valid Loss|Valid Accuracy|Best Accuracy"
    r"|Test Accuracy|End Training|last)[:!]?(?:\s+(.*))?"
)


@dataclass
class Run:
    """One run. Accuracies are shares, 0..1; the four lists have an entry an evaluation."""

    id: str
    name: str
    model: str
    norm: str
    image_size: int
    pretrained: bool
    seed: int
    dataset: str = ""
    settings: dict = field(default_factory=dict)  # flags, as far as the file tells
    chosen_on: str = "test"  # the images that decide which checkpoint is the best: 'test' or 'val'
    num_steps: int | None = None  # planned
    steps: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)  # empty where it was not recorded
    finished: bool = False
    best: float | None = None  # on the test images, of the best checkpoint; None while the run is not finished
    last: float | None = None  # on the test images, after the last step
    minutes: float | None = None
    cut_off: bool = False  # the file ends within a line

    @property
    def progress(self) -> str:
        step = self.steps[-1] if self.steps else 0
        return f"step {step} of {self.num_steps}" if self.num_steps else f"step {step}"

    @property
    def series(self) -> tuple:
        """What runs have in common that differ in their seeds only."""
        settings = {name: value for name, value in self.settings.items() if name not in APART}
        return *self.kind, re.sub(r"_seed_\d+$", "", self.id), json.dumps(settings, sort_keys=True, default=str)

    @property
    def kind(self) -> tuple:
        """What the table shows of a run in any case."""
        return self.dataset, self.chosen_on, self.model, self.norm, self.pretrained, self.image_size


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not a text file, so not the log of a run") from None


def _dataset(settings: dict) -> str:
    """A data set's name, with what tells it from its siblings."""
    name = settings.get("dataset", "")
    more = {"emnist": settings.get("emnist_split"), "imagefolder": settings.get("data_dir")}.get(name)
    return f"{name} {more}" if more else name


def _from_id(path: Path) -> Run:
    found = RUN_ID.fullmatch(path.stem)
    if not found:
        raise UserError(f"{path}: is not named as a run is, NAME_MODEL_norm_..._pretrain_F")
    return Run(
        id=path.stem,
        name=found["name"],
        model=found["model"],
        norm=found["norm"],
        image_size=int(found["size"]),
        pretrained=found["pretrain"] == "T",
        seed=int(found["seed"] or 42),
    )


def _records(path: Path) -> tuple[list[dict], bool]:
    """The objects of a .jsonl, and whether its last line is cut off."""
    text, records = _read_text(path), []
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except (ValueError, RecursionError):
            if number == len(lines) and not text.endswith("\n"):
                return records, True
            raise UserError(f"{path}: line {number} is not JSON; move the file away, or mend it") from None
    return records, False


def _read_json(path: Path) -> Run:
    run = _from_id(path)
    records, run.cut_off = _records(path)
    try:
        if not records or records[0]["event"] != "start":
            raise UserError(f"{path}: does not begin with the record 'start'; move the file away")
        run.settings, run.chosen_on = dict(records[0]["settings"]), records[0]["selected_on"]
        run.dataset, run.num_steps = _dataset(run.settings), run.settings["num_steps"]
        run.seed = run.settings["seed"]
        for record in records[1:]:
            if record["event"] == "eval":
                run.steps.append(record["step"])
                run.loss.append(record["loss"])
                run.accuracy.append(record["accuracy"])
                run.train_loss.append(record["train_loss"])
                run.minutes = record["seconds"] / 60
            elif record["event"] == "end":
                run.finished = True
                run.best = record.get("test_accuracy", record["best_accuracy"])
                run.last = record.get("test_accuracy_last", record["last_accuracy"])
                run.minutes = record["seconds"] / 60
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: a record lacks {error}, so it is not from this train.py") from None
    return run


def _namespace(text: str) -> dict:
    """The plain values of a printed argparse.Namespace; `device=device(type='cuda')` and its like are left out."""
    values = {}
    try:
        call = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # the last two of thousands of brackets
        return values
    for word in getattr(call, "keywords", []):
        try:
            values[word.arg or ""] = ast.literal_eval(word.value)
        except (ValueError, TypeError):
            continue
    return values


def _take(run: Run, row: dict, fact: str, value: str) -> None:
    """Enter one line of a text log; `row` collects the lines of an evaluation."""
    if fact == "Training parameters":
        run.settings = _namespace(value)
        run.dataset, run.num_steps = _dataset(run.settings), run.settings.get("num_steps")
        run.seed = run.settings.get("seed", run.seed)
    elif fact == "Data":
        run.dataset = value.split(",")[0]
        run.chosen_on = "val" if value.endswith("(val)") else "test"
    elif fact == "Steps":
        run.num_steps = int(value.split()[0])
    elif fact == "Global Steps":
        row.clear()
        row["step"] = int(value)
    elif fact in ("Train Loss", "Valid Loss"):
        row[fact] = float(value)
    elif fact == "Valid Accuracy" and {"step", "Valid Loss"} <= row.keys():
        run.accuracy.append(float(value))
        run.steps.append(row["step"])
        run.loss.append(row["Valid Loss"])
        run.train_loss += [row["Train Loss"]] if "Train Loss" in row else []
    elif fact == "Best Accuracy":
        run.best, run.last = float(value), run.accuracy[-1] if run.accuracy else None
    elif fact == "Test Accuracy":  # of a run whose best checkpoint was chosen on other images
        run.best, run.last = (float(number) for number in re.findall(r"\d\.\d+", value))
    elif fact == "End Training":
        run.finished = True
    elif fact == "last":
        run.minutes = float(value.split()[0])


def _read_log(path: Path) -> Run:
    """A text log. RescaleViT's grow with every call, so one may hold several attempts, or later calls without steps."""
    text = _read_text(path)
    attempts, row = [_from_id(path)], {}
    for line in text[: text.rfind("\n") + 1].splitlines():  # the start of a number is not that number
        found = FACT.fullmatch(line.split(" - ", 3)[-1])
        if not found:
            continue
        if found[1] in ("Training parameters", "Run"):
            attempts.append(_from_id(path))
        try:
            _take(attempts[-1], row, found[1], found[2] or "")
        except (ValueError, IndexError):
            raise UserError(f"{path}: {line.strip()!r} is not a line of a run's log") from None
    whole = [run for run in attempts if run.finished]
    begun = [run for run in attempts if run.steps]
    run = (whole or begun or attempts)[-1]
    run.cut_off = bool(text) and not text.endswith("\n")
    run.best, run.last = (run.best, run.last) if run.finished else (None, None)
    run.dataset = run.dataset or run.name
    return run


def _is(value, kind: type, high: float) -> bool:
    """Whether a value is a number of a kind from 0 to `high`; a float may be infinite or no number, as losses can."""
    number = type(value) in (int, kind)
    return number and (0 <= value <= high or (kind is float and not math.isfinite(value)))


def _check(run: Run, path: Path) -> Run:
    """Refuse values that no run has, before tables and curves are made of them."""
    whole = all(isinstance(text, str) for text in (run.dataset, *run.settings)) and run.chosen_on in ("test", "val")
    whole = whole and _is(run.seed, int, 2**63) and (run.num_steps is None or _is(run.num_steps, int, 2**53))
    whole = whole and all(_is(step, int, 2**53) for step in run.steps)
    whole = whole and all(_is(value, float, 1e30) for values in (run.loss, run.train_loss) for value in values)
    scores = [score for score in (*run.accuracy, run.best, run.last) if score is not None]
    whole = whole and all(_is(score, float, 1) and math.isfinite(score) for score in scores)
    whole = whole and (run.minutes is None or _is(run.minutes, float, 1e9) and math.isfinite(run.minutes))
    whole = whole and isinstance(run.settings.get("name", ""), str) and (run.best is not None or not run.finished)
    if not whole:
        raise UserError(f"{path}: holds values that no run has; move the file away, or mend it")
    return run


def read_run(path: str | Path) -> Run:
    """Read one run from its .jsonl or .txt.

    Raises:
        UserError: the file cannot be read, or is not of a run.
    """
    path = Path(path)
    return _check(_read_json(path) if path.suffix == ".jsonl" else _read_log(path), path)


def read_runs(path: str | Path) -> list[Run]:
    """Read all runs of a folder, or the one of a file. Where a run has .jsonl and .txt, the .jsonl counts.

    Raises:
        UserError: there is no such folder, no run in it, or a file cannot be read.
    """
    path = Path(path)
    if path.is_file():
        return [read_run(path)]
    if not path.is_dir():
        raise UserError(f"{path}: no such folder")
    files = {file.stem: file for suffix in ("txt", "jsonl") for file in path.glob(f"*.{suffix}")}
    runs = [read_run(file) for stem, file in sorted(files.items()) if RUN_ID.fullmatch(stem)]
    if not runs:
        raise UserError(f"{path}: holds no run (NAME_MODEL_norm_..._pretrain_F.jsonl or .txt)")
    return runs


# ---------------------------------------------------------------- tables


@dataclass
class Row:
    """A line of the table: the finished runs of a series, which differ in seeds, or one run that is not finished."""

    label: str  # the model, and what tells the row from its likes
    runs: list[Run]

    @property
    def run(self) -> Run:
        return self.runs[0]

    @property
    def legend(self) -> str:
        n = f", n={len(self.runs)}" if len(self.runs) > 1 else ""
        state = "" if self.run.finished else f", seed {self.run.seed}: {self.run.progress}"
        return f"{self.label}{'*' if self.run.pretrained else ''} {self.run.norm}{n}{state}"


def mean_and_spread(values: Iterable[float | None]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation; None where there are too few values."""
    values = [value for value in values if value is not None]
    mean = statistics.fmean(values) if values else None
    return mean, statistics.stdev(values) if len(values) > 1 else None


def _label(run: Run, likes: list[Run]) -> str:
    """The model, followed by the name or the settings where other rows have the same model, norm and size."""
    others = [other for other in likes if other.series != run.series]
    if not others:
        return run.model
    if all(other.name != run.name for other in others):
        return f"{run.model} ({run.name})"
    differing = [key for key in run.settings if any(other.settings.get(key) != run.settings[key] for other in others)]
    shown = [f"{key} {run.settings[key]}" for key in differing if key not in APART][:3]
    return f"{run.model} ({', '.join([run.name, *shown])})"


def tables(runs: list[Run]) -> dict[tuple[str, str], list[Row]]:
    """The rows of each table, by (data set, images that the best checkpoint was chosen on)."""

    def order(run: Run) -> tuple:
        return run.model, NORMS.index(run.norm), run.pretrained, run.image_size, run.series, not run.finished, run.seed

    found: dict[tuple[str, str], list[Row]] = {}
    for run in sorted(runs, key=order):
        rows = found.setdefault((run.dataset, run.chosen_on), [])
        if rows and run.finished and rows[-1].run.finished and rows[-1].run.series == run.series:
            rows[-1].runs.append(run)
            continue
        rows.append(Row(_label(run, [other for other in runs if other.kind == run.kind]), [run]))
    return dict(sorted(found.items()))


def _accuracy(row: Row) -> str:
    if not row.run.finished:
        return f"{row.run.progress} (seed {row.run.seed})"
    mean, spread = mean_and_spread(run.best for run in row.runs)
    text = f"{100 * mean:.2f}"
    return text if spread is None else f"{text} ± {100 * spread:.2f} (n={len(row.runs)})"


def markdown(dataset: str, chosen_on: str, rows: list[Row]) -> str:
    """One data set's table: model, norm, resolution, accuracy and time, in the form of RescaleViT's README."""
    choice = "best on test" if chosen_on == "test" else "test, best on val"
    lines = [["model", *NORMS, "resolution", f"acc(%), {choice}", "time(min)"]]
    for row in rows:
        run = row.run
        minutes, _ = mean_and_spread(run.minutes for run in row.runs)
        lines.append([
            row.label.replace(run.model, f"{run.model}*", 1) if run.pretrained else row.label,
            *("+" if norm == run.norm else "" for norm in NORMS),
            f"{run.image_size}x{run.image_size}",
            _accuracy(row),
            f"{minutes:.1f}" if run.finished and minutes is not None else "",
        ])  # fmt: skip
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in lines]
    text.insert(1, "|" + "|".join(f":{'-' * w}:" for w in widths) + "|")
    notes = ["\\* from pretrained weights"] if any(row.run.pretrained for row in rows) else []
    notes += ["± sample standard deviation over n seeds"] if any(len(row.runs) > 1 for row in rows) else []
    notes += ["best on test: the evaluation that scored highest on the test images, so a little optimistic"] * (
        chosen_on == "test"
    )
    return f"### {dataset}\n\n" + "\n".join(text) + f"\n\n{'; '.join(notes)}".rstrip() + "\n"


COLUMNS = (
    "dataset chosen_on model norm pretrained resolution name label state step num_steps n seeds "
    "best best_sd last last_sd minutes minutes_sd"
).split()


def csv_text(found: dict[tuple[str, str], list[Row]]) -> str:
    """All tables as CSV; accuracies are shares, empty for runs that are not finished."""
    file = io.StringIO()
    writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for (dataset, chosen_on), rows in found.items():
        for row in rows:
            run, done = row.run, row.run.finished
            values = dict(
                dataset=dataset,
                chosen_on=chosen_on,
                model=run.model,
                norm=run.norm,
                pretrained=run.pretrained,
                resolution=run.image_size,
                name=run.name,
                label=row.label,
                state="finished" if done else "incomplete",
                step=run.steps[-1] if run.steps else 0,
                num_steps=run.num_steps,
                n=len(row.runs) if done else 0,
                seeds=" ".join(str(run.seed) for run in row.runs),
            )
            for name in ("best", "last", "minutes"):
                values[name], values[f"{name}_sd"] = mean_and_spread(getattr(run, name) for run in row.runs)
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in values.items()})
    return file.getvalue()


# ---------------------------------------------------------------- time


COST = (
    "model_type img_size train_batch_size gradient_accumulation_steps fp16 bf16 patch_size dim depth heads mlp_dim stem"
)


def time_like(runs: list[Run], settings: dict) -> tuple[float, Run] | None:
    """Minutes that a run with these settings would take, by a finished one of equal cost, and which that was.

    Args:
        runs: of the machine in question.
        settings: flags of train.py as in its records; `num_steps` or `epochs` may be None.
    """
    for run in runs:
        same = all(run.settings.get(key) == settings.get(key) for key in COST.split())
        if run.finished and run.minutes is not None and same:
            unit = "num_steps" if settings["num_steps"] else "epochs"
            if run.settings.get(unit):
                return run.minutes * settings[unit] / run.settings[unit], run
    return None


def differing(recorded: dict, wanted: dict) -> list[str]:
    """Settings in which a recorded run differs from flags; those that only the data will decide are left out."""
    epochs, steps = recorded.get("epochs"), recorded.get("num_steps")
    if wanted["num_steps"] is None and steps and epochs and _is(epochs, float, 1e30):
        steps = max(1, round(wanted["epochs"] * steps / epochs))  # which the epochs were rounded to
        wanted = wanted | dict(epochs=None, num_steps=steps)
    return [key for key in wanted if wanted[key] is not None and key in recorded and recorded[key] != wanted[key]]


def read_board(folder: Path, tag: str) -> tuple[list[int], list[float]]:
    """Steps and values of a TensorBoard scalar; empty where there is none."""
    if not folder.is_dir():
        return [], []
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # that a resumed run replaced some steps is no news
    board = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    if tag not in board.Tags()["scalars"]:
        return [], []
    events = board.Scalars(tag)
    return [event.step for event in events], [event.value for event in events]
