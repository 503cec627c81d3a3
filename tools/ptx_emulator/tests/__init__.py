"""Tests of the emulator, which needs nvcc and g++ for them."""
