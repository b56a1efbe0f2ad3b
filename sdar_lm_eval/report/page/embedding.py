"""Puts data, script and style into one HTML file that loads nothing from a network."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import zlib

UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
"""Characters that HTML does not allow."""


def embedded(value: object) -> str:
    """Return JSON of a value, deflated (RFC 1950) and in base64, for a script element that holds data.

    Base64 has no character that could end the element. JSON escapes every character that is not ASCII, so `extract`
    returns lone surrogates and U+2028 unchanged.

    Raises:
        ValueError: the value has a number that is infinite or NaN.
    """
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(zlib.compress(text.encode("ascii"), 9)).decode("ascii")


def extract(element: str) -> object:
    """Return the value that `embedded` made a script element's text of."""
    return json.loads(zlib.decompress(base64.b64decode(element)))


def allowed_in_html(text: str) -> str:
    """Return a text with U+FFFD in the place of each character that HTML does not allow."""
    return UNPRINTABLE.sub("\ufffd", text)


def policy(script: str, style: str) -> str:
    """Return the Content-Security-Policy that lets a page run one script and one style sheet, and load nothing.

    Args:
        script: the whole text between <script> and </script>.
        style: the whole text between <style> and </style>.
    """
    return (
        f"default-src 'none'; script-src {_source(script)}; style-src {_source(style)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _source(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode('utf-8')).digest()).decode('ascii')}'"
