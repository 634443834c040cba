"""What torchrun tells a process about the others, by environment variables: checked before it waits for them.

For an address that nobody answers torch waits up to the timeout of the process group, which is hours.
"""

from __future__ import annotations

import os
import socket
import time

from plumbing.common import InputError, first_line

CONNECT_SECONDS = 18.0  # until an address counts as one that nobody answers
NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def check_launch(gpus: int) -> None:
    """Refuse environment variables under which the ranks would not find each other.

    Args:
        gpus: of this machine; 0: the ranks compute on the CPU.

    Raises:
        InputError: naming the variable.
    """
    if "LOCAL_RANK" in os.environ:
        local = whole("LOCAL_RANK", 0)
        if gpus and local >= gpus:
            raise InputError(
                f"environment variable LOCAL_RANK: {local}, and this machine has {gpus} GPUs: start as many "
                "processes as there are GPUs"
            )
    if "RANK" not in os.environ:  # one process
        return

    # All of them are there and right.
    for name in NEEDED:
        if not os.environ.get(name):
            raise InputError(f"environment variable {name}: missing, and RANK is set; torchrun sets them all")
    rank, world = whole("RANK", 0), whole("WORLD_SIZE", 1)
    if rank >= world:
        raise InputError(f"environment variable RANK: {rank}, expected less than WORLD_SIZE ({world})")
    address, port = os.environ["MASTER_ADDR"], whole("MASTER_PORT", 1, 65535)

    # Somebody answers, except where this process itself will.
    hosted_here = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if reason := not_reached(address, port, hosted_here):
        raise InputError(
            "environment variables MASTER_ADDR and MASTER_PORT: nobody answers at "
            f"{address}:{port} ({reason})"
        )


def whole(name: str, least: int, most: int = 2**31) -> int:
    """The whole number in an environment variable.

    Raises:
        InputError: it is none, or out of bounds.
    """
    text = os.environ[name]
    try:
        value = int(text)
    except ValueError as error:
        raise InputError(f"environment variable {name}: {text!r}, expected a whole number") from error
    if not least <= value <= most:
        raise InputError(f"environment variable {name}: {text}, expected {least} to {most}")
    return value


def not_reached(address: str, port: int, only_resolve: bool = False) -> str:
    """Why an address cannot be reached, tried again and again for CONNECT_SECONDS; empty: it can.

    Args:
        only_resolve: whether its name means something, without connecting.
    """
    late = time.monotonic() + CONNECT_SECONDS
    while True:
        try:
            if only_resolve:
                socket.getaddrinfo(address, port)
            else:
                socket.create_connection((address, port), timeout=CONNECT_SECONDS / 3).close()
            return ""
        except (OSError, UnicodeError) as error:
            if time.monotonic() > late:
                return getattr(error, "strerror", None) or first_line(error)
            time.sleep(min(0.5, CONNECT_SECONDS / 10))
