"""Times, sizes and names as people read them."""

import re

from rich.filesize import decimal

_UNITS = ("", "k", "m", "g", "t", "p")


def readable_bytes(count: float) -> str:
    """A number of bytes in the largest decimal unit that it fills, such as ``1.50 MB``."""
    return decimal(round(count), precision=2)


def parsed_bytes(text: str) -> float | None:
    """The bytes of a size such as ``8GB``, ``1.5 GiB`` or ``500 MB``; `None` if it is none."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([kmgtp]?)(i?)b?\s*", text, re.IGNORECASE)
    if found is None:
        return None
    number, unit, binary = found.groups()
    step = 1024.0 if binary else 1000.0
    return float(number) * step ** _UNITS.index(unit.lower())


def duration(seconds: float) -> str:
    """A time such as ``12.5 ms``, ``8.52 s``, ``3 min 05 s`` or ``2 h 10 min``."""
    if seconds < 0.9995:
        return f"{seconds * 1e3:#.3g} ms".replace(". ", " ")
    if seconds < 59.95:
        return f"{seconds:#.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def clock(seconds: float) -> str:
    """A time as a clock shows it: ``m:ss``, or ``h:mm:ss``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def short_names(names: list[str]) -> dict[str, str]:
    """Shortest unambiguous names: ``lr`` for ``model.lr``, if no other ends so."""
    parts = {name: name.replace(":", "/").replace("/", ".").split(".") for name in names}
    labels = {}
    for name in names:
        for length in range(1, len(parts[name]) + 1):
            label = ".".join(parts[name][-length:])
            others = (".".join(parts[other][-length:]) for other in names if other != name)
            if label not in others:
                break
        labels[name] = label
    return labels
