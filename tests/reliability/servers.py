"""A real tracking server, and a real PostgreSQL behind it, on this machine's loopback."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

from reliability.harness import wait_until


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as answer:
            return answer.status == 200
    except (OSError, urllib.error.URLError):
        return False


class Server:
    """A command of MLflow that answers on a port of this machine; can be stopped and started."""

    def __init__(self, folder: Path, name: str, *arguments: str, **environment: str):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / f"{name.replace(' ', '-')}.log"
        self.command = [
            *(sys.executable, "-m", "mlflow", *name.split(), *arguments),
            *("--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"),
        ]
        self.environment = environment
        self.start()

    def start(self) -> None:
        clean = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
        clean["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # eight processes that idle here
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                stdout=log,
                stderr=log,
                env={**clean, **self.environment},
                start_new_session=True,
            )
        wait_until(lambda: answers(self.url) or self.process.poll() is not None, 300)
        assert self.process.poll() is None, self.log.read_text()[-2000:]

    def stop(self) -> None:
        os.killpg(self.process.pid, signal.SIGTERM)  # whom it started, too
        try:
            self.process.wait(3)  # it waits for its clients, of which one may be halted
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(30)
        wait_until(lambda: not answers(self.url), 30, "the server is still there")


class TrackingServer(Server):
    """`mlflow server --serve-artifacts`, as docs/server.md has it."""

    def __init__(self, folder: Path, database: str):
        super().__init__(
            folder,
            "server",
            *("--backend-store-uri", database, "--serve-artifacts"),
            *("--artifacts-destination", str(folder / "artifacts")),
        )


class PostgreSQL:
    """A fresh cluster in a folder of its own; needs Debian's package postgresql."""

    def __init__(self) -> None:
        self.port = free_port()
        # Not below pytest's folders, which are for one user: PostgreSQL refuses to run as root.
        self.data = Path(tempfile.mkdtemp(prefix="longtail-postgresql-"))
        if os.getuid() == 0:
            shutil.chown(self.data, "postgres")
        self.run("initdb", "-D", str(self.data), "-A", "trust", "-U", "mlflow")
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -k {self.data}"
        self.run("pg_ctl", "-D", str(self.data), "-o", options, "-l", f"{self.data}/log", "start")
        self.run("createdb", "-h", "127.0.0.1", "-p", str(self.port), "-U", "mlflow", "mlflow")
        self.uri = f"postgresql://mlflow@127.0.0.1:{self.port}/mlflow"

    @staticmethod
    def program(name: str) -> str | None:
        found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
        return str(found[-1]) if found else shutil.which(name)

    def run(self, name: str, *arguments: str) -> None:
        command = [self.program(name), *arguments]
        if os.getuid() == 0:
            command = [
                "setpriv",
                "--reuid=postgres",
                "--regid=postgres",
                "--clear-groups",
                *command,
            ]
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, cwd="/", timeout=120
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def stop(self) -> None:
        self.run("pg_ctl", "-D", str(self.data), "-m", "fast", "stop")
        shutil.rmtree(self.data)
