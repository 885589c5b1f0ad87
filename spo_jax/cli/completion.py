"""``spo-jax completion``: a script by which a shell completes commands, flags, keys and files."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

_DESCRIPTION = """\
Print a script that completes commands, flags, configuration keys and files. It starts nothing.

  spo-jax completion bash > FILE           and `source FILE` in ~/.bashrc
  spo-jax completion zsh > DIR/_spo-jax    with DIR in fpath, before compinit
"""

FILES, YAML = "@files", "@yaml"
"""What the script answers where a file is wanted."""

_SHARED = """\
# Words that may stand behind the command $1 and the word $2, where $3 has been typed.
_spo_jax_words() {
  case $3 in
    -*) _spo_jax_flags "$1"; return ;;
  esac
  case $2 in
    --*) _spo_jax_values "$1" "${2//_/-}"; return ;;
  esac
  _spo_jax_place "$1"
}
"""

_BASH = """\
_spo_jax() {
  local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]}
  local command=${COMP_WORDS[1]} words
  COMPREPLY=()
  if [[ $cur == "=" ]]; then
    cur=
  elif [[ $prev == "=" ]]; then
    prev=${COMP_WORDS[COMP_CWORD-2]}
  fi
  if (( COMP_CWORD == 1 )); then
    words=$(_spo_jax_actions "")
  elif [[ -n $(_spo_jax_actions "$command") ]] && (( COMP_CWORD == 2 )); then
    words=$(_spo_jax_actions "$command")
  else
    [[ -n $(_spo_jax_actions "$command") ]] && command+=" ${COMP_WORDS[2]}"
    words=$(_spo_jax_words "$command" "$prev" "$cur")
  fi
  case $words in
    @files) mapfile -t COMPREPLY < <(compgen -f -- "$cur") ;;
    @yaml) mapfile -t COMPREPLY < <(compgen -f -X '!*.yaml' -- "$cur"; compgen -d -- "$cur") ;;
    *)
      [[ $cur == -* ]] && cur=${cur//_/-}
      mapfile -t COMPREPLY < <(compgen -W "$words" -- "$cur")
      ;;
  esac
}
complete -o filenames -F _spo_jax spo-jax
"""

_ZSH = """\
_spo_jax() {
  local cur=${words[CURRENT]} prev=${words[CURRENT-1]} command=${words[2]} found
  if (( CURRENT == 2 )); then
    found=$(_spo_jax_actions "")
  elif [[ -n $(_spo_jax_actions "$command") ]] && (( CURRENT == 3 )); then
    found=$(_spo_jax_actions "$command")
  else
    [[ -n $(_spo_jax_actions "$command") ]] && command+=" ${words[3]}"
    found=$(_spo_jax_words "$command" "$prev" "$cur")
  fi
  case $found in
    @files) _files ;;
    @yaml) _files -g '*.yaml' ;;
    *) compadd -- ${=found} ;;
  esac
}
if [[ $zsh_eval_context[-1] == loadautofunc ]]; then
  _spo_jax "$@"
else
  compdef _spo_jax spo-jax
fi
"""


def add_commands(commands: Any) -> None:
    """Enter the command into the parser."""
    completion = commands.add_parser(
        "completion",
        help="A script for the shell's completion.",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    completion.add_argument("shell", choices=("bash", "zsh"))
    completion.set_defaults(command_function=_completion)


def _completion(options: argparse.Namespace) -> int:
    from spo_jax.cli import make_parser

    print(completion_script(make_parser(), options.shell), end="")
    return 0


def completion_script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The script for ``bash`` or ``zsh``: tables of words, and functions that ask them."""
    keys = _keys()
    actions, flags, values, places = [], [], [], []
    for words, command in _commands(parser, ()):
        name, inside = " ".join(words), _actions(command)
        if inside:
            actions.append((name, " ".join(inside)))
            continue
        options = [o for o in command._actions if o.option_strings]
        takes_keys = command.get_default("takes_keys") and name not in ("study", "rounds")
        given = [flag for option in options for flag in option.option_strings if flag[:2] == "--"]
        flags.append((name, " ".join([*given, *(keys if takes_keys else ())])))
        place = _place(command)
        places.append((name, place))
        for option in options:
            of = place if option.nargs == 0 else " ".join(option.choices or ()) or FILES
            values += [(f"{name} {flag}", of) for flag in option.option_strings]
        if takes_keys:
            values += [(f"{name} --*", "@key")]
    lines = [
        f"# Completion of spo-jax in {shell}, made by `spo-jax completion {shell}`.",
        *_case("_spo_jax_actions", '"$1"', actions),
        *_case("_spo_jax_flags", '"$1"', flags),
        *_case("_spo_jax_place", '"$1"', places),
        *_case("_spo_jax_key", '"$1"', [(k, v) for k, v in keys.items() if v != FILES]),
        *_case("_spo_jax_values", '"$1 $2"', values),
    ]
    text = "\n".join(lines).replace('echo "@key"', '_spo_jax_key "$2"')
    head = "#compdef spo-jax\n" if shell == "zsh" else ""
    return f"{head}{text}\n{_SHARED}{_BASH if shell == 'bash' else _ZSH}"


def _case(function: str, of: str, answers: list[tuple[str, str]]) -> Iterator[str]:
    yield f"{function}() {{"
    yield f"  case {of} in"
    for pattern, words in answers:
        rest = "*" * pattern.endswith("*")
        yield f'    {shlex.quote(pattern.removesuffix("*"))}{rest}) echo "{words}" ;;'
    if function == "_spo_jax_key":
        yield f'    *) echo "{FILES}" ;;'
    yield "  esac"
    yield "}"


def _place(command: argparse.ArgumentParser) -> str:
    """What stands where no flag does."""
    for action in command._actions:
        if not action.option_strings:
            config = str(action.metavar).startswith("CONFIG")
            return " ".join(action.choices or ()) or (YAML if config else FILES)
    return FILES


def _actions(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def _commands(
    parser: argparse.ArgumentParser, above: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], argparse.ArgumentParser]]:
    yield above, parser
    for name, command in _actions(parser).items():
        yield from _commands(command, (*above, name))


def _keys() -> Mapping[str, str]:
    """``--outer.learning-rate`` and all others -> the words they choose from, or ``FILES``."""
    from spo_jax.config.schema import Config, Named
    from spo_jax.config.validation import choices

    found: dict[str, str] = {}
    named = choices()
    hints = get_type_hints(Config)
    for item in fields(Config):
        kind = hints[item.name]
        found[f"--{item.name.replace('_', '-')}"] = _words(kind)
        if kind is Named:
            found[f"--{item.name}.name"] = " ".join(named[item.name])
            options = {k: v for of in named[item.name].values() for k, v in of.items()}
            for name, default in options.items():
                found[f"--{item.name}.{name.replace('_', '-')}"] = _words(type(default))
        elif is_dataclass(kind):
            inside = get_type_hints(kind)
            for entry in fields(kind):
                key = f"--{item.name}.{entry.name}".replace("_", "-")
                found[key] = _words(inside[entry.name])
    return found


def _words(hint: Any) -> str:
    """The words a value is chosen from, or ``FILES``."""
    kinds = [hint, *get_args(hint)]
    words = [str(w) for kind in kinds if get_origin(kind) is Literal for w in get_args(kind)]
    words += ["true", "false"] if bool in kinds else []
    return " ".join(words) or FILES
