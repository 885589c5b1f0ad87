"""``tpu/gke`` against the public definitions, ``tpu/slurm`` against stand-ins, README's claims."""

from __future__ import annotations

import copy
import json
import math
import os
import re
import shlex
import subprocess
import sys

import jsonschema
import pytest
import yaml

from tests.tpu.cluster_stubs import ROOT, TPU, Stubs
from tests.tpu.test_cluster_scripts import CONFIG, parsed

SCHEMA = json.loads((ROOT / "tests/schemas/gke.schema.json").read_text())
MANIFESTS = sorted((TPU / "gke").glob("*.yaml"))
SBATCH = TPU / "slurm" / "train.sbatch"


class _Strict(yaml.SafeLoader):
    """A key given twice is an error, as it is for Kubernetes."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"{node.start_mark}: {keys}"
        return super().construct_mapping(node, deep)


def read(path):
    return list(yaml.load_all(path.read_text(), _Strict))


def valid(document):
    return jsonschema.Draft202012Validator(SCHEMA).is_valid(document)


@pytest.fixture
def jobset():
    (document,) = read(TPU / "gke" / "jobset.yaml")
    return document


def job_of(jobset):
    return jobset["spec"]["replicatedJobs"][0]["template"]["spec"]


def pod_of(jobset):
    return job_of(jobset)["template"]["spec"]


# GKE


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda p: p.name)
def test_manifest_has_the_fields_of_the_public_definitions(path):
    documents = read(path)
    assert documents
    for document in documents:
        jsonschema.validate(document, SCHEMA, jsonschema.Draft202012Validator)


def test_there_are_manifests():
    assert {p.name for p in MANIFESTS} == {"jobset.yaml", "storage.yaml"}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda d: d["spec"].update(replicatedJob=d["spec"].pop("replicatedJobs")),
        lambda d: d["spec"]["failurePolicy"]["rules"][0].update(action="Restart"),
        lambda d: job_of(d).update(completions="4"),
        lambda d: job_of(d).update(completionMode="indexed"),
        lambda d: pod_of(d).update(restartPolicy="Always"),
        lambda d: pod_of(d).update(terminationGracePeriod=60),
        lambda d: pod_of(d)["containers"][0].update(environment=[]),
        lambda d: pod_of(d)["containers"][0]["env"][0].update(value=1),
        lambda d: pod_of(d)["nodeSelector"].update(spot=True),
    ],
)
def test_the_schema_refuses_what_kubernetes_would_refuse(spoil, jobset):
    assert valid(jobset)
    spoiled = copy.deepcopy(jobset)
    spoil(spoiled)
    assert not valid(spoiled)


def chips(topology):
    return math.prod(int(side) for side in topology.split("x"))


def test_the_slice_is_used_whole(jobset):
    job, pod = job_of(jobset), pod_of(jobset)
    limits = pod["containers"][0]["resources"]["limits"]
    assert pod["containers"][0]["resources"]["requests"] == limits
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    assert job["completions"] == job["parallelism"] > 1
    assert job["completions"] * limits["google.com/tpu"] == chips(topology)


def slices():
    text = (TPU / "gke" / "jobset.yaml").read_text()
    return re.findall(r"^# +(tpu-\S+) +(\S+) +(\d+) +(\d+) +(ct\S+)$", text, re.MULTILINE)


@pytest.mark.parametrize(("accelerator", "topology", "hosts", "per_host", "machine"), slices())
def test_other_slices_of_the_table(accelerator, topology, hosts, per_host, machine, jobset):
    assert int(hosts) * int(per_host) == chips(topology)
    assert machine.endswith(f"-{per_host}t")
    assert machine.startswith({"tpu-v6e-slice": "ct6e", "tpu-v5p-slice": "ct5p"}.get(
        accelerator, "ct5lp"))  # fmt: skip
    assert len(topology.split("x")) == (3 if "v5p" in accelerator else 2)


def test_the_slice_of_the_manifest_is_in_the_table(jobset):
    selector = pod_of(jobset)["nodeSelector"]
    chosen = tuple(selector[f"cloud.google.com/gke-tpu-{k}"] for k in ("accelerator", "topology"))
    assert chosen in {row[:2] for row in slices()}
    marked = (TPU / "gke" / "jobset.yaml").read_text()
    assert len(re.findall(r"# (?:hosts|slice|chips a host)$", marked, re.MULTILINE)) == 6


def test_restarts_go_on_and_wrong_input_does_not(jobset):
    job, pod = job_of(jobset), pod_of(jobset)
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["values"] == [2]
    assert rule["onExitCodes"]["containerName"] == pod["containers"][0]["name"]
    policy = jobset["spec"]["failurePolicy"]
    assert policy["maxRestarts"] > 0
    assert policy["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]
    # podFailurePolicy asks for it, and a job that retried pods by itself would tear the run apart.
    assert (pod["restartPolicy"], job["backoffLimit"]) == ("Never", 0)


def test_the_container_runs_a_command_of_ours(jobset):
    (container,) = pod_of(jobset)["containers"]
    (script,) = container["args"]
    source, _, command = script.partition(" && ")
    assert shlex.split(source) == ["source", "tpu/env.sh"]
    program, name, *words = shlex.split(command)
    assert (program, name) == ("exec", "spo-jax")
    options = parsed(words)
    assert options.distributed
    assert options.resume
    assert words[-2:] == ["--output-dir", "${STORE:-$SHARED}/runs/quickstart"]
    (mount,) = container["volumeMounts"]
    assert {"name": "SHARED", "value": mount["mountPath"]} in container["env"]
    assert {"name": "STORE", "value": ""} in container["env"]


def test_with_a_bucket_nothing_is_mounted():
    """As the head of the manifest says: the marked lines go, and STORE is set."""
    lines = (TPU / "gke" / "jobset.yaml").read_text().splitlines()
    text = "\n".join(line for line in lines if not line.endswith("# mount"))
    text = text.replace('value: "" # or gs://BUCKET/PATH', "value: gs://bucket/path")
    document = yaml.load(text, _Strict)
    assert valid(document)
    (container,) = pod_of(document)["containers"]
    assert "volumes" not in pod_of(document)
    assert "volumeMounts" not in container
    assert "/mnt/shared" not in text.partition("apiVersion")[2]
    variables = {x["name"]: x["value"] for x in container["env"] if "value" in x}
    assert variables == {"STORE": "gs://bucket/path"}
    (script,) = container["args"]
    said = "spo-jax() { echo $JAX_COMPILATION_CACHE_DIR; printf '%s\\n' \"$@\"; };"
    run = ["bash", "-ec", said + script.replace("exec ", "")]
    environment = {"PATH": os.environ["PATH"], "HOME": "/root", **variables}
    told = subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    assert "gs://bucket/path/cache/jax" in told.stdout
    assert "gs://bucket/path/runs/quickstart" in told.stdout


def test_the_volume_is_the_claim_of_storage(jobset):
    (claim,) = read(TPU / "gke" / "storage.yaml")
    (volume,) = pod_of(jobset)["volumes"]
    assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert pod_of(jobset)["containers"][0]["volumeMounts"][0]["name"] == volume["name"]


def test_the_image_copies_what_is_there():
    text = (TPU / "gke" / "Dockerfile").read_text()
    copied = [
        w for line in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE) for w in line.split()
    ]
    assert {"pyproject.toml", "spo_jax", "configs", "tpu"} <= set(copied)
    assert all((ROOT / name).exists() for name in copied)


# SLURM


def directives():
    lines = re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", SBATCH.read_text(), re.MULTILINE)
    return dict(lines)


def test_directives_are_whole_and_ahead_of_the_commands():
    lines = SBATCH.read_text().splitlines()
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    written = [i for i, line in enumerate(lines) if line.startswith("#SBATCH")]
    assert len(written) == len(directives())  # none twice, none that is not understood
    assert max(written) < first_command  # SLURM reads no further


def test_one_task_a_gpu_and_time_to_save():
    found = directives()
    assert found["ntasks-per-node"] == found["gpus-per-node"]
    assert "gpus-per-task" not in found
    name, seconds = found["signal"].split("@")
    assert name == "TERM"  # to the steps: with B: only the batch shell would get it
    assert int(seconds) >= 60
    assert "requeue" in found


@pytest.fixture
def slurm(tmp_path):
    stubs = Stubs(tmp_path, "srun", "scontrol")
    stubs.environment["SLURM_JOB_ID"] = "42"
    return stubs


def submit(slurm, *arguments, **environment):
    return subprocess.run(
        ["bash", str(SBATCH), *arguments],
        env={**slurm.environment, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_job_runs_a_command_of_ours(slurm):
    slurm.tell(srun=["0"])
    key = "{name: dpo, beta: 0.2}"
    done = submit(slurm, CONFIG, "/shared/runs/x", "--loss", key)
    assert done.returncode == 0, done.stderr
    ((program, *words),) = slurm.calls()
    assert program == "srun"
    at = words.index("spo-jax")
    assert "--kill-on-bad-exit=0" in words[:at]
    options = parsed(words[at + 1 :])
    assert options.distributed
    assert options.resume
    assert words[-4:] == ["--output-dir", "/shared/runs/x", "--loss", key]
    environment = json.loads((slurm.folder / "srun.env").read_text())
    assert environment["JAX_PLATFORMS"] == "cuda,cpu"
    assert environment["XDG_CACHE_HOME"] == "/shared/runs/cache"


def test_a_dry_run_prints_the_command_and_runs_nothing(slurm):
    done = submit(slurm, CONFIG, "/shared/runs/x", DRY_RUN="1", SLURM_JOB_ID="")
    assert done.returncode == 0
    assert shlex.split(done.stdout)[0] == "srun"
    assert slurm.calls() == []


@pytest.mark.parametrize(
    ("status", "restarts", "requeued", "ends_with"),
    [
        ("143", "0", True, 143),
        ("75", "0", True, 75),  # the processes did not find each other
        ("143", "50", False, 2),  # MAX_RESTARTS
        ("2", "0", False, 2),  # wrong input would be the same again
        ("1", "0", False, 1),
        ("0", "3", False, 0),
    ],
)
def test_only_a_run_that_was_stopped_is_put_back(status, restarts, requeued, ends_with, slurm):
    slurm.tell(srun=[status], scontrol=["0"])
    done = submit(slurm, CONFIG, "/shared/runs/x", SLURM_RESTART_COUNT=restarts)
    assert done.returncode == ends_with
    assert (["scontrol", "requeue", "42"] in slurm.calls()) == requeued


def test_a_signal_to_the_batch_shell_waits_for_the_steps(slurm):
    """Pre-emption may signal the shell too: it must not end before srun has."""
    slurm.write("srun", "#!/bin/sh\nkill -TERM $PPID\nsleep 0.5\nexit 143\n")
    slurm.tell(scontrol=["0"])
    done = submit(slurm, CONFIG, "/shared/runs/x")
    assert done.returncode == 143
    assert ["scontrol", "requeue", "42"] in slurm.calls()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "expected CONFIG OUTPUT_DIR"),
        ([CONFIG, "--loss"], "expected CONFIG OUTPUT_DIR"),
        (["configs/none.yaml", "x"], "no configuration at configs/none.yaml"),
    ],
)
def test_wrong_arguments_are_refused(arguments, says, slurm):
    done = submit(slurm, *arguments)
    assert done.returncode == 2
    assert says in done.stderr
    assert slurm.calls() == []


@pytest.mark.parametrize(
    ("flags", "known"),
    [
        (" ".join(re.findall(r"--xla_gpu_\w+=\w+", SBATCH.read_text())), True),
        ("--xla_gpu_of_no_kind=true", False),
    ],
)
def test_xla_knows_the_flags(flags, known):
    """XLA ends a process with an unknown flag; that of the CPU reads the GPU's flags too."""
    assert flags
    code = (
        "import jaxlib.xla_client as x; x.CompileOptions().executable_build_options.debug_options"
    )
    environment = {**os.environ, "XLA_FLAGS": flags}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert (done.returncode == 0) == known


# The walk-through

README = (TPU / "README.md").read_text()


def test_readme_names_every_file_and_variable():
    for path in TPU.rglob("*"):
        if path.is_file() and path.name not in ("README.md", ".shellcheckrc"):
            assert path.name in README, path.name
    used = set()
    for path in TPU.glob("*.sh"):
        used |= set(re.findall(r"\$\{([A-Z_]+):-", path.read_text()))
    internal = {"STATE", "SPO_JAX", "HOME", "TMPDIR", "JAX_PLATFORMS", "HF_HOME"} | {
        "JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME"}  # fmt: skip
    missing = {name for name in used - internal if not re.search(rf"`{name}[`=]", README)}
    assert not missing


def test_commands_of_the_readme_parse():
    fenced = re.findall(r"^```bash\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    lines = "\n".join(fenced).replace("\\\n", " ").splitlines()
    ours = [shlex.split(line, comments=True) for line in lines if line.startswith("spo-jax ")]
    launched = [
        ["train", *shlex.split(line.partition(".sh ")[2], comments=True)]
        for line in lines
        if re.search(r"tpu/(launch|resume|watch)\.sh ", line)
    ]
    assert ours
    assert launched
    for words in [*(w[1:] for w in ours), *launched]:
        parsed(words)
