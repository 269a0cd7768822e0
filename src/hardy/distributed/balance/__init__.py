"""Balanced training at run time: workers in groups that change, documents cut over the workers of a group."""
