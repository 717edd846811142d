"""One process, or job of torchrun, at a time writes a run's files. Imports no torch."""

import fcntl
import os
import socket
import sys
from pathlib import Path

from utils.cli import UserError


class RunLock:
    """Holds `.{run_id}.lock`, which names its holder, in the output folder until `with` ends or the process does.

    A record lock: unlike those of flock(2) it is not inherited by the workers that decode images, which may live for
    some seconds longer than a killed process.

    Raises:
        UserError: another process holds it, or the folder cannot be written.
    """

    def __init__(self, output_dir: str, run_id: str):
        self.path = Path(output_dir) / f".{run_id}.lock"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            while True:
                self.file = open(self.path, "a+", encoding="utf-8")
                self._acquire(run_id)
                if self._is_at_path():
                    break
                self.file.close()  # its last holder has just removed it
            self.file.truncate(0)
            self.file.write(f"{socket.gethostname()}, process {os.getpid()}")
            self.file.flush()
        except OSError as error:
            what = "made" if not self.path.parent.is_dir() else "written"
            raise UserError(f"{self.path.parent}: cannot be {what} ({error.strerror})") from None

    def _acquire(self, run_id: str) -> None:
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            self.file.seek(0)
            holder = self.file.read() or "another process"
            raise UserError(
                f"run {run_id} is running already ({holder}); wait for it, or choose another --name"
            ) from None
        except OSError as error:
            print(f"{self.path}: no lock ({error.strerror}), so don't start this run twice at a time", file=sys.stderr)

    def _is_at_path(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self.file.fileno()), os.stat(self.path))
        except FileNotFoundError:
            return False

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *error) -> None:
        try:
            self.path.unlink(missing_ok=True)
        except OSError:  # read-only by now; without a holder it is no obstacle
            pass
        self.file.close()
