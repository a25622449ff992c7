"""Addresses of stores and servers, as people may see them."""

import re


def without_passwords(text: str) -> str:
    """A text as it is, but for passwords in the addresses in it."""
    # A user may be named by an e-mail address; a number and a slash are a port and a path.
    text = re.sub(r"(://[^/:\s]*):(?!\d+/)\S*@", r"\1:***@", text)
    return re.sub(r"((?:password|passwd|pwd)(?:=|%3D))[^&;\s]*", r"\1***", text, flags=re.I)
