"""Command lines in general: a parser with one-line errors and files of flags, types of numbers, how a script ends."""

import argparse
import contextlib
import difflib
import math
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from utils import foreign

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


def plain(name: str) -> str:
    """A name without what people spell in various ways: case, hyphens, underscores."""
    return re.sub(r"[-_ ]", "", name).lower()


def nearest(word: str, names: Iterable[str]) -> str | None:
    """The name that `word` is most probably a misspelling of, if there is one."""
    word, by_plain = plain(word), {plain(name): name for name in names}
    found = difflib.get_close_matches(word, by_plain, n=1, cutoff=0.75)
    found += [name for name in by_plain if sorted(name) == sorted(word)]  # letters swapped in a short word
    found += [name for name in by_plain if len(word) > 3 and name.startswith(word)]
    return by_plain[found[0]] if found else None


def choice(names: Iterable[str], also: dict[str, str] | None = None) -> Callable[[str], str]:
    """A type for argparse: one of `names`, in any case and with any hyphens, or a key of `also` that stands for one."""

    def parse(text: str) -> str:
        known = {plain(name): name for name in names} | {plain(word): name for word, name in (also or {}).items()}
        if plain(text) in known:
            return known[plain(text)]
        near = nearest(text, names)
        hint = f"did you mean {near}?" if near else f"choose from {', '.join(names)}"
        raise argparse.ArgumentTypeError(f"invalid choice: {text!r}; {hint}")

    return parse


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
    """argparse with one-line errors, the nearest flag, `@recipe` files with comments, and words of other projects."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=Help, fromfile_prefix_chars="@", **kwargs)
        self.register("type", None, os.path.expanduser)  # of plain words; a shell leaves ~ alone in --flag=~/folder

    def _read_args_from_files(self, words: list[str]) -> list[str]:
        """Words with those of its file in the place of each `@recipe`; they may name recipes, too."""
        read = []
        for word in words:
            if not word.startswith("@"):
                read.append(word)
                continue
            path = Path(os.path.expanduser(word[1:]))
            if not path.is_file():
                near = ", ".join(sorted(map(str, path.parent.glob("*.args"))))
                self.error(f"recipe {path}: no such file" + (f"; there are {near}" if near else ""))
            try:
                for line in path.read_text(encoding="utf-8-sig").splitlines():
                    line = re.sub(r"""("[^"]*"|'[^']*')|(?<!\S)#.*""", r"\1", line)  # without comment; a#b is a word
                    read += self._read_args_from_files(shlex.split(line))
            except (ValueError, RecursionError) as error:  # no text, an open quote, or a recipe in itself
                self.error(f"recipe {path}: holds no flags as on the command line ({error})")
        return read

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {one_line(message)}\n")

    def parse_args(self, argv: list[str] | None = None, check: Callable = lambda args: None) -> argparse.Namespace:
        """As argparse's; `check(args)` refuses what doesn't go together, by a UserError."""
        argv = sys.argv[1:] if argv is None else argv
        if lone := [word for word in argv if any("\ud800" <= char <= "\udfff" for char in word)]:
            self.error(f"{lone[0]}: is not UTF-8; rename it")
        words = self._read_args_from_files(argv)
        known = self._option_string_actions
        words, said, _, by_recipe = foreign.translate(self.prog, words, known)
        line = foreign.translate(self.prog, argv, known)[2]
        groups = [(flag, raw[0].partition("=")[0]) for flag, _, raw in foreign.split(words)]
        unknown = [typed for flag, typed in groups if flag.startswith("--") and flag not in known]
        if unknown:
            self.error(self._unknown(unknown, said, argv))
        for action in self._actions:
            if action.choices and not action.type:
                action.type = choice(action.choices)
        args, others = self.parse_known_args(words) if words or not said else (None, [])
        if others:
            self.error(self._unknown(others[:1], said, argv))
        if said:
            self.error(f"{', '.join(said)}; type: {line}")
        try:
            check(args)
        except UserError as error:
            self.error(str(error))
        if by_recipe and os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"{self.prog}: only the model is named; its authors' training: {line}", file=sys.stderr)
        return args

    def _unknown(self, words: list[str], said: list[str], argv: list[str]) -> str:
        """One message for all words that are no flags, each with the nearest flag where one is near."""
        visible = {flag for flag, action in self._option_string_actions.items() if action.help != argparse.SUPPRESS}
        names = {name: name for name in visible} | {k: v for k, v in foreign.ALIASES.items() if v in visible}
        recipes = [Path(os.path.expanduser(word[1:])) for word in argv if word.startswith("@")]
        parts = []
        for word in dict.fromkeys(words):
            where = "".join(f" in {path}" for path in recipes if word not in argv and word in path.read_text())
            near = nearest(word, names)
            parts.append(f"{word!r}{where}" + (f" (did you mean {names[near]}?)" if near else ""))
        hint = "" if any("did you mean" in part for part in parts) else f"; see {self.prog} --help"
        return f"unknown argument{'s' * (len(parts) > 1)} {', '.join([*parts, *said])}{hint}"


class Replaces(argparse.Action):
    """Store a value and clear what says the same (`const`, names of flags): the last given counts, as of --epochs and
    --num_steps.
    """

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, values)
        for other in self.const.split():
            setattr(namespace, other, None)


class Precision(argparse.Action):
    """--fp16, --bf16 or --no_amp: the last one given counts."""

    def __init__(self, default=False, **kwargs):
        super().__init__(nargs=0, default=default, **kwargs)

    def __call__(self, parser, namespace, values, option_string=None):
        namespace.fp16, namespace.bf16 = self.dest == "fp16", self.dest == "bf16"


def bounded(kind: type, low: float, high: float, open_low: bool = False):
    """A type for argparse: a number of `kind` within [low, high], or (low, high] when `open_low`."""

    def parse(text: str):
        value = kind(text)
        if not (low < value if open_low else low <= value):  # nan is neither
            raise argparse.ArgumentTypeError(f"{text} is not {'above' if open_low else 'at least'} {low}")
        if value > high:
            raise argparse.ArgumentTypeError(f"{text} is above {high}")
        return value

    parse.__name__ = kind.__name__
    return parse


positive_int = bounded(int, 1, MAX_COUNT)
count = bounded(int, 0, MAX_COUNT)
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
    alone = world != "1" and "LOCAL_RANK" not in os.environ
    refuse(alone, f"WORLD_SIZE {world} without LOCAL_RANK: start with torchrun, or unset WORLD_SIZE")
    return int(world)


def say(text: str) -> None:
    """Tell somebody at a terminal what takes a while; a file that stderr goes to is spared that."""
    if sys.stderr.isatty() and os.environ.get("LOCAL_RANK", "0") == "0":
        print(one_line(text), file=sys.stderr, flush=True)


def say_loading() -> None:
    """Say that PyTorch is loaded, which takes seconds. Ctrl-C ends at once: Python's import may lose an exception."""
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # as it is in the background of a script
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    say("Loading PyTorch ...")


def run_main(main: Callable, args, explain: Callable = lambda error: None, at_end: Callable = lambda: None) -> None:
    """Call `main(args)` and leave with the status it returns; a UserError becomes one line and status 2.

    `explain` turns an error that is no mistake of the code, such as a lack of memory, into a UserError; `at_end` is
    called in any case. Every process of a node would print the same line, so only the first one does, if it isn't one's
    alone.
    """
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal's encoding lacks stops nothing
    try:
        status = main(args)
    except KeyboardInterrupt:
        print("Stopped by Ctrl-C", file=sys.stderr)
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
