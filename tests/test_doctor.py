"""launch/doctor.py: what it says of this machine, of two ranks, and of faults that are planted."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from kernels import native
from pipeline.cli import doctor
from pipeline.doctor import Check, folders, hardware, look, network, ranks, software, training
from pipeline.doctor.ranks import Meeting, Place
from pipeline.face_set import write_faces

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = str(ROOT / "launch/doctor.py")
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def free_port(monkeypatch) -> int:
    """MASTER_PORT names a port that nobody holds, whatever else runs here."""
    with socket.create_server(("", 0)) as server:
        number = server.getsockname()[1]
    monkeypatch.setenv("MASTER_PORT", str(number))
    return number


def only(checks: list[Check]) -> Check:
    assert len(checks) == 1, checks
    assert bool(checks[0].advice) == (checks[0].state != "ok"), checks
    return checks[0]


def places(folder: Path) -> list[str]:
    return ["--run.dir", str(folder / "runs/new"), "--data.cache_dir", str(folder / "cache")]


# As a whole


def test_this_machine_can_train_and_nothing_is_left_behind(tmp_path, capsys, free_port):
    write_faces(tmp_path / "faces", 3, workers=1)
    words = [*places(tmp_path), "--data.dataroot", str(tmp_path / "faces"), "--json", "--skip-training"]
    code = doctor.main(words)
    told = json.loads(capsys.readouterr().out)
    assert code == 0, [check for check in told["checks"] if check["state"] == "failed"]
    assert told["ok"] is True
    by_name = {check["name"]: check for check in told["checks"]}
    assert {
        "python",
        "torch",
        "torchvision",
        "jsonargparse",
        "dali",
        "gpus",
        "cpu",
        "cores",
        "memory",
    } <= by_name.keys()
    assert {"/dev/shm", "open files", "clock", "run folder", "cache folder", "host name", "port"} <= by_name.keys()
    assert all(bool(check["advice"]) == (check["state"] != "ok") for check in told["checks"])
    assert "3 images" in by_name["photographs"]["found"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["faces"]


def test_two_ranks_under_torchrun_add_up_train_and_are_told_by_one(tmp_path):
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", SCRIPT, "--json"]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [*words, *places(tmp_path), "--training-s", "1"], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    by_name = {check["name"]: check for check in told["checks"]}
    assert {"rendezvous", "machine", "versions", "clocks", "all-reduce", "training"} <= by_name.keys()
    assert [row["rank"] for row in told["ranks"]] == [0, 1]
    assert len({row["pid"] for row in told["ranks"]}) == 2
    assert [row["bytes"] for row in told["all_reduce"]] == [num_bytes for num_bytes, _ in ranks.MESSAGES]
    assert all(row["ms"] > 0 for row in told["all_reduce"])
    assert told["training"]["images_per_s"] > 0
    assert not list(tmp_path.glob("dcgan-doctor-*"))


def test_a_machine_without_torch_gets_a_table_and_no_traceback(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text("raise ImportError('libplanted.so: cannot open shared object file')")
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "COLUMNS": "300"}
    done = subprocess.run([sys.executable, SCRIPT, *places(tmp_path)], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    lines = done.stdout.splitlines()
    wrong = next(line for line in lines if "torch " in line and "failed" in line)
    assert "libplanted.so" in wrong
    assert lines[lines.index(wrong) + 1].strip().startswith("-> ")
    assert re.search(r"\d+ checks: .*cannot train before this is mended: torch; a training was not tried", lines[-1])
    columns = {line.index(line.split(maxsplit=1)[0]) for line in lines if re.match(r"  (ok|warning|failed) ", line)}
    assert columns == {2}


@pytest.mark.parametrize("words", [["--skip-trainin"], ["--training-s", "0"], ["--wait-s", "soon"], ["runs/a"]])
def test_a_wrong_option_is_one_line_and_2(words, capsys):
    assert doctor.main(words) == 2
    out, err = capsys.readouterr()
    assert not out
    assert re.fullmatch(r"doctor\.py: error: .*\n", err)


def test_a_look_that_stumbles_is_a_failed_check():
    def stumble() -> list[Check]:
        raise RuntimeError("\nCUDA error: unknown\nand much more")

    check = only(look("gpus", stumble))
    assert check.state == "failed"
    assert check.found.endswith("RuntimeError: CUDA error: unknown")


# Software


def test_the_least_versions_are_those_of_setup_py():
    least = software.minima()
    assert least["python"] == "3.11"
    assert {"torch", "torchvision", "jsonargparse", "nvidia-dali-cuda130", "nvidia-dali-cuda120"} <= least.keys()
    assert software.numbers("2.15.0+cu132") == (2, 15, 0) > software.numbers("2.11")
    assert software.numbers("2.9.1") < software.numbers("2.11")


def test_triton_wants_a_compiler_where_there_is_a_gpu(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr("shutil.which", lambda _name: None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert only(software.triton()).state == "ok"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    check = only(software.triton())
    assert check.state == "warning"
    assert check.advice.startswith("apt install gcc python3-dev; or --kernels.batchnorm torch ")


def test_a_package_that_is_missing_or_too_old_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    check = only(software.other("tqdm"))
    assert check.state == "failed"
    assert "cannot be imported" in check.found
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert only(software.torchvision()).state == "failed"
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    check = only(software.dali())
    assert check.state == "warning"
    assert "Pillow decodes instead" in check.found
    monkeypatch.setattr("importlib.metadata.version", lambda _: "1.0")
    check = only(software.other("numpy"))
    assert check.state == "failed"
    assert check.found == "1.0, 2 or newer is needed"
    assert only(software.python("3.10.4")).state == "failed"


def test_c_kernels_without_a_compiler_are_a_warning_and_without_the_instructions_they_are_not(monkeypatch):
    def no_compiler(_folder: Path | None = None, dtype: torch.dtype = torch.bfloat16) -> None:
        raise native.NativeError(native.NO_COMPILER)

    def too_old(_dtype: torch.dtype) -> str:
        raise native.NativeError("the processor lacks avx2")

    monkeypatch.setattr(native, "load", no_compiler)
    monkeypatch.setattr(native, "processor", lambda _dtype: "x86-64-v3")
    check = only(software.native_kernels())
    assert (check.state, check.advice) == ("warning", "apt install gcc")
    assert "there is no C compiler" in check.found
    monkeypatch.setattr(native, "processor", too_old)
    check = only(software.native_kernels())
    assert check.state == "ok"
    assert "the processor lacks avx2" in check.found


def test_dalis_package_goes_with_torchs_cuda():
    assert [software.dali_package(cuda) for cuda in ("12.8", "13.2", None)] == [
        *("nvidia-dali-cuda120", "nvidia-dali-cuda130", "nvidia-dali-cuda130")
    ]


# Hardware


def test_a_gpu_that_torch_cannot_use_is_a_failure_unless_it_is_hidden(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert only(hardware.gpus(devices=tmp_path)).state == "ok"
    (tmp_path / "nvidia0").touch()
    (tmp_path / "nvidiactl").touch()
    check = only(hardware.gpus(devices=tmp_path))
    assert check.state == "failed"
    assert check.found.startswith("1 here, but torch cannot use them")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert only(hardware.gpus(devices=tmp_path)).state == "ok"


@pytest.mark.parametrize(("limit", "state"), [(200, "failed"), (600, "warning"), (1024, "ok")])
def test_a_low_limit_of_open_files_is_found(limit, state):
    probe = f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({limit}, {limit}))\n"
    probe += "from pipeline.doctor.hardware import open_files; print(open_files()[0].state)"
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == state


@pytest.mark.parametrize(
    ("free", "gpus", "state"), [(32, 2, "failed"), (32, 1, "warning"), (300, 8, "warning"), (600, 8, "ok")]
)
def test_little_shared_memory_is_told_and_fails_where_several_gpus_need_it(free, gpus, state, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1 << 30, 0, free << 20))
    assert only(hardware.shared_memory(tmp_path, gpus)).state == state
    assert only(hardware.shared_memory(tmp_path / "none", gpus)).state == ("failed" if gpus > 1 else "warning")
    assert not list(tmp_path.iterdir())


def test_limits_of_cgroups_are_read_in_both_versions(tmp_path):
    for name, files in {
        "two/a": {"cpu.max": "150000 100000", "memory.max": "max", "memory.current": "5"},
        "two": {"cpu.max": "max 100000", "memory.max": "4000", "memory.current": "3000"},
        "one/cpu,cpuacct/b": {"cpu.cfs_quota_us": "50000", "cpu.cfs_period_us": "100000"},
        "one/memory": {"memory.limit_in_bytes": str((1 << 63) - 4096), "memory.usage_in_bytes": "9"},
        "one/memory/b": {"memory.limit_in_bytes": "1000", "memory.usage_in_bytes": "900"},
    }.items():
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        for file, text in files.items():
            (tmp_path / name / file).write_text(text + "\n")
    (tmp_path / "two/memory.stat").write_text("anon 2000\ninactive_file 500\n")
    (tmp_path / "in-two").write_text("0::/a\n")
    (tmp_path / "in-one").write_text("5:memory:/b\n4:cpu,cpuacct:/b\n1:name=systemd:/\n")
    assert hardware.limits(tmp_path / "two", tmp_path / "in-two") == hardware.Limits(1.5, 1500)
    assert hardware.limits(tmp_path / "one", tmp_path / "in-one") == hardware.Limits(0.5, 100)


def test_a_narrow_cgroup_is_told_with_the_settings_that_fit(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    check = only(hardware.cores(2, hardware.Limits(cpus=4.0)))
    assert check.state == "warning"
    assert "--distributed.threads 2 --data.workers 2" in check.advice
    assert only(hardware.cores(2, hardware.Limits(cpus=16.0))).state == "ok"
    assert only(hardware.cores(17)).state == "warning"
    check = only(hardware.memory(1, hardware.Limits(memory=100 << 20)))
    assert check.state == "failed"
    assert "by the cgroup's limit" in check.found


def test_a_busy_machine_is_told(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert only(hardware.load(4.0)).state == "ok"
    assert only(hardware.load(9.0)).state == "warning"


def test_unbound_threads_on_two_memory_nodes_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for node, cpus in enumerate(("0-3,8", "4-7", "")):
        (tmp_path / f"node{node}").mkdir()
        (tmp_path / f"node{node}/cpulist").write_text(cpus + "\n")
    assert only(hardware.numa(tmp_path, {0, 8})).found == "2 nodes, this process on node0"
    assert only(hardware.numa(tmp_path, {0, 4})).state == "warning"


def test_pinned_threads_and_a_clock_in_the_past_are_told(monkeypatch):
    monkeypatch.setenv("OMP_PROC_BIND", "false")
    assert only(hardware.threads()).state == "ok"
    monkeypatch.setenv("OMP_PROC_BIND", "close")
    assert only(hardware.threads()).advice == "unset OMP_PROC_BIND"
    assert only(hardware.clock(0.0)).state == "warning"


# Folders


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    for path in (Path("/proc/nowhere/run"), tmp_path / "file", tmp_path / "file/run"):
        check = only(folders.run_folder(path))
        assert check.state == "failed"
        assert str(path) in check.found
        assert only(folders.cache_folder(str(path))).state == "failed"


def test_a_full_disk_fails_for_checkpoints_and_warns_for_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "written", lambda _: 0.1)
    for free, state in ((100 << 20, "failed"), (300 << 20, "warning"), (4 << 30, "ok")):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: Usage(8 << 30, 0, free))
        assert only(folders.run_folder(tmp_path, mounts=Path("/dev/null"))).state == state
    assert only(folders.cache_folder(str(tmp_path), 100, Path("/dev/null"))).state == "ok"
    assert only(folders.cache_folder(str(tmp_path), 1_000_000, Path("/dev/null"))).state == "warning"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("kind", "run", "cache"),
    [("ext4", "ok", "ok"), ("nfs4", "ok", "warning"), ("fuse.sshfs", "ok", "warning"), ("tmpfs", "warning", "warning")],
)
def test_caches_over_the_network_and_in_memory_are_told(kind, run, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "written", lambda _: 0.1)  # whatever the disk of this test does
    place = tmp_path / "a disk"
    place.mkdir()
    mounts = tmp_path / "mounts"
    mounts.write_text(f"root / ext4 rw 0 0\nx {_escaped(place)} {kind} rw 0 0\n")
    assert folders.disk_under(place / "new", mounts) == folders.Disk(str(place), kind)
    assert only(folders.run_folder(place / "new", mounts=mounts)).state == run
    assert only(folders.cache_folder(str(place / "new"), mounts=mounts)).state == cache


def _escaped(path: Path) -> str:
    return str(path).replace(" ", r"\040")


def test_photographs_that_are_not_there_are_named(tmp_path):
    counted: list[int] = []
    assert only(folders.photographs(str(tmp_path / "none"), counted)).state == "failed"
    assert only(folders.photographs(str(tmp_path), counted)).state == "failed"
    assert not counted


def test_a_slow_disk_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "written", lambda _: 16.0)
    check = only(folders.run_folder(tmp_path, mounts=Path("/dev/null")))
    assert check.state == "warning"
    assert "a checkpoint takes 86 s" in check.found


# Network and ranks


def test_a_port_that_is_taken_is_told_with_who_holds_it():
    with socket.create_server(("127.0.0.1", 0)) as server:
        number = server.getsockname()[1]
        check = only(network.port(str(number)))
    assert check.state == "failed"
    assert f"(pid {os.getpid()})" in check.found
    assert only(network.port(str(number))).state == "ok"
    assert only(network.port("many")).state == "failed"


def test_a_host_name_without_an_address_that_others_reach_is_told(monkeypatch):
    assert only(network.host_name(2, "localhost")).state == "warning"
    assert only(network.host_name(1, "localhost")).state == "ok"

    def unknown(*_: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    check = only(network.host_name(name="nowhere"))
    assert check.state == "warning"
    assert "nowhere has no address here (Name or service not known)" in check.found


def test_a_rank_that_does_not_come_is_named():
    meeting = Meeting(dist.HashStore(), Place(0, 4, 0, 4), 0.1)
    findings = ranks.examine(meeting, [], "")
    assert not findings.well
    check = next(check for check in findings.checks if check.state == "failed")
    assert check.name == "rendezvous"
    assert check.found == "ranks 1-3 of 4 not here after 0.1 s"


def test_ranks_that_run_something_else_are_named():
    same = {"torch": "2.15", "this project": "a"}
    assert ranks.same_versions(dict.fromkeys(range(4), same)).state == "ok"
    told = {0: same, 1: same | {"torch": "2.14"}, 2: same, 3: same | {"torch": "2.14"}}
    check = ranks.same_versions(told)
    assert check.state == "failed"
    assert check.found == "not the same everywhere: torch 2.15 (ranks 0 and 2), 2.14 (ranks 1 and 3)"


def test_clocks_more_than_a_second_apart_are_told():
    assert ranks.clocks_agree({1: (0.9, 0.001), 2: (-0.2, 0.001)}).state == "ok"
    assert ranks.clocks_agree({1: (1.2, 0.5)}).state == "ok"  # not known to that precision
    check = ranks.clocks_agree({1: (0.1, 0.001), 2: (-3.0, 0.001)})
    assert check.state == "warning"
    assert "rank 2's: -3,000.0 ms" in check.found


def test_a_training_that_fails_or_leaves_nothing_is_told(tmp_path):
    checks, figures = training.judged(tmp_path, {0: training.Trained(0, ""), 1: training.Trained(-11, "decoding")})
    assert only(checks).found == "rank 1: killed by signal 11; decoding"
    assert not figures
    assert only(training.judged(tmp_path, {0: training.Trained(75, "")})[0]).state == "failed"


# Faults that need root


@pytest.mark.system
def test_small_disks_in_memory_are_found_as_they_are(tmp_path):
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("needs root and unshare")
    (tmp_path / "small").mkdir()
    small = tmp_path / "small"
    words = [
        sys.executable,
        SCRIPT,
        "--json",
        "--skip-training",
        "--run.dir",
        f"{small}/run",
        "--data.cache_dir",
        f"{small}/c",
    ]
    mounts = f"mount -t tmpfs -o size=32m tmpfs /dev/shm && mount -t tmpfs -o size=100m tmpfs {small}"
    script = f"{mounts} && exec {' '.join(words)}"
    done = subprocess.run(["unshare", "-m", "sh", "-c", script], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    by_name = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert by_name["/dev/shm"]["state"] in ("warning", "failed")
    assert by_name["/dev/shm"]["found"].startswith("32.0 MiB of 32.0 MiB free")
    assert by_name["run folder"]["state"] == "failed"
    assert "tmpfs, 100.0 MiB free" in by_name["run folder"]["found"]
    assert by_name["cache folder"]["state"] == "warning"
