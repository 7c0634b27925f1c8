"""Clients of real servers, which check every answer. They are told when to end by told.py; the last line is "N rounds right", or
what went wrong.

  redis ADDRESS PORT COUNT     COUNT connections with pipelines of SET, INCR, APPEND and GET, and one message after the other from
                               a publisher to a subscriber: each must come once, in order
  lines ADDRESS PORT COUNT     lines, to a server that swaps their cases
  knock ADDRESS PORT COUNT     the same, with a new connection for each line
  post ADDRESS PORT COUNT      HTTP requests with a body, to a server that answers with its SHA-256; a new connection now and then
  fetch ADDRESS PORT COUNT     downloads of /big, whose SHA-256 is in /digest
"""
import hashlib
import http.client
import random
import socket
import sys
import threading
import time

import told


class Talk(threading.Thread):
    """Rounds, one after the other, until it is ended."""

    def __init__(self, address, number):
        super().__init__(daemon=True)
        self.address, self.number = address, number
        self.said, self.heard, self.bad, self.ended, self.longest = 0, 0, None, False, 0.0

    def run(self):
        try:
            self.open()
            while not self.ended:
                begun = time.monotonic()
                self.said += 1
                self.round(random.Random(f"{self.number} {self.said}"))
                self.heard += 1
                self.longest = max(self.longest, time.monotonic() - begun)
            self.close()
        except Exception as error:  # noqa: BLE001: whatever it is, it is what went wrong
            self.bad = f"talk {self.number}, round {self.said}: {error!r}"

    def open(self):
        self.socket = socket.create_connection(self.address, 30)
        self.reader = self.socket.makefile("rb")

    def close(self):
        self.socket.close()

    def expect(self, wanted):
        got = self.reader.read(len(wanted))
        if got != wanted:
            raise ValueError(f"{got[:60]} in place of {wanted[:60]}")


def command(*words):
    """As redis reads it."""
    words = [word if isinstance(word, bytes) else str(word).encode() for word in words]
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in words)


class Pipeline(Talk):
    """Each round is a batch of commands, sent before any answer is read. What is appended grows and is compared."""

    def open(self):
        super().open()
        self.text = b""

    def round(self, dice):
        sends, answers, name = [], [], f"talk{self.number}"
        for i in range(30):
            value = dice.randbytes(dice.choice((3, 100, 2000)))
            key = f"{name}:{dice.randrange(50)}"
            sends += [command("SET", key, value), command("INCR", name), command("GET", key)]
            count = (self.said - 1) * 30 + i + 1
            answers += [b"+OK\r\n", b":%d\r\n" % count, b"$%d\r\n%s\r\n" % (len(value), value)]
        part = dice.randbytes(8)
        self.text += part
        sends += [command("APPEND", f"{name}:text", part), command("GET", f"{name}:text")]
        answers += [b":%d\r\n" % len(self.text), b"$%d\r\n%s\r\n" % (len(self.text), self.text)]
        self.socket.sendall(b"".join(sends))
        self.expect(b"".join(answers))


class Subscriber(Talk):
    """A round is a message; it ends by one that says so."""

    def open(self):
        super().open()
        self.socket.sendall(command("SUBSCRIBE", "news"))
        self.expect(b"*3\r\n$9\r\nsubscribe\r\n$4\r\nnews\r\n:1\r\n")

    def round(self, dice):
        self.expect(b"*3\r\n$7\r\nmessage\r\n$4\r\nnews\r\n$")
        length = int(self.reader.readline())
        text = self.reader.read(length + 2)[:-2]
        self.ended = text == b"end"
        if not self.ended and text != str(self.said).encode():
            raise ValueError(f"message {text} in place of {self.said}")


class Publisher(Talk):
    """Its subscriber gets each of its messages, once and in order; it is a few ahead."""

    AHEAD = 50

    def open(self):
        super().open()
        self.subscriber = Subscriber(self.address, "subscriber")
        self.subscriber.start()
        while self.subscriber.said == 0:
            self.listened()

    def listened(self):
        if self.subscriber.bad:
            raise ValueError(self.subscriber.bad)
        time.sleep(0.0005)

    def round(self, dice):
        self.socket.sendall(command("PUBLISH", "news", self.said))
        self.expect(b":1\r\n")
        while self.said - self.subscriber.heard > self.AHEAD:
            self.listened()

    def close(self):
        self.socket.sendall(command("PUBLISH", "news", "end"))
        self.expect(b":1\r\n")
        self.subscriber.join(30)
        self.listened()
        if self.subscriber.heard != self.heard + 1:
            raise ValueError(f"{self.heard} messages were published, {self.subscriber.heard - 1} came")


class Lines(Talk):
    def round(self, dice):
        line = f"{self.number} says Hello {'World' * dice.choice((0, 3, 300, 12000))}\n".encode()
        self.socket.sendall(line)
        self.expect(line.swapcase())


class Knock(Lines):
    """What it says is there before anybody has accepted it."""

    def open(self):
        pass

    def close(self):
        pass

    def round(self, dice):
        super().open()
        super().round(dice)
        super().close()


class Post(Talk):
    def open(self):
        self.connection = http.client.HTTPConnection(*self.address, timeout=30)

    def close(self):
        self.connection.close()

    def round(self, dice):
        body = dice.randbytes(dice.choice((10, 2000, 100_000)))
        self.connection.request("POST", "/", body)
        answer = self.connection.getresponse().read().decode().strip()
        if answer != hashlib.sha256(body).hexdigest():
            raise ValueError(f"{answer[:80]} is not the digest")
        if dice.randrange(40) == 0:
            self.connection.close()  # the next request connects anew


class Fetch(Post):
    def get(self, path):
        self.connection.request("GET", path)
        return self.connection.getresponse()

    def open(self):
        super().open()
        self.digest = self.get("/digest").read().decode().strip()

    def round(self, dice):
        answer, digest, parts = self.get("/big"), hashlib.sha256(), []
        while part := answer.read(1 << 16):
            digest.update(part)
            parts.append(part)
        if digest.hexdigest() != self.digest:
            raise ValueError(f"what was downloaded is not what is there: {where(b''.join(parts))}")


def where(got):
    """The first few places at which a download differs, and where what came instead is to be found."""
    wanted, found, at = random.Random(1).randbytes(20 << 20), [], 0
    while at < len(got) and len(found) < 5:
        if got[at : at + 4096] == wanted[at : at + 4096]:
            at += 4096
            continue
        start = next((i for i in range(at, min(at + 4096, len(got))) if got[i] != wanted[i]), at)
        end = start
        while end < len(got) and got[end : end + 16] != wanted[end : end + 16]:
            end += 1
        found.append(f"{start}..{end} holds {got[start:start + 8].hex()}, which is at {wanted.find(got[start:start + 16])}")
        at = end + 1
    return f"{len(got)} bytes; " + "; ".join(found)


KINDS = {"redis": Pipeline, "lines": Lines, "knock": Knock, "post": Post, "fetch": Fetch}
what, address, port, count = sys.argv[1:]
address = (address, int(port))
talks = [KINDS[what](address, number) for number in range(int(count))]
if what == "redis":
    talks.append(Publisher(address, "publisher"))
for talk in talks:
    talk.start()
told.obey(talks)
for talk in talks:
    talk.ended = True
for talk in talks:
    talk.join(60)
bad = [talk.bad or "it does not end" for talk in talks if talk.bad or talk.is_alive()]
longest = max(talk.longest for talk in talks) * 1000
print(bad[0] if bad else f"{sum(talk.heard for talk in talks)} rounds right, the longest took {longest:.0f} ms", flush=True)
