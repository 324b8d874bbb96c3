"""What the figures are measured with: `Bench` makes models and systems, serves jobs, and keeps finished pieces.

A piece is one system on one model for one group of figures. It is written when it is done, so that an interrupted run
goes on where it was, and figures that need the same runs (4a, 4b, 4c) share them. Whatever cannot run here (no memory,
an absent package) becomes a `Gap` in the figure, found before anything is loaded where it is a matter of size.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from flover.bench.figures.scale import Bytes, Scale
from flover.bench.records import Job, Run, System
from flover.bench.results import write_json
from flover.bench.systems import make_system
from flover.bench.workload import Interval, fixed, make_jobs
from flover.config import DTYPE_BYTES, EngineConfig, ModelConfig
from flover.engine.engine import detect_hardware, survey
from flover.models.loader import weight_bytes
from flover.resolve import resolve

Data = dict[str, Any]
OURS = "fused:move"  # the system that stands for Flover: the paper's buffer reordering


class MissingError(ValueError):
    """Something that cannot run here, in one line."""


@dataclass(slots=True)
class Figure:
    """What a figure function gives. `paper` and `ours` have the same keys where they can be compared.

    Args:
        verdict: begins with "Reproduced", "Partly" or "No", or with "Gap" if nothing could run.
        rows: of the figure's table, flat.
        tokens: rows of `agree`, one a run; none where no token is generated.
        plot: what the picture needs beside the rows.
    """

    paper: Data
    ours: Data
    verdict: str
    rows: list[Data]
    tokens: list[Data] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    gaps: list[Data] = field(default_factory=list)
    plot: Data = field(default_factory=dict)


def gap_figure(why: str) -> Figure:
    """A figure that could not run."""
    return Figure({}, {}, f"Gap: {why}", [], gaps=[{"what": "the figure", "why": why}])


def agree(tokens: Sequence[Sequence[int]], reference: Sequence[Sequence[int]]) -> Data:
    """Requests whose tokens are those of serial, and the first output position where another parts.

    A reference that is shorter is a prefix (greedy): only as many tokens are compared.
    """
    partings = []
    for ours, theirs in zip(tokens, reference, strict=False):
        pairs = zip(ours, theirs)
        parting = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        partings.append(parting)
    parted = [p for p in partings if p is not None]
    return {
        "requests": len(partings),
        "identical": len(partings) - len(parted),
        "first_parting": min(parted, default=None),
    }


class Bench:
    """Args: folder: of the output, which gets `pieces/`. models: a place for the config.json of each.

    Args:
        only: names of models to run; none: all of the scale. draws: of each Poisson gap, if not the scale's.
        say: gets a line before each piece that runs.
    """

    def __init__(
        self,
        scale: Scale,
        seed: int,
        folder: Path,
        models: Path,
        device: str = "auto",
        only: Sequence[str] = (),
        overwrite: bool = False,
        draws: int | None = None,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.scale, self.seed, self.folder, self.overwrite, self.say = scale, seed, folder, overwrite, say
        self.device = detect_hardware(device).device
        self.only, self.draws = tuple(only), draws or scale.draws
        self.models = [name for name in scale.shapes if not only or name in only]
        self._places = models
        self._fresh: set[str] = set()

    # ---- pieces ------------------------------------------------------------------------------------------------------

    @property
    def identity(self) -> Data:
        """What a stored result must have been made with to be used again."""
        name = torch.cuda.get_device_name() if self.device == "cuda" else "cpu"
        made = hashlib.sha256(repr(self.scale).encode()).hexdigest()[:12]
        settings = {"scale": self.scale.name, "sizes": made, "seed": self.seed, "device": name}
        return settings | {"models": list(self.only), "draws": self.draws}

    def piece(self, name: str, make: Callable[[], Data]) -> Data:
        """`make()`, or what an earlier run with the same settings stored under that name."""
        path = self.folder / "pieces" / f"{name.replace(':', '-').replace('/', '-')}.json"
        identity = {k: v for k, v in self.identity.items() if k not in ("models", "draws")}
        if path.exists() and (not self.overwrite or name in self._fresh):
            stored: Data = json.loads(path.read_text(encoding="utf-8"))
            if stored["identity"] == identity:
                return dict(stored["data"])
        self.say(name)
        data = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"identity": identity, "data": data})
        self._fresh.add(name)
        return json.loads(json.dumps(data))  # type: ignore[no-any-return]  # as a later run will read it

    # ---- models ------------------------------------------------------------------------------------------------------

    def has(self, *models: str) -> list[str]:
        """Those of the models that are run."""
        return [model for model in models if model in self.models]

    def model_folder(self, model: str) -> Path:
        folder = self._places / model
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.scale.shapes[model]), encoding="utf-8")
        return folder

    def bytes_of(self, model: str) -> Bytes:
        """Of a decode step, at true shape or at this scale's."""
        config = ModelConfig.from_dict(self.scale.shapes[model])
        dtype: torch.dtype = getattr(torch, self.scale.dtype)
        weights = weight_bytes(self.model_folder(model), config, dtype)
        return Bytes.of(self.scale.shapes[model], DTYPE_BYTES[self.scale.dtype], weights)

    def config(self, model: str, rows: int, limit: int) -> EngineConfig:
        """An engine for that many rows and tokens each.

        Raises:
            MissingError: it does not fit this machine, with the plan. Nothing has been loaded.
        """
        config = EngineConfig(
            model=str(self.model_folder(model)),
            load_format="dummy",
            dtype=self.scale.dtype,
            device=self.device,
            max_model_len=limit,
            max_num_seqs=rows,
            enable_prefix_caching=False,
            num_threads=self.scale.threads,
        )
        try:
            _, shape, hardware, weights = survey(config)
            resolve(replace(config, kv_layout="slab"), shape, hardware, weights)  # room for every row at its longest
        except ValueError as error:
            raise MissingError(f"{model} with {rows} rows of {limit} tokens: {error}") from None
        return config

    # ---- jobs and systems --------------------------------------------------------------------------------------------

    def jobs(self, model: str, count: int, num_output: int, arrivals: Any = None, lengths: Any = None) -> list[Job]:
        """Job i has the same prompt in every figure, so one serial run is the reference of all."""
        vocab = int(self.scale.shapes[model]["vocab_size"])
        outputs = lengths or fixed(num_output)
        limit = self.scale.num_prompt + num_output
        return make_jobs(arrivals or Interval(0), fixed(self.scale.num_prompt), outputs, count, vocab, self.seed, limit)

    def reference(self, model: str, count: int, num_output: int) -> Data:
        """Serial, all at once: `tokens` of each request, its `service` seconds, and the `single` request's (median)."""

        def make() -> Data:
            jobs = self.jobs(model, count, num_output)
            run = self._serve(model, "serial", {"": jobs}, 1)[""]
            ends = [record.times[-1] for record in run.records]
            service = [end - start for start, end in zip([0.0, *ends], ends)]
            tokens = [record.token_ids for record in run.records]
            return {"tokens": tokens, "service": service, "single": statistics.median(service)}

        return self.piece(f"serial-{model}-{count}x{num_output}", make)

    def measure(
        self,
        group: str,
        model: str,
        system: str,
        workloads: Mapping[str, Sequence[Job]],
        digest: Callable[[Run, Sequence[Job]], Data],
        label: str = "",
        rows: int | None = None,
    ) -> Data:
        """The digest of each workload on a system, which is loaded once.

        Args:
            label: of the piece, instead of the system's name. rows: of the engine; by default the most requests.

        Raises:
            MissingError: it cannot run here.
        """

        def make() -> Data:
            runs = self._serve(model, system, workloads, rows or max(map(len, workloads.values())))
            return {name: digest(run, workloads[name]) for name, run in runs.items()}

        return self.piece(f"{group}-{model}-{label or system}", make)

    def _serve(self, model: str, system: str, workloads: Mapping[str, Sequence[Job]], rows: int) -> dict[str, Run]:
        limit = max(len(job.prompt) + job.num_output for jobs in workloads.values() for job in jobs)
        config = self.config(model, rows, limit)
        try:
            server = make_system(system, config)
        except (ImportError, torch.OutOfMemoryError, ValueError) as error:
            raise MissingError(f"{system} on {model}: {' '.join(str(error).split())}") from None
        try:
            server.run(warm_up(max(workloads.values(), key=len)))
            runs = {name: self._fastest_run(server, jobs) for name, jobs in workloads.items()}
        finally:
            server.close()
        for name, run in runs.items():
            errors = [record.error for record in run.records if record.error]
            if errors:
                raise MissingError(f"{system} on {model}, {name or 'serial'}: {len(errors)} failed: {errors[0]}")
        return runs

    def _fastest_run(self, server: System, jobs: Sequence[Job]) -> Run:
        """Of as many as the scale asks for: what others on the machine take is no property of a system."""
        return min((server.run(jobs) for _ in range(self.scale.runs)), key=lambda run: run.duration)


def warm_up(jobs: Sequence[Job]) -> list[Job]:
    """One by one they join and one by one they end: a GPU compiles and captures what each number of rows needs."""
    return [Job(0.005 * i, job.prompt, min(job.num_output, 2 * len(jobs) + i)) for i, job in enumerate(jobs)]


def digest_of(reference: Sequence[Sequence[int]]) -> Callable[[Run, Sequence[Job]], Data]:
    """What most figures keep of a run. Seconds; rows are per step that computed something."""

    def digest(run: Run, jobs: Sequence[Job]) -> Data:
        steps = [s for s in run.steps if s.num_prefill_tokens or s.num_decode_tokens]
        num_tokens = sum(len(record.token_ids) for record in run.records)
        data: Data = {
            "requests": len(jobs),
            "seconds": run.duration,
            "tokens": num_tokens,
            "latency": statistics.fmean(record.e2e for record in run.records),
            "agree": agree([record.token_ids for record in run.records], reference),
        }
        if steps:
            data |= {
                "steps": len(steps),
                "rows_live": statistics.fmean(s.num_running for s in steps),
                "rows_computed": statistics.fmean(s.num_running + s.num_dead_rows for s in steps),
                "kv_moved_bytes": sum(s.kv_moved_bytes for s in run.steps),
                "kv_token_bytes_read": float(sum(s.kv_used_bytes for s in steps)),
            }
        return data

    return digest
