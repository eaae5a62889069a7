"""What the subcommands of `elt` do; each module offers ``run(name, arguments)``."""
