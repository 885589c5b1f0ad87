"""Small studies with round numbers."""

from spo_jax.study.records import Record, Study

ROWS = ("SFT", "SFT continued", "DPO", "DPO + SPO", "SimPO", "SimPO + SPO")
PLACES = {
    "SFT": (None, None),
    "SFT continued": (None, None),
    "DPO": ("DPO", "plain"),
    "DPO + SPO": ("DPO", "SPO"),
    "SimPO": ("SimPO", "plain"),
    "SimPO + SPO": ("SimPO", "SPO"),
}
ACCURACIES = {
    "SFT": (0.90, 0.88, 0.92),
    "SFT continued": (0.94, 0.92, 0.96),
    "DPO": (0.60, 0.64, 0.62),
    "DPO + SPO": (0.95, 0.96, 0.97),
    "SimPO": (0.40, 0.50, 0.45),
    "SimPO + SPO": (0.92, 0.93, 0.91),
}


def record(row, seed=0, accuracy=None, *, start="SFT", right=None, folder=None, place=None, **more):
    """A record; ``more`` metrics are written with ``__`` for the slash."""
    loss, variant, point = (*(place or PLACES.get(row, (None, None))), {}, {})[:3]
    metrics = {key.replace("__", "/"): value for key, value in more.items()}
    if accuracy is not None:
        metrics["accuracy"] = accuracy
    if isinstance(right, str):
        right = tuple(letter == "1" for letter in right)
    return Record(row, start, loss, variant, point, seed, metrics, right, folder)


def study(records, *, rows=ROWS, **options):
    options = {"title": "T", "baseline": "plain", "command": "spo-jax study x.yaml"} | options
    return Study(rows=rows, records=tuple(records), facts={"machine": "two cores"}, **options)


def grid(accuracies=None, **changed):
    """The whole grid over three seeds; ``changed`` rows are given with ``_`` for blanks."""
    accuracies = {**ACCURACIES, **(accuracies or {})}
    return [
        record(row, seed, accuracy, **PREFERENCE[row], log_ratio__chosen=SHIFT[row] + 0.1 * seed)
        for row, values in accuracies.items()
        for seed, accuracy in enumerate(values)
    ]


PREFERENCE = {
    row: {"rewards__accuracies": reward, "logprobs__accuracies": logprob}
    for row, reward, logprob in (
        ("SFT", 0.93, 0.92),
        ("SFT continued", 0.97, 0.95),
        ("DPO", 0.98, 0.96),
        ("DPO + SPO", 0.97, 0.95),
        ("SimPO", 0.975, 0.96),
        ("SimPO + SPO", 0.99, 0.98),
    )
}
SHIFT = {
    "SFT": 0.0,
    "SFT continued": 1.2,
    "DPO": -0.8,
    "DPO + SPO": 1.0,
    "SimPO": -2.1,
    "SimPO + SPO": 0.9,
}


def swept(values, heights, *, key="solver.penalty_weight", loss="DPO", variant="SPO", seeds=2):
    """A family over one setting: the heights' second seed is two points above the first."""
    return [
        record(
            f"{loss} + {variant} ({key.split('.')[-1]} {x:g})",
            seed,
            height + 0.02 * seed,
            place=(loss, variant, {key: x}),
        )
        for x, height in zip(values, heights, strict=True)
        for seed in range(seeds)
    ]


def with_rows(records, **options):
    """A study whose rows are those of the records, in their order."""
    return study(records, rows=tuple(dict.fromkeys(r.row for r in records)), **options)
