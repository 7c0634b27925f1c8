"""Points of `scripts/bench sockets`: servers that go round a lab while clients on the outside host are at work.

What must be nothing: errors of the clients, resets that a nest has sent, retransmission timeouts of the outside host.
"""
import json
import re
import subprocess
import threading
import time
from statistics import median

from drive.lab import Broken
from drive.outside import addresses, again, client
from drive.report import row

ROUND = ("n2", "n3", "n1")
EVERY_SECONDS = 2
COUNT = "import sys\nfor name in ('netstat', 'snmp'):\n    sys.stdout.write(open('/proc/self/net/' + name).read())\n"
WRK_REPORT = """
done = function(summary, latency, requests)
  local e = summary.errors
  io.write(string.format('FIGURES %f %f %f %f %f %d\\n', summary.requests / summary.duration * 1e6, latency:percentile(50) / 1e3,
    latency:percentile(99) / 1e3, latency:percentile(99.9) / 1e3, latency.max / 1e3,
    e.connect + e.read + e.write + e.status + e.timeout))
end
"""


def count(text, key):
    """One of the counters of /proc/net/netstat or snmp."""
    lines = text.splitlines()
    for names, values in zip(lines[::2], lines[1::2]):
        if key in names.split():
            return int(values.split()[names.split().index(key)])
    raise Broken(f"{key} is not counted")


class Counters:
    """What TCP counts in a lab that must not be counted."""

    def __init__(self, lab):
        self.lab, self.before = lab, None
        self.before = self.now()

    def now(self):
        nests = [self.lab.call("run", "--", "/usr/bin/python3", "-c", COUNT, node=node) for node in ("n1", "n2", "n3")]
        outside = client(self.lab, "/usr/bin/python3", "-c", COUNT)
        return {"timeouts": count(outside, "TCPTimeouts"), "resets": sum(count(nest, "OutRsts") for nest in nests)}

    def since(self):
        return {name: value - self.before[name] for name, value in self.now().items()}


class Moves:
    """Moves a process round and round, for as long as the block takes."""

    def __init__(self, lab, pid, *flags):
        self.lab, self.pid, self.flags = lab, pid, flags
        self.freezes, self.failed, self.over = [], [], threading.Event()
        self.thread = threading.Thread(target=self.go)

    def go(self):
        due, n = time.monotonic() + EVERY_SECONDS / 2, 0
        while not self.over.wait(max(0, due - time.monotonic())):
            due += EVERY_SECONDS
            try:
                text = self.lab.call("move", self.pid, ROUND[n % 3], "--json", *self.flags)
                report = json.loads(text)
                self.freezes.append(max(r["freeze_ms"] for r in (report if isinstance(report, list) else [report])))
                n += 1
            except Broken as e:
                self.failed.append(str(e))

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        self.thread.join()


def served(point, lab, start, ready, load, flags=()):
    """Rows of one server: `load(seconds)` gives rate, p50, p99, p99.9, longest (ms) and errors."""
    pid = lab.call("run", "-d", "--cwd", str(lab.work), "--", *start).strip()
    try:
        again(ready, point)
        load(1)
        still = load(still_seconds := lab.seconds / 3)
        counters = Counters(lab)
        with Moves(lab, pid, *flags) as moves:
            moved = load(lab.seconds)
        if moves.failed or not moves.freezes:
            raise Broken(f"{len(moves.failed)} moves of {len(moves.failed) + len(moves.freezes)} failed: {moves.failed[:1]}")
        bad = counters.since() | {"errors": moved["errors"]}
    finally:
        lab.call("kill", "-s", "TERM", pid, check=False)
        lab.call("wait", pid, check=False)
    note = f"{len(moves.freezes)} moves, freeze {median(moves.freezes):.1f} ms, at most {max(moves.freezes):.1f}"
    for name, what in (("errors", "errors of the clients"), ("timeouts", "timeouts of the outside host"), ("resets", "resets sent by the nests")):
        yield row(point, what, "", [bad[name]], ratio=bad[name], at_most=0, goal="0", note=note if name == "errors" else "")
    for name, unit in (("rate", "1/s"), ("p50", "ms"), ("p99", "ms"), ("p99.9", "ms"), ("longest", "ms")):
        what = {"rate": "requests", "longest": "longest request"}.get(name, f"request {name}")
        yield row(point, what, unit, [moved[name]], against=f"without moves ({still_seconds:.0f} s)", reference=still[name])


def redis(lab, quick):
    lab.seconds = 15 if quick else 60
    outside, _ = addresses(lab)
    rate = [20_000.0]

    def load(seconds):
        requests = max(1000, int(rate[0] * seconds))
        done = client(lab, "redis-benchmark", "-h", outside, "-n", requests, "-c", 50, "-t", "get", "-d", 100, "-r", 1000)
        if "rror" in done:
            raise Broken(done)
        percentiles = [(float(p), float(ms)) for p, ms in re.findall(r"([\d.]+)% <= ([\d.]+) milliseconds \(cumulative", done)]
        rate[0] = float(re.search(r"throughput summary: ([\d.]+)", done)[1])
        _, _, p50, _, p99, longest = map(float, re.findall(r"[\d.]+", done.split("latency summary")[1].splitlines()[2]))
        return {"rate": rate[0], "p50": p50, "p99": p99, "p99.9": min(ms for p, ms in percentiles if p >= 99.9), "longest": longest, "errors": 0}

    def ready():
        if "PONG" not in client(lab, "redis-cli", "-h", outside, "ping"):
            raise Broken("redis does not answer")

    start = ["redis-server", "--bind", "0.0.0.0", "--protected-mode", "no", "--save", "", "--appendonly", "no"]
    yield from served("redis", lab, start, ready, load)


def web(lab, quick):
    lab.seconds = 15 if quick else 60
    outside, _ = addresses(lab)
    (lab.work / "www").mkdir()
    (lab.work / "www/page").write_text("some text\n" * 100)
    (lab.work / "report.lua").write_text(WRK_REPORT)
    lab.work.chmod(0o755)
    spools = "".join(f"{kind}_temp_path {lab.work}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    (lab.work / "nginx.conf").write_text(f"""
        daemon off; worker_processes 1; pid {lab.work}/nginx.pid; error_log {lab.work}/nginx.log;
        events {{ worker_connections 512; }}
        http {{ access_log off; keepalive_requests 1000000000; {spools} server {{ listen 8080; root {lab.work}/www; }} }}""")
    url = f"http://{outside}:8080/page"

    def load(seconds):
        done = client(lab, "wrk", "-t", 1, "-c", 50, "-d", f"{seconds:.0f}s", "--timeout", "10s", "-s", lab.work / "report.lua", url)
        figures = map(float, re.search(r"FIGURES (.*)", done)[1].split())
        return dict(zip(("rate", "p50", "p99", "p99.9", "longest", "errors"), figures))

    start = ["/usr/sbin/nginx", "-c", str(lab.work / "nginx.conf"), "-p", str(lab.work)]
    yield from served("web", lab, start, lambda: client(lab, "curl", "-sf", url), load, flags=("--tree",))


def many(lab, quick):
    megabytes, connections, times = (64 if quick else 1024), 1000, (3 if quick else 6)
    outside, _ = addresses(lab)
    workload = lab.run("connections", "serve", megabytes, 7000, "LOG")
    command = [lab.dunlin, "lab", "exec", "client", "--name", lab.name, "--", lab.work / "connections", "connect", outside, "7000", connections]
    clients = subprocess.Popen(list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    counters, freezes, rounds = Counters(lab), [], []
    try:
        def hear(wanted):
            if not (line := clients.stdout.readline()).startswith(wanted):
                raise Broken(f"the clients say {line!r} where '{wanted}' should be")
            return line

        hear("connected")
        for n in range(times):
            freezes.append(lab.move(workload, ROUND[n % 3])["freeze_ms"])
            clients.stdin.write("\n")
            clients.stdin.flush()
            rounds.append(float(hear("all").split()[1]) / 1e3)
        bad = counters.since()
    finally:
        clients.kill()
        clients.wait()
        workload.stop()
    note = f"timeouts {bad['timeouts']}, resets {bad['resets']}; afterwards all {connections:,} answered in {median(rounds):.1f} ms"
    yield row("many", f"freeze, {megabytes} MiB, {connections:,} connections", "ms", freezes, ratio=median(freezes), at_most=60, goal="≤ 60 ms", note=note)
