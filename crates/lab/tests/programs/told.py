"""How a client on the outside host is told what to do: a line on standard input asks for more, an empty one ends it.

To "more" it answers "heard N" when every talk has heard something that it said after it was asked.
"""
import sys
import time


def obey(talks):
    """Until an empty line. A talk has `said` and `heard`, which grow alike, and `bad`: None, or what went wrong."""
    for line in sys.stdin:
        if not line.strip():
            return
        marks = [(talk, talk.said) for talk in talks]
        while not all(talk.heard > mark or talk.bad for talk, mark in marks):
            time.sleep(0.002)
        print("heard", min(talk.heard for talk in talks), flush=True)
