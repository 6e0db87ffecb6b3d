"""Models, as ordinary Pyro programs on top of the rest of pvi."""
