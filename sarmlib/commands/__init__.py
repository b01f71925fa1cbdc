"""Commands that need no notebook, one module each: ``HELP``, ``add_arguments(parser)``, ``run(arguments)``."""
