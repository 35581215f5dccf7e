"""What a rank's allocator would report: storages that are held and dropped, by part, and the fullest moment."""

from autopar.core.memory import PARTS, MemoryUse


class Memory:
    """Storages by number, how often each is held, and the fullest moment so far."""

    def __init__(self, **parts: int) -> None:
        self.parts = dict.fromkeys(PARTS, 0) | parts
        self.peak = MemoryUse(moment="between steps", **self.parts)
        self._sizes: list[tuple[int, str]] = []
        self._count: list[int] = []

    @property
    def num_storages(self) -> int:
        """How many there have been so far: the number of the next one."""
        return len(self._sizes)

    def held_between(self, first: int, end: int) -> int:
        """Bytes of those storages from number `first` to before `end` that are still held."""
        return sum(self._sizes[n][0] for n in range(first, end) if self._count[n])

    def new(self, num_bytes: int, part: str) -> int:
        self.parts[part] += num_bytes
        self._sizes.append((num_bytes, part))
        self._count.append(1)
        return len(self._count) - 1

    def hold(self, storage: int) -> int:
        self._count[storage] += 1
        return storage

    def drop(self, storage: int) -> None:
        self._count[storage] -= 1
        if self._count[storage] == 0:
            num_bytes, part = self._sizes[storage]
            self.parts[part] -= num_bytes

    def shared(self, storage: int) -> bool:
        return self._count[storage] > 1

    def move(self, storage: int, part: str) -> int:
        """Count it under another part from now on."""
        num_bytes, before = self._sizes[storage]
        self.parts[before] -= num_bytes
        self.parts[part] += num_bytes
        self._sizes[storage] = (num_bytes, part)
        return storage

    def note(self, moment: str, **passing: int) -> None:
        """Look whether this is the fullest moment; `passing`: bytes by part that are held only now."""
        if sum(self.parts.values()) + sum(passing.values()) > self.peak.expected_bytes:
            self.peak = MemoryUse(moment=moment, **{part: size + passing.get(part, 0) for part, size in self.parts.items()})
