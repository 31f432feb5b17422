"""Functions for the sandbox's tests: each misbehaves in its own way, inside the child."""

import os
import signal
import time
from pathlib import Path

import numpy as np

from db.errors import NotDicom


def echo(value):
    return {"value": value, "pid": os.getpid()}, []


def arrays():
    return {}, [np.arange(6, dtype="<i2").reshape(2, 3), np.zeros((0, 3), "f4"), np.array(1.5)]


def spin():
    while True:
        pass


def sleep(seconds):
    time.sleep(seconds)
    return {}, []


def swallow_memory():
    return {"n": len(bytearray(10**10))}, []


def crash():
    os.kill(os.getpid(), signal.SIGSEGV)


def leave():
    os._exit(0)


def fail():
    raise ValueError("Doe^Jane")


def refuse():
    raise NotDicom("the data set is cut off")


def write_file(path):
    with open(path, "wb") as file:
        file.write(b"x" * 100)
        file.flush()
    return {}, []


def huge_answer():
    return {}, [np.zeros(3 * 2**20, np.uint8)]


def objects():
    return {}, [np.array([{}], dtype=object)]


def environment():
    return dict(os.environ), []


def stdin_is_empty():
    return {"read": os.read(0, 10).decode(), "torch": "torch" in __import__("sys").modules}, []


def parent_file(path):
    Path(path).touch()
    time.sleep(60)
    return {}, []
