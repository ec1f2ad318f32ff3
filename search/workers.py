"""Where evaluations run: in this process, in local processes, or on a Dask cluster."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from bitwright.errors import UsageError, first_line
from bitwright.search.evaluator import EvaluationJob, Evaluator, PostTraining, Result
from bitwright.search.space import Plan

__all__ = ["Pool", "open_pool"]

_CONNECT_SECONDS = 5


class Pool(Protocol):
    """Runs evaluations."""

    @property
    def workers(self) -> int:
        """How many run at the same time."""

    def evaluate(
        self, plans: Mapping[int, Plan], limit: float | None = None
    ) -> Iterator[tuple[int, Result]]:
        """Yield number and result of each plan as soon as it is there; ``limit`` as in the job."""


class _Serial:
    """In this process, one after the other."""

    workers = 1

    def __init__(self, evaluator: Evaluator) -> None:
        self._evaluator = evaluator

    def evaluate(
        self, plans: Mapping[int, Plan], limit: float | None = None
    ) -> Iterator[tuple[int, Result]]:
        for number in _alike_first(plans):
            yield number, self._evaluator.evaluate(plans[number], limit=limit)


def _alike_first(plans: Mapping[int, Plan]) -> list[int]:
    """Numbers in such an order that plans that begin alike follow each other."""
    return sorted(plans, key=lambda n: [(p.weight_bits, p.activation_bits) for p in plans[n]])


# In a worker process: the evaluators of the jobs it was given, each used by one thread at a time.
_evaluators: dict[str, tuple[PostTraining, threading.Lock]] = {}
_names = itertools.count()


def install(name: str, job: EvaluationJob | None) -> None:
    """Make the evaluator of a job in this process, or (None) let go of it."""
    if job is None:
        _evaluators.pop(name, None)
    else:
        _evaluators[name] = (PostTraining(job), threading.Lock())


def _evaluate(name: str, plan: Plan, limit: float | None) -> Result:
    evaluator, lock = _evaluators[name]
    with lock:
        return evaluator.evaluate(plan, limit=limit)


class _Dask:
    """On the workers of a Dask cluster."""

    def __init__(self, client: Any, job: EvaluationJob) -> None:
        from distributed import WorkerPlugin

        class Setup(WorkerPlugin):
            """Gives the job to each worker, also to those that come later or come back."""

            def __init__(self, name: str) -> None:
                self.name = name

            # The class travels by value, so what it uses is imported where it arrives.
            def setup(self, worker: Any) -> None:  # noqa: ARG002 - Dask's protocol
                from bitwright.search.workers import install

                install(self.name, job)

            def teardown(self, worker: Any) -> None:  # noqa: ARG002
                from bitwright.search.workers import install

                install(self.name, None)

        self._client = client
        self._name = f"bitwright-{os.getpid()}-{next(_names)}"
        client.register_plugin(Setup(self._name))

    @property
    def workers(self) -> int:
        return max(len(self._client.scheduler_info(n_workers=-1)["workers"]), 1)

    def evaluate(
        self, plans: Mapping[int, Plan], limit: float | None = None
    ) -> Iterator[tuple[int, Result]]:
        from distributed import as_completed

        futures: dict[Any, int] = {
            self._client.submit(_evaluate, self._name, plans[number], limit, pure=False): number
            for number in _alike_first(plans)
        }
        try:
            for future in as_completed(futures, raise_errors=False):
                error = future.exception()
                if error is None:
                    yield futures[future], future.result()
                else:  # Dask has tried it on several workers
                    yield futures[future], Result("failed", None, message=first_line(error))
                future.release()
        finally:
            self._client.cancel(list(futures))

    def close(self) -> None:
        with contextlib.suppress(Exception):  # the cluster may be gone
            self._client.unregister_worker_plugin(self._name)


@contextmanager
def open_pool(
    job: EvaluationJob, *, workers: int = 1, scheduler: str | None = None
) -> Iterator[Pool]:
    """Open what evaluations run on.

    Parameters
    ----------
    job
        What the evaluators need.
    workers
        Local processes; 1 is this one.
    scheduler
        Address of a running Dask scheduler, ``tcp://host:port``, instead.

    Raises
    ------
    UsageError
        If the numbers make no sense, or nobody answers at the address.
    """
    if workers < 1:
        raise UsageError(f"{workers} workers are not possible", fix="use 1 or more")
    if scheduler is None and workers == 1:
        yield _Serial(PostTraining(job))
        return
    from distributed import Client, LocalCluster

    with contextlib.ExitStack() as stack:
        address: Any = scheduler
        if scheduler is None:
            address = stack.enter_context(
                LocalCluster(
                    n_workers=workers,
                    threads_per_worker=1,
                    memory_limit=0,
                    dashboard_address=":0",
                    silence_logs=logging.CRITICAL,
                )
            )
        try:
            client = stack.enter_context(Client(address, timeout=_CONNECT_SECONDS))
        except (OSError, ValueError, ImportError) as error:
            raise UsageError(
                f"no Dask scheduler answers at {scheduler} ({first_line(error)})",
                where="--scheduler",
                fix="start one (dask scheduler) and its workers, or use --workers",
            ) from error
        try:
            client.wait_for_workers(1, timeout=_CONNECT_SECONDS)
        except TimeoutError as error:
            raise UsageError(
                f"the Dask scheduler at {scheduler} has no workers",
                where="--scheduler",
                fix=f"start some: dask worker {scheduler} --nthreads 1",
            ) from error
        pool = _Dask(client, job)
        stack.callback(pool.close)
        yield pool
