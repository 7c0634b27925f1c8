"""obedient.py DIR NAME: does what it is told by DIR/NAME.orders, a line each, and writes what came of it to
DIR/NAME.answers. Holds neither file open in between. fork_obedient(NAME) makes a child that takes its own orders."""
import ctypes, hashlib, mmap, os, random, signal, socket, subprocess, sys, time


def obey(directory, name):
    done = 0
    while True:
        try:
            with open(f"{directory}/{name}.orders") as orders:
                lines = orders.read().split("\n")[:-1]
        except FileNotFoundError:
            lines = []
        for order in lines[done:]:
            done += 1
            try:
                try:
                    answer = repr(eval(order, globals()))
                except SyntaxError:
                    exec(order, globals())
                    answer = "done"
            except Exception as error:
                answer = f"{type(error).__name__}: {error}"
            with open(f"{directory}/{name}.answers", "a") as answers:
                answers.write(answer + "\n")
        time.sleep(0.005)


def fork_obedient(name):
    pid = os.fork()
    if not pid:
        obey(sys.argv[1], name)
    return pid


def fork_leaving(code):
    pid = os.fork()
    if not pid:
        os._exit(code)
    return pid


if __name__ == "__main__":
    obey(sys.argv[1], sys.argv[2])
