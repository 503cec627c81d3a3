"""`python -m exllama_ops`: the same as the command `exllama-ops`."""

from __future__ import annotations

from exllama_ops.cli import entry

if __name__ == "__main__":
    entry()
