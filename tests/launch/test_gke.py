"""The JobSet of a run: valid by the published schemas, and it restarts what may go on."""

from __future__ import annotations

import argparse
import json
import re
import sys

import jsonschema
import pytest

from tests.conftest import REPOSITORY
from univla_jax.errors import ExitStatus


@pytest.fixture(scope="module")
def gke():
    """The launcher as a module."""
    sys.path.insert(0, str(REPOSITORY / "launch"))
    try:
        import gke
    finally:
        sys.path.pop(0)
    return gke


def manifest(gke, **changes):
    """Secret and JobSet for ``changes`` of the options."""
    options = {
        "name": "mine",
        "image": "registry/image",
        "topology": "v6e:8x8",
        "slices": 1,
        "spot": False,
        "claim": "",
        "restarts": 9,
        "env": [],
        "compile_cache": "",
        "command": ["train", "--config=configs/libero.py:video", "--workdir=gs://bucket/runs/mine"],
    }
    return gke.manifest(argparse.Namespace(**{**options, **changes}))["items"]


def pod_of(jobset):
    return jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


@pytest.mark.parametrize(
    ("topology", "label", "hosts", "chips"),
    [
        ("v4:4x4x4", "tpu-v4-podslice", 16, 4),
        ("v5e:16x16", "tpu-v5-lite-podslice", 64, 4),
        ("v5p:2x2x1", "tpu-v5p-slice", 1, 4),
        ("v6e:8x8", "tpu-v6e-slice", 16, 4),
        ("v6e:1x1", "tpu-v6e-slice", 1, 1),
        ("tpu7x:4x4x4", "tpu7x", 16, 4),
    ],
)
def test_the_manifest_of_every_chip_is_valid(gke, topology, label, hosts, chips):
    schema = json.loads((REPOSITORY / "tests/fixtures/jobset_schema.json").read_text())
    _, jobset = manifest(gke, topology=topology, claim="shared", spot=True)
    jsonschema.validate(jobset, schema)
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["parallelism"] == job["completions"] == hosts
    selector = pod_of(jobset)["nodeSelector"]
    assert selector["cloud.google.com/gke-tpu-accelerator"] == label
    assert selector["cloud.google.com/gke-tpu-topology"] == topology.split(":")[1]
    assert pod_of(jobset)["containers"][0]["resources"]["limits"]["google.com/tpu"] == chips


def test_the_schema_refuses_a_name_that_is_not_published(gke):
    schema = json.loads((REPOSITORY / "tests/fixtures/jobset_schema.json").read_text())
    _, jobset = manifest(gke)
    pod_of(jobset)["containers"][0]["volumeMount"] = []
    with pytest.raises(jsonschema.ValidationError, match="volumeMount"):
        jsonschema.validate(jobset, schema)


def test_the_pods_have_what_a_run_needs(gke, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    secret, jobset = manifest(gke, slices=2, spot=True, env=["WANDB_API_KEY", "A=b"])
    assert secret["stringData"] == {
        "JAX_COMPILATION_CACHE_DIR": "gs://bucket/runs/jax_cache",
        "WANDB_API_KEY": "secret",
        "A": "b",
    }
    assert "secret" not in re.sub(r"secretRef", "", json.dumps(jobset))
    pod = pod_of(jobset)
    (container,) = pod["containers"]
    assert container["envFrom"] == [{"secretRef": {"name": secret["metadata"]["name"]}}]
    assert container["command"] == ["bash", "launch/worker.sh", "run"]
    assert container["args"][:2] == ["train", "--distributed"]
    assert container["args"][-1] == "--config.mesh.replica=2"
    assert {"name": "memory", "mountPath": "/dev/shm"} in container["volumeMounts"]
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert pod["tolerations"][0]["key"] == "cloud.google.com/gke-spot"
    assert [volume["name"] for volume in pod["volumes"]] == ["memory"]


@pytest.mark.parametrize(
    ("status", "action"),
    [
        (ExitStatus.USER_ERROR, "FailJobSet"),
        (ExitStatus.PREEMPTED, "RestartJobSetAndIgnoreMaxRestarts"),
        (ExitStatus.PEER_LOST, "RestartJobSetAndIgnoreMaxRestarts"),
        ("DisruptionTarget", "RestartJobSetAndIgnoreMaxRestarts"),
        (ExitStatus.TRANSIENT, None),
        (ExitStatus.HANG, None),
        (1, None),
    ],
)
def test_the_end_of_a_pod_decides_what_becomes_of_the_run(gke, status, action):
    """As the two controllers do it: a message of the job's, matched by the rules of the JobSet."""
    _, jobset = manifest(gke)
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    message = _failure(job["podFailurePolicy"]["rules"], status)
    found = None
    for rule in jobset["spec"]["failurePolicy"]["rules"]:
        patterns = rule["onJobFailureMessagePatterns"]
        if message and any(re.search(pattern, message) for pattern in patterns):
            found = rule["action"]
            break
    assert found == action  # None: restarted, and counted


def _failure(rules, status):
    """Message of the failed job, empty where no rule of its policy matches."""
    for number, rule in enumerate(rules):
        codes = rule.get("onExitCodes", {"values": []})["values"]
        end = f"matching FailJob rule at index {number}"
        if status in codes:
            return f"Container train for pod a/mine-0 failed with exit code {int(status)} {end}"
        if status in [condition["type"] for condition in rule.get("onPodConditions", [])]:
            return f"Pod a/mine-0 has condition {status} {end}"
    return ""


@pytest.mark.parametrize(
    "topology", ["v6e", "v9:8x8", "v5p:8x8", "v6e:4x4x4", "v5e:3x3", "v6e:ax2"]
)
def test_a_topology_that_does_not_exist_is_named(gke, topology, capsys):
    with pytest.raises(SystemExit) as ended:
        manifest(gke, topology=topology)
    assert ended.value.code == 2 and f"--topology={topology!r}" in capsys.readouterr().err
