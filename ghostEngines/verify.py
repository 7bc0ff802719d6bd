"""python -m ghostEngines.verify: see verification.py. (`ghostEngines.verify` itself is the function.)"""

import sys

from .verification import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
