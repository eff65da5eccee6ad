"""Work in a thread holds Python's lock for short turns, and only for as long as it takes."""

from __future__ import annotations

import sys
import threading
import time

import pytest

from vllm_edits.plugin.short_turns import TURN_SECONDS, in_thread, short_turns

pytestmark = pytest.mark.anyio


def interval_of(seconds: float) -> object:
    return pytest.approx(seconds, abs=1e-6)


async def test_turns_are_short_while_work_is_done() -> None:
    usual = sys.getswitchinterval()
    assert usual > TURN_SECONDS
    assert await in_thread(lambda some: (some, sys.getswitchinterval()), 3) == (3, interval_of(TURN_SECONDS))
    assert sys.getswitchinterval() == interval_of(usual)
    with pytest.raises(ZeroDivisionError):
        await in_thread(lambda: 1 / 0)
    assert sys.getswitchinterval() == interval_of(usual)


def test_they_stay_short_until_the_last_piece_of_work_has_ended() -> None:
    usual = sys.getswitchinterval()
    with short_turns():
        with short_turns():
            pass
        assert sys.getswitchinterval() == interval_of(TURN_SECONDS)
    assert sys.getswitchinterval() == interval_of(usual)


def test_a_loop_beside_work_waits_less() -> None:
    """As a step waits for a version that is made ready. The other way round the loop waits for whole intervals."""

    def busy(end: threading.Event) -> None:
        while not end.is_set():
            sum(range(100))

    def waited() -> float:
        end = threading.Event()
        work = threading.Thread(target=busy, args=(end,))
        work.start()
        began = time.perf_counter()
        for _ in range(40):
            time.sleep(0)  # lets go of the lock, and wants it back
        took = time.perf_counter() - began
        end.set()
        work.join()
        return took

    long = waited()
    with short_turns():
        short = waited()
    assert short < long / 3
