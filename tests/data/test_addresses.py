"""No password is shown, whoever says it."""

import pytest

from longtail_experts.data.addresses import without_passwords
from longtail_experts.data.sources import first_line


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("postgresql+psycopg://lab:s3:c@t/x@db:5432/x", "postgresql+psycopg://lab:***@db:5432/x"),
        ("to https://lab:s3@mlflow.lab/a: no (a@b)", "to https://lab:***@mlflow.lab/a: no (a@b)"),
        ("http://:s3cret@host", "http://:***@host"),
        ("http://me@lab.org:s3cret@host:5000", "http://me@lab.org:***@host:5000"),
        ("http://h:5000/#/models/a@b,http://u:s3@h", "http://h:5000/#/models/a@b,http://u:***@h"),
        ("mssql://?odbc_connect=UID%3Du;PWD%3Ds3;x", "mssql://?odbc_connect=UID%3Du;PWD%3D***;x"),
        ("http://lab:p[w@host", "http://lab:***@host"),
        ("postgresql:///x?user=lab&password=s3&a=b", "postgresql:///x?user=lab&password=***&a=b"),
        ("postgresql://lab@db/x", "postgresql://lab@db/x"),
        ("http://127.0.0.1:5000", "http://127.0.0.1:5000"),
        ("sqlite:////a/b.db", "sqlite:////a/b.db"),
        ("mlruns", "mlruns"),
    ],
)
def test_no_password_is_shown(text, seen):
    assert without_passwords(text) == seen
    assert first_line(ValueError(text)) == seen
