#!/usr/bin/env python3
"""What a move costs: every point of "Speed", each with its peer or floor measured in the same run.

    gap     longest gap gapmeter sees across a move, against CRIU's lazy migration of the same program
    fault   a demand fault as the program sees it, against the same round trip with nothing else
    drain   the rate at which left pages come, against one raw TCP stream over the same link
    sweep   a sequential reader right after a move: faults avoided, and its pace against its own before the move
    nest    fork and wait, arithmetic, system calls, file calls: in a nest and (but forks) after a drained move, against native
    lost    operations missing from the first second after the freeze began, against an unmoved second
    crowd   freeze time of a program of 300 mappings, and of one of 200 threads

Durations are medians. `quick` takes fewer samples and leaves out the largest sizes. Exit code: 0 if nothing broke
(a missed goal is a figure, not a failure), 1 otherwise.
"""
import subprocess
import sys
from pathlib import Path
from statistics import median, quantiles

sys.path.insert(0, str(Path(__file__).resolve().parent))
from drive.bench import main
from drive.lab import Broken
from drive.report import row

PEER = Path(__file__).resolve().parent / "peer"
ROUND = ["n2", "n3", "n1"]


def around(n):
    """Where to go next, n times, from n1."""
    return [ROUND[i % 3] for i in range(n)]


# --- gap ---------------------------------------------------------------------------------------------------------


def longest_gap(workload, since, until):
    """The longest gap that ended in this window of time (with none logged: the least that is logged)."""
    gaps = [float(ms) for ms, _, at in workload.lines("gap") if since <= float(at) <= until]
    return max(gaps, default=0.3)


def own_gap(lab, megabytes):
    """One moved gapmeter: the longest gap across the move, and the longest in as much time before it."""
    from time import sleep, time

    workload = lab.run("gapmeter", megabytes, "LOG", 120)
    try:
        began = time() * 1e3
        sleep(1)
        unmoved = longest_gap(workload, began, time() * 1e3)
        report = lab.move(workload, "n2")
        sleep(0.3)
        return longest_gap(workload, report["asked_unix_ms"], time() * 1e3), unmoved, report
    finally:
        workload.stop()


def peer_gap(megabytes):
    """One run of the peer; None if it did not succeed (it now and then does not)."""
    done = subprocess.run([str(PEER / "criu-lazy-gap"), str(megabytes)], capture_output=True, text=True)
    try:
        return float(done.stdout.strip())
    except ValueError:
        return None


def gap(lab, quick):
    smallest = None
    goals = {16: 1 / 100, 1024: 1 / 150}
    for megabytes, own_times, peer_times in [(16, 7, 5), (256, 5, 3), (1024, 5, 3), (4096, 3, 2)][: 2 if quick else 4]:
        if quick:
            own_times, peer_times = 3, 1
        runs = [own_gap(lab, megabytes) for _ in range(own_times)]
        own, unmoved = [r[0] for r in runs], [r[1] for r in runs]
        peers = [p for _ in range(peer_times) if (p := peer_gap(megabytes)) is not None]
        peer = median(peers) if peers else None
        goal = goals.get(megabytes) if peer else None
        freeze = median(r[2]["freeze_ms"] for r in runs)
        note = f"unmoved {median(unmoved):.2f} ms; freeze {freeze:.2f} ms" + ("" if peer else "; THE PEER FAILED IN EVERY RUN")
        yield row("gap", f"longest gap, {megabytes} MiB", "ms", own, against="CRIU lazy, ms", reference=peer, at_most=goal,
                  goal=f"≤ 1/{round(1 / goal)}" if goal else "", note=note, unmoved_ms=unmoved, freeze_ms=freeze, peer_ms=peers)
        smallest = smallest or median(own)
        if megabytes == 4096:
            yield row("gap", "longest gap, 4096 against 16 MiB", "ms", own, against="16 MiB, ms", reference=smallest, at_most=1.5, goal="≤ 1.5")


# --- fault and drain: the pages behind the program ------------------------------------------------------------------


def floor(lab, spin, count=4096):
    """Quantiles of the bare round trip between two namespaces of the lab, in us: p50 and p99."""
    mode = ["spin"] if spin else []
    port = 7801 + spin
    server = lab.inside("n2", lab.work / "floor", "serve", port, count // 256, *mode)
    try:
        if server.stdout.readline().strip() != "listening":
            raise Broken("the floor's server did not start")
        toucher = lab.inside("n1", lab.work / "floor", "touch", lab.address("n2"), port, count, *mode)
        took = sorted(float(line) for line in toucher.stdout)
        if toucher.wait() or len(took) != count:
            raise Broken("the floor's toucher failed")
        return took[count // 2], took[count * 99 // 100]
    finally:
        server.kill()
        server.wait()


def fault(lab, quick):
    blocked, spinning = floor(lab, False), floor(lab, True)
    p50s, p99s, reported, counted = [], [], [], 0
    for _ in range(2 if quick else 5):
        workload = lab.run("faultmeter", 512, "LOG", 120)
        try:
            report = lab.move(workload, "n2")
            resumed = report["asked_unix_ms"] + report["resumed_ms"]
            until = report["asked_unix_ms"] + report["drained_ms"]
            # A touch that began before the resume holds the freeze, not a fault.
            seen = [(float(us), float(at)) for us, at in workload.lines("touch")]
            took = [us for us, at in seen if resumed < at - us / 1e3 and at <= until]
        finally:
            workload.stop()
        counted += len(took)
        reported.append(report["fault_us"])
        if len(took) >= 20:
            cuts = quantiles(took, n=100)
            p50s.append(median(took)), p99s.append(cuts[98])
    if not p50s:
        raise Broken(f"only {counted} faults were seen while pages were away")
    note = f"{counted} faults while draining; floor blocked {blocked[0]:.0f}, spinning {spinning[0]:.0f} us; the pager's own count: p50 {median(r['p50'] for r in reported):.0f} us"
    best = min(blocked[0], spinning[0])
    yield row("fault", "demand fault p50", "us", p50s, against="floor p50, us", reference=best, at_most=1.5, goal="≤ 1.5", note=note)
    yield row("fault", "demand fault p99", "us", p99s, against="floor p99, us", reference=min(blocked[1], spinning[1]))


def stream(lab, megabytes):
    """One raw TCP stream from n1 to n2, MiB/s."""
    receiver = lab.inside("n2", lab.work / "stream", "receive", 7810)
    try:
        if receiver.stdout.readline().strip() != "listening":
            raise Broken("the stream's receiver did not start")
        sender = lab.inside("n1", lab.work / "stream", "send", lab.address("n2"), 7810, megabytes)
        rate = float(sender.stdout.read().strip() or "nan")
        if sender.wait() or receiver.wait():
            raise Broken("the raw stream failed")
        return rate
    finally:
        receiver.kill()
        receiver.wait()


def drain(lab, quick):
    megabytes, rates, streams = 512 if quick else 1024, [], []
    for _ in range(2 if quick else 5):
        streams.append(stream(lab, megabytes))
        workload = lab.run("hold", megabytes, "LOG", 120)
        try:
            report = lab.move(workload, "n2")
            pages = report["pages_faulted"] + report["pages_pushed"]
            rates.append(pages / 256 / ((report["drained_ms"] - report["resumed_ms"]) / 1e3))
            lab.call("kill", "-s", "TERM", str(workload.pid))
            workload.until("intact")
        finally:
            workload.stop()
    yield row("drain", f"drain of {megabytes} MiB", "MiB/s", rates, against="raw TCP, MiB/s", reference=median(streams), at_least=0.9,
              goal="≥ 0.9", stream_mib_s=streams)


# --- sweep --------------------------------------------------------------------------------------------------------


def sweep(lab, quick):
    megabytes = 256 if quick else 512
    chunks, paces, avoided = megabytes // 4, [], []
    for _ in range(2 if quick else 5):
        workload = lab.run("sweep", megabytes, "LOG", 120)
        try:
            workload.until("chunk", 3 * chunks)
            report = lab.move(workload, "n2")
            resumed = report["asked_unix_ms"] + report["resumed_ms"]
            lines = [(float(us), float(at)) for _, us, at in workload.lines("chunk")]
            before = [us for us, at in lines if at < report["asked_unix_ms"]][-2 * chunks:]
            while len(after := [us for _, us, at in workload.lines("chunk") if float(at) - float(us) / 1e3 > resumed]) < chunks:
                workload.until("chunk", len(workload.lines("chunk")) + 1)
            after = [float(us) for us in after[:chunks]]
        finally:
            workload.stop()
        paces.append(sum(after) / (sum(before) / len(before) * chunks))
        avoided.append(report["faults_avoided_ratio"])
    yield row("sweep", "faults avoided", "ratio", avoided, against="of all pages", ratio=median(avoided), at_least=0.97, goal="≥ 0.97")
    yield row("sweep", f"one sweep of {megabytes} MiB", "×", paces, against="unmoved sweep", reference=1.0, at_most=1.03, goal="≤ 1.03")


# --- nest ---------------------------------------------------------------------------------------------------------


def samples(workload, count):
    """The next so many samples of a running load."""
    have = len(workload.lines("sample"))
    return [float(us) for us, _ in workload.until("sample", have + count + 1)[have + 1: have + count + 1]]


def nest(lab, quick):
    count = 15 if quick else 40
    for kind, goal, text in [("forks", 1.25, "≤ 1.25"), ("cpu", 1.01, "≤ 1.01"), ("syscalls", 1.01, "≤ 1.01"), ("files", 1.01, "≤ 1.01")]:
        native, again, filtered, inside, moved = [], [], [], [], []
        for _ in range(2 if quick else 4):  # in turns, so that a slow minute of the machine hits all alike
            for into, extra in ((native, []), (filtered, ["filtered"]), (again, [])):
                workload = lab.native("load", kind, "LOG", 120, *extra)
                into += samples(workload, count)
                workload.stop()
            workload = lab.run("load", kind, "LOG", 120)
            try:
                inside += samples(workload, count)
                if kind != "forks":  # a child that shares the log's description just then would refuse the move
                    lab.move(workload, "n2")
                    moved += samples(workload, count)
            finally:
                workload.stop()
        base = median(native)
        note = f"native again: {median(again) / base:.3f} (what this run can resolve); native under a filter that allows all: {median(filtered) / base:.3f}"
        per = 100 if kind == "forks" else 1
        unit = "us" if kind == "forks" else "us/unit"
        name = "fork+wait" if kind == "forks" else kind
        yield row("nest", f"{name}, in a nest", unit, [s / per for s in inside], against="native", reference=base / per, at_most=goal, goal=text, note=note)
        if moved:
            yield row("nest", f"{name}, after a drained move", unit, moved, against="native", reference=base, at_most=goal, goal=text)


# --- lost ---------------------------------------------------------------------------------------------------------


def operations(lines, since, until):
    """How many operations fell into a window, interpolated between the counts around its ends."""
    def count_at(t):
        earlier = [(at, n) for at, n in lines if at <= t]
        later = [(at, n) for at, n in lines if at > t]
        if not earlier or not later:
            raise Broken("the log does not reach around the window")
        (a, na), (b, nb) = earlier[-1], later[0]
        return na + (nb - na) * (t - a) / (b - a)
    return count_at(until) - count_at(since)


def lost(lab, quick):
    from time import sleep

    for name, argv in [("python3", ["ops.py", "LOG", 120]), ("gapmeter-like, 256 MiB", ["opsmeter", 256, "LOG", 120])]:
        shares, freezes = [], []
        for _ in range(2 if quick else 5):
            workload = lab.run(*argv)
            try:
                workload.until("ops", 300)
                report = lab.move(workload, "n2")
                sleep(1.5)
                lines = [(float(at), int(n)) for n, at in workload.lines("ops")]
            finally:
                workload.stop()
            frozen = report["asked_unix_ms"] + report["prepare_ms"]
            before = [operations(lines, report["asked_unix_ms"] - s, report["asked_unix_ms"] - s + 1000) for s in (2100, 1050)]
            shares.append(1000 * (1 - operations(lines, frozen, frozen + 1000) / (sum(before) / 2)))
            freezes.append(report["freeze_ms"])
        yield row("lost", f"first second, {name}", "ms", shares, against="1000 unmoved", note=f"freeze {median(freezes):.2f} ms of it")


# --- crowd --------------------------------------------------------------------------------------------------------


def crowd(lab, quick):
    times = 3 if quick else 9
    for name, argv in [("small (16 MiB, one thread)", ["hold", 16, "LOG", 300]), ("300 mappings", ["crowd", "vmas", 300, "LOG", 300]),
                       ("200 threads", ["crowd", "threads", 200, "LOG", 300])]:
        workload = lab.run(*argv)
        try:
            reports = [lab.move(workload, node) for node in around(times)]
            if argv[0] == "crowd":
                workload.until("beat", len(workload.lines("beat")) + 2)
        finally:
            workload.stop()
        yield row("crowd", f"freeze, {name}", "ms", [r["freeze_ms"] for r in reports], note=f"prepare {median(r['prepare_ms'] for r in reports):.1f} ms, "
                  f"essence {median(r['essence_bytes'] for r in reports) / 1024:.0f} KiB")


if __name__ == "__main__":
    main("move", __doc__, (gap, fault, drain, sweep, nest, lost, crowd))
