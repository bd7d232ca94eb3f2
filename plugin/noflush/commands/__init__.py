"""The subcommands of ``python -m noflush``, one a file: ``add(subparsers)`` declares it, ``run(args)`` does it."""
