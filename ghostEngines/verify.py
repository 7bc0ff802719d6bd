"""Run verification.py: python -m ghostEngines.verify. (In Python `ghostEngines.verify` is the function.)"""

import sys

from .verification import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
