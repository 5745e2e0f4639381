"""Signals as a process gets them: each check is a child process, which imports little and so starts at once."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pipeline.signals import STOPPING, StopSignals

ROOT = Path(__file__).resolve().parent.parent
PATIENCE_S = 60
PREAMBLE = """
import ctypes, os, select, signal, sys, threading, time
from pipeline import signals
from pipeline.errors import Preempted
from pipeline.signals import STOPPING, StopSignals

def send(number):
    os.kill(os.getpid(), number)
"""


@contextlib.contextmanager
def child(script):
    process = subprocess.Popen(
        [sys.executable, "-c", PREAMBLE + script],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def output_of(script, code=0):
    with child(script) as process:
        out, _ = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == code, out
    return out.split("\n")[:-1]


def test_the_first_signal_is_noted_and_training_goes_on():
    script = """
with StopSignals() as stop:
    stop.training = True
    print(stop.received)
    send(signal.SIGUSR1)
    print(stop.received)
"""
    assert output_of(script) == ["0", str(int(signal.SIGUSR1))]


def test_signals_within_a_second_are_one_request_under_the_name_of_the_first():
    script = """
signals.SAME_REQUEST_S = 3600  # however slow this machine is
with StopSignals(at_once=print) as stop:
    stop.training = True
    for number in (signal.SIGHUP, *STOPPING, *STOPPING):
        send(number)
    print(stop.received)
"""
    assert output_of(script) == [str(int(signal.SIGHUP))]


IN_A_LIBRARY = {
    "lock": "lock = threading.Lock(); lock.acquire(); lock.acquire()",
    "sleep": "time.sleep(1000)",
    "select": "select.select([], [], [])",
    # Does not return when a signal comes: Python's own handlers never get to run.
    "a mutex of the C library": "mutex = ctypes.create_string_buffer(64); libc = ctypes.CDLL(None); "
    "libc.pthread_mutex_lock(mutex); libc.pthread_mutex_lock(mutex)",
    "a thread that is joined": "(thread := threading.Thread(target=threading.Event().wait)).start(); thread.join()",
}


@pytest.mark.parametrize("waits", IN_A_LIBRARY.values(), ids=IN_A_LIBRARY.keys())
def test_a_second_signal_ends_it_at_once_even_inside_a_library(waits):
    script = f"""
signals.SAME_REQUEST_S = 0.05
with StopSignals(at_once=lambda number: print("at once", number, flush=True)) as stop:
    stop.training = True
    print("ready", flush=True)
    {waits}
    print("it came back")
"""
    with child(script) as process:
        assert process.stdout.readline() == "ready\n"
        deadline = time.monotonic() + PATIENCE_S
        while process.poll() is None and time.monotonic() < deadline:  # the first, the same again, then a second
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.02)
        assert process.stdout.read() == f"at once {int(signal.SIGTERM)}\n"
        assert process.returncode == 128 + signal.SIGTERM


def test_what_the_last_words_meet_does_not_keep_it():
    """A disk that hangs, say: the process ends all the same, under the number of the signal that ended it."""
    script = """
signals.SAME_REQUEST_S = -1
def at_once(number):
    threading.Event().wait()
with StopSignals(at_once) as stop:
    stop.training = True
    send(signal.SIGTERM)
    send(signal.SIGINT)
    threading.Event().wait()
"""
    output_of(script, code=128 + signal.SIGINT)


def test_before_training_a_signal_ends_the_program_as_a_preemption():
    script = """
try:
    with StopSignals() as stop:
        send(signal.SIGTERM)
        time.sleep(1000)
except Preempted as error:
    print(error.reason, "/", error.images_seen, "/", error.exit_code)
    print([signal.getsignal(number) for number in STOPPING] == before)
"""
    script = "before = [signal.getsignal(number) for number in STOPPING]\n" + script
    assert output_of(script) == ["SIGTERM before the first step / 0 / 75", "True"]


def test_afterwards_all_is_as_before():
    script = """
mine = lambda *_: print("mine", flush=True)
signal.signal(signal.SIGHUP, mine)
before = [signal.getsignal(number) for number in STOPPING]
threads = threading.active_count()
for _ in range(3):
    with StopSignals() as stop:
        stop.training = True
        send(signal.SIGUSR1)
print([signal.getsignal(number) for number in STOPPING] == before)
print(signal.set_wakeup_fd(-1), threading.active_count() - threads, len(os.listdir("/proc/self/fd")) < 10)
send(signal.SIGHUP)
"""
    assert output_of(script) == ["True", "-1 0 True", "mine"]


def test_a_signal_that_is_none_of_ours_is_left_to_its_owner():
    script = """
signals.SAME_REQUEST_S = -1  # every signal after the first would end it
signal.signal(signal.SIGUSR2, lambda *_: print("usr2"))
with StopSignals() as stop:
    for _ in range(3):
        send(signal.SIGUSR2)
    print(stop.received)
"""
    assert output_of(script) == ["usr2", "usr2", "usr2", "0"]


def test_in_another_thread_than_the_main_one_signals_are_left_alone():
    before = [signal.getsignal(number) for number in STOPPING]
    seen = []

    def body():
        with StopSignals() as stop:
            seen.append(([signal.getsignal(number) for number in STOPPING], stop.received))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [(before, 0)]


def test_workers_are_told_when_the_process_that_started_them_dies():
    script = """
import subprocess
worker = r'''
import os, signal
from pipeline.signals import end_with_parent
signal.signal(signal.SIGTERM, lambda *_: os._exit(os.write(1, b"told\\n")))
end_with_parent()
signal.alarm(60)  # should it not be told
os.write(1, b"ready\\n")
signal.pause()
'''
subprocess.Popen([sys.executable, "-c", worker], stdout=sys.stdout)
signal.pause()
"""
    with child(script) as process:
        assert process.stdout.readline() == "ready\n"
        process.kill()
        assert process.stdout.read() == "told\n"
