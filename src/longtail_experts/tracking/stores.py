"""The store that a tracking URI names; asked, before MLflow asks it, whether it is there."""

import os
import re
import tempfile
from pathlib import Path

import mlflow
from mlflow.store.db.db_types import DATABASE_ENGINES
from mlflow.store.db.utils import create_sqlalchemy_engine

SQLITE = "sqlite:///"


def store_address() -> str:
    """The tracking URI as it reads in any folder."""
    uri = mlflow.get_tracking_uri()
    path = sqlite_path(uri)
    return f"{SQLITE}{os.path.abspath(path)}" if path else uri


def sqlite_path(uri: str) -> str:
    """Of the file of an SQLite store; empty for others, and where it is in memory."""
    path = uri.removeprefix(SQLITE)
    return "" if path in (uri, ":memory:") else path


def is_file_of_this_host(uri: str) -> bool:
    return uri.startswith(("sqlite:", "file:", "/", "."))


def require_answer(uri: str) -> None:
    """Raises what a database says that cannot be connected to; other stores are not asked.

    MLflow tries ten times, for 100 seconds in which no signal is heeded.
    """
    if re.split(r"\+|:", uri)[0] not in DATABASE_ENGINES:
        return
    if path := sqlite_path(uri):
        Path(path).parent.mkdir(parents=True, exist_ok=True)  # as MLflow does
    engine = create_sqlalchemy_engine(uri)
    try:
        engine.connect().close()
    finally:
        engine.dispose()


def require_lasting(uri: str) -> None:
    """ValueError where an SQLite store would not keep a run."""
    if not uri.startswith("sqlite:"):
        return
    path = sqlite_path(uri)
    if not path:
        raise ValueError("in memory, gone with the process: name a file, as sqlite:///mlflow.db")
    file = Path(path)
    if file.is_dir():
        raise ValueError(f"a folder: name a file in it, as {uri.rstrip('/')}/mlflow.db")
    # Opened here, and closed, the file would lose the locks that SQLite holds in this process.
    if file.exists() and not os.access(file, os.W_OK):
        raise ValueError("the file is write-protected")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)  # as MLflow does
        with tempfile.TemporaryFile(dir=file.parent):  # SQLite's journal lies beside the file
            pass
    except OSError as error:
        raise ValueError(f"the folder cannot be written ({error.strerror})") from None
