"""``python -m phi1_megatron`` is the ``phi1`` command."""

from phi1_megatron.cli import main

if __name__ == "__main__":
    main()
