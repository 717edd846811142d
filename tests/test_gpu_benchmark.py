"""benchmarks/gpu.py at toy size on a CPU: every part has a figure; what is broken is told and stops nothing else."""

import json
import sys
from functools import partial

import pytest
import torch
from helpers import ROOT, call
from torch import nn

from models import MODELS

sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu  # noqa: E402

CPU = torch.device("cpu")


class Wrong(nn.Module):
    """A model that computes something else in float32 than in float64, or in training nothing at all."""

    def __init__(self, image_size: int, num_classes: int, patch_size: int, error: float = 0.0, **sizes):
        super().__init__()
        self.image_size, self.error = (image_size, image_size), error
        self.head = nn.Linear(3, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.error:
            raise RuntimeError("no kernel image is available")
        return self.head(x.mean(dim=(2, 3))) * (1 if x.dtype == torch.float64 else 1 + self.error)


@pytest.fixture
def wrong_models(monkeypatch):
    row = dict(cls=Wrong, patch_size=16)
    rows = {"crashes": row, "errs": row | dict(error=1e-3), "precise": row | dict(error=1e-9)}
    monkeypatch.setattr(gpu, "MODELS", {"ViT-Ti_16": MODELS["ViT-Ti_16"], "DEMS-Ti": MODELS["DEMS-Ti"], **rows})
    for name, each in rows.items():
        monkeypatch.setitem(MODELS, name, each)


def test_wrong_models_are_told(wrong_models):
    rows = list(gpu.in_float64(CPU, toy=True))
    assert {next(iter(row.values())): row["ok"] for row in rows if not row["ok"]} == {"crashes": False, "errs": False}
    assert len(rows) == 5 + 6  # other norms, stems


def test_a_wrong_gradient_sum_is_told(monkeypatch):
    """A loss summed over the images of a pass, where half the images make half the loss."""
    import train

    loss_of = train.loss_of
    summed = lambda logits, labels, **words: loss_of(logits, labels, **words) * len(logits) / 64  # noqa: E731
    monkeypatch.setattr(train, "loss_of", summed)
    row = next(gpu.training(CPU, toy=True))
    assert not row["ok"], row


def test_batches_that_a_stream_spoils_are_told(monkeypatch):
    """The first one after a run begins or goes on: in one place without, in two with an interruption."""

    def spoil(batches, device):
        for i, (images, labels) in enumerate(batches):
            yield images + 0.1 * (i == 0), labels

    monkeypatch.setattr(gpu.data_utils, "_ahead", spoil)
    assert [row["ok"] for row in gpu.repeating(CPU, toy=True)] == [True, False, False]


def run(tmp_path, capsys, *words) -> tuple[int, dict, str]:
    """main() with results and files in tmp_path; its status, the results, and what it printed."""
    path = tmp_path / "gpu.json"
    status = gpu.main(["--smoke", "--device", "cpu", "--json", str(path), "--runs", str(tmp_path / "runs"), *words])
    return status, json.loads(path.read_text()) if path.exists() else {}, capsys.readouterr().out


def test_what_fails_is_recorded_and_the_rest_goes_on(tmp_path, capsys, monkeypatch):
    broken = tmp_path / "broken.py"  # in the place of the children
    broken.write_text(
        "import json, sys\n"
        "name, path = (sys.argv[sys.argv.index(flag) + 1] for flag in ('--child', '--json'))\n"
        "rows = [dict(check=name, ok=name != 'training')]\n"
        "open(path, 'w').write(json.dumps(rows))\n"
        "sys.exit('illegal memory access' if name == 'published' else 0)\n"
    )
    monkeypatch.setattr(gpu, "SELF", [sys.executable, str(broken)])
    words = ["--only", "correctness", "accuracy", "--recipes", "demo", "missing"]
    status, kept, out = run(tmp_path, capsys, *words)
    assert status == 1
    states = {name: item["state"] for name, item in kept.items()}
    assert {name for name, state in states.items() if state == "failed"} == {"published", "training", "missing, seed 1"}
    assert states.keys() == {*gpu.CHILDREN} - {"ways", "cell"} | {"demo, seed 1", "missing, seed 1"}
    assert {*states.values()} == {"failed", "done"}
    assert "- published: failed; illegal memory access" in out and "missing.args" in out
    assert "Not right: published; training" in out

    before = kept
    status, kept, _ = run(tmp_path, capsys, *words)
    assert status == 1 and kept == before  # there was nothing to do
    assert kept["published"]["rows"]
    broken.write_text(
        broken.read_text().replace("rows = ", "sys.exit('at once' if name == 'in_float64' else 0)\nrows = ")
    )
    status, kept, _ = run(tmp_path, capsys, "--only", "correctness", "--again")
    assert status == 1 and {each["state"] for each in kept.values() if each["part"] == "correctness"} == {"failed"}
    assert not any(each["rows"] for each in kept.values() if each["part"] == "correctness")  # none from before
    broken.write_text(broken.read_text().replace("sys.exit('at once' if name == 'in_float64' else 0)\n", ""))
    broken.write_text(broken.read_text().replace("'training'", "''").replace("'published'", "''"))
    status, kept, _ = run(tmp_path, capsys, "--only", "correctness", "--again")
    assert status == 0 and kept["published"]["state"] == "done"


WAITS = """
import signal, sys
from pathlib import Path
signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
path = Path(sys.argv[1])
with path.open("a") as file:
    file.write("x")
while path.stat().st_size < 3:
    signal.pause()
"""
HANGS = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True: signal.pause()"


def test_what_is_cut_off_goes_on(tmp_path, capsys, monkeypatch):
    """An item that ends the third time, and one that hangs and hears nothing, in commands that have 0.6 seconds."""
    read = lambda path, name: [{"times": (path / name).stat().st_size}]  # noqa: E731
    monkeypatch.setattr(gpu, "GRACE", 0.4)

    def plan(args):
        items = []
        for part, name, code in (("accuracy", "slow", WAITS), ("ways", "hangs", HANGS)):
            command = [sys.executable, "-c", code, tmp_path / name]
            items.append(gpu.Item(part, name, 0.15, command, tmp_path, partial(read, name=name)))
        return items

    monkeypatch.setattr(gpu, "plan", plan)
    reached, seconds = [0], [0]
    while reached[-1] < 3 and len(reached) < 50:  # on a busy machine a time may end before Python is up
        status, kept, out = run(tmp_path, capsys, "--slice", str(1 / 60))
        reached.append(sum(row["times"] for row in kept["slow"]["rows"]) or reached[-1])
        seconds.append(kept["slow"]["seconds"])
        assert (reached[-1] == 3) != ("Not done yet: slow" in out) and status == 0
    assert {*reached} == {0, 1, 2, 3} and reached == sorted(reached)
    assert kept["slow"]["state"] == "done" and seconds == sorted({*seconds})
    run(tmp_path, capsys)
    *_, out = run(tmp_path, capsys)
    assert "- hangs: failed; not done after 0.6 s" in out


def test_no_time_no_work(tmp_path, capsys):
    status, kept, out = run(tmp_path, capsys, "--minutes", "0.01")
    assert (status, kept) == (0, {}) and "Not done yet: published; in_float64" in out


def test_needs_a_gpu_or_smoke(capsys):
    with pytest.raises(SystemExit, match="2"):
        gpu.main([])
    assert "torch sees no GPU here; --smoke" in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(SystemExit, match="2"):
        gpu.main(["--markdown", "--json", "missing.json"])
    assert "missing.json: no results yet" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_smoke(tmp_path, capsys):
    status, kept, out = run(tmp_path, capsys)
    assert status == 0, out
    assert {item["state"] for item in kept.values()} == {"done"}, out
    parts = {part: [row for item in kept.values() if item["part"] == part for row in item["rows"]] for part in gpu.ENDS}
    assert {part: len(rows) for part, rows in parts.items() if part != "correctness"} == dict(
        throughput=2, ways=2, cell=3, accuracy=1
    )
    checks = [next(iter(row.values())) for row in parts["correctness"]]
    assert {*MODELS} <= {*checks} and sum("_reference" in check for check in checks) == 11
    for part in ("with and without a stream", "resumed", "2 x 32", "--fp16", "--compile"):
        assert any(part in check for check in checks)
    numbers = [row[name] for part in ("ways", "cell", "accuracy") for row in parts[part] for name in [*row][-1:]]
    numbers += [
        float(row[name].split()[0].replace(",", ""))
        for row in parts["throughput"]
        for name in ("training, images/s", "timm", "peak, TFLOP/s")
    ]
    assert all(number > 0 for number in numbers), numbers
    assert gpu.main(["--markdown", "--json", str(tmp_path / "gpu.json")]) == 0
    assert capsys.readouterr().out.strip() in out


@pytest.mark.slow
def test_published_outputs_are_those_of_the_device(tmp_path):
    """A device without numbers gives none of them."""
    call("benchmarks/gpu.py", "--child", "published", "--device", "meta", "--json", tmp_path / "rows.json")
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(rows) == 11 and not any(row["ok"] for row in rows)
