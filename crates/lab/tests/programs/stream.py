"""Long conversations whose every byte is checked. Uses nothing but the standard library.

  echo PORT [ADDRESS]          TCP and UDP on PORT: what comes is sent back
  talk ADDRESS PORT COUNT      COUNT connections, each sends without waiting for answers and checks what comes back, until
                               they are told to end (told.py); at last "BYTES same|DIFFERENT|error, longest silence N ms"
  ask ADDRESS PORT             the same with datagrams, one at a time; lost ones are asked again
  counters                     prints what TCP has counted in this network: timeouts, resets
"""
import os
import random
import socket
import sys
import threading
import time

import told

WINDOW = 1 << 18


def family(address):
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def echo(port, address="::"):
    door = socket.socket(family(address))
    door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    udp = socket.socket(family(address), socket.SOCK_DGRAM)
    for s in (door, udp):
        if address == "::":
            s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        s.bind((address, port))
    door.listen(128)

    def connection(c):
        with c:
            while what := c.recv(65536):
                c.sendall(what)

    def datagrams():
        while True:
            udp.sendto(*udp.recvfrom(65536))

    threading.Thread(target=datagrams, daemon=True).start()
    print("ready", flush=True)
    while True:
        threading.Thread(target=connection, args=(door.accept()[0],), daemon=True).start()


class Talk(threading.Thread):
    """One connection: what was sent and is not heard again is at most WINDOW."""

    def __init__(self, address, port, seed):
        super().__init__(daemon=True)
        self.socket = socket.socket(family(address))
        self.socket.connect((address, port))
        self.seed, self.heard, self.silence, self.bad = seed, 0, 0.0, None
        self.said, self.ended, self.moved = 0, False, threading.Condition()

    def run(self):
        threading.Thread(target=self.speak, daemon=True).start()
        numbers, expected, last = random.Random(self.seed), b"", time.monotonic()
        try:
            while got := self.socket.recv(1 << 16):
                now = time.monotonic()
                self.silence, last = max(self.silence, now - last), now
                while len(expected) < len(got):
                    expected += numbers.randbytes(4096)
                if not expected.startswith(got):
                    self.bad = "DIFFERENT"
                    break
                expected = expected[len(got) :]
                with self.moved:
                    self.heard += len(got)
                    self.moved.notify()
        except OSError as error:
            self.bad = str(error)

    def speak(self):
        numbers, sizes = random.Random(self.seed), random.Random(-self.seed)
        ready = b""
        try:
            while True:
                with self.moved:
                    while self.said - self.heard > WINDOW and not self.ended and self.bad is None:
                        self.moved.wait(1)
                    if self.ended or self.bad is not None:
                        break
                size = sizes.choice((1, 30, 1448, 5000, 60000))
                while len(ready) < size:
                    ready += numbers.randbytes(4096)
                self.socket.sendall(ready[:size])
                ready = ready[size:]
                with self.moved:
                    self.said += size
            self.socket.shutdown(socket.SHUT_WR)
        except OSError as error:
            self.bad = self.bad or str(error)


def talk(address, port, count):
    talks = [Talk(address, port, seed) for seed in range(1, count + 1)]
    for one in talks:
        one.start()
    told.obey(talks)
    for one in talks:
        with one.moved:
            one.ended = True
            one.moved.notify()
    for one in talks:
        one.join(60)
    bad = [one.bad or "unfinished" for one in talks if one.bad or one.is_alive() or one.heard != one.said]
    total, silence = sum(one.heard for one in talks), max(one.silence for one in talks)
    print(f"{total} {bad[0] if bad else 'same'}, longest silence {silence * 1000:.1f} ms", flush=True)


class Ask(threading.Thread):
    """Datagrams, one after the other has come back."""

    def __init__(self, address, port):
        super().__init__(daemon=True)
        self.socket = socket.socket(family(address), socket.SOCK_DGRAM)
        self.socket.connect((address, port))
        self.socket.settimeout(0.5)
        self.said, self.heard, self.lost, self.bad, self.ended = 0, 0, 0, None, False

    def run(self):
        try:
            while not self.ended:
                self.said += 1
                self.round(f"{self.said} ".encode() * random.Random(self.said).choice((1, 100, 900)))
                self.heard += 1
        except OSError as error:
            self.bad = str(error)

    def round(self, word):
        while True:
            self.socket.send(word)
            try:
                while self.socket.recv(65536) != word:
                    pass
                return
            except TimeoutError:
                self.lost += 1


def ask(address, port):
    one = Ask(address, port)
    one.start()
    told.obey([one])
    one.ended = True
    one.join(60)
    print(one.bad or f"{one.heard} answered, {one.lost} lost", flush=True)


def counters():
    wanted = ("TCPTimeouts", "EstabResets", "TCPAbortOnTimeout", "PAWSEstab", "TCPOFODrop", "InErrs")
    for name in ("netstat", "snmp"):
        lines = open(f"/proc/self/net/{name}").read().splitlines()
        for names, values in zip(lines[::2], lines[1::2]):
            for key, value in zip(names.split()[1:], values.split()[1:]):
                if key in wanted and names.startswith(("TcpExt", "Tcp:")):
                    print(key, value)


what, rest = sys.argv[1], sys.argv[2:]
if what == "echo":
    echo(int(rest[0]), *rest[1:])
elif what == "talk":
    talk(rest[0], int(rest[1]), int(rest[2]))
elif what == "ask":
    ask(rest[0], int(rest[1]))
else:
    counters()
