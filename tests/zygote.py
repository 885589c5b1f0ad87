"""A process that has imported what ``spo-jax train`` needs, and becomes that command by forking.

Imports take half of a start, and tests start dozens. A child of ``os.fork`` is a process
like any other: it can be killed, has its own environment, and ends as an interpreter does.

Requests come as JSON lines: ``{"start": arguments, "environment": {...}, "log": path}`` is answered
with the child's number, ``{"wait": number}`` with its exit status, or null while it runs.
"""

import json
import os
import sys


def main() -> None:
    """Answer requests until their pipe is closed."""
    import datasets  # noqa: F401
    import transformers.models.auto.tokenization_auto  # noqa: F401

    import spo_jax.cli
    import spo_jax.training.run

    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            number, status = os.waitpid(request["wait"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if number else None
        else:
            answer = os.fork()
            if not answer:
                _become(request["environment"], request["log"])
                raise SystemExit(spo_jax.cli.main(request["start"]))
        print(json.dumps(answer), flush=True)


def _become(environment: dict[str, str], log: str) -> None:
    os.environ.clear()
    os.environ |= environment
    nothing = os.open(os.devnull, os.O_RDONLY)
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for target, source in ((0, nothing), (1, file), (2, file)):
        os.dup2(source, target)
    import jax

    # Read from the environment when JAX was imported; XLA reads its own when it starts.
    for name, value in environment.items():
        if name.startswith("JAX_") and name.lower() in jax.config.values:
            kind = type(jax.config.values[name.lower()])
            jax.config.update(name.lower(), kind(value) if kind in (int, float) else value or None)


if __name__ == "__main__":
    main()
