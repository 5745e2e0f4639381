"""The container file, the lock and the Apptainer definition: read without an engine, and built in a Debian root.

`make test-system` carries out the Dockerfile's steps, one by one, in a root that debootstrap makes: as root, with
Debian's packages debootstrap and util-linux, and a network.  It takes minutes and gigabytes below the temporary folder;
what pip downloads stays in pip's own cache.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tomllib
from pathlib import Path, PurePosixPath
from unittest import mock

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.commands import (
    ENDLESS,
    ROOT,
    children_of,
    make_workspace,
    started,
    status_of,
    wait_for,
    wait_for_images,
    wrapped,
)

DEFINITION = ROOT / "launch/container/dcgan.def"
LINUX_X86 = {"sys_platform": "linux", "platform_machine": "x86_64", "extra": ""}


@dataclasses.dataclass(frozen=True)
class Step:
    """One instruction: RUN, its flags such as --mount, and the rest of the line."""

    name: str
    flags: tuple[str, ...]
    words: str


def steps(text: str) -> list[Step]:
    """A container file's instructions, lines joined, comments left out."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    found = []
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        name, rest = line.split(maxsplit=1)
        assert "<<" not in rest, "here-documents are not read here"
        flags = []
        while name in ("RUN", "COPY") and rest.startswith("--"):
            flag, rest = rest.split(maxsplit=1)
            flags.append(flag)
        found.append(Step(name, tuple(flags), " ".join(rest.split())))
    return found


def commands_of(words: str) -> list[str]:
    """What && joins, one by one."""
    return [command.strip() for command in words.split("&&")]


STEPS = steps((ROOT / "Dockerfile").read_text())
RUNS = [step for step in STEPS if step.name == "RUN"]
IGNORED = [p for p in (ROOT / ".dockerignore").read_text().splitlines() if p and not p.startswith("#")]


def is_ignored(path: PurePosixPath) -> bool:
    """Whether .dockerignore leaves a path of the clone out, itself or a folder above it."""
    for part in (path, *path.parents[:-1]):
        for pattern in IGNORED:
            anywhere = pattern.startswith("**/")
            name = part.name if anywhere else str(part)
            if fnmatch.fnmatchcase(name, pattern.removeprefix("**/").lstrip("/")):
                return True
    return False


def base_image() -> str:
    """The default of the ARG that FROM names."""
    (default,) = [step.words for step in STEPS if step.name == "ARG" and step.words.startswith("BASE=")]
    return default.removeprefix("BASE=")


def locked() -> dict[str, list[Requirement]]:
    """The lock's requirements by name; a version for each Python where they differ."""
    found: dict[str, list[Requirement]] = {}
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        if line and not line.startswith((" ", "#")):
            requirement = Requirement(line.rstrip(" \\"))
            found.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    return found


def wanted() -> list[Requirement]:
    """What setup.py asks for on Linux x86-64, for training and for the tests, and what builds the project."""
    with mock.patch("setuptools.setup") as setup:
        runpy.run_path(str(ROOT / "setup.py"))
    given = setup.call_args.kwargs
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    found = [Requirement(text) for text in [*given["install_requires"], *given["extras_require"]["dev"], *build]]
    return [each for each in found if each.marker is None or each.marker.evaluate(LINUX_X86)]


def test_the_base_is_named_by_an_argument_with_a_release_and_no_registry():
    assert [step.words for step in STEPS if step.name == "FROM"] == ["${BASE}"]
    name, _, tag = base_image().partition(":")
    assert tag not in ("", "latest", "stable", "slim")
    assert not set("./") & set(name)


def test_nothing_is_fetched_but_by_apt_and_pip():
    assert not any(step.name == "ADD" for step in STEPS)
    assert not any(re.search(r"\b(curl|wget|git clone|https?:)", step.words) for step in RUNS)


def test_apt_takes_no_more_than_named_and_leaves_no_lists():
    for step in RUNS:
        if "apt-get install" in step.words:
            assert "--no-install-recommends" in step.words
            assert commands_of(step.words)[0] == "apt-get update"
            assert commands_of(step.words)[-1] == "rm -rf /var/lib/apt/lists/*"


def test_pip_installs_the_lock_by_hash_and_the_project_alone_and_leaves_no_cache():
    installs = [(step, command) for step in RUNS for command in commands_of(step.words) if "pip install" in command]
    assert len(installs) == 2
    (lock_step, lock), (_, project) = installs
    assert "--require-hashes --requirement requirements.lock" in lock
    assert {"--no-deps", "--no-build-isolation", "--no-index", "--no-cache-dir"} <= set(project.split())
    mounted = any(flag.startswith("--mount=type=cache,") for flag in lock_step.flags)
    assert mounted or "--no-cache-dir" in lock


def test_a_changed_source_file_does_not_install_the_lock_again():
    copies = [step.words for step in STEPS if step.name == "COPY"]
    assert copies == ["requirements.lock ./", ". ."]
    order = [i for i, step in enumerate(STEPS) if step.words == ". ." or "--require-hashes" in step.words]
    assert [STEPS[i].name for i in order] == ["RUN", "COPY"]


def test_it_runs_as_a_user_with_a_number_who_is_not_root_and_without_an_entrypoint():
    assert [step.words for step in STEPS if step.name == "USER"] == ["10001:10001"]
    assert not any(step.name == "ENTRYPOINT" for step in STEPS)


def test_what_is_written_to_lies_in_volumes():
    (volume,) = [step.words for step in STEPS if step.name == "VOLUME"]
    (environment,) = [step.words for step in STEPS if step.name == "ENV"]
    homes = [word.partition("=")[2] for word in environment.split() if word.partition("=")[2].startswith("/")]
    for path in homes:
        assert path.startswith("/opt/venv/") or any(path.startswith(v) for v in json.loads(volume)), path


@pytest.mark.parametrize(
    "path", [".git/HEAD", ".venv/bin/python", "data/faces/1.jpg", "runs/a/status.json", "pipeline/__pycache__/x.pyc"]
)
def test_data_runs_and_history_stay_out_of_the_image(path):
    assert is_ignored(PurePosixPath(path))


@pytest.mark.parametrize("path", ["Makefile", "pipeline/loop.py", "configs/quickstart.yaml", "tests/test_container.py"])
def test_the_project_is_in_the_image(path):
    assert (ROOT / path).exists()
    assert not is_ignored(PurePosixPath(path))


def test_the_lock_holds_whatever_setup_py_asks_for_at_a_version_that_satisfies_it():
    have = locked()
    for requirement in wanted():
        pins = have.get(canonicalize_name(requirement.name), [])
        assert pins, f"{requirement.name} is not in requirements.lock: make lock"
        for pin in pins:
            (version,) = [each.version for each in pin.specifier]
            assert requirement.specifier.contains(version, prereleases=True), f"{requirement} but {pin}: make lock"


def test_the_lock_names_versions_and_hashes_and_no_index():
    text = (ROOT / "requirements.lock").read_text()
    assert "://" not in text
    assert not re.search(r"^-", text, re.MULTILINE), "options do not belong here"
    for name, pins in locked().items():
        for pin in pins:
            assert [each.operator for each in pin.specifier] == ["=="], name
    entries = re.split(r"^(?=[a-z0-9])", text, flags=re.MULTILINE)[1:]
    assert len(entries) == sum(len(pins) for pins in locked().values())
    assert all("--hash=sha256:" in entry for entry in entries)


def test_the_lock_has_one_version_of_each_package_on_every_python():
    assert {name for name, pins in locked().items() if len(pins) > 1} == set()


def sections(text: str) -> dict[str, list[str]]:
    """An Apptainer definition's sections by name, the header as "": lines joined and stripped, comments left out."""
    found: dict[str, list[str]] = {"": []}
    name = ""
    for line in text.replace("\\\n", " ").splitlines():
        if line.startswith("%"):
            name = line[1:].strip()
            found[name] = []
        elif line.strip() and not line.lstrip().startswith("#"):
            found[name].append(" ".join(line.split()))
    return found


def test_apptainer_takes_the_same_base_and_the_same_steps():
    definition = sections(DEFINITION.read_text())
    assert definition[""] == ["Bootstrap: docker", f"From: {base_image()}"]
    ours = [command for step in RUNS for command in commands_of(step.words) if not command.startswith("useradd")]
    same = [command.replace("--cache-dir /root/.cache/pip", "--no-cache-dir") for command in ours]
    assert [line for line in definition["post"] if not line.startswith(("set ", "cd "))] == same


def test_apptainer_copies_what_training_and_tests_need():
    pairs = [line.split() for line in sections(DEFINITION.read_text())["files"]]
    for source, target in pairs:
        assert (ROOT / source).exists(), source
        assert target == f"/opt/dcgan-faces/{source}"
    need = {"Makefile", "setup.py", "pyproject.toml", "requirements.lock", "README.md", "LICENSE", "Dockerfile"}
    need |= {"benchmarks", "configs", "docs", "kernels", "launch", "pipeline", "tests"}
    assert need <= {source for source, _ in pairs}


@pytest.mark.parametrize("section", ["post", "environment", "runscript", "test"])
def test_apptainers_scripts_are_shell(section):
    script = "\n".join(sections(DEFINITION.read_text())[section])
    done = subprocess.run(["/bin/sh", "-n"], input=script, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


APEX_STEPS = steps((ROOT / "launch/container/apex.Dockerfile").read_text())
APEX_STAGES = (ROOT / "launch/container/apex.def").read_text().split("Bootstrap: ")[1:]


def test_apex_is_built_offline_from_a_context_with_its_kernels_and_without_isolation():
    runs = [step for step in APEX_STEPS if step.name == "RUN"]
    assert not any(re.search(r"\b(curl|wget|git clone|apt-get|https?:)", step.words) for step in runs)
    assert [step.words.split("pip ")[1].split()[0] for step in runs] == ["wheel", "install"]
    for step in runs:
        assert {"--no-index", "--no-deps", "--no-cache-dir"} <= set(step.words.split())
    assert "--no-build-isolation" in runs[0].words
    (environment,) = [step.words.split() for step in APEX_STEPS if step.name == "ENV"]
    assert {"APEX_CPP_EXT=1", "APEX_CUDA_EXT=1", "CUDA_HOME=/usr/local/cuda"} <= set(environment)


def test_apexs_image_is_the_trainers_with_a_wheel_and_its_user():
    last = max(i for i, step in enumerate(APEX_STEPS) if step.name == "FROM")
    assert APEX_STEPS[last].words == "${TRAINER}"
    assert [step.name for step in APEX_STEPS[last:]] == ["FROM", "USER", "RUN", "USER"]
    assert [step.words for step in APEX_STEPS if step.name == "USER"][-1] == "10001:10001"
    assert any(step.words.startswith("--from=apex ") or "--from=apex" in step.flags for step in APEX_STEPS)


def test_apptainer_builds_apex_by_the_same_steps():
    cuda, build, final = (sections(f"Bootstrap: {stage}") for stage in APEX_STAGES)
    images = {step.words.partition("=")[0]: step.words.partition("=")[2] for step in APEX_STEPS if step.name == "ARG"}
    assert f"From: {images['CUDA']}" in cuda[""]
    assert all("From: dcgan.sif" in stage[""] for stage in (build, final))
    ours = [step.words for step in APEX_STEPS if step.name == "RUN"]
    theirs = [line for stage in (build, final) for line in stage["post"] if " pip " in f" {line} " and "-m pip" in line]
    assert theirs == ours
    exported = {line.removeprefix("export ").replace('"', "") for line in build["post"] if line.startswith("export")}
    (environment,) = [step.words for step in APEX_STEPS if step.name == "ENV"]
    filled = environment.replace("${ARCHITECTURES}", images["ARCHITECTURES"].strip('"')).replace(
        "${JOBS}", images["JOBS"]
    )
    assert exported == set(filled.split())
    for stage in (build, final):
        done = subprocess.run(["/bin/sh", "-n"], input="\n".join(stage["post"]), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", ["Dockerfile", "launch/container/apex.Dockerfile"])
def test_hadolint_has_nothing_to_say(path):
    hadolint = shutil.which("hadolint", path=f"{ROOT / 'build/tools/bin'}{os.pathsep}{os.environ['PATH']}")
    if hadolint is None:
        pytest.skip("no hadolint: make build/tools/.ready")
    done = subprocess.run([hadolint, str(ROOT / path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# --- as root -----------------------------------------------------------------------------------------------------


def need_root(*programs: str) -> None:
    """Skip where namespaces and chroot are not ours to make."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"no {program}: install Debian's package that has it")


@contextlib.contextmanager
def first_process(words: list[str], log: Path, **environment: str):
    """A command as process 1 of a process namespace of its own, as in a container; and its pid as seen from here."""
    with started(["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", *words], log, **environment) as outer:
        wait_for(lambda: children_of(outer.pid), "the first process", outer)
        yield outer, children_of(outer.pid)[0]


@pytest.mark.system
def test_as_first_process_the_wrapper_passes_sigterm_on_and_buries_orphans(tmp_path):
    need_root("unshare", "nsenter")
    workspace, log = make_workspace(tmp_path), tmp_path / "log"
    with first_process(wrapped(workspace, "run", 2, *ENDLESS), log) as (outer, first):
        wait_for_images(workspace / "run", 40, outer)
        orphan = ["nsenter", f"--target={first}", "--pid", "sh", "-c", "(sleep 0.1 &)"]
        subprocess.run(orphan, check=True)
        wait_for(lambda: len(children_of(first)) == 2, "the orphan under process 1", outer)
        wait_for(lambda: len(children_of(first)) == 1, "torchrun as the only child again", outer)
        os.kill(first, signal.SIGTERM)
        assert outer.wait(60) == 75, log.read_text()
    assert status_of(workspace / "run")["state"] == "preempted"


@dataclasses.dataclass
class Image:
    """A Debian root in which a container file's steps are carried out."""

    root: Path
    pip_cache: Path
    environment: dict[str, str] = dataclasses.field(
        default_factory=lambda: {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
    )
    workdir: str = "/"
    user: str = "0:0"
    volumes: list[str] = dataclasses.field(default_factory=list)

    def carry_out(self, step: Step) -> None:
        """One instruction, as an engine would."""
        if step.name == "RUN":
            self.run(step)
        elif step.name == "COPY":
            *sources, target = step.words.split()
            for source in sources:
                self.copy(source, self.root / str(PurePosixPath(self.workdir, target)).lstrip("/"))
        elif step.name == "ENV":
            for word in shlex.split(step.words):
                key, _, value = word.partition("=")
                self.environment[key] = value.replace("${PATH}", self.environment["PATH"])
        elif step.name == "WORKDIR":
            self.workdir = step.words
            (self.root / step.words.lstrip("/")).mkdir(parents=True, exist_ok=True)
        elif step.name == "USER":
            self.user = step.words
        elif step.name == "VOLUME":
            self.volumes = json.loads(step.words)
        else:
            assert step.name in ("ARG", "FROM", "LABEL", "CMD"), f"{step.name} is not carried out here"

    def copy(self, source: str, target: Path) -> None:
        if source != ".":
            shutil.copy2(ROOT / source, target)
            return

        def left_out(folder: str, names: list[str]) -> set[str]:
            inside = PurePosixPath(Path(folder).relative_to(ROOT).as_posix())
            return {name for name in names if is_ignored(inside / name)}

        shutil.copytree(ROOT, target, ignore=left_out, dirs_exist_ok=True, symlinks=True)

    def run(self, step: Step) -> None:
        caches = [dict(o.partition("=")[::2] for o in f.removeprefix("--mount=").split(",")) for f in step.flags]
        mounts = []
        for cache in caches:
            assert cache["type"] == "cache"
            inside = self.root / cache["target"].lstrip("/")
            inside.mkdir(parents=True, exist_ok=True)
            mounts.append(f"mount --bind {shlex.quote(str(self.pip_cache))} {shlex.quote(str(inside))}")
        words = self.words(["/bin/sh", "-c", step.words], mounts, engine=True)
        done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600)
        assert done.returncode == 0, f"{step.words}\n{done.stdout[-4000:]}"

    def words(self, command: list[str], mounts: list[str], *, engine: bool = False) -> list[str]:
        """The command as process 1 within the root, everything mounted gone with it.

        Args:
            command: What runs, with the user, folder and environment of the steps so far.
            mounts: Shell commands before the root is changed.
            engine: With what an engine lends to a build: its proxies and its certificates.
        """
        environment, root = dict(self.environment), shlex.quote(str(self.root))
        lent = ["true"]
        if engine:
            environment |= {k: v for k, v in os.environ.items() if k.lower().endswith("_proxy")}
            environment["DEBIAN_FRONTEND"] = "noninteractive"
            if certificates := os.environ.get("PIP_CERT"):
                lent = [f"cp {shlex.quote(certificates)} {root}/run/certificates"]
                environment["PIP_CERT"] = "/run/certificates"
        script = [
            "set -eu",
            *mounts,
            f"mount -t proc proc {root}/proc",
            f"mount -t tmpfs -o mode=1777,size=64m shm {root}/dev/shm",
            f"mount -t tmpfs run {root}/run",
            f"mount -t tmpfs -o mode=1777 tmp {root}/tmp",
            *lent,
            f'exec chroot --userspec={self.user} {root} /usr/bin/env --ignore-environment --chdir={self.workdir} "$@"',
        ]
        assignments = [f"{key}={value}" for key, value in environment.items()]
        unshare = ["unshare", "--mount", "--pid", "--ipc", "--fork", "--kill-child"]
        return [*unshare, "/bin/sh", "-c", "\n".join(script), "sh", *assignments, *command]

    def sealed(self) -> list[str]:
        """Mounts that make all but the volumes read-only, as `docker run --read-only` does."""
        root = shlex.quote(str(self.root))
        volumes = [f"mount --bind {root}{volume} {root}{volume}" for volume in self.volumes]
        return [f"mount --bind {root} {root}", *volumes, f"mount -o remount,ro,bind {root}"]


@pytest.fixture(scope="module")
def image():
    """The container file's steps, all of them, on a Debian of the base's name."""
    need_root("debootstrap", "unshare", "chroot")
    match = re.fullmatch(r"debian:([a-z]+)-slim", base_image())
    assert match, "debootstrap makes a Debian"
    folder = Path(os.environ.get("TMPDIR", "/var/tmp"), f"dcgan-image-{os.getpid()}")
    folder.mkdir()
    try:
        root = folder / "root"
        bootstrap = ["unshare", "--mount", "debootstrap", "--variant=minbase", match[1], str(root)]
        done = subprocess.run(bootstrap, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=400)
        assert done.returncode == 0, done.stdout[-2000:]
        shutil.copy("/etc/resolv.conf", root / "etc/resolv.conf")  # this and the next an engine writes, too
        (root / "etc/hosts").write_text(f"127.0.0.1 localhost {socket.gethostname()}\n")
        asked = subprocess.run(
            [sys.executable, "-m", "pip", "cache", "dir"], capture_output=True, text=True, check=True
        )
        cache = Path(asked.stdout.strip())
        cache.mkdir(parents=True, exist_ok=True)
        made = Image(root, cache)
        for step in STEPS:
            made.carry_out(step)
        yield made
    finally:
        shutil.rmtree(folder)


@pytest.mark.system
def test_the_steps_of_the_container_file_make_a_root_that_trains_read_only_as_its_user(image):
    tiny = "--train.max_images 256 --train.batch_size 32 --model.ngf 4 --model.ndf 4 --model.nz 8"
    make = ["make", "VENV=", "train", f"ARGS={tiny}"]
    done = subprocess.run(image.words(make, image.sealed()), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    run = image.root / "runs/quickstart"
    assert status_of(run)["state"] == "finished"
    assert (run / "report.html").stat().st_uid == 10001


@pytest.mark.system
def test_in_that_root_two_ranks_of_any_user_are_preempted_with_75(image, tmp_path):
    anyone = dataclasses.replace(image, user="4242:4242")  # who has no entry in the root's passwd
    words = ["python", "launch/run.py", "--standalone", "--nproc_per_node=2", "launch/train.py"]
    words += ["--data.dataroot", "/data/faces", "--run.dir", "/runs/told", "--data.cache_dir", "/tmp/cache"]
    words += ["--config", "configs/quickstart.yaml", "--train.batch_size", "8", "--log.every_steps", "2", *ENDLESS]
    words += ["--model.ngf", "4", "--model.ndf", "4"]
    log = tmp_path / "log"
    with started(anyone.words(words, anyone.sealed()), log) as outer:
        wait_for_images(image.root / "runs/told", 16, outer)
        (first,) = children_of(outer.pid)
        os.kill(first, signal.SIGTERM)
        assert outer.wait(90) == 75, log.read_text()[-2000:]
    assert status_of(image.root / "runs/told")["state"] == "preempted"
