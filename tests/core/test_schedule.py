"""Schedules as text: what is read is what was written, and nothing else is."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopar.core.schedule import Action, Edge, Kind, Schedule, chain
from autopar.errors import FileFormatError, UsageError

GOOD = ["0F3", "12B0", "1I7", "1W7", "0SEND_F5>1", "1RECV_F5<0", "1SEND_B5>0", "0RECV_B5<1", "2GATHER", "2FREE", "2REDUCE", "2REDUCE4", "3TIE0", "3STEP"]
BAD = ["", "F", "F0", "0F", "0F3>1", "0SEND_F5", "0SEND_F5<1", "0RECV_F5>1", "0GATHER3", "0STEP1", "0TIE", "TIE0", "01F3", "0F03", "-1F0", "0F-1", "0X1", "0F1 ", "9" * 99 + "F0", "0f1", "٣F0"]


@pytest.mark.parametrize("text", GOOD)
def test_actions_are_read_back(text: str) -> None:
    assert str(Action.parse(text)) == text


@pytest.mark.parametrize("text", BAD)
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not an action"):
        Action.parse(text)


@given(st.text(alphabet="0123456789FBIWSENDRCV_GATHIKUPL<> ", max_size=14))
def test_an_action_is_refused_or_means_itself(text: str) -> None:
    try:
        action = Action.parse(text)
    except UsageError:
        return
    assert str(action) == text


def test_partners_are_mutual() -> None:
    send = Action(Kind.SEND_B, 2, 5, 1)
    assert str(send.partner) == "1RECV_B5<2"
    assert send.partner.partner == send


DATA = json.loads(Schedule("x", 1, (0, 1), (Edge(0, 1),), ((Action(Kind.F, 0, 0),), ())).to_json())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"schema_version": 2}, "schema_version 2, this autopar reads 1"),
        ({"ranks": ["0F0"]}, "does not use exactly the ranks 0 to 0"),
        ({"ranks": ["0F0 what", ""]}, "'what' is not an action"),
        ({"placement": [0, 2]}, "does not use exactly the ranks 0 to 1"),
        ({"placement": [0, True]}, "'True' where int is expected"),
        ({"edges": ["1>0"]}, "data flows to higher ones"),
        ({"edges": ["0>1", "0>1 forward"]}, "given twice"),
        ({"edges": ["0-1"]}, "is not an edge"),
        ({"tied": [[1, 0]]}, "ascending"),
        ({"num_microbatches": 0}, "0 microbatches"),
        ({"name": None}, "'None' where str is expected"),
    ],
)
def test_malformed_files(change: dict, reason: str) -> None:
    assert Schedule.from_json(json.dumps(DATA)).name == "x"
    with pytest.raises(FileFormatError, match=reason):
        Schedule.from_json(json.dumps(DATA | change))


@pytest.mark.parametrize("text", ["", "[]", "[" * 100_000, "{}", '{"schema_version": 1}', "NaN"])
def test_other_json(text: str) -> None:
    with pytest.raises(FileFormatError):
        Schedule.from_json(text)


def test_files(tmp_path) -> None:
    schedule = Schedule("x", 1, (0, 1), chain(2), ((Action(Kind.F, 0, 0),), ()), training=False)
    schedule.save(tmp_path / "s.json")
    assert Schedule.load(tmp_path / "s.json") == schedule
    with pytest.raises(FileFormatError, match="give the path of a schedule"):
        Schedule.load(tmp_path / "none.json")
