"""The other hosts of a training: the run asks its work pool for them, once for all attempts.

Each is a flow run of `qwen3-finetune-join` (see `flows.join`), which another host's Prefect worker
picks up. For each attempt it leaves its folder below the attempt's once its ranks can start. A host
that has ended, however it did, is not asked again: the run goes on without it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID, uuid4

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import State
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.settings import get_current_settings
from prefect.states import Cancelled, Cancelling, Crashed

from deployments.deploy import PREFECT_FILE, project_file
from deployments.services import JOIN_DEPLOYMENT, JOIN_FLOW
from qwen3ft.config import TrainingConfig
from qwen3ft.disk.digests import code_digest
from qwen3ft.disk.files import is_listed
from qwen3ft.errors import EnvironmentNotReadyError
from qwen3ft.jobs.folders import JobDir, RunDir, write_record
from qwen3ft.logs import get_logger
from qwen3ft.machine.network import interface_for_ranks, listening_on, machine_name
from qwen3ft.records.machine import EnvironmentReport
from qwen3ft.records.plan import TrainPlan
from qwen3ft.records.training import Failure
from qwen3ft.text.commands import shell_line
from qwen3ft.tracking.journal import Journal
from tasks.artifacts import NOT_SHOWN

logger = get_logger("hosts")

AnswerT = TypeVar("AnswerT")

NEXT_ATTEMPT_SECONDS = 180.0
"""Longest wait for a host that has joined to see that there is another attempt; a file system of
the network may show it a minute late."""

_POLL_SECONDS = 2.0
_REPORT_SECONDS = 30.0

_SERVER_SECONDS = 120.0
"""Longest time that the Prefect server may be away when a host is asked for."""

_LATER = (408, 429)
"""Answers to a client's mistake that another request at a later time may not get."""


class JoinedHosts:
    """The other hosts of a run's training.

    A host stays until the training is over, so its number is one machine in all attempts, and its
    places are the same GPUs.

    Args:
        config: Settings of the run; without several `hosts` there is nothing to do.
        run: Its folder.

    Raises:
        EnvironmentNotReadyError: hosts cannot be asked for, or the network between them is not
            known. That is looked at now, as the stages before training may take an hour.
    """

    def __init__(self, config: TrainingConfig, run: RunDir) -> None:
        self._config, self._run = config, run
        self._asked: dict[int, UUID] = {}
        self._attempts: list[JobDir] = []
        if config.hosts > 1:
            with get_client(sync_client=True) as client:
                self._deployment = _find_deployment(client)
            self._interface = interface_for_ranks(get_current_settings().api.url or "")

    @contextmanager
    def joined(self) -> Iterator[None]:
        """End the hosts' flow runs with the body; those that train to the end do so themselves."""
        if self._config.hosts == 1:
            yield
            return
        try:
            yield
        except BaseException:
            self._end(self._asked, even_running=True)
            raise
        self._end(self._asked)

    def network(self, plan: TrainPlan) -> AbstractContextManager[None]:
        """Let ranks that are started meanwhile reach those of other hosts, if there are any."""
        return listening_on(self._interface) if len(plan.hosts) > 1 else nullcontext()

    def gather(self, plan: TrainPlan, environment: EnvironmentReport) -> None:
        """Wait until all hosts of an attempt are ready; before the first, ask for them.

        Raises:
            EnvironmentNotReadyError: one of them refused, or too few came in time. After the first
                attempt its fact `host` says which one is gone.
        """
        wanted = [host for host in plan.hosts if host]
        if gone := {host: self._asked[host] for host in self._asked if host not in wanted}:
            self._asked = {host: self._asked[host] for host in wanted}
            self._end(gone)
        if not wanted:
            return
        attempt = self._run.attempt(plan.attempt).create(plan)
        self._attempts.append(attempt)
        limit_seconds = NEXT_ATTEMPT_SECONDS if self._asked else self._config.wait_for_gpu_seconds
        is_first = not self._asked
        with get_client(sync_client=True) as client:
            if is_first:
                gpu = environment.gpus[0].name if environment.gpus else ""
                for host in wanted:
                    self._asked[host] = _ask(client, self._deployment, attempt, host, gpu)
            self._wait(client, attempt, limit_seconds, is_first=is_first)
        logger.info("all hosts are ready")

    def _wait(
        self, client: SyncPrefectClient, attempt: JobDir, limit_seconds: float, *, is_first: bool
    ) -> None:
        """Wait until every host has made its folder of an attempt."""
        started, reports = time.monotonic(), 0
        while missing := [
            host for host in self._asked if not is_listed(attempt.host(host).request)
        ]:
            for host, flow_run in self._asked.items():
                if (state := _state(client, host, flow_run)) is not None and state.is_final():
                    raise _refusal(host, state)
            waited = time.monotonic() - started
            if waited >= limit_seconds:
                raise self._too_few(missing, waited) if is_first else _too_late(missing[0], waited)
            if waited >= reports * _REPORT_SECONDS:
                reports += 1
                numbers, left = ", ".join(map(str, missing)), limit_seconds - waited
                logger.info("waiting for host %s, for up to %.0f s more", numbers, left)
            time.sleep(_POLL_SECONDS)

    def _too_few(self, missing: list[int], waited: float) -> EnvironmentNotReadyError:
        came = len(self._asked) - len(missing)
        return EnvironmentNotReadyError(
            f"{came} of {len(self._asked)} further hosts came within {waited:.0f} s.",
            why="Their Prefect workers are down or busy; wait_for_gpu_seconds allows no more.",
            next_command=self._run.command_to_resume(hosts=1 + came),
        )

    def _end(self, asked: Mapping[int, UUID], *, even_running: bool = False) -> None:
        """End the flow runs of hosts that never began, and of those that are gone.

        With `even_running` those that train are cancelled too.

        Skipped if the server does not answer: a host whose run has ended gives up by itself.
        """
        try:
            lost = {_lost_host(attempt) for attempt in self._attempts}
            with get_client(sync_client=True) as client:
                for host, run_id in asked.items():
                    state = client.read_flow_run(run_id).state
                    if state is None or state.is_final():
                        continue
                    if state.is_scheduled():
                        over: State = Cancelled(message="The training is over.")
                        client.set_flow_run_state(run_id, over, force=True)
                    elif host in lost:  # nobody else reports its end
                        crashed: State = Crashed(message="Its host gave no sign of life.")
                        client.set_flow_run_state(run_id, crashed, force=True)
                    elif even_running:
                        client.set_flow_run_state(run_id, Cancelling(), force=True)
        except NOT_SHOWN as error:
            logger.warning("cannot end the flow runs of other hosts: %s", error)


def _find_deployment(client: SyncPrefectClient) -> UUID:
    try:
        return _patiently(lambda: client.read_deployment_by_name(JOIN_DEPLOYMENT).id)
    except ObjectNotFound as error:
        file = project_file(Path.cwd(), PREFECT_FILE)
        words = ("prefect", "--no-prompt", "deploy", "--prefect-file", file, "--all")
        raise EnvironmentNotReadyError(
            f"The Prefect server has no deployment {JOIN_DEPLOYMENT}, by which hosts are asked.",
            why="It was not registered, or the run has a temporary server of its own.",
            next_command=shell_line(*words),
        ) from error


def _ask(client: SyncPrefectClient, deployment: UUID, attempt: JobDir, host: int, gpu: str) -> UUID:
    """Ask the pool for a host, once, however often the server has to be asked."""
    key = str(uuid4())
    parameters = {
        "attempt": str(attempt.path),
        "host": host,
        "code": code_digest(),
        "gpu": gpu,
        "beside": machine_name(),
    }
    return _patiently(
        lambda: (
            client.create_flow_run_from_deployment(
                deployment,
                parameters=parameters,
                name=f"host {host} of {attempt.path}",
                idempotency_key=key,
            ).id
        )
    )


def _patiently(request: Callable[[], AnswerT]) -> AnswerT:
    """Return the server's answer to a request, which is repeated while the server restarts."""
    end = time.monotonic() + _SERVER_SECONDS
    while True:
        try:
            return request()
        except ObjectNotFound:
            raise
        except NOT_SHOWN as error:
            refused = _is_refusal(error)
            if refused or time.monotonic() > end:
                raise EnvironmentNotReadyError(
                    f"Other hosts cannot be asked for: {error}",
                    why="The Prefect server refuses it."
                    if refused
                    else f"For {_SERVER_SECONDS:.0f} s the server was down, or out of reach.",
                    next_command="qwen3ft status",
                ) from error
        time.sleep(_POLL_SECONDS)


def _is_refusal(error: Exception) -> bool:
    """Return True if the server will answer the same request in the same way again."""
    if not isinstance(error, PrefectHTTPStatusError):
        return False
    return error.response.is_client_error and error.response.status_code not in _LATER


def _state(client: SyncPrefectClient, host: int, flow_run: UUID) -> State[Any] | None:
    """Return the state of a host's flow run; None if the server does not say."""
    try:
        return client.read_flow_run(flow_run).state
    except ObjectNotFound:
        return Cancelled(message="Its flow run was deleted.")
    except NOT_SHOWN as error:  # the server may be restarting
        logger.warning("cannot see whether host %d refuses: %s", host, error)
        return None


def _refusal(host: int, state: State[Any]) -> EnvironmentNotReadyError:
    """Return the error of a host's flow run, as its state says it."""
    what, _, rest = (state.message or state.name or "").partition("\nWhy: ")
    why, _, command = rest.partition("\nNext: ")
    return EnvironmentNotReadyError(
        f"Host {host} did not join: {what}",
        why=why or f"Its flow run is {state.name}.",
        next_command=command or f"prefect flow-run ls --flow-name {JOIN_FLOW}",
        host=host,
    )


def _too_late(host: int, waited: float) -> EnvironmentNotReadyError:
    return EnvironmentNotReadyError(
        f"Host {host} was not ready for the next attempt within {waited:.0f} s.",
        why="It is down, or cut off from the network or the project folder.",
        next_command="prefect work-pool inspect qwen3ft",
        host=host,
    )


def failure_of_hosts(refusal: EnvironmentNotReadyError, plan: TrainPlan, run: RunDir) -> Failure:
    """Record and return the failure of an attempt that could not begin, as it lacks a host.

    After the first attempt recovery goes on without the host: one of its GPUs is gone, say, or it
    was switched off.
    """
    lost = {"lost_host": refusal.facts["host"]} if "host" in refusal.facts else {}
    facts = {**refusal.facts, **lost}
    failure = Failure.from_error(refusal).model_copy(update={"facts": facts})
    write_record(run.attempt(plan.attempt).failure, failure)
    journal = Journal(run)
    journal.attempt_started(plan)
    journal.attempt_ended(plan.attempt, "FAILED", {"failure": failure.kind})
    return failure


def _lost_host(attempt: JobDir) -> int | None:
    failure = attempt.read_failure()
    return None if failure is None else failure.facts.get("lost_host")
