"""A trained run as one file that needs no vitcls, no config and no checkpoint: what it answers, and what it is."""
