"""The JobSet manifest against the schemas of JobSet and Kubernetes, and what must agree in it."""

import copy
import math
import pathlib

import kubernetes_validate
import pytest
import yaml
from kubeflow_trainer_api.models import JobsetV1alpha2JobSet

MANIFEST = pathlib.Path(__file__).parent.parent.parent / "launch" / "gke_jobset.yaml"
# What the models leave open: https://jobset.sigs.k8s.io/docs/reference/jobset.v1alpha2/
ACTIONS = {"FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"}
REASONS = {"BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "PodFailurePolicy"}


@pytest.fixture
def jobset():
    return yaml.safe_load(MANIFEST.read_text())


def check(jobset):
    """Raise an error for a field that JobSet or Kubernetes does not know, or another type."""
    understood = JobsetV1alpha2JobSet.from_dict(jobset).to_dict()
    assert without_jobs(understood) == without_jobs(jobset), "a field that JobSet does not know"
    for rule in jobset["spec"]["failurePolicy"]["rules"]:
        assert rule["action"] in ACTIONS and set(rule["onJobFailureReasons"]) <= REASONS
    for job in jobset["spec"]["replicatedJobs"]:
        template = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": job["name"]}}
        kubernetes_validate.validate(template | job["template"], "1.31", strict=True)


def without_jobs(jobset):
    """The jobs' templates apart, which Kubernetes' own schema checks."""
    jobset = copy.deepcopy(jobset)
    for job in jobset["spec"]["replicatedJobs"]:
        del job["template"]
    return jobset


def place(tree, *path):
    for key in path:
        tree = tree[key]
    return tree


JOB = ("spec", "replicatedJobs", 0, "template", "spec")
POD = (*JOB, "template", "spec")


def test_the_schemas_know_every_field(jobset):
    check(jobset)


@pytest.mark.parametrize(
    ("path", "key"),
    [
        (("spec",), "failurePolicy"),
        (("spec", "failurePolicy"), "maxRestarts"),
        (("spec", "network"), "enableDNSHostnames"),
        (("spec", "failurePolicy", "rules", 0), "onJobFailureReasons"),
        (("spec", "replicatedJobs", 0), "replicas"),
        (JOB, "completionMode"),
        (JOB, "podFailurePolicy"),
        ((*JOB, "podFailurePolicy", "rules", 0, "onExitCodes"), "containerName"),
        (POD, "nodeSelector"),
        (POD, "terminationGracePeriodSeconds"),
        ((*POD, "containers", 0), "volumeMounts"),
        ((*POD, "volumes", 0, "persistentVolumeClaim"), "claimName"),
    ],
)
def test_a_misspelt_field_is_found(jobset, path, key):
    parent = place(jobset, *path)
    parent[key + "x"] = parent.pop(key)
    with pytest.raises((AssertionError, kubernetes_validate.ValidationError)):
        check(jobset)


@pytest.mark.parametrize(
    ("path", "key", "value"),
    [
        (("spec", "failurePolicy"), "maxRestarts", "ten"),
        (("spec", "failurePolicy", "rules", 0), "action", "Stop"),
        (JOB, "backoffLimit", "none"),
        (POD, "nodeSelector", ["a"]),
    ],
)
def test_a_value_of_another_kind_is_found(jobset, path, key, value):
    place(jobset, *path)[key] = value
    with pytest.raises((AssertionError, ValueError, kubernetes_validate.ValidationError)):
        check(jobset)


def test_a_bucket_fits_in_the_place_of_the_claim(jobset):
    volume = place(jobset, *POD, "volumes", 0)
    del volume["persistentVolumeClaim"]
    line = next(line for line in MANIFEST.read_text().splitlines() if "csi:" in line)
    volume |= yaml.safe_load(line.removeprefix("#"))
    check(jobset)


def test_hosts_and_chips_make_up_the_slice(jobset):
    job, pod = place(jobset, *JOB), place(jobset, *POD)
    resources = pod["containers"][0]["resources"]
    assert job["parallelism"] == job["completions"]
    assert resources["requests"] == resources["limits"]
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    chips = math.prod(map(int, topology.split("x")))
    assert job["parallelism"] * resources["limits"]["google.com/tpu"] == chips


def test_refused_input_ends_the_run_and_neither_a_save_nor_an_eviction_counts(jobset):
    job, (container,) = place(jobset, *JOB), place(jobset, *POD, "containers")
    assert place(jobset, *POD, "restartPolicy") == "Never"  # podFailurePolicy allows no other
    actions = {}
    for rule in job["podFailurePolicy"]["rules"]:
        codes = rule.get("onExitCodes", {})
        assert codes.get("containerName", container["name"]) == container["name"]
        actions |= dict.fromkeys(codes.get("values", []), rule["action"])
        actions |= {entry["type"]: rule["action"] for entry in rule.get("onPodConditions", [])}
    assert actions == {2: "FailJob", 143: "Ignore", "DisruptionTarget": "Ignore"}
    (rule,) = jobset["spec"]["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in place(jobset, *POD, "volumes")}
