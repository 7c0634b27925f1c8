"""loops.py ROUNDS: asyncio with everything it has inside one process: timers, queues, threads that call back through the
self-pipe, signals through the wakeup descriptor, a socket pair as streams. Prints a digest that depends on every round."""

import asyncio
import hashlib
import os
import signal
import socket
import sys

rounds = int(sys.argv[1])


def work(n):
    return hashlib.sha256(bytes(n % 251 for n in range(n * 977 % 40000))).hexdigest()


async def main():
    loop = asyncio.get_running_loop()
    signals = asyncio.Queue()
    loop.add_signal_handler(signal.SIGUSR1, signals.put_nowait, 1)
    near, far = socket.socketpair()
    reader, writer = await asyncio.open_connection(sock=near)
    back, forth = await asyncio.open_connection(sock=far)
    digest = hashlib.sha256()

    async def echo():
        while line := await back.readline():
            forth.write(line.upper())
            await forth.drain()

    echoing = asyncio.create_task(echo())
    for n in range(rounds):
        jobs = [loop.run_in_executor(None, work, n * 4 + i) for i in range(4)]
        os.kill(os.getpid(), signal.SIGUSR1)
        writer.write(b"line %d of many\n" % n * 20)
        await asyncio.sleep(0.002)
        for job in jobs:
            digest.update((await job).encode())
        await signals.get()
        for _ in range(20):
            digest.update(await reader.readline())
        before = loop.time()
        try:
            await asyncio.wait_for(signals.get(), 0.003)
            raise SystemExit("a signal out of nothing")
        except asyncio.TimeoutError:
            if loop.time() - before < 0.003 - 1e-4:
                raise SystemExit("a timeout that came early")
    writer.write_eof()
    await echoing
    print("digest", digest.hexdigest())


asyncio.run(main())
