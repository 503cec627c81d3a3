"""The first hour on a GPU as one command: build, check, sanitize, test, compare, profile and measure; docs/gpu.md."""
