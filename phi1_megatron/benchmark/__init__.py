"""Measurements of what this package claims, beside what others offer, on this machine."""
