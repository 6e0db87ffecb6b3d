"""Why a program can't be compiled, and where in it that is."""

import traceback
from pathlib import Path
from types import TracebackType
from typing import Any

OURS = ("/torch/", "/pyro/", "/pvi/", "/zuko/", "contextlib.py", "functools.py")


class NotCompilable(Exception):
    """A program, or what is asked of it, that has to be run as it is; the text is the reason."""


def place(raised: BaseException) -> str:
    """Where in the user's program an error came up: its site, or the line of its code.

    Args:
        raised: with its traceback.
    """
    frames = list(traceback.walk_tb(raised.__traceback__))
    for frame, line in reversed(frames):
        file = frame.f_code.co_filename
        if not any(part in file for part in OURS) and not file.startswith("<"):
            own = f"line {line} of {Path(file).name}"
            break
    else:
        own = ""
    site = _site(raised.__traceback__)
    return " ".join(part for part in (f"at site '{site}'" if site else "", own) if part)


def _site(trace: TracebackType | None) -> str:
    """The site at which Pyro or pvi was, by the message in their deepest frame; "" for none."""
    for frame, _ in reversed(list(traceback.walk_tb(trace))):
        if "/pyro/" in frame.f_code.co_filename or "/pvi/" in frame.f_code.co_filename:
            for key in ("msg", "node"):
                found: Any = frame.f_locals.get(key)
                if isinstance(found, dict) and isinstance(found.get("name"), str):
                    return found["name"]
    return ""
