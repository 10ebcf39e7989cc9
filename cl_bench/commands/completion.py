"""Tab completion for cl_bench and python -m cl_bench: a script for the shell.

eval "$(cl_bench completion bash)"     # for this shell; put it into ~/.bashrc to keep it
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

BASH = r"""# Tab completion of cl_bench for bash. What may follow is asked of the program itself.
_cl_bench() {
    local line=${COMP_LINE:0:COMP_POINT} program=("$1") before=${_cl_bench_before-} word typed choice choices
    if [[ ${1##*/} == python* ]]; then
        if [[ ! $line =~ ^[^[:space:]]+[[:space:]]+-m[[:space:]]+cl_bench([[:space:]].*)$ ]]; then
            [[ -z $before ]] || "$before" "$@"
            return
        fi
        program+=(-m cl_bench)
        line="cl_bench${BASH_REMATCH[1]}"
    fi
    word=${line##*[[:space:]]}
    typed=$2
    [[ $typed != "=" ]] || typed=
    read -d '' -ra choices < <(COMP_LINE=$line "${program[@]}" -sc query=bash 2> /dev/null)
    COMPREPLY=()
    for choice in "${choices[@]}"; do
        if [[ $choice == "$word"* ]]; then
            [[ $choice == *[=./] ]] || choice+=" "
            COMPREPLY+=("${choice#"${word%"$typed"}"}") # bash begins a new word after =
        fi
    done
}
if declare -F _completion_loader > /dev/null; then _completion_loader python; fi
if [[ $(complete -p python 2> /dev/null) =~ -F\ ([^ ]+) && ${BASH_REMATCH[1]} != _cl_bench ]]; then
    _cl_bench_before=${BASH_REMATCH[1]}
fi
complete -o nospace -o bashdefault -o default -F _cl_bench cl_bench PYTHONS
"""

ZSH = r"""# Tab completion of cl_bench for zsh. What may follow is asked of the program itself.
_cl_bench() {
    local -a program=("$words[1]") choices
    local first=2
    if [[ ${words[1]:t} == python* ]]; then
        if [[ $words[2] != -m || $words[3] != cl_bench ]] || (( CURRENT < 4 )); then
            if (( $+functions[_python] )); then _python; else _default; fi
            return
        fi
        program+=(-m cl_bench)
        first=4
    fi
    choices=(${=$(COMP_LINE="cl_bench ${(j: :)words[first,CURRENT]}" $program -sc query=bash 2> /dev/null)})
    compadd -S '' -- ${(M)choices:#*[=./]}
    compadd -- ${choices:#*[=./]}
    (( $#choices )) || _default
}
if (( ! $+functions[compdef] )); then autoload -U compinit; compinit; fi
autoload -U _python
compdef _cl_bench cl_bench PYTHONS
"""

SCRIPTS = {"bash": BASH, "zsh": ZSH}


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="cl_bench completion", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shell", choices=[*SCRIPTS])
    shell = parser.parse_args(arguments).shell
    pythons = dict.fromkeys(["python", "python3", Path(sys.executable).name])
    print(SCRIPTS[shell].replace("PYTHONS", " ".join(pythons)), end="")
    return 0
