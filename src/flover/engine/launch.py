"""How the ranks of a group come to be: started by the engine on one machine, or by torchrun (or its like) on several.

torchrun runs the same command once a rank and says in the environment which one it is. Rank 0 runs the command; the
others only serve it (`engine.rank`). Imports no torch.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
COMMAND = "FLOVER_COMMAND"  # in the environment of ranks that torchrun has started: what each of them was to run


@dataclass(frozen=True, slots=True)
class Launch:
    """A rank's place, as torchrun gives it. agent_store: a process of torchrun serves the store, not rank 0."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    host: str
    port: int
    agent_store: bool

    def address(self) -> str:
        """This machine's address on the way to the first one.

        Raises:
            ValueError: the first machine's name cannot be resolved, or leads nowhere but here.
        """
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
                probe.connect((self.host, self.port))
                own = str(probe.getsockname()[0])
        except OSError as error:
            raise ValueError(f"MASTER_ADDR {self.host!r} cannot be reached: {error}") from None
        if own.startswith("127.") and self.local_size < self.size:
            raise ValueError(f"MASTER_ADDR {self.host!r} is {own} here, which other machines cannot reach; give an IP")
        return own


def launched(environment: Mapping[str, str] | None = None) -> Launch | None:
    """This process's place among the ranks that torchrun has started; None if there are no others.

    Raises:
        ValueError: a variable that is missing or no number, a rank that is none.
    """
    given = os.environ if environment is None else environment
    if "RANK" not in given or given.get("WORLD_SIZE", "1") == "1":
        return None
    usual = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    values = []
    for name in NAMES:
        value = given.get(name, usual.get(name, ""))
        if not value.isdecimal():
            raise ValueError(f"the environment says RANK={given['RANK']}, but {name} is {value!r}, not a number")
        values.append(int(value))
    rank, size, local_rank, local_size, port = values
    if rank >= size:
        raise ValueError(f"the environment says RANK={rank}, which is not below WORLD_SIZE={size}")
    agent = given.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return Launch(rank, size, local_rank, local_size, given.get("MASTER_ADDR", "127.0.0.1"), port, agent)


def check_size(size: int) -> None:
    """ValueError if torchrun has started another number of ranks than the settings are for.

    Of one rank, only where the others have come to serve this command: a program of one's own may run an engine in
    each of its processes.
    """
    launch = launched()
    if launch is not None and launch.size != size and (size > 1 or COMMAND in os.environ):
        raise ValueError(
            f"the settings are for {size} rank{'s' if size > 1 else ''}, but {launch.size} were started; "
            "they must be as many (-tp times -pp)"
        )


def ranks_here(size: int) -> int:
    """Of a group of that size, how many run on this machine."""
    launch = launched()
    return size if launch is None else launch.local_size
