"""Programs in a lab's nests, on its outside host, and beside it, for measurements.

Owns how they are started and ended. Refuses to know what is measured.
"""
import json
import subprocess
import time

from drive.lab import Broken


def run(*command, check=True, **more):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **more)
    if check and done.returncode:
        raise Broken(f"{' '.join(map(str, command))}: exit {done.returncode}: {done.stderr.strip()}")
    return done.stdout


class Server:
    """A program that says when it is ready, and ends with the block."""

    def __init__(self, command, wait=True):
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        if wait and "ready" not in self.process.stdout.readline():
            raise Broken(f"{' '.join(command)} did not become ready")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()


class InNest:
    """A program in a nest, until the block ends."""

    def __init__(self, lab, node, *command):
        self.lab, self.pid = lab, lab.call("run", "-d", "--", *map(str, command), node=node).strip()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.lab.call("kill", "-s", "KILL", self.pid, check=False)
        self.lab.call("wait", self.pid, check=False)


def addresses(lab):
    status = json.loads(lab.command("lab", "status", "--name", lab.name, "--json"))
    return status["outside_address"], status["inside_address"]


def client(lab, *command, **more):
    return run(lab.dunlin, "lab", "exec", "client", "--name", lab.name, "--", *command, **more)


def again(attempt, what):
    """A listening socket is known to the other nodes a moment after it listens."""
    deadline = time.monotonic() + 10
    while True:
        try:
            return attempt()
        except Broken as e:
            if time.monotonic() > deadline:
                raise Broken(f"{what}: {e}") from None
            time.sleep(0.1)
