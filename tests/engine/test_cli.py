"""The command line, run in this process: results, resumption, and one line for every mistake."""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import flover
from flover.cli import main
from flover.cli.jobs import OutputFile, read_jobs
from flover.config import EngineConfig
from flover.llm import LLM
from flover.server.config import ServerConfig

BUILTIN = Path(flover.__file__).parent / "builtin" / "kjv-llama"
SMALL = ["--max-model-len", "256", "--max-num-seqs", "8", "--device", "cpu"]
DEMO = Path(__file__).parents[2] / "examples" / "demo.jsonl"


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def results(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- generate ----------------------------------------------------------------------------------------------


def test_one_prompt_gives_the_bare_text(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "In the beginning", "-n", "12", "--temperature", "0", *SMALL]) == 0
    out, err = capfd.readouterr()
    with LLM(max_model_len=256, max_num_seqs=8, device="cpu") as llm:
        params = flover.SamplingParams(temperature=0, max_tokens=12)
        expected = llm.generate("In the beginning", params)[0].outputs[0].text
    assert out == expected + "\n"
    assert err == ""


def test_several_prompts_in_order(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "And God said", "In the", "-n", "5", "--ignore-eos", *SMALL]) == 0
    out = capfd.readouterr().out
    assert out.startswith("[0] And God said")
    assert "\n[1] In the" in out
    assert "2 requests, " in out.splitlines()[-1]
    assert "10 output tokens" in out.splitlines()[-1]


def test_demo_with_timeline(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    timeline = tmp_path / "t.json"
    assert main(["generate", "--input", str(DEMO), "--timeline", str(timeline), "--device", "cpu"]) == 0
    out = capfd.readouterr().out
    jobs = read_jobs(DEMO)
    assert len(jobs) == 12
    assert [out.index(f"[{job.request_id}] {job.prompt['prompt']}") for job in jobs] == sorted(
        out.index(f"[{job.request_id}] ") for job in jobs
    )
    steps = json.loads(timeline.read_text())["steps"]
    assert len({name for step in steps for name in step["rows"]}) == 12
    joins = [step["step"] for step in steps if step["joins"]]
    assert len(joins) > 5, "they join at different moments"
    assert any(step["relocations"] for step in steps)


def test_options_reach_the_engine(capfd: pytest.CaptureFixture[str]) -> None:
    args = ["--explain", "--kv-layout", "slab", "--no-enable-prefix-caching", "--top-k", "5", "--seed", "9"]
    assert main(["generate", *args, *SMALL]) == 0
    lines = {line.split()[0]: line.split() for line in capfd.readouterr().err.splitlines() if line.strip()}
    assert lines["kv_layout"][1:3] == ["slab", "given"]
    assert lines["top_k"][1:3] == ["5", "given"]
    assert lines["seed"][1:3] == ["9", "given"]
    assert lines["temperature"][1:3] == ["0.8", "checkpoint"]
    assert lines["max_tokens"][1:3] == ["128", "default"]
    assert lines["dtype"][1:3] == ["float32", "machine"]
    assert float(lines["total"][1]) > float(lines["weights"][1]) > 0
    assert lines["weights"][3] == "GB,"


def test_sampling_defaults_of_the_checkpoint_can_be_left_out(capfd: pytest.CaptureFixture[str]) -> None:
    for word, temperature in (("openai", "1.0"), ("model", "0.8")):
        assert main(["generate", "--explain", "--sampling-defaults", word, *SMALL]) == 0
        lines = {line.split()[0]: line.split() for line in capfd.readouterr().err.splitlines() if line.strip()}
        assert lines["temperature"][1] == temperature


# ---- files -------------------------------------------------------------------------------------------------


def jobs_file(tmp_path: Path) -> Path:
    return write(
        tmp_path / "in.jsonl",
        {"prompt": "In the beginning", "id": "a"},
        {"prompt_token_ids": [5, 6, 7], "sampling_params": {"max_tokens": 3, "logprobs": 1, "prompt_logprobs": 0}},
        "",
        {"messages": [{"role": "user", "content": "Who art thou?"}], "sampling_params": {"n": 2}},
        {"prompt": "And he said", "arrival_step": 3, "sampling_params": {"seed": 4}},
    )


def test_output_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source, target = jobs_file(tmp_path), tmp_path / "out.jsonl"
    args = ["generate", "--input", str(source), "--output", str(target), "-n", "8", "--ignore-eos", *SMALL]
    assert main(args) == 0
    out, err = capfd.readouterr()
    assert out == ""
    assert "4 requests" in err
    lines = sorted(results(target), key=lambda line: line["index"])
    assert [line["id"] for line in lines] == ["a", "1", "2", "3"]
    assert lines[0]["prompt"] == "In the beginning"
    assert len(lines[0]["outputs"][0]["token_ids"]) == 8
    assert len(lines[1]["outputs"][0]["logprobs"]) == 3
    assert lines[1]["prompt_logprobs"][0] is None
    assert len(lines[2]["outputs"]) == 2
    assert lines[2]["prompt"] == "Who art thou?\n"

    before = target.read_bytes()
    assert main(args) == 0, "all done: nothing to do"
    assert target.read_bytes() == before


def test_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    """Also where seeds are the engine's: they go by line."""
    source, target, torn = jobs_file(tmp_path), tmp_path / "out.jsonl", tmp_path / "torn.jsonl"
    args = ["generate", "--input", str(source), "-n", "8", "--ignore-eos", "--temperature", "1", *SMALL]
    assert main([*args, "--output", str(target)]) == 0
    lines = target.read_text().splitlines(keepends=True)
    torn.write_text(lines[1] + lines[2][:40])
    assert main([*args, "--output", str(torn)]) == 0
    assert torn.read_text().startswith(lines[1])

    def tokens(path: Path) -> dict[str, Any]:
        return {line["id"]: [choice["token_ids"] for choice in line["outputs"]] for line in results(path)}

    assert tokens(torn) == tokens(target)


@pytest.mark.parametrize(
    "line", ['{"index": 0}', '{"index": 9, "id": "a"}', "[]", "nonsense", '{"index": 0, "id": "b"}']
)
def test_foreign_output_file_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str], line: str) -> None:
    source, target = jobs_file(tmp_path), write(tmp_path / "out.jsonl", line)
    assert main(["generate", "--input", str(source), "--output", str(target), *SMALL]) == 2
    assert f"{target}:1 is no result of this input" in capfd.readouterr().err
    assert target.read_text() == line + "\n"


def test_other_prompt_in_output_file_is_refused(tmp_path: Path) -> None:
    jobs = read_jobs(jobs_file(tmp_path))
    target = write(tmp_path / "out.jsonl", {"index": 0, "id": "a", "prompt": "Something else"})
    with pytest.raises(ValueError, match="no result of this input"):
        OutputFile(target, jobs)


def test_lines_without_an_id_get_one_that_no_other_has(tmp_path: Path) -> None:
    lines = [{"prompt": "a", "id": 1}, {"prompt": "b"}, {"prompt": "c"}, {"prompt": "d", "id": "1_"}]
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [job.request_id for job in read_jobs(path)] == ["1", "1__", "2", "1_"]


BAD_LINES: list[tuple[Any, str]] = [
    ("{", "in.jsonl:2: "),
    ("[1]", "in.jsonl:2: a line must be a JSON object, got [1]"),
    ({"promt": "x"}, "in.jsonl:2: unknown key 'promt'; did you mean 'prompt'?"),
    ({"id": "x"}, "in.jsonl:2: give exactly one of prompt, prompt_token_ids, messages, got none"),
    ({"prompt": "x", "messages": []}, "in.jsonl:2: give exactly one of"),
    ({"prompt": "x", "id": "a"}, "in.jsonl:2: id 'a' is that of line 1 already"),
    ({"prompt": "x", "id": ""}, "in.jsonl:2: id must be a non-empty string"),
    ({"prompt": "x", "arrival_step": -1}, "in.jsonl:2: arrival_step must be"),
    ({"prompt": "x", "sampling_params": 3}, "in.jsonl:2: sampling_params must be an object"),
    ({"prompt": "x", "sampling_params": {"top_q": 1}}, "in.jsonl:2: unknown sampling parameter 'top_q'"),
    ({"prompt": "x", "sampling_params": {"top_p": 2}}, "in.jsonl:2: top_p must be in [0, 1], got 2"),
    ({"prompt": ""}, "in.jsonl:2: prompt is empty"),
    ({"prompt": 3}, "in.jsonl:2: prompt must be text, got 3"),
    ({"prompt_token_ids": [99999]}, "in.jsonl:2: prompt_token_ids holds 99999"),
    ({"prompt_token_ids": [5] * 300}, "in.jsonl:2: a prompt of 300 tokens is longer than the context of 256"),
    ({"messages": "hi"}, "in.jsonl:2: messages must be"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_bad_lines(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, line: Any, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "in.jsonl", {"prompt": "x", "id": "a"}, line, {"prompt": "y"})
    assert main(["generate", "--input", "in.jsonl", "--output", "out.jsonl", *SMALL]) == 2
    out, err = capfd.readouterr()
    assert err.startswith(f"flover: error: {message}")
    assert len(err.splitlines()) == 1
    assert out == ""
    assert not (tmp_path / "out.jsonl").exists(), "nothing half-written"


# ---- mistakes ----------------------------------------------------------------------------------------------

MISTAKES: list[tuple[list[str], str]] = [
    (["generate"], "give a prompt, or --input"),
    (["generate", ""], "prompt is empty"),
    (["generate", "x", "--temprature", "1"], "No such option: --temprature"),
    (["generate", "x", "--temperature", "warm"], "Invalid value for '--temperature'"),
    (["generate", "x", "--max-num-seqs", "few"], "'few'"),
    (["generate", "x", "--temperature", "nan"], "temperature must be in"),
    (["generate", "x", "--top-p", "0"], "top_p must be in (0, 1], got 0"),
    (["generate", "x", "--logit-bias", "5"], "logit_bias must be ID=VALUE, got '5'"),
    (["generate", "x", "--logit-bias", "99999=1"], "logit_bias holds 99999"),
    (["generate", "x", "--kv-layout", "heap"], "kv_layout must be one of paged, slab, got 'heap'"),
    (["generate", "x", "--max-model-len", "0"], "max_model_len must be"),
    (["generate", "x", "--max-model-len", "9999"], "max_model_len=9999 is longer than the model's 1024"),
    (["generate", "x", "--model", "nowhere/at/all"], "model 'nowhere/at/all' does not exist"),
    (["generate", "x", "--timeline", "t.gif"], "timeline must end in .png or .json"),
    (["generate", "x", "--timeline", "/proc/t.json"], "--timeline: /proc/t.json cannot be written: "),
    (["generate", "x", "--timeline", "no/t.png"], "timeline folder no does not exist"),
    (["generate", "x", "--input", "y"], "give prompts or --input, not both"),
    (["generate", "x", "--output", "y"], "--output needs --input"),
    (["generate", "--input", "nowhere.jsonl"], "nowhere.jsonl: No such file or directory"),
    (["generate", "--input", "empty.jsonl"], "empty.jsonl holds no prompt"),
    (["generate", "--input", "binary.jsonl"], "binary.jsonl is not UTF-8"),
    (["generate", "--input", "."], ".: Is a directory"),
    (["generate", "x", "--model", "empty"], "empty"),
    (["generate", "x", "--kv-cache-memory-bytes", "99999999999999"], "does not fit"),
    (["plan", "--model", "empty"], "empty"),
    (["plan", "--dtype", "int3"], "dtype must be one of"),
    (["chat", "--model", "untold"], "has no chat template"),
    (["chat", "--top-p", "7"], "top_p must be in"),
    (["nonsense"], "No such command 'nonsense'"),
]


@pytest.mark.parametrize(("args", "message"), MISTAKES)
def test_mistakes_are_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, args: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "empty.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(b'{"prompt": "\xff"}\n')
    (tmp_path / "empty").mkdir()
    if "untold" in args:
        shutil.copytree(BUILTIN, tmp_path / "untold")
        config = json.loads((BUILTIN / "tokenizer_config.json").read_text())
        del config["chat_template"]
        (tmp_path / "untold" / "tokenizer_config.json").write_text(json.dumps(config))
    assert main(args) == 2
    err = capfd.readouterr().err
    assert err.startswith("flover: error: ")
    assert message in err
    assert len(err.splitlines()) == 1


def test_a_failed_request_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    """Its only token is masked."""
    args = ["generate", "x", "--allowed-token-ids", "0", "--min-tokens", "2", *SMALL]
    assert main(args) == 1
    assert "flover: error: request 0: no token is left to choose" in capfd.readouterr().err


# ---- the other commands ------------------------------------------------------------------------------------


def test_version_and_help(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capfd.readouterr().out == f"flover {flover.__version__}\n"
    for args in ([], ["--help"], ["generate", "--help"], ["plan", "--help"]):
        assert main(args) == 0
        assert "Usage:" in capfd.readouterr().out
    main(["generate", "--help"])
    words = " ".join(capfd.readouterr().out.replace("│", " ").split())
    assert "--n <int> choices per prompt; -n is --max-tokens" in words
    assert "--max-tokens -n <int> output limit in tokens" in words


def test_help_and_version_import_no_torch() -> None:
    code = "import sys; from flover.cli import main; main(['--version']); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env=dict(os.environ, PYTHONPATH=str(BUILTIN.parents[2])))


def test_plan(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--device", "cpu", "--num-kv-blocks", "100", "--max-model-len", "200"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert any("KV per token" in line and "4096 bytes" in line for line in lines)
    assert any("100 blocks of 16 tokens, 6.2 MiB" in line for line in lines)
    table = [line.split()[:2] for line in lines[-2:]]
    assert table == [["128", "12"], ["200", "7"]]
    assert main(["plan", "--device", "cpu", "--kv-layout", "slab", "--max-num-seqs", "5"]) == 0
    assert capfd.readouterr().out.splitlines()[-1].split()[:2] == ["1024", "5"]
    assert main(["plan", "--device", "cpu", "--num-kv-blocks", "100", "--kv-cache-dtype", "fp8"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert any("KV per token" in line and "1024 bytes, float8_e4m3fn" in line for line in lines)
    assert any("100 blocks of 16 tokens, 1.6 MiB" in line for line in lines)


def test_doctor(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["doctor"]) == 0
    out = capfd.readouterr().out
    assert "built-in: In the beginning" in out
    assert "wrong" not in out
    monkeypatch.setattr("flover.cli.doctor.NEEDED", ("no-such-package",))
    assert main(["doctor"]) == 1
    out = capfd.readouterr().out
    assert "no-such-package" in out
    assert "pip install no-such-package" in out


def test_chat(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    questions = iter(["Who art thou?", "", "/help", "/nonsense", "word " * 300, "/reset", "And then?"])

    def ask(prompt: str) -> str:
        try:
            return next(questions)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", ask)
    assert main(["chat", "-n", "8", "--ignore-eos", "--system", "Thou art wise.", *SMALL]) == 0
    out, err = capfd.readouterr()
    assert "unknown command /nonsense" in out
    assert "longer than the context of 256; /reset begins anew" in err
    assert len(out.strip().splitlines()) >= 4


def run_on_terminal(args: list[str], until: bytes | None = None) -> tuple[bytes, int]:
    """Run flover on a pseudo-terminal; once `until` has been seen, press Ctrl-C."""
    leader, follower = pty.openpty()
    env = dict(os.environ, PYTHONPATH=str(BUILTIN.parents[2]), TERM="xterm-256color", COLUMNS="80", LINES="30")
    process = subprocess.Popen(
        [sys.executable, "-m", "flover", *args], stdin=follower, stdout=follower, stderr=follower, env=env
    )
    os.close(follower)
    seen, deadline = b"", time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            data = os.read(leader, 65536)
        except OSError:
            break
        if not data:
            break
        seen += data
        if until is not None and until in seen:
            process.send_signal(signal.SIGINT)
            until = None
    os.close(leader)
    return seen, process.wait(30)


def test_live_on_a_terminal() -> None:
    args = ["generate", "In the beginning", "And it came to pass", "-n", "20", "--seed", "3", *SMALL]
    seen, code = run_on_terminal(args)
    assert code == 0
    assert b"in the batch" in seen
    assert b"2 requests, " in seen


def test_interrupt_keeps_whole_lines(tmp_path: Path) -> None:
    lines = [
        {"prompt": "And it came to pass", "sampling_params": {"max_tokens": 3 if i < 2 else 900}} for i in range(4)
    ]
    source, target = write(tmp_path / "in.jsonl", *lines), tmp_path / "out.jsonl"
    args = ["generate", "--input", str(source), "--output", str(target), "--ignore-eos", "--device", "cpu"]
    seen, code = run_on_terminal(args, until=b"2/4")
    assert code == 130, seen
    assert b"Traceback" not in seen
    assert [line["index"] for line in results(target)] == [0, 1]


def test_every_engine_option_is_there(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    assert main(["generate", "--help"]) == 0
    out = capfd.readouterr().out
    for name in EngineConfig.__dataclass_fields__:
        if name != "record_timeline":
            assert f"--{name.replace('_', '-')}" in out


def test_every_server_option_is_there_with_its_default(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    assert main(["serve", "--help"]) == 0
    out = capfd.readouterr().out
    for name in ServerConfig.__dataclass_fields__:
        assert f"--{name.replace('_', '-').removesuffix('s')}" in out
    assert "8388608)" in out
    assert "who is admitted first (default fcfs, of a server fair) " in out
