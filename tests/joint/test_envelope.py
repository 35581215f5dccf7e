"""What is known of all prices from few of them: no more than the least of random plans, and exact where it was asked."""

from random import Random

import numpy as np
import pytest

from autopar.errors import InfeasibleError
from autopar.joint.envelope import Envelope, Vertex

TOLERANCE = 1e-4


class Plans:
    """A form with these plans (seconds, bytes of state, bytes kept)."""

    def __init__(self, plans: np.ndarray) -> None:
        self.plans, self.asked = plans, 0

    @property
    def least_bytes(self) -> tuple[float, float]:
        return float(self.plans[:, 1].min()) * 0.9, float(self.plans[:, 2].min()) * 0.9

    def least(self, state_price: float, kept_price: float) -> float:
        return float((self.plans @ np.array([1.0, state_price, kept_price])).min())

    def at(self, state_price: float, kept_price: float) -> Vertex:
        self.asked += 1
        costs = self.plans @ np.array([1.0, state_price, kept_price])
        return Vertex(float(costs.min()), *self.plans[int(costs.argmin())].tolist())


def drawn(random: Random) -> Plans:
    """Plans on a curved front: what takes longer holds less."""
    shares = np.array([[random.random(), random.random()] for _ in range(60)])
    seconds = 3.0 + 2.0 * (1 - shares[:, 0]) ** 2 + 4.0 * (1 - shares[:, 1]) ** 2
    return Plans(np.stack([seconds, 1e10 * (1 + shares[:, 0]), 1e9 * (0.1 + shares[:, 1])], axis=1))


@pytest.mark.parametrize("seed", range(8))
def test_no_answer_is_above_the_least(seed: int) -> None:
    random = Random(seed)
    forms = [drawn(random)]
    if seed % 2:  # a form that takes longer and holds less
        forms.append(Plans(forms[0].plans * np.array([1.1, 0.9, 0.7])))
    envelope = Envelope(forms, TOLERANCE)
    for question in range(12):
        flight, total = random.choice((1.0, 4.0, 16.0, 64.0)), random.uniform(0.6, 2.5) * 1e10
        try:
            price = envelope.best_price(flight, total)
        except InfeasibleError:
            assert min(float((form.plans[:, 1] + flight * form.plans[:, 2]).min()) for form in forms) > total * (1 - 1e-9)
            continue
        exact = min(form.least(price, price * flight) for form in forms)
        assert exact * (1 - 2 * TOLERANCE) <= envelope.low(price, price * flight) <= exact
        # no other price makes a better bound
        best = exact - price * total
        others = [min(form.least(p, p * flight) for form in forms) - p * total for p in [0.0, *(price * f for f in (0.3, 0.7, 0.97, 1.03, 1.5, 4.0)), 1e-10, 1e-9]]
        assert max(others) <= best + 5 * TOLERANCE * envelope.fastest_s
        for _ in range(20):
            a, b = (10.0 ** random.uniform(-12, -8) for _ in range(2))
            assert envelope.low(a, b) <= min(form.least(a, b) for form in forms) * (1 + 1e-9), question
    assert sum(form.asked for form in forms) < 100


def test_a_form_that_cannot_be_the_cheaper_is_not_asked_again() -> None:
    random = Random(5)
    fast = drawn(random)
    slow = Plans(fast.plans + np.array([20.0, 0.0, 0.0]))
    Envelope([fast, slow], TOLERANCE).best_price(4.0, 1.5e10)
    assert slow.asked <= 2 < fast.asked
