"""Faults that need root: two hosts with a cable between them, and a disk that fills up.

The rows are those of docs/faults.md.  The hosts are network namespaces with names of their own, the disk is a tmpfs.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import checkpoint as checkpoints
from tests.commands import (
    BATCH,
    ENDLESS,
    ROOT,
    assert_bit_equal,
    checkpoints_of,
    command,
    left_of,
    make_workspace,
    partials,
    rows,
    started,
    state_of,
    status_of,
    train,
    trainer_words,
    wait_for,
    wait_for_images,
    wrapped,
)

pytestmark = pytest.mark.system

DISK_KIB = 8 << 10
NO_SPACE = "No space left on device"
QUIET = ("--log.every_steps", "1000000", "--log.grid_every_images", "0")
"""Options of a run that writes nothing but checkpoints."""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    if os.geteuid() != 0:
        pytest.skip("needs root")
    missing = [tool for tool in ("ip", "unshare", "mount", "umount") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"needs the program {missing[0]} (Debian's iproute2, util-linux and mount)")
    return make_workspace(tmp_path_factory.mktemp("faults"))


def ask_kernel(*words: str) -> None:
    """Run a command that a container may not be allowed to; the test is then skipped."""
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"refused here: {' '.join(words)}: {' '.join(done.stderr.split())}")


# Two hosts


class Hosts:
    """Two hosts, a and b, with a cable between them.  torchrun's store is on a."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        self.folder = folder
        self.spaces = {name: f"dcgan{os.getpid()}{name}" for name in "ab"}
        self.ends = {name: f"dc{os.getpid()}{name}" for name in "ab"}  # of the cable; at most 15 characters
        self.hosts_file = folder / "hosts"
        self.hosts_file.write_text("127.0.0.1 localhost\n10.77.0.1 nodea\n10.77.0.2 nodeb\n")
        for space in self.spaces.values():
            ask_kernel("ip", "netns", "add", space)
            stack.callback(subprocess.run, ["ip", "netns", "del", space], check=True)
        a, b = [("name", self.ends[name], "netns", self.spaces[name]) for name in "ab"]
        ask_kernel("ip", "link", "add", *a, "type", "veth", "peer", *b)
        for number, name in enumerate("ab", start=1):
            self.ip(name, "addr", "add", f"10.77.0.{number}/24", "dev", self.ends[name])
            self.ip(name, "link", "set", "lo", "up")
            self.ip(name, "link", "set", self.ends[name], "up")
            ask_kernel(*self._inside(name), "true")

    def ip(self, name: str, *words: str) -> None:
        subprocess.run(["ip", "-n", self.spaces[name], *words], check=True)

    def pull_the_cable(self) -> None:
        self.ip("b", "link", "set", self.ends["b"], "down")

    def _inside(self, name: str) -> list[str]:
        """What runs the following words on a host, as the process that it was itself."""
        script = 'hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"'
        words = ["ip", "netns", "exec", self.spaces[name], "unshare", "--uts", "--mount"]
        return [*words, "bash", "-c", script, "bash", f"node{name}", str(self.hosts_file)]

    @contextlib.contextmanager
    def train(self, workspace: Path, run: str, *options: str, grace_s: int) -> Iterator[dict[str, subprocess.Popen]]:
        """The same command on both, one rank each, in the background."""
        launcher = [sys.executable, str(ROOT / "launch/run.py"), "--nnodes=2", "--nproc_per_node=1"]
        launcher += ["--rdzv_backend=c10d", "--rdzv_endpoint=nodea:29550", "--rdzv_id=dcgan"]
        words = [*launcher, *trainer_words(workspace, run, *options)]
        environment = {"DCGAN_GRACE_S": str(grace_s), "TMPDIR": str(self.folder)}  # what a killed torchrun leaves there
        with contextlib.ExitStack() as stack:
            yield {
                name: stack.enter_context(started([*self._inside(name), *words], self.log(run, name), **environment))
                for name in "ab"
            }

    def log(self, run: str, name: str) -> Path:
        return self.folder / f"{run}-{name}.log"

    def said(self, run: str) -> dict[str, str]:
        return {name: self.log(run, name).read_text() for name in "ab"}


@pytest.fixture
def hosts(workspace, tmp_path):
    with contextlib.ExitStack() as stack:
        yield Hosts(tmp_path, stack)


def codes_within(seconds: float, launchers: dict[str, subprocess.Popen]) -> dict[str, int | None]:
    """Exit codes by host; None: it had not ended by then, and will be killed."""
    deadline = time.monotonic() + seconds
    while any(p.poll() is None for p in launchers.values()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return {name: p.returncode for name, p in launchers.items()}


@pytest.mark.parametrize("told", ["a", "b"])
def test_row_5_sigterm_to_one_node_of_two_stops_both_at_one_step_and_the_same_command_goes_on(workspace, hosts, told):
    """Bounds, measured on 2 cores: the node that is told ends after 2 to 4 s, the other one after 5 to 8.  If the store
    is on the other one, its torchrun waits for the first in vain, and is killed 5 s after its last worker.
    """
    run = workspace / f"row5-{told}"
    with hosts.train(workspace, run.name, *ENDLESS, grace_s=15) as launchers:
        wait_for_images(run, 96, launchers["a"])
        launchers[told].send_signal(signal.SIGTERM)
        assert codes_within(60, launchers) == {"a": 75, "b": 75}, hosts.said(run.name)
    assert not left_of(run)
    status = status_of(run)
    assert (status["state"], status["reason"], status["exit_code"]) == ("preempted", "SIGTERM", 75)
    newest = checkpoints_of(run)[-1]
    assert newest == status["images_seen"]
    assert len(state_of(run, newest)["rank_buffers"]) == 2
    assert all("run.py: preempted (SIGTERM)" in said for said in hosts.said(run.name).values())

    # On from there to 80 images more, and once against a run on one machine that went there in one piece.
    end = newest + 10 * BATCH
    options = ("--train.max_images", str(end), "--log.grid_every_images", "0")
    with hosts.train(workspace, run.name, *options, grace_s=15) as launchers:
        assert codes_within(120, launchers) == {"a": 0, "b": 0}, hosts.said(run.name)
    assert f"resuming after {newest} images" in "".join(hosts.said(run.name).values())
    assert checkpoints_of(run)[-1] == end
    if told == "b":
        train(workspace, "row5-whole", 2, *options)
        assert_bit_equal(state_of(run, end), state_of(workspace / "row5-whole", end))


def test_row_28_a_link_that_goes_down_ends_both_nodes_by_time_out(workspace, hosts):
    """Bounds, measured on 2 cores with a time-out of 10 s and a grace of 5: the workers end after 13 s, node a after 14
    and node b after 18, because torchrun hangs there in a read from the store and is killed after the grace.
    """
    run = workspace / "row28"
    options = (*ENDLESS, "--distributed.step_timeout_s", "10")
    with hosts.train(workspace, run.name, *options, grace_s=5) as launchers:
        wait_for_images(run, 96, launchers["a"])
        wait_for(lambda: checkpoints.folders(run), "a first checkpoint", launchers["a"])
        hosts.pull_the_cable()
        assert codes_within(60, launchers) == {"a": 1, "b": 1}, hosts.said(run.name)
    assert not left_of(run)
    status = status_of(run)
    assert (status["state"], status["exit_code"]) == ("failed", 1)
    assert status["reason"].startswith("lost another rank, killed or out of reach: rank ")
    # gloo's words, of the operation that waited too long and of the others that were under way
    assert any(text in status["reason"] for text in ("Timed out waiting 10000ms", "timeout caused pair closure"))
    found = {(line["rank"], line["lost_peer"]) for line in rows(run / "failures.jsonl")}
    assert found == {(0, True), (1, True)}
    assert checkpoints_of(run)
    assert not partials(run)


# A disk that fills up


class Disk:
    """A small disk of its own, mounted at `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def free(self) -> int:
        return shutil.disk_usage(self.path).free

    def fill(self, leave: int = 0) -> None:
        """Take all but `leave` bytes."""
        number = 0
        while (wanted := self.free - leave) > 0:
            with (self.path / f"filler-{number}").open("wb") as file, contextlib.suppress(OSError):
                os.posix_fallocate(file.fileno(), 0, wanted)  # refused where someone else was quicker: once more
            number += 1

    def make_room(self) -> None:
        for filler in self.path.glob("filler-*"):
            filler.unlink()


@pytest.fixture
def mount(workspace):
    """Mounts a small disk at a path; it is gone after the test."""
    with contextlib.ExitStack() as stack:

        def at(path: Path, kib: int = DISK_KIB) -> Disk:
            path.mkdir(parents=True)
            ask_kernel("mount", "-t", "tmpfs", "-o", f"size={kib}k", "dcgan-test", str(path))
            stack.callback(subprocess.run, ["umount", "--lazy", str(path)], check=True)
            return Disk(path)

        yield at


@pytest.mark.parametrize("ranks", [1, 2])
def test_row_16_no_checkpoint_is_begun_where_it_would_not_fit(workspace, mount, ranks):
    run = workspace / f"row16-before-{ranks}"
    disk, log = mount(run), run.with_suffix(".log")
    with started((wrapped if ranks > 1 else command)(workspace, run.name, ranks, *ENDLESS), log) as process:
        wait_for(lambda: checkpoints.folders(run), "a first checkpoint", process)
        disk.fill(leave=640 << 10)  # would do for the 200 KiB of a checkpoint, not for the MiB that shall stay free
        assert process.wait(60) == 74
    why = f"cannot write a checkpoint into {run}: it takes 1 MiB with some room to spare, "
    told = [line for line in log.read_text().splitlines() if line.startswith("train.py: ")]
    assert [line.startswith(f"train.py: error: {why}") for line in told] == [True]
    if ranks > 1:
        assert f"run.py: failed with 74 (input or output): {why}" in log.read_text()
    else:
        assert "Traceback" not in log.read_text()
    status = status_of(run)
    assert (status["state"], status["exit_code"]) == ("failed", 74)
    assert status["reason"].startswith(why)
    assert checkpoints_of(run)
    assert not partials(run)


def test_row_16_a_checkpoint_that_fills_the_disk_leaves_nothing_and_the_one_before_stays(workspace, mount):
    run = workspace / "row16-within"
    disk, log = mount(run), run.with_suffix(".log")
    words = command(workspace, run.name, 1, *ENDLESS, *QUIET, "--checkpoint.every_images", "800")
    with started(words, log, DCGAN_FAULT="slow-write:0:0") as process:
        wait_for(lambda: checkpoints_of(run) == [800], "a first checkpoint", process)
        wait_for(lambda: [p for p in partials(run) if (p / "state.pt").exists()], "a second one begun", process)
        disk.fill()
        assert process.wait(60) == 74
    why = f"cannot write the checkpoint {checkpoints.folder_of(run, 1600)}: {NO_SPACE}"
    told = [line for line in log.read_text().splitlines() if line.startswith("train.py: ")]
    assert told == [f"train.py: error: {why}"]
    assert "Traceback" not in log.read_text()
    status = status_of(run)  # there was room for it again once the half-written checkpoint had gone
    assert (status["state"], status["exit_code"], status["reason"]) == ("failed", 74, why)
    assert checkpoints_of(run) == [800]
    assert not partials(run)

    disk.make_room()
    said = train(workspace, run.name, 1, *QUIET, "--train.max_images", "880").stderr
    assert "resuming after 800 images" in said
    assert checkpoints_of(run) == [800, 840, 880]
    assert status_of(run)["state"] == "finished"


def assert_failed_for_want_of_room(run: Path) -> None:
    """Everything that was whole still is; status.json has the news where there was room for it."""
    assert status_of(run)["state"] in ("running", "failed")
    assert all({"launch", "error"} <= line.keys() for line in rows(run / "failures.jsonl"))
    assert checkpoints_of(run)
    assert not partials(run)


def test_row_16_a_disk_without_room_for_a_word_does_not_cost_the_exit_code(workspace, mount):
    run = workspace / "row16-full"
    disk, log = mount(run), run.with_suffix(".log")
    # In the block of an earlier start's line there is room for half of the next one.
    (run / "failures.jsonl").write_text('{"launch": "earlier", "error": "' + "x" * 3000 + '"}\n')
    with started(command(workspace, run.name, 1, *ENDLESS), log) as process:
        wait_for(lambda: checkpoints.folders(run), "a first checkpoint", process)
        disk.fill()
        assert process.wait(60) == 74
    (told,) = [line for line in log.read_text().splitlines() if line.startswith("train.py: ")]
    assert told.startswith("train.py: error: cannot write ")  # whichever file met it first
    assert told.endswith(NO_SPACE) or "with some room to spare" in told
    assert_failed_for_want_of_room(run)


def test_row_16_nor_does_one_that_holds_the_temporary_files_of_torchrun_as_well(workspace, mount):
    run = workspace / "row16-temporary"
    disk, log = mount(run), run.with_suffix(".log")
    with started(wrapped(workspace, run.name, 2, *ENDLESS), log, TMPDIR=str(run)) as process:
        wait_for(lambda: checkpoints.folders(run), "a first checkpoint", process)
        disk.fill()
        assert process.wait(60) == 74
    assert "run.py: failed with 74 (input or output): " in log.read_text()
    assert not left_of(run)
    assert_failed_for_want_of_room(run)


def test_row_16_a_full_disk_below_tensorboard_is_an_error_like_any_other(workspace, mount):
    run = workspace / "row16-tensorboard"
    disk, log = mount(run / "tensorboard", kib=64), run.with_suffix(".log")
    with started(command(workspace, run.name, 1, *ENDLESS), log) as process:
        wait_for(lambda: checkpoints.folders(run), "a first checkpoint", process)
        disk.fill()
        assert process.wait(60) == 74
    told = [line for line in log.read_text().splitlines() if line.startswith("train.py: ")]
    assert told == [f"train.py: error: cannot write {run / 'tensorboard'}: {NO_SPACE}"]
    status = status_of(run)
    assert (status["state"], status["exit_code"]) == ("failed", 74)
    assert checkpoints_of(run)
