"""The command line: what is typed comes in, tables and exit codes go out.

One file a command holds its flags and loads no torch, so that help is quick; what the command does is in actions/. The commands
`convert` and `plan` are moe2dense/conversion/api.py.
"""
