"""What pages in one file are made of: text that is safe in HTML, and pictures that are part of it."""

from __future__ import annotations

import base64
import io
import unicodedata
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image as PillowImage


def text(value: object) -> str:
    """Return untrusted text for HTML, in elements and quoted attributes; control characters are spelled out.

    >>> text("</script>\\x07")
    '&lt;/script&gt;\\\\x07'
    """
    shown = "".join(
        one.encode("unicode_escape").decode() if unicodedata.category(one) in {"Cc", "Cs"} else one
        for one in str(value)
    )
    return escape(shown, quote=True)


def data_uri(picture: PillowImage.Image, kind: str) -> str:
    """Return a picture as a JPEG or PNG that is its own address."""
    stream = io.BytesIO()
    picture.save(stream, kind, quality=80)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(stream.getvalue()).decode()}"
