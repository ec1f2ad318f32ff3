"""The same answers in this process, in local processes and on a real Dask cluster."""

from __future__ import annotations

import gc
import logging
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
from distributed import Client, LocalCluster

from bitwright.errors import UsageError
from bitwright.search import workers
from bitwright.search.space import Plan
from bitwright.search.workers import open_pool
from tests.search.test_evaluator import NARROW, lenet_job, plans

TRIED: dict[int, Plan] = dict(enumerate([NARROW, *plans(1, 9)]))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A scheduler with two workers, each in a process of its own."""
    with LocalCluster(
        n_workers=2,
        threads_per_worker=1,
        memory_limit=0,
        dashboard_address=":0",
        silence_logs=logging.CRITICAL,
    ) as made:
        yield made


@pytest.fixture(scope="module")
def expected() -> dict[int, tuple[str, float | None, int]]:
    with open_pool(lenet_job(300)[0]) as pool:
        assert pool.workers == 1
        return {
            number: (result.status, result.error, result.samples)
            for number, result in pool.evaluate(TRIED)
        }


def found(pool: Any, limit: float | None = None) -> dict[int, tuple[str, float | None, int]]:
    return {
        number: (result.status, result.error, result.samples)
        for number, result in pool.evaluate(TRIED, limit)
    }


def test_local_processes_find_the_same(expected: dict[int, Any]) -> None:
    with open_pool(lenet_job(300)[0], workers=2) as pool:
        assert pool.workers == 2
        assert found(pool) == expected


def test_a_cluster_finds_the_same(cluster: Any, expected: dict[int, Any]) -> None:
    with open_pool(lenet_job(300)[0], scheduler=cluster.scheduler_address) as pool:
        assert pool.workers == 2
        assert found(pool) == expected
        assert all(status == "stopped" for status, _, _ in found(pool, -1.0).values())


def test_two_searches_share_a_cluster(cluster: Any, expected: dict[int, Any]) -> None:
    address = cluster.scheduler_address
    with (
        open_pool(lenet_job(300)[0], scheduler=address) as one,
        open_pool(lenet_job(200)[0], scheduler=address) as two,
    ):
        assert {n for _, _, n in found(two).values()} == {200}
        assert found(one) == expected


def test_a_worker_that_dies_costs_its_running_plan_alone(
    cluster: Any, expected: dict[int, Any]
) -> None:
    with (
        Client(cluster.scheduler_address) as client,
        open_pool(lenet_job(300)[0], scheduler=cluster.scheduler_address) as pool,
    ):
        results = pool.evaluate(TRIED)
        first, result = next(iter(results))
        processes = client.run(os.getpid)
        os.kill(next(iter(processes.values())), signal.SIGKILL)
        answers = {first: (result.status, result.error, result.samples)}
        answers |= {n: (r.status, r.error, r.samples) for n, r in results}
        assert answers == expected
        client.wait_for_workers(2, timeout=60)  # its nanny has started it again
        assert found(pool) == expected


def test_a_worker_that_comes_later_helps(cluster: Any, expected: dict[int, Any]) -> None:
    with open_pool(lenet_job(300)[0], scheduler=cluster.scheduler_address) as pool:
        cluster.scale(3)
        deadline = time.monotonic() + 60
        while pool.workers < 3 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert pool.workers == 3
        assert found(pool) == expected
        cluster.scale(2)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody will come."""
    monkeypatch.setattr(workers, "_CONNECT_SECONDS", 1)


@pytest.mark.usefixtures("impatient")
def test_a_cluster_that_is_not_there_is_refused() -> None:
    with (
        pytest.raises(UsageError, match=r"no Dask scheduler answers at tcp://127\.0\.0\.1:9"),
        open_pool(lenet_job(300)[0], scheduler="tcp://127.0.0.1:9"),
    ):
        pass
    # Collected later, it might block the start of another.
    assert {c.status for c in gc.get_objects() if type(c) is Client} <= {"closed"}


@pytest.mark.usefixtures("impatient")
def test_nonsense_is_refused() -> None:
    with (
        pytest.raises(UsageError, match="no Dask scheduler answers"),
        open_pool(lenet_job(300)[0], scheduler="nowhere"),
    ):
        pass
    with pytest.raises(UsageError, match="0 workers"), open_pool(lenet_job(300)[0], workers=0):
        pass


def test_a_cluster_without_workers_is_refused() -> None:
    with (
        LocalCluster(n_workers=0, dashboard_address=":0", silence_logs=logging.CRITICAL) as empty,
        pytest.raises(UsageError, match="has no workers"),
        open_pool(lenet_job(300)[0], scheduler=empty.scheduler_address),
    ):
        pass
