"""What the example programs share.

command_line  bad input, the parser, the types of options, the exit status
output        the output folder
interruption  Ctrl-C and SIGTERM
layers        the backends and their recurrent layers, and the state of one
progress      a bar on a terminal, a few lines in a file
timing        seconds spent in a layer
tables        Markdown
"""
