"""Weights by name, each made when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from exllama_ops.layout.weight import GptqWeight


class LazyWeights(Mapping[str, GptqWeight]):
    """A mapping whose values are made on each access and never kept: a model's weights need not fit into memory.

    Args:
        names: the keys, in their order.
        make: gives the weight of a name.
    """

    def __init__(self, names: Iterable[str], make: Callable[[str], GptqWeight]) -> None:
        self._names = dict.fromkeys(names)
        self._make = make

    def __getitem__(self, name: str) -> GptqWeight:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
