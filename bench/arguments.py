"""Command lines of the measurements."""

import argparse
from typing import NoReturn


class ArgumentParser(argparse.ArgumentParser):
    """As argparse's; a bad argument is one line on stderr and exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see --help\n")
