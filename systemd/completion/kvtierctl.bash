# SPDX-License-Identifier: MIT
# bash completion of kvtierctl: it knows by itself what may follow.

_kvtierctl() {
	local line=${COMP_LINE:0:COMP_POINT} cur value _
	local -a words

	COMPREPLY=()
	read -ra words <<<"$line"
	[[ $line == *[[:space:]] ]] && words+=("")
	cur=${words[-1]}
	while IFS=$'\t' read -r value _; do
		case $value in
		:files | :dirs)
			compopt -o filenames 2>/dev/null
			[[ $value == :dirs ]] && value=-d || value=-f
			while IFS= read -r value; do
				COMPREPLY+=("$value")
			done < <(compgen "$value" -- "$cur")
			;;
		*)
			[[ $value == *= ]] && compopt -o nospace 2>/dev/null
			# Where = separates words, only what follows it is replaced.
			[[ $cur == *=* && $COMP_WORDBREAKS == *=* ]] && value=${value#*=}
			COMPREPLY+=("$value")
			;;
		esac
	done < <("$1" --complete "${words[@]:1}" 2>/dev/null)
}

complete -F _kvtierctl kvtierctl
