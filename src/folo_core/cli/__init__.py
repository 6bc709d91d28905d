"""The ``folo`` command. Each subcommand lives in a module of its own that is imported when it is run."""
