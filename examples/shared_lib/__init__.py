"""What the example programs share.

command_line  bad input, the parser, the types of options, the exit status
output        the output folder
interruption  Ctrl-C and SIGTERM
layers        the backends and their recurrent layers, and the state of one
timing        seconds spent in a layer
tables        Markdown
"""
