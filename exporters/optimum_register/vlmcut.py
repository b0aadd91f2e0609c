"""`optimum-cli export vlmcut MODEL -o OUT …`: `vlmcut convert` under optimum's command line.

Installed as `optimum/commands/register/vlmcut.py`, where optimum looks for commands.
"""

from __future__ import annotations

import argparse
import sys

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand


class VlmcutExportCommand(BaseOptimumCLICommand):
    """Hands everything after `optimum-cli export vlmcut` to `vlmcut convert`."""

    COMMAND = CommandInfo(name="vlmcut", help="Cut, export and verify a vision-language model (vlmcut convert).")

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("arguments", nargs=argparse.REMAINDER, help="As for `vlmcut convert`: MODEL, then flags.")

    def run(self) -> None:
        from vlmcut.cli import main

        assert self.args is not None
        sys.argv = ["vlmcut", "convert", *self.args.arguments]
        main()


REGISTER_COMMANDS = [(VlmcutExportCommand, ExportCommand)]
