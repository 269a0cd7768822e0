"""Rules that make one vector of many, some of which may be anything. Pure functions of a stack."""
