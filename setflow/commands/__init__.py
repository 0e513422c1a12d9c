"""One file for each command; nothing heavy is imported before a command runs, so that ``--help`` is quick."""
