"""Columns and keys of rows: renamed, read, known to be only about the row, or an error.

Whatever a row holds and no parser reads ends in one of three ways: it is about the row (an id, a
source, a score), it says again what is read already, or the row is refused with the name.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from spo_jax.data.badrow import BadRow, shown

ABOUT_THE_ROW = frozenset(
    """
    id ids uid uuid guid idx index row number no hash sha sha256 md5 fingerprint digest key
    source sources src origin from dataset datasets datasplit collection corpus file
    filename filepath path url urls link links domain split subset license licence copyright
    score scores rating ratings rank ranks reward rewards grade grades stars votes upvotes likes
    quality confidence probability likelihood logprob logprobs perplexity toxicity agreement
    timestamp timestamps time times date datetime created updated modified at year
    model models generator generators policy temperature provider engine
    language languages lang locale category categories subcategory topic topics subject subjects
    tag tags type types kind task tasks level difficulty keyword keywords cluster
    author authors annotator annotators annotation annotations worker workers rater raters
    length lengths len count counts num n sample samples tokens turns words chars characters size
    version metadata meta info extra
    """.split()  # noqa: SIM905
)
"""Words that speak about a row and not to a model, as columns and keys are named in the wild."""

_NOUNS = frozenset(
    """
    prompt prompts chosen rejected completion completions response responses answer answers
    question instruction conversation conversations dialogue dialog message item
    user record problem pair turn avg average mean min max std diff difference delta total is has
    of the original overall
    """.split()  # noqa: SIM905
)
"""Words that go along with one of those: ``prompt_id``, ``score_chosen``, ``chosen-model``."""

_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+|\d+")


def is_about_the_row(name: str) -> bool:
    """Whether a column of that name is known to say something about the row alone."""
    words = [word.lower() for word in _WORD.findall(name)]
    plain = [word for word in words if not word.isdigit()]
    return (
        bool(plain)
        and all(word in ABOUT_THE_ROW or word in _NOUNS for word in plain)
        and any(word in ABOUT_THE_ROW for word in plain)
    )


def is_empty(value: Any) -> bool:
    """Whether a value says nothing: null, blank text, an empty list or mapping."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, list | tuple | dict) and not value)


MESSAGE = ("role", "content", "from", "value")
"""What makes a message: never left out, whatever a column of that name is."""
_OF_MESSAGES = " (of messages)"


class Columns:
    """What a data set's configuration says of its columns, and what was seen of them.

    ``mapping`` is ``{our name: the file's}``; ``ignored`` are columns and message keys to leave
    out, all but the role and the content of a message. ``not_read`` counts the rows in which
    something about the row alone stood, by name, and ``left_out`` what was left out.

    Raises ``ValueError`` for a column that is both mapped and ignored.
    """

    def __init__(self, mapping: Mapping[str, str] | None = None, ignored: Sequence[str] = ()):
        self.mapping, self.ignored = dict(mapping or {}), frozenset(ignored)
        both = sorted(self.ignored & set(self.mapping.values()))
        if both:
            raise ValueError(
                f"data.columns maps {shown(both)}, and data.ignore_columns leaves it out: keep one"
            )
        self.not_read: Counter[str] = Counter()
        self.left_out: set[str] = set()
        self._kinds: dict[tuple[frozenset[str], frozenset[str]], tuple[list[str], list[str]]] = {}

    def rename(self, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        """The row under our names, without what is ignored.

        Raises ``BadRow`` where a mapped name stands there twice.
        """
        fields = self._without(fields, self.ignored)
        if not self.mapping:
            return fields
        found = {k: v for k, v in fields.items() if k not in self.mapping.values()}
        for ours, theirs in self.mapping.items():
            if theirs not in fields:
                continue
            if ours in found and not is_empty(found[ours]):
                raise BadRow(
                    f"two columns for '{ours}'",
                    f"its own, and '{theirs}' by data.columns",
                    f"map another, or leave its own out: data.ignore_columns: [{ours}]",
                )
            found[ours] = fields[theirs]
        return found

    def without_ignored(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        """A message without the keys that are ignored."""
        return self._without(message, self.ignored.difference(MESSAGE), _OF_MESSAGES)

    def _without(
        self, fields: Mapping[str, Any], names: frozenset[str], where: str = ""
    ) -> Mapping[str, Any]:
        if names.isdisjoint(fields):
            return fields
        self.left_out.update(f"{name}{where}" for name in names if name in fields)
        return {name: value for name, value in fields.items() if name not in names}

    def check(self, fields: Mapping[str, Any], read: frozenset[str]) -> None:
        """Raise ``BadRow`` for a column that is not among ``read`` and may not be left out."""
        key = (frozenset(fields), read)
        if key not in self._kinds:
            rest = [name for name in fields if name not in read]
            about = [name for name in rest if is_about_the_row(str(name))]
            self._kinds[key] = about, [name for name in rest if name not in about]
        about, unknown = self._kinds[key]
        self.not_read.update(about)
        unknown = [name for name in unknown if not is_empty(fields[name])]
        if not unknown:
            return
        known = list(_texts([fields[name] for name in read if name in fields]))
        new = [name for name in unknown if not says_again(fields[name], known)]
        if new:
            raise unread("column", new)
        self.not_read.update(f"{name} (says again what is read)" for name in unknown)

    def check_keys(self, message: Mapping[str, Any], read: frozenset[str], place: str) -> None:
        """The same for the keys of the message at ``place``."""
        rest = [name for name in message if not (name in read or is_empty(message[name]))]
        new = [name for name in rest if not is_about_the_row(str(name))]
        if new:
            raise unread("key", new, place)
        self.not_read.update(f"{name}{_OF_MESSAGES}" for name in rest)

    def unused(self) -> list[str]:
        """Names to leave out that no row or message had."""
        seen = {name.removesuffix(_OF_MESSAGES) for name in self.left_out}
        return sorted(self.ignored - seen)


def unread(what: str, names: Sequence[Any], place: str = "") -> BadRow:
    """The error for columns or keys that nobody reads."""
    listed = shown(names, most=30)
    where = f" of {place}" if place else ""
    mapping = "map to one that is read (data.columns), " if what == "column" else ""
    said = f"a {what} that is not read" if len(names) == 1 else f"{what}s that are not read"
    return BadRow(
        f"{said}: {shown(names)}{where}",
        "what stands there might change what the model sees",
        f"rename, {mapping}or leave out by name (data.ignore_columns: [{listed}])",
    )


def says_again(value: Any, known: Sequence[str]) -> bool:
    """Whether every text in ``value`` stands in ``known`` already, or repeats all of ``known``."""
    texts = [text for text in _texts(value) if text]
    if not texts or any(isinstance(leaf, int | float) for leaf in _leaves(value)):
        return False
    if all(any(_repeats(text, other) for other in known) for text in texts):
        return True
    parts = [text for text in known if text]
    return len(texts) == 1 and len(parts) > 1 and all(part in texts[0] for part in parts)


def _repeats(text: str, known: str) -> bool:
    return text == known or (len(text) >= _LONG and text in known)


_LONG = 12
"""Characters from which on a text does not stand in another by chance."""
_ROLES = frozenset(["system", "developer", "user", "human", "assistant", "gpt", "tool", "function"])


def _texts(value: Any) -> Iterator[str]:
    return (text.strip() for text in texts_in(value) if text not in _ROLES)


def texts_in(value: Any) -> Iterator[str]:
    """Every text inside lists and mappings, whatever their keys."""
    return (leaf for leaf in _leaves(value) if isinstance(leaf, str))


def _leaves(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        for inside in value.values():
            yield from _leaves(inside)
    elif isinstance(value, list | tuple):
        for inside in value:
            yield from _leaves(inside)
    elif value is not None:
        yield value
