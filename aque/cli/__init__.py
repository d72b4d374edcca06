"""The command line: one file per verb, and the few things that verbs share."""
