"""The scripts of ``tpu/``: linted, dry-run, and run against stand-ins for gcloud."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from spo_jax.cli import make_parser
from spo_jax.cli.train import read_overrides
from spo_jax.config.validation import load_config
from tests.tpu.cluster_stubs import TPU, Stubs, commands, remote

SCRIPTS = sorted(p for p in TPU.rglob("*") if p.suffix in (".sh", ".sbatch"))
CONFIG = "configs/quickstart.yaml"
WHERE = ["--project=my-project", "--zone=us-west4-a"]
SHELLCHECK = shutil.which("shellcheck", path=str(Path(sys.executable).parent)) or shutil.which(
    "shellcheck"
)


@pytest.fixture
def stubs(tmp_path):
    return Stubs(tmp_path, "gcloud", "git", "srun", "scontrol")


def parsed(words: list[str]):
    """``spo-jax WORDS`` through the real parser; keys of the configuration are checked too."""
    options, rest = make_parser().parse_known_args(words)
    if getattr(options, "takes_keys", False):
        load_config(options.config, read_overrides(rest))
    else:
        assert not rest, rest
    return options


# Lint


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_shellcheck_finds_nothing(path):
    assert SHELLCHECK, "shellcheck is not installed: pip install -e '.[test]'"
    done = subprocess.run([SHELLCHECK, path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    done = subprocess.run(["bash", "-n", path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_shellcheck_would_find_something(tmp_path):
    assert SHELLCHECK, "shellcheck is not installed: pip install -e '.[test]'"
    bad = tmp_path / "bad.sh"
    bad.write_text("#!/usr/bin/env bash\ncd $1\n")
    assert subprocess.run([SHELLCHECK, bad], capture_output=True, check=False).returncode == 1


# Dry runs

ARGUMENTS = {
    "create.sh": [],
    "launch.sh": [CONFIG, "--loss", "{name: dpo, beta: 0.2}"],
    "resume.sh": [CONFIG],
    "logs.sh": ["3"],
    "status.sh": [],
    "stop.sh": [],
    "watch.sh": [CONFIG],
    "fetch.sh": ["/mnt/shared/runs/quickstart/preference", "out", "--dtype", "bfloat16"],
    "delete.sh": [],
}
SOURCED = {"common.sh", "env.sh", "worker.sh"}


def test_every_script_is_dry_run_here():
    assert {p.name for p in SCRIPTS if p.suffix == ".sh"} == set(ARGUMENTS) | SOURCED


@pytest.mark.parametrize("script", ARGUMENTS)
def test_a_dry_run_prints_commands_and_runs_none(script, stubs):
    done = stubs.run(script, *ARGUMENTS[script], DRY_RUN="1")
    assert done.returncode == 0, done.stderr
    # create.sh asks git what is not committed, which changes nothing.
    assert [words for words in stubs.calls() if words != ["git", "status", "--porcelain"]] == []
    found = commands(done.stdout)
    assert found
    for words in found:
        assert words[0] in ("gcloud", "git", "rm", "until"), words
        if words[0] == "gcloud":
            assert set(WHERE) <= set(words)
        text = remote(words)
        if text is not None:
            check = subprocess.run(["bash", "-nc", text], capture_output=True, check=False)
            assert check.returncode == 0, check.stderr


def test_a_dry_run_can_be_pasted(stubs):
    """A shell that gets the printed text makes the very calls that the script itself makes."""
    stubs.tell(queued_resources=[None, "ACTIVE"])
    printed = stubs.run("create.sh", DRY_RUN="1").stdout
    (stubs.folder / "calls").unlink()
    assert stubs.run("create.sh").returncode == 0
    real = [words for words in stubs.calls() if "describe" not in words]
    (stubs.folder / "calls").unlink()
    stubs.tell(queued_resources=["ACTIVE"])
    subprocess.run(["bash", "-c", printed], env=stubs.environment, check=True, timeout=60)
    pasted = [words for words in stubs.calls() if "describe" not in words]
    assert pasted == [words for words in real if words[1:] != ["status", "--porcelain"]]
    assert len(pasted) >= 6


def test_create_says_everything_the_slice_needs(stubs):
    done = stubs.run("create.sh", DRY_RUN="1", SPOT="1", VALID_FOR="6h", ACCELERATOR="v6e-16")
    create, wait, *rest = commands(done.stdout)
    assert create[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "spo"]
    wanted = {"--node-id=spo", "--accelerator-type=v6e-16", "--spot", "--valid-until-duration=6h"}
    assert wanted <= set(create)
    assert wait[0] == "until"
    assert "ACTIVE" in wait
    steps = [remote(words) or words[:2] for words in rest]
    assert "gcsfuse" in steps[0]
    assert "my-bucket" in steps[0]
    assert ["git", "archive"] in steps
    assert "pip install" in steps[-1]
    nfs = commands(stubs.run("create.sh", DRY_RUN="1", BUCKET=None, NFS="10.0.0.2:/x").stdout)
    assert "mount -t nfs -o hard,vers=3 '10.0.0.2:/x'" in remote(nfs[2])
    store = {"BUCKET": None, "STORE": "gs://b/spo/"}
    said = stubs.run("create.sh", DRY_RUN="1", **store).stdout
    assert "mount" not in said
    assert ".[tpu,buckets]" in said


def test_runs_in_a_store_need_no_mount(stubs):
    store = {"DRY_RUN": "1", "BUCKET": None, "STORE": "gs://b/spo/"}
    said = [remote(x) for x in commands(stubs.run("launch.sh", CONFIG, **store).stdout)]
    assert all("STORE=gs://b/spo " in text for text in said)
    assert "--output-dir gs://b/spo/runs/quickstart" in said[-1]
    run = "gs://b/spo/runs/quickstart"
    export, copy = commands(stubs.run("fetch.sh", run, "here", **store).stdout)
    assert f"export {run} spo-exports/runs-quickstart" in remote(export)
    assert "spo:spo-exports/runs-quickstart" in copy


@pytest.mark.parametrize("script", ["launch.sh", "resume.sh", "watch.sh"])
def test_what_workers_start_is_a_command_of_ours(script, stubs):
    found = commands(stubs.run(script, *ARGUMENTS[script], DRY_RUN="1").stdout)
    started = [remote(words) for words in found if "worker.sh start" in (remote(words) or "")]
    assert started
    for words in found:
        if "worker.sh start" in (remote(words) or ""):
            assert "--worker=all" in words
    for text in started:
        options = parsed(shlex.split(text.partition("worker.sh start ")[2]))
        assert options.command == "train"
        assert options.config == CONFIG
        assert options.distributed
        assert options.resume == (script != "launch.sh")
        assert "--output-dir /mnt/shared/runs/quickstart" in text


def test_what_fetch_exports_is_a_command_of_ours(stubs):
    export, copy = commands(stubs.run("fetch.sh", *ARGUMENTS["fetch.sh"], DRY_RUN="1").stdout)
    assert "--worker=0" in export
    options = parsed(shlex.split(remote(export).partition("spo-venv/bin/spo-jax ")[2]))
    assert (options.command, options.dtype) == ("export", "bfloat16")
    assert f"spo:{options.out}" in copy
    assert "JAX_PLATFORMS=cpu" in remote(export)


@pytest.mark.parametrize(
    ("script", "arguments", "environment", "says"),
    [
        ("create.sh", [], {"PROJECT": None}, "set PROJECT"),
        ("create.sh", [], {"NAME": "My_Slice"}, "NAME=My_Slice"),
        ("create.sh", [], {"BUCKET": None}, "set STORE"),
        ("create.sh", [], {"NFS": "a:/b"}, "BUCKET and NFS"),
        ("create.sh", [], {"BUCKET": "gs://b"}, "without gs://"),
        ("create.sh", [], {"STORE": "gs://b"}, "STORE is set, and BUCKET"),
        ("create.sh", [], {"STORE": "my-bucket", "BUCKET": None}, "STORE=my-bucket"),
        ("create.sh", [], {"SPOT": "yes"}, "SPOT=yes"),
        ("create.sh", ["v5e"], {}, "takes no arguments"),
        ("launch.sh", [], {}, "name a configuration"),
        ("launch.sh", ["--resume"], {}, "name a configuration"),
        ("launch.sh", [CONFIG], {"OUTPUT_DIR": "s3://b/x"}, "OUTPUT_DIR=s3://b/x"),
        ("launch.sh", [CONFIG, "--output_dir=x"], {}, "set OUTPUT_DIR"),
        ("logs.sh", ["first"], {}, "worker first"),
        ("stop.sh", [], {"GRACE": "long"}, "GRACE=long"),
        ("delete.sh", [], {"FORCE": "true"}, "FORCE=true"),
        ("watch.sh", [CONFIG], {"MAX_RESUMES": "-1"}, "MAX_RESUMES=-1"),
        ("fetch.sh", ["runs/x", "out"], {}, "RUN=runs/x"),
        ("status.sh", [], {"DRY_RUN": "yes"}, "DRY_RUN=yes"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_called(
    script, arguments, environment, says, stubs
):
    done = stubs.run(script, *arguments, **environment)
    assert done.returncode == 2
    assert says in done.stderr
    assert stubs.calls() == []


# Against a stand-in for gcloud


def test_create_queues_waits_and_installs(stubs):
    stubs.tell(queued_resources=[None, "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"])
    done = stubs.run("create.sh")
    assert done.returncode == 0, done.stderr
    assert stubs.steps() == ["create", "scp"]
    assert done.stdout.splitlines()[-1].startswith("spo is ready")
    assert "waiting: PROVISIONING" in done.stdout


def test_create_again_queues_nothing(stubs):
    stubs.tell(queued_resources=["ACTIVE"])
    assert stubs.run("create.sh").returncode == 0
    assert stubs.steps() == ["scp"]


@pytest.mark.parametrize(
    ("states", "says"),
    [
        (["PROVISIONING", "FAILED"], "spo is FAILED"),
        (["SUSPENDED"], "spo is SUSPENDED"),
        # Not signed in is not "there is none": a second slice would be queued.
        (["!ERROR: (gcloud.auth) Reauthentication required"], "Reauthentication"),
    ],
)
def test_create_gives_up_and_says_why(states, says, stubs):
    stubs.tell(queued_resources=states)
    done = stubs.run("create.sh")
    assert done.returncode == 1
    assert says in done.stderr
    assert stubs.steps() == []


def test_create_does_not_wait_for_ever(stubs):
    stubs.tell(queued_resources=[None, "WAITING_FOR_RESOURCES"])
    done = stubs.run("create.sh", WAIT_MINUTES="0")
    assert done.returncode == 1
    assert "stays queued" in done.stderr


def test_delete_waits_until_it_is_gone(stubs):
    stubs.tell(queued_resources=["ACTIVE", "DELETING", None])
    done = stubs.run("delete.sh")
    assert done.returncode == 0, done.stderr
    assert stubs.steps() == ["delete"]
    assert "spo is gone" in done.stdout


def test_delete_spares_a_run_that_goes_on(stubs):
    stubs.tell(queued_resources=["ACTIVE", "ACTIVE", None], ssh=["!a run is going on here"])
    done = stubs.run("delete.sh")
    assert done.returncode == 1
    assert "FORCE=1" in done.stderr
    assert stubs.steps() == []
    assert stubs.run("delete.sh", FORCE="1").returncode == 0
    assert stubs.steps() == ["delete"]


def test_status_of_a_slice_that_is_not_there(stubs):
    stubs.tell(queued_resources=[None])
    done = stubs.run("status.sh")
    assert done.returncode == 0
    assert "there is no queued resource spo" in done.stdout


REBUILT = ["delete", "create", "scp", "start --resume"]


@pytest.mark.wide
@pytest.mark.parametrize(
    ("answers", "status", "steps", "says"),
    [
        # Pre-empted on the way: suspended, deleted, created anew, resumed; then done.
        (
            {
                "queued_resources": [
                    "ACTIVE", "SUSPENDING", "SUSPENDED",  # seen by watch.sh
                    "SUSPENDED", None,  # by delete.sh: there, then gone
                    None, "PROVISIONING", "ACTIVE",  # by create.sh: none yet, then in the queue
                    "ACTIVE",
                ],
                "ssh_status": ["spo-jax: running 7", "spo-jax: exited 0"],
            },
            0, REBUILT, "the run is done",
        ),
        # A process that fell over is resumed where it is.
        (
            {"queued_resources": ["ACTIVE"],
             "ssh_status": ["spo-jax: exited 1", "spo-jax: running 8", "spo-jax: exited 0"]},
            0, ["start --resume"], "restart 1 of at most",
        ),
        # After a SIGTERM the slice is mostly about to go: it is looked at twice.
        (
            {"queued_resources": ["ACTIVE"],
             "ssh_status": ["spo-jax: exited 143"] * 2 + ["spo-jax: exited 0"]},
            0, ["start --resume"], "ended by SIGTERM",
        ),
        ({"queued_resources": ["ACTIVE"], "ssh_status": ["spo-jax: exited 2"]}, 2, [], "refused"),
        (
            {"queued_resources": ["ACTIVE"], "ssh_status": ["spo-jax: stopped 143"]},
            0, [], "stop.sh",
        ),
        ({"queued_resources": ["FAILED"]}, 3, [], "FAILED"),
        ({"queued_resources": ["!ERROR: network"]}, 3, [], "gcloud failed 5 times"),
        # A crash at every start ends at MAX_RESUMES.
        (
            {"queued_resources": ["ACTIVE"], "ssh_status": ["spo-jax: exited 1"]},
            3, ["start --resume"] * 2, "after 2 restarts",
        ),
        # Not reachable from here, but well: a run may go on there, so nothing is deleted.
        (
            {"queued_resources": ["ACTIVE"], "ssh_status": ["!no route"], "tpu_vm": ["READY"]},
            3, [], "the node is READY",
        ),
        # Not reachable because the node is gone.
        (
            {
                "queued_resources": ["ACTIVE"] * 6 + [None, None, "ACTIVE"],
                "ssh_status": ["!no route"] * 5 + ["spo-jax: exited 0"], "tpu_vm": ["PREEMPTED"],
            },
            0, REBUILT, "the node is PREEMPTED",
        ),
    ],
)  # fmt: skip
def test_watch(answers, status, steps, says, stubs):
    stubs.tell(**answers)
    done = stubs.run("watch.sh", CONFIG, MAX_RESUMES="2")
    assert done.returncode == status, done.stdout + done.stderr
    assert stubs.steps() == steps
    assert says in done.stdout


def test_watch_gives_the_slice_back_where_it_is_told_to(stubs):
    stubs.tell(queued_resources=["ACTIVE", "ACTIVE", None], ssh_status=["spo-jax: exited 0"])
    assert stubs.run("watch.sh", CONFIG, DELETE_WHEN_DONE="1").returncode == 0
    assert stubs.steps() == ["delete"]
