# SPDX-License-Identifier: MIT
# fish completion of kvtierctl: it knows by itself what may follow.

function __kvtierctl_complete
	set -l words (commandline -opc)
	set -l cur (commandline -ct)
	set -l program $words[1]
	set -e words[1]
	for line in ($program --complete $words "$cur" 2>/dev/null)
		switch $line
			case ':files'
				__fish_complete_path $cur
			case ':dirs'
				__fish_complete_directories $cur
			case '*'
				printf '%s\n' $line
		end
	end
end

complete -c kvtierctl -f -a '(__kvtierctl_complete)'
