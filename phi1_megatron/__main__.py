"""``python -m phi1_megatron`` is the ``phi1`` command."""

from phi1_megatron.entry import main

if __name__ == "__main__":
    main()
