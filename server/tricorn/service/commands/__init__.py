"""The commands of `tricorn`, each in a module of its name with a function `command`, which returns the exit status."""
