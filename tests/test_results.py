"""The kept logs of benchmarks/results are those of the commands that README gives."""

import json
import sys

import pytest
from helpers import ROOT

from models import MODELS, NORM_TYPES, model_sizes
from utils import options

sys.path.insert(0, str(ROOT / "benchmarks"))
import results  # noqa: E402

CELLS = [(group, row, seed) for group, rows in results.GROUPS.items() for row in rows for seed in results.SEEDS]


@pytest.mark.parametrize("group, row, seed", CELLS)
def test_every_row_is_a_finished_run_of_its_command(monkeypatch, group, row, seed):
    monkeypatch.chdir(ROOT)
    start, *_, end = results.records(results.find(group, row, seed))
    args = options.parse_train_args(results.command(group, row, seed)[1:], MODELS, NORM_TYPES, model_sizes)
    assert end["event"] == "end" and end["step"] == args.num_steps == start["settings"]["num_steps"]
    known = {name: value for name, value in options.settings(args).items() if value is not None}
    apart = {"data_dir", "epochs"}  # where the data lay; filled in when it is loaded
    recorded = json.loads(json.dumps(known))
    assert {name for name in recorded if name not in apart and start["settings"].get(name) != recorded[name]} == set()
    assert start["images"][2] == 10000


def test_tables_are_made_of_the_logs(capsys):
    for group in results.GROUPS:
        results.table(group)
    shown = capsys.readouterr().out
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for line in shown.splitlines():
        if line.startswith("|"):
            assert line in readme
