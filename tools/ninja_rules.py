"""What ninja is told of compiling and linking, for the builds that setup.py does not do."""

RULES = """\
rule compile
  command = $cxx $flags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = $out
rule link
  command = $cxx $in $flags -o $out
  description = $out
"""
