"""python -m ddpm_fast VERB: the same as the console script ddpm-fast."""

from __future__ import annotations

import sys

from ddpm_fast.cli.verbs import main

if __name__ == "__main__":
    sys.exit(main())
