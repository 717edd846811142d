"""Image folders: which files count, of which class, in which split. Imports no torch, so that a flag can ask.

DIR/train/CLASS/**/*.jpg, DIR/val/..., DIR/test/...     val may be valid or validation; any case
DIR/CLASS/**/*.jpg                                      split by `hold_out`
DIR/**/*.jpg and a table file,label[,split]             --labels
"""

import contextlib
import csv
import io
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import lru_cache
from hashlib import sha256
from itertools import filterfalse, islice
from pathlib import Path

from utils.cli import UserError, refuse, refusing

SPLITS = dict(train="train", training="train", val="val", valid="val", validation="val", test="test", testing="test")
NO_FORMATS = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}  # Pillow knows the name alone, or calls another program
NOT_READ = "Not read, as no image for this Pillow"


@lru_cache
def suffixes() -> frozenset[str]:
    """Of all formats that the installed Pillow reads, in lower case; where pillow-heif is installed, HEIC, too."""
    from PIL import Image

    with contextlib.suppress(ImportError):
        from pillow_heif import register_heif_opener

        register_heif_opener()
    Image.init()
    formats = Image.registered_extensions().items()
    return frozenset(suffix for suffix, kind in formats if kind in Image.OPEN and kind not in NO_FORMATS)


def suffix_of(path: str | os.PathLike) -> str:
    return os.path.splitext(path)[1].lower()


def is_image(path: str | os.PathLike) -> bool:
    """Whether the installed Pillow reads it, by its suffix."""
    return suffix_of(path) in suffixes()


def nfc(text: str) -> str:
    """Unicode's composed form: what macOS and others write differently becomes the same."""
    return unicodedata.normalize("NFC", text)


def _visible(folder: str | os.PathLike) -> list[os.DirEntry]:
    with refusing(f"{folder}: cannot be read", "mend that", OSError), os.scandir(folder) as entries:
        return sorted((entry for entry in entries if entry.name[0] != "."), key=lambda entry: nfc(entry.name))


def files_in(folder: str | os.PathLike, above: tuple = ()) -> Iterator[str]:
    """Visible files below a folder, by name. Links are followed, but not back into a folder that holds them."""
    here = Path(folder).resolve()
    above = above or tuple(here.parents)
    for entry in _visible(folder) if here not in above else ():
        if entry.is_dir():
            yield from files_in(entry.path, (*above, here))
        elif entry.is_file() or entry.is_symlink():
            yield entry.path


def choose_dataset(dataset: str | None, data_dir: str | None, labels: str | None) -> str | None:
    """The --dataset that is meant where it isn't given: an image folder, where images lie that are no named set's."""
    if dataset is None and labels:
        return "imagefolder"
    if dataset is None and data_dir:
        with contextlib.suppress(UserError, OSError, RuntimeError):  # not there, or a link to itself
            files = (file for file in islice(files_in(data_dir), 10_000) if "caltech101" not in Path(file).parts)
            return "imagefolder" if any(is_image(file) or suffix_of(file) == ".heic" for file in files) else None
    return dataset


def check_known(where: Path | str, found: Iterable[str], classes: list[str]) -> None:
    known = f"the {len(classes)} known: {', '.join(classes[:10])}"
    for name in found:
        refuse(name not in classes, f"{where}: class {name!r} is not among {known}")


def kinds(files: Iterable[str]) -> str:
    """How many files of each suffix, as '3 .txt, 1 .pdf', the most frequent first."""
    counted = Counter(suffix_of(file) or "without suffix" for file in files)
    heic = "; pip install pillow-heif to read HEIC" if ".heic" in counted else ""
    return ", ".join(f"{n} {suffix}" for suffix, n in counted.most_common()) + heic


def class_folders(folder: Path, leave_out: Iterable[str] = ()) -> tuple[dict[str, list[str]], list[str]]:
    """Images of each class, by its name, of folder/CLASS/**/*.jpg and so on; and other files.

    UserError: none, or an empty class.
    """
    found, skipped = {}, []
    for entry in _visible(folder):
        if entry.is_dir() and entry.name not in leave_out:
            name = nfc(entry.name)
            refuse(not name.isprintable(), f"{entry.path}: the name of a class must be printable text; rename it")
            files = list(files_in(entry.path))
            found.setdefault(name, []).extend(filter(is_image, files))
            others = list(filterfalse(is_image, files))
            skipped += others
            held = f"it holds {kinds(others)}" if others else "it is empty"
            refuse(not found[name], f"{entry.path}: no images in it ({held}); add some, or remove the folder")
    way = f"images belong into {folder}/CLASS/, or --labels FILE.csv names the class of each"
    refuse(not found, f"{folder}: no class folders in it; {way}")
    return dict(sorted(found.items())), skipped


def _split_folders(root: Path) -> tuple[dict[str, Path], list[str]]:
    """Folders that are splits by name, and the names of the others; one that holds images itself is no split."""
    splits, others = {}, []
    for entry in filter(os.DirEntry.is_dir, _visible(root)):
        split, path = SPLITS.get(entry.name.lower()), Path(entry.path)
        inside = _visible(entry.path) if split else []
        if split and (not inside or any(each.is_dir() for each in inside)):
            refuse(split in splits, f"{splits.get(split)} and {path} are both the {split} images; keep one of them")
            splits[split] = path
        else:
            others.append(entry.name)
    return splits, others


def image_folder(root: Path, labels: str | None = None) -> tuple[dict, list[str], list[str]]:
    """Paths and labels of each split that there is, the names of the classes, and lines for the log."""
    refuse(not root.is_dir(), f"--data_dir {root}: no such folder; it holds CLASS/*.jpg, or train/CLASS/, test/CLASS/")
    if labels:
        return _from_table(root, Path(labels))
    splits, unused = _split_folders(root)
    if not splits:
        if len(unused) == 1:
            inner = root / unused[0]
            deeper = sum(entry.is_dir() for entry in _visible(inner)) > 1
            refuse(deeper, f"--data_dir {root}: only one class, {unused[0]}; is --data_dir {inner} meant?")
        meant = [{SPLITS[word] for word in re.split(r"[\W\d_]+", name.lower()) if word in SPLITS} for name in unused]
        way = "name these splits train/ and test/, with CLASS folders in them, or their classes in --labels"
        only_splits = all(meant) and len(set().union(*meant)) > 1
        refuse(only_splits, f"--data_dir {root}: no classes, by their names: {', '.join(unused)}; {way}")
        loose = sum(entry.is_file() and is_image(entry) for entry in _visible(root))
        splits, unused = {"train": root}, [f"{loose} images outside of the class folders"] * bool(loose)
    sets, classes, skipped = {}, [], []
    for split in sorted(splits, key="train val test".split().index):
        found, other = class_folders(splits[split])
        skipped += other
        classes = classes or list(found)
        check_known(splits[split], found, classes)
        paths = [path for images in found.values() for path in images]
        sets[split] = paths, [classes.index(name) for name, images in found.items() for _ in images]
    notes = [f"{NOT_READ}: {kinds(skipped)}"] * bool(skipped) + [f"Not used: {', '.join(unused)}"] * bool(unused)
    return sets, classes, notes


def _from_table(root: Path, table: Path) -> tuple[dict, list[str], list[str]]:
    """The same from a CSV with the columns file (below the root, or the whole path), label and perhaps split."""
    table = table if table.is_file() else root / table
    with refusing(f"--labels {table}: cannot be read", "a CSV in UTF-8 with the columns file,label[,split]"):
        text = table.read_text(encoding="utf-8-sig")
        head = text.partition("\n")[0].strip()
        delimiter = ";" if ";" in head and "," not in head else ","
        read = list(csv.DictReader(io.StringIO(text), delimiter=delimiter))
    long = [",".join(row.values()) for row in read if any(row.pop(None, ())) and any(row.values())]
    what = f"--labels {table}: {len(long)} rows have more cells than {head!r}, as {next(iter(long), '')!r}"
    refuse(long, f"{what}; put what has a {delimiter} in it between quotes")
    rows = [{key.strip().lower(): (value or "").strip() for key, value in row.items() if key} for row in read]
    rows = [row for row in rows if any(row.values())]  # a spreadsheet may end with empty ones
    what = f"no rows of file,label[,split] in UTF-8 below its first line, {head[:80]!r}"
    refuse(not rows or not {"file", "label"} <= rows[0].keys(), f"--labels {table}: {what}")
    wrong = sorted({row["split"] for row in rows if row.get("split") and row["split"].lower() not in SPLITS})
    refuse(wrong, f"--labels {table}: split {next(iter(wrong), '')!r} is none of {' '.join(SPLITS)}")
    for row in rows:
        row["file"] = nfc(os.path.relpath(os.path.join(root, row["file"]), root))  # also of a whole path, or ./a.jpg
        row["label"] = nfc(row["label"])
    there = {nfc(os.path.relpath(path, root)): path for path in files_in(root)}
    for found, what in (
        ([name for name, n in Counter(row["file"] for row in rows).items() if n > 1], "come twice"),
        ([row["file"] for row in rows if not row["label"].isprintable() or not row["label"]], "lack a printable label"),
        ([row["file"] for row in rows if row["file"] not in there], f"are not in {root} (with suffix; / not \\)"),
    ):
        refuse(found, f"--labels {table}: {len(found)} files {what}, as {next(iter(found), '')}")
    classes = sorted({row["label"] for row in rows})
    sets = {}
    for row in sorted(rows, key=lambda row: row["file"]):
        paths, labels = sets.setdefault(SPLITS[(row.get("split") or "train").lower()], ([], []))
        paths.append(there[row["file"]])
        labels.append(classes.index(row["label"]))
    rest = sum(map(is_image, there.values())) - len(rows)
    return sets, classes, [f"Not used: {rest} images that {table} does not name"] * (rest > 0)


def hold_out(names: list[str], labels: list[int], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Places that stay, and that are held out: this part of each class, rounded, but never its last image.

    The seed and an image's name decide which ones, whatever the machine; another image in the folder changes one side
    at most.
    """
    digests = [sha256(f"{seed}\0{name}".encode(errors="surrogateescape")).digest() for name in names]
    by_class = {label: [] for label in labels}
    for i in sorted(range(len(names)), key=digests.__getitem__):
        by_class[labels[i]].append(i)
    held = set()
    for places in by_class.values():
        held.update(places[: min(round(fraction * len(places)), len(places) - 1)])
    return [i for i in range(len(names)) if i not in held], sorted(held)


def refuse_broken(broken: dict[str, str], skip: bool) -> list[str]:
    """Name all images that cannot be read, with the reasons, in a UserError; with `skip` in a line for the log."""
    shown = [f"{path}: {reason}" for path, reason in list(broken.items())[:100]]
    more = f"; and {len(broken) - 100} more" if len(broken) > 100 else ""
    refuse(broken and not skip, f"{'; '.join(shown)}{more}; mend or remove, or --skip_broken leaves out what is broken")
    return [f"Left out, as --skip_broken says: {len(broken)}, {'; '.join(shown[:5])}"] if broken else []
