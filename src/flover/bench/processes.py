"""Concurrent processes, each with weights of its own: what one gets from N servers of one request on one device.

A process holds one `instances.Instance`; the parent has a thread for each, which hands it a job and waits for the
record. Processes share the clock (CLOCK_MONOTONIC). On a GPU they take turns, unless CUDA MPS runs.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import torch

from flover.bench.engines import Parting, new_records
from flover.bench.instances import DEFAULT_INSTANCES, Instance, InstancesSystem, Session, one_row
from flover.bench.records import Job, Record
from flover.config import EngineConfig, human
from flover.metrics import StepStats
from flover.resolve import memory_share

CONTEXT_BYTES = 600 << 20  # of a process on a GPU, beside what PyTorch allocates


class Process:
    """A process with an instance, as the parent's thread for it sees it.

    Args:
        threads, asleep: as of `Instance`.

    Raises:
        ValueError: it could not load its model.
    """

    def __init__(self, config: EngineConfig, threads: int, asleep: bool) -> None:
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, config, threads, asleep), daemon=True)
        self._process.start()
        theirs.close()
        self._answer()

    def _answer(self, *question: Any) -> Any:
        """What it says to a question, or first of all."""
        try:
            if question:
                self._pipe.send(question)
            answer = self._pipe.recv()
        except (EOFError, OSError):
            raise RuntimeError("a process of concurrent-processes has died") from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def serve(self, session: Session) -> list[StepStats]:
        """As `Instance.serve`; a session that stops waits for the request in flight."""
        steps: list[StepStats] = []
        try:
            self._answer("reset")
            while (index := session.waiting.get()) is not None:
                if not session.stop.is_set():
                    session.records[index], made = self._answer("serve", session.jobs[index], session.origin)
                    steps += made
                session.done.put(None)
        except BaseException as error:
            session.done.put(error)
            raise
        return steps

    def check(self, job: Job) -> None:
        """ValueError for a job that is too long."""
        self._answer("check", job)

    def logit_gaps(self, partings: Sequence[Parting]) -> list[float | None]:
        """`engines.logit_gaps`."""
        return list(self._answer("logit_gaps", partings))

    def close(self) -> None:
        self._pipe.close()  # it ends at that
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _serve(pipe: Connection, config: EngineConfig, threads: int, asleep: bool) -> None:
    """The process: one answer to each question, an exception if it cannot; ends with the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    try:
        instance = Instance(*one_row(config), threads, asleep, None)
        instance.core.warm_up()
        pipe.send(None)
    except Exception as error:
        pipe.send(ValueError(" ".join(str(error).split())))
        return
    answers: dict[str, Callable[..., Any]] = {
        "reset": Instance.reset,
        "serve": _serve_one,
        "check": Instance.check,
        "logit_gaps": Instance.logit_gaps,
    }
    while True:
        try:
            kind, *question = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(answers[kind](instance, *question))
        except Exception as error:
            pipe.send(type(error)(*error.args))


def _serve_one(instance: Instance, job: Job, origin: float) -> tuple[Record, list[StepStats]]:
    session, steps = Session([job], new_records([job]), origin), list[StepStats]()
    instance.serve_one(0, session, steps)
    return session.records[0], steps


class ProcessesSystem(InstancesSystem):
    """See the module.

    Args:
        config: the engine's; one row for each process, whose KV cache holds one request of max_model_len.
        count: processes; None: 32, or as many as max_num_seqs, the memory or, on a CPU, its cores allow.

    Raises:
        ValueError: more than fit, or not even one, with what they need; or as `EngineCore`.
    """

    def __init__(self, name: str, config: EngineConfig, count: int | None = None) -> None:
        cores, wanted = os.cpu_count() or 1, config.max_num_seqs or DEFAULT_INSTANCES
        config, resolved, _ = one_row(config)
        memory, device = resolved.memory, resolved.engine.device
        each = memory.weights + memory.step + memory.kv + (0 if device == "cpu" else CONTEXT_BYTES)
        most = int(memory.free * memory_share(resolved.engine, device) // each)
        count = count or max(1, min(DEFAULT_INSTANCES, wanted, most, cores if device == "cpu" else most))
        if count > most:
            raise ValueError(
                f"{count} processes need {human(count * each)} (weights {human(memory.weights)} and"
                f" {human(each - memory.weights)} each), {human(memory.free)} is free:"
                f" {name.partition(':')[0]}:{most} would fit"
            )
        if device == "cpu":
            config = replace(config, overlap_depth=0)
        super().__init__(f"{name.partition(':')[0]}:{count}", count)
        threads = max(1, (config.num_threads or torch.get_num_threads()) // count)
        config = replace(config, num_threads=None)
        try:
            for worker in self._workers:
                self.instances.append(worker.submit(Process, config, threads, count > cores).result())
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        for process in self.instances:
            if isinstance(process, Process):
                process.close()
        super().close()
