"""launch/multinode.sh: its command line, and two hosts made of network namespaces on this machine."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.commands import (
    BATCH,
    ENDLESS,
    ROOT,
    kill_tree,
    left_of,
    make_workspace,
    rows,
    started,
    status_of,
    trainer_words,
    wait_for,
    wait_for_images,
)

SCRIPT = ROOT / "launch/multinode.sh"
PATIENT_RENDEZVOUS = "last_call_timeout=5,keep_alive_interval=1"
"""A lost host is given up after 3 s, and 5 s more are left to others that may want to join; without it 15 and 30."""


def script(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """What it would start: /bin/echo in Python's place."""
    return subprocess.run(
        [SCRIPT, *words], env={"PATH": os.environ["PATH"], "PYTHON": "echo"} | environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_it_starts_the_wrapper_with_torchruns_options_and_hands_the_trainers_on():
    done = script("node1", "2", "8", "--config", "a.yaml")
    assert done.returncode == 0
    assert done.stdout.split() == [
        f"{ROOT}/launch/run.py", "--nnodes=2", "--nproc_per_node=8", "--max_restarts=0", "--rdzv_backend=c10d",
        "--rdzv_id=dcgan", "--rdzv_endpoint=node1:29400", f"{ROOT}/launch/train.py", "--config", "a.yaml",
    ]  # fmt: skip


def test_a_range_of_hosts_allows_restarts_and_a_port_an_id_and_an_address_can_be_given():
    words = script("10.0.0.1:5000", "1:4", "8", RUN_ID="a").stdout.split()
    assert {"--nnodes=1:4", "--max_restarts=10", "--rdzv_id=a", "--rdzv_endpoint=10.0.0.1:5000"} <= set(words)
    first = script("10.0.0.1", "2", "8", LOCAL_ADDR="10.0.0.1", PET_RDZV_CONF="read_timeout=9").stdout.split()
    assert {"--local_addr=10.0.0.1", "--rdzv_conf=is_host=1,read_timeout=9"} <= set(first)
    second = script("10.0.0.1", "2", "8", LOCAL_ADDR="10.0.0.2", RESTARTS="3").stdout.split()
    assert {"--local_addr=10.0.0.2", "--rdzv_conf=is_host=0", "--max_restarts=3"} <= set(second)


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        (("node1", "2"), "give FIRST_HOST[:PORT] HOSTS RANKS_PER_HOST"),
        (("--config", "2", "8"), "FIRST_HOST must be HOST or HOST:PORT, got '--config'"),
        (("node1:x", "2", "8"), "FIRST_HOST must be HOST or HOST:PORT, got 'node1:x'"),
        (("node1", "0", "8"), "HOSTS must be a number or MIN:MAX, got '0'"),
        (("node1", "3:2", "8"), "HOSTS must not end below its beginning, got '3:2'"),
        (("node1", "2", "--config"), "RANKS_PER_HOST must be a number of at least 1, got '--config'"),
    ],
)
def test_a_wrong_word_is_one_line_and_2(words, rule):
    done = script(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"multinode.sh: error: {rule}")
    assert done.stderr.count("\n") == 1


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=30)


class Hosts:
    """Two network namespaces with a cable between them, which know each other by name."""

    def __init__(self, folder: Path, names: tuple[str, str]) -> None:
        self.folder, self.names = folder, names
        self.spaces = {name: f"dcgan-{os.getpid()}-{name}" for name in names}
        numbered = "".join(f"10.77.0.{number} {name}\n" for number, name in enumerate(names, 1))
        (folder / "hosts").write_text(f"127.0.0.1 localhost\n{numbered}")

    def lay_cable(self) -> None:
        for space in self.spaces.values():
            ip("netns", "add", space)
        one, other = self.spaces.values()
        ip("-n", one, "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", other)
        for number, space in enumerate(self.spaces.values(), 1):
            ip("-n", space, "addr", "add", f"10.77.0.{number}/24", "dev", "cable")
            ip("-n", space, "link", "set", "lo", "up")
            ip("-n", space, "link", "set", "cable", "up")

    def remove(self) -> None:
        for space in self.spaces.values():
            subprocess.run(["ip", "netns", "del", space], capture_output=True, timeout=30, check=False)

    @contextlib.contextmanager
    def train(self, name: str, num_hosts: str, log: str, *trainer: str) -> Iterator[subprocess.Popen]:
        """multinode.sh on one host; the namespaces' programs become it, so its pid is the launcher's."""
        become = 'hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"'
        words = ["ip", "netns", "exec", self.spaces[name], "unshare", "--uts", "--mount", "bash", "-c", become, "host"]
        words += [name, str(self.folder / "hosts"), str(SCRIPT), self.names[0], num_hosts, "1", *trainer]
        environment = {"PYTHON": sys.executable, "PET_RDZV_CONF": PATIENT_RENDEZVOUS}
        with started(words, self.folder / log, **environment) as process:
            yield process


@pytest.fixture
def workspace(tmp_path):
    return make_workspace(tmp_path)


@pytest.fixture
def hosts(workspace):
    if os.geteuid() != 0:
        pytest.skip("network namespaces want root")
    if absent := [program for program in ("ip", "unshare", "mount") if shutil.which(program) is None]:
        pytest.skip(f"{', '.join(absent)} not found (apt-get install iproute2 util-linux)")
    found = Hosts(workspace, ("nodea", "nodeb"))
    try:
        found.lay_cable()
    except subprocess.CalledProcessError as error:
        found.remove()
        pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
    try:
        yield found
    finally:
        found.remove()


def options_of(workspace: Path, run: str, *options: str) -> list[str]:
    return trainer_words(workspace, run, "--log.every_steps", "1", *options)[1:]


def world_size(run: Path) -> int:
    """Ranks of the training that is under way; 0: none is yet."""
    with contextlib.suppress(FileNotFoundError):
        return status_of(run).get("world_size", 0)
    return 0


def set_max_images(workspace: Path, images: int) -> None:
    path = workspace / "tiny.yaml"
    settings = yaml.safe_load(path.read_text())
    settings["train"]["max_images"] = images
    path.write_text(yaml.safe_dump(settings))


@pytest.mark.system
def test_two_hosts_train_together_and_a_signal_to_one_saves_and_ends_both_with_75(hosts, workspace):
    run, words = workspace / "pair", options_of(workspace, "pair", *ENDLESS)
    with hosts.train("nodeb", "2", "b.log", *words) as second, hosts.train("nodea", "2", "a.log", *words) as first:
        wait_for_images(run, 8 * BATCH, first)
        assert world_size(run) == 2
        second.send_signal(signal.SIGTERM)
        assert (first.wait(100), second.wait(100)) == (75, 75)
    assert not left_of(run)
    status = status_of(run)
    assert (status["state"], status["reason"], status["exit_code"]) == ("preempted", "SIGTERM", 75)
    assert status["checkpoint"].endswith(f"images-{status['images_seen']:09d}")


@pytest.mark.system
def test_one_host_of_two_is_lost_the_other_goes_on_alone_and_takes_it_back(hosts, workspace):
    run, words = workspace / "elastic", options_of(workspace, "elastic", "--log.grid_every_images", "0")
    set_max_images(workspace, 80_000_000)
    with hosts.train("nodea", "1:2", "a.log", *words) as first:
        with hosts.train("nodeb", "1:2", "b.log", *words) as second:
            wait_for(lambda: world_size(run) == 2, "two ranks", first)
            wait_for_images(run, 8 * BATCH, first)
            kill_tree(second.pid)
        together = rows(run / "stats.jsonl")[-1]["images_seen"]
        wait_for(lambda: world_size(run) == 1, "one rank", first)
        wait_for_images(run, together + 8 * BATCH, first)
        with hosts.train("nodeb", "1:2", "b-again.log", *words) as second:
            wait_for(lambda: world_size(run) == 2, "two ranks again", first)
            alone = status_of(run)["images_seen"]
            wait_for_images(run, alone + 8 * BATCH, first)
            first.send_signal(signal.SIGTERM)
            assert (first.wait(100), second.wait(100)) == (75, 75), (workspace / "a.log").read_text()
    assert not left_of(run)
    assert "resuming after" in (workspace / "a.log").read_text()
    # A batch more at every row: none lost, none of another size, and never back to zero.
    seen = [row["images_seen"] for row in rows(run / "stats.jsonl")]
    assert seen == list(range(BATCH, status_of(run)["images_seen"] + 1, BATCH))
