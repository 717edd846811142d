"""Command lines in general: a parser with one-line errors and files of flags, types of numbers, how a script ends."""

import argparse
import contextlib
import difflib
import math
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

MAX_COUNT = 2**31 - 1  # of steps, images and all else that is counted
MAX_REAL = 1e30  # of any other number


class UserError(ValueError):
    """A mistake of the user: one line on stderr, exit status 2.

    With `on_this_process`, of several processes only this one has met it, so it prints the line, whichever it is.
    """

    def __init__(self, message: str, *, on_this_process: bool = False):
        super().__init__(message)
        self.on_this_process = on_this_process


def refuse(wrong, reason: str) -> None:
    """A UserError where something is wrong."""
    if wrong:
        raise UserError(reason)


@contextlib.contextmanager
def refusing(what: str, way_out: str, *kinds: type[Exception]):
    """Errors within, of these kinds or of any, become a UserError: 'WHAT (the reason); WAY OUT'."""
    try:
        yield
    except UserError:
        raise
    except kinds or (Exception,) as error:  # noqa: B030
        reason = getattr(error, "strerror", None) or (str(error).strip() or type(error).__name__).splitlines()[0]
        reason = f"lacks {reason}" if isinstance(error, KeyError) else reason
        raise UserError(f"{what} ({reason}); {way_out}") from None


def one_line(text: str) -> str:
    """Text that stays on its line and controls no terminal, whatever names of files it repeats."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


class Help(argparse.RawDescriptionHelpFormatter):
    """Ends the help of a flag with its default, unless the text says that itself in brackets, or it is off."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        off = default is None or default is False or default == argparse.SUPPRESS
        if not action.option_strings or off or text.endswith("]"):
            return text
        shown = " ".join(map(str, default)) if isinstance(default, list) else f"{default}".removesuffix(".0")
        return f"{text} [{shown.replace('%', '%%')}]".lstrip()


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, which suggests the nearest flag and reads `@recipe` files with comments."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=Help, fromfile_prefix_chars="@", **kwargs)

    def convert_arg_line_to_args(self, line: str) -> list[str]:
        words = shlex.split(line.removeprefix("\ufeff"), comments=True)  # as Windows' editors begin a file
        return [f"@{os.path.expanduser(word[1:])}" if word.startswith("@~") else word for word in words]

    def add_aliases(self, aliases: dict[str, str]) -> None:
        """Names that flags have in other projects; they work, and --help leaves them out."""
        for alias, name in aliases.items():
            self._option_string_actions[alias] = self._option_string_actions[name]

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {one_line(message)}\n")

    def parse_args(self, argv: list[str] | None = None, check: Callable = lambda args: None) -> argparse.Namespace:
        """As argparse's; `check(args)` refuses what doesn't go together, by a UserError."""
        argv = sys.argv[1:] if argv is None else argv
        if lone := [word for word in argv if any("\ud800" <= char <= "\udfff" for char in word)]:
            self.error(f"{lone[0]}: is not UTF-8; rename it")
        argv = [f"@{os.path.expanduser(word[1:])}" if word.startswith("@~") else word for word in argv]
        recipes = [Path(word[1:]) for word in argv if word.startswith("@")]
        for path in recipes:
            if not path.is_file():
                near = ", ".join(sorted(map(str, path.parent.glob("*.args"))))
                self.error(f"recipe {path}: no such file" + (f"; there are {near}" if near else ""))
        try:
            args, unknown = self.parse_known_args(argv)
        except (ValueError, RecursionError) as error:  # no text, an unclosed quote, or a recipe that includes itself
            self.error(f"recipe {' '.join(map(str, recipes))}: holds no flags as on the command line ({error})")
        if unknown:
            flag = unknown[0].split("=")[0]
            near = difflib.get_close_matches(flag, self._option_string_actions, n=1)
            where = "".join(f" in {path}" for path in recipes if flag not in argv and flag in path.read_text())
            hint = f"; did you mean {near[0]}?" if near else f"; see {self.prog} --help"
            self.error(f"unknown argument {unknown[0]!r}{where}{hint}")
        for name, value in vars(args).items():  # the shell leaves ~ alone in --flag=~/folder
            if isinstance(value, str):
                setattr(args, name, os.path.expanduser(value))
            elif isinstance(value, list) and value and isinstance(value[0], str):
                setattr(args, name, list(map(os.path.expanduser, value)))
        try:
            check(args)
        except UserError as error:
            self.error(str(error))
        return args


class Replaces(argparse.Action):
    """Store a value and clear another flag's (`const`), of which the last given counts: --epochs and --num_steps."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, values)
        setattr(namespace, self.const, None)


def bounded(kind: type, low: float | None = None, high: float | None = None, open_low: bool = False):
    """A type for argparse: a number of `kind` within [low, high], or (low, high] when `open_low`."""

    def parse(text: str):
        value = kind(text)
        if math.isinf(value):
            raise argparse.ArgumentTypeError(f"{text} is not finite")
        if value != value or (low is not None and (value < low or open_low and value == low)):
            raise argparse.ArgumentTypeError(f"{text} is not {'above' if open_low else 'at least'} {low}")
        if high is not None and value > high:
            raise argparse.ArgumentTypeError(f"{text} is above {high}")
        return value

    parse.__name__ = kind.__name__
    return parse


positive_int = bounded(int, 1, MAX_COUNT)
count = bounded(int, 0, MAX_COUNT)
real = bounded(float, -MAX_REAL, MAX_REAL)
positive = bounded(float, 0, MAX_REAL, open_low=True)
non_negative = bounded(float, 0, MAX_REAL)
fraction = bounded(float, 0, 1)
rate = bounded(float, 0, 0.999)
below_one = bounded(float, 0, math.nextafter(1, 0))


def boolean(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise argparse.ArgumentTypeError(f"{text} is neither true nor false")
    return text.lower() in ("true", "1", "yes")


def world_size() -> int:
    """The number of processes, from torchrun's environment; 1 without one. UserError where that is not whole."""
    world = os.environ.get("WORLD_SIZE", "1")
    if world == "1":
        return 1
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        value = os.environ.get(name, "")
        if not (value if name == "MASTER_ADDR" else value.isdecimal() and int(value) >= (name == "WORLD_SIZE")):
            raise UserError(f"WORLD_SIZE {world!r} with {name} {value!r}: start with torchrun, or unset WORLD_SIZE")
    return int(world)


def run_main(main: Callable, args, explain: Callable = lambda error: None, at_end: Callable = lambda: None) -> None:
    """Call `main(args)` and leave with the status it returns; a UserError becomes one line and status 2.

    `explain` turns an error that is no mistake of the code, such as a lack of memory, into a UserError; `at_end` is
    called in any case. Every process of a node would print the same line, so only the first one does, if it isn't one's
    alone.
    """
    sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal's encoding lacks stops nothing
    try:
        status = main(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    except BrokenPipeError:  # the reader has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141
    except Exception as error:
        mistake = error if isinstance(error, UserError) else explain(error)
        if mistake is None:
            raise
        if mistake.on_this_process or os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"{Path(sys.argv[0]).name}: error: {one_line(str(mistake))}", file=sys.stderr)
        status = 2
    finally:
        at_end()
    sys.exit(status)
