"""README says what is so: its commands run as they stand, its links, flags, names and recipes exist."""

import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from helpers import ROOT

from models import MODELS, create_model
from utils import foreign, options

README = (ROOT / "README.md").read_text(encoding="utf-8")
TEXTS = {path: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))}


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands(script: str, text: str) -> list[list[str]]:
    """The words after `python SCRIPT` in blocks of shell."""
    lines = [line for block in blocks("sh", text) for line in block.replace("\\\n", " ").splitlines()]
    found = [re.search(rf"\b{re.escape(script)} ([^#&|]*)", line) for line in lines]
    return [shlex.split(match[1]) for match in found if match]


def test_it_is_short():
    assert len(README.encode()) <= 12_500


def test_links_lead_somewhere():
    for path, text in TEXTS.items():
        links = re.findall(r"\]\((?!https?:)([^)#]+)", text)
        assert [link for link in links if not (path.parent / link).exists()] == [], path
        for name in re.findall(r"@?\b((?:recipes|examples|benchmarks|utils|models)/[\w/]+\.(?:args|py))", text):
            assert "NAME" in name or (ROOT / name).is_file(), (path, name)


@pytest.mark.parametrize("path", TEXTS, ids=[path.name for path in TEXTS])
def test_commands_are_understood(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "imagenet21k_ViT-B_32.npz").touch()  # which a recipe names
    for words in commands("train.py", TEXTS[path]):
        for flag, value in zip(words, words[1:], strict=False):
            if flag in ("--pretrained_dir", "--load_model_dir"):  # as if it had been downloaded, or trained
                (tmp_path / value).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / value).touch()
        options.parse_train_args(words)
    for words in commands("plot.py", TEXTS[path]):
        options.plot_parser().parse_args(words)


def test_flags_exist():
    parsers = options.train_parser(), options.eval_parser(), options.plot_parser()
    known = {flag for parser in parsers for flag in parser._option_string_actions}
    of_others = {"--nproc_per_node", "--logdir", "--run", "--width", *foreign.ALIASES}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z_\d]+", README)) - known - of_others == set()


def test_tables_name_all_models_and_recipes():
    names = {f"{family}{size}" for family, size in re.findall(r"`(ViT-|R50-ViT-|DEMS-|MViT-)(\w+)`", README)}
    short = set(re.findall(r"`(\w+_\d+)`", README))
    assert {name for name in MODELS if name not in names and name.removeprefix("ViT-") not in short} == set()
    table = README[README.index("## Recipes") : README.index("## Results")]
    for path in (ROOT / "recipes").glob("*.args"):
        parts = re.split(r"(?=_finetune|_pretrained|_384$)", path.stem)
        assert all(f"`{part}" in table for part in parts), path


def test_parameters_are_those_of_the_models():
    table = README[README.index("| `--model_type`") : README.index("Every ViT but")]
    found = {}
    for line in table.strip().splitlines()[2:]:
        kinds, numbers = line.split("|")[1:3]
        names = [name if "-" in name else f"ViT-{name}" for name in re.findall(r"`(.*?)`", kinds)]
        found |= dict(zip(names, numbers.replace(" ", "").split(","), strict=True))
    sides = {name: 32 if name.startswith(("DEMS", "MViT")) else 224 for name in found}
    with torch.device("meta"):
        models = {name: create_model(name, image_size=side, num_classes=10) for name, side in sides.items()}
    assert found == {k: f"{sum(p.numel() for p in m.parameters()) / 1e6:.1f}M" for k, m in models.items()}


def shortened(block: str) -> str:
    """A block of shell without what needs a network or a browser, and with a run of seconds in place of minutes."""
    block = block.replace("pip install -r requirements.txt && ", "")
    block = re.sub(r"^tensorboard .*\n", "", block, flags=re.MULTILINE)
    return block.replace("@recipes/demo.args", "@recipes/demo.args --epochs 1 --warmup_epochs 0.5 --eval_every 50")


@pytest.mark.slow
def test_five_minutes_and_python_as_they_stand(tmp_path, monkeypatch, capsys):
    """In a copy, as everything lands in output/."""
    wanted = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    for name in filter(None, wanted):
        if not name.startswith(("tests/", "benchmarks/", "docs/")) and (ROOT / name).exists():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
    first, second, *_ = blocks("sh")
    env = os.environ | {"PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}

    script = shortened(first) + shortened(second)
    done = subprocess.run(["bash", "-euc", script], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    out = done.stdout
    assert done.returncode == 0, (out, done.stderr)
    assert "Best Accuracy" in out and "output/boot.png" in out and "| ViT-Ti_16" in out

    monkeypatch.chdir(tmp_path)
    first, second, third = blocks("python")
    exec(compile(f"{first}print(tuple(features.shape), tuple(attention.shape))\n{third}", "README.md", "exec"), {})
    out = capsys.readouterr().out
    assert "('" in out and "(1, 17, 96) (1, 4, 4, 17, 17)" in out and "'Ankle boot'" in out
    compile(second, "README.md", "exec")  # it needs Google's weights; see test_weights.py
