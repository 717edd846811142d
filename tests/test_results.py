"""The kept logs of benchmarks/results are those of their commands, and the tables are made of them."""

import json
import sys

import pytest
from helpers import ROOT, TINY, places

from models import MODELS, NORM_TYPES
from utils import options
from utils.run_files import settings

sys.path.insert(0, str(ROOT / "benchmarks"))
import replay  # noqa: E402
import results  # noqa: E402
import speed  # noqa: E402

CELLS = [(group, row, seed) for group, rows in results.GROUPS.items() for row in rows for seed in results.SEEDS]


@pytest.mark.parametrize("group, row, seed", CELLS)
def test_every_row_is_a_finished_run_of_its_command(monkeypatch, group, row, seed):
    monkeypatch.chdir(ROOT)
    start, *_, end = results.records(results.find(group, row, seed))
    args = options.parse_train_args(MODELS, NORM_TYPES, results.command(group, row, seed)[1:])
    assert end["event"] == "end" and end["step"] == args.num_steps == start["settings"]["num_steps"]
    known = {name: value for name, value in settings(args).items() if value is not None}
    apart = {"data_dir", "epochs"}  # where the data lay; filled in when it is loaded
    recorded = json.loads(json.dumps(known))
    assert {
        name for name in recorded if name not in apart and start["settings"].get(name, False) != recorded[name]
    } == set()
    assert start["images"][2] == 10000


def test_tables_are_made_of_the_logs(capsys):
    for group in results.GROUPS:
        results.table(group)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) == sum(2 + len(rows) for rows in results.GROUPS.values())
    files = [path for path in (ROOT / "README.md", ROOT / "docs" / "results.md") if path.is_file()]
    shown = {line for path in files for line in path.read_text(encoding="utf-8").splitlines()}
    assert [line for line in lines if line not in shown] == []


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
