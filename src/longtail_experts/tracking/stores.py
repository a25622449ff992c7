"""The store that a tracking URI names; asked, before MLflow asks it, whether it is there."""

import os
import re
import tempfile
from pathlib import Path

import mlflow
from mlflow.store.db.db_types import DATABASE_ENGINES
from mlflow.store.db.utils import create_sqlalchemy_engine
from sqlalchemy import make_url


def store_address() -> str:
    """The tracking URI as it reads in any folder."""
    uri = mlflow.get_tracking_uri()
    file = _file_of(uri)
    if file is None:
        return uri
    url = make_url(uri)
    prefix = "file:" if url.database.startswith("file:") else ""  # a URI of SQLite's own
    return url.set(database=f"{prefix}{file}").render_as_string(hide_password=False)


def is_file_of_this_host(uri: str) -> bool:
    return _kind(uri) == "sqlite" or uri.startswith(("file:", "/", "."))


def one_store(uri: str) -> str:
    """The same for all addresses of an SQLite store; another one as it is."""
    return str(_file_of(uri) or uri)


def _file_of(uri: str) -> Path | None:
    """Of an SQLite store, links followed; None where it is in memory, and of other stores."""
    if _kind(uri) != "sqlite":
        return None
    url = make_url(uri)
    path = (url.database or "").removeprefix("file:")
    if path in ("", ":memory:") or url.query.get("mode") == "memory":
        return None
    return Path(os.path.realpath(path))


def _kind(uri: str) -> str:
    """What stands before the name of a driver, or of a host."""
    return re.split("[+:]", uri, maxsplit=1)[0]


def require_answer(uri: str) -> None:
    """Raises what a database says that cannot be connected to; other stores are not asked.

    MLflow tries ten times, for 100 seconds in which no signal is heeded.
    """
    if _kind(uri) not in DATABASE_ENGINES:
        return
    if file := _file_of(uri):
        file.parent.mkdir(parents=True, exist_ok=True)  # as MLflow does
    engine = create_sqlalchemy_engine(uri)
    try:
        engine.connect().close()
    finally:
        engine.dispose()


def require_lasting(uri: str) -> None:
    """ValueError where an SQLite store would not keep a run."""
    if _kind(uri) != "sqlite":
        return
    file = _file_of(uri)
    if file is None:
        raise ValueError("in memory, gone with the process: name a file, as sqlite:///mlflow.db")
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
