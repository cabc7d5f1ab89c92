"""Signs of life between the agents of an attempt on several hosts, through its shared folder.

A host that is gone, because it lost its power or its network, closes no connection: its peers would
wait for it until the collective's time limit. So each agent rewrites a file of its own twice a
second, and reads those of the others. Only a change counts, so the hosts' clocks may differ.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from qwen3ft.disk.files import is_listed
from qwen3ft.errors import PreemptedError, WorkerCrashedError
from qwen3ft.jobs.folders import JobDir
from qwen3ft.records.training import Failure

FIRST_SIGN_SECONDS = 180.0
"""Longest wait for another agent's first sign of life: it has to import torch, and a file system of
the network may show a new file a minute late."""

HOST_SILENT_SECONDS = 30.0
"""Silence after which a host counts as gone; a server of files that restarts may take 20 s."""

OWN_PAUSE_SECONDS = 5.0
"""Time between two looks of one host after which it was itself held up, and heard nobody."""

CONSEQUENCES = ("PreemptedError", "RanksPartedError")
"""Failures that another rank's end causes; `DistBackendError` is NCCL's own word for it."""


@dataclass(frozen=True)
class Agent:
    """One host's part in a job of several ranks."""

    job: JobDir
    """Folder that all ranks share."""
    host: int
    """Number of this host."""
    ranks: Mapping[int, Sequence[int]]
    """Ranks by host."""


def is_consequence(failure: Failure) -> bool:
    """Return True if a rank failed because another had ended."""
    return failure.kind in CONSEQUENCES or failure.facts.get("error_type") == "DistBackendError"


class OtherHosts:
    """The agents of the other hosts, as this one sees them."""

    def __init__(self, agent: Agent) -> None:
        self.own, self._host = agent.job.host(agent.host), agent.host
        self.others = {other: agent.job.host(other) for other in agent.ranks if other != agent.host}
        self._signs = dict.fromkeys(self.others, b"")
        self._heard = dict.fromkeys(self.others, time.monotonic())
        self._looked = dict(self._heard)
        self._count = 0

    def failures(self) -> Sequence[Failure]:
        """Show that this host is there, and return why others have ended, or seem to be gone."""
        if not self.others:
            return ()
        self._count += 1
        with suppress(OSError):  # a full disk ends this host if it lasts
            self.own.alive.write_text(f"{socket.gethostname()} {self._count}", encoding="utf-8")
        found = (self._failure(other, folder) for other, folder in self.others.items())
        return [failure for failure in found if failure is not None]

    @property
    def are_awaited(self) -> bool:
        """True while another has shown no sign of life yet; it ends with their failure at last."""
        return not all(self._signs.values())

    def last_words(self) -> Sequence[Failure]:
        """Wait until one of the others has said what the cause is, or all why they ended.

        One that counts as gone has said so.
        """
        end = time.monotonic() + HOST_SILENT_SECONDS + 5  # they may be waiting for this one
        while len(failures := self.failures()) < len(self.others) and time.monotonic() < end:
            if self.causes(failures):
                break
            time.sleep(0.5)
        return self.causes(failures) or failures

    def causes(self, failures: Sequence[Failure]) -> Sequence[Failure]:
        """Return those that say why all ended: a cause, or which host is gone.

        One that says so of this host is none: it was only cut off for a while.
        """
        return [
            each
            for each in failures
            if each.facts.get("lost_host") != self._host
            and (not is_consequence(each) or "lost_host" in each.facts)
        ]

    def _failure(self, other: int, folder: JobDir) -> Failure | None:
        if is_listed(folder.outcome):
            return None  # it may leave long before this one, if rank 0 has much to write
        if is_listed(folder.failure) and (failure := folder.read_failure()) is not None:
            return self._as_lost(other, failure)
        # Opened, not only looked at: NFS may show the times of a file a minute late.
        with suppress(OSError):
            if (sign := folder.alive.read_bytes()) != self._signs[other]:
                self._signs[other], self._heard[other] = sign, time.monotonic()
        now, before = time.monotonic(), self._looked[other]
        self._looked[other] = now
        if now - before > OWN_PAUSE_SECONDS:  # the folder was blocked, or this host stood still
            self._heard[other] = now
        silence = now - self._heard[other]
        name = self._name(other)
        if silence <= (HOST_SILENT_SECONDS if name else FIRST_SIGN_SECONDS):
            return None
        error = WorkerCrashedError(
            f"Host {other} ({name or 'which never began'}) gave no sign of life for "
            f"{silence:.0f} s.",
            why="It is down, or cut off from the network or the project folder.",
            next_command="prefect work-pool inspect qwen3ft",
            lost_host=other,
        )
        return Failure.from_error(error)

    def _as_lost(self, other: int, failure: Failure) -> Failure:
        """Say of a host that was asked to stop as a whole that it is gone: it was shut down."""
        # It may have been asked to stop because a third one is gone, and says which.
        if failure.kind != PreemptedError.__name__ or {"rank", "lost_host"} & set(failure.facts):
            return failure
        what = f"Host {other} ({self._name(other)}): {failure.what}"
        facts = {**failure.facts, "lost_host": other}
        return failure.model_copy(update={"what": what, "facts": facts})

    def _name(self, other: int) -> str:
        return self._signs[other].decode(errors="replace").partition(" ")[0]
