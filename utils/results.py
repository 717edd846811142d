"""What runs have reached, from their .jsonl, or ChaofanTao/RescaleViT's .txt. Imports no torch: tables come at once."""

import ast
import contextlib
import csv
import io
import json
import logging
import math
import re
import statistics
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from models import MODELS, NORM_TYPES
from utils.cli import UserError, refuse, refusing
from utils.options import defaults
from utils.run_files import NOT_SETTINGS, RunFiles, read_records, read_text, settings, steps_of

APART = NOT_SETTINGS | {"seed", "data_dir"}  # may differ between the runs of a mean; a folder of images is named apart
SIZES = {"patch_size": "patch", "dim": "dim", "depth": "depth", "heads": "heads", "mlp_dim": "mlp", "stem": "stem"}
# Settings that runs of equal cost have in common.
COST = ("model_type", "img_size", "train_batch_size", "gradient_accumulation_steps", "fp16", "bf16", *SIZES)
COST += ("freeze", "compile", "merge_layer", "merge_num", "img_sizes")

# The inverse of `run_files.run_id`, for logs whose names alone say it.
RUN_ID = re.compile(
    r"(?P<name>.+)_(?P<model>(?:[A-Z0-9]+-)?ViT-[A-Za-z]+_\d+|[A-Za-z]+-[A-Za-z]+)_norm_(?P<norm>[A-Za-z]+)"
    r"_fp_(True|False)_img_(?P<size>\d+)_pretrain_(?P<pretrain>T|F)(?:_seed_(?P<seed>\d+))?"
)
# An evaluation in a text log; between its lines ours have the training loss.
EVALUATION = re.compile(
    r"Global Steps: (\S+)\n(?:.*Train Loss: .*\n)?.*Valid Loss: (\S+)\n.*Valid Accuracy: (\S+)$", re.MULTILINE
)


@dataclass
class Run:
    """One run, as its files tell it. Accuracies are shares, 0..1; the lists have an entry an evaluation."""

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
    train_loss: list[float] = field(default_factory=list)  # these two are empty where they were not recorded
    train_accuracy: list[float] = field(default_factory=list)
    finished: bool = False
    best: float | None = None  # on the test images, of the best checkpoint; None while the run is not finished
    last: float | None = None  # on the test images, after the last step
    minutes: float | None = None
    parameters: int | None = None
    cut_off: bool = False  # the file ends within a line

    @property
    def progress(self) -> str:
        step = self.steps[-1] if self.steps else 0
        return f"step {step} of {self.num_steps}" if self.num_steps else f"step {step}"

    @property
    def best_so_far(self) -> str:
        score = f"{'val ' * (self.chosen_on == 'val')}{100 * max(self.accuracy):.2f} so far, " if self.accuracy else ""
        return f"{score}{self.progress} (seed {self.seed})"

    @property
    def series(self) -> tuple:
        """What runs have in common that differ in their seeds only."""
        shared = {name: value for name, value in self.settings.items() if name not in APART}
        return *self.kind, re.sub(r"_seed_\d+$", "", self.id), json.dumps(shared, sort_keys=True, default=str)

    @property
    def kind(self) -> tuple:
        """What the table shows of a run in any case."""
        return self.dataset, self.chosen_on, self.model, self.norm, self.pretrained, self.image_size


def _dataset(flags: dict) -> str:
    """A data set's name, with what tells it from its siblings."""
    name = flags.get("dataset", "")
    more = {"emnist": flags.get("emnist_split"), "imagefolder": flags.get("data_dir")}.get(name)
    return f"{name} {more}" if more else name


def _read_json(path: Path) -> Run:
    records, cut_off = read_records(path)
    begins = records and records[0].get("event") == "start"
    refuse(not begins, f"{path}: does not begin with the record 'start'; move the file away")
    with refusing(f"{path}: not from this train.py", "move the file away"):
        flags = dict([record for record in records if record.get("event") == "start"][-1]["settings"])  # as extended
        run = Run(
            id=path.stem, name=path.stem.rsplit(f"_{flags['model_type']}_norm_", 1)[0], model=str(flags["model_type"]),
            norm=str(flags["norm_type"]), image_size=int(flags["img_size"]), seed=int(flags["seed"]),
            pretrained=bool(flags["pretrained_dir"] or flags["load_model_dir"]), dataset=str(_dataset(flags)),
            settings=defaults() | flags, chosen_on=str(records[0]["selected_on"]), num_steps=int(flags["num_steps"]),
            cut_off=cut_off, parameters=int(records[0].get("parameters") or 0) or None,
        )  # fmt: skip
        for record in records[1:]:
            if record["event"] == "eval":
                run.steps.append(int(record["step"]))
                for name in ("loss", "accuracy", "train_loss"):
                    getattr(run, name).append(float(record[name]))
                run.train_accuracy += [float(record["train_accuracy"])] if "train_accuracy" in record else []
            elif record["event"] == "end":
                run.finished = True
                run.best = float(record.get("test_accuracy", record["best_accuracy"]))
                run.last = float(record.get("test_accuracy_last", record["last_accuracy"]))
            if "seconds" in record:  # it isn't where a run begins to be extended
                run.minutes = record["seconds"] / 60
        return run


def _namespace(text: str) -> dict:
    """The plain values of a printed argparse.Namespace; `device=device(type='cuda')` and its like are left out."""
    values = {}
    for name, value in re.findall(r"(\w+)=('[^']*'|[\w.+-]+)", text):
        with contextlib.suppress(ValueError, SyntaxError):
            values[name] = ast.literal_eval(value)
    return values


def _read_attempt(path: Path, text: str) -> Run:
    """A run, as its log's name and the text of one call of a training script tell it."""
    named = RUN_ID.fullmatch(path.stem)
    size, pretrained, seed = int(named["size"]), named["pretrain"] == "T", int(named["seed"] or 42)
    run = Run(path.stem, named["name"], named["model"], named["norm"], size, pretrained, seed, dataset=named["name"])

    def fact(pattern: str) -> re.Match | None:
        """The last line that says this after its time, level and source."""
        found = list(re.finditer(rf"(?:^| - ){pattern}$", text, re.MULTILINE))
        return found[-1] if found else None

    if flags := fact(r"Training parameters Namespace(.*)"):
        run.settings = _namespace(flags[1])
        run.dataset, run.num_steps = _dataset(run.settings), run.settings.get("num_steps")
        run.seed = run.settings.get("seed", seed)
    if data := fact(r"Data: (.*?),.*?(\(val\))?"):
        run.dataset, run.chosen_on = data[1], "val" if data[2] else "test"
    if parameters := fact(r"Total Parameter: \t([\d.]+)M(?: \(([\d,]+)\).*)?"):
        millions, exact = parameters.groups()
        run.parameters = int(exact.replace(",", "")) if exact else round(1e6 * float(millions))
    for step, loss, accuracy in EVALUATION.findall(text):
        run.steps.append(int(step))
        run.loss.append(float(loss))
        run.accuracy.append(float(accuracy))
    on_val = run.chosen_on == "val"  # then the best of the evaluations is no score of test images
    score = fact(r"Test Accuracy: \t(\S+) \(last step (\S+)\)" if on_val else r"Best Accuracy: \t(\S+)")
    run.finished = bool(run.steps and score and fact("End Training!"))
    if run.finished:
        run.best, run.last = map(float, score.groups() if on_val else (score[1], run.accuracy[-1]))
    if minutes := fact(r"last (\S+) min"):
        run.minutes = float(minutes[1])
    return run


def _read_log(path: Path) -> Run:
    """A text log. RescaleViT's grow with every call, so one may hold several attempts, or later calls without steps."""
    refuse(not RUN_ID.fullmatch(path.stem), f"{path}: is not named as a run is, NAME_MODEL_norm_..._pretrain_F")
    whole, newline, cut_off = read_text(path).rpartition("\n")  # the start of a number is not that number
    refuse(not newline, f"{path}: holds no line of a run's log")
    with refusing(f"{path}: is no log of a run", "move the file away"):
        attempts = [_read_attempt(path, text) for text in re.split(r"^(?=.*Training parameters)", whole, flags=re.M)]
    finished = [run for run in attempts if run.finished]
    begun = [run for run in attempts if run.steps]
    run = (finished or begun or attempts)[-1]
    run.cut_off = bool(cut_off)
    return run


def read_run(path: str | Path) -> Run:
    """Read one run from its .jsonl or .txt; UserError where it cannot be read, or is not of a run."""
    path = Path(path)
    return _read_json(path) if path.suffix == ".jsonl" else _read_log(path)


def read_runs(path: str | Path) -> tuple[list[Run], list[str]]:
    """Read all runs of a folder, or the one of a file. Where a run has .jsonl and .txt, the .jsonl counts.

    Returns the runs, and of each file that was left out its name and why. UserError: no such folder, or no run in it.
    """
    path = Path(path)
    if path.is_file():
        return [read_run(path)], []
    refuse(not path.is_dir(), f"{path}: no such folder")
    files = {file.stem: file for suffix in ("txt", "jsonl") for file in path.glob(f"*.{suffix}")}
    runs, left_out = [], []
    for _, file in sorted(files.items()):
        try:
            runs.append(read_run(file))
        except UserError as error:
            left_out.append(str(error))
    refuse(not runs, "; ".join([f"{path}: holds no run (NAME_MODEL_norm_..._pretrain_F.jsonl or .txt)", *left_out[:1]]))
    return runs, left_out


def read_board(folder: Path, tag: str) -> tuple[list[int], list[float]]:
    """Steps and values of a TensorBoard scalar; empty where there is none."""
    if not folder.is_dir():
        return [], []
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # that a resumed run replaced some steps is no news
    board = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    events = board.Scalars(tag) if tag in board.Tags()["scalars"] else []
    return [event.step for event in events], [event.value for event in events]


@dataclass
class Row:
    """A line of the table: the finished runs of a series, which differ in seeds, or one run that is not finished."""

    runs: list[Run]
    sizes: str = ""  # other than the model type's
    apart: list[str] = field(default_factory=list)  # what tells the rows of the table from one another

    @property
    def run(self) -> Run:
        return self.runs[0]

    @property
    def label(self) -> str:
        apart = f" ({', '.join(self.apart)})" if self.apart else ""
        return f"{self.run.model}{'*' * self.run.pretrained}{self.sizes}{apart}"

    @property
    def legend(self) -> str:
        n = f", n={len(self.runs)}" if len(self.runs) > 1 else ""
        state = "" if self.run.finished else f", seed {self.run.seed}: {self.run.progress}"
        return f"{self.label} {self.run.norm}{n}{state}"


def mean_and_spread(values: Iterable[float | None]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation; None where there are too few values, or one is not finite."""
    values = [value for value in values if value is not None]
    mean = statistics.fmean(values) if values else None
    return mean, statistics.stdev(values) if len(values) > 1 and math.isfinite(mean) else None


def _tell_apart(rows: list[Row]) -> None:
    """Say of each row of a table its sizes, and of all rows the same: names, steps and settings, where any two need
    them; so rows are comparable, or visibly not.
    """
    for row in rows:
        usual, own = MODELS.get(row.run.model, {}), row.run.settings
        differing = [key for key in SIZES if own.get(key) not in (None, usual.get(key))]
        row.sizes = "".join(f", {SIZES[key]} {own[key]}" for key in differing)

    def alike() -> list[list[Run]]:
        groups = defaultdict(list)
        for row in rows:
            groups[*row.run.kind, row.sizes, *row.apart].append(row.run)
        return [runs for runs in groups.values() if len({run.series for run in runs}) > 1]

    def show(what: Callable[[Run], str]) -> None:
        for row in rows:
            row.apart.append(what(row.run))

    if any(len({run.name for run in runs}) > 1 for runs in alike()):
        show(lambda run: run.name)
    if len({row.run.num_steps for row in rows}) > 1:
        show(lambda run: f"{run.num_steps} steps")
    groups = [[run.settings for run in runs] for runs in alike()]
    differing = {key: None for a, *others in groups for b in others for key in a | b if a.get(key) != b.get(key)}
    for i, key in enumerate(key for key in differing if key not in APART):
        if i < 3 or alike():
            show(lambda run, key=key: f"{key} {run.settings.get(key)}")


def tables(runs: list[Run]) -> dict[tuple[str, str], list[Row]]:
    """Rows of each table, by (data set, images that choose the best checkpoint)."""

    def order(run: Run) -> tuple:
        norm = NORM_TYPES.index(run.norm) if run.norm in NORM_TYPES else len(NORM_TYPES)
        return run.model, norm, run.norm, run.pretrained, run.image_size, run.series, not run.finished, run.seed

    found = defaultdict(list)
    for run in sorted(runs, key=order):
        rows = found[run.dataset, run.chosen_on]
        if rows and run.finished and rows[-1].run.finished and rows[-1].run.series == run.series:
            rows[-1].runs.append(run)
        else:
            rows.append(Row([run]))
    for rows in found.values():
        _tell_apart(rows)
    return dict(sorted(found.items()))


def _parameters(count: int | None) -> str:
    return "" if count is None else f"{count:,}" if count < 100_000 else f"{count / 1e6:.3g}M"


def markdown(dataset: str, chosen_on: str, rows: list[Row]) -> str:
    """One data set's table: model, norm, resolution, accuracy and time, in the form of RescaleViT's README."""
    on_test, norms = chosen_on == "test", list(dict.fromkeys((*NORM_TYPES, *(row.run.norm for row in rows))))
    choice = "best on test" if on_test else "test, best on val"
    lines = [["model", *norms, "resolution", "parameters", f"acc(%), {choice}", "time(min)"]]
    for row in rows:
        run, (minutes, _) = row.run, mean_and_spread(run.minutes for run in row.runs)
        best, spread = mean_and_spread(run.best for run in row.runs)
        accuracy = f"{100 * best:.2f}" if run.finished else run.best_so_far
        lines.append([
            row.label.replace("|", "\\|"),
            *("+" if norm == run.norm else "" for norm in norms),
            f"{run.image_size}x{run.image_size}",
            _parameters(run.parameters),
            accuracy if spread is None else f"{accuracy} ± {100 * spread:.2f} (n={len(row.runs)})",
            f"{minutes:.1f}" if run.finished and minutes is not None else "",
        ])  # fmt: skip
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in lines]
    text.insert(1, "|" + "|".join(f":{'-' * w}:" for w in widths) + "|")
    notes = ["\\* from pretrained weights"] if any(row.run.pretrained for row in rows) else []
    notes += ["± sample standard deviation over n seeds"] if any(len(row.runs) > 1 for row in rows) else []
    if on_test:
        notes.append("best on test: the evaluation that scored highest on the test images, so a little optimistic")
    head = dataset if on_test else f"{dataset}, best on val"
    return f"### {head}\n\n" + "\n".join(text) + f"\n\n{'; '.join(notes)}".rstrip() + "\n"


def csv_text(found: dict[tuple[str, str], list[Row]]) -> str:
    """All tables as CSV; accuracies are shares, empty for runs that are not finished."""
    lines = []
    for (dataset, chosen_on), rows in found.items():
        for row in rows:
            run, done = row.run, row.run.finished
            line = dict(
                dataset=dataset, chosen_on=chosen_on, model=run.model, norm=run.norm, pretrained=run.pretrained,
                resolution=run.image_size, parameters=run.parameters, name=run.name, label=row.label,
                state="finished" if done else "incomplete", step=run.steps[-1] if run.steps else 0,
                num_steps=run.num_steps, n=len(row.runs) if done else 0,
                seeds=" ".join(str(run.seed) for run in row.runs),
            )  # fmt: skip
            line["best_so_far"], _ = mean_and_spread(max(run.accuracy, default=None) for run in row.runs)
            for name in ("best", "last", "minutes"):
                line[name], line[f"{name}_sd"] = mean_and_spread(getattr(run, name) for run in row.runs)
            lines.append({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in line.items()})
    file = io.StringIO()
    writer = csv.DictWriter(file, lines[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return file.getvalue()


def scores(files: RunFiles) -> str:
    """What a finished run has reached."""
    end = files.record("end")
    on = "validation " * (end["selected_on"] == "val")
    return f"best {on}accuracy {end['best_accuracy']:f}, last {end['last_accuracy']:f}"


def plan(args: Namespace) -> tuple[str, float | None]:
    """What train.py with these flags would do, in a line; and the minutes that it would take, None where unknown.

    The time is that of a finished run of equal cost, in the same folder.
    """
    if args.validate:
        return f"evaluates {args.load_model_dir} alone", 0.0
    files, now, unit = RunFiles.of(args), settings(args), "num_steps" if args.num_steps else "epochs"
    steps = f"{args.num_steps} steps" if args.num_steps else f"{args.epochs:g} epochs"
    try:
        state = "new" if args.overwrite else files.state
        if not args.overwrite:
            files.check_settings(now, args.extend)
    except UserError as error:
        return f"{steps}; would be refused: {error}", 0.0
    had = files.record("start")["settings"] if state != "new" else {}
    if state == "finished" and not (args.extend and steps_of(now, had) > had["num_steps"]):
        return f"{steps}; finished: {scores(files)}", 0.0
    runs = []
    with contextlib.suppress(UserError):
        runs, _ = read_runs(files.folder)
    own = next((run for run in runs if run.id == files.id and run.steps and state != "new" and files.saved), None)
    goes_on = f"goes on after {own.progress}; " if own else "goes on; " * (state != "new" and files.saved)
    cost = COST if unit == "num_steps" else (*COST, "dataset", "data_dir", "ra")  # whose images are an epoch
    for run in runs:
        if run.finished and run.minutes is not None and all(run.settings.get(k) == now.get(k) for k in cost):
            done = own.steps[-1] / own.num_steps * own.settings[unit] if own else 0
            minutes = run.minutes * (now[unit] - done) / run.settings[unit]
            return f"{steps}; {goes_on}about {minutes:.1f} min, as {run.id} took {run.minutes:.1f}", minutes
    return f"{steps}; {goes_on}time unknown, as {files.folder} holds no finished run of this cost", None


def print_plans(cells: list[tuple[str, Namespace]]) -> None:
    """Say of each command and its flags what it would do; and of several, how long all take."""
    plans = [plan(args) for _, args in cells]
    for (command, _), (text, _) in zip(cells, plans, strict=True):
        print(f"{command}\n  {text}".lstrip("\n"))
    known = [minutes for _, minutes in plans if minutes is not None]
    if len(cells) > 1 and known:
        without = f"; without {len(plans) - len(known)} of unknown time" if len(known) < len(plans) else ""
        print(f"in all about {sum(known):.0f} min, one after another{without}")
