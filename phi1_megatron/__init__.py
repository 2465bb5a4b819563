"""Train phi-1, and models like it, with 3D parallelism: on a laptop's CPU or on A100 nodes.

The package is a set of rooms (``config``, ``distributed``, ``data``, ``models``, ``checkpoint``,
``training``, ``inference`` ...); CONTRIBUTING.md draws which may import which. Importing this
module loads none of them.
"""

__version__ = "0.1.0"
