"""The command line. Commands import what they run when they run it, so ``--help`` is instant."""
