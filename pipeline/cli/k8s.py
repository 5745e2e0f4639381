"""launch/k8s/render.py: Kubernetes manifests of a training, from values that are checked before anything is printed.

    python launch/k8s/render.py --values launch/k8s/values.yaml --kind trainjob > job.yaml

trainjob    NetworkPolicy, TrainingRuntime and TrainJob (Kubeflow Trainer 2.2 and newer, trainer.kubeflow.org/v1alpha1)
pytorchjob  NetworkPolicy and PyTorchJob (the older training operator, kubeflow.org/v1)
claims      the PersistentVolumeClaims of dataset and runs; a file of their own, since who deletes them deletes the runs

The operators set PET_NNODES, PET_NPROC_PER_NODE and the rendezvous; torchrun reads them itself.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from pipeline.cli.command import Parser, run
from pipeline.cli.k8s_values import Values, read_values

NAME = "render.py"

DATA, RUNS, CACHE, HOME, SHM = "/data", "/runs", "/cache", "/home/trainer", "/dev/shm"
HOPELESS, PREEMPTED = (2, 65, 76), 75
"""Exit codes of launch/run.py that another start does not mend, and the one that asks for it."""
KILL_MARGIN_S = 30
"""What launch/run.py may still need after grace_s, before the kubelet kills."""
FIRST_PORT, LAST_PORT = 1024, 65535
"""Rendezvous (29500, 23456) and the ports that gloo and NCCL choose; who is not root can open no others."""

Manifest = dict[str, Any]


def labels(values: Values) -> dict[str, str]:
    """By which the job's own pods are known: to the network policy, and to kubectl."""
    return {"app.kubernetes.io/name": "dcgan-faces", "app.kubernetes.io/instance": values.name}


def metadata(values: Values, **more: Any) -> Manifest:
    return {"name": values.name, "namespace": values.namespace, "labels": labels(values)} | more


def trainer_words(values: Values) -> list[str]:
    """The trainer's script and its options.  Kubernetes would read $(NAME) as a variable; $$( is its way out."""
    where = str(PurePosixPath(DATA, values.dataset.path))
    paths = [f"--data.dataroot={where}", f"--data.cache_dir={CACHE}", f"--run.dir={RUNS}/{values.name}"]
    words = ["launch/train.py", f"--config={values.config}", *paths, *values.settings()]
    return [word.replace("$(", "$$(") for word in words]


def volumes(values: Values) -> list[tuple[Manifest, Manifest]]:
    """Each volume of a pod with its mount."""
    dataset, runs = ({"claimName": v.claim} for v in (values.dataset, values.run))
    cache: Manifest = {"emptyDir": {"sizeLimit": values.cache.size}}
    if values.cache.storage_class:
        spec = claim_spec("ReadWriteOnce", values.cache.size, values.cache.storage_class)
        cache = {"ephemeral": {"volumeClaimTemplate": {"spec": spec}}}
    scratch = {"emptyDir": {"sizeLimit": values.scratch}}
    sources: list[tuple[str, str, Manifest]] = [
        ("dataset", DATA, {"persistentVolumeClaim": dataset | {"readOnly": True}}),
        ("runs", RUNS, {"persistentVolumeClaim": runs}),
        ("cache", CACHE, cache),
        ("tmp", "/tmp", scratch),
        ("home", HOME, scratch),
        ("shm", SHM, {"emptyDir": {"medium": "Memory", "sizeLimit": values.shared_memory}}),
    ]
    read_only = {"dataset": {"readOnly": True}}
    return [
        ({"name": name} | dict(source), {"name": name, "mountPath": path} | read_only.get(name, {}))
        for name, path, source in sources
    ]


def container(values: Values, name: str) -> Manifest:
    """The trainer's container, without its command."""
    limits: Manifest = {"cpu": values.cpu, "memory": values.memory}
    if values.gpus_per_node:
        limits[values.gpu_resource] = values.gpus_per_node
    # A user without an entry in the image's passwd has neither a home nor a name; torch asks for both.
    env = {"HOME": HOME, "USER": "trainer", "DCGAN_GRACE_S": str(values.grace_s)} | values.env
    return {
        "name": name,
        "image": values.image,
        "workingDir": values.workdir,
        "env": [{"name": key, "value": value} for key, value in env.items()],
        "resources": {"requests": dict(limits), "limits": dict(limits)},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [mount for _, mount in volumes(values)],
    }


def pod_template(values: Values, main: Manifest, **more: Any) -> Manifest:
    """A pod that runs `main` as nobody in particular, without a token for the cluster."""
    spec: Manifest = more | {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": values.grace_s + KILL_MARGIN_S,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": values.user_id,
            "runAsGroup": values.group_id,
            "fsGroup": values.group_id,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [main],
        "volumes": [volume for volume, _ in volumes(values)],
    }
    optional = {
        "nodeSelector": dict(values.node_selector),
        "tolerations": list(values.tolerations),
        "priorityClassName": values.priority_class,
        "imagePullSecrets": [{"name": name} for name in values.image_pull_secrets],
    }
    return {"metadata": {"labels": labels(values)}, "spec": spec | {k: v for k, v in optional.items() if v}}


def network_policy(values: Values) -> Manifest:
    """The job's pods talk to each other and to DNS, and nobody else talks to them."""
    own = {"podSelector": {"matchLabels": labels(values)}}
    ports = [{"protocol": "TCP", "port": FIRST_PORT, "endPort": LAST_PORT}]
    dns = [{"protocol": protocol, "port": 53} for protocol in ("UDP", "TCP")]
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": metadata(values),
        "spec": own
        | {
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [{"from": [own], "ports": ports}],
            "egress": [{"to": [own], "ports": ports}, {"ports": dns}],
        },
    }


def job_spec(values: Values) -> Manifest:
    """The Job within the JobSet: one pod a node, and the first that fails is the end of all, with its reason."""
    return {
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [
                {
                    "action": "FailJob",
                    "onExitCodes": {
                        "containerName": "node",
                        "operator": "In",
                        "values": sorted([*HOPELESS, PREEMPTED]),
                    },
                },
                {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            ]
        },
        "template": pod_template(values, container(values, "node"), restartPolicy="Never"),
    }


def failure_policy(values: Values) -> Manifest:
    """What follows when the Job has failed.  Without a matching rule: all pods anew, at most `restarts` times."""
    codes = "|".join(str(code) for code in HOPELESS)
    # Whoever does not know message patterns obeys the first rule for all: better stopped than started for ever.
    return {
        "maxRestarts": values.restarts,
        "rules": [
            {
                "name": "hopeless",
                "action": "FailJobSet",
                "onJobFailureReasons": ["PodFailurePolicy"],
                "onJobFailureMessagePatterns": [f"failed with exit code ({codes}) "],
            },
            {
                "name": "preempted",
                "action": "RestartJobSetAndIgnoreMaxRestarts",
                "onJobFailureReasons": ["PodFailurePolicy"],
                "onJobFailureMessagePatterns": [
                    f"failed with exit code {PREEMPTED} ",
                    "has condition DisruptionTarget ",
                ],
            },
        ],
    }


def train_job(values: Values) -> list[Manifest]:
    """A TrainJob and its own TrainingRuntime, since only a runtime can carry the policies on failure."""
    group = "trainer.kubeflow.org"
    node = {
        "name": "node",
        "replicas": 1,
        "template": {
            "metadata": {"labels": {f"{group}/trainjob-ancestor-step": "trainer"}},
            "spec": job_spec(values),
        },
    }
    runtime = {
        "apiVersion": f"{group}/v1alpha1",
        "kind": "TrainingRuntime",
        "metadata": metadata(values, labels=labels(values) | {f"{group}/framework": "torch"}),
        "spec": {
            "mlPolicy": {"numNodes": values.nodes, "torch": {}},
            "template": {"spec": {"failurePolicy": failure_policy(values), "replicatedJobs": [node]}},
        },
    }
    limit = {"activeDeadlineSeconds": 60 * values.time_limit_minutes} if values.time_limit_minutes else {}
    job = {
        "apiVersion": f"{group}/v1alpha1",
        "kind": "TrainJob",
        "metadata": metadata(values, labels=values.labels | labels(values)),
        "spec": limit
        | {
            "runtimeRef": {"apiGroup": group, "kind": "TrainingRuntime", "name": values.name},
            "trainer": {
                "numNodes": values.nodes,
                "numProcPerNode": values.ranks,
                "command": [values.python, "launch/run.py"],
                "args": [f"--rdzv_conf=timeout={values.start_timeout_s}", *trainer_words(values)],
            },
        },
    }
    return [network_policy(values), runtime, job]


def pytorch_job(values: Values) -> list[Manifest]:
    """A PyTorchJob of equal workers: with a Master the operator would add an init container of its own to each."""
    main = container(values, "pytorch") | {"command": [values.python, "launch/run.py"], "args": trainer_words(values)}
    conf = [{"key": key, "value": str(values.start_timeout_s)} for key in ("join_timeout", "read_timeout")]
    limit = {"activeDeadlineSeconds": 60 * values.time_limit_minutes} if values.time_limit_minutes else {}
    job = {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": metadata(values, labels=values.labels | labels(values)),
        "spec": {
            "nprocPerNode": str(values.ranks),
            "elasticPolicy": {
                "minReplicas": values.nodes,
                "maxReplicas": values.nodes,
                "rdzvBackend": "c10d",
                "rdzvConf": conf,
            },
            # The limit is on restarts of containers, all together, and one that is reached is one too many.
            "runPolicy": limit | {"cleanPodPolicy": "Running", "backoffLimit": values.nodes * values.restarts + 1},
            "pytorchReplicaSpecs": {
                "Worker": {
                    "replicas": values.nodes,
                    "restartPolicy": "OnFailure" if values.restarts else "Never",
                    "template": pod_template(values, main),
                }
            },
        },
    }
    return [network_policy(values), job]


def claim_spec(mode: str, size: str, storage_class: str) -> Manifest:
    chosen = {"storageClassName": storage_class} if storage_class else {}
    return {"accessModes": [mode], "resources": {"requests": {"storage": size}}} | chosen


def claims(values: Values) -> list[Manifest]:
    """Both claims; every pod mounts both, on whichever machine it is."""
    return [
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": volume.claim, "namespace": values.namespace},
            "spec": claim_spec("ReadWriteMany", volume.size, volume.storage_class),
        }
        for volume in (values.dataset, values.run)
    ]


KINDS: dict[str, Callable[[Values], list[Manifest]]] = {
    "trainjob": train_job,
    "pytorchjob": pytorch_job,
    "claims": claims,
}


class _Dumper(yaml.SafeDumper):
    """Without anchors: the same mapping twice is written twice."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def render(values: Values, kind: str) -> str:
    """The manifests as YAML documents."""
    documents = yaml.dump_all(KINDS[kind](values), Dumper=_Dumper, sort_keys=False, width=120)
    return f"# Rendered by launch/k8s/render.py --kind {kind}: change the values and render again.\n{documents}"


def main(argv: list[str] | None = None) -> int:
    """Print the manifests; the exit code."""
    parser = Parser(NAME, "Kubernetes manifests of a training, on stdout.")
    parser.add_argument("--values", type=Path, required=True, help="a YAML file as launch/k8s/values.yaml")
    parser.add_argument("--kind", choices=tuple(KINDS), required=True, help="what to render")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a value; repeatable")

    def body() -> None:
        given: argparse.Namespace = parser.parse_args(argv)
        print(render(read_values(given.values, given.set), given.kind), end="")

    return run(NAME, body)
