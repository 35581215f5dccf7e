"""Runs the lists of a schedule on whole numbers, in any interleaving: an independent judge of what a schedule computes.

Stage s multiplies the sum of its inputs by a prime. Ranks share nothing but first-in first-out channels, one per ordered pair, and
a receive takes whatever comes next. So a list that is out of order, lacks an action or pairs messages wrongly either
stops or ends with other gradients than the direct computation. Nothing here is shared with `autopar.schedules`.
"""

from collections import deque
from random import Random

from autopar.core.schedule import Action, Kind, Schedule

PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61)
MODULUS = (1 << 61) - 1
REPLICAS = 2
"""Equal ones: a REDUCE doubles the gradients that are there."""


class WrongError(Exception):
    """The lists did not compute the gradients, or not all of them."""


class StuckError(WrongError):
    """No rank can go on."""


def batch(m: int) -> int:
    return 1000 + m * m


def loss_gradient(m: int) -> int:
    return 7 + m


def direct(schedule: Schedule) -> tuple[dict[tuple[int, int], int], list[int]]:
    """(output of each stage and microbatch, weight gradient of each stage, tied ones summed)."""
    outputs: dict[tuple[int, int], int] = {}
    weights = [0] * schedule.num_stages
    sources = [[e for e in schedule.edges if e.target == s] for s in range(schedule.num_stages)]
    readers = [[e for e in schedule.edges if e.source == s and e.has_gradient] for s in range(schedule.num_stages)]
    for m in range(schedule.num_microbatches):
        inputs, back = {}, {}
        for s in range(schedule.num_stages):
            inputs[s] = batch(m) + sum(outputs[e.source, m] for e in sources[s])
            outputs[s, m] = PRIMES[s] * inputs[s] % MODULUS
        for s in reversed(range(schedule.num_stages)):
            gradient = loss_gradient(m) + sum(back[e.target] for e in readers[s])
            back[s] = PRIMES[s] * gradient % MODULUS
            weights[s] += inputs[s] * gradient
    reduced = {a.stage for actions in schedule.ranks for a in actions if a.kind is Kind.REDUCE}
    weights = [w * REPLICAS if s in reduced else w for s, w in enumerate(weights)]
    for group in schedule.tied:
        total = sum(weights[s] for s in group)
        for s in group:
            weights[s] = total
    return outputs, weights


class Machine:
    """The ranks, each with the values it holds."""

    def __init__(self, schedule: Schedule, *, blocking: bool) -> None:
        self.schedule, self.blocking = schedule, blocking
        self.outputs: list[dict[tuple[int, int], int]] = [{} for _ in schedule.ranks]
        self.back: list[dict[tuple[int, int], int]] = [{} for _ in schedule.ranks]
        self.waiting: list[dict[tuple[int, int], int]] = [{} for _ in schedule.ranks]
        """What a W still needs: the product that it adds."""
        self.gradients: list[dict[int, int]] = [{} for _ in schedule.placement]
        """Per stage, by microbatch."""
        self.tied: dict[int, int] = {}
        self.stepped: dict[int, int] = {}
        self.position = [0] * schedule.num_ranks
        self.channels: dict[tuple[int, int], deque[int]] = {}

    def head(self, rank: int) -> Action | None:
        actions = self.schedule.ranks[rank]
        return actions[self.position[rank]] if self.position[rank] < len(actions) else None

    def run(self, random: Random) -> None:
        while True:
            ranks = [rank for rank in range(self.schedule.num_ranks) if self.head(rank) is not None]
            if not ranks:
                return
            random.shuffle(ranks)
            try:
                if not any(self.advance(rank) for rank in ranks):
                    raise StuckError(str([str(self.head(rank)) for rank in ranks]))
            except KeyError as error:
                raise WrongError(f"{error} is not there") from error

    def advance(self, rank: int) -> bool:
        action = self.head(rank)
        assert action is not None
        where = self.schedule.placement
        if action.kind is Kind.TIE:
            return self.tie(action)
        if action.kind in (Kind.SEND_F, Kind.SEND_B):
            peer = where[action.peer]
            if self.blocking:
                other = self.head(peer)
                if other is None or other.kind not in (Kind.RECV_F, Kind.RECV_B) or where[other.peer] != rank:
                    return False
                self.receive(peer, other, self.sent(rank, action))
                self.position[peer] += 1
            else:
                self.channels.setdefault((rank, peer), deque()).append(self.sent(rank, action))
        elif action.kind in (Kind.RECV_F, Kind.RECV_B):
            channel = self.channels.get((where[action.peer], rank))
            if self.blocking or not channel:
                return False
            self.receive(rank, action, channel.popleft())
        elif action.kind is Kind.STEP:
            self.stepped[action.stage] = self.weight_gradient(action.stage)
        elif action.kind is Kind.REDUCE:
            gradients = self.gradients[action.stage]
            for m in list(gradients) if action.microbatch is None else (action.microbatch,):
                gradients[m] *= REPLICAS
        elif action.kind in (Kind.F, Kind.B, Kind.I, Kind.W):
            self.compute(rank, action)
        self.position[rank] += 1
        return True

    def sent(self, rank: int, action: Action) -> int:
        return (self.outputs if action.kind is Kind.SEND_F else self.back)[rank][action.stage, action.microbatch]

    def receive(self, rank: int, action: Action, value: int) -> None:
        (self.outputs if action.kind is Kind.RECV_F else self.back)[rank][action.peer, action.microbatch] = value

    def compute(self, rank: int, action: Action) -> None:
        s, m = action.stage, action.microbatch
        assert m is not None
        if action.kind is Kind.W:
            self.add(s, m, self.waiting[rank].pop((s, m)))
            return
        inputs = batch(m) + sum(self.outputs[rank][e.source, m] for e in self.schedule.edges if e.target == s)
        if action.kind is Kind.F:
            self.outputs[rank][s, m] = PRIMES[s] * inputs % MODULUS
            return
        _ = self.outputs[rank][s, m]  # the forward must have run
        gradient = loss_gradient(m) + sum(self.back[rank][e.target, m] for e in self.schedule.edges if e.source == s and e.has_gradient)
        self.back[rank][s, m] = PRIMES[s] * gradient % MODULUS
        if action.kind is Kind.B:
            self.add(s, m, inputs * gradient)
        else:
            self.waiting[rank][s, m] = inputs * gradient

    def add(self, stage: int, m: int, gradient: int) -> None:
        self.gradients[stage][m] = self.gradients[stage].get(m, 0) + gradient

    def weight_gradient(self, stage: int) -> int:
        return self.tied.get(stage, sum(self.gradients[stage].values()))

    def tie(self, action: Action) -> bool:
        group = next(group for group in self.schedule.tied if group[0] == action.peer)
        ranks = {self.schedule.placement[s] for s in group}
        heads = [self.head(rank) for rank in ranks]
        if any(head is None or head.kind is not Kind.TIE or head.peer != action.peer for head in heads):
            return False
        total = sum(sum(self.gradients[s].values()) for s in group)
        self.tied |= dict.fromkeys(group, total)
        for rank in ranks:
            self.position[rank] += 1
        return True


def judge(schedule: Schedule, *, blocking: bool, seed: int = 0) -> None:
    """Raise WrongError unless the lists compute every output and every gradient, and leave no message behind."""
    machine = Machine(schedule, blocking=blocking)
    machine.run(Random(seed))
    outputs, weights = direct(schedule)
    found = {key: value for rank, held in enumerate(machine.outputs) for key, value in held.items() if schedule.placement[key[0]] == rank}
    if found != outputs:
        raise WrongError("outputs differ")
    if schedule.training and ([machine.weight_gradient(s) for s in range(schedule.num_stages)] != weights or any(machine.waiting)):
        raise WrongError("gradients differ")
    if machine.stepped and machine.stepped != dict(enumerate(weights)):
        raise WrongError("steps were taken with other gradients")
    if any(machine.channels.values()):
        raise WrongError("messages are left")
