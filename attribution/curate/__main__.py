import sys

from attribution.curate.command import main
from attribution.options import run_command

sys.exit(run_command("attribution.curate", main, sys.argv[1:]))
