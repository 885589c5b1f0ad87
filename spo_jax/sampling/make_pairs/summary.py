"""How far the making of pairs is, what came of it, and why there may be none."""

from __future__ import annotations

import time

from tqdm import tqdm

from spo_jax.parallel.processes import say
from spo_jax.sampling.make_pairs.pairing import Counts
from spo_jax.sampling.make_pairs.settings import PairSettings


class Progress:
    """Prompts done, samples/s, share right, pairs: a bar, or without a terminal seldom a line.

    ``samples`` are drawn of each prompt; ``drawn`` of the next prompts were there before.
    """

    def __init__(
        self,
        counts: Counts,
        prompts: int,
        *,
        samples: int,
        drawn: int = 0,
        seconds: float = 30.0,
    ):
        self._prompts, self._each, self._seconds = prompts, samples, seconds
        self._before = counts.samples + drawn
        self._start = self._said = time.monotonic()
        if counts.prompts:
            say(f"going on behind {counts.prompts} of {prompts} prompts")
        self._bar = tqdm(
            total=prompts,
            initial=counts.prompts,
            disable=None,
            dynamic_ncols=True,
            bar_format="{n_fmt}/{total_fmt} prompts |{bar}| [{elapsed}<{remaining}]{postfix}",
        )

    def update(self, counts: Counts, drawn: int = 0) -> None:
        """Show where things stand, with ``drawn`` more samples that are not graded yet."""
        now = time.monotonic()
        samples = counts.samples + drawn - self._before
        said = [f"{samples / max(now - self._start, 1e-9):,.1f} samples/s"]
        if counts.samples:
            right = 100 * counts.right / counts.samples
            said += [f"{right:.1f} % right", f"{counts.pairs} pairs"]
        if not self._bar.disable:
            self._bar.set_postfix_str(", ".join(said), refresh=False)
            self._bar.update(counts.prompts - self._bar.n)
            self._bar.refresh()
        elif now - self._said >= self._seconds:
            self._said = now
            said = [
                f"{counts.prompts} of {self._prompts} prompts",
                *self._more(counts, drawn),
                *said,
            ]
            say(", ".join(said))

    def _more(self, counts: Counts, drawn: int) -> list[str]:
        """Samples of the prompts under way, and the time left by those drawn so far."""
        said = [f"{drawn} samples of the next"] if drawn else []
        done = counts.samples + drawn - self._before
        if done > 0:
            left = self._each * (self._prompts - counts.prompts) - drawn
            left *= (time.monotonic() - self._start) / done
            said.append(f"about {left / 60:.0f} min left")
        return said

    def close(self) -> None:
        """End the bar."""
        self._bar.close()


def summary(counts: Counts) -> str:
    """What came of prompts and samples, in three lines."""

    def share(some: int) -> str:
        return f"{some} ({100 * some / counts.samples:.1f} %)"

    mixed = counts.prompts - counts.all_right - counts.all_wrong
    return (
        f"samples: {counts.samples}; {share(counts.right)} right, {share(counts.unanswered)} "
        f"without an answer, {share(counts.cut_off)} cut off, {counts.empty} empty\n"
        f"prompts: {counts.prompts}; {counts.all_right} with right samples alone, "
        f"{counts.all_wrong} with wrong ones alone, {mixed} with both\n"
        f"pairs: {counts.pairs}; {counts.duplicates} wrong samples were duplicates, "
        f"{counts.respelled} rejected texts are tokenized otherwise than they were sampled"
    )


def why_no_pairs(counts: Counts, settings: PairSettings) -> str:
    """Why there is no pair, and what to do."""
    said = f"no pairs: of {counts.samples} samples of {counts.prompts} prompts "
    if counts.right == counts.samples:
        return said + "all are right: raise temperature or samples, or take harder problems"
    if settings.chosen == "own" and counts.right == 0:
        return (
            f"{said}all are wrong ({counts.unanswered} without an answer), and only right ones "
            "would be chosen: use --chosen gold, raise samples, or train the model on solutions "
            "first"
        )
    return (
        f"{said}{counts.samples - counts.right} are wrong, but none makes a pair: "
        f"{counts.cut_off} were cut off, {counts.empty} are empty, {counts.duplicates} equal a "
        f"right one but for white space; {counts.all_right} prompts are all right, "
        f"{counts.all_wrong} all wrong. Raise max_new_tokens or samples, or use --cut-off keep"
    )
