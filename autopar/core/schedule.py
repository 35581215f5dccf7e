"""A pipeline schedule as a value: one list of actions per rank, for one training step.

The model is cut into stages 0..num_stages-1, numbered so that data flows from lower to higher. `placement` says which rank
runs each stage (several stages of one rank are virtual stages, or model chunks); a rank is a position along the pipeline axis.
An `Edge` says that a stage reads what another produced: neighbours as a rule, any later stage where a skip connection, a
mask or an encoder's output crosses several cuts. Between stages of one rank nothing is sent.

An action is written as people say it, stage first: `2F5` is the forward of stage 2 on microbatch 5.

    F B         forward; backward
    I W         the two halves of a split backward: gradients of the inputs, gradients of the weights
    SEND_F      activations to a later stage, `0SEND_F5>1`, which that stage receives: `1RECV_F5<0`
    SEND_B      gradients of these activations, back along the edge: `1SEND_B5>0`, `0RECV_B5<1`
    GATHER FREE the stage's parameters are gathered from (and dropped again by) the ranks that hold their shards
    REDUCE      the stage's gradients are summed over its replicas: once (`2REDUCE`), or per microbatch (`2REDUCE5`)
    TIE         gradients of weights that several stages share are summed over them, `3TIE0`: with the group of stage 0
    STEP        the optimizer step of the stage

The lists say what is done in which order on each rank; `autopar/schedules` makes and checks them.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from pathlib import Path
from typing import Any

from autopar.errors import FileFormatError, UsageError

SCHEMA_VERSION = 1
MAX_FILE_BYTES = 64 << 20
MAX_COUNT = 1 << 20  # stages, ranks or microbatches: more can only be an attack on the reader


class Kind(StrEnum):
    F = "F"
    B = "B"
    I = "I"
    W = "W"
    SEND_F = "SEND_F"
    RECV_F = "RECV_F"
    SEND_B = "SEND_B"
    RECV_B = "RECV_B"
    GATHER = "GATHER"
    FREE = "FREE"
    REDUCE = "REDUCE"
    TIE = "TIE"
    STEP = "STEP"


COMPUTE = frozenset({Kind.F, Kind.B, Kind.I, Kind.W})
SENDS = {Kind.SEND_F: Kind.RECV_F, Kind.SEND_B: Kind.RECV_B}
RECEIVES = {receive: send for send, receive in SENDS.items()}
TRANSFERS = frozenset({*SENDS, *RECEIVES})
PER_STEP = frozenset({Kind.GATHER, Kind.FREE, Kind.TIE, Kind.STEP})
ACTION = re.compile(r"([0-9]{1,7})(SEND_F|RECV_F|SEND_B|RECV_B|GATHER|FREE|REDUCE|STEP|F|B|I|W)([0-9]{1,7})?(?:([<>])([0-9]{1,7}))?|([0-9]{1,7})TIE([0-9]{1,7})")


@dataclass(frozen=True, slots=True)
class Action:
    """One thing a rank does for one of its stages. `peer`: the other stage of a transfer, the first stage of a TIE's group."""

    kind: Kind
    stage: int
    microbatch: int | None = None
    peer: int | None = None

    @property
    def partner(self) -> "Action":
        """The receive of a send, the send of a receive."""
        assert self.peer is not None, f"{self} has no partner"
        return Action(SENDS.get(self.kind) or RECEIVES[self.kind], self.peer, self.microbatch, self.stage)

    @classmethod
    def parse(cls, text: str) -> "Action":
        match = ACTION.fullmatch(text)
        if match is None:
            raise UsageError(f"{text[:40]!r} is not an action; write a stage, what it does and the microbatch, such as 0F3, 1B0, 0SEND_F3>1, 1RECV_F3<0, 0STEP")
        if match[6] is not None:
            return cls(Kind.TIE, int(match[6]), None, int(match[7]))
        kind = Kind(match[2])
        microbatch, peer = (None if group is None else int(group) for group in (match[3], match[5]))
        action = cls(kind, int(match[1]), microbatch, peer)
        if str(action) != text or (kind in TRANSFERS) != (peer is not None) or (microbatch is None) != (kind in PER_STEP or (kind is Kind.REDUCE and microbatch is None)):
            raise UsageError(f"{text!r} is not an action: {_form(kind)}")
        return action

    def __str__(self) -> str:
        number = "" if self.microbatch is None else str(self.microbatch)
        peer = "" if self.peer is None else str(self.peer) if self.kind is Kind.TIE else f"{'>' if self.kind in SENDS else '<'}{self.peer}"
        return f"{self.stage}{self.kind}{number}{peer}"


def _form(kind: Kind) -> str:
    example = {Kind.REDUCE: f"0{kind} or 0{kind}3"} | {k: f"0{k}3>1" for k in SENDS} | {k: f"1{k}3<0" for k in RECEIVES} | {k: f"0{k}" for k in PER_STEP}
    return f"write {kind} as {example.get(kind, f'0{kind}3')}, numbers without leading zeros"


@dataclass(frozen=True, slots=True)
class Edge:
    """Stage `target` reads what stage `source` produced; where `has_gradient`, a gradient comes back (none for a mask)."""

    source: int
    target: int
    has_gradient: bool = True


def chain(num_stages: int) -> tuple[Edge, ...]:
    """Every stage feeds the next one."""
    return tuple(Edge(a, b) for a, b in pairwise(range(num_stages)))


def microbatches_of(stage: int, num_microbatches: int, shares: Sequence[int] = ()) -> range:
    """The microbatches that a stage runs: all, or its share of them where stages are copies of one model."""
    first = sum(shares[:stage])
    return range(first, first + shares[stage]) if shares else range(num_microbatches)


@dataclass(frozen=True)
class Schedule:
    """What each rank does in one step. `tied`: groups of stages that share a weight. `shares`: where every stage is a copy of the whole model, how many of the
    microbatches it runs, the first stage the first ones. Checked by `schedules.check`."""

    name: str
    num_microbatches: int
    placement: tuple[int, ...]
    edges: tuple[Edge, ...]
    ranks: tuple[tuple[Action, ...], ...]
    tied: tuple[tuple[int, ...], ...] = ()
    training: bool = True
    shares: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_shape(self.num_microbatches, self.placement, len(self.ranks), self.edges, self.tied)
        check_shares(self.shares, self.num_microbatches, len(self.placement), self.edges)

    def microbatches(self, stage: int) -> range:
        """Those that a stage runs."""
        return microbatches_of(stage, self.num_microbatches, self.shares)

    @property
    def num_stages(self) -> int:
        return len(self.placement)

    @property
    def num_ranks(self) -> int:
        return len(self.ranks)

    def stages_of(self, rank: int) -> tuple[int, ...]:
        return tuple(stage for stage, home in enumerate(self.placement) if home == rank)

    def by_first_use(self, rank: int) -> tuple[int, ...]:
        """The stages of a rank in the order in which it first computes them."""
        return tuple(dict.fromkeys(action.stage for action in self.ranks[rank] if action.kind in COMPUTE))

    def to_json(self) -> str:
        """Canonical JSON: the same schedule gives the same bytes. A rank's list is one line of text."""
        data = {
            "schema_version": SCHEMA_VERSION,
            "name": self.name,
            "num_microbatches": self.num_microbatches,
            "training": self.training,
            "placement": list(self.placement),
            "edges": [f"{e.source}>{e.target}{'' if e.has_gradient else ' forward'}" for e in self.edges],
            "tied": [list(group) for group in self.tied],
            **({"shares": list(self.shares)} if self.shares else {}),
            "ranks": [" ".join(map(str, actions)) for actions in self.ranks],
        }
        return json.dumps(data, indent=1)

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.to_json() + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "Schedule":
        """Read a schedule file; raises FileFormatError with what is wrong. Whether it can run is for `schedules.check`."""
        try:
            if Path(path).stat().st_size > MAX_FILE_BYTES:
                raise FileFormatError(f"{path}: larger than {MAX_FILE_BYTES >> 20} MiB; this is not a schedule")
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise FileFormatError(f"{path}: {error}; give the path of a schedule in JSON") from error
        return cls.from_json(text, str(path))

    @classmethod
    def from_json(cls, text: str, where: str = "schedule") -> "Schedule":
        try:
            data = json.loads(text)
        except (RecursionError, ValueError) as error:
            raise FileFormatError(f"{where}: not JSON ({str(error)[:120]})") from error
        if not isinstance(data, dict) or data.get("schema_version") != SCHEMA_VERSION:
            found = data.get("schema_version") if isinstance(data, dict) else None
            raise FileFormatError(f"{where}: schema_version {found!r:.40}, this autopar reads {SCHEMA_VERSION}")
        try:
            return cls(
                name=_typed(data["name"], str),
                num_microbatches=_typed(data["num_microbatches"], int),
                placement=tuple(_typed(rank, int) for rank in _typed(data["placement"], list)),
                edges=tuple(_edge(edge) for edge in _typed(data["edges"], list)),
                ranks=tuple(parse_actions(line) for line in _typed(data["ranks"], list)),
                tied=tuple(tuple(_typed(stage, int) for stage in _typed(group, list)) for group in _typed(data["tied"], list)),
                training=_typed(data["training"], bool),
                shares=tuple(_typed(share, int) for share in _typed(data.get("shares", []), list)),
            )
        except (KeyError, UsageError) as error:
            what = f"missing {error}" if isinstance(error, KeyError) else str(error)
            raise FileFormatError(f"{where}: not a valid schedule ({what})") from error


def parse_actions(line: str) -> tuple[Action, ...]:
    """The actions of one rank, as text separated by blanks."""
    return tuple(Action.parse(word) for word in _typed(line, str).split())


def check_shape(num_microbatches: int, placement: Sequence[int], num_ranks: int, edges: Iterable[Edge], tied: Iterable[Sequence[int]]) -> None:
    """Raise UsageError unless the numbers of a schedule fit together."""
    stages = range(len(placement))
    if not (1 <= num_microbatches <= MAX_COUNT and 1 <= len(placement) <= MAX_COUNT):
        raise UsageError(f"{num_microbatches} microbatches of {len(placement)} stages; a schedule has at least one of each")
    if sorted(set(placement)) != list(range(num_ranks)):
        raise UsageError(f"placement {list(placement)} of the stages does not use exactly the ranks 0 to {num_ranks - 1}; give every rank a stage")
    seen = set()
    for edge in edges:
        if not (edge.source in stages and edge.target in stages and edge.source < edge.target):
            raise UsageError(f"edge {edge.source} -> {edge.target} of {len(placement)} stages; stages are numbered so that data flows to higher ones")
        if (edge.source, edge.target) in seen:
            raise UsageError(f"edge {edge.source} -> {edge.target} is given twice; everything that crosses it is one transfer")
        seen.add((edge.source, edge.target))
    members = [stage for group in tied for stage in group]
    if len(set(members)) != len(members) or not all(stage in stages for stage in members) or any(list(g) != sorted(g) or len(g) < 2 for g in tied):
        raise UsageError(f"tied {[list(group) for group in tied]}: a group is two or more stages, ascending, and no stage is in two; merge groups that meet")


def check_shares(shares: Sequence[int], num_microbatches: int, num_stages: int, edges: Sequence[Edge]) -> None:
    """Raise UsageError unless copies of a model share out the microbatches of a step."""
    if shares and (len(shares) != num_stages or min(shares) < 1 or sum(shares) != num_microbatches or edges):
        raise UsageError(
            f"shares {list(shares)} of {num_microbatches} microbatches for {num_stages} stages and {len(edges)} edges; give every copy of the model at least one, "
            "all of them together, and no edges"
        )


def _typed(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise UsageError(f"{str(value)[:60]!r} where {kind.__name__} is expected")
    return value


def _edge(text: Any) -> Edge:
    match = re.fullmatch(r"([0-9]{1,7})>([0-9]{1,7})( forward)?", _typed(text, str))
    if match is None:
        raise UsageError(f"{text[:40]!r} is not an edge; write 0>1, or '0>1 forward' where no gradient comes back")
    return Edge(int(match[1]), int(match[2]), match[3] is None)
