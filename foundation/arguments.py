"""A command line in which a flag's value may begin with a dash."""

import argparse
import os
from collections.abc import Iterator, Sequence


class ArgumentParser(argparse.ArgumentParser):
    """An argparse parser that takes what follows a flag for its value, as in `--text -O2`.

    Only a flag of this parser is no value: after `--text --steps 3:4` the text is missing.
    """

    def parse_args(self, args: Sequence[str]) -> argparse.Namespace:  # type: ignore[override]
        return super().parse_args(list(self._joined(args)))

    def _joined(self, args: Sequence[str]) -> Iterator[str]:
        """Yield `--text=-O2` for `--text -O2`, which argparse understands."""
        flags = self._option_string_actions
        rest = iter(args)
        for argument in rest:
            flag, equals, value = argument.partition("=")
            if argument == "--":
                yield from (argument, *rest)
            elif flag in flags and flags[flag].nargs is None:
                yield self._with_value(flag, value if equals else next(rest, None), given=bool(equals))
            elif flag not in flags and argument.startswith("-") and os.path.exists(argument):
                self.error(f"{argument}: is no flag; if that file or folder is meant, give ./{argument}")
            else:
                yield argument

    def _with_value(self, flag: str, value: str | None, *, given: bool) -> str:
        """Return flag=value. given: the command line has it in this form, so it is no other flag."""
        if value is None:
            return flag
        if value == "--":  # argparse drops it before Python 3.13
            self.error(f"argument {flag}: cannot be '--'")
        if not given and value.partition("=")[0] in self._option_string_actions:
            self.error(
                f"argument {flag}: expected one argument; if {value} is meant as that, give {flag}={value}"
            )
        return f"{flag}={value}"
