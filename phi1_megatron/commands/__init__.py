"""The verbs of the ``phi1`` command, one module each; imported only when the verb is called."""
