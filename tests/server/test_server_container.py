"""The server as process 1 of a process namespace, which is what a container makes of it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time

import httpx
import psutil
import pytest
from serving import CODE

NAMESPACE = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("unshare") is None or subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode != 0,
    reason="no new process namespace can be made here",
)
def test_as_process_1_of_a_container() -> None:
    """SIGTERM drains, and nothing of a killed front stays behind."""
    options = ["serve", "--port", "0", "--device", "cpu", "--num-threads", "1", "--admin-socket", "none"]
    outer = subprocess.Popen([*NAMESPACE, sys.executable, "-c", CODE, *options], stdout=subprocess.PIPE, text=True)
    try:
        assert outer.stdout is not None
        url = outer.stdout.readline().split()[-1]
        (supervisor,) = psutil.Process(outer.pid).children()
        (front,) = supervisor.children()
        front.kill()
        front.wait(5)
        httpx.get(f"{url}/readyz", timeout=60).raise_for_status()  # waits in the backlog for the next front
        deadline = time.monotonic() + 10
        while len(supervisor.children()) > 1 and time.monotonic() < deadline:  # it has yet to hear of the new one
            time.sleep(0.05)
        (again,) = supervisor.children()
        assert again.pid != front.pid
        supervisor.terminate()
        assert outer.wait(10) == 0
    finally:
        outer.kill()
        outer.wait()
