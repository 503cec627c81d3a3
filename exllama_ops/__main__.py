"""`python -m exllama_ops`: the same as the command `exllama-ops`."""

from __future__ import annotations

import sys

from exllama_ops.cli import main

if __name__ == "__main__":
    sys.exit(main())
