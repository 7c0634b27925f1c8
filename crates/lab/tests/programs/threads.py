"""threads.py ROUNDS: four threads that compute with objects, strings, big numbers and locks; prints a digest.

The digest depends on every round of every thread and on nothing else: a moved run prints what an unmoved one does.
Says "round N" on the way, so that a driver can see it live.
"""
import hashlib
import queue
import random
import sys
import threading
import zlib

ROUNDS = int(sys.argv[1])
results = {}
lock = threading.Lock()
work = [queue.Queue() for _ in range(4)]


def one_round(generator, table, number):
    """Some of everything an interpreter does."""
    words = ["%x" % generator.getrandbits(48) for _ in range(400)]
    table.update((word, (number, word[::-1])) for word in words)
    for word in sorted(table)[: max(0, len(table) - 20_000)]:
        del table[word]
    big = pow(3, 2000 + number % 97, (1 << 521) - 1)
    packed = zlib.compress("".join(sorted(table)[:500]).encode(), 6)
    try:
        raise ValueError(big % 1_000_003)
    except ValueError as e:
        return zlib.crc32(packed) ^ e.args[0] ^ len(table)


def worker(me):
    """Takes rounds from its queue, in order, until told to end."""
    generator, table, digest = random.Random(me), {}, hashlib.sha256()
    while (number := work[me].get()) is not None:
        digest.update(b"%d %d;" % (number, one_round(generator, table, number)))
        with lock:
            results[me] = (number, digest.hexdigest())
        done.release()


done = threading.Semaphore(0)
threads = [threading.Thread(target=worker, args=(i,)) for i in range(4)]
for thread in threads:
    thread.start()
for number in range(ROUNDS):
    for q in work:
        q.put(number)
    for _ in work:
        done.acquire()
    if number % 5 == 0:
        print("round", number, flush=True)
for q in work:
    q.put(None)
for thread in threads:
    thread.join()
assert all(results[i][0] == ROUNDS - 1 for i in range(4)), results
print("digest", hashlib.sha256(repr(sorted(results.items())).encode()).hexdigest())
