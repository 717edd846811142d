"""Command lines in general: a parser with one-line errors and files of flags, types of numbers, how a script ends."""

import argparse
import difflib
import math
import os
import shlex
import sys
from pathlib import Path

RECIPE_LENGTH = 2**16  # characters of a file of flags
MAX_COUNT = 2**31 - 1  # of steps, images and all else that is counted
MAX_REAL = 1e30  # of any other number


class UserError(ValueError):
    """A mistake of the user: one line on stderr, exit status 2.

    Attributes:
        alone: of several processes only this one has met it, so the line is its to print, whichever it is.
    """

    def __init__(self, message: str, *, alone: bool = False):
        super().__init__(message)
        self.alone = alone


def one_line(text: str) -> str:
    """Text that stays on its line and controls no terminal, whatever names of files it repeats."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, which suggests the nearest flag and reads `@recipe` files with comments."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {one_line(message)}\n")

    def parse_args(self, argv: list[str] | None = None) -> argparse.Namespace:
        argv, origin = self._expand(sys.argv[1:] if argv is None else argv)
        args, unknown = self.parse_known_args(argv)
        if unknown:
            flag = unknown[0].split("=")[0]
            near = difflib.get_close_matches(flag, self._option_string_actions, n=1)
            where = f" in {origin[unknown[0]]}" if unknown[0] in origin else ""
            hint = f"; did you mean {near[0]}?" if near else f"; see {self.prog} --help"
            self.error(f"unknown argument {unknown[0]!r}{where}{hint}")
        return args

    def _expand(self, argv: list[str]) -> tuple[list[str], dict[str, str]]:
        """Put the words of each `@file` in its place; `#` starts a comment there. Also where each word came from."""
        words, origin = [], {}
        for word in argv:
            if any("\ud800" <= char <= "\udfff" for char in word):  # what Python makes of bytes that are not UTF-8
                self.error(f"{word}: is not UTF-8; rename it")
            if not word.startswith("@"):
                words.append(word)
                continue
            try:
                with open(word[1:], encoding="utf-8") as file:
                    text = file.read(RECIPE_LENGTH + 1)
                if len(text) > RECIPE_LENGTH:
                    raise ValueError(f"longer than {RECIPE_LENGTH} characters, so not a file of flags")
                found = shlex.split(text, comments=True)
            except OSError as error:
                near = ", ".join(sorted(str(path) for path in Path(word[1:]).parent.glob("*.args")))
                self.error(f"recipe {word[1:]}: {error.strerror}" + (f"; there are {near}" if near else ""))
            except UnicodeDecodeError:
                self.error(f"recipe {word[1:]}: is not a text file; it holds flags as on the command line")
            except ValueError as error:  # an unclosed quote, or too long
                self.error(f"recipe {word[1:]}: {error}")
            if nested := [each for each in found if each.startswith("@")]:
                self.error(
                    f"recipe {word[1:]}: {nested[0]} would include another recipe; name both on the command line"
                )
            words += found
            origin.update(dict.fromkeys(found, word[1:]))
        return words, origin


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


def boolean(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise argparse.ArgumentTypeError(f"{text} is neither true nor false")
    return text.lower() in ("true", "1", "yes")


def run_main(main, args: argparse.Namespace, at_end=None) -> None:
    """Call a script's main and leave with its status; a UserError becomes one line and status 2.

    Every process of a node would print the same line, so only the first one does, if it isn't one's alone.

    Args:
        main: called with `args`, returns the exit status.
        at_end: called in any case before leaving.
    """
    sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal's encoding lacks stops nothing
    try:
        status = main(args)
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0" or error.alone:
            print(f"{Path(sys.argv[0]).name}: error: {one_line(str(error))}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    except BrokenPipeError:  # the reader has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141
    finally:
        if at_end:
            at_end()
    sys.exit(status)
