"""Addresses of stores and servers, as people may see them."""

import re


def without_passwords(text: str) -> str:
    """A text as it is, but for passwords in the addresses in it."""
    text = re.sub(r"(://[^/@:\s]*):\S*@", r"\1:***@", text)
    return re.sub(r"([?&]password=)[^&\s]*", r"\1***", text)
