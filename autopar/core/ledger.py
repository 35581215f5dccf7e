"""What a step communicates: the one record that a plan predicts and the runtime counts."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from autopar.core.moves import moved_bytes

LedgerKey = tuple[str, str, int]
"""(primitive, mesh axes joined by '+', group size)."""


@dataclass(frozen=True)
class Ledger:
    """Per key the bytes that enter the primitive on one rank, forward and backward together."""

    input_bytes: tuple[tuple[LedgerKey, int], ...] = ()

    @classmethod
    def of(cls, entries: Mapping[LedgerKey, int]) -> "Ledger":
        return cls(tuple(sorted((k, v) for k, v in entries.items() if v)))

    @classmethod
    def sum(cls, items: Iterable[tuple[LedgerKey, int]]) -> "Ledger":
        total: dict[LedgerKey, int] = {}
        for key, value in items:
            total[key] = total.get(key, 0) + value
        return cls.of(total)

    @property
    def moved(self) -> dict[str, float]:
        """Bytes a rank receives, by `primitive axes`."""
        return {f"{prim} {axes}": moved_bytes(prim, size, value) for (prim, axes, size), value in self.input_bytes}

    @property
    def total_bytes(self) -> int:
        """Bytes a rank receives in one step, rounded once at the end."""
        return round(sum(self.moved.values()))
