"""ops.py LOG [SECONDS]: an interpreter at work: objects made, looked up and dropped; "ops COUNT UNIX_MS" every 10 ms."""
import sys
import time

log = open(sys.argv[1], "w", buffering=1)
end = time.monotonic() + (float(sys.argv[2]) if len(sys.argv) > 2 else 1e9)
table = {i: (str(i), [i] * 8) for i in range(100_000)}
print("ready", __import__("os").getpid(), file=log)
ops = key = 0
following = time.monotonic() + 0.01
while True:
    for _ in range(50):
        key = (key * 1103515245 + 12345) % 100_000
        text, numbers = table[key]
        if int(text) != key or len(numbers) != 8:
            print("corrupt", key, file=log)
            sys.exit(3)
        table[key] = (text, numbers[1:] + [ops])
    ops += 50
    now = time.monotonic()
    if now >= following:
        print("ops %d %.3f" % (ops, time.time() * 1e3), file=log)
        following = now + 0.01
        if now > end:
            break
