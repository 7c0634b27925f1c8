"""Figures and their verdicts: one row a figure, a table for people, JSON for scripts.

Owns the words `met`, `missed` and `measured` (no goal was set). Refuses to know how a figure came about.
"""
import json
from dataclasses import asdict, dataclass, field
from statistics import median


@dataclass
class Row:
    """One figure: what it is, its value, what it is held against, and the goal for their ratio."""

    point: str
    figure: str
    unit: str
    value: float
    low: float
    high: float
    samples: int
    against: str = ""
    reference: float | None = None
    ratio: float | None = None
    goal: str = ""
    verdict: str = "measured"
    note: str = ""
    detail: dict = field(default_factory=dict)


def row(point, figure, unit, values, *, against="", reference=None, ratio=None, at_most=None, at_least=None, goal="", note="", **detail):
    """A row from its samples: median, least and most. A goal is a bound on the ratio."""
    values = sorted(values)
    made = Row(point, figure, unit, median(values), values[0], values[-1], len(values), against, reference, ratio, goal, note=note, detail=detail)
    if ratio is None and reference:
        made.ratio = made.value / reference
    if at_most is not None:
        made.verdict = "met" if made.ratio <= at_most else "missed"
    if at_least is not None:
        made.verdict = "met" if made.ratio >= at_least else "missed"
    return made


def broken(point, why):
    """A figure that could not be had."""
    return Row(point, "not measured", "", 0, 0, 0, 0, verdict="broken", note=why)


def number(x):
    """Three digits that matter."""
    if x is None:
        return "-"
    if x == 0:
        return "0"
    digits = max(0, 2 - int(f"{abs(x):e}".split("e")[1]))
    return f"{x:,.{digits}f}"


def table_line(r):
    """One row for people."""
    if r.verdict == "broken":
        return f"{r.point:<12} BROKEN: {r.note}"
    spread = f"{number(r.value)} ({number(r.low)}–{number(r.high)}, {r.samples}×)"
    against = f"{number(r.reference)} {r.against}" if r.reference is not None else r.against
    line = f"{r.point:<12} {r.figure:<34} {spread:<32} {r.unit:<7} {against:<34} {number(r.ratio):>8}  {r.goal:<9} {r.verdict}"
    return line + (f"\n{'':<12}   {r.note}" if r.note else "")


HEADER = f"{'point':<12} {'figure':<34} {'median (least–most, samples)':<32} {'unit':<7} {'against':<34} {'ratio':>8}  {'goal':<9} verdict"


def as_json(machine, rows):
    """All of it, for scripts."""
    return json.dumps({"machine": machine, "figures": [asdict(r) for r in rows]}, indent=1)
