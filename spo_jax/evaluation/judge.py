"""``spo-jax judge``: two files of outputs compared, pair by pair, by a command of the user's."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import queue
import shlex
import shutil
import signal
import statistics
import subprocess
import tempfile
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from spo_jax.checkpoints.atomic import to_json
from spo_jax.evaluation.heldout import wilson_interval

SIMILAR = 0.1
"""Two outputs are of similar length up to this difference, as a share of the longer one."""

_TAIL = 2000


class JudgeError(RuntimeError):
    """The judge could not be asked to the end; the verdicts until then are kept."""


class Pair(NamedTuple):
    """One instruction with the output that is judged and the one it is held against."""

    instruction: str
    output: str
    other: str


def read_outputs(path: str | Path) -> list[dict[str, Any]]:
    """The objects of a file of outputs, each checked for ``instruction`` and ``output``."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file of outputs: {path}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(found, list) or not found:
        raise ValueError(f"{path}: expected a list of outputs, found {type(found).__name__}")
    for i, row in enumerate(found):
        for key in ("instruction", "output"):
            if not isinstance(row, dict) or not isinstance(row.get(key), str):
                raise ValueError(f"{path}: element {i}: expected an object with a text {key!r}")
    return found


def match_outputs(
    outputs: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]
) -> list[Pair]:
    """Pairs of the same instruction; the k-th of equal instructions meets the k-th.

    Raises ``ValueError`` where no instruction is in both.
    """
    waiting: dict[str, list[str]] = defaultdict(list)
    for row in reversed(others):
        waiting[row["instruction"]].append(row["output"])
    pairs = [
        Pair(row["instruction"], row["output"], waiting[row["instruction"]].pop())
        for row in outputs
        if waiting[row["instruction"]]
    ]
    if not pairs:
        raise ValueError(
            f"none of the {len(outputs)} instructions is in the other file: give outputs for the "
            f"same prompts (first here: {outputs[0]['instruction'][:60]!r}, there: "
            f"{others[0]['instruction'][:60]!r})"
        )
    return pairs


def check_judge(command: str) -> list[str]:
    """The words of a judge's command. Raises ``ValueError`` where it names no program."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ValueError(f"judge {command!r}: {error}") from error
    if not words or shutil.which(words[0]) is None:
        raise ValueError(f"judge {command!r}: there is no program {words[0] if words else ''!r}")
    return words


def _requests(pairs: Sequence[Pair]) -> dict[str, dict[str, str]]:
    """Each pair in both orders; ``n/1`` has the judged output first, ``n/2`` second."""
    found = {}
    for n, (instruction, output, other) in enumerate(pairs):
        for order, (first, second) in enumerate(((output, other), (other, output)), 1):
            name = f"{n}/{order}"
            asked = {"instruction": instruction, "output_1": first, "output_2": second}
            found[name] = {"id": name, **asked}
    return found


def ask_judge(
    words: Sequence[str], requests: Mapping[str, Mapping[str, str]], *, timeout: float
) -> Iterator[tuple[str, float]]:
    """``(id, preference)`` as the judge answers: 1 the first is better, 2 the second, 1.5 a tie.

    The judge is started once and may answer in any order. Raises ``JudgeError``, with the end of
    its stderr, when it stops early, says nothing for ``timeout`` seconds, or answers otherwise.
    """
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
            start_new_session=True,
        )  # fmt: skip

        def fail(what: str) -> JudgeError:
            errors.seek(0, os.SEEK_END)
            errors.seek(max(0, errors.tell() - _TAIL))
            tail = errors.read().decode(errors="replace").strip() or "(nothing)"
            missing = f"{len(left)} of {len(requests)} verdicts are missing"
            return JudgeError(f"judge {shlex.join(words)}: {what}; {missing}. Its stderr: {tail}")

        lines: queue.Queue[bytes | None] = queue.Queue()
        threads = [
            threading.Thread(target=_send, args=(process, requests), daemon=True),
            threading.Thread(target=_receive, args=(process, lines), daemon=True),
        ]
        left = set(requests)
        try:
            for thread in threads:
                thread.start()
            while left:
                try:
                    line = lines.get(timeout=timeout)
                except queue.Empty:
                    raise fail(f"no answer for {timeout:g} s") from None
                if line is None:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(5)
                    raise fail(f"stopped early (exit status {process.poll()})")
                answer = _read_answer(line, left)
                if answer is None:
                    shown = line[:200].decode(errors="replace").strip()
                    raise fail(
                        f"answered {shown!r}, expected "
                        '{"id": one of those asked, "preference": 1 to 2, or 0 for a tie}'
                    )
                left.remove(answer[0])
                yield answer
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for thread in threads:
                thread.join(5)


def _send(process: subprocess.Popen, requests: Mapping[str, Any]) -> None:
    # A judge that stopped reading is found out where its answers are awaited.
    with contextlib.suppress(OSError):
        for request in requests.values():
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
        process.stdin.close()


def _receive(process: subprocess.Popen, lines: queue.Queue) -> None:
    for line in process.stdout:
        lines.put(line)
    lines.put(None)


def _read_answer(line: bytes, left: set[str]) -> tuple[str, float] | None:
    try:
        answer = json.loads(line)
        name, value = answer["id"], answer["preference"]
    except (ValueError, KeyError, TypeError):
        return None
    known = isinstance(name, str) and name in left
    if not known or type(value) not in (int, float) or not (value == 0 or 1 <= value <= 2):
        return None
    return name, 1.5 if value == 0 else float(value)


def judge_outputs(
    outputs: str | Path,
    others: str | Path,
    *,
    command: str,
    verdicts: str | Path | None = None,
    timeout: float = 600.0,
) -> dict[str, Any]:
    """Ask the judge about every pair in both orders; ``summary`` of what it said.

    Each verdict is appended to ``verdicts`` (beside ``outputs`` where not given) when it comes;
    those of the same command on the same texts that are there already are not asked again.
    """
    outputs = Path(outputs)
    words = check_judge(command)
    ours, theirs = read_outputs(outputs), read_outputs(others)
    pairs = match_outputs(ours, theirs)
    path = Path(verdicts) if verdicts else outputs.with_suffix(".verdicts.jsonl")
    requests = _requests(pairs)
    keys = {name: _key(command, request) for name, request in requests.items()}
    known = _known_verdicts(path)
    found = {name: known[key] for name, key in keys.items() if key in known}
    open_requests = {name: asked for name, asked in requests.items() if name not in found}
    if open_requests:
        # Half a line of a run that was killed must not swallow the first one of this run.
        torn = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
        with path.open("a") as file:
            file.write("\n" if torn else "")
            for name, value in ask_judge(words, open_requests, timeout=timeout):
                found[name] = value
                line = {"id": name, "preference": value, "key": keys[name]}
                file.write(to_json(line, str(path)) + "\n")
                file.flush()
    sizes = {"outputs": len(ours), "others": len(theirs)}
    return {"verdicts": str(path), **sizes, **summary(pairs, found)}


def _key(command: str, request: Mapping[str, str]) -> str:
    asked = [command, *(request[k] for k in ("instruction", "output_1", "output_2"))]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:32]


def _known_verdicts(path: Path) -> dict[str, float]:
    known = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        # Half a line of a run that was killed is asked again.
        with contextlib.suppress(ValueError, KeyError, TypeError):
            verdict = json.loads(line)
            known[verdict["key"]] = float(verdict["preference"])
    return known


def summary(pairs: Sequence[Pair], verdicts: Mapping[str, float]) -> dict[str, Any]:
    """Win rate of the judged outputs, a tie being half a win, and what may bias it.

    A pair's score is the mean of its two orders. The interval is Wilson's at 95 % over pairs.
    ``order_disagreements`` is the share of pairs in which the two orders name different winners;
    ``similar_length`` has the win rate among pairs whose lengths in characters differ by at most
    ``SIMILAR`` of the longer: a hint at what length does, not AlpacaEval's length-controlled rate.
    """
    scores, disagreements, similar = [], 0, []
    for n, pair in enumerate(pairs):
        first, second = 2 - verdicts[f"{n}/1"], verdicts[f"{n}/2"] - 1
        scores.append((first + second) / 2)
        disagreements += _winner(first) != _winner(second)
        long, short = max(map(len, pair[1:])), min(map(len, pair[1:]))
        if long - short <= SIMILAR * long:
            similar.append(scores[-1])
    return {
        "pairs": len(pairs),
        **_rate(scores),
        "order_disagreements": disagreements / len(pairs),
        "similar_length": {"pairs": len(similar), **(_rate(similar) if similar else {})},
        "mean_characters": statistics.fmean(len(pair.output) for pair in pairs),
        "mean_characters_other": statistics.fmean(len(pair.other) for pair in pairs),
    }


def _winner(score: float) -> int:
    return (score > 0.5) - (score < 0.5)


def _rate(scores: Sequence[float]) -> dict[str, Any]:
    interval = list(wilson_interval(sum(scores), len(scores)))
    return {"win_rate": statistics.fmean(scores), "win_rate_interval": interval}


def shown_summary(found: Mapping[str, Any]) -> str:
    """The summary in words."""

    def rate(part: Mapping[str, Any]) -> str:
        low, high = part["win_rate_interval"]
        return f"{part['win_rate']:.1%} (95 % interval {low:.1%} to {high:.1%})"

    similar = found["similar_length"]
    similar_rate = rate(similar) if similar["pairs"] else "none"
    return (
        f"win rate {rate(found)} over {found['pairs']} pairs, each judged in both orders; "
        f"{found['outputs'] - found['pairs']} of {found['outputs']} outputs had no counterpart\n"
        f"the two orders name different winners in {found['order_disagreements']:.1%} of the "
        f"pairs\nmean length {found['mean_characters']:.0f} characters, the others' "
        f"{found['mean_characters_other']:.0f}; among the {similar['pairs']} pairs of similar "
        f"length (within {SIMILAR:.0%}): {similar_rate}; a hint, not a length-controlled win rate"
    )
