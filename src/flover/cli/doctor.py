"""`flover doctor`: is this installation fit to run, and if not, what to do."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

from rich.console import Console
from rich.text import Text

from flover.config import human

NEEDED = ("numpy", "safetensors", "tokenizers", "huggingface_hub", "jinja2", "msgspec", "typer", "rich")
OPTIONAL = {"matplotlib": 'pip install -e ".[plot]" for --timeline pictures'}
MIN_PYTHON, MIN_TORCH = (3, 10), (2, 9)
STYLES = {"ok": "green", "note": "yellow", "wrong": "bold red"}


class Finding(NamedTuple):
    """status: ok, note (works without) or wrong (does not); fix says what to do."""

    status: str
    name: str
    detail: str
    fix: str = ""


def run_doctor() -> int:
    """Print every finding; -> 1 if something needed is wrong."""
    console = Console(highlight=False, soft_wrap=True)
    wrong = False
    for check in (_python, _torch, _device, _triton, _packages, _model):
        for finding in _findings(check):
            wrong = wrong or finding.status == "wrong"
            line = Text.assemble((f"{finding.status:6}", STYLES[finding.status]), f"{finding.name:16} ", finding.detail)
            console.print(line)
            if finding.fix:
                console.print(Text(f"{'':23}-> {finding.fix}"))
    return int(wrong)


def _findings(check: Callable[[], list[Finding]]) -> list[Finding]:
    try:
        return check()
    except Exception as error:  # a check that fails is a finding too
        reason = " ".join(str(error).split())
        return [Finding("wrong", check.__name__.strip("_"), f"{type(error).__name__}: {reason}")]


def _python() -> list[Finding]:
    detail = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.version_info < MIN_PYTHON:
        return [Finding("wrong", "Python", detail, "Python 3.10 or newer is needed")]
    return [Finding("ok", "Python", detail)]


def _torch() -> list[Finding]:
    try:
        import torch
    except Exception as error:
        return [Finding("wrong", "torch", f"cannot be imported: {error}", "pip install 'torch>=2.9'")]
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    detail = f"{torch.__version__} ({build})"
    if tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < MIN_TORCH:
        return [Finding("wrong", "torch", detail, "pip install --upgrade 'torch>=2.9'")]
    if has_nvidia_gpu() and not torch.version.cuda:
        return [Finding("note", "torch", f"{detail}, beside a GPU", "install PyTorch's CUDA build to use the GPU")]
    return [Finding("ok", "torch", detail)]


def has_nvidia_gpu() -> bool:
    """Whether a driver is there, whatever torch thinks of it."""
    return shutil.which("nvidia-smi") is not None or os.path.exists("/dev/nvidia0")


def _device() -> list[Finding]:
    import torch

    from flover.engine.engine import detect_hardware

    hardware = detect_hardware("auto")
    if hardware.device == "cuda":
        name = f"{torch.cuda.get_device_name()} x {torch.cuda.device_count()}"
        return [Finding("ok", "device", f"{name}, {human(hardware.free_bytes)} free")]
    cores = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {human(hardware.free_bytes)} free"
    if has_nvidia_gpu() and torch.version.cuda:
        fix = "the driver may be too old for this torch: see nvidia-smi, update the driver or install an older build"
        return [Finding("note", "device", f"CPU, {cores}; torch sees no CUDA device though there is a driver", fix)]
    return [Finding("ok", "device", f"CPU, {cores}")]


def _triton() -> list[Finding]:
    import torch

    try:
        return [Finding("ok", "triton", version("triton"))]
    except PackageNotFoundError:
        if torch.cuda.is_available():
            return [Finding("note", "triton", "missing: torch kernels are used", "pip install triton")]
        return [Finding("ok", "triton", "not installed, not needed on a CPU")]


def _packages() -> list[Finding]:
    findings = []
    for name in (*NEEDED, *OPTIONAL):
        try:
            findings.append(Finding("ok", name, version(name)))
        except PackageNotFoundError:
            status = "note" if name in OPTIONAL else "wrong"
            findings.append(Finding(status, name, "missing", OPTIONAL.get(name, f"pip install {name}")))
    return findings


def _model() -> list[Finding]:
    """The built-in model is loaded and says a few words: everything above together."""
    from flover.llm import LLM
    from flover.sampling_params import SamplingParams

    with LLM(max_num_seqs=1, max_model_len=64) as llm:
        output = llm.generate("In the beginning", SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)[0]
    choice = output.outputs[0]
    if choice.error or not choice.text.strip():
        return [
            Finding("wrong", "model", f"the built-in model gave {choice.text!r}: {choice.error}", "reinstall flover")
        ]
    return [Finding("ok", "model", f"built-in: In the beginning{' '.join(choice.text.splitlines())}")]
