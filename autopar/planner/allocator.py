"""What a rank's allocator would report: storages that are held and dropped, by part, and the fullest moment."""

from typing import NamedTuple

from autopar.core.memory import PARTS


class Peak(NamedTuple):
    """A moment, what is held then in all, and by part."""

    total: int
    parts: dict[str, int]
    moment: tuple[str, ...]


class Memory:
    """Storages by number, how often each is held, and the fullest moment of late, when `most` bytes were held."""

    def __init__(self, **parts: int) -> None:
        self.parts = dict.fromkeys(PARTS, 0) | parts
        self.total = sum(self.parts.values())
        self.most = self.total
        self._peak = Peak(self.total, self.parts.copy(), ("between steps",))
        self._sizes: list[int] = []
        self._part: list[str] = []
        self._count: list[int] = []

    def fullest(self) -> Peak | None:
        """The fullest moment since this was asked last, if there was any."""
        found, self.most = self._peak if self.most >= 0 else None, -1
        return found

    @property
    def num_storages(self) -> int:
        """How many there have been so far: the number of the next one."""
        return len(self._sizes)

    def held_between(self, first: int, end: int) -> int:
        """Bytes of those storages from number `first` to before `end` that are still held."""
        return sum(self._sizes[n] for n in range(first, end) if self._count[n])

    def new(self, num_bytes: int, part: str) -> int:
        self.parts[part] += num_bytes
        self.total += num_bytes
        self._sizes.append(num_bytes)
        self._part.append(part)
        self._count.append(1)
        return len(self._count) - 1

    def hold(self, storage: int) -> int:
        self._count[storage] += 1
        return storage

    def drop(self, storage: int) -> None:
        count = self._count[storage] = self._count[storage] - 1
        if count == 0:
            num_bytes = self._sizes[storage]
            self.parts[self._part[storage]] -= num_bytes
            self.total -= num_bytes

    def size(self, storage: int) -> int:
        return self._sizes[storage]

    def shared(self, storage: int) -> bool:
        return self._count[storage] > 1

    def move(self, storage: int, part: str) -> int:
        """Count it under another part from now on."""
        before = self._part[storage]
        if before != part:
            num_bytes = self._sizes[storage]
            self.parts[before] -= num_bytes
            self.parts[part] += num_bytes
            self._part[storage] = part
        return storage

    def note(self, *moment: str, workspace: int = 0, part: str = "temporaries") -> None:
        """Look whether this is the fullest moment (`backward`, `layers.3`: "backward of layers.3"); `workspace` bytes are held only now, under `part`."""
        total = self.total + workspace
        if total > self.most:
            self.most = total
            parts = self.parts.copy()
            parts[part] += workspace
            self._peak = Peak(total, parts, moment)
