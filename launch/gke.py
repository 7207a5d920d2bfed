"""Trains on TPU slices of a GKE cluster: builds the image, applies a JobSet, shows logs, deletes.

    python launch/gke.py build --image=REGION-docker.pkg.dev/PROJECT/REPO/univla_jax
    python launch/gke.py apply NAME --image=... --topology=v6e:8x8 --spot --claim=PVC \\
        -- train --config=configs/libero.py:video --workdir=/mnt/shared/libero
    python launch/gke.py logs NAME
    python launch/gke.py delete NAME

The cluster needs the JobSet controller, version 0.10 or newer, and all pods must be able to write
--workdir: gs://..., or --claim names a persistent volume that many pods can write (Filestore),
mounted at /mnt/shared. When a pod is preempted or its node fails, all pods start again and resume
from the newest checkpoint; a mistake of the user ends the JobSet. With --dry_run every command and
the manifest are printed and nothing is run.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Iterable
from typing import Any

import job
from job import ExitStatus
from shell import Shell, fail, split_command

CONTAINER = "train"
GRACE_SECONDS = 300  # from SIGTERM to the end of a pod: what saving a step may take


_NOT_COUNTED = (ExitStatus.PREEMPTED, ExitStatus.PEER_LOST)  # restarts are free after these


def topology(text: str) -> tuple[job.Tpu, str, int]:
    """Chip, shape and number of chips of ``CHIP:SHAPE``."""
    chip, _, shape = text.partition(":")
    tpu = job.TPUS.get(chip)
    if tpu is None or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", shape):
        fail(
            f"--topology={text!r}; expected CHIP:SHAPE such as v6e:8x8, with a chip of "
            f"{', '.join(job.TPUS)}"
        )
    sizes = [int(size) for size in shape.split("x")]
    chips = math.prod(sizes)
    if len(sizes) != tpu.dimensions or (chips > 4 and chips % 4):
        example = "4x4x4" if tpu.dimensions == 3 else "4x4"
        fail(
            f"--topology={text!r}: {chip} has slices of {tpu.dimensions} dimensions, in hosts of "
            f"{job.CHIPS_PER_HOST} chips, such as {chip}:{example}"
        )
    return tpu, shape, chips


def manifest(options: argparse.Namespace) -> dict[str, Any]:
    """The JobSet and the Secret with its environment."""
    variables = job.environment(options)
    secret = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": f"{options.name}-env"},
        "stringData": variables,
    }
    jobset = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": options.name,
            "annotations": {
                "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
            },
        },
        "spec": {
            "failurePolicy": _failure_policy(options.restarts),
            "replicatedJobs": [
                {
                    "name": "slice",
                    "replicas": options.slices,
                    "template": {"spec": _job(options)},
                }
            ],
        },
    }
    return {"apiVersion": "v1", "kind": "List", "items": [secret, jobset]}


def _failure_policy(restarts: int) -> dict[str, Any]:
    """What the end of a job means for the JobSet; ``_pod_failure_policy`` makes the messages."""

    def rule(name: str, action: str, pattern: str) -> dict[str, Any]:
        return {
            "name": name,
            "action": action,
            "onJobFailureReasons": ["PodFailurePolicy"],
            "onJobFailureMessagePatterns": [pattern],
        }

    preempted = rf"exit code ({_numbers(_NOT_COUNTED)}) |DisruptionTarget"
    return {
        "maxRestarts": restarts,  # of all other ends: crashes, networks, disks, hangs
        "rules": [
            rule("mistake", "FailJobSet", f"exit code {int(ExitStatus.USER_ERROR)} "),
            rule("preempted", "RestartJobSetAndIgnoreMaxRestarts", preempted),
        ],
    }


def _pod_failure_policy() -> dict[str, Any]:
    """Ends the job at once, with a message that names the exit status or the disruption."""

    def rule(statuses: Iterable[ExitStatus]) -> dict[str, Any]:
        values = [int(status) for status in statuses]
        codes = {"containerName": CONTAINER, "operator": "In", "values": values}
        return {"action": "FailJob", "onExitCodes": codes}

    disruption = {"type": "DisruptionTarget", "status": "True"}
    return {
        "rules": [
            rule([ExitStatus.USER_ERROR]),
            rule(_NOT_COUNTED),
            {"action": "FailJob", "onPodConditions": [disruption]},
        ]
    }


def _numbers(statuses: Iterable[ExitStatus]) -> str:
    return "|".join(str(int(status)) for status in statuses)


def _job(options: argparse.Namespace) -> dict[str, Any]:
    """One pod per host of a slice; a slice smaller than a host is one pod with all its chips."""
    tpu, shape, chips = topology(options.topology)
    hosts = max(1, chips // job.CHIPS_PER_HOST)
    spot = "cloud.google.com/gke-spot"
    selector = {
        "cloud.google.com/gke-tpu-accelerator": tpu.label,
        "cloud.google.com/gke-tpu-topology": shape,
        **({spot: "true"} if options.spot else {}),
    }
    toleration = {"key": spot, "operator": "Equal", "value": "true", "effect": "NoSchedule"}
    # The 64 MB that a container gets are too few for the batches that loading processes hand over.
    volumes = [{"name": "memory", "emptyDir": {"medium": "Memory"}}]
    mounts = [{"name": "memory", "mountPath": "/dev/shm"}]
    if options.claim:
        volumes.append({"name": "shared", "persistentVolumeClaim": {"claimName": options.claim}})
        mounts.append({"name": "shared", "mountPath": job.MOUNT})
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "nodeSelector": selector,
        **({"tolerations": [toleration]} if options.spot else {}),
        "containers": [
            {
                "name": CONTAINER,
                "image": options.image,
                "command": ["bash", "launch/worker.sh", "run"],
                "args": job.arguments(options.command, options.slices),
                "envFrom": [{"secretRef": {"name": f"{options.name}-env"}}],
                "ports": [{"containerPort": 8471}, {"containerPort": 8080}],
                "resources": {"limits": {"google.com/tpu": min(chips, job.CHIPS_PER_HOST)}},
                "volumeMounts": mounts,
            }
        ],
        "volumes": volumes,
    }
    return {
        "parallelism": hosts,
        "completions": hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": _pod_failure_policy(),
        "template": {"spec": pod},
    }


def build(options: argparse.Namespace, shell: Shell) -> None:
    """Builds and pushes the image."""
    context = str(job.REPOSITORY)
    file = ["-f", f"{context}/launch/Dockerfile", "--build-arg", f"EXTRA={options.extra}"]
    shell.run(["docker", "build", *file, "-t", options.image, context])
    shell.run(["docker", "push", options.image])


def apply(options: argparse.Namespace, shell: Shell) -> None:
    """Starts the run, or restarts it with a changed manifest."""
    described = manifest(options)
    if shell.dry_run:
        secret = described["items"][0]
        secret["stringData"] = dict.fromkeys(secret["stringData"], "...")
    # The jobs of a JobSet cannot be changed: one that runs saves its step and goes first.
    shell.run(
        ["kubectl", "delete", "jobset", options.name, "--ignore-not-found", "--cascade=foreground"]
    )
    shell.run(["kubectl", "apply", "-f", "-"], stdin=json.dumps(described, indent=2))


def logs(options: argparse.Namespace, shell: Shell) -> None:
    """Follows the output of the first pod of the first slice."""
    pods = (
        f"jobset.sigs.k8s.io/jobset-name={options.name},jobset.sigs.k8s.io/job-index=0,"
        "batch.kubernetes.io/job-completion-index=0"
    )
    shell.run(["kubectl", "logs", "--follow", "--tail=-1", "-l", pods], check=False)


def delete(options: argparse.Namespace, shell: Shell) -> None:
    """Ends the run; its workdir is kept."""
    shell.run(["kubectl", "delete", "jobset", options.name])
    shell.run(["kubectl", "delete", "secret", f"{options.name}-env", "--ignore-not-found"])


ACTIONS = {"build": build, "apply": apply, "logs": logs, "delete": delete}


def main() -> None:
    """Runs the action of the command line."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("gke.py", description=__doc__, formatter_class=formatter)
    parser.add_argument("action", choices=list(ACTIONS))
    parser.add_argument("name", nargs="?", default="univla", help="name of the JobSet")
    parser.add_argument("--image", default="univla_jax", help="image name, with its registry")
    parser.add_argument("--extra", default="tpu", help="extra of setup.py: tpu, cuda12 or cuda13")
    parser.add_argument("--topology", default="v6e:8x8", help="of one slice, such as v5p:4x4x4")
    parser.add_argument("--slices", type=int, default=1, help="trained together; mesh axis replica")
    parser.add_argument("--spot", action="store_true", help="on spot nodes")
    parser.add_argument("--claim", default="", help="persistent volume claim of /mnt/shared")
    parser.add_argument("--restarts", type=int, default=100, help="most, preemptions not counted")
    job.add_options(parser)
    own, command = split_command(sys.argv[1:])
    options = parser.parse_args(own, argparse.Namespace(command=command))
    ACTIONS[options.action](options, Shell(options.dry_run))


if __name__ == "__main__":
    main()
