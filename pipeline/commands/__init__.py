"""The command line: thin functions, no logic that a library user could miss; one file for each group of commands.

stdout carries the answer, stderr the story. Everything heavy is imported by the command that needs it.
"""
