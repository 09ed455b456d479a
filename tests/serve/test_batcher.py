"""What is computed when, without models and without HTTP. Each thread of users whose server got stuck is replayed by name."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable, Coroutine, Hashable, Sequence
from contextlib import suppress
from functools import wraps
from typing import Any

import pytest

from gendist.serve.batcher import Batcher, Busy, Closed, Left, Work, is_admitted, why_leave
from gendist.serve.limits import Limits

NEVER_S = 3600.0  # a wait that no test sees the end of


def on_a_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    @wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), 30.0))

    return run


def work(payload: Any = None, key: Hashable = "model", num_rows: int = 1, num_bytes: int = 8, cost: Hashable = None) -> Work:
    return Work(key, num_rows, num_bytes, payload, cost)


class Served:
    """A batcher, and what it did."""

    def __init__(self, compute: Callable[[Any], Any] = lambda payload: payload, **limits: Any) -> None:
        self.batches: list[list[Any]] = []
        self.threads: list[str] = []
        self.left: list[Left] = []
        self._gate = threading.Event()
        self._each = compute
        self.began = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._gate.set()
        self.batcher = Batcher(self._compute, Limits(**{"target_wait_s": NEVER_S, **limits}), self.left.append)

    def _compute(self, key: Hashable, payloads: Sequence[Any]) -> Sequence[Any]:
        self.batches.append(list(payloads))
        self.threads.append(threading.current_thread().name)
        self._loop.call_soon_threadsafe(self.began.set)
        assert self._gate.wait(30.0)
        return [self._each(payload) for payload in payloads]

    def go(self) -> None:
        self._gate.set()

    def ask(self, *works: Work, **options: Any) -> list[asyncio.Task[Any]]:
        return [asyncio.create_task(self.batcher.result(each, **options)) for each in works]

    async def occupied(self) -> asyncio.Task[Any]:
        """A task whose work the thread is at until `go`, so that what comes next waits."""
        self._gate.clear()
        self.began.clear()
        (task,) = self.ask(work("first", key="first"))
        await self.began.wait()
        return task


async def settle() -> None:
    """All tasks have gone as far as they can without anybody else."""
    for _ in range(5):
        await asyncio.sleep(0)


@pytest.fixture
def any_is_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is known to take some time counts as quick, so that nothing depends on how busy the machine is."""
    monkeypatch.setattr("gendist.serve.batcher.QUICK_S", NEVER_S)


def fail(payload: Any) -> Any:
    if payload == "bad":
        raise ValueError("a size that cannot be")
    return payload


# Decisions


@pytest.mark.parametrize(
    ("rows", "num_bytes", "queued_rows", "queued_bytes", "expected"),
    [
        (10, 80, 0, 0, True),
        (10, 80, 90, 0, True),
        (11, 80, 90, 0, False),
        (1, 101, 1, 900, False),
        (1, 100, 1, 900, True),
        (10_000, 10**9, 0, 0, True),  # larger than all of the queue, when nothing waits
        (10_000, 1, 1, 8, False),
    ],
)
def test_a_work_is_admitted_where_the_queue_has_room(rows, num_bytes, queued_rows, queued_bytes, expected):
    limits = Limits(queue_rows=100, queue_bytes=1000)
    assert is_admitted(rows, num_bytes, queued_rows, queued_bytes, limits) is expected


@pytest.mark.parametrize(
    ("num_rows", "num_works", "usual", "waited_s", "expected"),
    [
        (256, 2, 9, 0.0, "full"),
        (255, 8, 8, 0.0, "complete"),
        (255, 7, 8, 0.001, None),
        (1, 1, 8, 0.002, "waited"),
        (1, 1, 1, 0.0, "complete"),  # a client alone does not wait
    ],
)
def test_a_batch_leaves_when_full_or_complete_or_after_a_wait(num_rows, num_works, usual, waited_s, expected):
    limits = Limits(batch_rows=256, target_wait_s=0.002)
    assert why_leave(num_rows, num_works, usual, waited_s, limits) == expected


# Threads of users


@pytest.mark.parametrize("how", ["raises", "too few", "none", "StopIteration", "SystemExit"])
@on_a_loop
async def test_ray_66140_a_computation_that_breaks_fails_its_batch_and_not_the_queue(how):
    def compute(key: Hashable, payloads: Sequence[Any]) -> Any:
        if "bad" not in payloads:
            return list(payloads)
        match how:
            case "raises":
                raise ValueError("a size that cannot be")
            case "too few":
                return payloads[1:]
            case "none":
                return None
            case "StopIteration":
                raise StopIteration
            case _:
                raise SystemExit(1)

    batcher = Batcher(compute, Limits(target_wait_s=0.0))
    works = [work(payload, key) for payload, key in (("bad", "one"), ("good", "one"), ("good", "other"))]
    results = await asyncio.gather(*map(batcher.result, works), return_exceptions=True)
    assert isinstance(results[0], Exception)
    assert results[2] == "good"
    assert await batcher.result(work("good", "one")) == "good"
    assert batcher.num_rows == batcher.num_bytes == 0
    await batcher.close()


@on_a_loop
async def test_litserve_340_a_request_that_fails_fails_alone():
    served = Served(lambda payload: ValueError("a bad one") if payload == "bad" else payload)
    first = await served.occupied()
    tasks = served.ask(work("a"), work("bad"), work("b"))
    await settle()
    served.go()
    results = await asyncio.gather(first, *tasks, return_exceptions=True)
    assert served.batches[1:] == [["a", "bad", "b"]]
    assert [results[0], results[1], results[3]] == ["first", "a", "b"]
    assert isinstance(results[2], ValueError)


@on_a_loop
async def test_litserve_165_whoever_hangs_up_while_queued_frees_its_rows_at_once():
    served = Served(queue_rows=10)
    first = await served.occupied()
    gone, stays = served.ask(work("gone", num_rows=6), work("stays", num_rows=4))
    await settle()
    with pytest.raises(Busy):
        await served.batcher.result(work("next", num_rows=6))
    gone.cancel()
    await settle()
    assert (served.batcher.num_rows, served.batcher.num_bytes) == (4, 8)
    (next_,) = served.ask(work("next", num_rows=6))
    await settle()
    served.go()
    assert await asyncio.gather(first, stays, next_) == ["first", "stays", "next"]
    assert [payload for batch in served.batches for payload in batch] == ["first", "stays", "next"]  # "gone" is not computed
    assert gone.cancelled()


@on_a_loop
async def test_ray_50046_whoever_hangs_up_while_computed_does_no_harm():
    served = Served()
    first = await served.occupied()
    neighbour, gone = served.ask(work("neighbour"), work("gone"))
    await settle()
    first.cancel()
    await settle()
    served.go()
    gone.cancel()
    assert await neighbour == "neighbour"
    assert await served.batcher.result(work("after")) == "after"
    assert served.batcher.num_rows == 0
    assert served.batcher.stuck_for_s == 0.0


@on_a_loop
async def test_ray_43288_a_batch_that_never_fills_leaves_after_the_wait():
    served = Served(batch_rows=100, target_wait_s=0.01)
    first = await served.occupied()
    tasks = served.ask(*(work(i) for i in range(4)))  # four come together
    await settle()
    served.go()
    await asyncio.gather(first, *tasks)
    assert await served.batcher.result(work("alone")) == "alone"  # though the other three do not come again
    assert [(left.reason, left.num_works) for left in served.left[1:]] == [("complete", 4), ("waited", 1)]
    assert served.left[-1].oldest_wait_s >= 0.01


# When batches leave, and of what


@on_a_loop
async def test_a_client_alone_never_waits():
    served = Served(batch_rows=100)  # the wait would last for ever
    for number in range(10):
        assert await served.batcher.result(work(number)) == number
    assert {left.reason for left in served.left} == {"complete"}


@on_a_loop
async def test_clients_that_have_gone_are_soon_not_waited_for():
    served = Served(batch_rows=100, target_wait_s=0.001)
    first = await served.occupied()
    tasks = served.ask(*(work(i) for i in range(16)))
    await settle()
    served.go()
    await asyncio.gather(first, *tasks)
    for number in range(6):
        await served.batcher.result(work(number))
    assert served.left[-1].reason == "complete"


@on_a_loop
async def test_a_batch_is_counted_in_rows():
    served = Served(batch_rows=10, target_wait_s=0.0)
    first = await served.occupied()
    tasks = served.ask(*(work(rows, num_rows=rows) for rows in (4, 4, 4, 25, 1, 9, 1)))
    await settle()
    served.go()
    await asyncio.gather(first, *tasks)
    assert served.batches[1:] == [[4, 4], [4], [25], [1, 9], [1]]
    assert [left.num_rows for left in served.left[1:]] == [8, 4, 25, 10, 1]


@on_a_loop
async def test_only_works_of_one_key_are_joined():
    served = Served()
    first = await served.occupied()
    tasks = served.ask(*(work((key, i), key) for i in range(3) for key in ("a", "b", None)))
    await settle()
    served.go()
    await asyncio.gather(first, *tasks)
    assert sorted(map(len, served.batches[1:])) == [1, 1, 1, 3, 3]
    assert all(len({key for key, _ in batch}) == 1 for batch in served.batches[1:])


@on_a_loop
async def test_a_full_batch_overtakes_one_that_still_waits_and_the_other_is_not_forgotten():
    served = Served(batch_rows=4, target_wait_s=1.0)
    first = await served.occupied()
    early = served.ask(work("early", "slow"), work("early", "slow"))
    await settle()
    served.go()
    await asyncio.gather(first, *early)  # so two are expected of this key
    (waits,) = served.ask(work("waits", "slow"))
    await settle()
    full = served.ask(*(work("full", "busy") for _ in range(4)))
    await asyncio.gather(*full)
    assert await waits == "waits"
    assert [(left.key, left.reason) for left in served.left[2:]] == [("busy", "full"), ("slow", "waited")]


@pytest.mark.parametrize("key", [None, "other"])
@on_a_loop
async def test_one_that_waits_is_not_forgotten_when_whoever_was_ready_has_gone(key):
    served = Served(batch_rows=4)
    first = await served.occupied()
    early = served.ask(work("early", "slow"), work("early", "slow"))
    await settle()
    served.go()
    await asyncio.gather(first, *early)  # so two are expected of this key
    first = await served.occupied()
    (waits,), gone = served.ask(work("waits", "slow")), served.ask(work("gone", key, num_rows=4))
    await settle()
    gone[0].cancel()
    await settle()
    served.go()
    await first
    assert not waits.done()
    assert await asyncio.gather(waits, *served.ask(work("other", "slow"))) == ["waits", "other"]


@pytest.mark.parametrize("key", ["model", None, "other"])
@on_a_loop
async def test_a_request_of_many_chunks_shares_with_small_ones(key):
    """However many chunks it has, and whatever joins what, a small request is served after two of its batches at most."""
    served = Served(batch_rows=8, target_wait_s=0.0)
    before: list[int] = []

    async def large() -> None:
        for number in range(200):
            await served.batcher.result(work(("large", number), "model", num_rows=8), is_continued=number > 0)

    async def small() -> None:
        for _ in range(20):
            began = len(served.batches)
            await served.batcher.result(work(("small", 0), key))
            since = served.batches[began:]
            before.append(next(i for i, batch in enumerate(since) if ("small", 0) in batch))

    await asyncio.gather(large(), small(), large())
    assert max(before) <= 3  # the batch that is under way, and a chunk of each of the two
    assert sum(len(batch) for batch in served.batches) == 420


@on_a_loop
async def test_works_that_nothing_can_join_are_computed_on_the_loop_once_they_are_known_to_be_quick(any_is_quick):
    served = Served()
    first = await served.occupied()
    tasks = served.ask(*(work(i, None, cost="quick") for i in range(3)), work("joined"), work(3, None, cost="quick"))
    await settle()
    assert served.batches == [["first"]]  # never two things at a time
    served.go()
    assert await asyncio.gather(first, *tasks) == ["first", 0, 1, 2, "joined", 3]
    here = threading.current_thread().name
    assert served.batches == [["first"], [0], [1], [2], ["joined"], [3]]
    assert served.threads == ["model", "model", here, here, "model", here]  # the first of them tells
    assert [left.reason for left in served.left[1:]] == ["alone", "alone", "alone", "complete", "alone"]


@on_a_loop
async def test_a_quick_work_that_finds_nobody_before_it_is_computed_on_the_loop(any_is_quick):
    served = Served()
    await served.batcher.result(work(0, None, cost="quick"))
    await served.batcher.result(work(1, None, cost="quick"))
    await served.batcher.result(work(2, None, cost="unknown"))
    await served.batcher.result(work(3, None))
    assert served.threads == ["model", threading.current_thread().name, "model", "model"]
    assert [left.num_works for left in served.left] == [1, 1, 1, 1]


@on_a_loop
async def test_a_slow_work_is_not_computed_on_the_loop():
    served = Served(lambda _: time.sleep(0.05))
    for _ in range(3):
        await served.batcher.result(work(0, None, cost="slow"))
    assert set(served.threads) == {"model"}


@on_a_loop
async def test_a_request_of_many_quick_chunks_does_not_keep_the_loop_to_itself(any_is_quick):
    served = Served()
    await served.batcher.result(work(0, None, cost="quick"))
    turns = 0

    async def somebody_else() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    other = asyncio.create_task(somebody_else())
    for number in range(50):
        await served.batcher.result(work(number, None, cost="quick"), is_continued=True)
    assert turns >= 50
    other.cancel()


@on_a_loop
async def test_what_fails_on_the_loop_fails_alone(any_is_quick):
    served = Served(fail)
    await served.batcher.result(work("good", None, cost="quick"))
    with pytest.raises(ValueError, match="cannot be"):
        await served.batcher.result(work("bad", None, cost="quick"))
    assert await served.batcher.result(work("good", None, cost="quick")) == "good"


@on_a_loop
async def test_a_failure_does_not_tell_that_a_work_is_quick(any_is_quick):
    served = Served(lambda payload: ValueError("a bad one") if payload == "bad" else payload)
    with pytest.raises(ValueError, match="a bad one"):
        await served.batcher.result(work("bad", None, cost="unknown"))
    await served.batcher.result(work("good", None, cost="unknown"))
    assert served.threads == ["model", "model"]


# Bounds


@pytest.mark.parametrize("limits", [{"queue_rows": 10}, {"queue_bytes": 80}])
@on_a_loop
async def test_past_its_bound_the_queue_says_when_to_come_again(limits):
    served = Served(**limits)
    first = await served.occupied()
    tasks = served.ask(*(work(i) for i in range(12)))
    await settle()
    refused = [task.exception() for task in tasks if task.done()]
    assert len(refused) == 2
    assert all(isinstance(error, Busy) and 0.0 < error.retry_after_s <= Limits().time_limit_s for error in refused)
    (further,) = served.ask(work("further"), is_continued=True)  # of an answer that has begun
    await settle()
    assert not further.done()
    served.go()
    assert await asyncio.gather(first, *tasks[:10], further) == ["first", *range(10), "further"]


@on_a_loop
async def test_when_to_come_again_does_not_depend_on_works_whose_rows_tell_nothing():
    served = Served(lambda payload: time.sleep(0.01), queue_rows=10_000)
    await served.batcher.result(work("picture", None, num_rows=1))
    first = await served.occupied()
    (waits,) = served.ask(work("waits", num_rows=10_000))
    await settle()
    with pytest.raises(Busy) as busy:
        await served.batcher.result(work("late"))
    assert busy.value.retry_after_s == 0.1  # the least that is told: nothing else has been computed
    served.go()
    await asyncio.gather(first, waits)


@on_a_loop
async def test_a_work_larger_than_the_queue_is_admitted_when_nothing_waits():
    served = Served(queue_rows=10)
    first = await served.occupied()
    (large,) = served.ask(work("large", num_rows=1000))
    await settle()
    with pytest.raises(Busy):
        await served.batcher.result(work("small"))
    served.go()
    assert await asyncio.gather(first, large) == ["first", "large"]
    assert await served.batcher.result(work("small")) == "small"


@on_a_loop
async def test_a_computation_that_hangs_lets_its_requests_go_and_tells_how_long_it_has_hung():
    served = Served(time_limit_s=0.05)
    first = await served.occupied()
    (behind,) = served.ask(work("behind"))
    for task in (first, behind):
        with pytest.raises(TimeoutError):
            await task
    assert served.batcher.stuck_for_s >= 0.05
    assert served.batcher.num_rows == 0
    served.go()
    while served.batcher.stuck_for_s:
        await asyncio.sleep(0.001)
    after = None
    while after is None:
        with suppress(TimeoutError):  # the machine may be busy for so long
            after = await served.batcher.result(work("after"))
    assert after == "after"


@on_a_loop
async def test_whoever_waits_is_told_that_it_closes():
    served = Served()
    first = await served.occupied()
    (queued,) = served.ask(work("queued"))
    await settle()
    await served.batcher.close()
    for task in (first, queued):
        with pytest.raises(Closed):
            await task
    with pytest.raises(Closed):
        await served.batcher.result(work("late"))
    assert served.batcher.num_rows == 0
    served.go()


@pytest.mark.parametrize("seed", range(5))
@on_a_loop
async def test_in_any_order_with_clients_that_fail_and_vanish_each_gets_its_own_and_nothing_is_left(seed):
    rng = random.Random(seed)

    def compute(key: Hashable, payloads: Sequence[Any]) -> Any:
        assert key is None or all(payload[0] == key for payload in payloads)
        if key == "breaks":
            raise ValueError("all of them")
        return [ValueError(payload) if payload[1] % 7 == 0 else payload for payload in payloads]

    left: list[Left] = []
    batcher = Batcher(compute, Limits(batch_rows=16, target_wait_s=0.001, queue_rows=200), left.append)

    async def client(number: int) -> str:
        for _ in range(rng.randrange(4)):
            await asyncio.sleep(0)
        key = rng.choice(["a", "b", None, None, "breaks"])
        task = asyncio.create_task(
            batcher.result(work((key, number), key, rng.randrange(1, 20), 8, rng.choice([None, "cost"])))
        )
        if rng.random() < 0.2:
            await asyncio.sleep(rng.choice([0.0, 0.0005]))
            task.cancel()
        try:
            assert await task == (key, number)
        except asyncio.CancelledError:
            return "gone"
        except Busy:
            return "busy"
        except ValueError:
            assert key == "breaks" or number % 7 == 0
            return "failed"
        assert key != "breaks"
        assert number % 7
        return "served"

    ends = await asyncio.gather(*(client(number) for number in range(400)))
    assert {"gone", "failed", "served"} <= set(ends)
    assert batcher.num_rows == batcher.num_bytes == 0
    assert all(each.num_rows <= 16 or each.num_works == 1 for each in left if each.key is not None)
    await batcher.close()
