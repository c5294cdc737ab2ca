"""The man page coloebpf.toml(5), of the example on standard input, which has every key. Usage: toml_page.py VERSION."""

import sys

PAGE = """\
.TH COLOEBPF.TOML 5 "" "coloebpf {version}" "coloebpf"
.SH NAME
coloebpf.toml \\- configuration of one host's coloebpf
.SH DESCRIPTION
.B coloebpf run
reads it from
.IR /etc/coloebpf/coloebpf.toml ,
and again at SIGHUP.
.B coloebpf config check
names each mistake in it. This is a file with every key, as
.B coloebpf config example
prints it.
.SH EXAMPLE
.nf
{example}
.fi
.SH SEE ALSO
.BR coloebpf (8)
"""


def roff(text: str) -> str:
    """Text that roff prints as it is."""
    lines = text.replace("\\", "\\e").replace("-", "\\-").splitlines()
    return "\n".join(f"\\&{line}" if line.startswith((".", "'")) else line for line in lines)


print(PAGE.format(version=sys.argv[1], example=roff(sys.stdin.read())), end="")
