"""Runs CUDA code on the CPU: nvcc's PTX becomes C++, and its host code meets a CUDA runtime of this tool's own.

README.md shows how to use it. It knows nothing of the project's package.
"""
