"""For those who test or time a kernel: how far its results may lie from the exact ones.

`exllama_ops.testing.bounds` turns the error that a kernel declares into a bound for each element of a result.
`exllama_ops.testing.errors` holds what the backends of this package declare. Their tests and benchmarks use both.
Importing `exllama_ops` imports none of this.
"""
