"""The steps: a module has ``run(what, options)``, which returns what it found."""
