"""The kept logs of benchmarks/results are those of their commands, and the tables are made of them."""

import json
import sys

import pytest
from helpers import ROOT, TINY, call, places

from models import MODELS
from utils import options
from utils.run_files import settings

sys.path.insert(0, str(ROOT / "benchmarks"))
import peers  # noqa: E402
import replay  # noqa: E402
import results  # noqa: E402
import speed  # noqa: E402

CELLS = [(group, row, seed) for group, rows in results.GROUPS.items() for row in rows for seed in results.SEEDS]
RUN = [cell for cell in CELLS if results.find(*cell)]


def test_every_kept_log_is_of_a_row():
    kept = {path for group in results.GROUPS for path in (results.KEPT / group).glob("*.jsonl")}
    assert kept == {results.find(*cell) for cell in RUN}
    seeds = {"cifar10_ablation": 2, "race": 1, "equal_lr": 1}  # of the others all three
    missing = [cell for cell in CELLS if cell not in RUN and cell[2] <= seeds.get(cell[0], 3)]
    assert not missing


@pytest.mark.parametrize("group, row, seed", RUN)
def test_every_kept_log_is_a_finished_run_of_its_command(monkeypatch, group, row, seed):
    monkeypatch.chdir(ROOT)
    start, *_, end = results.records(results.find(group, row, seed))
    script, *words = results.command(group, row, seed)
    for name, model in peers.PEERS.items() if script.endswith("peers.py") else ():
        monkeypatch.setitem(MODELS, name, model)
    args = options.parse_train_args(words)
    assert end["event"] == "end" and end["step"] == args.num_steps == start["settings"]["num_steps"]
    known = {name: value for name, value in settings(args).items() if value is not None}
    apart = {"data_dir", "epochs"}  # where the data lay; filled in when it is loaded
    if args.dataset == "cifar10":  # or the same images as a folder
        apart.add("dataset")
        assert start["settings"]["dataset"] in ("cifar10", "imagefolder")
        assert start["images"][0] == (45000 if args.val_fraction else 50000)
    recorded = json.loads(json.dumps(known))
    assert {
        name for name in recorded if name not in apart and start["settings"].get(name, False) != recorded[name]
    } == set()
    assert start["images"][2] == 10000


def test_tables_are_made_of_the_logs(capsys):
    for group in results.GROUPS:
        results.table(group)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    rows = {(group, row.rpartition(", ")[0] if group == "equal_lr" else row) for group, row, _ in RUN}
    assert len(lines) == 2 * len({group for group, _ in rows}) + len(rows)
    files = [path for path in (ROOT / "README.md", ROOT / "docs" / "results.md") if path.is_file()]
    shown = {line for path in files for line in path.read_text(encoding="utf-8").splitlines()}
    assert [line for line in lines if line not in shown] == []


@pytest.mark.parametrize(
    "sizes, parameters",
    [("CCT-2_3x2", "(281,803)"), ("timm-ViT --dim 128 --depth 6 --heads 4 --mlp_dim 512", "(1,203,978)")],
)
def test_models_of_others_train_under_the_same_loop(tmp_path, sizes, parameters):
    words = f"--model_type {sizes} --dataset fashionmnist-mini --img_size 28 --train_batch_size 32 --num_steps 2 --bf16"
    assert parameters in call("benchmarks/peers.py", *words.split(), *places(tmp_path)).stdout


def test_speed_tables_are_made_of_the_figures(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["speed.py"])
    speed.main()
    printed = [line for line in capsys.readouterr().out.splitlines() if line]
    assert all(list(speed.KEPT.glob(f"{name}*.json")) for name in speed.MEASURED)
    shown = set((ROOT / "docs" / "speed.md").read_text(encoding="utf-8").splitlines())
    assert [line for line in printed if line not in shown] == []


@pytest.mark.slow
def test_replay_stops_goes_on_and_shows_both(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(replay, "KEPT", tmp_path / "kept")
    monkeypatch.setattr(replay, "STEPS", (1, 2, 3, 4, 5))
    monkeypatch.setattr(replay, "POLL", 0.05)
    words = [*TINY, "--eval_every", "1", "--num_steps", "500", *places(tmp_path)]
    for steps in ("1", "6", "0"):  # begun, gone on with, shown
        monkeypatch.setattr(sys, "argv", ["replay.py", "--norms", "BN", "--steps", steps, *words])
        replay.main()
    ours = replay.evaluations(tmp_path / "kept" / "BN.jsonl")
    assert 6 <= max(ours) < 500 and sorted(ours) == list(range(1, max(ours) + 1))
    *_, accuracy, loss = capsys.readouterr().out.splitlines()
    assert accuracy.startswith(f"| BN | accuracy | {100 * ours[1]['accuracy']:.2f} / 28.64 |")
    assert loss.startswith(f"| BN | loss | {ours[1]['loss']:.5f} / 1.94267 |")
    text = next((tmp_path / "output").glob("replay_*.txt")).read_text(encoding="utf-8")
    assert "Resuming" in text


def test_replay_table_is_made_of_the_logs(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["replay.py", "--steps", "0"])
    replay.main()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    shown = (ROOT / "docs" / "results.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) > 2 and [line for line in lines if line not in shown] == []


def test_a_mistyped_flag_is_not_taken_for_one_of_train(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["results.py", "--comands", "fast"])
    with pytest.raises(SystemExit):
        results.main()
    assert "--comands fast: flags of train.py go with --run" in capsys.readouterr().err
