"""A lab for a measurement: brought up with the block, gone after it, whatever happens in between.

Owns the dunlin commands and the workloads' logs. Refuses to know what is measured.
"""
import json
import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path

WORKLOADS = Path(__file__).resolve().parent.parent / "workloads"
PYTHON = "/usr/bin/python3"  # Debian's own: a version manager's shim would be measured instead


class Broken(Exception):
    """A measurement that could not be made, with the reason."""


def build(directory):
    """Compiles all workloads into a directory."""
    for source in sorted(WORKLOADS.glob("*.c")):
        command = ["gcc", "-O2", "-pthread", "-o", f"{directory}/{source.stem}", str(source)]
        subprocess.run(command, check=True)
    peer = WORKLOADS.parent / "peer" / "gapmeter.c"
    subprocess.run(["gcc", "-O1", "-o", f"{directory}/gapmeter", str(peer)], check=True)


class Workload:
    """A program that writes a log; native, or in a lab (then it has a PID that can be moved)."""

    def __init__(self, log, pid, process=None, lab=None):
        self.log, self.pid, self.process, self.lab = log, pid, process, lab

    def lines(self, word):
        """The log's lines that start with this word, as lists of their other fields; only whole lines."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        whole = text[: text.rfind("\n") + 1].splitlines()
        for line in whole:
            if line.startswith("corrupt"):
                raise Broken(f"{self.log.name}: {line}")
        return [line.split()[1:] for line in whole if line.split()[:1] == [word]]

    def until(self, word, count=1, seconds=120):
        """Waits for so many lines of a kind."""
        deadline = time.monotonic() + seconds
        while len(found := self.lines(word)) < count:
            if time.monotonic() > deadline:
                raise Broken(f"{self.log.name}: no {count} lines of '{word}' within {seconds} s")
            time.sleep(0.02)
        return found

    def stop(self):
        """Ends it, by its number."""
        if self.process:
            self.process.kill()
            self.process.wait()
        else:
            self.lab.call("kill", "-s", "KILL", str(self.pid), check=False)
            self.lab.call("wait", str(self.pid), check=False)


class Lab:
    """Three nodes; `with Lab(dunlin) as lab`."""

    def __init__(self, dunlin, nodes=3):
        self.dunlin, self.nodes, self.name = dunlin, nodes, f"bench-{os.getpid()}"
        self.temporary = tempfile.TemporaryDirectory(prefix="dunlin-bench-")
        self.work = Path(self.temporary.name)
        self.runs = 0

    def __enter__(self):
        build(self.work)
        # A terminated bench takes its lab down like an interrupted one.
        signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        try:
            self.command("lab", "up", "--name", self.name, "--nodes", str(self.nodes))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        subprocess.run([self.dunlin, "lab", "down", "--name", self.name], check=False, capture_output=True)
        self.temporary.cleanup()

    def command(self, *arguments, check=True):
        """Runs dunlin; its standard output."""
        done = subprocess.run([self.dunlin, *arguments], capture_output=True, text=True)
        if check and done.returncode:
            raise Broken(f"dunlin {' '.join(arguments)}: exit {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    def call(self, *arguments, check=True, node="n1"):
        """A command to a daemon of the lab."""
        return self.command("--lab", self.name, "--node", node, *arguments, check=check)

    def argv(self, program, *arguments):
        """A workload's command line; LOG stands for its log."""
        self.runs += 1
        log = self.work / f"{self.runs}-{program.split('.')[0]}.log"
        start = [PYTHON, str(WORKLOADS / program)] if program.endswith(".py") else [str(self.work / program)]
        return log, start + [str(log) if a == "LOG" else str(a) for a in arguments]

    def run(self, program, *arguments, node="n1"):
        """Starts a workload in a nest and waits until it is ready."""
        log, argv = self.argv(program, *arguments)
        pid = int(self.call("run", "-d", "--", *argv, node=node).strip())
        workload = Workload(log, pid, lab=self)
        workload.until("ready")
        return workload

    def native(self, program, *arguments):
        """Starts a workload on the machine itself and waits until it is ready."""
        log, argv = self.argv(program, *arguments)
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL)
        workload = Workload(log, process.pid, process=process)
        workload.until("ready")
        return workload

    def move(self, workload, to, wait="drained", mode="demand"):
        """Moves a workload. The report, with `asked_unix_ms` and `back_unix_ms` around the command."""
        asked = time.time() * 1e3
        text = self.call("move", str(workload.pid), to, "--wait", wait, "--mode", mode, "--json")
        report = json.loads(text)
        report = report[0] if isinstance(report, list) else report
        return report | {"asked_unix_ms": asked, "back_unix_ms": time.time() * 1e3}

    def inside(self, node, *argv):
        """A process in a node's network namespace (not in its nest): the floors run there."""
        command = [self.dunlin, "lab", "exec", "--name", self.name, node, "--", *map(str, argv)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def address(self, node):
        """A node's address on the lab's link."""
        show = self.command("lab", "exec", "--name", self.name, node, "--", "ip", "-4", "-br", "addr", "show", "scope", "global")
        return show.split()[2].split("/")[0]
