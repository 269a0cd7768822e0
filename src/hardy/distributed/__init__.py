"""How workers train together."""
