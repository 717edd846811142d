"""A run's records: text log, JSON lines, TensorBoard."""

import json
import os
import shutil
import time
from pathlib import Path

from tqdm import tqdm

from utils.options import UserError


class RunLog:
    """Writes `{run_id}.txt`, `{run_id}.jsonl` and `logs/{run_id}/`; on processes other than the first, nothing.

    Args:
        output_dir, log_dir: folders, made where missing.
        run_id: see `utils.options.run_id`.
        enabled: False on all processes but the first.

    Raises:
        UserError: a folder or file cannot be written.
    """

    def __init__(self, output_dir: str, log_dir: str, run_id: str, enabled: bool = True):
        self.enabled = enabled
        self.text, self.json = (Path(output_dir) / f"{run_id}.{suffix}" for suffix in ("txt", "jsonl"))
        self.board_dir, self.board = Path(log_dir) / run_id, None
        if enabled:
            for folder in (self.text.parent, self.board_dir):
                try:
                    folder.mkdir(parents=True, exist_ok=True)
                except OSError as error:
                    raise UserError(f"{folder}: cannot be made ({error.strerror})") from None

    def _append(self, path: Path, text: str) -> None:
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror})") from None

    def info(self, line: str) -> None:
        """A line for people, in the text log and on the screen."""
        if self.enabled:
            self._append(self.text, f"{time.strftime('%m/%d/%Y %H:%M:%S')} - INFO - train - {line}\n")
            tqdm.write(line)

    def record(self, **values) -> None:
        """One JSON object."""
        if self.enabled:
            self._append(self.json, json.dumps(values) + "\n")

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """TensorBoard scalars."""
        if self.board:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)

    def position(self) -> dict[str, int]:
        """Sizes of the files in bytes, for `rewind`."""
        return {path.suffix: path.stat().st_size for path in (self.text, self.json) if path.exists()}

    def rewind(self, position: dict[str, int], step: int) -> None:
        """Forget what was logged after a checkpoint, as those steps will be done again; open TensorBoard."""
        if not self.enabled:
            return
        for path in (self.text, self.json):
            if path.exists():
                os.truncate(path, min(path.stat().st_size, position.get(path.suffix, 0)))
        from torch.utils.tensorboard import SummaryWriter

        self.board = SummaryWriter(str(self.board_dir), purge_step=step + 1)

    def close(self) -> None:
        if self.board:
            self.board.close()


def read_records(path: Path) -> list[dict]:
    """The JSON objects of a `.jsonl`; a last line cut off by a crash is left out."""
    records = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return records


def delete_run(output_dir: str, log_dir: str, run_id: str) -> None:
    """Remove every file of a run."""
    for suffix in (".txt", ".jsonl", "_checkpoint.bin", "_last.bin"):
        (Path(output_dir) / f"{run_id}{suffix}").unlink(missing_ok=True)
    shutil.rmtree(Path(log_dir) / run_id, ignore_errors=True)
