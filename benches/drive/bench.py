"""What every bench is, but for its points: options, the table or JSON, the exit code.

A point is a function of a lab and of `quick` that yields rows. Owns the order, and what becomes of a point that breaks.
"""
import argparse
import os
import platform
import subprocess
import sys

from drive.lab import Broken, Lab
from drive.report import HEADER, as_json, broken, table_line


def machine():
    """What the figures were taken on."""
    return {"kernel": platform.release(), "cpus": os.cpu_count(), "load": os.getloadavg()[0],
            "memory_mib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20}


def main(name, about, points):
    """Measures the points that were asked for, each in a lab of its own, and ends the process."""
    points = {point.__name__: point for point in points}
    parser = argparse.ArgumentParser(prog=f"scripts/bench {name}", description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dunlin", required=True, help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="all figures as JSON on standard output, progress on standard error")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter samples, no large sizes")
    parser.add_argument("--only", default=",".join(points), help="points, separated by commas (default: all)")
    arguments = parser.parse_args()
    wanted = arguments.only.split(",")
    if unknown := set(wanted) - set(points):
        parser.error(f"no point {', '.join(sorted(unknown))}; there are {', '.join(points)}")
    out, rows, on = sys.stderr if arguments.json else sys.stdout, [], machine()

    def tell(made):
        rows.append(made)
        print(table_line(made), file=out, flush=True)

    print(f"kernel {on['kernel']}, {on['cpus']} CPUs, {on['memory_mib']} MiB, load {on['load']:.2f}\n{HEADER}", file=out, flush=True)
    try:
        for point in wanted:
            try:
                with Lab(arguments.dunlin) as lab:
                    for made in points[point](lab, arguments.quick):
                        tell(made)
            except (Broken, subprocess.SubprocessError, KeyError, TypeError, ValueError) as e:
                tell(broken(point, f"{type(e).__name__}: {e}"))
    except KeyboardInterrupt:
        sys.exit(130)
    if arguments.json:
        print(as_json(on, rows))
    sys.exit(any(r.verdict == "broken" for r in rows))
