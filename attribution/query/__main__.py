import sys

from attribution.options import run_command
from attribution.query.command import main

sys.exit(run_command("attribution.query", main, sys.argv[1:]))
