"""Hosts that are network namespaces of this machine, joined by a bridge."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.team import START_SECONDS, Team, started_team

from deployments.processes import free_port

BUCKET = "qwen3ft"
_KEYS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"}


def _missing() -> str:
    """Return what this machine lacks for hosts of its own; empty if nothing."""
    if os.getuid() != 0 or any(shutil.which(name) is None for name in ("ip", "unshare", "mount")):
        return "network namespaces need root, ip (Debian: iproute2), unshare and mount"
    name = f"q3-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode != 0:
        return f"ip netns add: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "delete", name], check=True)
    try:
        import boto3  # noqa: F401
        import moto  # noqa: F401
    except ImportError:
        return "no S3 server: make test-slow installs moto[s3]"
    return ""


@dataclass
class Host:
    """A machine with a network of its own, and with other contents of the project folder.

    Attributes:
        name: Host name.
        namespace: Its network namespace.
        folder: Lies at the path of the project folder there; None for the folder itself.
    """

    team: Team
    name: str
    namespace: str
    folder: Path | None = None

    def command(self, *words: str) -> list[str]:
        """Return the command that runs `words` on this host, in the project folder."""
        project = self.team.project
        begin = f"hostname {self.name}"
        if self.folder is not None:
            begin += f" && mount --bind {self.folder} {project}"
        inside = ("sh", "-c", f'{begin} && cd {project} && exec "$@"', "sh")
        return ["ip", "netns", "exec", self.namespace, "unshare", "--uts", *inside, *words]

    def environment(self, given: Mapping[str, str] | None = None) -> dict[str, str]:
        """Return the variables of this host: Prefect's folder is its own."""
        home = self.team.root / f"prefect-{self.name}"
        return {**self.team.environment, "PREFECT_HOME": str(home), **(given or {})}

    def qwen3ft(self, *arguments: str) -> str:
        """Run a command of qwen3ft on this host; return its output.

        A few times, if a busy machine lets MLflow answer too late.
        """
        command = self.command(sys.executable, "-m", "qwen3ft", *arguments)
        for _ in range(5):
            done = subprocess.run(
                command, env=self.environment(), capture_output=True, text=True, check=False
            )
            if "gave no answer" not in done.stdout + done.stderr:
                break
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def typed(self, line: str) -> str:
        """Run a command as it was printed, in the project folder here; return its output."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            self.command("sh", "-c", line),
            env=self.environment({"PATH": path}),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def start_worker(self, **variables: str) -> subprocess.Popen[bytes]:
        """Start a Prefect worker that carries out one run at a time."""
        worker = ("worker", "start", "--pool", "qwen3ft", "--type", "process", "--limit", "1")
        command = (sys.executable, "-m", "prefect", *worker, "--name", self.name)
        return self.team.start(*self.command(*command), env=self.environment(variables))

    def processes(self) -> list[psutil.Process]:
        """Return all processes on this host."""
        listed = subprocess.run(
            ["ip", "netns", "pids", self.namespace], capture_output=True, text=True, check=True
        )
        return [psutil.Process(int(pid)) for pid in listed.stdout.split()]

    def lose(self) -> None:
        """Take this host off the network and end it, as a power cut does: it tells nobody."""
        _ip("-n", self.namespace, "link", "set", "eth0", "down")
        for process in self.processes():
            process.kill()

    def restore(self) -> None:
        """Put a lost host back onto the network."""
        _ip("-n", self.namespace, "link", "set", "eth0", "up")


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


@contextmanager
def started_hosts(count: int) -> Iterator[list[Host]]:
    """Start a team's servers with artifacts on S3, and hosts that reach them over a bridge.

    The hosts have no keys of the S3 server: MLflow's server alone does.
    """
    if reason := _missing():
        pytest.skip(reason)
    mark = os.getpid() % 10_000
    bridge, network = f"q3b{mark}", f"10.{100 + mark % 100}.{mark // 100}"
    names = [f"q3n{mark}-{number}" for number in range(count)]
    try:
        _ip("link", "add", bridge, "type", "bridge")
        _ip("address", "add", f"{network}.1/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        for number, name in enumerate(names):
            outer = f"q3v{mark}-{number}"
            _ip("netns", "add", name)
            _ip("link", "add", outer, "type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("link", "set", outer, "master", bridge, "up")
            _ip("-n", name, "address", "add", f"{network}.{10 + number}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", name, "link", "set", device, "up")
        with (
            _s3_server(f"{network}.1") as variables,
            started_team(f"{network}.1", f"s3://{BUCKET}/artifacts", variables) as team,
        ):
            yield [Host(team, f"host-{number}", name) for number, name in enumerate(names)]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False)
        subprocess.run(["ip", "link", "delete", bridge], check=False)


@contextmanager
def _s3_server(address: str) -> Iterator[dict[str, str]]:
    """Start an S3 server with a bucket; yield the variables by which MLflow's server reaches it."""
    import boto3
    from botocore.exceptions import EndpointConnectionError

    port = free_port(5970)
    url = f"http://{address}:{port}"
    command = [sys.executable, "-m", "moto.server", "-H", address, "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        client: Any = boto3.client(
            "s3",
            endpoint_url=url,
            region_name="us-east-1",
            aws_access_key_id=_KEYS["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=_KEYS["AWS_SECRET_ACCESS_KEY"],
        )
        end = time.monotonic() + START_SECONDS
        while True:
            try:
                client.create_bucket(Bucket=BUCKET)
                break
            except EndpointConnectionError:
                assert time.monotonic() < end
                time.sleep(0.5)
        yield {**_KEYS, "AWS_DEFAULT_REGION": "us-east-1", "MLFLOW_S3_ENDPOINT_URL": url}
    finally:
        server.terminate()
        server.wait()
