"""Short names for the arguments of samples: what kind of tensor, and calls with a note where one operator has several."""

from typing import Any

import torch

from tests.rules.call import Draw, Sample


def call(kind: str, *args: Any, note: str = "", exact: bool = True, known: bool = True, **kwargs: Any) -> Sample:
    """`call("mm", X(12, 6), X(6, 4))`: the namespace aten and the overload default may be left out."""
    if kind.split(".")[0] not in ("aten", "autopar"):
        kind = f"aten.{kind}"
    if kind.count(".") == 1:
        kind = f"{kind}.default"
    return Sample(kind, args, tuple(kwargs.items()), note, exact, known)


def X(*shape: int) -> Draw:
    """Normal numbers whose rows differ in size."""
    return Draw(
        shape, lambda s, g: torch.randn(s, generator=g, dtype=torch.float64) * (0.5 + torch.rand(s, generator=g, dtype=torch.float64))
    )


def POS(*shape: int) -> Draw:
    """Numbers from 0.5 to 2.5."""
    return Draw(shape, lambda s, g: 0.5 + 2 * torch.rand(s, generator=g, dtype=torch.float64))


def UNIT(*shape: int) -> Draw:
    """Numbers from 0.1 to 0.9."""
    return Draw(shape, lambda s, g: 0.1 + 0.8 * torch.rand(s, generator=g, dtype=torch.float64))


def INT(high: int, *shape: int) -> Draw:
    """Integers below `high`."""
    return Draw(shape, lambda s, g: torch.randint(0, high, s, generator=g))


def BOOL(*shape: int) -> Draw:
    """True for about two in three."""
    return Draw(shape, lambda s, g: torch.rand(s, generator=g) < 0.67)


def MASK(*shape: int) -> Draw:
    """An attention mask: True, and always so for the first key."""

    def draw(s: tuple[int, ...], g: torch.Generator) -> torch.Tensor:
        mask = torch.rand(s, generator=g) < 0.6
        mask[..., 0] = True
        return mask

    return Draw(shape, draw)


def TARGET(classes: int, *shape: int, ignore: int = -100) -> Draw:
    """Class numbers; more than half of the first half of them are ignored, so that no two ranks count alike."""

    def draw(s: tuple[int, ...], g: torch.Generator) -> torch.Tensor:
        target = torch.randint(0, classes, s, generator=g)
        flat = target.view(-1)
        flat[: max(1, flat.numel() // 3)] = ignore
        flat[-1] = ignore
        return target

    return Draw(shape, draw)


def INDEX(high: int, *shape: int) -> Draw:
    """Indices without repetition along the last dimension."""
    return Draw(shape, lambda s, g: torch.rand((*s[:-1], high), generator=g).argsort(-1)[..., : s[-1]])
