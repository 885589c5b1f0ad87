"""A Google Cloud Storage server on loopback, for tests: the package's, and what it leaves out.

Real stores answer a read with the object's generation, and write or read on condition of one;
``gcp-storage-emulator`` does neither, and both tensorstore and a lease rest on them. Run as
``python -m tests.parallel.gcs_store PORT BUCKET``, it serves until it is killed, from memory.
"""

import os
import signal
import sys
import threading
from http import HTTPStatus
from http.server import HTTPServer

from gcp_storage_emulator import server
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects

_ONE_BY_ONE = threading.RLock()


def _generation(request, storage, name):
    try:
        return storage.get_file_obj(request.params["bucket_name"], name)["generation"]
    except NotFound:
        return "0"


def _condition(request, key):
    header = f"x-goog-if-generation-{'not-' if 'Not' in key else ''}match"
    return (request.query.get(key) or [request.get_header(header)])[0]


def _on_condition(handler, name_of, *, failed):
    """``handler`` where the generation that the request asks for is there; else ``failed``."""

    def handle(request, response, storage, *args, **kwargs):
        with _ONE_BY_ONE:
            name = name_of(request)
            there = _generation(request, storage, name) if name else None
            wanted, unwanted = (
                _condition(request, key) for key in ("ifGenerationMatch", "ifGenerationNotMatch")
            )
            if name and wanted is not None and wanted != there:
                response.status = HTTPStatus.PRECONDITION_FAILED
            elif name and unwanted is not None and unwanted == there:
                response.status = failed
            else:
                handler(request, response, storage, *args, **kwargs)
            if there not in (None, "0"):
                response["x-goog-generation"] = there

    return handle


def _uploaded(request):
    if "name" in request.query:
        return request.query["name"][0]
    return (request.data or {}).get("meta", request.data or {}).get("name")


def _named(request):
    return request.params["object_id"]


def _conditional(handlers):
    wrapped = {
        objects.get: _on_condition(objects.get, _named, failed=HTTPStatus.NOT_MODIFIED),
        objects.download: _on_condition(objects.download, _named, failed=HTTPStatus.NOT_MODIFIED),
        objects.delete: _on_condition(objects.delete, _named, failed=HTTPStatus.NOT_MODIFIED),
        objects.insert: _on_condition(
            objects.insert, _uploaded, failed=HTTPStatus.PRECONDITION_FAILED
        ),
    }
    return {method: wrapped.get(handler, handler) for method, handler in handlers.items()}


def main(port: int, bucket: str) -> None:
    """Serve ``gs://BUCKET`` at ``localhost:PORT``."""
    # A client connects as often as it has objects to read; those that do not fit into a queue of
    # five try again after 1, 2, 4 ... seconds, and in the end give up.
    HTTPServer.request_queue_size = 1024
    server.HANDLERS = [(pattern, _conditional(found)) for pattern, found in server.HANDLERS]
    store = server.create_server("localhost", port, in_memory=True, default_bucket=bucket)
    store.start()
    print("ready", flush=True)
    signal.pause()
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
