"""When does it pay to capture steps, and to compile them? What `compile="auto"` does.

The time of a step by the programs, of its capture and of the compiler all grow with the number of
operations: a capture takes about 500 steps, and to compile a small model another 2,500, which save
more than half of each later step. So the number of steps decides. It is the same each time that a
fit is run, and so are then all its numbers.

Where the number of steps is known, captures are made where they are less than an eighth of it, and
compilations where they save more than they take. Where it is not, the steps that were taken stand
for those to come: the fit takes at most twice as long as by the best decision.
"""

EARLY = 64  # steps by the programs, if many more are to come
LONG = {"graph": 4_096, "inductor": 8_192}  # steps in all
LATE = {"graph": 512, "inductor": 4_096}  # steps taken, where their number is open
HEAVY = 4  # times as many, for networks, where arithmetic takes the time and a graph gains nothing


def choose(step: int, limit: int | None, *, small: bool) -> str:
    """By what steps are to be taken: "" for the programs, "graph", or "inductor".

    Args:
        step: how many are done.
        limit: how many there will be; `None` where that is open.
        small: whether calls of operations take most of the time, not their arithmetic.
    """
    for way in ("inductor", "graph") if small else ("inductor",):
        times = 1 if small else HEAVY
        if limit is None and step >= times * LATE[way]:
            return way
        if limit is not None and step >= EARLY and limit >= times * LONG[way]:
            return way
    return ""
