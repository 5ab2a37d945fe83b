"""Command lines as the studies' own scripts take them, on top of absl flags.

Beside absl's spelling every binary accepts `--max-questions` for `--max_questions` and, for list flags,
`--packs none cocaine_10` for `--packs=none,cocaine_10`. A word that belongs to no flag is an error; absl by itself
would stop there and drop the rest of the line in silence. A binary can say that some flags are `positional`: their
values may stand as words of their own, without the flag's name.
"""

import dataclasses
import difflib
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, flags, logging

# `-3`, `-.5` and `-inf` are values; `-h` and `--packs` are flags; `-` and `- text` are values.
_FLAG = re.compile(r"--?(?!(?:inf|nan)\b)[A-Za-z_]")
_READ_BY_ABSL_ITSELF = ("flagfile", "undefok")


def run(main: Callable[[list[str]], Any], argv: Sequence[str] | None = None, positional: Sequence[str] = ()) -> None:
    """`absl.app.run(main)` with the command line read as `normalize` describes; exits with status 1 on a bad one."""

    def parse(words: Sequence[str]) -> list[str]:
        return _parse(words, positional)

    app.run(main, argv=None if argv is None else list(argv), flags_parser=parse)


def filled(settings: type) -> Any:
    """A settings dataclass whose fields hold the values of the flags of the same names."""
    return settings(**{field.name: flags.FLAGS[field.name].value for field in dataclasses.fields(settings)})


def numbers(name: str, texts: Sequence[str]) -> tuple[float, ...]:
    """The values of a list flag as numbers. Raises ValueError, which names the flag, for a text that is none."""
    try:
        return tuple(float(text) for text in texts)
    except ValueError as error:
        raise ValueError(f"{name}={','.join(texts)!r}, wanted numbers") from error


def normalize(
    argv: Sequence[str], flag_values: flags.FlagValues = flags.FLAGS, positional: Sequence[str] = ()
) -> list[str]:
    """Rewrites a command line into absl's spelling, one word a flag: `--name=value`, `--name` or `--noname`.

    argv: as in `sys.argv`, the program's name first. Only list flags (comma- or space-separated) take several words;
    every other flag takes one, and a boolean flag takes none. A value that looks like a flag needs the `--name=value`
    form. The words that belong to no flag are the values of the flags `positional`, in that order, where these are not
    given by name.

    Raises absl.flags.UnrecognizedFlagError for an unknown flag, absl.flags.Error for a missing value or a spare word.
    """
    program, words = argv[0], list(argv[1:])
    out, previous, at = [program], "", 0
    unnamed = list(positional)
    while at < len(words):
        word = words[at]
        at += 1
        if not _FLAG.match(word):
            if not unnamed:
                raise flags.Error(_leftover(word, previous, flag_values))
            out.append(f"--{unnamed.pop(0)}={word}")
            continue
        spelled, equals, value = word.lstrip("-").partition("=")
        name = _resolve(spelled, flag_values)
        previous = name
        if name in unnamed:
            unnamed.remove(name)
        if equals:
            out.append(f"--{name}={value}")
        elif name not in _READ_BY_ABSL_ITSELF and (name not in flag_values or flag_values[name].boolean):
            out.append(f"--{name}")
        else:
            values = []
            limit = len(words) if _is_list(name, flag_values) else at + 1
            while at < min(limit, len(words)) and not _FLAG.match(words[at]):
                values.append(words[at])
                at += 1
            if not values:
                seen = f"; got {words[at]!r}" if at < len(words) else ""
                raise flags.Error(f"flag --{name} needs a value{seen} (a value like that is written --{name}=VALUE)")
            out.append(f"--{name}={_join(name, values, flag_values)}")
    return out


def _parse(argv: Sequence[str], positional: Sequence[str]) -> list[str]:
    try:
        rest = app.parse_flags_with_usage(normalize(argv, positional=positional))
    except flags.Error as error:
        sys.exit(f"FATAL Flags parsing error: {error}\nPass --helpshort or --helpfull to see help on flags.")
    # Results are printed; INFO is where libraries tell of every backend and file they tried. `app.run` turns a default
    # into INFO, so it has to be a setting.
    if flags.FLAGS["verbosity"].using_default_value:
        flags.FLAGS.verbosity = logging.WARNING  # type: ignore[assignment]
    return rest


def _resolve(spelled: str, flag_values: flags.FlagValues) -> str:
    """The registered name of a flag as spelled, or `no` + the name of a boolean flag that is switched off."""
    underscored = spelled.replace("-", "_")
    for name in (spelled, underscored):
        if name in flag_values or name in _READ_BY_ABSL_ITSELF:
            return name
    if underscored.startswith("no"):
        positive = underscored[2:] if underscored[2:] in flag_values else underscored[2:].removeprefix("_")
        if positive in flag_values and flag_values[positive].boolean:
            return f"no{positive}"
    raise flags.UnrecognizedFlagError(spelled, suggestions=difflib.get_close_matches(underscored, list(flag_values)))


def _is_list(name: str, flag_values: flags.FlagValues) -> bool:
    return name in flag_values and isinstance(flag_values[name].parser, flags.BaseListParser)


def _join(name: str, values: list[str], flag_values: flags.FlagValues) -> str:
    if not _is_list(name, flag_values):
        return values[0]
    if isinstance(flag_values[name].parser, flags.WhitespaceSeparatedListParser):
        return " ".join(values)
    # `none, cocaine_10` comes in as `none,` and `cocaine_10`.
    return ",".join(value.strip(",") for value in values if value != ",")


def _leftover(word: str, previous: str, flag_values: flags.FlagValues) -> str:
    message = f"argument {word!r} belongs to no flag"
    if not previous:
        return message
    if _is_list(previous, flag_values):
        hint = f"write the list as --{previous} A B or as --{previous}=A,B"
    elif previous in flag_values and flag_values[previous].boolean:
        hint = f"--{previous} takes no word after it; write --{previous}=true or --no{previous}"
    else:
        hint = f"--{previous} takes one value; quote a value that has spaces"
    return f"{message}: {hint}"
