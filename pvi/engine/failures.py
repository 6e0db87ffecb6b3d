"""What an error inside a program means, and where it came from."""

import linecache
import re
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any

from pyro.poutine.trace_messenger import TraceMessenger
from torch import Tensor, nn

from pvi.engine.traces import is_subsample
from pvi.errors import DataError, FitError, GuideError, ModelError, PviError

MISSING = "Drop those rows, impute them, or leave those entries out with obs_mask= or poutine.mask."
PLATE = r"inside plate\('(.+?)'\) at site (\S+) dim (-\d+), (\d+) vs (\d+)"  # Pyro's words
TORCHS = (ValueError, RuntimeError, ZeroDivisionError, NotImplementedError)
Roles = Mapping[str, Any]


@contextmanager
def explained(
    roles: Roles, named: Callable[[], Mapping[str, Any]], when: Callable[[], str] = str
) -> Iterator[None]:
    """Inside, turn torch's and Pyro's errors that have a known cause into errors of pvi.

    Others, such as the user's own, come through as they are, with a note that says where they were
    raised: in which program, after which site, given what.

    Args:
        roles: the programs by what they are: model, guide, callback.
        named: the data arguments by name.
        when: what was going on, for the note.
    """
    try:
        yield
    except Exception as raised:
        error = _first(raised)
        if isinstance(error, PviError):
            raise (error if error is not raised else raised) from error.__cause__
        place = _place(error, roles, when())
        if type(error) in TORCHS and not _raised(error):
            found = _known(error, place, roles, named())
            if found is not None:
                raise found from error
        if not any(note.startswith("pvi: ") for note in getattr(error, "__notes__", ())):
            error.add_note(f"pvi: raised{place}")
        if error is raised:
            raise
        raise error from None


class _Place:
    """The innermost program in a traceback, its last site, and what it was given."""

    def __init__(self, role: str, nodes: Mapping[str, Any], given: str, when: str):
        self.role, self.given, self.when = role, given, when
        drawn = {n: x for n, x in nodes.items() if x["type"] == "sample"}
        samples = [name for name, node in drawn.items() if not is_subsample(node)]
        self.site = samples[-1] if samples else None
        self.params = {n: x["value"] for n, x in nodes.items() if x["type"] == "param"}

    def __str__(self) -> str:
        after = f", after site '{self.site}'" if self.site else ""
        where = f" in {self.role}{after}" if self.role else after
        return self.when + where + (f", given {self.given}" if self.given else "")


def _first(error: Exception) -> Exception:
    """The error before Pyro's trace rewrote it, which adds shapes and may fail to."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    cause, context = error.__cause__, error.__context__
    if frames and frames[-1].f_code.co_filename.endswith("trace_messenger.py"):
        return _first(context) if isinstance(context, Exception) else error
    if isinstance(cause, type(error)) and str(error).startswith(f"{cause}\nTrace Shapes"):
        return _first(cause)
    return error


def _raised(error: Exception) -> bool:
    """Whether a `raise` outside of torch and Pyro made it: then it is the user's own."""
    frames = list(traceback.walk_tb(error.__traceback__))
    if not frames:
        return False
    frame, line = frames[-1]
    file = frame.f_code.co_filename.replace("\\", "/")
    text = linecache.getline(frame.f_code.co_filename, line).strip()
    return text.startswith("raise") and not re.search(r"/(torch|pyro)/", file)


def _place(error: Exception, roles: Roles, when: str) -> _Place:
    codes: dict[CodeType, str] = {}
    for name, program in roles.items():
        for code in _codes(program):
            codes[code] = name if codes.get(code, name) == name else f"{codes[code]} or {name}"
    role, given, tracing = "", "", None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code in codes:
            role, given = codes[frame.f_code], _given(frame)
        for local in ("tracer", "self"):
            if isinstance(frame.f_locals.get(local), TraceMessenger):
                tracing = frame.f_locals[local]
    nodes = {} if tracing is None else tracing.trace.nodes
    return _Place(role if "'" in role else f"the {role}" if role else "", nodes, given, when)


def _codes(program: Any) -> list[CodeType]:
    """The code that a program runs, whatever wraps it."""
    found, stack, seen = [], [program], set()
    while stack:
        item = stack.pop()
        if id(item) in seen or item is None:
            continue
        seen.add(id(item))
        if isinstance(item, nn.Module):
            item = type(item).forward
        code = getattr(item, "__code__", None)
        if isinstance(code, CodeType):
            found.append(code)
        elif not isinstance(item, type) and callable(item):
            stack.append(type(item).__call__)
        stack += [getattr(item, key, None) for key in ("__wrapped__", "func", "fn", "__func__")]
    return [code for code in found if "pyro/poutine" not in code.co_filename.replace("\\", "/")]


def _given(frame: FrameType) -> str:
    """Shapes and dtypes of a program's tensor arguments."""
    code = frame.f_code
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    values = {n: frame.f_locals[n] for n in names if isinstance(frame.f_locals.get(n), Tensor)}
    return ", ".join(f"{n}: {tuple(v.shape)} {_dtype(v)}" for n, v in values.items())


def _dtype(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _known(error: Exception, place: _Place, roles: Roles, named: Mapping) -> PviError | None:
    """The error of pvi for one of torch's or Pyro's with a known cause, or `None`."""
    text, kind = str(error), GuideError if place.role == "the guide" else ModelError
    if text == "size cannot be zero":
        return kind(f"{_plate(error)} has size 0{place}. Leave it out where it has no elements.")
    if match := re.search(r"Multiple (\w+) sites named '(.+?)'", text):
        program = place.role or "the model"
        return ModelError(
            f"{program} has two sites named '{match[2]}'. Give each pyro.sample its own name."
        )
    if match := re.search(
        r"inside plate\('(.+?)'\) at site (\S+) dim (-\d+), (\d+) vs (\d+)", text
    ):
        return _sizes(kind, match, place)
    missing = missing_values(named)
    if missing:
        return missing
    if "to satisfy the constraint" in text or "within the support" in text:
        return _outside(kind, text, place, roles)
    if "device" in text and ("same device" in text or "expected device" in text):
        return ModelError(
            f"tensors on different devices meet{place}: {_line(text)}. Make the program's "
            "constants where its data are, such as torch.ones(3, device=y.device), or register "
            "them as buffers of a module."
        )
    if re.search(r"same dtype|scalar type|to have dtype", text):
        return DataError(
            f"tensors of different dtypes meet{place}: {_line(text)}. Use one dtype: convert the "
            "data with .float(), or set torch.set_default_dtype(torch.float64)."
        )
    return None


def _line(text: str) -> str:
    return (text.splitlines() or [""])[0].rstrip(".:! ")


def _plate(error: Exception) -> str:
    """The plate that Pyro was making."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_locals.get("size") == 0 and isinstance(frame.f_locals.get("name"), str):
            return f"plate '{frame.f_locals['name']}'"
    return "a plate"


def _sizes(kind: type[PviError], match: re.Match, place: _Place) -> PviError:
    plate, site, dim, size, came = match.groups()
    given = f" It was given {place.given}." if place.given else ""
    return kind(
        f"site '{site}' has {came} elements in dimension {dim}{_in(place)}, where plate '{plate}' "
        f"has {size}.{given} Make the plate as long as what is inside it, such as "
        f"pyro.plate('{plate}', len(y)); other dimensions need .to_event(...) or a plate of "
        "their own."
    )


def _in(place: _Place) -> str:
    return f" in {place.role}" if place.role else ""


def _outside(kind: type[PviError], text: str, place: _Place, roles: Roles) -> PviError:
    """A distribution was given what it can't have, by a parameter that is NaN or by the program."""
    held = [(place.role, place.params)]
    modules = {role: x for role, x in roles.items() if isinstance(x, nn.Module)}
    held += [(f"the {role}", dict(x.named_parameters())) for role, x in modules.items()]
    for role, parameters in held:
        for name, value in parameters.items():
            if bool(value.isnan().any()):
                return _broken(role, name)
    found = re.search(
        r"Expected parameter (\w+) .*?of distribution (\w+).*?to satisfy the constraint (.+?), but "
        r"found invalid values:?\s*(.*)",
        text,
        re.DOTALL,
    )
    if found is None:
        return kind(f"a value is outside the support{place}: {_line(text)}")
    parameter, name, constraint, values = found.groups()
    values = " ".join(values.split())
    came = re.search(r"-?(?:nan|inf|[\d.]+(?:e[+-]?\d+)?)", values)
    number = came[0].rstrip(".") if came else values[:40]
    number = came[0].rstrip(".") if came else values[:40]
    return kind(
        f"a {name} has the parameter {parameter} = {number}{place}, where it must satisfy "
        f"{constraint}. Map it there (.exp(), softplus, a constraint= of pyro.param), or check "
        "what it is computed from."
    )


def _broken(role: str, name: str) -> PviError:
    kind = GuideError if role == "the guide" else ModelError
    return kind(
        f"parameter '{name}' of {role or 'a program'} has NaN. Start it at finite numbers; if it "
        "comes from an earlier fit, that fit went wrong."
    )


def missing_values(named: Mapping[str, Any]) -> DataError | None:
    """An error for the first argument that holds NaN, if there is one."""
    for name, value in named.items():
        if isinstance(value, Tensor) and value.is_floating_point() and bool(value.isnan().any()):
            return DataError(
                f"argument '{name}' {where(value.isnan(), 'NaN')}, which made the model fail. "
                f"{MISSING}"
            )
        if isinstance(value, float) and value - value != 0.0:  # NaN or infinite
            return DataError(
                f"argument '{name}' is {value}, which made the model fail. Give it a finite number."
            )
    return None


def where(bad: Tensor, what: str) -> str:
    """How many entries are bad, and where the first is."""
    if bad.dim() == 0:
        return f"has {what}"
    first = bad.nonzero()[0].tolist()
    return f"has {what} in {int(bad.sum())} of {bad.numel()} entries (the first at index {first})"


def changed_sites(before: tuple[str, ...], now: tuple[str, ...], step: int) -> ModelError:
    """The error for sites that come or go in the course of training."""
    new, gone = [n for n in now if n not in before], [n for n in before if n not in now]
    name = (new or gone or ["?"])[0]
    what = "is there, but was not there" if new else "is not there, but was there"
    return ModelError(f"step {step}: site '{name}' {what} at the start of the fit. {SAME}")


SAME = (
    "The sites of model and guide must stay the same in every call: let nothing that is not a "
    "draw of a site decide about them (Python's random, a counter); an element that may be absent "
    "can be masked (poutine.mask)."
)


def later(error: PviError, step: int) -> PviError:
    """An error about sites, raised in the middle of training: the program must have changed."""
    if isinstance(error, FitError) or not isinstance(error, GuideError | ModelError):
        return error
    text = str(error)
    return ModelError(f"step {step}: {text} It was not so at the start of the fit. {SAME}")
