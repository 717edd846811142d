"""A user's own folder of images: which files count, how they are split, what is kept of large ones."""

import signal
import sys
import types
import unicodedata

import numpy as np
import pytest
import torch
from helpers import ID, TINY, places, run, write_folder
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from utils import datasets
from utils.augment import Augment
from utils.cli import UserError
from utils.data_utils import PART, eval_batches
from utils.datasets import load_data
from utils.image_folder import choose_dataset, hold_out, suffixes
from utils.image_sources import TURNS, Files, Ragged, as_rgb, read_image

HALF = ([0.5] * 3, [0.5] * 3)


def picture(path, size=(20, 20), colour=(200, 100, 50)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def names(part) -> list[str]:
    return ["/".join(part.paths[i].split("/")[-2:]) for i in part.ids.tolist()]


def said(data, text: str) -> str:
    (line,) = [note for note in data.notes if text in note]
    return line


# ---------------------------------------------------------------- splits


def write_classes(root, **classes: int) -> None:
    for name, n in classes.items():
        for i in range(n):
            picture(root / name / f"{i}.png")


def test_bare_class_folders_are_split_by_class(tmp_path):
    write_classes(tmp_path, cat=20, dog=12, eel=1)
    data = load_data("imagefolder", tmp_path, val_fraction=0.25)
    counts = [part.labels.bincount(minlength=3).tolist() for part in (data.train, data.valid, data.test)]
    assert counts == [[12, 8, 1], [4, 2, 0], [4, 2, 0]]
    assert said(data, "Images a class") == "Images a class, train/val/test: cat 12/4/4, dog 8/2/2, eel 1/0/0"
    assert "0.2 of each class are for testing (--test_fraction of train.py; " in said(data, "No test images")
    everything = names(data.train) + names(data.valid) + names(data.test)
    assert len(set(everything)) == 33
    scored = load_data("imagefolder", tmp_path, val_fraction=0.25, train=False)
    assert names(scored.test) == names(data.test) and scored.train is None
    assert names(load_data("imagefolder", tmp_path).test) == names(data.test)
    assert names(load_data("imagefolder", tmp_path, seed=1).test) != names(data.test)
    picture(tmp_path / "cat" / "new.png")  # of a class of 21 still 4 are held out: one may change its side
    assert len(set(names(load_data("imagefolder", tmp_path).test)) & set(names(data.test))) >= 5


def test_the_split_is_the_same_on_every_machine():
    """Held by its outcome: no order of folders, clock, or hash of this process decides."""
    files = [f"cat/{i}.jpg" for i in range(10)]
    assert hold_out(files, [0] * 10, 0.3, 42)[1] == [0, 1, 3]
    assert hold_out(files[::-1], [0] * 10, 0.3, 42)[1] == [6, 8, 9]
    assert len(hold_out(["cat/\udcff.jpg", "cat/1.jpg"], [0, 0], 0.5, 42)[1]) == 1  # a name that is no UTF-8


@pytest.mark.parametrize("split, words", [("test", {}), ("val", dict(val_fraction=0.2))])
@pytest.mark.parametrize("height", [20, 21])  # all images of one size, or not
def test_copies_on_both_sides_are_named(tmp_path, split, words, height):
    """A photo that lies in the folder twice, under two names, must not be learnt and tested."""
    for i in range(12):
        picture(tmp_path / "cat" / f"{i}.png", colour=(i, 0, 0))
        picture(tmp_path / "dog" / f"{i}.png", (20, height), colour=(i, 9, 0))
    clean = load_data("imagefolder", tmp_path, **words)
    assert not any("are copies of" in note for note in clean.notes)
    held = dict(test=clean.test, val=clean.valid)[split]
    (tested, *_), (learnt, *_) = ([part.paths[i] for i in part.ids.tolist()] for part in (held, clean.train))
    Image.open(learnt).save(tested, optimize=True)  # the same pixels in another file
    n = len(held)
    expected = f"1 of {n} images that are held out are copies of training images, as {tested} of {learnt}, which"
    assert expected in said(load_data("imagefolder", tmp_path, **words), "are copies of")


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.floats(0, 0.99), st.integers(0, 5))
def test_hold_out_takes_a_share_of_each_class_and_leaves_one(labels, fraction, seed):
    stays, held = hold_out([str(i) for i in range(len(labels))], labels, fraction, seed)
    assert sorted(stays + held) == list(range(len(labels)))
    for label in set(labels):
        n = labels.count(label)
        out = sum(labels[i] == label for i in held)
        assert out < n and abs(out - fraction * n) <= (0.5 if out < n - 1 else 1 + fraction)


@pytest.mark.parametrize(
    "folders, chosen, sizes",
    [
        ("train/ test/", "test", (4, 4, 4)),
        ("Train/ VALID/", "test", (4, 4, 4)),
        ("train/ validation/ Test/", "val", (4, 4, 4)),
        ("training/", "test", (4, 2, 2)),
    ],
)
def test_names_of_split_folders(tmp_path, folders, chosen, sizes):
    for folder in folders.split():
        write_classes(tmp_path / folder, cat=2, dog=2)
    data = load_data("imagefolder", tmp_path, test_fraction=0.5 if folders == "training/" else None)
    found = len(data.train), len(data.valid), len(data.test)
    assert (data.selected_on, found) == (chosen, sizes if folders != "training/" else (2, 2, 2))
    assert (data.valid is data.test) == (chosen == "test")
    if chosen == "val":
        assert "validation" in data.valid.paths[0] and "Test" in data.test.paths[0]


def test_val_and_test_folders_with_the_recipe_for_photos(tmp_path):
    """Its --val_fraction is for folders without val/."""
    write_classes(tmp_path / "train", cat=10, dog=10)
    for split in ("val", "test"):
        write_classes(tmp_path / split, cat=2, dog=2)
    data = load_data("imagefolder", tmp_path, val_fraction=0.1)
    assert (len(data.train), len(data.valid), len(data.test)) == (20, 4, 4) and data.selected_on == "val"
    assert said(data, "--val_fraction") == "There are validation images, so --val_fraction 0.1 holds out no others"
    assert "val_fraction" not in "".join(load_data("imagefolder", tmp_path).notes)


def test_a_val_folder_that_is_tested_on_is_decoded_once(tmp_path):
    for split in ("train", "val"):
        write_classes(tmp_path / split, cat=2, dog=2)
    tested = names(load_data("imagefolder", tmp_path).test)
    scored = load_data("imagefolder", tmp_path, train=False)
    assert names(scored.test) == tested and scored.valid is scored.test
    assert sorted(path.name for path in tmp_path.glob("*.npz")) == ["train.cache.npz", "val.cache.npz"]


def test_a_part_that_is_scored_is_said(tmp_path):
    """Also where a run's own fraction decides it."""
    write_classes(tmp_path, cat=10, dog=10)
    scored = load_data("imagefolder", tmp_path, train=False, classes=["cat", "dog"], test_fraction=0.5)
    assert len(scored.test) == 10 and "so 0.5 of each class are for testing" in said(scored, "No test images")


def test_val_folder_and_a_fraction_for_testing(tmp_path):
    write_classes(tmp_path / "train", cat=10, dog=10)
    write_classes(tmp_path / "val", cat=2, dog=2)
    data = load_data("imagefolder", tmp_path, test_fraction=0.2)
    assert (len(data.train), len(data.valid), len(data.test)) == (16, 4, 4) and data.selected_on == "val"


def test_a_class_may_be_named_train(tmp_path):
    write_classes(tmp_path, bus=5, train=5, car=5, **{"test tube": 5})
    assert load_data("imagefolder", tmp_path).classes == ["bus", "car", "test tube", "train"]


@pytest.mark.parametrize(
    "first, second", [("seg_train/seg_train", "seg_test"), ("training_set", "test_set"), ("", "test")]
)
def test_splits_of_other_names_are_no_classes(tmp_path, first, second):
    """As data sets of others have them; taken for classes, the score would say nothing."""
    write_classes(tmp_path / first, **(dict(cat=5, dog=5) if first else {"train": 5}))
    write_classes(tmp_path, **{second: 5})
    with pytest.raises(UserError, match="name these splits train/ and test/, with CLASS folders in them"):
        load_data("imagefolder", tmp_path)


def test_flat_test_images_without_classes_are_not_used(tmp_path):
    write_classes(tmp_path / "train", cat=5, dog=5)
    picture(tmp_path / "test" / "1.png")
    data = load_data("imagefolder", tmp_path)
    assert len(data.test) == 2 and said(data, "Not used") == "Not used: test"


def test_layouts_without_a_way_through(tmp_path):
    def message(root, **words) -> str:
        with pytest.raises(UserError) as error:
            load_data("imagefolder", root, **words)
        return str(error.value)

    write_classes(tmp_path / "a" / "photos", cat=2, dog=2)
    assert f"is --data_dir {tmp_path}/a/photos meant?" in message(tmp_path / "a")
    picture(tmp_path / "b" / "1.png")
    assert "no class folders in it" in message(tmp_path / "b") and "--labels FILE.csv" in message(tmp_path / "b")
    write_classes(tmp_path / "c", cat=2, dog=2)
    write_classes(tmp_path / "c" / "test", cat=2, dog=2)
    assert "has no train/; put CLASS folders into one, beside test/" in message(tmp_path / "c")
    for name in ("val", "Valid", "train"):
        write_classes(tmp_path / "d" / name, cat=2, dog=2)
    assert "are both the val images" in message(tmp_path / "d")
    write_classes(tmp_path / "e", cat=2)
    (tmp_path / "e" / "dog").mkdir()
    (tmp_path / "e" / "dog" / "1.heic").touch()
    assert "dog: no images in it (it holds 1 .heic; pip install pillow-heif to read HEIC)" in message(tmp_path / "e")
    write_classes(tmp_path / "f" / "train", cat=2, dog=2)
    write_classes(tmp_path / "f" / "test", cat=2, dog=2)
    assert "has test images already" in message(tmp_path / "f", test_fraction=0.5)
    (tmp_path / "g").mkdir()
    assert f"no class folders in it; images belong into {tmp_path}/g/CLASS/" in message(tmp_path / "g")


@pytest.mark.parametrize(
    "text, above",
    [
        ("file,label,split\n{rows}", ""),
        ("\ufeffFile;Label;Split\r\n{rows};;\r\n;;\r\n;;;;\r\n", "./"),
        ("file,label,split\n{rows}\n\n", "{root}/"),
    ],
)
def test_labels_from_a_table(tmp_path, text, above):
    """Also with a spreadsheet's empty rows, and other ways to name a file."""
    root = tmp_path / "flat"
    rows = []
    for i in range(12):
        picture(root / f"deep{i % 2}" / f"{i}.png")
        rows.append((f"deep{i % 2}/{i}.png", "cat" if i % 3 else "dog", ["train", "test", ""][i % 3 if i > 8 else 0]))
    picture(root / "unnamed.png")
    joiner, end = (";", "\r\n") if "\r\n" in text else (",", "\n")
    lines = end.join(above.format(root=root) + joiner.join(row) for row in rows)
    (root / "labels.csv").write_text(text.format(rows=lines), encoding="utf-8")
    data = load_data("imagefolder", root, labels="labels.csv")
    assert data.classes == ["cat", "dog"] and (len(data.train), len(data.test)) == (11, 1)
    assert names(data.test) == ["deep0/10.png"] and "1 images that" in said(data, "Not used")
    labels = {name: label for name, label, _ in rows}
    for name, label in zip(names(data.train), data.train.labels.tolist(), strict=True):
        assert data.classes[label] == labels[name]


@pytest.mark.parametrize(
    "text, error",
    [
        ("name,kind\na.png,x\n", "no rows of file,label.* below its first line, 'name,kind'"),
        ("file\tlabel\na.png\tx\n", r"below its first line, 'file\\tlabel'"),
        ("file,label\na.png,big, red\n", "1 rows have more cells than 'file,label', as 'a.png,big'; put what has a ,"),
        ("file;label\na.png;x;y\n", "1 rows have more cells than 'file;label', as 'a.png,x'; put what has a ;"),
        ("file,label\na,x\n", "1 files are not in .* .with suffix; / not .*, as a"),
        ("file,label\nb.png,x\n", "1 files are not in .*, as b.png"),
        ("file,label\na.png,x\na.png,y\n", "1 files come twice, as a.png"),
        ("file,label,split\na.png,x,holdout\n", "split 'holdout' is none of train"),
        ("file,label\na.png,\n", "1 files lack a printable label, as a.png"),
        ('file,label\na.png,"x\ny"\n', "1 files lack a printable label, as a.png"),
        ("file,label\nb\u2028c.png,x\n", "1 files are not in .*, as b\u2028c.png"),
        ("", "no rows of file,label"),
    ],
)
def test_a_table_with_mistakes(tmp_path, text, error):
    picture(tmp_path / "a.png")
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(UserError, match=error):
        load_data("imagefolder", tmp_path, labels=str(tmp_path / "t.csv"))


def test_data_dir_alone_means_an_image_folder_where_it_holds_images(tmp_path):
    assert choose_dataset(None, str(tmp_path), None) is None and choose_dataset(None, None, None) is None
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "notes.txt").touch()
    assert choose_dataset(None, str(tmp_path), None) is None
    picture(tmp_path / "caltech101" / "101_ObjectCategories" / "ant" / "1.png")  # downloaded
    assert choose_dataset(None, str(tmp_path), None) is None
    picture(tmp_path / "train" / "cat" / "2025" / "1.png")
    assert choose_dataset(None, str(tmp_path), None) == "imagefolder"
    assert choose_dataset("cifar10", str(tmp_path), None) == "cifar10"
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert choose_dataset(None, str(tmp_path / "loop"), None) is None


# ---------------------------------------------------------------- files


def test_which_files_count(tmp_path):
    """Hidden ones never; links are, once around a loop; other suffixes are counted; formats are Pillow's."""
    write_classes(tmp_path / "photos", cat=3, dog=3)
    cat = tmp_path / "photos" / "cat"
    for hidden in (".DS_Store", "._0.png", ".ipynb_checkpoints/0-checkpoint.png", ".cache/x/y.png"):
        picture(cat / hidden) if hidden.endswith("png") else (cat / hidden).touch()
    (tmp_path / "photos" / ".git").mkdir()
    for other in ("a.txt", "b.txt", "c.mp4", "README", "d.eps"):
        (cat / other).touch()
    for kind in ("jp2", "tga", "webp", "JPG", "ppm", "ico"):
        picture(cat / f"format.{kind}", size=(32, 32))
    picture(tmp_path / "elsewhere" / "linked.png")
    (cat / "link").symlink_to(tmp_path / "elsewhere")
    (cat / "loop").symlink_to(tmp_path / "photos")
    (cat / "link" / "again").symlink_to(cat)
    data = load_data("imagefolder", tmp_path / "photos", test_fraction=0.4)
    found = sorted(name for name in names(data.train) + names(data.test) if name.startswith(("cat/", "link/")))
    formats = [f"cat/format.{kind}" for kind in ("JPG", "ico", "jp2", "ppm", "tga", "webp")]
    assert set(found) >= {"cat/0.png", "cat/1.png", "cat/2.png", *formats, "link/linked.png"}
    assert not any("/." in name for name in found)
    assert said(data, "Not read").endswith(": 2 .txt, 1 without suffix, 1 .mp4, 1 .eps")
    assert len(data.train) + len(data.test) == 3 + 3 + 6 + 1  # the loop brings no dog among the cats


def test_names_of_classes_are_compared_composed(tmp_path):
    composed, apart = (unicodedata.normalize(form, "Café") for form in ("NFC", "NFD"))
    assert composed != apart
    write_classes(tmp_path / "train", **{composed: 2, "dog": 2})
    write_classes(tmp_path / "test", **{apart: 2, "dog": 2})
    data = load_data("imagefolder", tmp_path)
    assert data.classes == [composed, "dog"] and data.test.labels.tolist() == [0, 0, 1, 1]
    assert load_data("imagefolder", tmp_path, train=False, classes=["dog", apart]).test.labels.tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize("memory_limit", [1.0, 0.0])
@pytest.mark.parametrize("when", ["first", "cached", "no cache"])
def test_all_broken_images_are_named_at_once_or_skipped(tmp_path, memory_limit, when):
    write_classes(tmp_path / "train", cat=6, dog=6)
    write_classes(tmp_path / "test", cat=3, dog=3)
    broken, cache_dirs = ["train/cat/0.png", "train/dog/5.png", "test/dog/1.png"], () if when == "no cache" else (None,)
    for i, name in enumerate(broken):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes([b"", b"no image", whole[: len(whole) // 2]][i])
    for _ in range(1 + (when == "cached")):
        with pytest.raises(UserError) as error:
            load_data("imagefolder", tmp_path, memory_limit=memory_limit, cache_dirs=cache_dirs)
    assert all(f"{tmp_path}/{name}: not a readable image" in str(error.value) for name in broken)
    assert "; mend or remove, or --skip_broken leaves out what is broken" in str(error.value)
    data = load_data("imagefolder", tmp_path, memory_limit=memory_limit, skip_broken=True, cache_dirs=cache_dirs)
    assert len(data.train) == 10 and len(data.test) == 5 and "--skip_broken says: 3" in said(data, "Left out")
    assert "cat/0.png" not in names(data.train) and "dog/1.png" not in names(data.test)
    seen = [
        images for images, _ in eval_batches(data.train, Augment(20, *HALF), batch_size=4, device=torch.device("cpu"))
    ]
    assert torch.equal(torch.cat(seen), seen[0][:1].expand(10, -1, -1, -1))
    for path in (tmp_path / "test").rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(UserError, match="none of the test images can be read"):
        load_data("imagefolder", tmp_path, memory_limit=memory_limit, skip_broken=True, cache_dirs=cache_dirs)


@pytest.mark.parametrize("memory_limit", [1.0, 0.0])
def test_what_was_broken_is_tried_again(tmp_path, memory_limit, monkeypatch):
    """Neither the right to read a file nor a network drive's fault shows in its size and date."""
    write_classes(tmp_path / "train", cat=3, dog=3)
    write_classes(tmp_path / "test", cat=2, dog=2)
    words, whole = dict(memory_limit=memory_limit, skip_broken=True), Image.open
    with monkeypatch.context() as fault:
        fault.setattr(Image, "open", lambda f: whole(f"{f.name}/none" if f.name.endswith("train/dog/1.png") else f))
        assert all(len(load_data("imagefolder", tmp_path, **words).train) == 5 for _ in range(2))
    data = load_data("imagefolder", tmp_path, **words)
    assert len(data.train) == 6 and "Left out" not in "".join(data.notes)


@pytest.mark.parametrize("mode, kind", [("I", "tif"), ("F", "tif"), ("I", "im")])
def test_pixels_of_32_bits_are_refused(tmp_path, mode, kind):
    values = np.arange(400, dtype=np.int32 if mode == "I" else np.float32).reshape(20, 20)
    Image.fromarray(values).save(tmp_path / f"a.{kind}")
    with pytest.raises(UserError, match="pixels of 32 bits, which have no agreed range; convert them to 8 or 16 bits"):
        read_image(tmp_path / f"a.{kind}")


@pytest.mark.parametrize("kind", ["png", "tif", "pgm"])
def test_gray_of_16_bits_is_scaled(tmp_path, kind):
    Image.fromarray((np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)).save(tmp_path / f"a.{kind}")
    assert np.asarray(read_image(tmp_path / f"a.{kind}"))[:, :, 0].flatten().tolist() == list(range(256))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "I;16"])
def test_lying_tiff_is_read_as_it_lies(tmp_path, mode):
    """Pillow turns it, but maps uncompressed ones of some modes into memory at the wrong width."""
    values = np.random.default_rng(0).integers(0, 256, (30, 40), dtype=np.uint16 if mode == "I;16" else np.uint8)
    stored = Image.fromarray(values * 257 if mode == "I;16" else values)
    stored = stored if mode in ("L", "I;16") else stored.convert(mode)
    exif = Image.Exif()
    exif[0x0112] = 6
    write_classes(tmp_path, cat=5, dog=5)
    stored.save(tmp_path / "cat" / "0.tif", exif=exif)
    turned = np.asarray(read_image(tmp_path / "cat" / "0.tif"))[:, :, 0]
    assert np.array_equal(turned, np.asarray(as_rgb(stored))[::-1, :, 0].T)
    load_data("imagefolder", tmp_path)


@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("memory_limit", [1.0, 0.0])
def test_photos_are_turned_upright(tmp_path, kind, memory_limit):
    """Stored lying or mirrored, with EXIF's orientation, as by phones; in memory, streamed, and as PIL images."""
    upright = np.zeros((96, 64, 3), np.uint8)
    upright[:24, :, 0], upright[:, :16, 1] = 250, 250  # red above, green on the left: no symmetry
    for number in range(1, 9):
        stored = Image.fromarray(upright)
        if number > 1:  # the inverse of the turn: itself but for quarters
            stored = stored.transpose({6: TURNS[8], 8: TURNS[6]}.get(number, TURNS.get(number)))
        exif = Image.Exif()
        exif[0x0112] = number
        path = tmp_path / str(number % 2) / f"{number}.{kind}"
        path.parent.mkdir(exist_ok=True)
        stored.save(path, exif=exif, **{} if kind in ("png", "tif") else dict(quality=100))
        assert np.abs(np.asarray(read_image(path)).astype(int) - upright).mean() < 8, number
        small = np.asarray(read_image(path, 32)).astype(int)
        assert small.shape == (48, 32, 3) and np.abs(small - upright[::2, ::2]).mean() < 12, number
        again = as_rgb(read_image(path))
        assert np.array_equal(np.asarray(again), np.asarray(read_image(path))), number
        with Image.open(path) as opened:
            assert np.array_equal(np.asarray(as_rgb(opened)), np.asarray(read_image(path))), number
    data = load_data("imagefolder", tmp_path, memory_limit=memory_limit, short_side=32)
    assert data.train.sizes.tolist() == [[48, 32]] * 6
    augment = Augment(32, *HALF)
    for images, _ in eval_batches(data.train, augment, batch_size=8, device=torch.device("cpu")):
        top, left, rest = images[:, :, 2, 20:], images[:, :, 20:, 2], images[:, :, 16:, 16:]
        assert (top[:, 0] > 0.8).all() and (left[:, 1] > 0.8).all() and (rest < -0.8).all()


def test_heic_is_read_where_pillow_heif_is_installed(tmp_path, monkeypatch):
    """That package adds its format to Pillow's; this one says that .heic is PNG."""
    write_classes(tmp_path, cat=5, dog=5)
    for path in [*tmp_path.glob("*/*.png")]:
        path.rename(path.with_suffix(".HEIC"))
    assert choose_dataset(None, str(tmp_path), None) == "imagefolder"  # where the package is missing, too
    package = types.SimpleNamespace(register_heif_opener=lambda: monkeypatch.setitem(Image.EXTENSION, ".heic", "PNG"))
    monkeypatch.setitem(sys.modules, "pillow_heif", package)
    suffixes.cache_clear()
    try:
        assert len(load_data("imagefolder", tmp_path).train) == 8
    finally:
        suffixes.cache_clear()


def test_orientation_that_is_none_is_left_alone(tmp_path):
    """A number that EXIF does not have, EXIF that is none, and one behind a PNG's pixels, which Pillow reads last."""
    flat = Image.new("RGB", (6, 4), (9, 9, 9))
    exif = Image.Exif()
    exif[0x0112] = 9
    flat.save(tmp_path / "nine.jpg", exif=exif)
    flat.save(tmp_path / "broken.jpg", exif=b"Exif\0\0nothing of the kind")
    exif[0x0112] = 6
    flat.save(tmp_path / "late.png", exif=exif)
    whole = (tmp_path / "late.png").read_bytes()
    start = whole.index(b"eXIf") - 4
    chunk = whole[start : start + 12 + int.from_bytes(whole[start : start + 4], "big")]
    end = whole.index(b"IEND") - 4
    (tmp_path / "late.png").write_bytes(whole[:start] + whole[start + len(chunk) : end] + chunk + whole[end:])
    for name in ("nine.jpg", "broken.jpg", "late.png"):
        assert read_image(tmp_path / name).size == (6, 4)
        assert as_rgb(read_image(tmp_path / name)).size == (6, 4)


# ---------------------------------------------------------------- large images


def test_large_images_are_kept_as_large_as_crops_need(tmp_path):
    write_folder(tmp_path, sizes=[(900, 600), (300, 2400), (50, 60)], per_class=3)
    data = load_data("imagefolder", tmp_path, short_side=100)
    sizes = data.train.sizes.tolist()
    assert sizes[:3] == [[150, 100], [100, 800], [50, 60]] and data.train.source.pixels.numel() < 6 * 3 * 100 * 900
    assert "60x50 to 2400x300 pixels, kept at a short side of 100" in said(data, "Images, train")
    streamed = load_data("imagefolder", tmp_path, short_side=100, memory_limit=0)
    assert isinstance(streamed.train.source, Files) and "streamed, as 0.6 MB are more than" in said(
        streamed, "Images, train"
    )
    augment = Augment(30, *HALF)
    both = [
        next(eval_batches(part.train, augment, batch_size=6, device=torch.device("cpu")))[0]
        for part in (data, streamed)
    ]
    assert (both[0] - both[1]).abs().max() < 0.06  # those of 4 x 30 pixels or more are reduced once more


@pytest.mark.parametrize("size", [(32, 400), (400, 32), (32, 60)])
def test_the_centre_of_a_long_image_is_as_sharp_when_streamed(tmp_path, size):
    """Of the long side, too, only the short one's part is left out in resizing."""
    rows, columns = np.mgrid[: size[0], : size[1]]
    pixels = np.rint(127.5 + 60 * np.sin(columns) + 60 * np.cos(rows)).astype(np.uint8)
    for name in ("a", "b"):
        (tmp_path / "test" / name).mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / "test" / name / "1.png")
    augment, images = Augment(28, *HALF, crop_pct=0.875), []
    for limit in (1.0, 0.0):
        data = load_data("imagefolder", tmp_path, train=False, memory_limit=limit, short_side=32).test
        images += [x for x, _ in eval_batches(data, augment, batch_size=2, device=torch.device("cpu"))]
    assert isinstance(data.source, Files) and torch.allclose(*images, atol=1e-5)


def test_a_batch_of_many_sizes_takes_no_more_than_its_part(monkeypatch):
    """One wide and one tall image among small ones: padded, all would take 16 GB."""
    shapes = [(20, 20)] * 30 + [(60, 30_000), (30_000, 60)] + [(20, 20)] * 30
    sizes = torch.tensor(shapes)
    pixels = torch.arange(int(3 * sizes.prod(dim=1).sum()), dtype=torch.int64).remainder(251).to(torch.uint8)
    source, taken = Ragged(pixels, sizes), []
    take = Ragged.take
    monkeypatch.setattr(Ragged, "take", lambda self, ids: taken.append(batch := take(self, ids)) or batch)
    data = datasets.ImageSet(source, torch.arange(62), torch.zeros(62, dtype=torch.int64))
    ((images, _),) = eval_batches(data, Augment(16, *HALF), batch_size=62, device=torch.device("cpu"))
    assert images.shape == (62, 3, 16, 16) and sum(map(len, taken)) == 62
    assert len(taken) < 6 and max(batch.nbytes for batch in taken) < PART
    alone = torch.cat([x for x, _ in eval_batches(data, Augment(16, *HALF), batch_size=1, device=torch.device("cpu"))])
    assert torch.allclose(images, alone, atol=1e-5)


def test_where_the_cache_lies(tmp_path):
    write_folder(tmp_path / "photos", sizes=[(20, 30), (40, 28)])
    data = load_data("imagefolder", tmp_path / "photos")
    assert f"cache {tmp_path}/photos/train.cache.npz" in said(data, "Images, train")
    (tmp_path / "photos" / "train.cache.npz").unlink()
    data = load_data("imagefolder", tmp_path / "photos", cache_dirs=[tmp_path / "cache"])
    (path,) = (tmp_path / "cache").glob("photos-????????.train.cache.npz")
    assert f"cache {path}" in said(data, "Images, train")
    assert not (tmp_path / "photos" / "train.cache.npz").exists()
    before = path.stat().st_mtime_ns
    load_data("imagefolder", tmp_path / "photos", cache_dirs=[tmp_path / "cache"])
    assert path.stat().st_mtime_ns == before
    data = load_data("imagefolder", tmp_path / "photos", cache_dirs=[])
    assert said(data, "Images, train").endswith("; no cache")


@pytest.mark.parametrize("memory_limit", [1.0, 0.0])
def test_a_link_to_nothing_beside_cached_images(tmp_path, memory_limit):
    """The cache of the others isn't taken for one of all, whose labels would then be those of their neighbours."""
    write_classes(tmp_path, cat=5, dog=5)
    load_data("imagefolder", tmp_path, memory_limit=memory_limit)
    (tmp_path / "cat" / "00.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(UserError, match="cat/00.png: not a readable image .No such file"):
        load_data("imagefolder", tmp_path, memory_limit=memory_limit)
    data = load_data("imagefolder", tmp_path, memory_limit=memory_limit, skip_broken=True)
    assert len(data.train) + len(data.test) == 10 and len(data.train.source.sizes) == 11


@pytest.mark.parametrize("memory_limit", [1.0, 0.0])
def test_an_image_that_is_replaced_while_its_folder_is_read(tmp_path, memory_limit, monkeypatch):
    """As by a program that brings photos up to date; a larger one would have covered its neighbour."""
    write_classes(tmp_path, cat=5, dog=5)

    def late(path, *more):
        if path.endswith("dog/0.png"):
            picture(tmp_path / "dog" / "0.png", (30, 30))
        return read_image(path, *more)

    monkeypatch.setattr("utils.image_sources.read_image", late)
    with pytest.raises(UserError, match="dog/0.png: not of the size that it had before; mend or remove"):
        load_data("imagefolder", tmp_path, memory_limit=memory_limit)
    assert len(load_data("imagefolder", tmp_path, memory_limit=memory_limit).train) == 8


def test_ctrl_c_while_the_cache_is_written_leaves_nothing(tmp_path, monkeypatch):
    write_classes(tmp_path, cat=3, dog=3)
    monkeypatch.setattr(np, "savez", lambda file, **arrays: file.write(b"half") and signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        load_data("imagefolder", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cat", "dog"]


def test_the_data_is_shown_before_the_first_step(tmp_path):
    write_classes(tmp_path / "photos", cat=10, dog=6)
    words = ["--name", "run", *TINY, "--data_dir", tmp_path / "photos", "--train_batch_size", 4, "--num_steps", 1]
    words = [word for word in words if word not in ("--dataset", "fashionmnist-mini")]
    done = run("train.py", *words, *places(tmp_path))
    before = done.stdout[: done.stdout.index("Global Steps")]
    assert "Images a class, train/test: cat 8/2, dog 5/1" in before and "No test images, so 0.2" in before
    assert "/3)" in run("eval.py", tmp_path / "output" / f"{ID}_checkpoint.bin").stdout


def test_of_many_classes_the_largest_and_smallest_are_shown(tmp_path):
    write_classes(tmp_path, **{f"c{i:02}": i for i in range(3, 30)})
    line = said(load_data("imagefolder", tmp_path), "Images a class")
    assert "c29 23/6, c28 22/6" in line and line.endswith("c04 3/1, c03 2/1") and "..., " in line and "c15" not in line
