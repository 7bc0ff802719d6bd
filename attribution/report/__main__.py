import sys

from attribution.options import run_command
from attribution.report.command import main

sys.exit(run_command("attribution.report", main, sys.argv[1:]))
