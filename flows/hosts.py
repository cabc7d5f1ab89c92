"""The other hosts of a training: the run asks its work pool for them, one attempt at a time.

Each is a flow run of `qwen3-finetune-join` (see `flows.join`), which another host's Prefect worker
picks up. It leaves its folder below the attempt's once its ranks can start.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from uuid import UUID, uuid4

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import State
from prefect.exceptions import ObjectNotFound
from prefect.settings import get_current_settings
from prefect.states import Cancelled, Cancelling, Crashed

from qwen3ft.config import TrainingConfig
from qwen3ft.digests import code_digest
from qwen3ft.errors import EnvironmentNotReadyError, WorkerCrashedError
from qwen3ft.jobs.folders import JobDir, RunDir, write_record
from qwen3ft.logs import get_logger
from qwen3ft.machine.network import interface_for_ranks, machine_name
from qwen3ft.records.machine import EnvironmentReport
from qwen3ft.records.plan import TrainPlan
from qwen3ft.records.training import Failure
from tasks.artifacts import NOT_SHOWN

logger = get_logger("hosts")

JOIN_DEPLOYMENT = "qwen3-finetune-join/join"

_POLL_SECONDS = 2.0
_REPORT_SECONDS = 30.0

_SERVER_SECONDS = 120.0
"""Longest time that the Prefect server may be away when a host is asked for."""


@contextmanager
def other_hosts(
    config: TrainingConfig, environment: EnvironmentReport, plan: TrainPlan, run: RunDir
) -> Iterator[None]:
    """Have the other hosts of an attempt ready while it runs.

    Raises:
        EnvironmentNotReadyError: one of them refused, or too few came in time.
    """
    if not (wanted := [host for host in plan.hosts if host]):
        yield
        return
    attempt = run.attempt(plan.attempt).create(plan)
    gpu = environment.gpus[0].name if environment.gpus else ""
    given = {
        "attempt": str(attempt.path),
        "code": code_digest(),
        "gpu": gpu,
        "beside": machine_name(),
    }
    asked: dict[int, UUID] = {}
    with interface_for_ranks(get_current_settings().api.url or ""):
        try:
            with get_client(sync_client=True) as client:
                for host in wanted:
                    asked[host] = _ask(client, {**given, "host": host})
                _wait_until_ready(config, client, attempt, asked, run)
            yield
        except BaseException:
            _end(asked, even_running=True)
            raise
        # those that run end by themselves
        _end(asked, even_running=False, lost=_lost_host(attempt))


def _ask(client: SyncPrefectClient, parameters: Mapping[str, object]) -> UUID:
    """Ask the pool for a host, once, however often the server has to be asked."""
    name = f"host {parameters['host']} of {parameters['attempt']}"
    key, end = str(uuid4()), time.monotonic() + _SERVER_SECONDS
    while True:
        try:
            deployment = client.read_deployment_by_name(JOIN_DEPLOYMENT)
            return client.create_flow_run_from_deployment(
                deployment.id, parameters=dict(parameters), name=name, idempotency_key=key
            ).id
        except ObjectNotFound as error:
            raise _not_registered() from error
        except NOT_SHOWN as error:  # the server may be restarting
            if time.monotonic() > end:
                raise EnvironmentNotReadyError(
                    f"{name} could not be asked for within {_SERVER_SECONDS:.0f} s: {error}",
                    why="The Prefect server is down, or cannot be reached.",
                    next_command="qwen3ft status",
                ) from error
        time.sleep(_POLL_SECONDS)


def _not_registered() -> EnvironmentNotReadyError:
    return EnvironmentNotReadyError(
        f"The Prefect server has no deployment {JOIN_DEPLOYMENT}, by which hosts are asked.",
        why="It was not registered, or the run has a temporary server of its own.",
        next_command="prefect --no-prompt deploy --prefect-file deployments/prefect.yaml --all",
    )


def _wait_until_ready(
    config: TrainingConfig,
    client: SyncPrefectClient,
    attempt: JobDir,
    asked: Mapping[int, UUID],
    run: RunDir,
) -> None:
    """Wait until every host that was asked has made its folder."""
    started, reports = time.monotonic(), 0
    while missing := [host for host in asked if not attempt.host(host).request.exists()]:
        for host in missing:
            try:
                state = client.read_flow_run(asked[host]).state
            except NOT_SHOWN as error:  # the server may be restarting
                logger.warning("cannot see whether host %d refuses: %s", host, error)
                continue
            if state is not None and state.is_final():
                raise _refusal(host, state)
        waited = time.monotonic() - started
        if waited >= config.wait_for_gpu_seconds:
            fewer = shlex.join(("--set", f"hosts={1 + len(asked) - len(missing)}"))
            raise EnvironmentNotReadyError(
                f"{len(asked) - len(missing)} of {len(asked)} further hosts came within "
                f"{waited:.0f} s.",
                why="Their Prefect workers are down or busy; wait_for_gpu_seconds allows no more.",
                next_command=" ".join((run.resume_command, fewer)),
            )
        if waited >= reports * _REPORT_SECONDS:
            reports += 1
            numbers = ", ".join(map(str, missing))
            logger.info(
                "waiting for host %s, for up to %.0f s more",
                numbers,
                config.wait_for_gpu_seconds - waited,
            )
        time.sleep(_POLL_SECONDS)
    logger.info("all hosts are ready")


def _refusal(host: int, state: State) -> EnvironmentNotReadyError:
    """Return the error of a host's flow run, as its state says it."""
    what, _, rest = (state.message or state.name or "").partition("\nWhy: ")
    why, _, command = rest.partition("\nNext: ")
    return EnvironmentNotReadyError(
        f"Host {host} did not join: {what}",
        why=why or f"Its flow run is {state.name}.",
        next_command=command or f"prefect flow-run ls --flow-name {JOIN_DEPLOYMENT.split('/')[0]}",
        host=host,
    )


def failure_of_host(refusal: EnvironmentNotReadyError, attempt: JobDir) -> Failure:
    """Return the failure of an attempt that a host refused which trained in the one before.

    One of its GPUs is gone, say. Recovery goes on without the host.
    """
    facts = {**refusal.facts, "lost_host": refusal.facts["host"]}
    lost = {"kind": WorkerCrashedError.__name__, "facts": facts}
    failure = Failure.from_error(refusal).model_copy(update=lost)
    write_record(attempt.failure, failure)
    return failure


def _lost_host(attempt: JobDir) -> int | None:
    failure = attempt.read_failure()
    return None if failure is None else failure.facts.get("lost_host")


def _end(asked: Mapping[int, UUID], *, even_running: bool, lost: int | None = None) -> None:
    """Cancel the flow runs that have not ended; without `even_running`, those that never began.

    That of a `lost` host is marked as crashed: nobody else reports its end.

    Skipped if the server does not answer: a host whose run has ended gives up by itself.
    """
    try:
        with get_client(sync_client=True) as client:
            for host, run_id in asked.items():
                state = client.read_flow_run(run_id).state
                if state is None or state.is_final():
                    continue
                if state.is_scheduled():
                    over: State = Cancelled(message="The attempt is over.")
                    client.set_flow_run_state(run_id, over, force=True)
                elif host == lost:
                    crashed: State = Crashed(message="Its host gave no sign of life.")
                    client.set_flow_run_state(run_id, crashed, force=True)
                elif even_running:
                    client.set_flow_run_state(run_id, Cancelling(), force=True)
    except NOT_SHOWN as error:
        logger.warning("cannot cancel the flow runs of other hosts: %s", error)
