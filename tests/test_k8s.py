"""Manifests from values: against the published models of the APIs, and for what the models do not say."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from pipeline.cli import k8s
from pipeline.cli.command import run
from pipeline.cli.k8s_values import ROOT, Cache, Dataset, Run, Values, from_dict, read_values, set_value
from pipeline.cli.options import parse
from pipeline.cli.run import PASSED_ON, SURELY_S, split
from pipeline.config import ConfigError
from pipeline.errors import DataError, Diverged, Preempted
from tests.commands import SETTINGS, children_of, make_workspace, started, status_of, wait_for, wait_for_images

models = pytest.importorskip("kubeflow_trainer_api.models", reason="kubeflow-trainer-api: pip install -e '.[dev]'")
kubernetes = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate: pip install -e '.[dev]'")

VALUES = ROOT / "launch/k8s/values.yaml"
OLDEST, NEWEST = "1.31", kubernetes.latest_version()
SMALL = {"nodes": 1, "gpus_per_node": 0, "memory": "16Gi", "config": "configs/portraits64.yaml"}
FULL = {
    "name": "night-3",
    "namespace": "faces",
    "labels": {"kueue.x-k8s.io/queue-name": "team-a"},
    "image_pull_secrets": ["pull"],
    "nodes": 4,
    "gpus_per_node": 4,
    "ranks_per_node": 2,
    "cpu": 16,
    "node_selector": {"node.kubernetes.io/instance-type": "gpu"},
    "tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}],
    "priority_class": "low",
    "options": {"train": {"batch_size": 256}, "precision": "bf16", "data": {"image_size": [64, 64], "flip": True}},
    "dataset": {"path": ""},
    "cache": {"storage_class": "local"},
    "env": {"NCCL_DEBUG": "INFO"},
    "time_limit_minutes": 90,
    "restarts": 0,
}
CASES = pytest.mark.parametrize("given", [{}, SMALL, FULL], ids=["defaults", "small", "full"])

PYTORCH_JOB = {
    "": {"apiVersion", "kind", "metadata", "spec"},
    "spec": {"elasticPolicy", "nprocPerNode", "pytorchReplicaSpecs", "runPolicy"},
    "spec.elasticPolicy": {"maxReplicas", "maxRestarts", "metrics", "minReplicas", "nProcPerNode", "rdzvBackend"}
    | {"rdzvConf", "rdzvHost", "rdzvId", "rdzvPort", "standalone"},
    "spec.runPolicy": {"activeDeadlineSeconds", "backoffLimit", "cleanPodPolicy", "managedBy", "schedulingPolicy"}
    | {"suspend", "ttlSecondsAfterFinished"},
    "spec.pytorchReplicaSpecs": {"Master", "Worker"},
    "spec.pytorchReplicaSpecs.Worker": {"replicas", "restartPolicy", "template"},
}
"""Fields of the CustomResourceDefinition pytorchjobs.kubeflow.org, version v1 (training operator 1.9)."""


def documents(values, kind):
    return {d["kind"]: d for d in yaml.safe_load_all(k8s.render(values, kind))}


def assert_model(model, document):
    """The model takes the document and keeps every field of it; what it does not know it drops in silence."""
    assert model.from_dict(document).to_dict() == document


def assert_kubernetes(document):
    for version in (OLDEST, NEWEST):
        kubernetes.validate(document, version, strict=True)


def assert_pod_template(template):
    assert_kubernetes({"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "a"}, "template": template})


def assert_pytorch_job(job):
    for path, known in PYTORCH_JOB.items():
        value = job
        for name in filter(None, path.split(".")):
            value = value[name]
        assert value.keys() <= known, (path, value.keys() - known)
    spec = job["spec"]
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert re.fullmatch("auto|cpu|gpu|[1-9][0-9]*", spec["nprocPerNode"])
    numbers = [spec["elasticPolicy"][k] for k in ("minReplicas", "maxReplicas")] + [spec["runPolicy"]["backoffLimit"]]
    assert all(type(n) is int and n >= 1 for n in numbers)
    assert spec["elasticPolicy"]["rdzvBackend"] in ("c10d", "etcd", "etcd-v2")
    assert all(pair.keys() == {"key", "value"} for pair in spec["elasticPolicy"]["rdzvConf"])
    assert all(type(text) is str for pair in spec["elasticPolicy"]["rdzvConf"] for text in pair.values())
    assert spec["runPolicy"]["cleanPodPolicy"] in ("All", "Running", "None")
    worker = spec["pytorchReplicaSpecs"]["Worker"]
    assert type(worker["replicas"]) is int
    assert worker["restartPolicy"] in ("Always", "OnFailure", "Never", "ExitCode")
    assert any(c["name"] == "pytorch" and c["image"] for c in worker["template"]["spec"]["containers"])
    assert_pod_template(worker["template"])


def job_of(values):
    """The Job within the TrainingRuntime's JobSet."""
    runtime = documents(values, "trainjob")["TrainingRuntime"]
    return runtime["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]


def pods_of(values):
    worker = documents(values, "pytorchjob")["PyTorchJob"]["spec"]["pytorchReplicaSpecs"]["Worker"]
    return [job_of(values)["template"], worker["template"]]


def words_of(values, kind):
    """Command and arguments as the container gets them."""
    if kind == "trainjob":
        trainer = documents(values, kind)["TrainJob"]["spec"]["trainer"]
    else:
        trainer = pods_of(values)[1]["spec"]["containers"][0]
    return [word.replace("$$(", "$(") for word in trainer["command"] + trainer["args"]]


@CASES
def test_a_trainjob_and_its_runtime_fit_the_published_models(given):
    found = documents(from_dict(given), "trainjob")
    assert list(found) == ["NetworkPolicy", "TrainingRuntime", "TrainJob"]
    assert_kubernetes(found["NetworkPolicy"])
    assert_model(models.TrainerV1alpha1TrainingRuntime, found["TrainingRuntime"])
    assert_model(models.TrainerV1alpha1TrainJob, found["TrainJob"])
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "a"}, "spec": job_of(from_dict(given))}
    assert_kubernetes(job)
    assert_pod_template(job["spec"]["template"])


@CASES
def test_a_pytorchjob_fits_its_definition(given):
    found = documents(from_dict(given), "pytorchjob")
    assert list(found) == ["NetworkPolicy", "PyTorchJob"]
    assert_kubernetes(found["NetworkPolicy"])
    assert_pytorch_job(found["PyTorchJob"])


@CASES
def test_claims_fit_their_schema_and_can_be_mounted_by_all_pods(given):
    values = from_dict(given)
    for claim in yaml.safe_load_all(k8s.render(values, "claims")):
        assert_kubernetes(claim)
        assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    mounted = {v["persistentVolumeClaim"]["claimName"] for v in pods_of(values)[0]["spec"]["volumes"][:2]}
    assert mounted == {claim["metadata"]["name"] for claim in yaml.safe_load_all(k8s.render(values, "claims"))}


def test_the_models_notice_a_field_that_does_not_exist():
    found = documents(Values(), "trainjob")
    found["TrainJob"]["spec"]["trainer"]["numNode"] = 2
    with pytest.raises(AssertionError):
        assert_model(models.TrainerV1alpha1TrainJob, found["TrainJob"])
    job_of_runtime = found["TrainingRuntime"]["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]
    job_of_runtime["podFailurePolicies"] = {}
    with pytest.raises(AssertionError):
        assert_model(models.TrainerV1alpha1TrainingRuntime, found["TrainingRuntime"])
    found["NetworkPolicy"]["spec"]["ingres"] = []
    with pytest.raises(kubernetes.ValidationError):
        assert_kubernetes(found["NetworkPolicy"])
    template = job_of(Values())["template"]
    template["spec"]["containers"][0]["securityContext"]["runAsUsr"] = 1
    with pytest.raises(kubernetes.ValidationError):
        assert_pod_template(template)
    job = documents(Values(), "pytorchjob")["PyTorchJob"]
    job["spec"]["runPolicy"]["podFailurePolicy"] = {}
    with pytest.raises(AssertionError):
        assert_pytorch_job(job)


@CASES
@pytest.mark.parametrize("kind", ["trainjob", "pytorchjob"])
def test_the_wrapper_and_the_trainer_understand_the_command(given, kind, monkeypatch):
    values = from_dict(given)
    words = words_of(values, kind)
    assert words[:2] == [values.python, "launch/run.py"]
    options, trainer = split(words[2:])
    assert not any(re.match("--(nnodes|nproc|node.rank|master|rdzv.(backend|endpoint))", option) for option in options)
    monkeypatch.chdir(ROOT)
    config = parse(trainer[1:]).config
    assert config.run.dir == f"/runs/{values.name}"
    assert config.data.dataroot.startswith("/data")
    assert config.data.cache_dir == "/cache"
    if given is FULL:
        assert (config.train.batch_size, config.precision, config.data.flip) == (256, "bf16", True)
        assert config.data.image_size == [64, 64]


@CASES
def test_a_pod_is_nobody_in_particular_and_cannot_change_its_image(given):
    for template in pods_of(from_dict(given)):
        spec, main = template["spec"], template["spec"]["containers"][0]
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert main["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        mounts = {m["mountPath"]: m for m in main["volumeMounts"]}
        env = {e["name"]: e["value"] for e in main["env"]}
        assert {"/tmp", "/cache", "/runs", env["HOME"]} <= mounts.keys()
        assert mounts["/data"]["readOnly"]
        shm = next(v for v in spec["volumes"] if v["name"] == mounts["/dev/shm"]["name"])
        assert shm["emptyDir"]["medium"] == "Memory"
        assert main["resources"]["requests"] == main["resources"]["limits"]


def test_gpus_are_asked_for_where_there_are_some():
    resources = [t["spec"]["containers"][0]["resources"]["limits"] for t in pods_of(Values())]
    assert all(r["nvidia.com/gpu"] == 8 for r in resources)
    assert all(
        "nvidia.com/gpu" not in t["spec"]["containers"][0]["resources"]["limits"] for t in pods_of(from_dict(SMALL))
    )
    trainer = documents(from_dict(SMALL), "trainjob")["TrainJob"]["spec"]["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (1, 1)


@CASES
def test_only_the_jobs_own_pods_reach_its_ports(given):
    values = from_dict(given)
    policy = documents(values, "trainjob")["NetworkPolicy"]["spec"]
    own = policy["podSelector"]["matchLabels"]
    assert all(own.items() <= template["metadata"]["labels"].items() for template in pods_of(values))
    (rule,) = policy["ingress"]
    assert rule["from"] == [{"podSelector": {"matchLabels": own}}]
    (ports,) = rule["ports"]
    assert all(ports["port"] <= port <= ports["endPort"] for port in (29500, 23456, 32768, 60999))


def test_exit_codes_lead_where_the_wrapper_means_them_to():
    """Job and JobSet decide in two steps: FailJob carries the code in a message, which the JobSet's rules read."""
    job, policy = job_of(Values()), k8s.failure_policy(Values())
    codes, conditions = job["podFailurePolicy"]["rules"]
    assert codes["onExitCodes"]["values"] == sorted(codes["onExitCodes"]["values"])  # the API demands it
    assert job["template"]["spec"]["restartPolicy"] == "Never"  # this too
    assert job["backoffLimit"] == 0

    def action(message):
        for rule in policy["rules"]:
            if any(re.search(pattern, message) for pattern in rule["onJobFailureMessagePatterns"]):
                return rule["action"]
        return "RestartJobSet"

    for error in (ConfigError, DataError, Diverged, Preempted):
        code = error.exit_code
        assert code in codes["onExitCodes"]["values"]
        message = (
            f"Container node for pod default/dcgan-node-0-0-abcde failed with exit code {code} matching FailJob rule"
        )
        wanted = "RestartJobSetAndIgnoreMaxRestarts" if error is Preempted else "FailJobSet"
        assert action(message + " at index 0") == wanted, code
    assert conditions["onPodConditions"][0]["type"] == "DisruptionTarget"
    lost = "Pod default/dcgan-node-0-1-abcde has condition DisruptionTarget matching FailJob rule at index 1"
    assert action(lost) == "RestartJobSetAndIgnoreMaxRestarts"
    assert not {1, 74, 137, 143} & set(codes["onExitCodes"]["values"])
    assert action("Job has reached the specified backoff limit") == "RestartJobSet"


def test_the_kubelet_waits_until_the_wrapper_has_ended_by_itself():
    for template in pods_of(from_dict({"grace_s": 200})):
        env = {e["name"]: e["value"] for e in template["spec"]["containers"][0]["env"]}
        assert env["DCGAN_GRACE_S"] == "200"
        assert template["spec"]["terminationGracePeriodSeconds"] > 200 + SURELY_S
    assert signal.SIGTERM in PASSED_ON


def test_a_time_limit_is_the_operators():
    values = from_dict({"time_limit_minutes": 90})
    assert documents(values, "trainjob")["TrainJob"]["spec"]["activeDeadlineSeconds"] == 5400
    assert documents(values, "pytorchjob")["PyTorchJob"]["spec"]["runPolicy"]["activeDeadlineSeconds"] == 5400
    assert "activeDeadlineSeconds" not in documents(Values(), "trainjob")["TrainJob"]["spec"]


def test_restarts_of_a_pytorchjob_are_counted_by_container():
    spec = documents(from_dict({"nodes": 4, "restarts": 3}), "pytorchjob")["PyTorchJob"]["spec"]
    assert spec["runPolicy"]["backoffLimit"] == 13
    assert spec["pytorchReplicaSpecs"]["Worker"]["restartPolicy"] == "OnFailure"
    spec = documents(from_dict({"restarts": 0}), "pytorchjob")["PyTorchJob"]["spec"]
    assert spec["pytorchReplicaSpecs"]["Worker"]["restartPolicy"] == "Never"


def test_a_dollar_sign_reaches_the_trainer_as_it_is():
    values = from_dict({"dataset": {"path": "odd$(HOME).zip"}})
    assert (
        "--data.dataroot=/data/odd$$(HOME).zip" in documents(values, "trainjob")["TrainJob"]["spec"]["trainer"]["args"]
    )


def test_the_values_file_holds_every_value_with_its_default():
    given = yaml.safe_load(VALUES.read_text())
    assert from_dict(given) == Values()
    assert list(given) == [f.name for f in fields(Values)]
    for section, cls in (("dataset", Dataset), ("run", Run), ("cache", Cache)):
        assert list(given[section]) == [f.name for f in fields(cls)]


@pytest.mark.parametrize(
    ("assignment", "told"),
    [
        ("gpus_per_nod=4", "gpus_per_nod is no value; did you mean gpus_per_node?"),
        ("dataset.clam=a", "dataset.clam is no value; did you mean dataset.claim?"),
        (
            "options.train.batch_siz=8",
            "options.train.batch_siz is no setting of the trainer; did you mean train.batch_size?",
        ),
        ("options.run.dir=a", "options.run.dir follows from run.claim and name: leave it out"),
        ("options.train.batch_size=40", "train.batch_size must be divisible by the 16 ranks, got 40"),
        ("options.optim.lr=-1", "optim.lr must be above 0 and finite, got -1.0"),
        ("config=none", "config must be a file of the clone such as configs/celeba64.yaml, got 'none'"),
        ("nodes=0", "nodes must be at least 1, got 0"),
        ("nodes=two", "nodes must be an integer, got 'two'"),
        ("nodes.x=2", "nodes.x is no value: nodes has no parts"),
        ("ranks_per_node=9", "ranks_per_node must be at most gpus_per_node, got 9"),
        ("memory=128GB", "memory must be a quantity such as 8, 500m or 16Gi, above 0, got '128GB'"),
        ("shared_memory=128Gi", "shared_memory must be below memory, 128Gi, got '128Gi'"),
        ("name=Faces", "name must be at most 40 small letters, digits and dashes, a letter first, got 'Faces'"),
        ("env.PET_NNODES=2", "env must be without what the operator sets, got 'PET_NNODES'"),
        ("dataset.path=../b", "dataset.path must be a path within the claim, got '../b'"),
        ("run.claim=dcgan-data", "run.claim must be another than dataset.claim, got 'dcgan-data'"),
        ("dataset=a", "dataset must be a mapping, got 'a'"),
        ("tolerations=[a]", "tolerations must be mappings such as {operator: Exists}, got 'a'"),
        ("user_id=0", "user_id must be at least 1, got 0"),
        ("nodes", "--set must be key=value, got 'nodes'"),
    ],
)
def test_a_wrong_value_is_one_line_and_exit_code_2(assignment, told, capsys):
    assert k8s.main(["--values", str(VALUES), "--kind", "trainjob", "--set", assignment]) == 2
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", f"render.py: error: {told}\n")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("nodes: 2\nnodes: 3\n", "nodes stands twice in the configuration, in lines 1 and 2"),
        ("- a\n", "must hold key: value, got list"),
        ("a: [", "is not YAML"),
        (None, "cannot be read: No such file or directory"),
    ],
)
def test_a_file_that_holds_no_values_is_told_in_one_line(text, told, tmp_path, capsys):
    path = tmp_path / "values.yaml"
    if text is not None:
        path.write_text(text)
    assert run("render.py", lambda: read_values(path, [])) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line


def test_set_comes_last_and_reads_yaml(tmp_path):
    path = tmp_path / "values.yaml"
    path.write_text("nodes: 3\nenv:\noptions:\n")  # headings with nothing below them
    values = read_values(path, ["nodes=4", "env.NCCL_DEBUG=INFO", "options.train.batch_size=512", "gpus_per_node=4"])
    assert (values.nodes, values.env, values.options) == (4, {"NCCL_DEBUG": "INFO"}, {"train": {"batch_size": 512}})
    given = {}
    set_value(given, "node_selector.cloud.example/zone=a")
    assert given == {"node_selector": {"cloud.example/zone": "a"}}


def test_the_script_prints_manifests_and_nothing_else():
    words = [
        sys.executable,
        "launch/k8s/render.py",
        "--values",
        str(VALUES),
        "--kind",
        "trainjob",
        "--set",
        "name=night",
    ]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (done.returncode, done.stderr) == (0, ""), shlex.join(words)
    assert [d["metadata"]["name"] for d in yaml.safe_load_all(done.stdout)] == ["night"] * 3
    assert done.stdout.startswith("# Rendered by launch/k8s/render.py --kind trainjob")


def test_the_guide_shows_what_is_really_printed():
    """docs/kubernetes.md: its values, a TrainJob and a failure policy rendered from them."""
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/kubernetes.md").read_text(), re.DOTALL)
    rendered = k8s.render(from_dict(yaml.safe_load(blocks[0])), "trainjob")
    assert all(block in rendered for block in blocks[1:])
    assert len(blocks) == 3


def as_pod(values, folders, mounts_of_host, **operator):
    """The container of a TrainJob as the kubelet starts it, as far as one machine can: its mounts, its user, PID 1."""
    root = folders / "root"
    root.mkdir()
    spec = pods_of(values)[0]["spec"]
    main, who = spec["containers"][0], spec["securityContext"]
    script = ["set -e", "mount --make-rprivate /", f"mount -t tmpfs tmpfs {root}"]
    for outside in ("/usr", "/lib", "/lib64", "/bin", "/etc", sys.base_prefix, sys.prefix, str(ROOT)):
        if Path(outside).exists():
            inside = f"{root}{main['workingDir'] if outside == str(ROOT) else outside}"
            script += [f"mkdir -p {inside}", f"mount --bind {outside} {inside}", f"mount -o remount,bind,ro {inside}"]
    script += [f"mkdir -p {root}/dev {root}/proc", f"mount --rbind /dev {root}/dev", f"mount -t proc proc {root}/proc"]
    for mount in main["volumeMounts"]:
        inside = f"{root}{mount['mountPath']}"
        script += [f"mkdir -p {inside}"]
        if mount["name"] in mounts_of_host:
            script += [f"mount --bind {mounts_of_host[mount['name']]} {inside}"]
            script += [f"mount -o remount,bind,ro {inside}"] if mount.get("readOnly") else []
        else:
            script += [f"mount -t tmpfs -o mode=2770,gid={who['fsGroup']} tmpfs {inside}"]
    env = {"PATH": "/usr/bin:/bin"} | {e["name"]: e["value"] for e in main["env"]} | operator
    user = ["setpriv", f"--reuid={who['runAsUser']}", f"--regid={who['runAsGroup']}", "--clear-groups"]
    user += ["--no-new-privs", "--bounding-set=-all", "--inh-caps=-all"]
    words = shlex.join(words_of(values, "trainjob"))
    enter = ["env", "-i", *(f"{k}={v}" for k, v in env.items()), *user]
    enter += ["sh", "-c", f"cd {main['workingDir']} && exec {words}"]
    script += [f"mount -o remount,ro {root}", f"exec chroot {root} {shlex.join(enter)}"]
    return ["unshare", "--mount", "--pid", "--fork", "--kill-child=SIGKILL", "sh", "-c", "\n".join(script)]


def may_mount():
    probe = [
        "unshare",
        "--mount",
        "--pid",
        "--fork",
        "sh",
        "-c",
        "mount --make-rprivate / && mount -t tmpfs tmpfs /mnt",
    ]
    return (
        bool(shutil.which("setpriv") and shutil.which("unshare")) and not subprocess.run(probe, check=False).returncode
    )


@pytest.mark.system
def test_the_container_trains_and_saves_as_a_nameless_user_on_a_read_only_root(tmp_path):
    if os.getuid() != 0 or not may_mount():
        pytest.skip("needs root and the right to mount")
    data, runs = tmp_path / "data", tmp_path / "runs"
    data.mkdir(mode=0o755)
    runs.mkdir()
    make_workspace(data)
    options = {k: dict(v) for k, v in SETTINGS.items()}
    options["train"]["max_images"], options["log"]["grid_every_images"] = 80_000_000, 0
    given = {"name": "pod", "nodes": 1, "gpus_per_node": 0, "python": sys.executable, "options": options}
    values = from_dict(given | {"config": "configs/quickstart.yaml", "dataset": {"path": "faces"}})
    os.chown(runs, values.user_id, values.group_id)
    operator = {"PET_NNODES": "1", "PET_NPROC_PER_NODE": "1", "PET_NODE_RANK": "0"}
    operator |= {"PET_MASTER_ADDR": "localhost", "PET_MASTER_PORT": "29731"}
    words = as_pod(values, tmp_path, {"dataset": data, "runs": runs}, **operator)
    with started(words, tmp_path / "pod.log") as process:
        wait_for_images(runs / "pod", 80, process)
        (first,) = children_of(process.pid)
        os.kill(first, signal.SIGTERM)
        wait_for(lambda: process.poll() is not None, "the pod's end")
        assert process.returncode == Preempted.exit_code, (tmp_path / "pod.log").read_text()
    assert status_of(runs / "pod")["state"] == "preempted"
    assert list((runs / "pod/checkpoints").glob("images-*/manifest.json"))
