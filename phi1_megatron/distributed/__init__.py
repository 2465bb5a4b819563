"""Ranks: how many, which is which, who starts them, and the process groups between them."""
