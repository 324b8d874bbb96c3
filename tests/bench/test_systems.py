"""Every system serves a workload: the serial run's tokens, nothing before it arrives, batches as its policy says."""

from __future__ import annotations

import json
import random
import threading
import time
import weakref
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from flover.bench import engines, instances, processes, systems
from flover.bench.figures import servers
from flover.bench.records import Job, Record, Run
from flover.bench.systems import SystemMissing, check_name, make_system, same_tokens
from flover.bound import runner_of
from flover.config import EngineConfig, Hardware

VOCAB, LENGTH = 97, 96
ECHO = {
    "architectures": ["EchoModel"],
    "vocab_size": VOCAB,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": LENGTH,
    "eos_token_id": 5,
}
OURS = [
    "serial", "fused", "fused:off", "fused:move", "fused:indirect", "fused:paged",
    "dynamic", "dynamic:20ms", "concurrent:1", "concurrent:3", "concurrent-processes:2",
]  # fmt: skip


@pytest.fixture(scope="module")
def echo(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    """A model whose tokens are an exact hash of what its cache holds."""
    folder = tmp_path_factory.mktemp("systems")
    (folder / "config.json").write_text(json.dumps(ECHO))
    return EngineConfig(str(folder), load_format="dummy", device="cpu", max_num_seqs=8, num_threads=1)


def workload(count: int = 9, gap: float = 0.004, seed: int = 0) -> list[Job]:
    rng = random.Random(seed)
    prompts = [tuple(rng.randrange(VOCAB) for _ in range(rng.randint(1, 30))) for _ in range(count)]
    return [Job(gap * i, prompt, rng.choice((1, 7, 40))) for i, prompt in enumerate(prompts)]


def run(name: str, config: EngineConfig, jobs: list[Job], **options: Any) -> Run:
    system = make_system(name, config, **options)
    try:
        return system.run(jobs)
    finally:
        system.close()


@pytest.fixture(scope="module")
def serial(echo: EngineConfig) -> Run:
    return run("serial", echo, workload())


@pytest.mark.parametrize("name", OURS)
def test_a_system_serves_every_job_as_serial_does(echo: EngineConfig, serial: Run, name: str) -> None:
    jobs = workload()
    watched: list[tuple[Any, list[int]]] = []
    system = make_system(name, echo)
    for i in range(2):  # a second run finds nothing of the first
        result = system.run(jobs, lambda records: watched.append((records, [len(r.times) for r in records])))
        assert same_tokens(result, serial) == (1.0, None)
        assert watched[i][0] is result.records, "which fill as they are watched"
        assert watched[i][1] == [0] * len(jobs)
    system.close()
    assert result.system == system.name == name
    for job, record in zip(jobs, result.records):
        assert len(record.times) == len(record.token_ids) == job.num_output
        assert record.arrival == job.arrival < record.times[0]
        assert record.times == sorted(record.times)
        assert (record.num_prompt, record.error) == (len(job.prompt), None)
    assert sum(step.num_prefill_tokens for step in result.steps) == sum(len(job.prompt) for job in jobs)
    assert all(0 <= step.start <= step.end <= result.duration for step in result.steps if step.num_running)


def test_serial_runs_one_row_and_fused_many(echo: EngineConfig) -> None:
    jobs = [Job(0.0, (i,), 30) for i in range(6)]
    assert max(step.num_running for step in run("serial", echo, jobs).steps) == 1
    assert max(step.num_running for step in run("fused", echo, jobs).steps) == 6


def test_serial_is_first_come_first_served(echo: EngineConfig) -> None:
    records = run("serial", echo, [Job(0.0, (i,), 5) for i in range(4)]).records
    assert all(a.times[-1] < b.times[0] for a, b in pairwise(records))


# ---- waiting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fused", "dynamic:20ms", "concurrent:2"])
def test_an_idle_system_sleeps(echo: EngineConfig, name: str) -> None:
    system = make_system(name, echo)
    before = time.process_time()
    result = system.run([Job(0.0, (1,), 1), Job(0.4, (2,), 1)])
    busy = time.process_time() - before
    system.close()
    assert result.records[1].times[0] > 0.4
    assert busy < 0.2


def test_waiting_ends_soon_after_the_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    now, sleeps = [0.0], []

    def sleep(seconds: float) -> None:
        sleeps.append(seconds)
        now[0] += seconds + 0.4e-3  # the system wakes no one exactly

    monkeypatch.setattr(engines.time, "sleep", sleep)
    engines.wait_until(5.0, lambda: now[0])
    assert 5.0 <= now[0] < 5.0 + 0.6e-3
    assert len(sleeps) < 10


# ---- dynamic ---------------------------------------------------------------------------------------------------------


def test_a_window_makes_a_batch_that_leaves_together(echo: EngineConfig) -> None:
    jobs = [Job(0.0, (1, 2), 5), Job(0.05, (3,), 40), Job(0.1, (4,), 9), Job(0.6, (5,), 3)]
    result = run("dynamic:200ms", echo, jobs)
    ends = [set(record.times) for record in result.records]
    assert ends[0] == ends[1] == ends[2] != ends[3]
    assert all(len(end) == 1 for end in ends)
    assert result.steps[0].start >= 0.2
    assert min(ends[3]) >= 0.8
    assert max(step.num_running for step in result.steps) == 3
    assert max(step.num_dead_rows for step in result.steps) == 2  # the short ones wait for the long one


def test_streamed_tokens_keep_their_own_times(echo: EngineConfig) -> None:
    jobs = [Job(0.0, (1, 2), 5), Job(0.0, (3,), 40)]
    short, long = run("dynamic", echo, jobs, stream=True).records
    assert short.times[-1] < long.times[-1]
    assert len(set(long.times)) == 40


def test_who_comes_while_a_batch_runs_waits_for_its_end(echo: EngineConfig) -> None:
    jobs = [Job(0.0, (1,), 90), Job(0.002, (2,), 2), Job(0.012, (3,), 6)]
    first, second, third = run("dynamic", echo, jobs).records
    assert second.times[-1] == third.times[-1] > first.times[-1]  # and then they are a batch


def test_a_preferred_size_does_not_wait(echo: EngineConfig) -> None:
    jobs = [Job(0.0, (1,), 3), Job(0.0, (2,), 3), Job(0.0, (3,), 3)]
    records = run("dynamic:300ms:2", echo, jobs).records
    assert records[0].times == records[1].times
    assert records[1].times[-1] < records[2].times[0]
    assert records[2].times[0] >= 0.3


def test_a_batch_with_more_prompt_than_a_step_takes_is_still_one_batch(echo: EngineConfig) -> None:
    config = EngineConfig(echo.model, load_format="dummy", device="cpu", max_num_batched_tokens=32, num_threads=1)
    jobs = [Job(0.0, tuple(range(i, i + 20)), 20) for i in range(4)]
    result = run("dynamic", config, jobs)
    assert max(step.num_running for step in result.steps) == 4
    assert len({record.times[-1] for record in result.records}) == 1
    assert same_tokens(result, run("serial", config, jobs)) == (1.0, None)


# ---- concurrent ------------------------------------------------------------------------------------------------------


def spans(result: Run) -> list[tuple[float, float]]:
    return sorted((record.times[0], record.times[-1]) for record in result.records)


def test_two_instances_are_in_flight_at_once_and_one_is_not(echo: EngineConfig) -> None:
    jobs = [Job(0.0, (i,), 90) for i in range(2)]
    (_, end), (start, _) = spans(run("concurrent:2", echo, jobs))
    assert start < end
    (_, end), (start, _) = spans(run("concurrent:1", echo, jobs))
    assert start > end


def test_instances_share_weights_and_nothing_else(echo: EngineConfig) -> None:
    system = make_system("concurrent:3", echo)
    assert isinstance(system, instances.ConcurrentSystem)
    runners = [one.core._executor._runner for one in system.instances]  # type: ignore[attr-defined]
    assert len({id(runner.model) for runner in runners}) == 1
    assert len({tensor.data_ptr() for runner in runners for tensor in runner.storage.k + runner.storage.v}) == 12
    assert len({id(runner.sampler) for runner in runners}) == 3
    system.close()


def test_more_instances_than_fit_are_refused(echo: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    each = LENGTH * 2 * 2 * 2 * 4 * 4  # K and V, layers, heads, head_dim, bytes
    monkeypatch.setattr("flover.engine.engine.detect_hardware", lambda device: Hardware("cpu", int(4.5 * each / 0.9)))
    with pytest.raises(ValueError, match=r"^5 instances need 60\.0 KiB .*concurrent:4 would fit$"):
        make_system("concurrent:5", echo)
    for cores, count in ((64, 4), (2, 2)):
        monkeypatch.setattr(instances.os, "cpu_count", lambda cores=cores: cores)
        system = make_system("concurrent", echo)
        assert isinstance(system, instances.ConcurrentSystem)
        assert system.count == count
        system.close()


def test_more_processes_than_fit_are_refused(echo: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    each = LENGTH * 2 * 2 * 2 * 4 * 4
    monkeypatch.setattr("flover.engine.engine.detect_hardware", lambda device: Hardware("cpu", int(4.5 * each / 0.9)))
    with pytest.raises(ValueError, match=r"^5 processes need 60\.0 KiB .*concurrent-processes:4 would fit$"):
        make_system("concurrent-processes:5", echo)


def test_what_a_process_cannot_do_is_raised_here(echo: EngineConfig) -> None:
    system = make_system("concurrent-processes:1", echo)
    with pytest.raises(ValueError, match="context of 96"):
        system.run([Job(0.0, (1,) * 90, 20)])
    assert isinstance(system, instances.InstancesSystem)
    process = system.instances[0]
    assert isinstance(process, processes.Process)
    process._process.kill()
    with pytest.raises(RuntimeError, match="has died"):
        system.run([Job(0.0, (1,), 1)])
    system.close()


def test_an_instance_that_fails_ends_the_run(echo: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    system = make_system("concurrent:2", echo)
    assert isinstance(system, instances.ConcurrentSystem)
    with monkeypatch.context() as patch:
        patch.setattr(system.instances[1].core, "step", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            system.run([Job(0.0, (i,), 40) for i in range(4)])
    system.close()


@pytest.mark.parametrize("name", ["serial", "fused:move", "dynamic", "concurrent:2"])
def test_logits_are_looked_at_where_runs_part(echo: EngineConfig, name: str) -> None:
    system = make_system(name, echo)
    assert isinstance(system, engines.EngineSystem | instances.InstancesSystem)
    token = system.run([Job(0.0, (5, 6, 7), 1)]).records[0].token_ids[0]
    gaps = system.logit_gaps([engines.Parting([5, 6, 7], token, other) for other in range(VOCAB)])
    system.close()
    known = [gap for gap in gaps if gap is not None]
    assert len(known) == engines.BEST
    assert gaps[token] == 0
    assert min(known) == 0 < max(known)  # the token that was drawn has the highest


def test_the_clock_of_reordering_sees_moves_and_goes_away(echo: EngineConfig) -> None:
    jobs = [Job(0.0, (i,), 4 + 9 * (i % 3)) for i in range(1, 7)]
    system = make_system("fused:move", echo)
    assert isinstance(system, engines.EngineSystem)
    ops = runner_of(system.core).storage._ops
    result = system.run(jobs)
    assert sum(step.kv_moved_bytes for step in result.steps) > 0
    assert 0 < result.reorder_host < result.duration
    assert result.reorder_device == 0
    assert runner_of(system.core).storage._ops is ops
    assert not {"reorder", "relocate"} & (
        vars(system.core.scheduler.kv).keys() | vars(runner_of(system.core).sampler).keys()
    )
    system.close()


# ---- the ends --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["serial", "fused:off", "dynamic", "concurrent:2"])
def test_a_job_that_is_too_long_is_refused_before_anything_runs(echo: EngineConfig, serial: Run, name: str) -> None:
    system = make_system(name, echo)
    with pytest.raises(ValueError, match="context of 96"):
        system.run([Job(0.0, (1,), 1), Job(9.0, (1,) * 90, 20)])
    assert same_tokens(system.run(workload()), serial) == (1.0, None)
    system.close()


@pytest.mark.parametrize("name", ["serial", "fused", "dynamic", "concurrent:2"])
def test_an_interrupted_system_can_run_again(
    echo: EngineConfig, serial: Run, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def after_the_first(system: Any, session: instances.Session) -> None:
        for i in range(len(session.jobs)):
            session.waiting.put(i)
        session.done.get()
        raise KeyboardInterrupt

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    system = make_system(name, echo)
    with monkeypatch.context() as patch:
        patch.setattr(instances.InstancesSystem, "_feed", after_the_first)
        patch.setattr(engines, "take_finished", interrupt)
        with pytest.raises(KeyboardInterrupt):
            system.run([Job(0.0, (1,), 1), *(Job(0.0, (i,), 80) for i in range(8))])
    again = system.run(workload())
    assert same_tokens(again, serial) == (1.0, None)
    assert all(len(record.times) == len(record.token_ids) for record in again.records)
    system.close()


@pytest.mark.parametrize("name", ["serial", "dynamic", "concurrent:2"])
def test_a_closed_system_holds_nothing(echo: EngineConfig, name: str) -> None:
    others = set(threading.enumerate())
    system = make_system(name, echo)
    cores = [one.core for one in system.instances] if name == "concurrent:2" else [system.core]  # type: ignore[attr-defined]
    caches = [weakref.ref(core._executor._runner.storage) for core in cores]
    del cores
    system.run(workload(2))
    system.close()
    assert [cache() for cache in caches] == [None] * len(caches)
    assert set(threading.enumerate()) <= others


# ---- names and comparison --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("vllm", "unknown system 'vllm'; known: serial, fused"),
        ("serial:2", "unknown system"),
        ("fused:slab", "unknown system"),
        ("fused:MODE:tpN", "unknown system 'fused:MODE:tpN'"),
        ("fused:", "unknown system"),
        ("transformers:fast", "unknown system"),
        ("dynamic:DELAY", "50ms or 2s"),
        ("dynamic:5min", "50ms or 2s"),
        ("dynamic:5min:4", "'dynamic:5min:4' needs a delay"),
        ("dynamic:50ms:", "'dynamic:50ms:' needs a delay over 0 and sizes"),
        ("dynamic:50ms:4,x", "'dynamic:50ms:4,x' needs a delay over 0 and sizes"),
        ("dynamic:50ms:0,4", "such as dynamic:50ms:4,8"),
        ("dynamic:0:4", "'dynamic:0:4' needs a delay over 0"),
        ("concurrent:0", "from 1 to 9999"),
        ("concurrent:N", "from 1 to 9999"),
        ("openai:localhost", "http://localhost:8000"),
    ],
)
def test_a_name_that_is_not_known_is_refused_in_one_line(echo: EngineConfig, name: str, said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        make_system(name, echo)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=said):
        check_name(name)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("concurrent:2", {"tensor_parallel_size": 2}, "concurrent:2 has no ranks, got tensor_parallel_size=2, pipe"),
        ("concurrent-processes", {"pipeline_parallel_size": 2}, "concurrent-processes has no ranks"),
        ("transformers", {"tensor_parallel_size": 2}, "transformers has no ranks"),
        ("transformers", {"quantization": "int8"}, "transformers has no quantization='int8' of ours"),
        ("transformers:batch", {"kv_cache_dtype": "fp8"}, "has no kv_cache_dtype='fp8' of ours"),
    ],
)
def test_a_setting_that_a_system_lacks_is_refused(
    echo: EngineConfig, name: str, change: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        make_system(name, replace(echo, **change))


def test_an_unknown_option_is_refused(echo: EngineConfig) -> None:
    with pytest.raises(ValueError, match="dynamic has no option 'window'; it has stream, max_batch"):
        make_system("dynamic", echo, window=2)


@pytest.mark.parametrize(
    ("name", "layout", "reorder", "ranks"),
    [("fused", "paged", "move", 1), ("fused:tp2", "paged", "move", 2), ("fused:off:tp4", "slab", "off", 4)],
)
def test_what_a_name_of_fused_sets(echo: EngineConfig, name: str, layout: str, reorder: str, ranks: int) -> None:
    config = systems._fused(name, echo)
    assert (config.kv_layout, config.reorder, config.tensor_parallel_size) == (layout, reorder, ranks)


@pytest.mark.parametrize(
    ("text", "seconds", "sizes"),
    [("50ms", 0.05, ()), ("2s", 2.0, ()), ("16", 16.0, ()), ("0", 0.0, ()), ("", 0.0, ()), ("0.5s:4,8", 0.5, (4, 8))],
)
def test_details_of_dynamic(text: str, seconds: float, sizes: tuple[int, ...]) -> None:
    assert systems.parse_dynamic(text) == (seconds, sizes)


def test_a_preferred_size_that_no_batch_can_have_is_refused(echo: EngineConfig) -> None:
    with pytest.raises(ValueError, match=r"a preferred batch size must be in \[1, 8\], got 9"):
        make_system("dynamic:50ms:4,9", echo)


def test_a_figure_s_dynamic_system_takes_the_delay_and_sizes_of_the_next_name(echo: EngineConfig) -> None:
    kept = servers.Servers()
    first = kept.get("dynamic:20ms:2", echo, workload(2))
    second = kept.get("dynamic:40ms", echo, workload(2))
    assert isinstance(second, engines.DynamicSystem)
    assert first is second, "loaded once"
    assert (second.name, second.delay, second.preferred) == ("dynamic:40ms", 0.04, ())
    kept.close()


def test_a_list_of_names_keeps_the_sizes_of_each() -> None:
    names = systems.split_names("serial, dynamic:50ms:4,8 ,dynamic:2s:4, 16,fused,,fused")
    assert names == ["serial", "dynamic:50ms:4,8", "dynamic:2s:4,16", "fused"]


def test_same_tokens_gives_the_share_and_the_first_difference() -> None:
    def of(*rows: list[int]) -> Run:
        return Run("x", [Record(0.0, 1, token_ids=row) for row in rows])

    reference = of([1, 2, 3], [4, 5, 6], [7], [8])
    assert same_tokens(of([1, 2, 3], [4, 5, 6], [7], [8]), reference) == (1.0, None)
    assert same_tokens(of([1, 2, 9], [4, 0, 6], [7], [8]), reference) == (0.5, 1)
    assert same_tokens(of([1, 2, 3], [4, 5], [7], [8]), reference) == (0.75, 2)
    with pytest.raises(ValueError, match="1 records cannot be compared with 4"):
        same_tokens(of([1]), reference)
    assert issubclass(SystemMissing, ValueError)
