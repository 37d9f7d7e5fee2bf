import sys

from experiments.commands import main

if __name__ == "__main__":  # processes that are spawned import this module too
    sys.exit(main())
