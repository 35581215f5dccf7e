"""What a rank holds at the worst moment of a training step, as a value."""

from dataclasses import dataclass, replace

PARTS = ("parameters", "gradients", "optimizer", "activations", "temporaries", "communication")


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryUse:
    """Bytes on one rank when most are held, and when that is (`backward of transformer.h.3`).

    parameters: stored parts, working and gathered copies, buffers and the batch; gradients: of parameters; optimizer: its moments (a
    master copy is the stored parameter); activations: what the backward will read; temporaries: what lives within or between
    operators; communication: what is being sent or received. `margin`: what the estimate may be off by.
    """

    moment: str
    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    temporaries: int = 0
    communication: int = 0
    margin: int = 0

    @property
    def parts(self) -> tuple[tuple[str, int], ...]:
        """(part, bytes), margin left out."""
        return tuple((part, getattr(self, part)) for part in PARTS)

    @property
    def state_bytes(self) -> int:
        return self.parameters + self.gradients + self.optimizer

    @property
    def expected_bytes(self) -> int:
        """All parts together: the lower end."""
        return sum(size for _, size in self.parts)

    @property
    def high_bytes(self) -> int:
        """What a device must have: a plan fits where this does."""
        return self.expected_bytes + self.margin

    def with_margin(self, margin: int) -> "MemoryUse":
        return replace(self, margin=margin)
