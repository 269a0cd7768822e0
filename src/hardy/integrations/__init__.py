"""Adapters to other people's trainers; each file imports its trainer when it is used, not before."""
