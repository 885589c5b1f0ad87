"""Object stores on loopback, each a process of its own, and what clients need to find them."""

import atexit
import functools
import os
import subprocess
import sys
from pathlib import Path

from tests.runs import free_port

ROOT = Path(__file__).resolve().parents[2]
BUCKET = "a-bucket"
# Read when gcsfs is imported: else it asks Google of which kind each bucket is.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"


def gcs_variables(port: int) -> dict[str, str]:
    """For gcsfs, the Google client and tensorstore; without a search for credentials."""
    url = f"http://localhost:{port}"
    return {
        "STORAGE_EMULATOR_HOST": url,
        "TENSORSTORE_GCS_HTTP_URL": url,
        "GCE_METADATA_HOST": "localhost:1",
        "GCE_METADATA_ROOT": "localhost:1",
        "NO_GCE_CHECK": "true",
        "GOOGLE_CLOUD_PROJECT": "none",
    }


def s3_variables(port: int) -> dict[str, str]:
    """For s3fs."""
    return {
        "AWS_ENDPOINT_URL": f"http://localhost:{port}",
        "AWS_ACCESS_KEY_ID": "somebody",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }


@functools.cache
def serve() -> None:
    """Both servers, until this process ends; it and its children find them.

    Clients keep the address that they first saw, so that there is one of each a process.
    """
    for module, variables in (("gcs_store", gcs_variables), ("s3_store", s3_variables)):
        port = free_port()
        command = [sys.executable, "-m", f"tests.parallel.{module}", str(port), BUCKET]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
        store = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        atexit.register(store.kill)
        assert store.stdout.readline() == b"ready\n", f"no {module}"
        os.environ |= variables(port)
