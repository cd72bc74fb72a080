"""``pf completion``: the scripts that have a shell complete what is typed.

Knows the shells.  bash, unlike the others, takes ``tcp:127.0.0.1:12000`` and ``text=hello`` apart at each sign, and
completes the last part alone; the script for it puts the words together again, and cuts its answers to that part.
"""

from __future__ import annotations

import os
from typing import Any

import click
from click.shell_completion import BashComplete, CompletionItem, FishComplete, ZshComplete, split_arg_string

from protoframe.cli.completing import STEM
from protoframe.cli.output import write_text

__all__ = ["SHELLS", "VARIABLE", "completion"]

#: The environment variable by which a script asks ``pf``.
VARIABLE = "_PF_COMPLETE"

_BASH = """\
%(complete_func)s() {
    local line="${COMP_LINE:0:COMP_POINT}" breaks="" prefix="" sign response type value
    local word="${line##*[[:space:]]}"
    for sign in : = @; do
        [[ $COMP_WORDBREAKS == *"$sign"* ]] && breaks+="$sign"
    done
    [[ -n $breaks && $word == *["$breaks"]* ]] && prefix="${word%%"${word##*["$breaks"]}"}"
    COMPREPLY=()
    response=$(env COMP_WORDS="$line" COMP_CWORD=-1 %(complete_var)s=bash_complete "$1" 2>/dev/null)
    while IFS=',' read -r type value; do
        case $type in
            stem) compopt -o nospace ;;
            plain) ;;
            *) continue ;;
        esac
        COMPREPLY+=("${value#"$prefix"}")
    done <<< "$response"
}

complete -o nosort -F %(complete_func)s %(prog_name)s
"""

_ZSH = """\
#compdef %(prog_name)s

%(complete_func)s() {
    local -a response stems plain stem_texts plain_texts
    local type key descr
    response=("${(@f)$(env COMP_WORDS="${words[*]}" COMP_CWORD=$((CURRENT-1)) \\
%(complete_var)s=zsh_complete "${words[1]}" 2>/dev/null)}")
    for type key descr in "${response[@]}"; do
        [[ "$descr" == "_" ]] && descr="$key" || descr="$key  -- $descr"
        if [[ "$type" == "stem" ]]; then
            stems+=("$key")
            stem_texts+=("$descr")
        elif [[ "$type" == "plain" ]]; then
            plain+=("$key")
            plain_texts+=("$descr")
        fi
    done
    (( $#stems )) && compadd -l -S '' -V unsorted -d stem_texts -a stems
    (( $#plain )) && compadd -l -V unsorted -d plain_texts -a plain
}

if [[ $zsh_eval_context[-1] == loadautofunc ]]; then
    %(complete_func)s "$@"
else
    compdef %(complete_func)s %(prog_name)s
fi
"""


class _Bash(BashComplete):
    source_template = _BASH

    def get_completion_args(self) -> tuple[list[str], str]:
        # The script gives the line up to the cursor, whole; with a number of 0 and more it is click's own, in words.
        if os.environ.get("COMP_CWORD") != "-1":
            return super().get_completion_args()
        line = os.environ["COMP_WORDS"]
        words = split_arg_string(line)
        incomplete = words.pop() if words and not line[-1].isspace() else ""
        return words[1:], incomplete


class _Zsh(ZshComplete):
    source_template = _ZSH

    def format_completion(self, item: CompletionItem[str]) -> str:
        return f"{item.type}\n{item.value}\n{item.help or '_'}"


class _Fish(FishComplete):
    def format_completion(self, item: CompletionItem[str]) -> str:
        # fish itself puts no space behind what ends in one of these signs.
        kind = "plain" if item.type == STEM else item.type
        return f"{kind},{item.value}\t{item.help}" if item.help else f"{kind},{item.value}"


SHELLS: dict[str, type[Any]] = {"bash": _Bash, "zsh": _Zsh, "fish": _Fish}


@click.command()
@click.argument("shell", type=click.Choice(list(SHELLS)))
def completion(shell: str) -> None:
    """Print a script that has a shell complete methods and arguments.

    What is served is asked of the server at each TAB, for a second at most.  bash 4.4 or later, zsh and fish.

    \b
    Examples:
      eval "$(pf completion bash)"                      # in ~/.bashrc
      eval "$(pf completion zsh)"                       # in ~/.zshrc
      pf completion fish > ~/.config/fish/completions/pf.fish

    \b
    Exit status: 0; 2 for another shell.
    """
    from protoframe.cli.main import pf

    made = SHELLS[shell](pf, {}, "pf", VARIABLE)
    write_text((made.source_template % made.source_vars()).rstrip("\n"))
