"""Where evaluations run: in this process, in local processes, or on a Dask cluster."""

from __future__ import annotations

import contextlib
import gc
import itertools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError
from contextlib import contextmanager
from typing import Any, Protocol

from bitwright.errors import BitwrightError, RunError, UsageError, first_line
from bitwright.search.evaluator import EvaluationJob, Evaluator, PostTraining
from bitwright.search.results import Result
from bitwright.search.space import Plan

__all__ = ["Pool", "open_pool"]

_CONNECT_SECONDS = 20
_ALONE_SECONDS = 60  # a cluster may start a worker again


class Pool(Protocol):
    """Runs evaluations."""

    @property
    def workers(self) -> int:
        """How many run at the same time."""

    def evaluate(
        self,
        plans: Mapping[int, Plan],
        limit: float | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> Iterator[tuple[int, Result]]:
        """Yield number and result of each plan as soon as it is there.

        Parameters
        ----------
        plans
            Number to plan.
        limit
            The largest acceptable error; by default that of the job.
        stop
            Asked between results: whether to leave the others.
        """


class _Serial:
    """In this process, one after the other."""

    workers = 1

    def __init__(self, evaluator: Evaluator) -> None:
        self._evaluator = evaluator

    def evaluate(
        self,
        plans: Mapping[int, Plan],
        limit: float | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> Iterator[tuple[int, Result]]:
        for number in _alike_first(plans):
            if stop():
                return
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
        self,
        plans: Mapping[int, Plan],
        limit: float | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> Iterator[tuple[int, Result]]:
        from distributed import wait

        numbers: dict[Any, int] = {}
        alone = time.monotonic()
        try:
            for number in _alike_first(plans):
                future = self._client.submit(
                    _evaluate, self._name, plans[number], limit, pure=False
                )
                numbers[future] = number
            while numbers and not stop():
                try:
                    done = wait(list(numbers), timeout=1, return_when="FIRST_COMPLETED").done
                except TimeoutError:
                    done = set()
                if self._client.status != "running":
                    raise self._lost("the Dask scheduler is gone")
                if self._client.scheduler_info(n_workers=-1)["workers"]:
                    alone = time.monotonic()
                elif time.monotonic() - alone > _ALONE_SECONDS:
                    raise self._lost(f"there is no Dask worker any more since {_ALONE_SECONDS} s")
                for future in sorted(done, key=numbers.__getitem__):
                    number = numbers.pop(future)
                    error = future.exception()
                    if error is not None:  # of a worker; what a plan does is in its result
                        raise self._lost(f"workers fail ({first_line(error)})")
                    yield number, future.result()
        except (OSError, CancelledError) as error:
            raise self._lost(f"the Dask scheduler is gone ({first_line(error)})") from error
        finally:
            with contextlib.suppress(Exception):  # the cluster may be gone
                self._client.cancel(list(numbers))

    def _lost(self, what: str) -> RunError:
        return RunError(
            what,
            where="--scheduler",
            fix="everything finished is in the study; go on with bitwright search --resume",
        )

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
        # What Dask says about workers that come and go would stand between lines of ours.
        logger = logging.getLogger("distributed")
        stack.callback(logger.setLevel, logger.level)
        logger.setLevel(logging.CRITICAL + 1)
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
        reason = None
        try:
            client = stack.enter_context(Client(address, timeout=_CONNECT_SECONDS))
        except (OSError, ValueError, ImportError) as error:
            reason = first_line(error)
        if reason is not None:
            # The destructor of a client that failed waits for a lock that a client holds while it
            # starts; were the failed one collected just then, both would wait for ever.
            gc.collect()
            raise UsageError(
                f"no Dask scheduler answers at {scheduler} ({reason})",
                where="--scheduler",
                fix="start one (dask scheduler) and its workers, or use --workers",
            )
        try:
            client.wait_for_workers(1, timeout=_CONNECT_SECONDS)
        except TimeoutError as error:
            raise UsageError(
                f"the Dask scheduler at {scheduler} has no workers",
                where="--scheduler",
                fix=f"start some: dask worker {scheduler} --nthreads 1",
            ) from error
        try:
            pool = _Dask(client, job)
        except BitwrightError:
            raise
        except Exception as error:  # whatever a worker cannot import or read
            raise UsageError(
                f"the Dask workers cannot take the job ({first_line(error)})",
                where="--scheduler",
                fix="install bitwright and what your metric needs there, in the same versions",
            ) from error
        stack.callback(pool.close)
        yield pool
