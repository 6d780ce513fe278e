"""The estimate of the time that is left."""

import pytest

from common.runtime import progress


@pytest.fixture
def clock(monkeypatch):
    """Seconds that a test lets pass, in place of the system's."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_the_time_left_is_said_once_from_the_items_that_were_timed(clock, capsys):
    for _ in progress.progress(range(100), "training", 110, done=10):
        clock[0] += 2
    assert capsys.readouterr().out == "training: about 3 minutes left\n"  # 97 of 2 s


def test_short_items_are_timed_until_there_are_enough_of_them(clock, capsys):
    for number in progress.progress(range(100), "training", 100):
        clock[0] += 0.5 if number else 2  # the first is slow: it warms up
    assert capsys.readouterr().out == "training: about 66 seconds left\n"


def test_work_that_is_over_before_it_is_timed_says_nothing(clock, capsys):
    for _ in progress.progress(range(3), "training", 3):
        clock[0] += 1
    for _ in progress.progress(range(3), "training", 3):  # timed, but only 8 seconds are left
        clock[0] += 4
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("seconds", "said"), [
    (40.2, "40 seconds"), (89, "89 seconds"), (125, "2 minutes"), (5 * 3600, "5.0 hours")])
def test_durations_have_a_persons_unit(seconds, said):
    assert progress.duration(seconds) == said
